"""Attention that keeps the documents of a packed row apart, without a mask.

B rows, H query heads, K key heads, T tokens, C head width
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lit_alignment.errors import ConfigError
from lit_alignment.models.collectives import SequenceGroup, spread
from lit_alignment.models.varlen import (
    VarlenLayout,
    computes,
    installed_kernel,
    to_device,
    under_autocast,
    varlen_attention,
    varlen_layout,
    varlen_obstacle,
)

Attention = Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention", "eager"]

DOCUMENT_SDPA = "document_sdpa"
DOCUMENT_VARLEN = "document_varlen"
ISOLATING = ("sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention")
MASKED = ("eager", "sdpa", "flex_attention")  # they keep documents apart by masks, made of restarting positions
LOOKS = {
    name: getattr(masking_utils, name)
    for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa", "find_packed_sequence_indices")
}
ISOLATED_LAYERS = {"full_attention", "sliding_attention"}


# A compiled layer stops for it: each row is split at other tokens.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_lengths: Sequence[int] | None = None,
    document_parents: Sequence[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sequence: SequenceGroup | None = None,
    varlen: VarlenLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a packed row; ordinary SDPA where no row is packed.

    The cost is the sum of the squared document lengths, and no [T, T] mask exists; with a layout, it is one call.

    Args:
        module: The attention layer.
        query: [B, H, T, C]; B is 1 in a packed row.
        key: [B, K, T, C].
        value: [B, K, T, C].
        attention_mask: What transformers made for an unpacked batch; unused in a packed row.
        dropout: Dropout on the attention weights.
        scaling: Factor on the scores.
        document_lengths: Lengths of the documents in a packed row, which sum to T.
        document_parents: For each document the one, a prompt, whose tokens it sees too, or -1; None if no one has any.
        sliding_window: How many positions back a token may look, itself included.
        softcap: Refused; SDPA cannot cap scores.
        s_aux: Refused; SDPA has no attention sinks.
        sequence: Ranks that each have a slice of the row; T is then the slice's length.
        varlen: The same documents for the variable-length kernel, in layers that it computes.
        **kwargs: What transformers passes to every attention function.

    Returns:
        Output, [B, T, H, C], and None for the attention weights.

    Raises:
        ConfigError: If the model caps its scores or uses attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise ConfigError("This model needs soft-capped scores or sinks: set backbone.attention to flex_attention.")
    if varlen is not None:
        query, key, value = under_autocast(query, key, value)
        if computes(varlen, query, value, dropout, sliding_window):
            return varlen_attention(query, key, value, varlen, scaling, sliding_window), None
    if not document_lengths and attention_mask is None and query.shape[2] == key.shape[2]:
        # Unpacked and unmasked: each row is one document, whose sliding window plain SDPA would not know of.
        document_lengths = [query.shape[2]]
    if not document_lengths:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)[0], None
    if sequence is not None:
        key, value = spread(key, value, sequence.size)
        query, key, value = (sequence.to_heads(tensor, sum(document_lengths)) for tensor in (query, key, value))
    output = _by_document(query, key, value, document_lengths, document_parents, dropout, scaling, sliding_window)
    return output if sequence is None else sequence.to_tokens(output), None


def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_lengths: Sequence[int],
    document_parents: Sequence[int] | None,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of each document by itself; as of `document_attention`."""
    queries, keys, values = (torch.split(tensor, list(document_lengths), dim=2) for tensor in (query, key, value))
    outputs = []
    for q, k, v, parent in zip(queries, keys, values, document_parents or [-1] * len(queries), strict=True):
        if parent >= 0:
            k, v = torch.cat([keys[parent], k], dim=2), torch.cat([values[parent], v], dim=2)
        length = k.shape[2]
        mask = None
        if parent >= 0 or (sliding_window is not None and length > sliding_window):
            positions = torch.arange(length, device=q.device)
            distance = positions[-q.shape[2] :, None] - positions
            mask = (distance >= 0) & (distance < (sliding_window or length))
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _document_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for a packed row (it comes without a 2-D mask), the usual one for padded batches."""
    q_length, kv_length = kwargs.get("q_length"), kwargs.get("kv_length")
    if attention_mask is None and q_length == kv_length:
        return None
    mask: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return mask


@dataclass(frozen=True)
class Known:
    """What can compute an architecture's attention, beside transformers' eager one.

    Args:
        sdpa: SDPA, and PyTorch's variable-length kernel.
        flash: FlashAttention.
        flex: FlexAttention.
    """

    sdpa: bool = True
    flash: bool = True
    flex: bool = True


def known_attentions(kind: type[PreTrainedModel] | None, config: PretrainedConfig) -> Known:
    """What computes the attention of an architecture; SDPA does not where scores are capped.

    Args:
        kind: Its class, or None if it comes with code of its own.
        config: The model's configuration.
    """
    if kind is None:
        return Known()
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return Known(
        bool(kind._supports_sdpa) and not capped, bool(kind._supports_flash_attn), bool(kind._supports_flex_attn)
    )


def choose_attention(
    requested: Attention,
    packing: bool,
    device_type: str,
    config: PretrainedConfig,
    shared_prompts: bool = False,
    known: Known = Known(),
) -> str:
    """The attention implementation to load a model with.

    Args:
        requested: The setting; `auto` is, on a GPU, FlashAttention where it is installed, else PyTorch's
            variable-length kernel; elsewhere SDPA by document. It is transformers' eager one where the architecture
            knows no other.
        packing: Whether rows hold several documents.
        device_type: cpu, cuda, ...
        config: The model's configuration.
        shared_prompts: Whether documents of a row continue another one, which FlashAttention is not told.
        known: What can compute the architecture's attention.

    Raises:
        ConfigError: If documents cannot be kept apart that way; the message names the ways that can.
    """
    if not known.sdpa and requested in ("auto", "sdpa", "varlen"):
        if known.flex and packing and device_type == "cuda" and requested == "auto" and not shared_prompts:
            return "flex_attention"
        if packing or requested != "auto":
            raise ConfigError(
                f"{config.model_type}: SDPA does not compute this architecture's attention, so the documents of a "
                "packed row are not kept apart. Set data's packing: false, and backbone.attention to auto or eager."
            )
        return "eager"
    if packing:
        _check_packed(requested, device_type, config, shared_prompts)
    if requested == "varlen":
        obstacle = (
            varlen_obstacle() if device_type == "cuda" else f"it needs a CUDA GPU, and this run is on {device_type}"
        )
        if obstacle is not None:
            raise ConfigError(f"backbone.attention: varlen cannot be used: {obstacle}. Use auto or sdpa.")
    if requested == "auto":
        requested = _best_on_gpu(packing, shared_prompts, known) if device_type == "cuda" else "sdpa"
    if requested not in ("sdpa", "varlen"):
        return requested
    implementation = DOCUMENT_VARLEN if packing and requested == "varlen" else DOCUMENT_SDPA
    AttentionInterface.register(implementation, document_attention)
    AttentionMaskInterface.register(implementation, _document_mask)
    return implementation


def _check_packed(requested: Attention, device_type: str, config: PretrainedConfig, shared_prompts: bool) -> None:
    """Refuse what does not keep the documents of a packed row apart; arguments are those of `choose_attention`."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if requested == "eager" or (requested == "flex_attention" and device_type == "cpu"):
        why = "has no backward pass on CPU" if requested == "flex_attention" else "attends across documents"
        possible = ", ".join(n for n in ISOLATING if device_type != "cpu" or n == "sdpa")
        raise ConfigError(
            f"backbone.attention: {requested} {why}, so it cannot train packed rows. "
            f"Use one of: auto, {possible}; or set data's packing: false."
        )
    if not layers <= ISOLATED_LAYERS:
        raise ConfigError(
            f"{config.model_type}: layers of kind {', '.join(sorted(layers - ISOLATED_LAYERS))} carry state "
            "from one document of a packed row to the next. Set data's packing: false."
        )
    if shared_prompts and requested not in ("auto", "sdpa", "varlen"):
        raise ConfigError(
            f"backbone.attention: {requested} cannot let responses of a row share one prompt. "
            "Use auto, sdpa or varlen, or set data's share_prompts: false."
        )


