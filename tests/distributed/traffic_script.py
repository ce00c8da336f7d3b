"""Bytes that a micro-batch of FSDP2 sends on two gloo ranks. Started by test_scaling.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from lightning.pytorch import Callback

from lit_alignment import FSDP2Strategy
from tests.helpers import chats, sft_data, sft_module, trainer

sent = {"gathered": 0, "scattered": 0, "exchanged": 0, "summed": 0}


class Window(Callback):
    """Counts during the second micro-batch alone: the first sets things up."""

    def __init__(self):
        self.before = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before, self.tokens = dict(sent), batch.input_ids.numel()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = {name: sent[name] - self.before[name] for name in sent} | {"tokens": self.tokens}


def counted(name, function, of, times=1):
    """The function, the whole tensor of which is counted: what comes from, or goes to, the other rank."""

    def call(*arguments, **named):
        whole = named[of] if of in named else arguments[0]
        ranks = dist.get_world_size()
        sent[name] += times * whole.numel() * whole.element_size() * (ranks - 1) // ranks
        return function(*arguments, **named)

    return call


def main(folder, kind):
    torch.set_num_threads(1)
    dist.all_gather_single = counted("gathered", dist.all_gather_single, "output")
    dist.reduce_scatter_single = counted("scattered", dist.reduce_scatter_single, "input")
    dist.all_to_all_single = counted("exchanged", dist.all_to_all_single, "input")
    funcol.all_reduce = counted("summed", funcol.all_reduce, "self", times=2)
    window = Window()
    sharing = {} if kind == "fsdp2" else {f"{kind}_parallel_size": 2}
    strategy = FSDP2Strategy(process_group_backend="gloo", **sharing)
    runner = trainer(Path(folder), strategy=strategy, devices=2, max_steps=2, callbacks=[window])
    module = sft_module()
    runner.fit(module, sft_data(module, chats(8), packing=kind == "sequence", tokens_per_batch=512, batch_size=2))
    if runner.is_global_zero:
        torch.save(window.found, Path(folder) / f"{kind}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
