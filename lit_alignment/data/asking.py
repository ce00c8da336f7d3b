"""What a loaded model is asked, without files: conversations as the items that predict makes of records."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_alignment.data.conversation import ConversationDataModule
from lit_alignment.data.encoding.messages import Message
from lit_alignment.data.encoding.rows import RowEncoder
from lit_alignment.data.sources.records import SourceConfig
from lit_alignment.errors import ConfigError

# A text is a user's message; a mapping is a whole record, with tools or images beside its messages.
Conversation = str | Sequence[Message] | Mapping[str, Any]

ASKED = SourceConfig(path=".", name="asked")  # relative paths of images begin where the process runs
REASONS = {
    "nothing_to_answer": "nothing in it is to be answered. Give a message of a user",
    "no_question": "no message of a user is in it. Give one",
    "too_long": "it is too long",
}


class PromptTooLongError(ConfigError):
    """A conversation has no room in the model's positions.

    Args:
        where: Which one.
        length: Its tokens.
        positions: The model's.
    """

    def __init__(self, where: str, length: int, positions: int) -> None:
        """Compose the message."""
        self.length, self.positions = length, positions
        super().__init__(f"{where}: it has {length} tokens, and the model {positions} positions. Shorten it.")


def as_record(conversation: Conversation) -> dict[str, Any]:
    """A conversation in the form of a record."""
    if isinstance(conversation, str):
        return {"messages": [{"role": "user", "content": conversation}]}
    return dict(conversation) if isinstance(conversation, Mapping) else {"messages": list(conversation)}


def asked_items(data: ConversationDataModule, conversations: Sequence[Conversation], longest: int | None) -> list[Any]:
    """The items of `predict_step`, one for each conversation, none of which is shortened.

    Args:
        data: Encodes them.
        conversations: What is asked.
        longest: Tokens that the model has positions for; None for any number.

    Raises:
        RecordError: If one is malformed.
        ConfigError: If one cannot be asked.
        PromptTooLongError: If one leaves no position for a response.
    """
    if isinstance(conversations, str | Mapping):
        raise ConfigError(
            "give a list of conversations, each a text, a list of messages, or a record; not a single one."
        )
    rows = RowEncoder(lambda source: data.read_prompt, data.predict_row, data.predict_features)
    items = []
    for number, conversation in enumerate(conversations):
        where = f"conversation {number + 1}"
        row = rows.row(data.read_prompt(as_record(conversation), where, number), ASKED)
        if row["dropped"]:
            raise ConfigError(f"{where}: {row['detail'] or REASONS.get(row['dropped'], row['dropped'])}.")
        if longest is not None and row["length"] >= longest:
            raise PromptTooLongError(where, row["length"], longest)
        items.append(data.predict_item(row, number))
    return items
