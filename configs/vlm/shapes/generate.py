"""Draw the coloured shapes of the tiny vision-language recipes.

    python configs/vlm/shapes/generate.py

Questions are about colour, shape and side; nothing but the picture tells the answer. The pictures of the test split
show colours and shapes together that no picture for training does.
"""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent
COLORS = {"red": (220, 38, 38), "blue": (37, 99, 235), "green": (22, 163, 74), "yellow": (250, 204, 21)}
SHAPES = ("circle", "square", "triangle", "ring")
SIDES = {"left": 3, "right": 15}
HELD_OUT = {("red", "ring"), ("blue", "circle"), ("green", "square"), ("yellow", "triangle")}
SIZE, EXTENT = 32, 14
QUESTIONS = {
    "color": ("What color is it?", "Tell me the color."),
    "shape": ("Which shape is this?", "Name the shape."),
    "side": ("On which side is it?", "Left or right?"),
}


def draw(color: str, shape: str, side: str) -> Image.Image:
    """One shape on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    pen = ImageDraw.Draw(image)
    left, top = SIDES[side], (SIZE - EXTENT) // 2
    box = (left, top, left + EXTENT, top + EXTENT)
    match shape:
        case "circle":
            pen.ellipse(box, fill=COLORS[color])
        case "square":
            pen.rectangle(box, fill=COLORS[color])
        case "ring":
            pen.ellipse(box, outline=COLORS[color], width=3)
        case _:
            pen.polygon([(left, box[3]), (box[2], box[3]), (left + EXTENT / 2, top)], fill=COLORS[color])
    return image


def main() -> None:
    """Write pictures and records."""
    (FOLDER / "images").mkdir(exist_ok=True)
    generator = random.Random(0)
    records: dict[str, list[dict]] = {"train": [], "test": []}
    for color in COLORS:
        for shape in SHAPES:
            for side in SIDES:
                name = f"{color}-{shape}-{side}"
                draw(color, shape, side).save(FOLDER / "images" / f"{name}.png")
                answers = {"color": color, "shape": shape, "side": side}
                for kind, forms in QUESTIONS.items():
                    content = [
                        {"type": "image", "image": f"images/{name}.png"},
                        {"type": "text", "text": generator.choice(forms)},
                    ]
                    messages = [
                        {"role": "user", "content": content},
                        {"role": "assistant", "content": answers[kind]},
                    ]
                    split = "test" if (color, shape) in HELD_OUT else "train"
                    records[split].append({"id": f"{name}-{kind}", "messages": messages})
    for split, lines in records.items():
        generator.shuffle(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (FOLDER / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
