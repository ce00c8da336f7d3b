"""Fixed records, classified or scored at each validation, side by side in one report."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_alignment.callbacks.samples.base import PickReport
from lit_alignment.callbacks.samples.html import CherryPick, confusion_svg
from lit_alignment.data.base import datamodule_of
from lit_alignment.data.reward import ResponsesItem
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError
from lit_alignment.modules.classification import ClassificationModule
from lit_alignment.modules.reward import RewardModule


class ScoredPicks(PickReport):
    """Classify or score the same records before training and at each validation.

    A classifier's report has messages, label and predictions, and the confusion matrix of the last validation; a
    reward model's has the prompt, its responses and their rewards. Writes `cherry_picks.html` (self-contained) and
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
        if not isinstance(module, ClassificationModule | RewardModule):
            raise ConfigError(
                f"ScoredPicks needs a classifier or a reward model, not {type(module).__name__}; for one that answers "
                "use lit_alignment.CherryPicks."
            )

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
        if not isinstance(module, ClassificationModule | RewardModule):
            return [], []
        data, training = datamodule_of(trainer), module.training
        module.eval()
        found: list[dict[str, Any]] = []
        for start in range(0, len(self.items), self.batch_size):
            batch = data.predict_collate(self.items[start : start + self.batch_size])
            batch = module.transfer_batch_to_device(batch, module.device, 0)
            (predictions,) = module.predict_step(batch, 0).values()
            found += predictions
        module.train(training)
        if isinstance(module, ClassificationModule):
            return self._classified(module, found, step)
        return self._rewarded(found, step)

    def _classified(
        self, module: ClassificationModule, found: list[dict[str, Any]], step: int
    ) -> tuple[list[str], list[list[Any]]]:
        rows = []
        for pick, item, predicted in zip(self.picks, self.items, found, strict=True):
            prediction = predicted["prediction"]
            probabilities = predicted.get("probabilities", {})
            shown = [(name, probabilities.get(name)) for name in _as_list(prediction)]
            pick.answers[step] = "\n".join(f"{name:.3g}" if p is None else f"{name} {p:.1%}" for name, p in shown)
            pick.scores[step] = {}
            if item.label is not None and module.problem != "regression":
                names = module.names(item.label)
                pick.right[step] = names == _as_list(prediction)
                if module.problem == "single_label":
                    pick.scores[step] = {"probability of the label": probabilities[names[0]]}
            rows.append([_last(pick), pick.known["label"], pick.answers[step]])
        return ["prompt", "label", "prediction"], rows

    def _rewarded(self, found: list[dict[str, Any]], step: int) -> tuple[list[str], list[list[Any]]]:
        rows: list[list[Any]] = []
        pairs = all({"chosen", "rejected"} == predicted["rewards"].keys() for predicted in found)
        for pick, item, predicted in zip(self.picks, self.items, found, strict=True):
            rewards = predicted["rewards"]
            pick.answers[step] = "\n".join(f"{name} {reward:.3f}" for name, reward in rewards.items())
            pick.scores[step] = rewards
            right = best_is_best(item.scores, list(rewards.values()))
            if right is not None:
                pick.right[step] = right
            values = list(rewards.values()) if pairs else [pick.answers[step]]
            rows.append([_last(pick), *pick.known.values(), *values, right])
        known = list(self.picks[0].known) if self.picks else []
        values = ["chosen_reward", "rejected_reward"] if pairs else ["rewards"]
        return ["prompt", *known, *values, "score"], rows

    def pictures(self, module: LightningModule) -> dict[str, str]:
        """The confusion matrix of a classifier's last validation."""
        if not isinstance(module, ClassificationModule) or module.confusion is None:
            return {}
        picture = confusion_svg(module.confusion.tolist(), module.labels)
        return {"Confusion matrix of the validation data": picture}


def best_is_best(scores: list[float | None], rewards: list[float]) -> bool | None:
    """Whether a response of the best score has the highest reward; None if the scores are not known.

    Args:
        scores: What is known of each response, higher is better.
        rewards: Their rewards.
    """
    known = [score for score in scores if score is not None]
    if len(known) < 2 or len(known) != len(rewards):
        return None
    return known[max(range(len(rewards)), key=rewards.__getitem__)] == max(known)


def _as_list(prediction: Any) -> list[Any]:
    return prediction if isinstance(prediction, list) else [prediction]


def _last(pick: CherryPick) -> str:
    return str(pick.messages[-1]["content"])
