"""Rewards of conversations by a model that somebody else has trained."""

from collections.abc import Sequence

from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from lit_alignment.data.encoding.messages import Message
from lit_alignment.errors import ConfigError
from lit_alignment.generation.engine import Engine, Request
from lit_alignment.generation.transformers_engine import TransformersEngine
from lit_alignment.models.loading import BackboneConfig, from_pretrained


class RewardScorer:
    """Raw scores of conversations from a sequence classifier with one label.

    Args:
        path: Its folder, or a name on the hub.

    Raises:
        ConfigError: If it cannot be loaded, has no chat template, or has not one label.
    """

    def __init__(self, path: str) -> None:
        """Load it."""
        plain = BackboneConfig(path)
        self.tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, plain, path)
        self.model = from_pretrained(AutoModelForSequenceClassification, plain, path).eval()
        if self.tokenizer.chat_template is None:
            raise ConfigError(f"{path}: this reward model has no chat template. Save one with its tokenizer.")
        if self.model.config.num_labels != 1:
            raise ConfigError(f"{path}: a reward model has one label, this one {self.model.config.num_labels}.")
        self.engine: Engine = TransformersEngine(self.model, self.tokenizer)

    def __call__(self, conversations: Sequence[list[Message]]) -> list[float]:
        """The score of each conversation, at its last token."""
        plain = [[{key: message[key] for key in ("role", "content")} for message in own] for own in conversations]
        ids = [self.tokenizer.apply_chat_template(own, tokenize=True, return_dict=False) for own in plain]
        results = self.engine.generate([Request(own) for own in ids])
        return [float(result[0]) for result in results if isinstance(result, Tensor)]
