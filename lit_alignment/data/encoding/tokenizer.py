"""From text to token ids: with places that no token may reach over, and with what decides the ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from lit_alignment.data.sources.cache import fingerprint

REMEMBERED = 4096  # headers whose ids are kept


@dataclass(frozen=True)
class Part:
    """A stretch of text that was tokenised by itself.

    Args:
        encoding: Its tokens, behind those that were put in front of it.
        hidden: Number of these.
        origin: Where in the text the first character of the encoding would stand.
    """

    encoding: Encoding
    hidden: int
    origin: int

    def begin(self, position: int) -> int:
        """The first of its tokens that begins at a position of the text or behind it."""
        token = self.encoding.char_to_token(position - self.origin)
        if token is None:  # white space may belong to no token
            number = len(self.encoding) - self.hidden
            length = self.place(number - 1)[1] if number else 0
            later = (self.encoding.char_to_token(place - self.origin) for place in range(position + 1, length))
            token = next((each for each in later if each is not None), None)
            if token is None:
                return number
        return token - self.hidden + int(self.place(token - self.hidden)[0] < position)

    def place(self, token: int) -> tuple[int, int]:
        """Where in the text one of its tokens begins and ends."""
        begin, end = self.encoding.token_to_chars(token + self.hidden) or (0, 0)
        return begin + self.origin, end + self.origin


class Tokens:
    """The tokens of a text, and where they stand in it.

    Offsets are asked for where they are needed: a list of all would take a fifth as long as the tokens themselves.

    Args:
        parts: Stretches of the text, in order.
        skipped: Tokens at the beginning that are left out.
    """

    def __init__(self, parts: list[Part], skipped: int = 0) -> None:
        """Put the ids together."""
        self.parts, self.skipped = parts, skipped
        self.ids: list[int] = parts[0].encoding.ids if len(parts) == 1 else []
        if len(parts) > 1:
            self.ids = list(chain.from_iterable(part.encoding.ids[part.hidden :] for part in parts))
        self.ids = self.ids[skipped:] if skipped else self.ids
        self._begins: dict[int, int] = {}
        self.splits = len(parts) - 1

    def begin(self, position: int) -> int:
        """The first token that begins at a position of the text or behind it, or the number of tokens."""
        if position not in self._begins:
            self._begins[position] = self._begin(position)
        return self._begins[position]

    def _begin(self, position: int) -> int:
        number = -self.skipped
        for part, later in zip(self.parts, [*self.parts[1:], None], strict=True):
            if later is None or position < later.place(0)[0]:
                return max(0, number + part.begin(position))
            number += len(part.encoding) - part.hidden
        return number

    def end(self, position: int) -> int:
        """One past the last token that ends at a position of the text or before it."""
        token = self.begin(position)
        while token > 0 and self.place(token - 1)[1] > position:
            token -= 1
        return token

    def place(self, token: int) -> tuple[int, int]:
        """Where in the text a token begins and ends."""
        token += self.skipped
        for part in self.parts:
            number = len(part.encoding) - part.hidden
            if token < number:
                return part.place(token)
            token -= number
        raise IndexError(token)


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
        tokens = Tokens([self._part(text, 0)] if text else [])
        cuts = [each for each in boundaries if 0 < each < len(text) and self._differs(text, tokens, each)]
        if cuts:
            ends = zip([0, *cuts], [*cuts, len(text)], strict=True)
            tokens = Tokens([self._part(text[begin:end], begin) for begin, end in ends])
        doubled = 0
        while self.bos is not None and tokens.ids[doubled : doubled + 2] == [self.bos, self.bos]:
            doubled += 1  # some templates write two
        return Tokens(tokens.parts, doubled) if doubled else tokens

    def _part(self, text: str, begin: int) -> Part:
        """The tokens of a text that stands at a position, where it gets nothing of what whole texts begin with."""
        if begin and self.anchor:
            encoding = self.backend.encode(self.anchor + text, add_special_tokens=False)
            return Part(encoding, 1, begin - len(self.anchor))
        return Part(self.backend.encode(text, add_special_tokens=False), 0, begin)

    def _differs(self, text: str, tokens: Tokens, boundary: int) -> bool:
        """Whether the text before a boundary has other ids alone."""
        behind = tokens.begin(boundary)
        if behind and tokens.place(behind - 1)[1] > boundary:
            return True
        ids = tokens.ids
        if behind in (0, len(ids)) or ids[behind] in self.added or ids[behind - 1] in self.added:
            return False  # the text is split at added tokens before anything else
        first = behind - 1
        while first > 0 and ids[first] not in self.added:
            first -= 1
        before = text[tokens.place(first)[0] : boundary]
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


def tokenizer_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """In what an id means another token to two tokenizers, in words; None if they agree. Padding does not count."""
    ids, others = one.get_vocab(), other.get_vocab()
    if ids != others:
        differing = sorted(ids.items() ^ others.items(), key=lambda item: item[1])
        token = differing[0][0]
        return f"{len(dict(differing))} tokens differ: '{token}' is {ids.get(token)} here and {others.get(token)} there"
    roles = ("bos_token", "eos_token")
    role = next((role for role in roles if getattr(one, role) != getattr(other, role)), None)
    return None if role is None else f"{role} is {getattr(one, role)!r} here and {getattr(other, role)!r} there"


def num_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> int:
    """Tokens of all texts together, without special ones."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return sum(map(len, ids))
