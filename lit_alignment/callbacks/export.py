"""A plain Hugging Face folder beside each kept checkpoint, which `from_pretrained` loads."""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_alignment.checkpoints.background import wait_for_saves
from lit_alignment.checkpoints.card import model_card
from lit_alignment.checkpoints.comparing import encode_prompts
from lit_alignment.checkpoints.export import Check, write_checked
from lit_alignment.checkpoints.hf_folder import PARTIAL, Companions, Form, export_form, write_folder
from lit_alignment.checkpoints.restore import restore
from lit_alignment.checkpoints.saved import read_saved
from lit_alignment.checkpoints.states import folders_of, is_inside
from lit_alignment.data.base import datamodule_of
from lit_alignment.errors import ConfigError
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import stored_dtype
from lit_alignment.modules.base import AlignmentModule
from lit_alignment.paths import shown


class Export(Callback):
    """Write model or adapters, tokenizer, chat template and generation config beside checkpoints.

    The weights come from the checkpoint file, so the folder holds exactly what the checkpoint holds. Each folder
    has the name of its checkpoint, and the link `export` in the same place points to the best one.

    Over quantised weights (QLoRA) adapters are written alone, and compared over the base as its files have it.

    Args:
        which: `best` exports the best checkpoint, `kept` every checkpoint that is kept.
        form: For adapters: write them alone (`adapter`) or merged into a full model (`merged`); `auto` merges
            those that servers such as vLLM cannot load beside the base.
    """

    def __init__(self, which: Literal["best", "kept"] = "best", form: Form = "auto") -> None:
        """Nothing is written before the first checkpoint."""
        self.which, self.form = which, form
        self._exported: set[str] = set()  # checkpoints, as absolute paths: Lightning's are so after a resume alone
        self._best = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that keeps no checkpoints."""
        if stage == "fit" and not trainer.checkpoint_callbacks:
            raise ConfigError("the Export callback needs checkpoints: set trainer.enable_checkpointing, or remove it.")
        if not isinstance(pl_module, AlignmentModule):
            raise ConfigError(f"the Export callback needs a module of lit_alignment, not {type(pl_module).__name__}.")
        peft = pl_module.peft_config
        if self.form == "merged" and peft is not None and peft.is_prompt_learning:
            raise ConfigError(
                f"Export: {type(peft).__name__} puts virtual tokens before the prompt, which cannot be merged into "
                "weights. Set form to auto or adapter."
            )
        if self.form == "merged" and pl_module.backbone.quantization != "none":
            raise ConfigError(
                f"Export: merged into unquantised weights, what trains over {pl_module.backbone.quantization} ones is "
                "another model. Set form to auto or adapter; lit-alignment merge --dequantize merges it all the same."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Catch up with checkpoints that were saved since the last batch; ModelCheckpoint saves after all callbacks."""
        self._update(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what the last validation saved."""
        self._update(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What was exported, so that a resumed run can remove what it replaces."""
        return {"exported": sorted(self._exported)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an earlier part of this run exported."""
        self._exported = set(map(os.path.abspath, state_dict["exported"]))

    def _update(self, trainer: Trainer, module: LightningModule) -> None:
        """Export what is new, and remove the folders of checkpoints of this run that are kept no more."""
        places = folders_of(trainer)
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath is not None]
        paths = {path for saver in savers for path in (*saver.best_k_models, saver.best_model_path) if path}
        # A resumed run that writes elsewhere knows the best one of the run before, and leaves it alone.
        kept = {path for path in map(os.path.abspath, paths) if _place_of(path, places)}
        # Without a metric, the "best" of a saver is its newest.
        judges = [saver for saver in savers if saver.monitor is not None] or savers
        bests = [os.path.abspath(judge.best_model_path) for judge in judges if judge.best_model_path]
        best = next((path for path in bests if path in kept), "")
        wanted = {path for path in ([best] if self.which == "best" else kept) if path}
        if wanted == self._exported and best == self._best:
            return
        wait_for_saves(trainer)
        if trainer.is_global_zero and isinstance(module, AlignmentModule):
            for path in sorted(wanted - self._exported):
                export_checkpoint(module, Path(path), folder_of(path), self.form)
            if best:
                point_to(Path(_place_of(best, places)) / "export", folder_of(best))
            for path in self._exported - wanted:
                if is_inside(path, places):
                    shutil.rmtree(folder_of(path), ignore_errors=True)
        self._exported, self._best = wanted, best


def _place_of(checkpoint: str, places: list[str]) -> str:
    """Which of some folders holds a checkpoint; empty where none does."""
    return next((place for place in places if Path(place) in Path(checkpoint).parents), "")


def folder_of(checkpoint: str) -> Path:
    """The folder that holds the export of a checkpoint."""
    return Path(checkpoint.removesuffix(".ckpt")) if checkpoint.endswith(".ckpt") else Path(f"{checkpoint}-export")


def export_checkpoint(module: AlignmentModule, checkpoint: Path, target: Path, form: Form = "auto") -> Path:
    """Write the folder of one checkpoint, load it again, and compare it with the model that has its weights.

    Args:
        module: The module that made it, with its model loaded; its live weights are not used.
        checkpoint: The checkpoint file.
        target: The folder to write; one that is there is replaced.
        form: Merge adapters, write them alone, or merge where servers could not load them.

    Raises:
        CheckpointError: If the checkpoint is damaged, the disk is full, the folder cannot be written, or answers
            differently than the model; a folder that is there then stays.
    """
    saved = read_saved(checkpoint, trust_remote_code=module.backbone.trust_remote_code)
    network = module.network
    if module.is_sharded:  # its weights are loaded anew on this process
        network = restore(saved)[0]
    elif saved.backbone.quantization != "none":  # whoever loads the adapter gets the base as its files have it
        network, form = restore(saved, stored_dtype(saved.backbone) or torch.float32)[0], "adapter"
    parts = module.export_parts(saved, network, form)
    chosen, reason = export_form(network, form)
    if parts.note:
        rank_zero_info(f"export: {parts.note}.")
    if parts.merges and chosen == "adapter":
        chosen, reason = "merged", ""
    if reason:
        rank_zero_info(f"export: merged into the weights, since {reason}, which servers such as vLLM cannot load.")
    if saved.head is not None:
        base_model(network).config.update(saved.head.measured)
    template = datamodule_of(module.trainer).chat_template()
    stops, beside, full_weights = parts.generation_config, parts.beside, parts.full_weights
    card = model_card(saved, chosen, target.name, parts.merges)
    companions = Companions(module.tokenizer, stops, template, beside, full_weights, card)
    if chosen == "adapter" and saved.backbone.weights == "random":  # nothing can load it: its base is saved nowhere
        return write_folder(network, saved.trained, target, companions, chosen)
    check = Check(encode_prompts(module.tokenizer, None), loaded=base_model(network).dtype)
    difference = write_checked(network, saved, target, companions, parts, chosen, check)
    rank_zero_info(f"export: {shown(target)}: {difference}")
    return target


def point_to(link: Path, target: Path) -> None:
    """Make `link` a link to a folder beside or below it, in one step."""
    fresh = link.with_name(f".{link.name}{PARTIAL}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.relative_to(link.parent), target_is_directory=True)
    os.replace(fresh, link)
