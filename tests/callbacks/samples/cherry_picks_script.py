"""Cherry picks with metrics on two gloo ranks; each writes what it has. Started by test_cherry_picks.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from lit_alignment import CherryPicks, FSDP2Strategy
from lit_alignment.evaluation.answers import Answered, Perplexity
from lit_alignment.generation.settings import DecodingConfig
from tests.helpers import chats, sft_data, sft_module, trainer


def main(kind: str, folder: str) -> None:
    """Train one epoch; then gather a metric of which each rank has a part."""
    torch.set_num_threads(1)
    strategies = {
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp2": FSDP2Strategy(process_group_backend="gloo"),
    }
    generation = DecodingConfig(max_new_tokens=4)
    callback = CherryPicks(num_samples=2, generation=generation, metrics=["length", "perplexity", "kl"])
    logger = CSVLogger(folder, name="", version="")
    runner = trainer(Path(folder), strategy=strategies[kind], devices=2, callbacks=[callback], logger=logger)
    module = sft_module(lora=True)
    runner.fit(module, sft_data(module, chats(4), chats(3, seed=1)))
    metric = Perplexity()
    metric.update(Answered(["a"], logps=[[-1.0] if runner.global_rank == 0 else [-4.0, -4.0]]))
    keep = {"scores": [pick.scores for pick in callback.picks], "gathered": metric.compute(), "own": metric.means()}
    torch.save(keep, Path(folder) / f"{runner.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
