"""From text to token ids: with places that no token may reach over, and with what decides the ids."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lit_alignment.data.sources.cache import fingerprint

REMEMBERED = 4096  # headers whose ids are kept


@dataclass
class Tokens:
    """A tokenised text.

    Args:
        ids: Token ids, [T].
        starts: Where in the text each token begins, [T].
        ends: One past where it ends, [T].
        splits: Number of places where a token of the whole text was split.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    splits: int = 0


class TextTokenizer:
    """Tokenises text so that what stands before a boundary has the ids that it has alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find the special tokens, of which one may stand before a text that goes on from another."""
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_padding()
        self.backend.no_truncation()
        added = tokenizer.added_tokens_decoder
        self.added = frozenset(added)
        self.bos = tokenizer.bos_token_id
        usable = {index for index, token in added.items() if token.special and not (token.lstrip or token.rstrip)}
        first = next(
            (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, *sorted(usable)) if i in usable), None
        )
        self.anchor = "" if first is None else str(added[first].content)
        self._alone: dict[str, list[int]] = {}

    def __call__(self, text: str, boundaries: Sequence[int]) -> Tokens:
        """The ids of a text, tokenised as a whole unless what stands before a boundary would have other ids alone.

        Args:
            text: With all its special tokens.
            boundaries: Positions in it, in order.
        """
        tokens = self._tokens(text, 0)
        cuts = [each for each in boundaries if 0 < each < len(text) and self._differs(text, tokens, each)]
        if cuts:
            parts = [
                self._tokens(text[begin:end], begin) for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
            ]
            tokens = Tokens(
                [index for part in parts for index in part.ids],
                [start for part in parts for start in part.starts],
                [end for part in parts for end in part.ends],
                len(cuts),
            )
        while self.bos is not None and tokens.ids[:2] == [self.bos, self.bos]:  # some templates write two
            tokens = Tokens(tokens.ids[1:], tokens.starts[1:], tokens.ends[1:], tokens.splits)
        return tokens

    def _tokens(self, text: str, begin: int) -> Tokens:
        """Ids of a part of a text from a position on, where it gets nothing of what texts begin with."""
        if begin and self.anchor:
            encoded = self.backend.encode(self.anchor + text, add_special_tokens=False)
            ids, offsets, shift = encoded.ids[1:], encoded.offsets[1:], begin - len(self.anchor)
        else:
            encoded = self.backend.encode(text, add_special_tokens=False)
            ids, offsets, shift = encoded.ids, encoded.offsets, begin
        return Tokens(ids, [start + shift for start, _ in offsets], [end + shift for _, end in offsets])

    def _differs(self, text: str, tokens: Tokens, boundary: int) -> bool:
        """Whether the text before a boundary has other ids alone."""
        behind = bisect_left(tokens.starts, boundary)
        if behind and tokens.ends[behind - 1] > boundary:
            return True
        ids = tokens.ids
        if behind in (0, len(ids)) or ids[behind] in self.added or ids[behind - 1] in self.added:
            return False  # the text is split at added tokens before anything else
        first = behind - 1
        while first > 0 and ids[first] not in self.added:
            first -= 1
        before = text[tokens.starts[first] : boundary]
        if before not in self._alone:
            if len(self._alone) >= REMEMBERED:
                self._alone.clear()
            self._alone[before] = self.backend.encode(before, add_special_tokens=False).ids
        return ids[first:behind] != self._alone[before]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides ids: vocabulary, merges, special tokens, normalisation."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return fingerprint(backend.to_str(), tokenizer.special_tokens_map)


def num_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    """Tokens of all texts together, without special ones."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return sum(map(len, ids))
