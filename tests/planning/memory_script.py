"""Train a few steps in a process of its own and print the bytes that they took beyond the libraries. Linux only."""

import json
import resource
import sys
from pathlib import Path

from lightning.pytorch import Callback
from peft import LoraConfig, PrefixTuningConfig

from lit_alignment import SFTDataModule, SFTModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.models.loading import BackboneConfig
from tests.helpers import trainer

LENGTH = 2048
ADAPTERS = {
    "full": None,
    "checkpointing": None,
    "lora": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
}


def module_and_data(kind: str, folder: str) -> tuple[SFTModule, SFTDataModule]:
    words = ["kitchen scale order repair"] * 2000
    records = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{i} " + " ".join(words)}]}
        for i in range(4)
    ]
    backbone = BackboneConfig(folder, weights="random", gradient_checkpointing=kind == "checkpointing")
    module = SFTModule(backbone, ADAPTERS[kind])
    data = SFTDataModule(
        module.tokenizer,
        train=[SourceConfig(records=records)],
        encoding=EncodingConfig(max_length=LENGTH, truncation="keep_start", truncation_unit="tokens"),
        packing=kind != "prefix",
        batch_size=1,
        cache_dir=f"{folder}/cache",
    )
    return module, data


class Resident(Callback):
    """Resident bytes of the process before the model is loaded."""

    def setup(self, trainer, pl_module, stage):
        self.before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(kind: str, folder: str) -> None:
    module, data = module_and_data(kind, folder)
    resident = Resident()
    trainer(Path(folder), callbacks=[resident], max_steps=3, max_epochs=-1).fit(module, data)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident.before))


if __name__ == "__main__":
    main(*sys.argv[1:])
