"""The runs of gpu_check.py: SFT by `fit` and by a bare loop, its profile, DPO, and the loss. Each prints nothing.

A run returns what it measured as numbers that JSON can hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_workloads import (
    DOCUMENTS,
    PAIRS,
    WARM,
    Place,
    lora,
    now,
    total_memory,
    write_documents,
    write_pairs,
)
from lit_alignment import PreferenceDataModule, PreferenceModule, SFTDataModule, SFTModule
from lit_alignment.callbacks.throughput import peak_memory
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.losses import linear_cross_entropy
from lit_alignment.models.attention import document_arguments
from lit_alignment.models.head import base_model, head_loss, hidden_states
from lit_alignment.models.loading import BackboneConfig, decoder_flops_per_token
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.optimization import OptimizerConfig, build_optimizer
from lit_alignment.planning.memory import Workload, step_memory

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup=0)
Found = dict[str, Any]  # what a run measured


@dataclass(frozen=True)
class SftRun:
    """SFT on packed rows, or one document a row.

    Args:
        shape: Of the model.
        trainer: `fit` or `bare loop`.
        documents: `full` fills each row with one, `log-normal` has many lengths.
        backbone: Settings beyond path and precision.
        lora: Whether adapters train, else all weights do.
        packing: Whether rows are packed.
        pretrained: Whether the weights are those that other programs load, too.
    """

    shape: str
    trainer: str = "fit"
    documents: str = "full"
    backbone: dict[str, Any] = field(default_factory=dict)
    lora: bool = True
    packing: bool = True
    pretrained: bool = False

    def __call__(self, place: Place) -> Found:
        """Train, and say how fast, beside what `estimate` says of the memory."""
        module, data = self.parts(place)
        clock, found = Clock(), Found()
        if self.trainer == "fit":
            trainer = quiet_trainer(place, clock)
            if self.pretrained:
                found["first_loss"] = trainer.validate(module, data, verbose=False)[0]["val/loss"]
            trainer.fit(module, data)
        else:
            bare_loop(module, data, place, clock)
        peak = peak_memory(place.device)
        found |= clock.found() | {"peak": peak, "estimate": self.estimate(module, place)}
        return found | {"flops_per_token": flops_per_token(module.network, clock.lengths)}

    def parts(self, place: Place) -> tuple[SFTModule, SFTDataModule]:
        """Module and data."""
        seed_everything(0, verbose=False)
        path = place.weights(self.shape) if self.pretrained else place.model(self.shape)
        weights = "pretrained" if self.pretrained else "random"
        module = SFTModule(
            BackboneConfig(str(path), weights=weights, dtype="bfloat16" if self.lora else "auto", **self.backbone),
            peft=lora() if self.lora else None,
            optimizer=OPTIMIZER,
        )
        files = write_documents(place, self.documents)
        data = SFTDataModule(
            module.tokenizer,
            train=[SourceConfig(str(files["train"]))],
            val=[SourceConfig(str(files["val"]))],
            encoding=EncodingConfig(max_length=place.length, truncation="keep_start", truncation_unit="tokens"),
            packing=self.packing,
            batch_size=1 if self.packing else DOCUMENTS,
            cache_dir=str(place.folder / "cache"),
        )
        return module, data

    def estimate(self, module: SFTModule, place: Place) -> int:
        """Bytes at the peak, as `lit-alignment estimate` would say."""
        lengths = [place.length] if self.packing else []
        memory = step_memory(
            module.backbone,
            module.tokenizer,
            Workload(lengths, 1, place.length, 1.0, torch.bfloat16),
            tokens=TokensConfig(),
            added={},
            peft=module.peft_config,
            adapter=None,
            device_type=place.device.type,
            device_memory=total_memory(place.device),
        )
        return memory.total


class Clock(Callback):
    """Notes when each step ends, and the lengths of its documents."""

    def __init__(self) -> None:
        """Nothing is noted yet."""
        self.ends: list[float] = []
        self.lengths: list[list[int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step of `fit`."""
        self.note(batch, pl_module.device)

    def note(self, batch: Any, device: torch.device) -> None:
        """Wait for the device, and note a step."""
        self.lengths.append(list(batch.document_lengths or []) or batch.attention_mask.sum(1).tolist())
        self.ends.append(now(device))

    def found(self) -> Found:
        """Seconds and tokens of the steps that count."""
        seconds = [after - before for before, after in pairwise(self.ends)][WARM - 1 :]
        return {"seconds": seconds, "tokens": [sum(lengths) for lengths in self.lengths[WARM:]]}


