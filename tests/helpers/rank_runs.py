"""Runs of every method under every strategy, to be called on gloo ranks; each rank writes gradients and losses."""

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lit_alignment import Export, FSDP2Strategy
from lit_alignment.callbacks.refresh import IndexRefresh
from lit_alignment.distributed import fsdp2
from lit_alignment.distributed.features import features_of
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.retrieval.index import IndexConfig
from tests.helpers import (
    RETRIEVER,
    chats,
    class_data,
    classifier,
    encoded_index,
    knowledge,
    labelled,
    pairs,
    rag_data,
    rag_module,
    reward_data,
    reward_model,
    seen,
    sft_data,
    sft_module,
    trainer,
    vlm_data,
    vlm_module,
)
from tests.helpers.deepspeed_on_cpu import DeepSpeedOnCPU
from tests.helpers.ranks import run_on_ranks

SHARED = replace(RETRIEVER, towers="shared")
PICTURED = (0, 9)  # records with images: of the micro-batches of either rank one has some and one has none


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Recorder(Callback):
    def __init__(self):
        self.gradients, self.ids, self.losses, self.norms, self.pictures = [], [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({n: full(g).clone() for n, g in gradients.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids.append(batch.ids)
        self.pictures.append(bool(getattr(batch, "media", {})))
        if len(self.gradients) > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            logged = trainer.callback_metrics.get("train/grad_norm")
            engines = features_of(trainer.strategy).gradient_norm()
            self.norms.append(float(full(logged)) if engines is None else engines)


class Late(Callback):
    """Lets no checkpoint be written before the weights have moved on; those of the last are zero by then."""

    def __init__(self):
        self.moved, self.written, self.real = threading.Event(), 0, fsdp2.put_in_place
        self.save, fsdp2.save, fsdp2.put_in_place = fsdp2.save, self.hold, self.count

    def hold(self, *arguments, **options):
        assert self.moved.wait(60)
        self.moved.clear()
        self.save(*arguments, **options)

    def count(self, *arguments):
        self.real(*arguments)
        self.written += 1

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            assert self.written == 0  # the checkpoint of step 1 waits for this
            self.moved.set()

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module):
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        for tensor in [*pl_module.parameters(), *(value for state in states for value in state.values())]:
            tensor.zero_()
        self.moved.set()


def strategy_of(kind: str):
    if kind == "zero2":
        return DeepSpeedOnCPU(2)
    return DDPStrategy(process_group_backend="gloo") if kind == "ddp" else FSDP2Strategy(process_group_backend="gloo")


def build(method: str, lora: bool, part: str, folder: Path):
    settings = {"packing": part == "all", "tokens_per_batch": 512, "batch_size": 2}
    match method:
        case "sft":
            module = sft_module(lora=lora)
            return module, sft_data(module, chats(11), chats(7, seed=1), **settings)
        case "classification":
            module = classifier(lora=lora, class_weights="balanced")
            return module, class_data(module, labelled(40), labelled(7, seed=1), **settings)
        case "reward":
            module = reward_model(lora=lora, center=0.01)
            return module, reward_data(module, pairs(31), pairs(7, seed=1), **settings)
        case "vlm":
            # Most records have no image, so that some micro-batches have none.
            pictured = seen(folder, 11)
            records = [pictured[i] if i in PICTURED else record for i, record in enumerate(chats(11))]
            module = vlm_module(lora, train_encoder=not lora)
            settings["tokens_per_batch"] = 512
            return module, vlm_data(module, records, seen(folder, 7, seed=1), **settings)
        case "rag":
            index = IndexConfig(str(folder / "index"), sharded=True)
            both = {"retriever": SHARED, "train_retriever": "both", "num_passages": 3}
            module = rag_module(index, lora, objective="rag_token", **both)
            # Short answers: what trains a retriever is a small difference of sums over them, which fp32 rounds.
            return module, rag_data(module, chats(11, longest=6), chats(7, seed=1), **settings)


def train(kind: str, lora: str, folder: Path, parts: str = "all", method: str = "sft") -> dict[str, Any]:
    """One run after another on as many ranks as the strategy takes; what rank 0 found in the last one."""
    folder.mkdir(exist_ok=True)
    if method == "rag":
        encoded_index(folder, knowledge(6), SHARED)
    if method == "vlm":
        seen(folder, 11), seen(folder, 7, seed=1)
    run_on_ranks(runs, kind, lora, folder, parts, method, ranks=ranks_of(kind))
    return torch.load(folder / f"{kind}-{parts.split(',')[-1]}-0.pt")


def ranks_of(kind: str) -> int:
    return 1 if kind == "one" else 4 if kind.endswith("-4") else 2  # two groups of two ranks


def runs(kind: str, lora: str, folder: Path, parts: str, method: str) -> None:
    """One run after another in the same processes."""
    for part in parts.split(","):
        run(kind, lora, folder, part, method)


def run(kind: str, lora: str, folder: Path, part: str, method: str) -> None:
    """Train an epoch or two (`all`), two (`whole`), up to the first checkpoint (`first`), or on from there (`rest`).

    `pairs-` before these takes two micro-batches a step on any number of ranks. `sharded` trains one epoch over
    `folder/base`, saves a checkpoint in shards, exports it, and writes the logits. `fsdp2-compiled` compiles
    layers, and recomputes them.
    """
    strategies = {
        "one": "auto",
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp2": FSDP2Strategy(process_group_backend="gloo"),
        "fsdp2-compiled": FSDP2Strategy(process_group_backend="gloo"),
        "sequence": FSDP2Strategy(process_group_backend="gloo", sequence_parallel_size=2),
        "tensor": FSDP2Strategy(process_group_backend="gloo", tensor_parallel_size=2),
        "sequence-4": FSDP2Strategy(process_group_backend="gloo", sequence_parallel_size=2),
        "tensor-4": FSDP2Strategy(process_group_backend="gloo", tensor_parallel_size=2),
        "gathered": FSDP2Strategy(save_distributed_checkpoint=False, process_group_backend="gloo"),
        "fsdp2-async": FSDP2Strategy(process_group_backend="gloo", async_save=True),
        "gathered-async": FSDP2Strategy(False, process_group_backend="gloo", async_save=True),
    }
    recorder = Recorder()
    alone = kind in ("one", "sequence", "tensor")  # all ranks have the same batches
    accumulate = 1 if part != "all" else 6 if alone else 3
    every = {} if part == "sharded" else {"every_n_train_steps": 1}
    saver = ModelCheckpoint(folder, filename="saved", enable_version_counter=False, **every)
    refresh = [IndexRefresh(every_n_steps=2)] if method == "rag" else []
    limits = {
        "all": {} if method in ("rag", "vlm") else {"max_epochs": 2},
        "whole": {"max_epochs": 2},
        "first": {"max_steps": 2 if kind.endswith("async") else 1},
        "rest": {"max_epochs": 2},
        "sharded": {},
    }
    pairs, _, part = part.rpartition("-")  # two micro-batches a step, however many ranks there are
    runner = trainer(
        folder,
        strategy=DeepSpeedOnCPU(int(kind[-1])) if kind.startswith("deepspeed") else strategies[kind],
        devices=ranks_of(kind),
        accumulate_grad_batches=(2 if alone else 1) if pairs else accumulate,
        callbacks=[
            recorder,
            *([saver] if part in ("first", "sharded") else []),
            *([Export()] if part == "sharded" else []),
            *([Late()] if (kind, part) == ("fsdp2-async", "first") else []),
            *refresh,
        ],
        gradient_clip_val=0.1,
        enable_checkpointing=part in ("first", "sharded"),
        **limits.get(part, {}),
    )
    module, data = build(method, lora == "lora", part, folder)
    if part == "sharded":
        module.backbone = BackboneConfig(f"{folder}/base")
    if kind == "fsdp2-compiled":
        torch.compile = partial(torch.compile, backend="aot_eager")  # in this process, which ends
        module.backbone = replace(module.backbone, compile=True, gradient_checkpointing="full")
    runner.fit(module, data, ckpt_path=folder / "saved.ckpt" if part == "rest" else None)
    if part == "sharded":
        module.network.eval()
        with torch.no_grad():
            found = full(module.network(input_ids=torch.arange(3, 40)[None]).logits)
        if runner.is_global_zero:
            torch.save(found, folder / "logits.pt")
    keep = {
        "gradients": recorder.gradients,
        "losses": recorder.losses,
        "norms": recorder.norms,
        "validation": float(runner.callback_metrics.get("val/loss", torch.nan)),
        "ids": recorder.ids,
        "pictures": recorder.pictures,
    }
    name = f"{pairs}-{part}" if pairs else part
    torch.save(keep, folder / f"{kind}-{name}-{runner.global_rank}.pt")
