"""Reward models: scores of responses, trained on preferences, on judged responses, or on judged steps.

N scores, R records, P pairs
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from torchmetrics import Metric

from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.asking import Conversation
from lit_alignment.data.batching.collate import ScoreBatch
from lit_alignment.data.reward import ResponsesItem, RewardDataModule
from lit_alignment.errors import ConfigError, present
from lit_alignment.evaluation.samples import ScoredSample
from lit_alignment.hooks import Stage
from lit_alignment.losses import bradley_terry_loss, centering_penalty, outcome_loss, plackett_luce_loss
from lit_alignment.metrics import TokenMean
from lit_alignment.metrics.classification import ScoresAndTargets, binary_metrics
from lit_alignment.metrics.rewards import Moments, PairMetrics, section_accuracies
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig, HeadConfig
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.scoring import ScoringModule, check_positive, existing_head
from lit_alignment.optimization import OptimizerConfig

HEAD = HeadConfig(("reward",), "regression")
JUDGED = ("accuracy", "auroc", "average_precision", "calibration_error")  # metrics of responses judged alone


class RewardModule(ScoringModule):
    """A decoder that scores responses by the hidden state of their last token, or of the end of each step.

    What the scores are trained on follows from the data module's `kind`: `preferences` (Bradley-Terry for a pair,
    Plackett-Luce for a ranking), `outcomes` (binary cross-entropy of a response) or `steps` (the same of each step).

    loss of an optimizer step = mean over all its records (steps), on all ranks and in all micro-batches

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library, beside which the head trains; without these and `adapter` all train.
        adapter: An existing adapter, frozen or to be trained further, with its head.
        tokens: Special and new tokens.
        optimizer: Optimizer and schedule.
        use_margin: Ask pairs to be as far apart as their records' `margin`.
        center: Weight of a penalty that keeps scores around zero; 0.01 in the paper.
        normalize: In `predict`, take the mean of the validation data's scores off and divide by their deviation.
    """

    title = "reward modelling"
    data_classes = (RewardDataModule,)

    def __init__(
        self,
        backbone: BackboneConfig,
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        use_margin: bool = True,
        center: float = 0.0,
        normalize: bool = False,
    ) -> None:
        """Set up the metrics; the weights come in `configure_model`."""
        existing = existing_head(backbone, adapter)
        head = existing if existing is not None and len(existing.labels) == 1 else HEAD
        super().__init__(backbone, peft, adapter, tokens, optimizer, head)
        check_positive("center", center)
        self.use_margin, self.center, self.normalize = use_margin, center, normalize

    @classmethod
    def arguments_of(cls, saved: Saved) -> dict[str, Any]:
        """Nothing more.

        Raises:
            ConfigError: If the model has several scores.
        """
        if saved.head is not None and len(saved.head.labels) != 1:
            raise ConfigError(f"this model has scores of {len(saved.head.labels)} labels: use ClassificationModule.")
        return super().arguments_of(saved)

    @property
    def data(self) -> RewardDataModule:
        """The data module, which says what is known of the responses."""
        return self.data_as(RewardDataModule)

    def losses(self, scores: Tensor, batch: ScoreBatch) -> Tensor:
        """Loss of each record, or of each step, [R].

        Args:
            scores: [N].
            batch: What they should be.
        """
        if self.data.kind != "preferences":
            losses = outcome_loss(scores, batch.targets)
            return torch.stack([part.sum() for part in torch.split(losses, batch.groups)])
        better, worse, records = present(batch.pairs, "which scores are compared")
        margins = batch.margins[records] if self.use_margin and batch.margins is not None else None
        of_pairs = bradley_terry_loss(scores[better], scores[worse], margins)
        losses = of_pairs.new_zeros(len(batch.groups)).index_add(0, records, of_pairs)
        groups = zip(torch.split(scores, batch.groups), torch.split(batch.targets, batch.groups), strict=True)
        for record, (own, targets) in enumerate(groups):
            if len(own) != 2:
                losses[record] = plackett_luce_loss(own, -targets)  # ranks are lower the better
        if self.center:
            penalties = [centering_penalty(own) for own in torch.split(scores, batch.groups)]
            losses = losses + self.center * torch.stack(penalties)
        return losses

    def stage_metrics(self) -> dict[str, Metric]:
        """Mean loss, mean and deviation of the scores, and pairs or judged scores, as `data.kind` has it."""
        metrics = {"loss": TokenMean(), "moments": Moments()}
        return metrics | (
            {"pairs": PairMetrics()} if self.data.kind == "preferences" else {"judged": ScoresAndTargets(1)}
        )

    def scored_step(self, scores: Tensor, batch: ScoreBatch, stage: Stage) -> Tensor:
        """The batch's share of the loss in training; else its loss, after adding it to the metrics."""
        scores = scores[:, 0]
        loss_sum = (self.losses(scores, batch) * batch.weights).sum()
        if stage == "train":
            return self.step_loss(loss_sum, batch.window_weight)
        sizes = torch.tensor(batch.groups, device=scores.device)
        number = (sizes * batch.weights).sum() if self.data.kind == "steps" else batch.weights.sum()
        metrics = self.metrics_of(stage)
        metrics["loss"].update(loss_sum, number)
        counted = batch.weights.repeat_interleave(sizes) > 0  # one position a score
        metrics["moments"].update(scores[counted])
        if self.data.kind == "preferences":
            pairs = metrics["pairs"]
            better, worse, records = ordered_pairs(batch)
            groups = [pairs.groups.index(batch.subsets[record] if stage == "test" else "") for record in records]
            positions = torch.tensor([better, worse, groups], dtype=torch.long, device=scores.device)
            pairs.update(scores[positions[0]], scores[positions[1]], positions[2])
        else:
            metrics["judged"].update(scores[counted, None], batch.targets[counted, None])
        return loss_sum

    def on_test_start(self) -> None:
        """Count each part of a benchmark by itself."""
        if self.data.kind == "preferences":
            subsets = sorted(set(self.data.examples["test"]["subset"]))
            self.metrics["test"]["pairs"] = PairMetrics(subsets).to(self.device)  # type: ignore[operator]

    def stage_values(self, stage: Stage) -> dict[str, Tensor | float]:
        """Metrics of the scores; a validation keeps their mean and deviation for normalised rewards.

        In a test also accuracies by subset and, for RewardBench's subsets, by section.
        """
        metrics = self.metrics_of(stage)
        mean, deviation = metrics["moments"].compute()
        if stage == "val":
            self.measure({"reward_mean": mean, "reward_std": deviation})
        values = {"loss": metrics["loss"].compute(), "reward_mean": mean, "reward_std": deviation}
        if self.data.kind == "preferences":
            of_pairs, by_group = metrics["pairs"].compute()
            subsets = {name: value for name, value in by_group.items() if name}
            values |= of_pairs
            values |= {f"accuracy/{name}": accuracy for name, (accuracy, _) in subsets.items()}
            return values | {f"section/{name}": accuracy for name, accuracy in section_accuracies(subsets).items()}
        scores, labels = metrics["judged"].gathered()
        judged = binary_metrics(scores[:, 0], labels[:, 0])
        return values | {name: judged[name] for name in JUDGED}

    # Predictions.

    def prediction_settings(self) -> dict[str, dict[str, Any]]:
        """One file, `rewards`."""
        measured = self.head.measured if self.normalize else None
        return {"rewards": {"normalize": self.normalize, "measured": measured}}

    def sequences(self, item: ResponsesItem) -> list[list[int]]:
        """The prompt with each response.

        Raises:
            ConfigError: If the scores are of steps.
        """
        if self.data.kind == "steps":
            raise ConfigError("the rewards of steps are read inside a response. Use engine: transformers.")
        return [item.sequences.prompt + response for response in item.sequences.responses]

    def predicted(self, item: ResponsesItem, scores: Tensor) -> dict[str, Any]:
        """`answers` and `rewards` of one record, raw or normalised; one of steps has `step_rewards` beside them.

        The reward of a response made of steps is the log-probability that all of them are good (Lightman et al. 2023).
        """
        found = self._normalized(scores[:, 0])
        rewards = found.tolist()
        if self.data.kind == "steps":
            parts = torch.split(found, [len(positions) for positions in item.read_at])
            rewards = [float(logsigmoid(part).sum()) for part in parts]
        named = zip(item.answers, rewards, strict=True)
        line = {"answers": item.answers, "rewards": {answer["id"]: reward for answer, reward in named}}
        if self.data.kind == "steps" and len(item.answers) == 1:
            line["step_rewards"] = found.tolist()
        return line

    def score(self, conversations: Sequence[Conversation], batch_size: int = 8) -> list[float]:
        """The reward of each conversation's last response, in order; higher is better.

        Raw scores, or normalised ones, as `normalize` says; those of a model of steps are log-probabilities.

        Args:
            conversations: Messages that end with the response, or records of a prompt with one response.
            batch_size: Conversations to score together.

        Raises:
            ConfigError: If one has several responses, or more tokens than the model has positions.
            RecordError: If one is malformed, or ends without a response.
        """
        rewards = [list(line["rewards"].values()) for line in self.predictions(conversations, batch_size)]
        wrong = next((number for number, own in enumerate(rewards) if len(own) != 1), None)
        if wrong is not None:
            raise ConfigError(f"conversation {wrong + 1}: it has {len(rewards[wrong])} responses. Give one in each.")
        return [own[0] for own in rewards]

    def scored_sample(self, item: ResponsesItem, predicted: dict[str, Any]) -> ScoredSample:
        """The rewards, and whether the best response has the highest one."""
        rewards: dict[str, float] = predicted["rewards"]
        text = "\n".join(f"{name} {reward:.3f}" for name, reward in rewards.items())
        right = best_is_best(item.scores, list(rewards.values()))
        if rewards.keys() == {"chosen", "rejected"}:
            columns: dict[str, Any] = {f"{name}_reward": reward for name, reward in rewards.items()}
        else:
            columns = {"rewards": text}
        return ScoredSample(text, {**columns, "score": right}, rewards, right)

    def rewards(self, batch: ScoreBatch) -> list[Tensor]:
        """Rewards of each record's responses or steps, raw or normalised."""
        return list(torch.split(self._normalized(self.scores(batch)[:, 0]), batch.groups))

    def _normalized(self, scores: Tensor) -> Tensor:
        """Scores as they are, or less their mean in units of their deviation, as `normalize` says.

        Raises:
            ConfigError: If they should be normalised and were never measured, or are of steps.
        """
        if not self.normalize:
            return scores
        measured = self.head.measured
        if self.data.kind == "steps":
            raise ConfigError("model.normalize: the reward of steps is a log-probability; set it to false.")
        if "reward_mean" not in measured:
            raise ConfigError("model.normalize: this model's rewards were never measured: run validate, or fit.")
        return (scores - measured["reward_mean"]) / max(measured["reward_std"], 1e-12)


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


def ordered_pairs(batch: ScoreBatch) -> tuple[list[int], list[int], list[int]]:
    """Positions of the better and of the worse score of every pair whose targets differ, and of its record.

    Records of weight 0 are left out.
    """
    better, worse, records, start = [], [], [], 0
    for record, (size, weight) in enumerate(zip(batch.groups, batch.weights.tolist(), strict=True)):
        targets = batch.targets[start : start + size].tolist()
        for i, j in ((i, j) for i in range(size) for j in range(size) if weight and targets[i] > targets[j]):
            better.append(start + i)
            worse.append(start + j)
            records.append(record)
        start += size
    return better, worse, records
