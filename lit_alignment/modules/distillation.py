"""Distillation: a student's next-token distributions become a teacher's, on the student's responses or given ones.

N trained tokens
"""

from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torchmetrics import Metric

from lit_alignment.checkpoints.saved import Saved
from lit_alignment.data.base import AlignmentDataModule, Split, datamodule_as, datamodule_of
from lit_alignment.data.distillation import DistillationDataModule
from lit_alignment.data.encoding.tokenizer import tokenizer_difference
from lit_alignment.data.rollout import Group, RolloutBatch
from lit_alignment.errors import ConfigError, present
from lit_alignment.generation.settings import DecodingConfig
from lit_alignment.hooks import Stage
from lit_alignment.losses.distillation_config import DistillationConfig
from lit_alignment.metrics import TokenMean
from lit_alignment.metrics.named import NamedMeans
from lit_alignment.models.adapters import AdapterConfig
from lit_alignment.models.head import head_divergence
from lit_alignment.models.loading import BackboneConfig, load_network, load_tokenizer
from lit_alignment.models.logprobs import hidden_at_targets
from lit_alignment.models.tokens import TokensConfig
from lit_alignment.modules.rollout import RolloutModule
from lit_alignment.optimization import OptimizerConfig
from lit_alignment.rollout.config import RolloutConfig
from lit_alignment.rollout.samplers import Sampler, TransformersSampler
from lit_alignment.training.checkpointed import model_name

ROLLOUT = RolloutConfig(num_responses=1)
KL = DistillationConfig(beta=0.0)


