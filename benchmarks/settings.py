"""Which learning rate, rank, batch and number of epochs? One setting after another of a real fine-tuning is changed.

    python -m benchmarks.settings run                 # about two hours on a core that other programs shared
    python -m benchmarks.settings run --only rate     # one group: rate, seed, full, rank, batch, epochs, placement
    python -m benchmarks.settings table               # of all that were run
    python -m benchmarks.settings picture             # right answers by learning rate: configs/guide/rates.svg
    python -m benchmarks.settings run --tiny          # every training on a handful of records, in minutes

SmolLM2-135M learns the demo's support requests as configs/sft/smollm2_lora.yaml says, but for one setting: 400 records,
packed into rows of 512 tokens, one row a step. Measured are the loss and the share of answers that are right to the
character on 200 fresh requests whose sentences, products and order numbers are in no training data.

Every stage is a command of lit-alignment, run in this process. What a stage writes stands under data/settings; a stage
whose settings and input files are those of the time before is passed over.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.stages import BFLOAT16, LAST, callbacks, fit, read, sources, write
from benchmarks.support import DEMO, MODEL, SFT, answered, write_requests
from lit_alignment.tools.fetch import fetch

DATA = Path("data/settings")
ASKED = 200  # held-out requests
RATE, RANK = 2e-3, 16  # of the recipe
UPPER = list(range(15, 30))  # layers that have adapters in the recipe
FULL = ["--model.init_args.peft=null"]


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        group: What is changed.
        value: To what.
        options: What changes it.
    """

    group: str
    value: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.group}-{self.value}".replace(" ", "-").replace(",", "")


def rate(value: float) -> str:
    """The option of a learning rate."""
    return f"--model.init_args.optimizer.learning_rate={value}"


def adapter(rank: int, layers: list[int] = UPPER, modules: str | None = None) -> list[str]:
    """The options of a rank, whose scale stays 2, in some layers and matrices."""
    given = {"r": rank, "lora_alpha": 2 * rank, "layers_to_transform": layers}
    options = [f"--model.init_args.peft.init_args.{name}={json.dumps(value)}" for name, value in given.items()]
    return options + ([] if modules is None else [f"--model.init_args.peft.init_args.target_modules={modules}"])


def runs() -> Iterator[Run]:
    """All trainings, those first that say most."""
    for value in (RATE, 3e-4, 1e-3, 5e-3, 1e-4, 1e-2):
        yield Run("rate", f"{value:g}", (rate(value),))
    for seed in (1, 2):
        yield Run("seed", str(seed), (f"--seed_everything={seed}", f"--data.init_args.seed={seed}"))
    for value in (1e-4, 3e-5, 3e-4, 1e-5):
        yield Run("full", f"{value:g}", (*FULL, rate(value)))
    for rank in (2, 64):
        yield Run("rank", str(rank), tuple(adapter(rank)))
    for rows, value in ((4, RATE), (4, 2 * RATE), (16, 2 * RATE)):
        options = f"--trainer.accumulate_grad_batches={rows}", "--trainer.log_every_n_steps=1", rate(value)
        yield Run("batch", f"{rows} rows, {value:g}", options)
    for epochs, value in ((2, RATE), (3, RATE), (3, 1e-3)):
        yield Run("epochs", f"{epochs}, {value:g}", (f"--trainer.max_epochs={epochs}", rate(value)))
    yield Run("placement", "all layers", tuple(adapter(RANK, list(range(30)))))
    yield Run("placement", "attention only", tuple(adapter(RANK, UPPER, "[q_proj,k_proj,v_proj,o_proj]")))


