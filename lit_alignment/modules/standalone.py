"""Modules without a Trainer: a trained model is loaded, and questions are encoded as in training."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_alignment.checkpoints.comparing import evaluating
from lit_alignment.checkpoints.restore import refuse_missing, saved_names
from lit_alignment.checkpoints.saved import Family, Saved, read_model
from lit_alignment.data.asking import Conversation, asked_items
from lit_alignment.data.base import AlignmentDataModule, datamodule_as
from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.models.head import base_model
from lit_alignment.models.loading import BackboneConfig
from lit_alignment.training.checkpointed import CheckpointedModule

Data = TypeVar("Data", bound=AlignmentDataModule)
WHAT: dict[Family, str] = {
    "text": "answers prompts: use SFTModule, or that of its method",
    "media": "answers prompts with images or sounds: use VLMModule",
    "passages": "answers with retrieved passages: use RAGModule",
    "scores": "scores conversations: use ClassificationModule or RewardModule",
    "vectors": "makes vectors of texts: use RetrieverModule",
}


class StandaloneModule(CheckpointedModule):
    """Loads a trained model, and asks it what the user gives.

    Attributes:
        family: What models of this kind do.
        data_classes: Data modules of the method; the first one encodes questions.
        tokenizer: The model's.
    """

    family: ClassVar[Family] = "text"
    data_classes: tuple[type[AlignmentDataModule], ...]
    tokenizer: PreTrainedTokenizerBase

    def __init__(self) -> None:
        """Nothing is known of how questions were encoded in training."""
        super().__init__()
        self._asking: dict[str, Any] = {}  # arguments of the data module
        self._own_data: AlignmentDataModule | None = None
        self._alone = False  # whether the weights were loaded without a Trainer
        self._loaded_from: str | Path | None = None  # a trained model

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        base: str | None = None,
        device: str | torch.device = "auto",
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Self:
        """A trained model that answers without a Trainer, with its tokenizer and template.

        Args:
            path: A checkpoint, whole or sharded; the folder of an adapter or an export; or a model's name.
            base: The base model, if it is not where the checkpoint or the adapter says.
            device: Where to load it; `auto` is a GPU if there is one. Its precision is that of training there.
            trust_remote_code: Run code that comes with the model.
            **settings: Further arguments of the module, such as `generation`.

        Raises:
            ConfigError: If there is no such model, or it is one of another kind.
            CheckpointError: If it is damaged, or is no model.
        """
        return cls.from_saved(read_model(path, base, trust_remote_code), path, device, **settings)

    @classmethod
    def from_saved(cls, saved: Saved, path: str | Path, device: str | torch.device = "auto", **settings: Any) -> Self:
        """The same from what was read.

        Args:
            saved: What stands in the source.
            path: The source, for messages.
            device: As of `from_checkpoint`.
            **settings: As of `from_checkpoint`.
        """
        if saved.family != cls.family:
            raise ConfigError(f"{path}: this model {WHAT[saved.family]}, not {cls.__name__}.")
        saved = replace(saved, backbone=_without_training(saved.backbone))
        module = cls(**(cls.arguments_of(saved) | settings))
        module._asking = cls.data_classes[0].read_asking_settings(saved.asking, path)
        if saved.chat_template is not None:
            module.tokenizer.chat_template = saved.chat_template
        device = _auto() if device == "auto" else torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device is {device}, and there is no CUDA GPU here. Use cpu, or auto.")
        module.load_alone(device)
        module.load_trained(saved, path)
        module._loaded_from = path
        return module

    @classmethod
    def arguments_of(cls, saved: Saved) -> dict[str, Any]:
        """Arguments of the constructor that follow from what a checkpoint says."""
        return {"backbone": saved.backbone, "peft": saved.peft, "adapter": saved.adapter, "tokens": saved.tokens}

    @abstractmethod
    def load_model(self, device_type: str = "cpu", packing: bool = False) -> nn.Module:
        """Load the weights, without a Trainer."""

    def load_alone(self, device: torch.device) -> None:
        """Load all networks, without a Trainer, and move them to a device."""
        self.load_model(device.type)
        self.load_extra_networks(device.type)
        self.to(device)
        self._alone = True

    def forget_loaded(self) -> None:
        """Have a training load weights that were loaded without it anew, by its own settings.

        Raises:
            ConfigError: If they are those of a trained model.
        """
        if self._loaded_from is not None:
            raise ConfigError(
                f"{self._loaded_from} was loaded to answer. To train on, make a new module, and give the checkpoint to "
                "the Trainer (fit(..., ckpt_path=...)), or an export of it as backbone."
            )
        if self._alone:
            self.model, self._alone = None, False

    def load_trained(self, saved: Saved, path: str | Path) -> None:
        """Take over a checkpoint's trained weights.

        Raises:
            CheckpointError: If one is missing, or does not fit.
        """
        if saved.whole:
            return
        trained = {"model": saved.trained, **saved.networks}
        state = {f"{network}.{name}": value for network, own in trained.items() for name, value in own.items()}
        refuse_missing(saved_names(self), state, "It may be damaged; use another one.")
        try:
            foreign = self.load_state_dict(state, strict=False).unexpected_keys
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: does not fit {saved.backbone.path} ({str(error).splitlines()[-1]})."
            ) from error
        if foreign:
            raise CheckpointError(f"{path}: its weight '{foreign[0]}' has no place in {saved.backbone.path}.")

    # Questions.

    def data_as(self, kind: type[Data]) -> Data:
        """The Trainer's data module; before there is a Trainer one without sources, that encodes as in training.

        Raises:
            ConfigError: If it is of another kind.
        """
        if self._trainer is not None:
            return datamodule_as(kind, self.trainer)
        if self._own_data is None:
            given = {"packing": False} | self._asking | self.data_arguments()
            self._own_data = self.data_classes[0](self.tokenizer, **given)
        if not isinstance(self._own_data, kind):
            raise ConfigError(f"{type(self).__name__} has no data module that is a {kind.__name__}.")
        return self._own_data

    def asked(self, conversations: Sequence[Conversation]) -> list[Any]:
        """Items of what is asked, none of which is shortened.

        Raises:
            ConfigError: If one cannot be asked, or has no room in the model's positions.
        """
        data = self.data_as(ConversationDataModule)  # type: ignore[type-abstract]
        return asked_items(data.whole(), conversations, self.num_positions)

    @property
    def num_positions(self) -> int | None:
        """Tokens that a prompt and its response have room for; None if nothing says so."""
        if self.model is None:
            return None
        found = base_model(self.model).config.get_text_config().to_dict().get("max_position_embeddings")
        return found if isinstance(found, int) else None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """The model loaded, without dropout and gradients, for a while.

        Raises:
            ConfigError: If this process holds shards of it only.
        """
        if self.model is None:
            self.load_alone(_auto())
        if self.is_sharded:
            raise ConfigError(
                f"the weights are sharded over processes. Load them whole: {type(self).__name__}.from_checkpoint(...)."
            )
        with evaluating(self), torch.no_grad():
            yield

    @property
    @abstractmethod
    def is_sharded(self) -> bool:
        """Whether this process holds shards of the weights only."""


def _without_training(backbone: BackboneConfig) -> BackboneConfig:
    """The same without what makes a training faster, or smaller."""
    return replace(backbone, compile=False, liger=False, gradient_checkpointing="none", activation_offload=False)


def _auto() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