class DistillationModule(RolloutModule):
    """A student that learns a teacher's distribution at each token of its own responses, or of given ones.

    At each optimizer step the student answers `on_policy_share` of the prompts with the weights of then; the others
    train on their records' own responses.

    loss of an optimizer step = sum of the trained tokens' divergences / number of trained tokens, both over all
    micro-batches of the accumulation window and all ranks. No gradient passes through the sampling.

    Args:
        backbone: The student.
        teacher: The model to learn from, frozen, with the student's tokenizer.
        peft: New adapters from the peft library; without these and `adapter` all weights train.
        adapter: An existing adapter of the student, frozen or to be trained further.
        teacher_adapter: An existing adapter of the teacher.
        tokens: Special and new tokens; the teacher has to have new ones too.
        optimizer: Optimizer and schedule.
        divergence: What is minimised.
        on_policy_share: Share of a step's prompts that the student answers, from 0 to 1.
        rollout: How it does, by default once to each prompt.
        engine: What samples; transformers' own generate by default.
        generation: Decoding configurations of `predict`, by name.

    Source: Agarwal et al. 2023 (GKD, arXiv:2306.13649), which draws the kind of response for each batch, not prompt.
    """

    title = "distillation"
    data_classes: tuple[type[AlignmentDataModule], ...] = (DistillationDataModule,)
    beside = "the teacher's weights"
    progress_bar = ("loss", "kl")
    charts = (("loss",), ("kl",), ("length",), ("truncated",))

    def __init__(
        self,
        backbone: BackboneConfig,
        teacher: BackboneConfig,
        peft: PeftConfig | None = None,
        adapter: AdapterConfig | None = None,
        teacher_adapter: AdapterConfig | None = None,
        tokens: TokensConfig = TokensConfig(),  # noqa: B008 - frozen
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        divergence: DistillationConfig = DistillationConfig(),  # noqa: B008 - frozen
        on_policy_share: float = 1.0,
        rollout: RolloutConfig = ROLLOUT,
        engine: Sampler | None = None,
        generation: dict[str, DecodingConfig] | None = None,
    ) -> None:
        """Compare the tokenizers; the weights come in `configure_model`."""
        super().__init__(backbone, peft, adapter, tokens, optimizer, generation)
        _check(on_policy_share, rollout, engine)
        difference = tokenizer_difference(self.tokenizer, load_tokenizer(teacher, TokensConfig())[0])
        if difference is not None:
            raise ConfigError(
                f"model.teacher: {teacher.path} has another tokenizer than {backbone.path} ({difference}), so its "
                "distributions are over other tokens. Choose a teacher of the student's family; if both know the same "
                "ids, set model.backbone.tokenizer to the teacher's path."
            )
        if teacher_adapter is not None and teacher_adapter.trainable:
            raise ConfigError("model.teacher_adapter: a teacher does not train. Set its trainable to false.")
        self.teacher, self.teacher_adapter = teacher, teacher_adapter
        self.divergence, self.on_policy_share, self.rollout = divergence, on_policy_share, rollout
        self.sampler = TransformersSampler() if engine is None else engine
        self.teacher_model: nn.Module | None = None
        self.train_means = NamedMeans(["length", "truncated"])

    @classmethod
    def arguments_of(cls, saved: Saved) -> dict[str, Any]:
        """In the place of the teacher, who teaches no more, the student's own base, which is not loaded again."""
        return {**super().arguments_of(saved), "teacher": saved.backbone}

    @property
    def data(self) -> DistillationDataModule:
        """The data module.

        Raises:
            ConfigError: If it is another method's.
        """
        return datamodule_as(DistillationDataModule, self.trainer)

    @property
    def samples(self) -> bool:
        """Whether the student answers any prompt."""
        return self.on_policy_share > 0

    def setup(self, stage: str) -> None:
        """Tell the data module which share of the prompts is answered."""
        super().setup(stage)
        if stage == "predict":
            return
        self.data.on_policy_share = self.on_policy_share
        needed: list[Split] = ["val", "test"] if self.on_policy_share == 1 else ["train", "val", "test"]
        for split in needed:
            if split in self.data.examples:
                self.data.require_responses(split)

    def method_settings(self) -> dict[str, Any]:
        """The teacher, and what is minimised on which responses."""
        teacher = model_name(self.teacher.path)
        return {"teacher": teacher, "beta": self.divergence.beta, "on_policy_share": self.on_policy_share}

    # Teacher.

    def load_extra_networks(self, device_type: str = "cpu") -> None:
        """Load the teacher, where there is a loss."""
        if self._trainer is None or self.trainer.state.fn not in ("fit", "validate", "test"):
            return
        data = datamodule_of(self.trainer)
        teacher = load_network(
            self.teacher,
            self.tokenizer,
            adapter=self.teacher_adapter,
            packing=data.packing,
            shared_prompts=data.share_prompts,
            device_type=device_type,
        )
        self.teacher_model = teacher.requires_grad_(False).eval()

    def extra_networks(self) -> dict[str, nn.Module]:
        """The teacher."""
        return {} if self.teacher_model is None else {"the teacher": self.teacher_model}

    # Rollouts.

    def weigh(self, groups: list[Group]) -> float:
        """Number of trained tokens of an optimizer step, on all ranks; records' own count by their weights.

        Args:
            groups: This rank's.
        """
        answers = [answer for group in groups for answer in group.answers]
        sampled = [answer for answer in answers if answer.weights is None]
        lengths = [len(answer.token_ids) for answer in sampled]
        values = {"length": lengths, "truncated": [answer.truncated for answer in sampled]}
        self.train_means.update({name: torch.tensor(own, device=self.device) for name, own in values.items()})
        weight = sum(answer.weight for answer in answers)
        weights: list[float] = self.of_ranks(torch.tensor(weight, dtype=torch.float64)).tolist()
        self.training_begins()
        return sum(weights)

    # Steps and metrics.

    def stage_metrics(self) -> dict[str, Metric]:
        """Means over the trained tokens of given responses; `kl` is KL(teacher || student) at temperature 1."""
        return {"loss": TokenMean(), "kl": TokenMean()}

    def step(self, batch: RolloutBatch, stage: Stage) -> Tensor:
        """Summed divergence of the trained tokens."""
        teacher = present(self.teacher_model, "the teacher").eval()
        with torch.no_grad():
            teacher_hidden = hidden_at_targets(teacher, batch)
        hidden = hidden_at_targets(self.network, batch)

        def summed(config: DistillationConfig) -> Tensor:
            given = hidden, teacher_hidden, batch.weights, config.beta, config.temperature
            return head_divergence(self.network, teacher, *given)[0]

        loss = summed(self.divergence)
        if stage == "train":
            return self.step_loss(loss, batch.step)
        metrics, weight = self.metrics_of(stage), batch.weights.sum()
        metrics["loss"].update(loss, weight)
        metrics["kl"].update(loss if self.divergence == KL else summed(KL), weight)
        return loss


def _check(on_policy_share: float, rollout: RolloutConfig, engine: Sampler | None) -> None:
    """Refuse settings that have no effect, and a share that is none.

    Raises:
        ConfigError: Naming them.
    """
    if not 0 <= on_policy_share <= 1:
        raise ConfigError(f"model.on_policy_share is {on_policy_share}; use 0 to 1.")
    if rollout.max_redraws:
        raise ConfigError(
            f"model.rollout.max_redraws is {rollout.max_redraws}: without rewards nothing is drawn again. Remove it."
        )
    if on_policy_share == 0 and (engine is not None or rollout != ROLLOUT):
        raise ConfigError(
            "model.on_policy_share is 0, so nothing is sampled. Remove model.rollout and model.engine, or raise it."
        )
