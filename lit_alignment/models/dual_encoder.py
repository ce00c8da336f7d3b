"""Text encoders that turn queries and passages into vectors whose inner products are scores.

B texts, T tokens, D width
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lit_alignment.errors import CheckpointError, ConfigError
from lit_alignment.losses.chunks import wide
from lit_alignment.models.attention import plain_rows
from lit_alignment.models.loading import BackboneConfig, from_pretrained
from lit_alignment.models.varlen import to_device

Pooling = Literal["mean", "cls", "last"]

DUAL = "dual"  # what modules call it, and so checkpoints


@dataclass(frozen=True)
class RetrieverConfig:
    """A text encoder, and how texts become vectors.

    Args:
        path: A local folder, a name on the hub, or one that `lit-alignment fetch` knows; encodes queries and passages.
        passage_path: Another encoder for passages, where the two were trained apart (DPR).
        revision: Branch, tag or commit on the hub.
        weights: `random` takes only the configuration from `path`, for tests.
        pooling: The vector is the mean over the tokens, the first token's (`cls`), or the last token's state.
        normalize: Scale vectors to length 1, so that scores are cosines.
        query_prefix: Put before each query; "query: " for e5.
        passage_prefix: Put before each passage; "passage: " for e5.
        passage_format: How title and text are written.
        query_max_length: Longest query in tokens; longer ones lose their beginning, where the dialogue is oldest.
        passage_max_length: Longest passage in tokens; longer ones lose their end.
        temperature: Scores are divided by it before the softmax; 0.01 fits cosines, 1 plain inner products.
        towers: `shared` encodes queries and passages with the same weights, `separate` with two copies that are
            trained apart.
    """

    path: str
    passage_path: str | None = None
    revision: str = "main"
    weights: Literal["pretrained", "random"] = "pretrained"
    pooling: Pooling = "mean"
    normalize: bool = True
    query_prefix: str = ""
    passage_prefix: str = ""
    passage_format: str = "{title} {text}"
    query_max_length: int = 256
    passage_max_length: int = 256
    temperature: float = 0.01
    towers: Literal["shared", "separate"] = "shared"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.temperature <= 0:
            raise ConfigError(f"retriever.temperature is {self.temperature}; use a number above 0.")
        if min(self.query_max_length, self.passage_max_length) < 3:
            raise ConfigError("retriever: query_max_length and passage_max_length must be 3 or more.")
        if self.passage_path is not None and self.towers == "shared":
            raise ConfigError("retriever.passage_path names a second encoder: set retriever.towers to separate.")

    def decides_passages(self) -> dict[str, Any]:
        """The settings that decide the embeddings of passages, besides the weights."""
        names = ("pooling", "normalize", "passage_prefix", "passage_format", "passage_max_length")
        return {"path": self.passage_path or self.path, **{name: getattr(self, name) for name in names}}


class DualEncoder(nn.Module):
    """The towers of a retriever, which may be one.

    Args:
        settings: How texts become vectors.
        tokenizer: Of both towers.
        query_tower: Encodes queries.
        passage_tower: Encodes passages; the same object if the towers are shared.
    """

    def __init__(
        self,
        settings: RetrieverConfig,
        tokenizer: PreTrainedTokenizerBase,
        query_tower: PreTrainedModel,
        passage_tower: PreTrainedModel,
    ) -> None:
        """Keep the parts."""
        super().__init__()
        self.settings, self.tokenizer = settings, tokenizer
        self.query_tower, self.passage_tower = query_tower, passage_tower

    @property
    def width(self) -> int:
        """D."""
        return int(self.query_tower.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the query tower is."""
        device: torch.device = self.query_tower.device
        return device

    def queries(self, texts: Sequence[str]) -> Tensor:
        """Vectors of queries, fp32, [B, D]."""
        settings = self.settings
        ids = self._ids(texts, settings.query_prefix, settings.query_max_length, keep_end=True)
        return self._vectors(self.query_tower, ids)

    def passages(self, texts: Sequence[str], tower: PreTrainedModel | None = None) -> Tensor:
        """Vectors of passages, which are formatted already, fp32, [B, D].

        Args:
            texts: The passages.
            tower: Encode with this one; a snapshot of the passage tower, for one.
        """
        settings = self.settings
        ids = self._ids(texts, settings.passage_prefix, settings.passage_max_length, keep_end=False)
        return self._vectors(tower or self.passage_tower, ids)

    def _ids(self, texts: Sequence[str], prefix: str, max_length: int, keep_end: bool) -> list[list[int]]:
        """Token ids; a long text loses its beginning or its end, never the prefix or special tokens."""
        tokenizer = self.tokenizer
        found: list[list[int]] = tokenizer([prefix + text for text in texts], verbose=False)["input_ids"]
        for row, ids in enumerate(found):
            if len(ids) <= max_length:
                continue
            start = len(tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else 0
            body = tokenizer(prefix + texts[row], add_special_tokens=False, verbose=False)["input_ids"]
            head, rest = body[:start], body[start:]
            room = max(1, max_length - tokenizer.num_special_tokens_to_add() - start)
            kept = head + (rest[-room:] if keep_end else rest[:room])
            found[row] = _special(tokenizer, kept)
        return found

    def _vectors(self, tower: PreTrainedModel, ids: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, ids))
        input_ids = torch.full((len(ids), width), int(self.tokenizer.pad_token_id or 0))
        mask = torch.zeros_like(input_ids)
        for row, own in enumerate(ids):
            input_ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
        device = next(tower.parameters()).device
        input_ids, mask = to_device(input_ids, device), to_device(mask, device)
        padded = any(len(own) < width for own in ids)
        with plain_rows():
            hidden = tower(input_ids=input_ids, attention_mask=mask if padded else None).last_hidden_state
        vectors = pool(wide(hidden), mask, self.settings.pooling)
        return nn.functional.normalize(vectors, dim=-1) if self.settings.normalize else vectors


