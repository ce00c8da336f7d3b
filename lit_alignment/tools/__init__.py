"""Commands that are not Trainer loops, one file each."""

TRAINER_COMMANDS = {
    "fit": "train a model, validating as it goes",
    "validate": "measure a model on the validation data",
    "test": "measure a model on the test data",
    "predict": "answer prompts and write predictions as JSONL",
}
TOOLS = {
    "init": ("lit_alignment.tools.init", "write a short configuration for a method, with records to try it on"),
    "inspect": ("lit_alignment.tools.inspect", "show what the model will see, and why records were dropped"),
    "estimate": ("lit_alignment.tools.estimate", "parameters and memory per device, before a launch"),
    "export": ("lit_alignment.tools.export", "checkpoint or adapter -> a Hugging Face folder, logits compared"),
    "merge": ("lit_alignment.tools.merge", "the same, with the adapters merged into the weights"),
    "evaluate": ("lit_alignment.tools.evaluate", "metrics of predictions: answers, classes or rewards"),
    "report": ("lit_alignment.tools.report", "compare runs on one page: settings, figures, curves, answers"),
    "sample": (
        "lit_alignment.tools.sample",
        "choose among scored answers: best of n, rejection sampling; as pairs or chats",
    ),
    "convert": ("lit_alignment.tools.convert", "a turbo-alignment JSON -> a YAML of ours, with what differs"),
    "index": ("lit_alignment.tools.index", "passages -> an index for RAG (build), and what it finds (eval)"),
    "preprocess": ("lit_alignment.tools.preprocess", "images -> a cache of features; training needs no encoder"),
    "chat": ("lit_alignment.tools.chat", "talk to a trained model in the terminal"),
    "serve": ("lit_alignment.tools.serve", "a trained model over HTTP, as OpenAI's API; a page to chat on"),
    "fetch": ("lit_alignment.tools.fetch", "put a small model into the cache without a model hub"),
    "completion": ("lit_alignment.tools.completion", "what bash, zsh or fish needs to complete a command line"),
    "doctor": ("lit_alignment.tools.doctor", "versions, devices and what is installed, to paste into a report"),
    "demo": ("lit_alignment.tools.demo", "fine-tune a small model on CPU and show what it learned"),
}
