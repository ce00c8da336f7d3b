"""Special and new tokens: put into the tokenizer, and given rows in the model's embeddings.

V vocabulary, D width
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from lit_alignment.errors import ConfigError
from lit_alignment.moved import renamed

ROLES = ("bos", "eos", "pad", "unk", "sep")


@dataclass(frozen=True)
class NewTokenConfig:
    """How the embedding rows of a new token begin.

    Args:
        init: `copy` the rows of one token, the mean of the rows of a `text`, the `mean` of all rows, or a draw from
            the `normal` distribution fitted to all rows (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html).
        of: The token to copy, or the text.
    """

    init: Literal["copy", "text", "mean", "normal"] = "mean"
    of: str | None = None

    def __post_init__(self) -> None:
        """Refuse an initialisation without its subject."""
        if (self.of is None) == (self.init in ("copy", "text")):
            raise ConfigError(
                f"tokens.new: init '{self.init}' {'needs' if self.of is None else 'takes no'} 'of'. "
                "Write {init: copy, of: TOKEN}, {init: text, of: SOME WORDS}, {init: mean} or {init: normal}."
            )


@dataclass(frozen=True)
class TokensConfig:
    """Tokens that the tokenizer is to have.

    Args:
        bos: Set where the tokenizer has none; likewise `eos`, `pad`, `unk`, `sep`. One that it has stays.
        eos: End of sequence.
        pad: Padding; EOS serves where there is none.
        unk: Unknown.
        sep: Separator.
        new: Further tokens, each with how its rows begin. One that the tokenizer has already keeps its rows.
        pad_vocabulary_to: Make the number of embedding rows a multiple of this, for kernels that like it.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    sep: str | None = None
    new: dict[str, NewTokenConfig] = field(default_factory=dict)
    pad_vocabulary_to: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be a token."""
        if any(not token for token in self.new):
            raise ConfigError("tokens.new holds an empty token.")
        if self.pad_vocabulary_to < 1:
            raise ConfigError(f"tokens.pad_vocabulary_to is {self.pad_vocabulary_to}; use 1 or more.")


def add_tokens(tokenizer: PreTrainedTokenizerBase, config: TokensConfig) -> dict[str, int]:
    """Give the tokenizer its tokens; what it has already is left alone, so doing it twice changes nothing.

    Returns:
        Ids of the tokens that were not in the vocabulary, in order.
    """
    before = tokenizer.get_vocab()
    for role in ROLES:
        token = getattr(config, role)
        if token is not None and getattr(tokenizer, f"{role}_token") is None:
            tokenizer.add_special_tokens({f"{role}_token": token})
    fresh = [AddedToken(token, special=True, normalized=False) for token in config.new if token not in before]
    if fresh:
        tokenizer.add_tokens(fresh, special_tokens=True)
    added = {token: index for token, index in tokenizer.get_vocab().items() if token not in before}
    return dict(sorted(added.items(), key=lambda item: item[1]))


@torch.no_grad()
def fit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, added: dict[str, int], config: TokensConfig
) -> None:
    """Make room for all of the tokenizer's tokens, and initialise the rows of those that were added.

    Input and output embeddings are treated alike, tied or not; rows of padding are the mean of all. The ids of
    special tokens are written into the model's configuration where it lacks them.

    Args:
        model: Any transformers language model, before adapters and before it is sharded.
        tokenizer: Its tokenizer, with the new tokens.
        added: Ids of the new tokens.
        config: How their rows begin.

    Raises:
        ConfigError: If a token to copy is unknown, or a text has no tokens.
    """
    _set_ids(model, tokenizer)
    old_rows = model.get_input_embeddings().weight.shape[0]
    known = min(old_rows, len(tokenizer) - len(added))
    multiple = config.pad_vocabulary_to
    rows = -(-max(len(tokenizer), old_rows) // multiple) * multiple
    if rows > old_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    elif not added:
        return
    inits = {token: config.new.get(token, NewTokenConfig()) for token in added}
    for weight in _tables(model):
        table = weight[:known].float()
        mean = table.mean(0)
        weight[max(old_rows, known) :] = mean.to(weight.dtype)
        for token, index in added.items():
            weight[index] = _row(table, mean, token, inits[token], tokenizer, added).to(weight.dtype)


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """What has a row a token: input embedding, output embedding unless tied, and the output's bias as [V, 1]."""
    tables = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if isinstance(output, nn.Module):
        if output.weight is not tables[0]:
            tables.append(output.weight)
        if isinstance(output, nn.Linear) and output.bias is not None:
            tables.append(output.bias[:, None])
    return tables


def _row(
    table: Tensor,
    mean: Tensor,
    token: str,
    how: NewTokenConfig,
    tokenizer: PreTrainedTokenizerBase,
    added: dict[str, int],
) -> Tensor:
    """The first value of a token's row, [D], from the known rows [V, D]."""
    match how.init:
        case "copy":
            index = tokenizer.get_vocab().get(str(how.of))
            if index is None or how.of in added:
                raise ConfigError(f"tokens.new '{token}': the token to copy, '{how.of}', is not in the vocabulary.")
            return table[index]
        case "text":
            ids = [i for i in tokenizer(how.of, add_special_tokens=False)["input_ids"] if i < len(table)]
            if not ids:
                raise ConfigError(f"tokens.new '{token}': the text {how.of!r} has no known token.")
            return table[ids].mean(0)
        case "mean":
            return mean
        case "normal":
            # A weighted sum of the centred rows has exactly their covariance; no [D, D] matrix is needed.
            seed = int.from_bytes(hashlib.sha256(token.encode()).digest()[:7], "little")
            noise = torch.randn(len(table), generator=torch.Generator().manual_seed(seed)).to(table)
            drawn: Tensor = mean + (noise @ (table - mean)) / len(table) ** 0.5
            return drawn


def _set_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config = model.config.get_text_config()
    for role in ("bos", "eos", "pad"):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None and config.to_dict().get(f"{role}_token_id") is None:
            setattr(config, f"{role}_token_id", index)
    config.pad_token_id = tokenizer.pad_token_id


def vocabulary_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str:
    """What keeps weights trained with `theirs` from being used with `ours`, or "" if nothing does.

    Named are tokens that ours lacks and tokens that stand at another id.
    """
    mine, other = ours.get_vocab(), theirs.get_vocab()
    missing = sorted((token for token in other if token not in mine), key=other.__getitem__)
    moved = sorted((t for t, i in other.items() if t in mine and mine[t] != i), key=other.__getitem__)
    parts = []
    if missing:
        parts.append(f"it lacks {_named(missing)}")
    if moved:
        parts.append(f"{_named(moved)} stand at other ids")
    return "; ".join(parts)


def _named(tokens: list[str], shown: int = 8) -> str:
    more = f" and {len(tokens) - shown} more" if len(tokens) > shown else ""
    return ", ".join(f"'{token}'" for token in tokens[:shown]) + more


def __getattr__(name: str) -> Any:
    return renamed(__name__, name)
