"""A plain Hugging Face folder beside each kept checkpoint, which `from_pretrained` loads."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lit_alignment.callbacks.checkpoint_io import PARTIAL, flush_folder
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.templates import JinjaTemplate
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.generation.transformers_engine import StopRule
from lit_alignment.models.head import base_model
from lit_alignment.modules.base import AlignmentModule


class Export(Callback):
    """Write model or adapters, tokenizer, chat template and generation config beside checkpoints.

    The weights come from the checkpoint file, so the folder holds exactly what the checkpoint holds. Each folder
    has the name of its checkpoint, and the link `export` in the same place points to the best one.

    Args:
        which: `best` exports the best checkpoint, `kept` every checkpoint that is kept.
        merge: Merge adapters into a full model instead of writing an adapter folder.
    """

    def __init__(self, which: Literal["best", "kept"] = "best", merge: bool = False) -> None:
        """Nothing is written before the first checkpoint."""
        self.which, self.merge = which, merge
        self._exported: dict[str, Path] = {}
        self._best = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that keeps no checkpoints."""
        if stage == "fit" and not trainer.checkpoint_callbacks:
            raise ConfigError("the Export callback needs checkpoints: set trainer.enable_checkpointing, or remove it.")
        if not isinstance(pl_module, AlignmentModule):
            raise ConfigError(f"the Export callback needs a module of lit_alignment, not {type(pl_module).__name__}.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Catch up with checkpoints that were saved since the last batch; ModelCheckpoint saves after all callbacks."""
        self._update(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what the last validation saved."""
        self._update(trainer, pl_module)

    def _update(self, trainer: Trainer, module: LightningModule) -> None:
        checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = next((c.best_model_path for c in checkpoints if c.best_model_path), "")
        kept = {best} if self.which == "best" else {path for c in checkpoints for path in [*c.best_k_models, best]}
        wanted = {path for path in kept if path}
        if wanted == set(self._exported) and best == self._best:
            return
        if trainer.is_global_zero and isinstance(module, AlignmentModule):
            for path in sorted(wanted - set(self._exported)):
                self._exported[path] = export_checkpoint(module, Path(path), Path(path).with_suffix(""), self.merge)
            if best:
                point_to(Path(best).parent / "export", self._exported[best])
            for path in set(self._exported) - wanted:
                shutil.rmtree(self._exported.pop(path), ignore_errors=True)
        else:
            self._exported = {path: Path(path).with_suffix("") for path in wanted}
        self._best = best


def export_checkpoint(module: AlignmentModule, checkpoint: Path, target: Path, merge: bool = False) -> Path:
    """Write the folder of one checkpoint.

    Args:
        module: The module that made it, with its model loaded; its live weights are not used.
        checkpoint: The checkpoint file.
        target: The folder to write; one that is there is replaced.
        merge: Merge adapters into a full model.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the disk is full or the folder cannot be written.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    trained = {name.removeprefix("model."): value for name, value in state.items()}
    partial = target.with_name(f".{target.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_weights(module.network, trained, partial, merge)
        module.tokenizer.save_pretrained(partial)
        save_template(module, partial)
        exported_generation_config(module.tokenizer, module.stop).save_pretrained(partial)
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        flush_folder(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{target}: cannot write the export ({error}). The checkpoint is untouched.") from error
    return target


def _write_weights(network: nn.Module, trained: dict[str, torch.Tensor], folder: Path, merge: bool) -> None:
    """Write a full model, or an adapter's two files."""
    if isinstance(network, PeftModel) and not merge:
        config = network.peft_config[network.active_adapter]
        adapter = get_peft_model_state_dict(network, state_dict=trained)
        save_file(
            {k: v.contiguous() for k, v in adapter.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
        )
        inference_mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = inference_mode
        return
    if isinstance(network, PeftModel):
        base_model(network).save_pretrained(folder, state_dict=_merged(network, trained))
        return
    full = {name: trained.get(name, value).detach().cpu() for name, value in network.state_dict().items()}
    base_model(network).save_pretrained(folder, state_dict=full)


def _merged(network: PeftModel, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of the base model with the adapters added, merged in float32 and cast once."""
    merged = copy.deepcopy(network).cpu()
    merged.load_state_dict(trained, strict=False)
    dtypes = {name: p.dtype for name, p in base_model(network).named_parameters()}
    plain = merged.float().merge_and_unload()
    originals = {name.replace(".base_layer", ""): dtype for name, dtype in dtypes.items()}
    return {name: value.to(originals.get(name, value.dtype)) for name, value in plain.state_dict().items()}


def save_template(module: AlignmentModule, folder: Path) -> None:
    """Store the chat template that training used, where it is a Jinja template other than the tokenizer's own."""
    template = datamodule_of(module.trainer).encoder.template
    if isinstance(template, JinjaTemplate) and template.source != module.tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def exported_generation_config(tokenizer: PreTrainedTokenizerBase, stop: StopRule) -> GenerationConfig:
    """Generation settings under which a loaded model stops where it was trained to."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop.token_ids or None,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=stop.strings or None,
    )


def point_to(link: Path, target: Path) -> None:
    """Make `link` a link to a folder beside it, in one step."""
    fresh = link.with_name(f".{link.name}{PARTIAL}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.name, target_is_directory=True)
    os.replace(fresh, link)
