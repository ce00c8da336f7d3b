"""What modules share that sample responses from the model in training."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_alignment.data.base import datamodule_as
from lit_alignment.data.rollout import Answer, Group, RolloutDataModule
from lit_alignment.distributed.rank_zero import on_rank_zero
from lit_alignment.errors import ConfigError
from lit_alignment.generation.engine import Completion, step_seed
from lit_alignment.metrics.named import NamedMeans
from lit_alignment.models.isolation import check_positions
from lit_alignment.models.reference import quiet_logps
from lit_alignment.modules.generative import GenerativeModule
from lit_alignment.rollout.config import RolloutConfig
from lit_alignment.rollout.samplers import SampledPolicy, Sampler


class RolloutModule(GenerativeModule):
    """Samples responses to the prompts of an optimizer step with the weights of then.

    A method adds `roll_out` and `weigh`, which its data module asks for.

    Attributes:
        rollout: How responses are sampled; a method sets it, with the next two.
        sampler: What samples them.
        train_means: What is logged of the responses of optimizer steps.
    """

    rollout: RolloutConfig
    sampler: Sampler
    train_means: NamedMeans
    _rollout_seconds = 0.0
    _begun = 0.0

    @property
    def samples(self) -> bool:
        """Whether anything is sampled."""
        return True

    @property
    def data(self) -> RolloutDataModule:
        """The data module.

        Raises:
            ConfigError: If it is another method's.
        """
        return datamodule_as(RolloutDataModule, self.trainer)

    def setup(self, stage: str) -> None:
        """Let the data module ask for rollouts.

        Raises:
            ConfigError: If the strategy cannot gather weights.
        """
        super().setup(stage)
        if stage != "predict" and self.samples and not self.features.supports("gathering"):
            raise ConfigError(
                "trainer.strategy: DeepSpeed's stage 3 cannot gather the weights to sample with. Use stage 1 or 2, "
                "DDP, or lit_alignment.FSDP2Strategy."
            )
        if stage == "fit":
            self.data.source, self.data.steps_per_rollout = self, self.rollout.steps_per_rollout

    def on_fit_start(self) -> None:
        """Start what samples."""
        super().on_fit_start()
        if self.samples:
            check_positions(self.network, self.data.encoding.max_length, self.rollout.max_new_tokens)
            self.sampler.start(
                SampledPolicy(self.network, self.tokenizer, self.backbone, on_rank_zero=self._on_rank_zero)
            )

    def teardown(self, stage: str) -> None:
        """Stop it."""
        super().teardown(stage)
        self.sampler.close()

    def _on_rank_zero(self, function: Callable[[], Any]) -> Any:
        return on_rank_zero(self.trainer, function)

    def roll_out(self, rows: list[dict[str, Any]], indices: Sequence[int]) -> list[Group]:
        """Responses to prompts, with the weights of now.

        Args:
            rows: The prompts.
            indices: Of the records.
        """
        with self.sampling():
            return self.sampled(rows, indices)

    @abstractmethod
    def weigh(self, groups: list[Group]) -> Any:
        """As of RolloutSource."""

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """What a rollout is made in: the sampler has the weights of now, and the time counts as the rollout's."""
        begin = time.perf_counter()
        with self.features.gathered(self.network), self.trainer.precision_plugin.forward_context(), torch.no_grad():
            self.sampler.sync(self.trainer.global_step)
            yield
        self._rollout_seconds += time.perf_counter() - begin

    def sampled(self, rows: list[dict[str, Any]], indices: Sequence[int], redraw: int = 0) -> list[Group]:
        """Responses to prompts, without rewards.

        Args:
            rows: The prompts.
            indices: Of the records.
            redraw: How often these have been drawn before; each time they are others.
        """
        requests = [self.request(row["input_ids"], self.rollout.decoding) for row in rows]
        requests = [replace(each, seed=step_seed(each.seed, redraw)) for each in requests]
        drawn = self.sampler.sample(requests, wanted_logps=False)
        groups = [
            Group(index=index, prompt=list(row["input_ids"]), answers=[answer_of(each) for each in completions])
            for index, row, completions in zip(indices, rows, drawn, strict=True)
        ]
        if groups and not self.sampler.exact:
            self.sampler.check(drawn[0], torch.cat(self.logps(groups[:1])))
        return groups

    def logps(self, groups: list[Group]) -> list[Tensor]:
        """Log-probabilities of each response under the model of now, in one micro-batch."""
        batch = self.data.batch(groups, [])
        return list(torch.split(quiet_logps(self.network, batch, temperature=self.rollout.temperature), batch.lengths))

    def of_ranks(self, values: Tensor) -> Tensor:
        """Values of each rank, [R, ...], on the CPU, where this rank's are."""
        if self.trainer.world_size == 1:
            return values[None]
        gathered: Tensor = self.all_gather(values.to(self.device))  # type: ignore[assignment]
        return gathered.reshape(-1, *values.shape).cpu()

    def training_begins(self) -> None:
        """From here on the time of an optimizer step counts as training."""
        self._begun = time.perf_counter()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log means over all responses and tokens, of all ranks, since the last time."""
        super().on_before_optimizer_step(optimizer)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = time.perf_counter() - self._begun
            self.log_values("train", self.train_means.compute())
            self.log_values("train", {"rollout_seconds": self._rollout_seconds, "training_seconds": seconds})
            self.train_means.reset()
            self._rollout_seconds = 0.0


def answer_of(completion: Completion) -> Answer:
    """A response as the data module keeps it."""
    return Answer(
        token_ids=completion.token_ids,
        text=completion.text,
        truncated=completion.finish_reason == "length",
        sampler_logps=completion.logps,
    )
