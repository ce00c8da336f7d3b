"""Fixed records, classified or scored at each validation, side by side in one report."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_alignment.callbacks.samples.base import PickReport
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.reward import ResponsesItem
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.evaluation.samples import ScoredSample
from lit_alignment.modules.base import alignment_module


class ScoredPicks(PickReport):
    """Classify or score the same records before training and at each validation.

    A classifier's report has messages, label and predictions, and the confusion matrix of the last validation; a
    reward model's has the prompt, its responses and their rewards. Writes `report.html` (self-contained) and
    `cherry_picks.jsonl` into the run's folder, and a table to the loggers that take one.

    Args:
        sources: Where the records come from; the validation sources by default.
        num_samples: Take the first so many of them.
        batch_size: Records to score together.
        every_n_validations: At every n-th validation only.
        before_training: Also before the first step.
    """

    right = "right"

    def __init__(
        self,
        sources: list[SourceConfig] | None = None,
        num_samples: int = 8,
        batch_size: int = 8,
        every_n_validations: int = 1,
        before_training: bool = True,
    ) -> None:
        """Records are read when the fit starts."""
        super().__init__(sources, num_samples, batch_size, every_n_validations, before_training)

    def check(self, module: LightningModule) -> None:
        """Refuse a module that scores nothing."""
        alignment_module(module).check_scores()

    def known(self, item: Any) -> dict[str, str | None]:
        """The label, or the responses by their ids."""
        if isinstance(item, ResponsesItem):
            if {answer["id"] for answer in item.answers} == {"chosen", "rejected"}:
                return {answer["id"]: answer["content"] for answer in item.answers}
            return {"responses": "\n".join(f"{answer['id']}: {answer['content']}" for answer in item.answers)}
        return {"label": None if item.label is None else str(item.label)}

    @torch.no_grad()
    def show(self, trainer: Trainer, module: LightningModule, step: int) -> tuple[list[str], list[list[Any]]]:
        """Score the records."""
        scoring, data, training = alignment_module(module), datamodule_of(trainer), module.training
        scoring.eval()
        samples: list[ScoredSample] = []
        for start in range(0, len(self.items), self.batch_size):
            items = self.items[start : start + self.batch_size]
            batch = scoring.transfer_batch_to_device(data.predict_collate(items), scoring.device, 0)
            (predictions,) = scoring.predict_step(batch, 0).values()
            samples += map(scoring.scored_sample, items, predictions)
        scoring.train(training)
        rows: list[list[Any]] = []
        for pick, sample in zip(self.picks, samples, strict=True):
            pick.answers[step], pick.scores[step] = sample.text, sample.scores
            if sample.right is not None:
                pick.right[step] = sample.right
            rows.append([str(pick.messages[-1]["content"]), *pick.known.values(), *sample.columns.values()])
        if not samples:
            return [], []
        return ["prompt", *self.picks[0].known, *samples[0].columns], rows
