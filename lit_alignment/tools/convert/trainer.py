"""The old trainer's settings: batches, precision, optimizer, validation, checkpoints, loggers and upload."""

import os
from typing import Any

from lit_alignment.tools.convert.settings import Row, Settings, Table, carry

SHARDING = """set trainer.devices, and trainer.strategy to ddp or to lit_alignment.FSDP2Strategy, which takes \
bf16-mixed but not 16-mixed; configs/trainer/ has both, and DeepSpeed"""
FP16_BFLOAT16 = """fp16 was on there unless it was switched off, and it cannot scale the gradients of weights in \
bfloat16; here the precision is bf16-mixed"""
FP16_FLOAT16 = "fp16 cannot scale the gradients of weights in float16, which ended the run there; here they are float32"
FP16_CPU = "the CPU has no fp16; the precision is 32-true"
SAVED_AT_VALIDATION = "checkpoints are compared by val/loss, so they are saved at each validation"
RESUME = """a run resumed by itself there if the folder /checkpoints existed, whoever had written it; here with \
--ckpt_path and the path of a checkpoint"""
UPLOAD = """every rank uploaded there, a failure ended the run, and removing checkpoint-1 also removed checkpoint-10; \
here rank 0 does, a failure is a warning, and each file is removed by its own name"""

# Defaults of `trainer_settings`, the older name of the section, where they are not transformers'.
OLDER: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 32,
    "dataloader_num_workers": 8,
}
OLDER |= {"learning_rate": 3e-4, "lr_scheduler_type": "cosine", "fp16": True, "logging_steps": 5}
OLDER |= {"eval_strategy": "steps", "eval_steps": 150, "load_best_model_at_end": True}
OLDER |= {"save_steps": 150, "save_total_limit": 1}
TRAINING: Table = {
    "gradient_accumulation_steps": Row(1, "trainer.accumulate_grad_batches"),
    "max_grad_norm": Row(1.0, "trainer.gradient_clip_val", make=lambda norm: norm if norm > 0 else None),
    "logging_steps": Row(500.0, "trainer.log_every_n_steps", make=lambda steps: max(1, int(steps))),
    "per_device_train_batch_size": Row(8, "data.batch_size"),
    "dataloader_num_workers": Row(0, "data.num_workers", changed=True),
    "neftune_noise_alpha": Row(0.0, "module.neftune_alpha", changed=True),
    "label_smoothing_factor": Row(0.0, "module.label_smoothing", changed=True),
    "gradient_checkpointing": Row(False, "backbone.gradient_checkpointing", changed=True),
    "torch_compile": Row(False, "backbone.compile", changed=True),
}
UNUSED: Table = {
    "dataloader_prefetch_factor, dataloader_persistent_workers, dataloader_pin_memory": (
        "batches are encoded before training; building one is cheap"
    ),
    "logging_first_step": "the first step is logged like any other",
    "report_to, run_name, logging_dir, logging_strategy, disable_tqdm": "loggers are set in trainer.logger",
    "gradient_checkpointing_kwargs": "gradient checkpointing is never reentrant",
    "tf32": "set torch.set_float32_matmul_precision, if float32 is used",
    "prediction_loss_only, eval_accumulation_steps": "validation gives losses, not logits",
    "remove_unused_columns, group_by_length, data_seed": "the data module knows its columns and its order",
    "output_dir, overwrite_output_dir": "the run's folder is below trainer.default_root_dir",
    "do_train, do_eval, do_predict, resume_from_checkpoint": "the command says what is run",
    "seed": "the seed is the one at the top",
    "sequence_parallel": "sequence parallelism is not there yet",
    "deepspeed, fsdp, fsdp_config, ddp_find_unused_parameters, ddp_timeout": SHARDING,
}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
SCHEDULES = {"constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd"}
WANDB_MORE: Table = {"entity": Row(str), "notes": Row(str)}


def section(top: Settings) -> Settings:
    """The settings of the old trainer."""
    newer = "training_arguments" in top
    old = top.part("training_arguments" if newer else "trainer_settings")
    old.defaults |= {} if newer else OLDER
    return old


