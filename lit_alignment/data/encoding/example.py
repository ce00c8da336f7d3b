"""What the encoder makes of a record: an example to train on, a prompt to answer, or the reason for neither."""

from dataclasses import dataclass, field

from lit_alignment.data.encoding.messages import IGNORE_INDEX, Message


@dataclass
class Example:
    """One encoded conversation.

    Args:
        input_ids: Token ids, [T].
        labels: The same ids where the loss applies, else IGNORE_INDEX, [T]; aligned with `input_ids`.
        weights: Weight of each label in the loss, [T].
        end_of_turn: Ids of the text that closes a response.
        media: Files that placeholders among the ids stand for, by modality.
        notes: How often something happened that is worth a line in the report.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    end_of_turn: list[int] = field(default_factory=list)
    media: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def num_trained(self) -> int:
        """Labels that count: the first token has no prediction, so its label never does."""
        trained = len(self.labels) - self.labels.count(IGNORE_INDEX)
        if len(self.weights) - self.weights.count(0.0) == trained and self.labels[:1] == [IGNORE_INDEX]:
            return trained  # each label has a weight
        return sum(label != IGNORE_INDEX and w > 0 for label, w in zip(self.labels[1:], self.weights[1:], strict=True))


@dataclass
class Prompt:
    """What a model is asked: ids up to where its response begins.

    Args:
        input_ids: Token ids, [T].
        messages: The messages behind them.
        reference: The response that the record has at this position, if any.
        media: Files that placeholders among the ids stand for, by modality.
    """

    input_ids: list[int]
    messages: list[Message]
    reference: str | None
    media: dict[str, list[str]] = field(default_factory=dict)


HISTORY_DIFFERS = "history_differs"
# What an example's notes count.
SPLIT, STOP_ADDED, UNCLOSED = "tokens split where a prompt ends", "end of turn added", "turns without an end"
CONTROL_TOKENS = "control tokens in texts"


class Dropped(Exception):
    """A record that does not become an example, with the reason that the drop report counts."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.reason, self.detail = reason, detail