def _special(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Ids with the tokens that the tokenizer puts around a text."""
    mark = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(mark)) if mark[i : i + len(plain)] == plain)
    return [*mark[:start], *ids, *mark[start + len(plain) :]]


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, [B, D], from the states of its tokens.

    Args:
        hidden: [B, T, D].
        mask: 1 on tokens, 0 on padding on the right, [B, T].
        pooling: Mean over the tokens, the first one's state, or the last one's.
    """
    match pooling:
        case "cls":
            return hidden[:, 0]
        case "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        case _:
            weights = mask.to(hidden.dtype)[..., None]
            return (hidden * weights).sum(1) / weights.sum(1)


def load_retriever(settings: RetrieverConfig) -> DualEncoder:
    """The towers, in fp32 and in training mode.

    Raises:
        ConfigError: If a model cannot be loaded, or has a head in place of hidden states.
    """
    query = _tower(settings, settings.path)
    if settings.towers == "shared":
        passage = query
    elif settings.passage_path is not None:
        passage = _tower(settings, settings.passage_path)
    else:
        passage = copy.deepcopy(query)
    if query.config.hidden_size != passage.config.hidden_size:
        raise ConfigError(
            f"retriever: {settings.path} makes vectors of {query.config.hidden_size} numbers and "
            f"{settings.passage_path} of {passage.config.hidden_size}; they cannot be compared."
        )
    tokenizer = from_pretrained(AutoTokenizer, _backbone(settings, settings.path), settings.path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DualEncoder(settings, tokenizer, query, passage)


def _backbone(settings: RetrieverConfig, path: str) -> BackboneConfig:
    return BackboneConfig(path, revision=settings.revision, weights=settings.weights)


def _tower(settings: RetrieverConfig, path: str) -> PreTrainedModel:
    backbone = _backbone(settings, path)
    if settings.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights in every command, or no index would fit them
            model = AutoModel.from_config(from_pretrained(AutoConfig, backbone, path), dtype=torch.float32)
    else:
        model = from_pretrained(AutoModel, backbone, path, dtype=torch.float32)
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Module):
        model.pooler = None  # BERT's own, which takes no part and would count as trained
    model.config.use_cache = False  # a decoder would keep keys and values of a text that nobody continues
    # Without dropout: a passage must have one vector, in training and in the index.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tower: PreTrainedModel = model
    return tower.train()


def weights_hash(tower: nn.Module) -> str:
    """A hash of the weights, by which an index tells the encoder that made it; of sharded ones all ranks must ask."""
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, DTensor):
            value = value.full_tensor()
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def load_towers(encoder: DualEncoder, trained: dict[str, Tensor]) -> None:
    """Take a checkpoint's trained weights of the towers; those that it lacks were frozen, and stay.

    Args:
        encoder: The loaded encoder.
        trained: Weights of a RetrieverModule, or of a RAGModule, by name.

    Raises:
        CheckpointError: If there are none, or they do not fit.
    """
    state = {name: value for name, value in trained.items() if name.startswith(("query_tower.", "passage_tower."))}
    known = encoder.state_dict()
    foreign = [name for name, value in state.items() if name not in known or known[name].shape != value.shape]
    if not state or foreign:
        what = f"its weight '{foreign[0]}' does not fit {encoder.settings.path}" if foreign else "no trained retriever"
        raise CheckpointError(f"the checkpoint's retriever cannot be used: {what}.")
    encoder.load_state_dict(state, strict=False)


def save_retriever(encoder: DualEncoder, folder: Path, trained: dict[str, Tensor]) -> None:
    """Write the towers as Hugging Face folders, `query` and `passage`, or the one that both share into `folder`.

    Args:
        encoder: The towers; their live weights are left as they are.
        folder: Where.
        trained: Weights of a checkpoint to write instead of the live ones, by name.
    """
    towers = {"query_tower": folder / "query", "passage_tower": folder / "passage"}
    if encoder.settings.towers == "shared":
        towers = {"query_tower": folder}
    for name, target in towers.items():
        tower = encoder.get_submodule(name)
        state = {key: trained.get(f"{name}.{key}", value) for key, value in tower.state_dict().items()}
        if not isinstance(tower, PreTrainedModel):
            raise TypeError(f"{type(tower).__name__} is not a transformers model.")
        tower.save_pretrained(target, state_dict=state)
        encoder.tokenizer.save_pretrained(target)
