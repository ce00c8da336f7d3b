"""Which learning rate, rank, batch and number of epochs? One setting after another of a real fine-tuning is changed.

    python -m benchmarks.settings run                 # about two hours on a core that other programs shared
    python -m benchmarks.settings run --only rate     # one group: rate, seed, full, rank, batch, epochs, placement
    python -m benchmarks.settings table               # of all that were run
    python -m benchmarks.settings run --tiny          # every training on a handful of records, in minutes

SmolLM2-135M learns the demo's support requests as configs/sft/smollm2_lora.yaml says, but for one setting: 400 records,
packed into rows of 512 tokens, one row a step. Measured are the loss and the share of answers that are right to the
character on 200 fresh requests whose sentences, products and order numbers are in no training data.

Every stage is a command of lit-alignment, run in this process. What a stage writes stands under data/settings; a stage
whose settings and input files are those of the time before is passed over.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


def rows(folder: Path) -> list[dict[str, object]]:
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


def main() -> None:
    """Run some groups, or print what was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
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
    table(folder)


if __name__ == "__main__":
    main()