def trained(folder: Path, run: Run, train: Path, held_out: Path) -> None:
    """Train, measure, and write what came out of one run."""
    weights = [] if run.group == "full" else BFLOAT16  # what is frozen is held in half precision
    once = ["--trainer.val_check_interval=1.0", callbacks(LAST)]
    options = [f"--config={SFT}", *weights, sources("train", train), sources("val", held_out), *once, *run.options]
    checkpoint = fit(folder / run.name, options, [train, held_out])
    right = float(answered(folder, run.name, held_out, (options, checkpoint)).mean())
    report = json.loads((folder / run.name / "run/report.json").read_text(encoding="utf-8"))
    seconds = json.loads((folder / run.name / "stage.json").read_text(encoding="utf-8"))["seconds"]
    steps, loss = report["curves"]["val/loss"][-1]
    row = {"group": run.group, "value": run.value, "steps": steps, "loss": loss, "right": right, "seconds": seconds}
    row["train_loss"] = report["curves"]["train/loss"][-1][1]
    (folder / run.name / "row.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
    print(row, flush=True)


def rows(folder: Path) -> list[dict[str, Any]]:
    """What came out of the runs that are finished, in their order."""
    paths = [folder / run.name / "row.json" for run in runs()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def table(folder: Path) -> None:
    """Print all rows."""
    print("| changed | to | steps | loss of the last rows | held-out loss | right of held out | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in rows(folder):
        figures = f"{row['train_loss']:.3f} | {row['loss']:.3f} | {row['right']:.3f} | {row['seconds']:.0f}"
        print(f"| {row['group']} | {row['value']} | {row['steps']} | {figures} |")


PICTURE = Path("configs/guide/rates.svg")
LINES = {"rate": ("LoRA, rank 16", "#00796b"), "full": ("all weights", "#c2410c")}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 64, 16, 24, 56
LOWEST, HIGHEST = -5, -2  # powers of ten that the axis begins and ends with


def picture(folder: Path) -> None:
    """Draw the share of right answers by learning rate, of adapters and of all weights."""

    def across(rate: float) -> float:
        return LEFT + (math.log10(rate) - LOWEST) / (HIGHEST - LOWEST) * (WIDTH - LEFT - RIGHT)

    def down(share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="13"'
        ' font-family="system-ui, sans-serif" aria-label="Share of right answers by learning rate">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
    ]
    for tenth in range(0, 11, 2):
        y = down(tenth / 10)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#334155">{tenth / 10:g}</text>')
    for power in range(LOWEST, HIGHEST + 1):
        x = across(10.0**power)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 34}" text-anchor="middle" fill="#334155">1e{power}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle" fill="#16202c">learning rate</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 8}" fill="#16202c">right of {ASKED} held-out requests</text>')
    for number, (group, (name, color)) in enumerate(LINES.items()):
        points = sorted((float(row["value"]), row["right"]) for row in rows(folder) if row["group"] == group)
        path = " ".join(f"{across(rate):.1f},{down(share):.1f}" for rate, share in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for rate, share in points:
            label = f"{name}, {rate:g}: {share:.3f}"
            place = f'cx="{across(rate):.1f}" cy="{down(share):.1f}"'
            parts.append(f'<circle {place} r="4" fill="{color}"><title>{label}</title></circle>')
        y = TOP + 18 + 20 * number
        parts.append(f'<rect x="{LEFT + 16}" y="{y - 9}" width="18" height="4" fill="{color}"/>')
        parts.append(f'<text x="{LEFT + 42}" y="{y - 2}" fill="#16202c">{name}</text>')
    PICTURE.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
    print(PICTURE)


def main() -> None:
    """Run some groups, or show what was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table", "picture"])
    parser.add_argument("--only", nargs="+", choices=list(dict.fromkeys(run.group for run in runs())))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    folder = DATA / "tiny" if options.tiny else DATA
    if options.command == "run":
        fetch(MODEL)
        number = 4 if options.tiny else ASKED
        held_out, _ = write_requests(folder, number, 1)
        train = write(folder / "train.jsonl", read(DEMO / "train.jsonl")[: 16 if options.tiny else None])
        for run in runs():
            if options.only is None or run.group in options.only:
                trained(folder, run, train, held_out)
    if options.command == "picture":
        picture(folder)
    else:
        table(folder)


if __name__ == "__main__":
    main()
