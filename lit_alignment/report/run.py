"""What the page of a training shows, as plain data that a file beside the page holds too."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_alignment.errors import ConfigError
from lit_alignment.evaluation.samples import Confusion, NotableResponse
from lit_alignment.files import read_json

Points = Sequence[tuple[int, float]]
FILE = "report.json"
VERSION = 1


@dataclass
class CherryPick:
    """One record and what the model made of it.

    Args:
        dataset: Name of its source.
        id: Id of its record.
        messages: The conversation that the model saw.
        known: What the record says beside it, by column: the reference, the label, or the responses.
        answers: What the model made of it, by optimizer step.
        right: Whether that is what the record says, by optimizer step; missing where it says nothing.
        scores: Values of metrics by optimizer step and name.
        documents: What the model retrieved, each on a line with its score, by optimizer step.
    """

    dataset: str
    id: str
    messages: list[dict[str, Any]]
    known: dict[str, str | None]
    answers: dict[int, str] = field(default_factory=dict)
    right: dict[int, bool] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    documents: dict[int, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """The measure by which one validation is better than another.

    Args:
        name: Under which it is logged.
        mode: Whether lower or higher values are better.
    """

    name: str
    mode: Literal["min", "max"] = "min"


@dataclass
class TrainingRun:
    """A training, as far as it has come.

    Args:
        method: What it trains by, such as SFT.
        model: Name of the model.
        data: Names of the training sources.
        folder: Last parts of the run's folder.
        machine: What it ran on, by heading.
        config: Text of the configuration; empty where there is none.
        curves: Logged values over optimizer steps, by name.
        charts: Names without their stage, by chart; what else was logged has a chart of its own.
        judge: What ranks the validations; None where nothing does.
        picks: The same records at each validation.
        right: What is counted where a record has been met.
        confusion: Of the last validation of a classifier.
        notable: Responses of the last rollout.
        splits: Counts of the data reports.
    """

    method: str
    model: str
    data: list[str]
    folder: str
    machine: dict[str, str] = field(default_factory=dict)
    config: str = ""
    curves: dict[str, Points] = field(default_factory=dict)
    charts: list[list[str]] = field(default_factory=list)
    judge: Judge | None = None
    picks: list[CherryPick] = field(default_factory=list)
    right: str = "exact matches"
    confusion: Confusion | None = None
    notable: list[NotableResponse] = field(default_factory=list)
    splits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Method, model and data."""
        data = ", ".join(self.data[:3]) + (f" and {len(self.data) - 3} more" if len(self.data) > 3 else "")
        return f"{self.method} of {self.model}" + (f" on {data}" if data else "")

    @property
    def last_step(self) -> int:
        """The last optimizer step of which something is known."""
        return max([*(points[-1][0] for points in self.curves.values() if points), *self.steps], default=0)

    @property
    def steps(self) -> list[int]:
        """Optimizer steps at which the records were answered."""
        return sorted({step for pick in self.picks for step in pick.answers})

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best validation; None where none is ranked."""
        points = self.curves.get(self.judge.name, []) if self.judge else []
        if not self.judge or not points:
            return None
        choose = min if self.judge.mode == "min" else max
        return choose(points, key=lambda point: point[1])

    @property
    def met(self) -> tuple[int, int] | None:
        """How many records were met at the newest step, and of how many; None where they say nothing."""
        right = [pick.right[step] for step in self.steps[-1:] for pick in self.picks if step in pick.right]
        return (sum(right), len(right)) if right else None


def to_json(run: TrainingRun) -> str:
    """The run as one JSON object."""
    return json.dumps({"version": VERSION, **asdict(run)}) + "\n"  # halves of surrogate pairs cannot be written plain


def read_run(folder: Path) -> TrainingRun:
    """The run that `report.json` in a folder describes.

    Raises:
        ConfigError: If there is no such file, or it is none that a training wrote.
    """
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no {FILE} in it. Name the folder of a run, such as runs/sft/version_0.")
    values = read_json(path, "report of a run")
    try:
        if values.pop("version") != VERSION:
            raise ValueError("version")
        judge, confusion = values.pop("judge"), values.pop("confusion")
        return TrainingRun(
            **values
            | {
                "curves": {name: [(int(s), float(v)) for s, v in each] for name, each in values["curves"].items()},
                "judge": judge and Judge(**judge),
                "picks": [_pick(each) for each in values["picks"]],
                "confusion": confusion and Confusion(**confusion),
                "notable": [NotableResponse(**each) for each in values["notable"]],
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not what this version writes ({error}). Train or validate the run again."
        ) from error


def _pick(values: dict[str, Any]) -> CherryPick:
    """A record from JSON, whose keys are texts."""
    by_step = {
        name: {int(s): v for s, v in values[name].items()} for name in ("answers", "right", "scores", "documents")
    }
    return CherryPick(**values | by_step)
