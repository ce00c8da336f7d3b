"""Speed, padding, memory and hardware use of training."""

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_alignment.data.batching.collate import Rows
from lit_alignment.data.planned import data_rank
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import decoder_flops_per_token
from lit_alignment.modules.base import AlignmentModule

# Dense bf16 operations a second, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
}


class Throughput(Callback):
    """Log tokens/s, trained tokens/s, the share of padding, peak memory in GiB, and MFU where the device is known.

    Rates are of all ranks together, over the time between two logs without validation and saving. The device is waited
    for when that time ends, not at every micro-batch. Where a batch holds questions whose tokens are not known before
    passages are retrieved (RAG), questions/s stand for all token counts.

    Args:
        every_n_steps: How often to log, in optimizer steps.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        """Start all counts at zero."""
        self.every_n_steps = every_n_steps
        self.total_tokens: Tensor | int = 0
        self.total_seconds = 0.0
        self._start: float | None = None  # of the clock, while it runs
        self._reset()

    def _reset(self) -> None:
        self._tokens: Tensor | int = 0  # a tensor where padding is counted on the device
        self._trained = self._slots = self._questions = 0
        self._seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start the clock, unless it runs."""
        if self._start is None:
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch, and log at every n-th step."""
        if isinstance(batch, Rows):
            mask = batch.attention_mask
            tokens = batch.input_ids.numel() - batch.num_padding if mask is None else mask.sum()
            self._tokens = self._tokens + tokens
            self.total_tokens = self.total_tokens + tokens
            self._trained += batch.num_trained
            self._slots += batch.input_ids.numel()
        else:
            self._questions += len(batch.ids)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.every_n_steps == 0:
            self._stop(pl_module.device)
            self._log(trainer, pl_module)
            self._reset()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until training continues."""
        self._stop(pl_module.device)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock until training continues."""
        self._stop(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop(pl_module.device)

    def _stop(self, device: torch.device) -> None:
        if self._start is None:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self._start
        self._seconds += seconds
        self.total_seconds += seconds
        self._start = None

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        memory = peak_memory(module.device) / 2**30
        if self._slots == 0:
            questions = self._questions / self._seconds * trainer.world_size
            module.log("train/questions_per_second", questions, prog_bar=True)
            module.log("train/peak_memory_gib", memory)
            return
        replicas, tokens = data_rank(trainer)[1], int(self._tokens)
        rate = tokens / self._seconds
        values = {
            "train/tokens_per_second": rate * replicas,
            "train/trained_tokens_per_second": self._trained / self._seconds * replicas,
            "train/padding_share": 1 - tokens / self._slots,
            "train/peak_memory_gib": memory,
        }
        mfu = self._mfu(module, rate * replicas / trainer.world_size)
        if mfu is not None:
            values["train/mfu"] = mfu
        module.log("train/tokens_per_second", values.pop("train/tokens_per_second"), prog_bar=True)
        module.log_dict(values)

    def _mfu(self, module: LightningModule, rate: float) -> float | None:
        """Share of the device's peak that training arithmetic uses, or None where the peak is unknown.

        Args:
            module: What is trained.
            rate: Tokens per second of this device.
        """
        if module.device.type != "cuda" or not isinstance(module, AlignmentModule):
            return None
        name = torch.cuda.get_device_name(module.device)
        peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
        if peak is None:
            return None
        # ZeRO 3 leaves empty tensors that know their size.
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
        flops = decoder_flops_per_token(
            base_model(module.network).config,
            sum(size for size, _ in sizes),
            sum(size for size, trained in sizes if trained),
        )
        return rate * flops / peak


def peak_memory(device: torch.device) -> int:
    """Highest memory in bytes: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
