"""train_sft: supervised fine-tuning."""

from typing import Any

from lit_alignment.tools.convert.chat import encoding, sources
from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.generation import cherry_picks
from lit_alignment.tools.convert.model import (
    PROMPT_LEARNING,
    adapter_kind,
    adapters,
    backbone,
    leave_gpu,
    tokens,
    trained_dtype,
)
from lit_alignment.tools.convert.settings import Settings
from lit_alignment.tools.convert.trainer import Training, logger, section, training, upload

PACKING = (
    "packing: false keeps the old step of batch_size conversations. Packed rows train the same loss faster: remove "
    "packing, and set tokens_per_batch."
)
PADDING = (
    "packing: false also since eager attention, and vectors before the tokens, cannot keep the conversations of a "
    "packed row apart."
)
NO_CHECKPOINTING = "prefix tuning hands over a cache of keys and values, which it cannot recompute"
LOSS = "The loss is a mean over all trained tokens of a step, whatever micro-batch they stand in."
LAST = (
    "last.ckpt is written at each epoch's end, for the model that was saved at the end there; a run shorter than its "
    "steps between validations has no other. lit-alignment export makes a folder of it."
)
HALF = (
    "The weights themselves train in {dtype}, as there, and lose small updates; dtype: float32 with precision: "
    "bf16-mixed keeps them, in twice the memory."
)
NO_EOS = "append_eos: false, as EOS had no part in the loss there; the suffix ends a turn, and is trained."


def convert(top: Settings) -> list[Document]:
    """Our configuration for `fit`."""
    notes = top.notes
    seed, folder = top.take("seed", 42), top.take("log_path", "train_output")
    for name in ("train_dataset_settings", "val_dataset_settings", "model_settings"):
        if name not in top:
            notes.missing.append(name)
    train, val = top.part("train_dataset_settings"), top.part("val_dataset_settings")
    model, picks = top.part("model_settings"), top.part("cherry_pick_settings")
    prompts = picks.part("dataset_settings") if picks.values else None
    found = adapters(model, training=True)
    base, ours = _base_and_training(top, found)

    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    callbacks: list[dict[str, Any]] = [
        {"class_path": saver, "init_args": ours.checkpoint},
        {"class_path": saver, "init_args": {"save_top_k": 0, "save_last": True, "save_on_train_epoch_end": True}},
    ]
    if picks.values:
        callbacks.append(cherry_picks(picks, adapters=bool(found)))
    callbacks += [{"class_path": f"lit_alignment.{name}"} for name in ("Export", "Throughput")] + upload(top)

    module: dict[str, Any] = {
        "backbone": base,
        **found,
        "tokens": tokens(top.part("special_tokens_settings"), model),
        "optimizer": ours.optimizer,
        **ours.model,
    }
    others = [each for each in (val, prompts) if each is not None and each.values]
    data: dict[str, Any] = {
        "train": sources(train),
        "val": sources(val),
        "encoding": encoding(train, others, prompts) if train.values else {},
        **ours.data,
        "seed": seed,
    }
    config = {
        "seed_everything": seed,
        "trainer": {
            "default_root_dir": folder,
            **ours.trainer,
            "logger": logger(top, folder),
            "callbacks": callbacks,
        },
        "model": {"class_path": "lit_alignment.SFTModule", "init_args": {k: v for k, v in module.items() if v != {}}},
        "data": {"class_path": "lit_alignment.SFTDataModule", "init_args": data},
    }
    padded = adapter_kind(model) in PROMPT_LEARNING or base.get("attention") == "eager"
    remarks = [PADDING if padded else PACKING, LOSS, LAST]
    if not found and base["dtype"] in ("bfloat16", "float16"):
        remarks.append(HALF.format(dtype=base["dtype"]))
    if data["encoding"].get("template", {}).get("append_eos") is False:
        remarks.append(NO_EOS)
    return [Document("fit", "supervised fine-tuning", config, remarks)]


def _base_and_training(top: Settings, found: dict[str, Any]) -> tuple[dict[str, Any], Training]:
    """Our backbone and training settings, which depend on each other.

    Args:
        top: The old configuration.
        found: Our adapters.
    """
    model = top.part("model_settings")
    base = backbone(model, top.part("tokenizer_settings"))
    ours = training(top, trained_dtype(model, base, found))
    base |= ours.backbone
    if adapter_kind(model) == "PREFIX_TUNING" and base.pop("gradient_checkpointing", False):
        top.notes.leave_out(section(top).path_of("gradient_checkpointing"), NO_CHECKPOINTING)
    if ours.trainer.get("accelerator") == "cpu":
        leave_gpu(model, base)
    return base, ours
