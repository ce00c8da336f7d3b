"""The text of a completion while it is generated."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lit_alignment.generation.engine import Request, cut_completion

INCOMPLETE = "\ufffd"  # what bytes that are no whole character yet are decoded to


class TextPieces(BaseStreamer):  # type: ignore[misc]
    """Hands on the text of one completion in pieces that nothing which follows can change.

    A piece ends with a whole character, and before what may be the beginning of a stop string. All pieces together are
    the completion's text.

    Args:
        tokenizer: Of the model.
        request: What was asked.
        on_text: Gets each piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, request: Request, on_text: Callable[[str], None]) -> None:
        """Nothing is generated."""
        self.tokenizer, self.request, self.on_text = tokenizer, request, on_text
        self._ids: list[int] | None = None  # None before the prompt, which comes first
        self._given = ""

    def put(self, value: Tensor) -> Any:
        """Take the prompt, [1, T], and then one token after the other, [1]."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = cut_completion(self._ids, self.request, self.tokenizer).text
        if not text.endswith(INCOMPLETE):
            self._give(text[: len(text) - self._held(text)])

    def end(self) -> None:
        """Wait for `finish`, which knows where the completion was cut."""

    def finish(self, text: str) -> None:
        """Hand on the rest of the whole text."""
        self._give(text)

    def _held(self, text: str) -> int:
        """Characters at the end that may begin a stop string."""
        begun = (
            length
            for string in self.request.stop_strings
            for length in range(1, len(string))
            if text.endswith(string[:length])
        )
        return max(begun, default=0)

    def _give(self, text: str) -> None:
        if len(text) > len(self._given) and text.startswith(self._given):
            piece, self._given = text[len(self._given) :], text
            self.on_text(piece)
