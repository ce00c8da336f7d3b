"""What does a cache of features save in the projector stage, and does making it need memory for every image?

    python benchmarks/vlm_cache.py steps     # step time with and without the cache
    python benchmarks/vlm_cache.py memory    # peak memory of preprocessing 500 and 5000 images

Steps are those of a VLMModule that trains its projector alone: a language model of SmolLM2-135M's shape and an image
encoder of CLIP's, both with random weights, four pictures a step. Both ways train on the same pictures; the losses are
compared.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig

from lit_alignment import VLMDataModule, VLMModule
from lit_alignment.data.encoding.encoder import EncodingConfig
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.multimodal.modality import ModalityConfig
from lit_alignment.models.multimodal.projectors import ProjectorConfig
from lit_alignment.models.multimodal.vision import EncoderConfig
from lit_alignment.tools.preprocess import main as preprocess

PICTURES, STEPS, WARM_UP = 4, 6, 1
LANGUAGE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
ENCODERS = {  # CLIP's two usual sizes, each with a projector that is usual for it
    "ViT-B/32 at 224, mlp": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        (224, 32),
        ProjectorConfig("mlp"),
    ),
    "ViT-L/14 at 336, mlp": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        (336, 14),
        ProjectorConfig("mlp"),
    ),
    "ViT-L/14 at 336, c_abstractor to 64": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        (336, 14),
        ProjectorConfig("c_abstractor", 64),
    ),
}


class Clock(Callback):
    """Seconds and loss of each step, the reading of its batch included."""

    def __init__(self) -> None:
        """Nothing is measured yet."""
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.last = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        """Start."""
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        """Stop, and start again."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.last = now


def pictures(folder: Path, number: int, side: int) -> list[Path]:
    """Pictures of noise."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    paths = [folder / f"{index:05d}.png" for index in range(number)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return paths


def processor(folder: Path, side: int) -> None:
    """CLIP's processor for pictures of another size."""
    settings = json.loads(Path("configs/tiny_vision/preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def train(image: ModalityConfig, base: Path, records: list[dict], folder: Path) -> Clock:
    """A few steps of the projector stage."""
    seed_everything(0, verbose=False)
    module = VLMModule(BackboneConfig(str(base), weights="random"), image, train_language_model=False)
    data = VLMDataModule(
        module.tokenizer,
        module.media,
        train=[SourceConfig(records=records)],
        encoding=EncodingConfig(max_length=1024),
        packing=False,
        batch_size=PICTURES,
        cache_dir=str(folder / "data"),
    )
    clock = Clock()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_epochs=1, accelerator="cpu", use_distributed_sampler=False, callbacks=[clock], **quiet).fit(
        module, data
    )
    return clock


def steps() -> None:
    """Print a table over encoders."""
    print("| encoder and projector | step without cache | with | times faster | largest difference of the loss |")
    print("|---|---|---|---|---|")
    for name, (shape, (side, patch), projector) in ENCODERS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            base, encoder = folder / "base", folder / "encoder"
            LlamaConfig(vocab_size=768, num_key_value_heads=3, pad_token_id=0, **LANGUAGE).save_pretrained(base)
            AutoTokenizer.from_pretrained("configs/tiny").save_pretrained(base)
            CLIPVisionConfig(image_size=side, patch_size=patch, **shape).save_pretrained(encoder)
            processor(encoder, side)
            paths = pictures(folder / "pictures", PICTURES * STEPS, side)
            records = [
                {
                    "messages": [
                        {"role": "user", "content": [{"type": "image", "image": str(path)}]},
                        {"role": "assistant", "content": "the kitchen scale does not work"},
                    ]
                }
                for path in paths
            ]
            image = ModalityConfig([EncoderConfig(str(encoder), weights="random")], projector)
            config = folder / "config.yaml"
            config.write_text(json.dumps(configuration(base, encoder, projector)))
            made = ["--config", str(config), "--out", str(folder / "cache"), "--files", str(folder / "pictures")]
            preprocess([*made, "--batch-size", "4"])
            cached = ModalityConfig(image.encoders, projector, cache=str(folder / "cache"))
            slow, fast = (train(each, base, records, folder) for each in (image, cached))
        medians = [sorted(clock.seconds[WARM_UP:])[(STEPS - WARM_UP) // 2] for clock in (slow, fast)]
        difference = max(abs(a - b) for a, b in zip(slow.losses, fast.losses, strict=True))
        ratio = medians[0] / medians[1]
        print(f"| {name} | {medians[0]:.2f} s | {medians[1]:.2f} s | {ratio:.1f} | {difference:.1e} |", flush=True)


def configuration(base: Path, encoder: Path, projector: ProjectorConfig) -> dict:
    """The same model for the command line."""
    image = {
        "encoders": [{"path": str(encoder), "weights": "random"}],
        "projector": {"kind": projector.kind, "num_tokens": projector.num_tokens},
    }
    model = {"backbone": {"path": str(base), "weights": "random"}, "image": image}
    return {
        "model": {"class_path": "lit_alignment.VLMModule", "init_args": model},
        "data": {"class_path": "lit_alignment.VLMDataModule", "init_args": {"train": [{"records": []}]}},
    }


def memory() -> None:
    """Print peak memory over the number of images."""
    print("| images | peak memory | seconds |")
    print("|---|---|---|")
    for number in (500, 5000):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            pictures(folder / "pictures", number, 64)
            command = [sys.executable, "-m", "lit_alignment", "preprocess", "--config", "configs/vlm/tiny.yaml"]
            command += ["--files", str(folder / "pictures"), "--out", str(folder / "cache")]
            start = time.perf_counter()
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - start
        if status != 0:
            sys.exit(f"preprocess failed with status {status}")
        print(f"| {number} | {usage.ru_maxrss / 1e6:.3f} GB | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    chosen = {"steps": steps, "memory": memory}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if chosen is None:
        sys.exit(__doc__)
    chosen()