def training(top: Settings, dtype: str) -> dict[str, dict[str, Any]]:
    """Our keys of `trainer`, `checkpoint` (its callback), `data`, `module`, its `backbone` and its `optimizer`."""
    old = section(top)
    ours: dict[str, dict[str, Any]] = {"backbone": {}, "module": {}, **carry(old, TRAINING)}
    accumulate, batch = ours["trainer"]["accumulate_grad_batches"], ours["data"]["batch_size"]
    interval = old.take("eval_steps", 0.0) or old.take("logging_steps", 500.0)
    match old.take("evaluation_strategy", old.take("eval_strategy", "no")):
        case "no":
            ours["trainer"]["limit_val_batches"] = 0
        case "steps" if interval < 1:
            old.leave_out("a share of the run; validation is at each epoch's end", "eval_steps")
        case "steps":
            # Lightning counts batches and, with null, across epochs.
            ours["trainer"] |= {"val_check_interval": int(interval) * accumulate, "check_val_every_n_epoch": None}
    precision = _precision(old, dtype)
    if precision.get("precision") == "16-mixed" and dtype == "float16":
        old.warn(FP16_FLOAT16, "fp16", "model.backbone.dtype")
        ours["backbone"]["dtype"] = "float32"
    steps, epochs = old.take("max_steps", -1), old.take("num_train_epochs", 3.0)
    whole = -int(-epochs // 1)
    old.leave_out("max_steps goes first, as there", "num_train_epochs", when=steps > 0)
    reason = f"{epochs}; a run ends with an epoch, here the {whole}th"
    old.leave_out(reason, "num_train_epochs", when=steps <= 0 and whole != epochs)
    length = {"max_steps": steps} if steps > 0 else {"max_epochs": whole}
    ours["trainer"] = {**precision, **length, **ours["trainer"]}
    ours["checkpoint"] = _checkpoint(old, validated="limit_val_batches" not in ours["trainer"])
    ours["optimizer"] = _optimizer(old)
    ours["data"] = {"packing": False, **ours["data"]}
    evaluated = old.take("per_device_eval_batch_size", batch)
    serves = f"{evaluated}; one batch_size serves all splits"
    old.leave_out(serves, "per_device_eval_batch_size", when=evaluated != batch)
    carry(old, UNUSED)
    top.warn(RESUME, "resuming")
    return ours


def _precision(old: Settings, dtype: str) -> dict[str, Any]:
    bf16, fp16, cpu = (old.take(key, False) for key in ("bf16", "fp16", "no_cuda"))
    cpu |= old.take("use_cpu", False)
    ours = {"accelerator": "cpu"} if cpu else {}
    if not (bf16 or fp16):
        return ours
    if cpu and not bf16:
        old.leave_out(FP16_CPU, "fp16")
        return ours | {"precision": "32-true"}
    if dtype == "bfloat16" and not bf16:
        old.warn(FP16_BFLOAT16, "fp16", "trainer.precision")
    return ours | {"precision": "bf16-mixed" if bf16 or dtype == "bfloat16" else "16-mixed"}


def _checkpoint(old: Settings, validated: bool) -> dict[str, Any]:
    """Arguments of ModelCheckpoint."""
    best, metric = old.take("load_best_model_at_end", False), old.maybe("metric_for_best_model", str)
    other = metric not in (None, "loss", "eval_loss")
    old.leave_out(f"'{metric}'; val/loss tells the best", "metric_for_best_model", when=other)
    old.leave_out("val/loss tells the best, the lower the better", "greater_is_better")
    strategy, steps = old.take("save_strategy", "steps"), old.take("save_steps", 500.0)
    kept = {"save_top_k": old.take("save_total_limit", 0) or -1}
    if validated and (best or metric is not None):
        ours: dict[str, Any] = {"monitor": "val/loss", **kept}
        old.leave_out(SAVED_AT_VALIDATION, *[key for key in ("save_steps", "save_strategy") if key in old])
    else:
        ours = {"monitor": "step", "mode": "max", **kept}  # the newest ones
        ours |= {"every_n_train_steps": max(1, int(steps))} if strategy == "steps" else {}
    return ours | carry(old, {"save_only_model": Row(False, "save_weights_only", changed=True)})


def _optimizer(old: Settings) -> dict[str, Any]:
    name = old.take("optim", "adamw_torch")
    old.leave_out(f"'{name}'; the optimizer is AdamW", "optim", when=name not in ADAMW)
    kind = old.take("lr_scheduler_type", "linear")
    schedule = SCHEDULES.get(kind, kind)
    if schedule not in ("cosine", "linear", "constant", "wsd"):
        reason = f"'{kind}'; ours are cosine, linear, constant and wsd, and cosine is set"
        old.leave_out(reason, "lr_scheduler_type")
        schedule = "cosine"
    steps, ratio = old.take("warmup_steps", 0.0), old.take("warmup_ratio", 0.0)
    rate, more = old.take("learning_rate", 5e-5), old.part("lr_scheduler_kwargs")
    ours: dict[str, Any] = {
        "learning_rate": rate,
        "weight_decay": old.take("weight_decay", 0.0),
        "betas": [old.take("adam_beta1", 0.9), old.take("adam_beta2", 0.999)],
        "eps": old.take("adam_epsilon", 1e-8),
        "schedule": schedule,
        "warmup": (int(steps) if steps >= 1 else steps or ratio) if kind != "constant" else 0,
    }
    if kind == "cosine_with_min_lr":
        ours["min_ratio"] = more.take("min_lr_rate", more.take("min_lr", 0.0) / (rate or 1.0))
    if schedule == "wsd":
        more.leave_out("set optimizer.decay_share, a share of all steps", "num_decay_steps", "num_stable_steps")
        ours["min_ratio"] = more.take("min_lr_ratio", 0.0)
    more.leave_out_rest("the schedule has no such setting")
    return ours


def logger(top: Settings, folder: str) -> Any:
    """Our `trainer.logger`: W&B, ClearML, none, or TensorBoard where nothing was said."""
    named = [key for key in ("wandb_settings", "clearml_settings", "logging_settings") if top.values.get(key)]
    if not named:
        return {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": folder}}
    top.leave_out(f"{named[0]} goes first", *named[1:])
    old = top.part(named[0])
    kind = old.take("logging_type", "clearml" if "task_name" in old else "wandb")
    tags = carry(old, {"tags": Row(list, make=lambda tags: tags or None)})
    if named[0] == "clearml_settings" or kind == "clearml":
        names = {key: old.need(key) for key in ("project_name", "task_name")}
        return {"class_path": "lit_alignment.ClearMLLogger", "init_args": {**names, **tags, "save_dir": folder}}
    ours: dict[str, Any] = {"project": old.need("project_name"), "name": old.need("run_name"), "save_dir": folder}
    mode, more = old.take("mode", "online"), carry(old, WANDB_MORE) | tags
    if mode == "disabled":
        return False
    ours |= {"offline": True} if mode == "offline" else {}
    wandb = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": ours}
    return wandb | ({"dict_kwargs": more} if more else {})


def upload(top: Settings) -> list[dict[str, Any]]:
    """Our Upload callback, where checkpoints were uploaded."""
    key = "checkpoint_uploader_callback_parameters"
    if not top.values.get(key):
        return []
    old = top.part(key)
    bucket, host = (os.environ.get(f"S3_CHECKPOINTS_{name}", "") for name in ("BUCKET", "HOST"))
    ours: dict[str, Any] = {"url": f"s3://{bucket or 'BUCKET'}/{old.need('directory').strip('/')}"}
    # Checkpoints always hold the optimizer's state, exports never do.
    ours |= carry(old, {"save_optimizer_states": Row(True, "what", make=lambda kept: None if kept else "exports")})
    ours |= {"storage_options": {"endpoint_url": host}} if host else {}
    for name, value, place in (("BUCKET", bucket, "url"), ("HOST", host, "storage_options as endpoint_url")):
        if not value:
            reason = f"not set where this was converted; put it into Upload.{place}"
            top.notes.left_out[reason].append(f"S3_CHECKPOINTS_{name}")
    names = "S3_CHECKPOINTS_AWS_ACCESS_KEY_ID, S3_CHECKPOINTS_AWS_SECRET_ACCESS_KEY"
    top.notes.left_out["they are read as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"].append(names)
    old.leave_out("names of folders are given", "tokenizer_folder_name", "checkpoints_folder_name")
    top.warn(UPLOAD, key, "lit_alignment.Upload")
    return [{"class_path": "lit_alignment.Upload", "init_args": ours}]
