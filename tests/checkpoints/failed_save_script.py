"""Two gloo ranks of which the first cannot finish a checkpoint; each writes what it was told."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_alignment import FSDP2Strategy
from lit_alignment.distributed import fsdp2
from lit_alignment.errors import CheckpointError
from tests.helpers import chats, sft_data, sft_module, trainer


def fail(*_):
    raise OSError("no space")


def main(folder: str, sharded: str) -> None:
    if sharded == "1":
        fsdp2.put_in_place = fail
    else:
        torch.save = fail
    strategy = FSDP2Strategy(sharded == "1", process_group_backend="gloo", async_save=True)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1)
    options = {"max_steps": 3, "enable_checkpointing": True, "callbacks": [saver]}
    runner = trainer(Path(folder), strategy=strategy, devices=2, **options)
    module = sft_module()
    try:
        runner.fit(module, sft_data(module, chats(20), packing=False, batch_size=2))
    except CheckpointError as error:
        (Path(folder) / f"{runner.global_rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
