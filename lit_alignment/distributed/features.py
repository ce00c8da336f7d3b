"""What a strategy says of itself, so that no module or callback has to ask which strategy runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from lit_alignment.distributed.sharding import Cast
from lit_alignment.errors import ConfigError
from lit_alignment.models.collectives import SequenceGroup
from lit_alignment.models.quantization import Quantization

# sharded_loading: a process can read its own shards of the weights from their files, and hold no more than these.
# whole_weights:   a process has whole weights, and can use a copy of a network by itself.
# gathering:       `gathered` lets a process compute with whole weights for a while.
# gradients:       before an optimizer step the parameters hold the gradients that it takes.
# frozen_weights:  a checkpoint can hold weights that do not train.
# skipped_steps:   a step whose loss is non-finite can be left out.
# quantization:    frozen weights can be held in 4 or 8 bits.
Feature = Literal[
    "sharded_loading", "whole_weights", "gathering", "gradients", "frozen_weights", "skipped_steps", "quantization"
]


class StrategyFeatures:
    """The answers of one process and of DDP; a strategy of ours derives from this and gives its own.

    Attributes:
        sequence: The ranks that share each row of training and validation, if any do.
        identical_ranks: Ranks that compute the same loss of the same batch.
    """

    sequence: SequenceGroup | None = None
    identical_ranks = 1

    def supports(self, feature: Feature) -> bool:
        """Whether the strategy has a feature."""
        return feature != "sharded_loading"

    def check_run(self, method: str, stage: str, shares_batches: bool, non_finite: str) -> None:
        """Refuse what the strategy cannot do, before anything is loaded.

        Args:
            method: Name of the module's class.
            stage: `fit`, `validate`, `test` or `predict`.
            shares_batches: Whether ranks can compute one batch of the method together.
            non_finite: What the optimizer does about a non-finite loss.

        Raises:
            ConfigError: Naming the setting.
        """
        return

    def shard(self, module: nn.Module, layered: bool = False, cast: Cast | None = None) -> None:
        """Split a network over devices, if the strategy does that.

        Args:
            module: The network.
            layered: Whether it is a language model, to be split layer by layer.
            cast: Precision of its files, and of the model, if these differ.
        """
        return

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Let every rank call the networks of a module as often, and with as many tokens, as it likes."""
        yield

    def gradient_norm(self) -> float | None:
        """Norm of the last optimizer step's gradients before clipping, where only the strategy knows it."""
        return None


ONE_PROCESS = StrategyFeatures()


def features_of(strategy: Strategy) -> StrategyFeatures:
    """What a strategy says of itself.

    Raises:
        ConfigError: If it is one of Lightning's in whose place ours is needed.
    """
    if isinstance(strategy, StrategyFeatures):
        return strategy
    if isinstance(strategy, ModelParallelStrategy | FSDPStrategy | LightningDeepSpeedStrategy):
        ours = "DeepSpeedStrategy" if isinstance(strategy, LightningDeepSpeedStrategy) else "FSDP2Strategy"
        raise ConfigError(f"trainer.strategy: use lit_alignment.{ours} in place of {type(strategy).__name__}.")
    return ONE_PROCESS


def check_quantization(features: StrategyFeatures, quantization: Quantization) -> None:
    """Refuse weights in 4 or 8 bits where a strategy would split them: they would lose how they were quantised.

    Raises:
        ConfigError: Naming the setting.
    """
    if quantization != "none" and not features.supports("quantization"):
        raise ConfigError(
            f"model.backbone.quantization: {quantization} weights cannot be split over devices, as this "
            f"{type(features).__name__} would. Set trainer.strategy: ddp, or quantization: none."
        )
