"""The trainings: from an old configuration of one to ours for `fit`."""

from typing import Any

from lit_alignment.tools.convert.chat import NO_LABELS, encoding, sources
from lit_alignment.tools.convert.document import Document, Method
from lit_alignment.tools.convert.generation import cherry_picks
from lit_alignment.tools.convert.model import adapters, backbone, leave_gpu, tokens
from lit_alignment.tools.convert.settings import Settings
from lit_alignment.tools.convert.trainer import logger, section, training, upload

PACKING = """packing: false keeps the old step of batch_size conversations. Packed rows train the same loss faster: \
remove packing, and set tokens_per_batch."""
PADDING = """packing: false also since eager attention, and virtual tokens before the prompt, cannot keep the \
conversations of a packed row apart."""
NO_CHECKPOINTING = "prefix tuning hands over a cache of keys and values, which it cannot recompute"
LOSS = "The loss is a mean over all trained tokens of a step, whatever micro-batch they stand in."
LAST = """last.ckpt is written at each epoch's end, for the model that was saved at the end there; a run shorter than \
its steps between validations has no other. lit-alignment export makes a folder of it."""
HALF = """The weights themselves train in {dtype}, as there, and lose small updates; dtype: float32 with precision: \
bf16-mixed keeps them, in twice the memory."""
NO_EOS = "append_eos: false, as EOS had no part in the loss there; the suffix ends a turn, and is trained."
NOISE = "noise on the embeddings is there for supervised fine-tuning only"
SMOOTHING = "there is no label smoothing of preferences, nor of likelihoods that are summed over passages"
SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"
LAST_EPOCH = {"save_top_k": 0, "save_last": True, "save_on_train_epoch_end": True}


def training_documents(method: Method, top: Settings) -> list[Document]:
    """Our configuration for `fit`."""
    top.require("train_dataset_settings", "val_dataset_settings", "model_settings")
    seed, folder = top.take("seed", 42), top.take("log_path", "train_output")
    model, picks = top.part(method.model), top.part("cherry_pick_settings")
    train, val = top.part("train_dataset_settings"), top.part("val_dataset_settings")
    prompts = picks.part("dataset_settings")
    for each in (train, val, prompts):
        each.leave_out(NO_LABELS, "add_labels", when=method.scores)
    further, further_data = method.further(top, top, folder)
    found = adapters(model, training=True)
    base = backbone(model, top.part("tokenizer_settings"), method.scores)
    peft = found.get("peft", {})
    # Adapters are float32, and whole layers beside them are as the base.
    whole = not found or peft.get("init_args", {}).get("modules_to_save")
    ours = training(top, base["dtype"] if whole else "float32")
    base |= ours["backbone"]
    old = section(top)
    if peft.get("class_path") == "peft.PrefixTuningConfig" and base.pop("gradient_checkpointing", False):
        old.leave_out(NO_CHECKPOINTING, "gradient_checkpointing")
    if method.name != "SFT" and ours["module"].pop("neftune_alpha", None) is not None:
        old.leave_out(NOISE, "neftune_noise_alpha")
    if method.name in ("Reward", "RAG", "Preference") and ours["module"].pop("label_smoothing", None) is not None:
        old.leave_out(SMOOTHING, "label_smoothing_factor")
    if ours["trainer"].get("accelerator") == "cpu":
        leave_gpu(model, base)
    callbacks: list[dict[str, Any]] = [
        {"class_path": SAVER, "init_args": ours["checkpoint"]},
        {"class_path": SAVER, "init_args": LAST_EPOCH},
        *([cherry_picks(picks, method, adapters=bool(found))] if picks.values else []),
        *({"class_path": f"lit_alignment.{name}"} for name in ("Export", "Throughput")),
        *upload(top),
    ]
    module = {"backbone": base, **further, **found}
    if new := tokens(top.part("special_tokens_settings"), model, peft):
        module["tokens"] = new
    module |= {"optimizer": ours["optimizer"], **ours["module"]}
    data = {
        "train": sources(train),
        "val": sources(val),
        "encoding": encoding(method, train, [each for each in (val, prompts) if each.values], prompts),
        **further_data,
        **ours["data"],
    }
    trainer = ours["trainer"] | {"logger": logger(top, folder), "callbacks": callbacks}
    padded = peft.get("class_path", "peft.LoraConfig") != "peft.LoraConfig" or base.get("attention") == "eager"
    of_tokens = not (method.scores or method.compares)
    remarks = [PADDING if padded else PACKING, *method.remarks, *([LOSS] if of_tokens else []), LAST]
    if not found and base["dtype"] in ("bfloat16", "float16"):
        remarks.append(HALF.format(dtype=base["dtype"]))
    if not method.scores and data["encoding"].get("template", {}).get("append_eos") is False:
        remarks.append(NO_EOS)
    return [Document("fit", method.purpose, method.configuration(seed, folder, trainer, module, data), remarks)]