def _best_on_gpu(packing: bool, shared_prompts: bool, known: Known) -> Attention:
    """What `auto` is on a GPU, for an architecture that knows SDPA."""
    if known.flash and not (packing and shared_prompts):
        if is_flash_attn_3_available():
            return "flash_attention_3"
        if is_flash_attn_2_available():
            return "flash_attention_2"
    if not packing:
        return "sdpa"
    obstacle = varlen_obstacle()
    if obstacle is None:
        return "varlen"
    rank_zero_info(f"attention is by SDPA, one document after the other: {obstacle}")
    return "sdpa"


def lacks_ours(error: Exception) -> bool:
    """Whether it was raised since an architecture has a table of attentions of its own, without ours."""
    return isinstance(error, KeyError) and error.args in ((DOCUMENT_SDPA,), (DOCUMENT_VARLEN,))


@contextmanager
def known_documents(implementation: str) -> Iterator[None]:
    """Forward passes without a mask in which transformers does not look for documents in the positions.

    It reads a tensor for that, so that the CPU would wait for a GPU, and what it finds decides the masks of its own
    implementations alone. All others are told where documents begin (`document_arguments`).

    Args:
        implementation: Of the model's attention.
    """
    if implementation in MASKED:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = LOOKS["find_packed_sequence_indices"]


