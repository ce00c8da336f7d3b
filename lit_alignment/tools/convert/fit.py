"""What all trainings share: from an old configuration of training to one of ours for `fit`."""

from dataclasses import dataclass, field
from typing import Any

from lit_alignment.tools.convert.chat import encoding, sources
from lit_alignment.tools.convert.document import Document
from lit_alignment.tools.convert.generation import cherry_picks, scored_picks
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


NOISE = "noise on the embeddings is there for supervised fine-tuning only"
SMOOTHING = "there is no label smoothing of preferences, nor of likelihoods that are summed over passages"
READ_WHOLE = "whole conversations are read, and their last token is scored"


@dataclass(frozen=True)
class Method:
    """What is trained.

    Args:
        name: Of our classes, before Module and DataModule.
        purpose: What the configuration is for.
        scores: Whether sequences are scored, instead of tokens trained.
        module: Further settings of the module.
        data: Further settings of the data module.
        remarks: What to know besides the notes.
    """

    name: str
    purpose: str
    scores: bool = False
    module: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def training_document(top: Settings, method: Method, generator: Settings | None = None) -> Document:
    """Our configuration for `fit`.

    Args:
        top: The old configuration.
        method: What is trained.
        generator: Where the language model's settings stand, if not in `model_settings`.
    """
    seed, folder = top.take("seed", 42), top.take("log_path", "train_output")
    for name in ("train_dataset_settings", "val_dataset_settings", "model_settings"):
        if name not in top:
            top.notes.missing.append(name)
    train, val = top.part("train_dataset_settings"), top.part("val_dataset_settings")
    model, picks = generator or top.part("model_settings"), top.part("cherry_pick_settings")
    found = adapters(model, training=True)
    base, ours = _base_and_training(top, model, found, method)

    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    callbacks: list[dict[str, Any]] = [
        {"class_path": saver, "init_args": ours.checkpoint},
        {"class_path": saver, "init_args": {"save_top_k": 0, "save_last": True, "save_on_train_epoch_end": True}},
    ]
    if picks.values:
        callbacks.append(scored_picks(picks) if method.scores else cherry_picks(picks, adapters=bool(found)))
    callbacks += [{"class_path": f"lit_alignment.{name}"} for name in ("Export", "Throughput")] + upload(top)

    module: dict[str, Any] = {
        "backbone": base,
        **method.module,
        **found,
        "tokens": tokens(top.part("special_tokens_settings"), model),
        "optimizer": ours.optimizer,
        **ours.model,
    }
    data: dict[str, Any] = {
        "train": sources(train),
        "val": sources(val),
        "encoding": _encoding(train, val, picks, method),
        **method.data,
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
        "model": {
            "class_path": f"lit_alignment.{method.name}Module",
            "init_args": {k: v for k, v in module.items() if v != {}},
        },
        "data": {"class_path": f"lit_alignment.{method.name}DataModule", "init_args": data},
    }
    padded = adapter_kind(model) in PROMPT_LEARNING or base.get("attention") == "eager"
    remarks = [PADDING if padded else PACKING, *method.remarks]
    remarks += [LAST] if method.scores else [LOSS, LAST]
    if not found and base["dtype"] in ("bfloat16", "float16"):
        remarks.append(HALF.format(dtype=base["dtype"]))
    if not method.scores and data["encoding"].get("template", {}).get("append_eos") is False:
        remarks.append(NO_EOS)
    return Document("fit", method.purpose, config, remarks)


def _encoding(train: Settings, val: Settings, picks: Settings, method: Method) -> dict[str, Any]:
    prompts = picks.part("dataset_settings") if picks.values else None
    others = [each for each in (val, prompts) if each is not None and each.values]
    if not train.values:
        return {}
    if not method.scores:
        return encoding(train, others, prompts)
    return scored_encoding(train, others, keep_end=method.name == "Reward")


def scored_encoding(dataset: Settings, others: list[Settings], keep_end: bool = False) -> dict[str, Any]:
    """Our `data.encoding` of data sets whose sequences are scored; their chat settings stand one level below.

    Args:
        dataset: The data set whose settings hold.
        others: Further data sets.
        keep_end: Whether conversations are cut at their start whatever is set, as those of pairs were.
    """
    for each in (dataset, *others):
        each.take("dataset_type", "chat")
    ours = encoding(chat_settings(dataset), [chat_settings(each) for each in others])
    del ours["loss_on"]
    if keep_end:
        ours["truncation"] = "keep_end"
    for each in (dataset, *others):
        chat_settings(each).leave_out(READ_WHOLE, "only_answer_loss", "only_last_replica_loss")
    return ours


def chat_settings(dataset: Settings) -> Settings:
    """Where a data set says how conversations become tokens."""
    return next((dataset.part(name) for name in ("chat_settings", "chat_dataset") if name in dataset), dataset)


def _base_and_training(
    top: Settings, model: Settings, found: dict[str, Any], method: Method
) -> tuple[dict[str, Any], Training]:
    """Our backbone and training settings, which depend on each other."""
    base = backbone(model, top.part("tokenizer_settings"), scores=method.scores)
    ours = training(top, trained_dtype(model, base, found))
    base |= ours.backbone
    if adapter_kind(model) == "PREFIX_TUNING" and base.pop("gradient_checkpointing", False):
        top.notes.leave_out(section(top).path_of("gradient_checkpointing"), NO_CHECKPOINTING)
    if ours.trainer.get("accelerator") == "cpu":
        leave_gpu(model, base)
    trains_tokens = not method.scores and method.name not in ("RAG", "VLM")
    if not trains_tokens and ours.model.pop("neftune_alpha", None) is not None:
        top.notes.leave_out(section(top).path_of("neftune_noise_alpha"), NOISE)
    if method.name in ("Reward", "RAG") and ours.model.pop("label_smoothing", None) is not None:
        top.notes.leave_out(section(top).path_of("label_smoothing_factor"), SMOOTHING)
    return base, ours
