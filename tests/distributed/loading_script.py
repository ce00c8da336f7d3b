"""Load a model on two gloo ranks under FSDP2; each rank writes its memory."""

import threading
import time
from pathlib import Path

import torch

from lit_alignment import FSDP2Strategy, SFTModule
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import chats, sft_data, trainer


def memory() -> int:
    """Bytes of this process that no file backs."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watched(SFTModule):
    """Measures how much memory loading takes."""

    def configure_model(self) -> None:
        """Load, while another thread looks at the memory."""
        if self.model is not None:
            return
        before, self.most, running = memory(), 0, True

        def watch() -> None:
            while running:
                self.most = max(self.most, memory() - before)
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        super().configure_model()
        running = False
        thread.join()
        self.most = max(self.most, memory() - before)


def load(kind: str, folder: str) -> None:
    """Load and train a step."""
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0)
    module = Watched(BackboneConfig(f"{folder}/base", dtype="float32"), optimizer=optimizer)
    strategy = FSDP2Strategy(process_group_backend="gloo") if kind == "fsdp2" else "auto"
    runner = trainer(
        Path(folder),
        strategy=strategy,
        devices=2 if kind == "fsdp2" else 1,
        accumulate_grad_batches=1 if kind == "fsdp2" else 2,
        max_steps=1,
    )
    runner.fit(module, sft_data(module, chats(4, longest=5), packing=False, batch_size=2))
    torch.save(
        {"most": module.most, "loss": float(runner.callback_metrics["train/loss"])},
        Path(folder) / f"{kind}-{runner.global_rank}.pt",
    )
