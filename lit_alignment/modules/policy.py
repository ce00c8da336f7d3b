"""Policy optimisation: sample responses, score them, learn from how they differ.

N trained tokens, B responses
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from torchmetrics import Metric

from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.base import AlignmentDataModule, Split, datamodule_as
from lit_alignment.data.batching.items import PromptBatch
from lit_alignment.data.policy import PolicyDataModule
from lit_alignment.data.rollout import Group, RolloutBatch
from lit_alignment.errors import ConfigError
from lit_alignment.evaluation.samples import NotableResponse
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.hooks import Stage
from lit_alignment.losses.policy import (
    PolicyInputs,
    WindowCounts,
    advantages,
    count_responses,
    groups_without_variance,
    policy_loss,
    reward_moments,
    step_deviation,
)
from lit_alignment.losses.policy_config import PolicyLossConfig
from lit_alignment.metrics.named import NamedMeans
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.models.logprobs import target_logps
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.compared import ComparedModule
from lit_alignment.modules.rollout import RolloutModule, answer_of
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.planning.memory import RolloutShape
from lit_alignment.rollout.builtin_rewards import LengthReward
from lit_alignment.rollout.config import RolloutConfig
from lit_alignment.rollout.reward_pool import RewardPool
from lit_alignment.rollout.rewards import RewardFunction
from lit_alignment.rollout.samplers import Sampler, TransformersSampler, check_sampling
from lit_alignment.training.policy_values import (
    OF_ANSWERS,
    answer_values,
    best_and_worst,
    names_of_values,
    reward_names,
    token_values,
)
from lit_alignment.training.preference_reference import ReferenceKind, reference_of_policy

CHARTS = (("no_variance",), ("length",), ("truncated",), ("entropy",), ("clipped_low", "clipped_high"), ("kl",))


class PolicyModule(RolloutModule, ComparedModule):
    """A causal language model that learns from rewards of its own responses.

    Each optimizer step samples `rollout.num_responses` responses to each of its prompts with the weights of then,
    scores them, and weighs each against the others to its prompt. The loss of a step is one mean over all its responses
    or tokens, on all ranks and in all micro-batches; dropout is off.

    Args:
        backbone: The pretrained model.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An existing adapter, frozen or to be trained further.
        tokens: Special and new tokens; with LoRA only the rows of new ones train.
        optimizer: Optimizer and schedule.
        rewards: What scores responses; the reward is their weighted sum.
        loss: What is minimised; GRPO by default.
        rollout: How responses are sampled.
        engine: What samples them; transformers' own generate by default.
        reference: What the KL divergence is taken from, the model before training, if `loss.kl_weight` is above 0:
            `adapter_off` switches new adapters off, `frozen_copy` holds a second copy; `auto` takes what costs least.
        reward_workers: Prompts that are scored beside each other by functions that do not run inline.
        generation: Decoding configurations of `predict`, by name.
    """

    title = "policy optimisation"
    data_classes: tuple[type[AlignmentDataModule], ...] = (PolicyDataModule,)
    progress_bar = ("loss", "reward")

    def __init__(
        self,
        backbone: BackboneConfig,
        rewards: list[RewardFunction],
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        loss: PolicyLossConfig = PolicyLossConfig(),  # noqa: B008 - frozen
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008 - frozen
        engine: Sampler | None = None,
        reference: ReferenceKind = "auto",
        reward_workers: int = 16,
        generation: dict[str, DecodingConfig] | None = None,
    ) -> None:
        """Check rewards, loss and rollout; the weights come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer, generation)
        if rollout.num_responses < 2 and loss.form.advantage != "batch":
            raise ConfigError(
                "model.rollout.num_responses is 1, and each response is weighed against the others to its prompt. "
                "Use 2 or more."
            )
        check_sampling(rollout.decoding, loss.correction, rollout.steps_per_rollout)
        self.scorer = RewardPool(rewards, reward_workers)
        self.loss, self.rollout = loss, rollout
        self.sampler = TransformersSampler() if engine is None else engine
        if loss.correction is not None and self.sampler.exact:
            raise ConfigError(
                f"model.loss.correction is {loss.correction}, and {type(self.sampler).__name__} samples from the "
                "policy itself. Remove it."
            )
        self.reference = reference_of_policy(reference, loss, peft, adapter)
        self.reference_sync, self.reference_model = None, None
        self.beside = self.sampler.beside
        self.reward_names = list(reward_names(self.scorer.names))
        self.train_means = NamedMeans(names_of_values(self.scorer.names))
        self.charts = (("loss",), tuple(self.reward_names), ("reward_deviation",), *CHARTS)
        self._whole = ExitStack()  # weights that are gathered for a validation

    @classmethod
    def arguments_of(cls, saved: Saved) -> dict[str, Any]:
        """In the place of the rewards, which score what training samples, any one."""
        return {**super().arguments_of(saved), "rewards": [LengthReward(minimum=1)]}

    @property
    def data(self) -> PolicyDataModule:
        """The data module.

        Raises:
            ConfigError: If it is another method's.
        """
        return datamodule_as(PolicyDataModule, self.trainer)

    def method_settings(self) -> dict[str, Any]:
        """Loss, rewards, and how responses are sampled."""
        rollout = self.rollout
        sampled = {"num_responses": rollout.num_responses, "temperature": rollout.temperature}
        return {"loss": self.loss.name, "rewards": ", ".join(self.scorer.names), **sampled}

    def on_fit_start(self) -> None:
        """Also start what scores."""
        super().on_fit_start()
        self.scorer.start(self.device)

    def teardown(self, stage: str) -> None:
        """Also stop what scores."""
        super().teardown(stage)
        self.scorer.close()

    # Rollouts.

    def roll_out(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Group]:
        """Responses to prompts with their rewards, with the weights of now.

        Args:
            rows: The prompts.
            indices: Of the records.
        """
        with self.sampling():
            groups = self._scored(rows, indices)
            for redraw in range(1, self.rollout.max_redraws + 1):
                level = [position for position, group in enumerate(groups) if _is_level(group)]
                drawn = self._scored([rows[i] for i in level], [indices[i] for i in level], redraw)
                for position, group in zip(level, drawn, strict=True):
                    groups[position] = group
            if self.rollout.steps_per_rollout > 1:
                self._remember_policy(groups)
        return groups

    def _scored(self, rows: list[dict[str, Any]], indices: Sequence[int], redraw: int = 0) -> list[Group]:
        """Scored responses to prompts; each time that they are drawn again they are others."""
        groups = self.sampled(rows, indices, redraw)
        self._score(groups, "train")
        return groups

    def _score(self, groups: list[Group], split: Split) -> None:
        """Put the rewards of responses beside them."""
        names, records = self.data.records(split, [group.index for group in groups])
        texts = [[answer.text for answer in group.answers] for group in groups]
        scores = self.scorer.score(list(zip(texts, records, strict=True)), names)
        answers = [answer for group in groups for answer in group.answers]
        of_answers = zip(answers, scores.rewards.tolist(), scores.values.T.tolist(), strict=True)
        for answer, reward, values in of_answers:
            answer.reward = reward
            answer.rewards = dict(zip(self.scorer.names, values, strict=True))

    def _remember_policy(self, groups: list[Group]) -> None:
        """Put log-probabilities under the policy of now beside the responses, in micro-batches as in training."""
        for start in range(0, len(groups), self.data.batch_size):
            part = groups[start : start + self.data.batch_size]
            answers = (answer for group in part for answer in group.answers)
            for answer, logps in zip(answers, self.logps(part), strict=True):
                answer.old_logps = logps.tolist()

    def weigh(self, groups: list[Group]) -> WindowCounts:
        """Put the advantages of an optimizer step's responses beside them; its counts, on all ranks.

        Args:
            groups: This rank's.
        """
        answers = [answer for group in groups for answer in group.answers]
        rewards = torch.tensor([answer.reward for answer in answers], dtype=torch.float64)
        sizes = [len(group.answers) for group in groups]
        functions = [[answer.rewards[name] for answer in answers] for name in self.scorer.names]
        of_all = [reward_moments(own) for own in (rewards, *torch.tensor(functions, dtype=torch.float64))]
        deviation, *of_functions = (step_deviation(own) for own in self.of_ranks(torch.stack(of_all)).unbind(1))
        found = advantages(rewards, sizes, self.loss.form.advantage, deviation=deviation)
        for answer, advantage in zip(answers, found.tolist(), strict=True):
            answer.advantage = advantage
        lengths = [len(answer.token_ids) for answer in answers]
        truncated = [answer.truncated for answer in answers]
        limit = self.rollout.max_new_tokens
        own = count_responses(self.loss, lengths, truncated, (~rewards.isnan()).tolist(), limit)
        counts = self.of_ranks(torch.tensor([own.responses, own.scored, own.tokens], dtype=torch.float64)).sum(0)
        values = answer_values(answers, self.scorer.names) | {
            "no_variance": groups_without_variance(rewards, sizes).tolist()
        }
        deviations = zip(self.reward_names, (deviation, *of_functions), strict=False)
        self._update(self.train_means, values | {f"{name}_deviation": [own.tolist()] for name, own in deviations})
        self.training_begins()
        responses, scored, tokens = map(int, counts.tolist())
        return WindowCounts(responses, scored, tokens, limit)

    def _update(self, means: NamedMeans, values: dict[str, list[float]]) -> None:
        means.update({name: torch.tensor(own, device=self.device) for name, own in values.items()})

    # What tools and reports ask.

    @property
    def rollout_shape(self) -> RolloutShape:
        """Responses to a prompt, and those that the network generates at a time."""
        number = self.rollout.num_responses
        return RolloutShape(number, self.rollout.max_new_tokens, self.sampler.responses_together(number))

    def trial_rollout(self, number: int) -> list[Group]:
        """Responses to the first prompts, as an optimizer step that stands alone samples, scores and weighs them."""
        if number == 0:
            return []
        rows = self.data.examples["train"]
        indices = range(min(number, len(rows)))
        groups = self.roll_out(rows.rows(indices), indices)
        self.weigh(groups)
        return groups

    def notable(self) -> list[NotableResponse]:
        """The best and the worst response of the last rollout on this rank."""
        return [
            NotableResponse(
                title=title,
                messages=json.loads(self.data.examples["train"].rows([index])[0]["messages"]),
                text=answer.text,
                scores=answer.scores,
                truncated=answer.truncated,
            )
            for title, index, answer in best_and_worst(self.data.rollout)
        ]

    # Steps and metrics.

    def stage_metrics(self) -> dict[str, Metric]:
        """Means over prompts."""
        return {"means": NamedMeans([*self.reward_names, *OF_ANSWERS])}

    def step(self, batch: RolloutBatch | PromptBatch, stage: Stage) -> Tensor:
        """The batch's share of the loss in training; else greedy answers, whose rewards are the metrics."""
        if isinstance(batch, PromptBatch):
            return self._answer(batch, stage)
        temperature = self.rollout.temperature
        reference = self.reference_logps(batch, temperature=temperature)
        policy = target_logps(self.network, batch, temperature=temperature)
        inputs = PolicyInputs(
            policy,
            batch.counts,
            batch.advantages,
            batch.truncated,
            batch.scored,
            batch.old_logps,
            batch.sampler_logps,
            reference,
        )
        found = policy_loss(self.loss, inputs, batch.step)
        self.train_means.update(token_values(found, policy.detach()), found.counts)
        return self.step_loss(found.loss, 1.0)

    def _answer(self, batch: PromptBatch, stage: Stage) -> Tensor:
        """Rewards of greedy answers, added to the metrics; their sum."""
        split: Split = "val" if stage == "val" else "test"
        responses = self.respond(batch.items, self.rollout.greedy)
        groups = [
            Group(index=item.index, prompt=item.input_ids, answers=[answer_of(response.completions[0])])
            for item, response in zip(batch.items, responses, strict=True)
        ]
        self._score(groups, split)
        values = answer_values([group.answers[0] for group in groups], self.scorer.names)
        self._update(self.metrics_of(stage)["means"], values)
        return torch.tensor(sum(values["reward"]))

    def stage_values(self, stage: Stage) -> dict[str, Tensor | float]:
        """Means over prompts."""
        return dict(self.metrics_of(stage)["means"].compute())

    # Validation answers prompts: ranks with unequal numbers of tokens would wait for each other's shards.

    def on_validation_start(self) -> None:
        """Gather what is sharded."""
        super().on_validation_start()
        if self.trainer.state.fn != "fit":
            self.scorer.start(self.device)
        self._whole.enter_context(self.features.gathered(self))

    def on_validation_end(self) -> None:
        """Shard it again."""
        self._whole.close()
        super().on_validation_end()

    def on_test_start(self) -> None:
        """Gather what is sharded."""
        super().on_test_start()
        self.scorer.start(self.device)
        self._whole.enter_context(self.features.gathered(self))

    def on_test_end(self) -> None:
        """Shard it again."""
        self._whole.close()
        super().on_test_end()


def _is_level(group: Group) -> bool:
    """Whether all responses that have a reward have the same."""
    return len({answer.reward for answer in group.answers if not math.isnan(answer.reward)}) < 2
