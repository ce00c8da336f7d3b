"""Trainer, optimiser, checkpoints, loggers and upload."""

import os
from dataclasses import dataclass, field
from typing import Any

from lit_alignment.tools.convert.settings import Settings

# The values that held there where nothing was said. `trainer_settings` is the older name of the section, with defaults
# of its own; `training_arguments` has those of transformers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "trainer_settings": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 32,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "steps",
        "eval_steps": 150,
        "save_steps": 150,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "logging_steps": 5,
        "fp16": True,
        "dataloader_num_workers": 8,
    },
    "training_arguments": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "eval_strategy": "no",
        "eval_steps": 0,
        "save_steps": 500,
        "save_total_limit": 0,
        "load_best_model_at_end": False,
        "logging_steps": 500,
        "fp16": False,
        "dataloader_num_workers": 0,
    },
}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
SHARDING = (
    "set trainer.devices, and trainer.strategy to ddp or to lit_alignment.FSDP2Strategy, which takes bf16-mixed but "
    "not 16-mixed; configs/trainer/ has both, and DeepSpeed"
)
FP16_BFLOAT16 = (
    "fp16 was on there unless it was switched off, and it cannot scale the gradients of weights in bfloat16; here the "
    "precision is bf16-mixed"
)
FP16_FLOAT16 = "fp16 cannot scale the gradients of weights in float16, which ended the run there; here they are float32"
FP16_CPU = "the CPU has no fp16; the precision is 32-true"
SAVED_AT_VALIDATION = "checkpoints are compared by val/loss, so they are saved at each validation"
RESUME = (
    "a run resumed by itself there if the folder /checkpoints existed, whoever had written it; here with --ckpt_path "
    "and the path of a checkpoint"
)
UPLOAD = (
    "every rank uploaded there, a failure ended the run, and removing checkpoint-1 also removed checkpoint-10; here "
    "rank 0 does, a failure is a warning, and each file is removed by its own name"
)
# What no counterpart is needed for, with the reason.
WITHOUT_COUNTERPART = {
    "batches are encoded before training; building one is cheap": (
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
    ),
    "the first step is logged like any other": ("logging_first_step",),
    "loggers are set in trainer.logger": ("report_to", "run_name", "logging_dir", "logging_strategy", "disable_tqdm"),
    "gradient checkpointing is never reentrant": ("gradient_checkpointing_kwargs",),
    "set torch.set_float32_matmul_precision, if float32 is used": ("tf32",),
    "validation gives losses, not logits": ("prediction_loss_only", "eval_accumulation_steps"),
    "the data module knows its columns and its order": ("remove_unused_columns", "group_by_length", "data_seed"),
    "the run's folder is below trainer.default_root_dir": ("output_dir", "overwrite_output_dir"),
    "the command says what is run": ("do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
    "the seed is the one at the top": ("seed",),
    "sequence parallelism is not there yet": ("sequence_parallel",),
    SHARDING: ("deepspeed", "fsdp", "fsdp_config", "ddp_find_unused_parameters", "ddp_timeout"),
}


@dataclass
class Training:
    """What the training settings become.

    Args:
        trainer: Keys of `trainer`.
        checkpoint: Arguments of ModelCheckpoint.
        optimizer: Keys of `model.optimizer`.
        model: Further keys of the module.
        backbone: Further keys of its backbone.
        data: Keys of the data module.
    """

    trainer: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def section(top: Settings) -> Settings:
    """The settings of the old trainer."""
    return top.part("training_arguments" if "training_arguments" in top else "trainer_settings")


def training(top: Settings, dtype: str) -> Training:
    """Our settings for those of the old trainer.

    Args:
        top: The whole configuration.
        dtype: Of the weights that train.
    """
    old = section(top)
    defaults = DEFAULTS[old.path]
    ours = Training()
    batch = old.take("per_device_train_batch_size", int(defaults["per_device_train_batch_size"]))
    accumulate = old.take("gradient_accumulation_steps", int(defaults["gradient_accumulation_steps"]))
    if old.take("no_cuda", False) | old.take("use_cpu", False):
        ours.trainer["accelerator"] = "cpu"
    _set_precision(old, defaults, dtype, ours)
    ours.trainer |= _length(old)
    ours.trainer["accumulate_grad_batches"] = accumulate
    if (norm := old.take("max_grad_norm", 1.0)) > 0:
        ours.trainer["gradient_clip_val"] = norm
    ours.trainer["log_every_n_steps"] = max(1, int(old.take("logging_steps", float(defaults["logging_steps"]))))
    validated = _validation(old, defaults, accumulate, ours)
    ours.checkpoint = _checkpoint(old, defaults, validated)
    ours.optimizer = _optimizer(old, defaults)
    ours.data = {"packing": False, "batch_size": batch}
    if (evaluated := old.maybe("per_device_eval_batch_size", int)) not in (None, batch):
        old.notes.leave_out(old.path_of("per_device_eval_batch_size"), f"{evaluated}; one batch_size serves all splits")
    if workers := old.take("dataloader_num_workers", int(defaults["dataloader_num_workers"])):
        ours.data["num_workers"] = workers
    for theirs, section_of_ours, name, kind in (
        ("neftune_noise_alpha", ours.model, "neftune_alpha", float),
        ("label_smoothing_factor", ours.model, "label_smoothing", float),
        ("gradient_checkpointing", ours.backbone, "gradient_checkpointing", bool),
        ("torch_compile", ours.backbone, "compile", bool),
    ):
        if value := old.maybe(theirs, kind):
            section_of_ours[name] = value
    for reason, keys in WITHOUT_COUNTERPART.items():
        old.leave_out(reason, *keys)
    top.notes.warn("resuming", RESUME)
    return ours


def _set_precision(old: Settings, defaults: dict[str, Any], dtype: str, ours: Training) -> None:
    fp16 = old.take("fp16", bool(defaults["fp16"]))
    if old.take("bf16", False):
        ours.trainer["precision"] = "bf16-mixed"
    elif fp16 and "accelerator" in ours.trainer:
        ours.trainer["precision"] = "32-true"
        old.notes.leave_out(old.path_of("fp16"), FP16_CPU)
    elif fp16 and dtype == "bfloat16":
        ours.trainer["precision"] = "bf16-mixed"
        old.notes.warn(f"{old.path_of('fp16')} -> trainer.precision", FP16_BFLOAT16)
    elif fp16:
        ours.trainer["precision"] = "16-mixed"
        if dtype == "float16":
            ours.backbone["dtype"] = "float32"
            old.notes.warn(f"{old.path_of('fp16')} -> model.backbone.dtype", FP16_FLOAT16)


def _length(old: Settings) -> dict[str, Any]:
    steps, epochs = old.take("max_steps", -1), old.take("num_train_epochs", 3.0)
    if steps > 0:
        if "num_train_epochs" in old:
            old.notes.leave_out(old.path_of("num_train_epochs"), "max_steps goes first, as there")
        return {"max_steps": steps}
    whole = -int(-epochs // 1)
    if whole != epochs:
        old.notes.leave_out(old.path_of("num_train_epochs"), f"{epochs}; a run ends with an epoch, here the {whole}th")
    return {"max_epochs": whole}


def _validation(old: Settings, defaults: dict[str, Any], accumulate: int, ours: Training) -> bool:
    """Set when to validate, and return whether it is done at all."""
    strategy = old.take("evaluation_strategy", old.take("eval_strategy", str(defaults["eval_strategy"])))
    steps = old.take("eval_steps", float(defaults["eval_steps"])) or float(_logging_steps(old, defaults))
    if strategy == "no":
        ours.trainer["limit_val_batches"] = 0
    elif strategy == "steps" and steps < 1:
        old.notes.leave_out(old.path_of("eval_steps"), "a share of the run; validation is at each epoch's end")
    elif strategy == "steps":
        # Lightning counts batches and, with null, across epochs.
        ours.trainer |= {"val_check_interval": int(steps) * accumulate, "check_val_every_n_epoch": None}
    return strategy != "no"


def _logging_steps(old: Settings, defaults: dict[str, Any]) -> float:
    return old.take("logging_steps", float(defaults["logging_steps"]))


def _checkpoint(old: Settings, defaults: dict[str, Any], validated: bool) -> dict[str, Any]:
    """Arguments of ModelCheckpoint."""
    strategy = old.take("save_strategy", "steps")
    steps = int(old.take("save_steps", float(defaults["save_steps"])))
    limit = old.take("save_total_limit", int(defaults["save_total_limit"]))
    best = old.take("load_best_model_at_end", bool(defaults["load_best_model_at_end"]))
    metric = old.maybe("metric_for_best_model", str)
    if metric not in (None, "loss", "eval_loss"):
        old.notes.leave_out(old.path_of("metric_for_best_model"), f"'{metric}'; val/loss tells the best")
    old.leave_out("val/loss tells the best, the lower the better", "greater_is_better")
    ours: dict[str, Any] = {}
    if validated and (best or metric is not None):
        ours |= {"monitor": "val/loss", "save_top_k": limit or -1}
        if "save_steps" in old or "save_strategy" in old:
            keys = [key for key in ("save_steps", "save_strategy") if key in old]
            old.notes.leave_out(", ".join(map(old.path_of, keys)), SAVED_AT_VALIDATION)
    else:
        ours |= {"monitor": "step", "mode": "max", "save_top_k": limit or -1}  # the newest ones
        if strategy == "steps":
            ours["every_n_train_steps"] = max(1, steps)
    if old.take("save_only_model", False):
        ours["save_weights_only"] = True
    return ours


def _optimizer(old: Settings, defaults: dict[str, Any]) -> dict[str, Any]:
    name = old.take("optim", "adamw_torch")
    if name not in ADAMW:
        old.notes.leave_out(old.path_of("optim"), f"'{name}'; the optimiser is AdamW")
    steps, ratio = old.take("warmup_steps", 0.0), old.take("warmup_ratio", 0.0)
    kind = old.take("lr_scheduler_type", str(defaults["lr_scheduler_type"]))
    ours: dict[str, Any] = {
        "learning_rate": old.take("learning_rate", float(defaults["learning_rate"])),
        "weight_decay": old.take("weight_decay", 0.0),
        "betas": [old.take("adam_beta1", 0.9), old.take("adam_beta2", 0.999)],
        "eps": old.take("adam_epsilon", 1e-8),
        "schedule": "cosine",
        "warmup": (int(steps) if steps >= 1 else steps or ratio) if kind != "constant" else 0,
    }
    more = old.part("lr_scheduler_kwargs")
    match kind:
        case "linear" | "cosine":
            ours["schedule"] = kind
        case "constant" | "constant_with_warmup":
            ours["schedule"] = "constant"
        case "cosine_with_min_lr":
            ours["min_ratio"] = more.take("min_lr_rate", more.take("min_lr", 0.0) / (ours["learning_rate"] or 1.0))
        case "warmup_stable_decay":
            ours["schedule"] = "wsd"
            more.leave_out("set optimizer.decay_share, a share of all steps", "num_decay_steps", "num_stable_steps")
            ours["min_ratio"] = more.take("min_lr_ratio", 0.0)
        case _:
            reason = f"'{kind}'; ours are cosine, linear, constant and wsd, and cosine is set"
            old.notes.leave_out(old.path_of("lr_scheduler_type"), reason)
    more.leave_out("the schedule has no such setting", *[path.rpartition(".")[2] for path in more.unread()])
    return ours


def logger(top: Settings, folder: str) -> Any:
    """Our `trainer.logger`: W&B, ClearML, none, or TensorBoard where nothing was said."""
    given = [key for key in ("wandb_settings", "clearml_settings", "logging_settings") if top.values.get(key)]
    if not given:
        return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": folder}}
    for key in given[1:]:
        top.leave_out(f"{given[0]} goes first", key)
    old = top.part(given[0])
    kind = old.maybe("logging_type", str)
    if given[0] == "clearml_settings" or kind == "clearml" or (kind is None and "task_name" in old):
        arguments: dict[str, Any] = {name: old.need(name, str) for name in ("project_name", "task_name")}
        if tags := old.texts("tags"):
            arguments["tags"] = tags
        arguments["save_dir"] = folder
        return {"class_path": "lit_alignment.ClearMLLogger", "init_args": arguments}
    mode = old.take("mode", "online")
    arguments = {"project": old.need("project_name", str), "name": old.need("run_name", str), "save_dir": folder}
    if mode == "offline":
        arguments["offline"] = True
    more: dict[str, Any] = {name: value for name in ("entity", "notes") if (value := old.maybe(name, str)) is not None}
    if tags := old.texts("tags"):
        more["tags"] = tags
    if mode == "disabled":
        return False
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": arguments}
    return wandb | ({"dict_kwargs": more} if more else {})


def upload(top: Settings) -> list[dict[str, Any]]:
    """Our Upload callback, where checkpoints were uploaded."""
    key = "checkpoint_uploader_callback_parameters"
    if not top.values.get(key):
        return []
    old = top.part(key)
    bucket, host = (os.environ.get(f"S3_CHECKPOINTS_{name}", "") for name in ("BUCKET", "HOST"))
    arguments: dict[str, Any] = {"url": f"s3://{bucket or 'BUCKET'}/{old.need('directory', str).strip('/')}"}
    if not old.take("save_optimizer_states", True):
        arguments["what"] = "exports"  # checkpoints always hold the optimiser's state, exports never do
    if host:
        arguments["storage_options"] = {"endpoint_url": host}
    unset = [name for name, value in (("BUCKET", bucket), ("HOST", host)) if not value]
    for name in unset:
        place = "into Upload.url" if name == "BUCKET" else "into Upload.storage_options as endpoint_url"
        top.notes.leave_out(f"S3_CHECKPOINTS_{name}", f"not set where this was converted; put it {place}")
    names = "S3_CHECKPOINTS_AWS_ACCESS_KEY_ID, S3_CHECKPOINTS_AWS_SECRET_ACCESS_KEY"
    top.notes.leave_out(names, "they are read as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    old.leave_out("names of folders are given", "tokenizer_folder_name", "checkpoints_folder_name")
    top.notes.warn(f"{key} -> lit_alignment.Upload", UPLOAD)
    return [{"class_path": "lit_alignment.Upload", "init_args": arguments}]