def quiet_trainer(place: Place, *callbacks: Callback) -> Trainer:
    """A Trainer that does nothing beside training."""
    return Trainer(
        accelerator="gpu" if place.device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=-1,
        max_steps=place.steps,
        limit_val_batches=1.0,
        val_check_interval=None,
        check_val_every_n_epoch=10**6,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def bare_loop(module: SFTModule, data: SFTDataModule, place: Place, clock: Clock) -> None:
    """Train in a plain loop, with the library's batches, attention and loss, and nothing of Lightning."""
    for step, _ in enumerate(bare_steps(module, data, place, clock), 1):
        if step == place.steps:
            break


def bare_steps(module: SFTModule, data: SFTDataModule, place: Place, clock: Clock) -> Iterator[None]:
    """Steps of a plain loop over as many epochs as are asked for."""
    device = place.device
    with device:
        model = module.load_model(device.type, packing=True)
    module.model = model.to(device)
    optimizer, _ = build_optimizer(model.named_parameters(), OPTIMIZER, 1e9)
    data.prepare_data()
    data.setup("fit")
    implementation = base_model(model).config._attn_implementation
    while True:
        for batch in data.train_dataloader():
            arguments = document_arguments(implementation, batch.document_lengths, device)
            ids, positions, read_at, targets = (
                each.to(device) for each in (batch.input_ids, batch.position_ids, batch.read_at, batch.targets)
            )
            with torch.autocast(device.type, torch.bfloat16):
                hidden = hidden_states(model, input_ids=ids, position_ids=positions, **arguments)
                with record_function("loss"):
                    loss, _ = head_loss(model, hidden.flatten(0, 1).index_select(0, read_at), targets, None)
            (loss / len(targets)).backward()
            with record_function("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            clock.note(batch, device)
            yield


def flops_per_token(network: nn.Module, lengths: list[list[int]]) -> float:
    """Operations to train a token, in weights and causal attention, nothing computed twice.

    Args:
        network: What is trained.
        lengths: Of the documents of each step.
    """
    parameters = list(network.parameters())
    config = base_model(network).config
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    weights = decoder_flops_per_token(config, sum(p.numel() for p in parameters), trainable)
    counted = [length for step in lengths[WARM:] for length in step]
    width = config.num_attention_heads * config.head_dim
    # Scores and their product with the values: 2 x 2 operations each, half of them under the causal mask, three times.
    attention = 3 * config.num_hidden_layers * 2 * 2 * width * sum(n * n / 2 for n in counted) / sum(counted)
    return weights + attention


# A profile.

KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "mm_", "matmul"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
}


def profiled(place: Place) -> Found:
    """Shares of the device's time in three steps of the bare loop, of 8B."""
    module, data = SftRun("8b", "bare loop", backbone={"gradient_checkpointing": True}).parts(place)
    clock, on_gpu = Clock(), place.device.type == "cuda"
    steps = bare_steps(module, data, place, clock)
    for _ in range(WARM):
        next(steps)
    begin = now(place.device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(3):
            next(steps)
    wall = now(place.device) - begin

    def micros(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    # On a GPU kernels alone have time of their own; a range's is that of the kernels that were launched in it.
    events = [event for event in found.key_averages() if not event.is_user_annotation]
    worked = [event for event in events if not on_gpu or event.device_type == DeviceType.CUDA]
    kernels = {event.key.lower(): micros(event) for event in worked if micros(event) > 0}
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, time_of in kernels.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        shares[kind] += time_of
    total = sum(shares.values())
    ranges = [event for event in found.key_averages() if event.key == "loss"]
    of_loss = max(float(event.device_time_total if on_gpu else event.cpu_time_total) for event in ranges)
    top = sorted(kernels.items(), key=lambda each: -each[1])[:12]
    return {
        "seconds_a_step": wall / 3,
        "shares": {kind: value / total for kind, value in shares.items()},
        "of_the_loss": of_loss / total,
        "gaps": max(0.0, 1 - total / 1e6 / wall) if on_gpu else 0.0,
        "top": {name[:80]: value / total for name, value in top},
    }


# Preferences.


@dataclass(frozen=True)
class DpoRun:
    """DPO with adapters on pairs with long prompts.

    Args:
        share_prompts: Whether both responses follow one prompt.
    """

    share_prompts: bool

    def __call__(self, place: Place) -> Found:
        """Train, and say how many pairs a second."""
        seed_everything(0, verbose=False)
        module = PreferenceModule(
            BackboneConfig(str(place.weights("1b")), dtype="bfloat16"), peft=lora(), optimizer=OPTIMIZER
        )
        data = PreferenceDataModule(
            module.tokenizer,
            train=[SourceConfig(str(write_pairs(place)))],
            encoding=EncodingConfig(max_length=place.length),
            batch_size=PAIRS,
            share_prompts=self.share_prompts,
            cache_dir=str(place.folder / "cache"),
        )
        clock = PairClock()
        quiet_trainer(place, clock).fit(module, data)
        return clock.found() | {"peak": peak_memory(place.device), "first_loss": clock.first_loss}


class PairClock(Callback):
    """Notes when each step ends, and the first loss."""

    def __init__(self) -> None:
        """Nothing is noted yet."""
        self.ends: list[float] = []
        self.first_loss: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step."""
        if self.first_loss is None:
            self.first_loss = float(outputs["loss"])
        self.ends.append(now(pl_module.device))

    def found(self) -> Found:
        """Seconds of the steps that count, and pairs of each."""
        seconds = [after - before for before, after in pairwise(self.ends)][WARM - 1 :]
        return {"seconds": seconds, "pairs": [PAIRS] * len(seconds)}


# The loss.


@dataclass(frozen=True)
class LossRun:
    """Forward and backward of the loss over a vocabulary of 128,256, width 4096, bfloat16.

    Args:
        form: `chunks`, or `full logits`.
        trained: Whether the output embedding trains.
    """

    form: str
    trained: bool

    def __call__(self, place: Place) -> Found:
        """Seconds and memory beyond what was there before."""
        torch.manual_seed(0)
        vocabulary, width, kind = (2048, 64, torch.bfloat16) if place.tiny else (128_256, 4096, torch.bfloat16)
        with place.device:
            hidden = torch.randn(place.length, width, dtype=kind, requires_grad=True)
            weight = (torch.randn(vocabulary, width, dtype=kind) * 0.02).requires_grad_(self.trained)
            targets = torch.randint(vocabulary, (place.length,))
        on_gpu, seconds = place.device.type == "cuda", []
        before = peak_memory(place.device)
        for _ in range(WARM + 3):
            hidden.grad = weight.grad = None
            begin = now(place.device)
            if self.form == "chunks":
                loss = linear_cross_entropy(hidden, weight, targets)[0]
            else:
                loss = nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
            (loss / place.length).backward()
            seconds.append(now(place.device) - begin)
        added = peak_memory(place.device) - before if on_gpu else 0
        return {"seconds": seconds[WARM:], "tokens": [place.length] * 3, "added": added, "loss": float(loss.detach())}