@contextmanager
def plain_rows() -> Iterator[None]:
    """Forward passes without cached keys, of one text a row, masked where and only where some row is padded.

    Transformers would look whether rows with a mask are padded, and whether those without hold several documents. It
    reads a tensor for that, so that the CPU would wait for a GPU.
    """
    for name in LOOKS:
        setattr(masking_utils, name, lambda *args, **settings: None)  # neither: make the mask, of one text a row
    try:
        yield
    finally:  # what was there at import: passages may be encoded in another thread at the same time
        for name, function in LOOKS.items():
            setattr(masking_utils, name, function)


def check_sequence_parallel(config: PretrainedConfig, size: int, packing: bool, implementation: str) -> None:
    """Refuse a model or data whose rows cannot be shared.

    Raises:
        ConfigError: Naming what to change.
    """
    name = f"trainer.strategy.sequence_parallel_size is {size}"
    heads = config.get_text_config().num_attention_heads
    if heads % size:
        raise ConfigError(f"{name}, by which the model's {heads} attention heads cannot be divided. Use a divisor.")
    if not packing:
        raise ConfigError(f"{name}, and ranks share packed rows only. Set data's packing: true.")
    if implementation not in (DOCUMENT_SDPA, DOCUMENT_VARLEN):  # the latter is by SDPA where ranks share a row
        raise ConfigError(f"{name}, which needs attention by SDPA. Set backbone.attention: sdpa.")


def document_arguments(
    implementation: str,
    document_lengths: list[int],
    device: torch.device,
    document_parents: list[int] | None = None,
    sequence: SequenceGroup | None = None,
) -> dict[str, Any]:
    """What a model's forward needs besides positions to keep the documents of a packed row apart."""
    if not document_lengths:
        return {}
    if implementation in (DOCUMENT_SDPA, DOCUMENT_VARLEN):
        own = {"document_lengths": document_lengths, "document_parents": document_parents or None}
        if sequence is not None:
            return own | {"sequence": sequence}
        if implementation == DOCUMENT_VARLEN and (kernel := installed_kernel()) is not None:
            return own | {"varlen": varlen_layout(kernel, document_lengths, document_parents, device)}
        return own
    if implementation.startswith("flash"):
        ends = to_device(torch.tensor([0, *accumulate(document_lengths)], dtype=torch.int32), device)
        longest = max(document_lengths)
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return {}  # flex_attention: transformers builds its block mask from the restarting positions
