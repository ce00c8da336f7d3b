"""How long does a checkpoint keep training from resuming, written at once and in the background?

    python benchmarks/async_saving.py      # a few minutes and 5 GB of memory

A random Llama of 115 million weights takes 24 steps on a CPU; a checkpoint of weights and AdamW's state (1.4 GB) is
saved at every eighth. Measured are the seconds inside ModelCheckpoint's three saves, and the whole of `fit`, which ends
when all of them are on the disk. The writing thread takes its time from the same cores that train.
"""

import shutil
import tempfile
import time
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoConfig, AutoTokenizer

from lit_alignment import AsyncCheckpointIO, AtomicCheckpointIO, SFTDataModule, SFTModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.models.loading import BackboneConfig

STEPS, EVERY = 24, 8
SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SHAPE |= {"num_key_value_heads": 12, "head_dim": 64}


class Timed(ModelCheckpoint):
    """Notes how long each save keeps the training."""

    def __init__(self, folder: Path) -> None:
        """Keep one checkpoint."""
        super().__init__(folder, filename="{step}", every_n_train_steps=EVERY)
        self.seconds: list[float] = []

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        begin = time.perf_counter()
        super()._save_checkpoint(trainer, filepath)
        self.seconds.append(time.perf_counter() - begin)


def run(folder: Path, plugin: AtomicCheckpointIO, saves: bool = True) -> tuple[float, list[float]]:
    """Seconds of a fit, and of its saves."""
    seed_everything(0, verbose=False)
    words = "the kitchen scale does not work please reply order urgent " * 4
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    module = SFTModule(BackboneConfig(str(folder / "model"), weights="random"))
    data = SFTDataModule(
        module.tokenizer,
        train=[SourceConfig(records=[{"id": str(n), "messages": messages} for n in range(STEPS)])],
        encoding=EncodingConfig(max_length=512),
        packing=False,
        batch_size=1,
        cache_dir=str(folder / "cache"),
    )
    saver = Timed(folder / "saved")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[saver] if saves else [],
        enable_checkpointing=saves,
        plugins=[plugin],
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    begin = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder / "saved", ignore_errors=True)
    return seconds, saver.seconds


def main() -> None:
    """Print a table."""
    print("| checkpoints | seconds that each save kept training | seconds of fit |\n|---|---|---|")
    with tempfile.TemporaryDirectory(dir=".") as temporary:  # /tmp can be memory
        folder = Path(temporary)
        AutoConfig.from_pretrained("configs/tiny", **SHAPE).save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained("configs/tiny").save_pretrained(folder / "model")
        run(folder, AtomicCheckpointIO(), saves=False)  # the first run reads and encodes
        for name, plugin, saves in (
            ("none", AtomicCheckpointIO(), False),
            ("AtomicCheckpointIO", AtomicCheckpointIO(), True),
            ("AsyncCheckpointIO", AsyncCheckpointIO(), True),
        ):
            seconds, each = run(folder, plugin, saves)
            print(f"| {name} | {', '.join(f'{one:.2f}' for one in each) or '-'} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
