"""The inferences: answers or scores of one or several models, for `predict`."""

from typing import Any

from lit_alignment.tools.convert.chat import NO_LABELS, encoding, sources
from lit_alignment.tools.convert.document import Document, Method
from lit_alignment.tools.convert.generation import META, MISASSIGNED, NOT_GENERATED, PIECES, generation
from lit_alignment.tools.convert.model import adapters, backbone
from lit_alignment.tools.convert.settings import Row, Settings, Table, carry, shorten

MANY_MODELS = "each model has a configuration of its own here; run them one after the other"
ONE_ANSWER = "with a batch above 1 there was one answer to a prompt there, and no beams; here both are as asked"
FILES = "Files have the old names, single_inference_0.jsonl and so on; a line has `dataset` instead of dataset_name."
OVERWRITTEN = "several models wrote one file there, the last one over the others; here each has a folder of its own"
SCORED = "The file is {file} in output_dir; a line has `dataset` instead of dataset_name."
SCORED_FILES = {"Classification": "classes.jsonl", "Reward": "rewards.jsonl"}
FOLLOWS = "vLLM is told what the adapter needs"
VLLM: Table = {
    "dtype": Row("bfloat16"),
    "tensor_parallel_size": Row(1),
    "gpu_memory_utilization": Row(0.95),
    "max_logprobs": Row(int),
    "enable_lora, max_lora_rank": FOLLOWS,
}


def predictions(method: Method, top: Settings) -> list[Document]:
    """Our configurations for `predict`, one a model."""
    top.notes.missing += [key for key in ("inference_settings", "dataset_settings") if not top.values.get(key)]
    seed, folder, dataset = top.take("seed", 42), top.need("save_path"), top.part("dataset_settings")
    dataset.leave_out(NO_LABELS, "add_labels", when=method.scores)
    read = {"predict": sources(dataset), "encoding": encoding(method, dataset, [], dataset), "packing": False}
    models, documents, number = top.parts("inference_settings"), [], 0
    top.warn(MANY_MODELS, "inference_settings", when=len(models) > 1)
    top.warn(OVERWRITTEN, "save_path", when=len(models) > 1 and method.scores)
    for index, old in enumerate(models):
        old.require("model_settings")
        where = folder if len(models) == 1 else f"{folder}/{index}"
        batch, answers = (old.take("batch", 1), {}) if method.scores else _generations(old, number, seed)
        number += len(answers)  # the old files are numbered through all models
        engine, done = _engine(old), "records are scored" if method.scores else "prompts are answered"
        old.leave_out(f"batch_size {done} at a time", "micro_batch")
        old.leave_out(NOT_GENERATED, "generation_settings", when=method.scores)
        module, data = method.further(top, old, where)
        module |= {} if method.scores else {"generation": answers}
        data = {**read, "batch_size": batch, **data}
        target = where if method.scores else folder
        documents.append(prediction(method, old, seed, target, module, data, **engine))
    return documents


def prediction(
    method: Method, old: Settings, seed: int, folder: str, module: dict[str, Any], data: dict[str, Any], **engine: Any
) -> Document:
    """Our configuration for `predict` of the model whose settings `old` holds."""
    model = old.part(method.model)
    model.leave_out("the tokenizer has its tokens, and nothing is trained", "embeddings_initialization_strategy")
    base = backbone(model, old.part("tokenizer_settings"), method.scores)
    module = {"backbone": base, **adapters(model, training=False), **module}
    writer = {"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": folder}}
    trainer = {"logger": False, "callbacks": [writer]}
    content = method.configuration(seed, folder, trainer, module, data) | engine
    remark = SCORED.format(file=SCORED_FILES[method.name]) if method.scores else FILES
    return Document("predict", method.purpose, content, [remark, *method.remarks])


def _generations(old: Settings, number: int, seed: int) -> tuple[int, dict[str, Any]]:
    """Our batch size, and our generation settings by the names of the old files, which begin with a number."""
    ours: dict[str, Any] = {}
    batches, vllm = [old.take("batch", 1)], old.values.get("use_vllm") is True
    for settings in old.parts("generation_settings"):
        settings.require("transformers_settings")
        settings.warn(PIECES, "transformers_settings.stop_strings", when=vllm)
        custom = settings.part("custom_settings")
        answers = generation(settings.part("transformers_settings"), custom) | {"seed": seed}
        ours[f"single_inference_{number + len(ours)}"] = answers
        batches.append(max(batches[0], custom.take("batch", 1)))
        owner = custom if custom.take("batch", 1) > 1 else old
        together, several = batches[-1] > 1, "num_return_sequences" in answers
        owner.warn(MISASSIGNED, "batch", when=together and several)
        owner.warn(ONE_ANSWER, "batch", when=together and not vllm and (several or "num_beams" in answers))
    if not ours:
        old.notes.missing.append(old.path_of("generation_settings"))
    return max(batches), ours


def _engine(old: Settings) -> dict[str, Any]:
    """Our engine, with what vLLM was told."""
    if not old.take("use_vllm", False):
        for key in ("vllm_engine_settings", "tensor_parallel_size"):
            value = old.raw(key)
            old.leave_out("use_vllm is off", key, shown=f" {shorten(value)}", when=value is not None)
        return {}
    old.warn(META, "use_vllm")
    given = old.part("vllm_engine_settings")
    given.defaults["tensor_parallel_size"] = old.take("tensor_parallel_size", 1)
    return {"engine": "vllm", "vllm": carry(given, VLLM)}
