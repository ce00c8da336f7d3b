"""What decides the ids that a tokenizer gives, and how many there are."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from lit_alignment.data.sources.cache import fingerprint


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
