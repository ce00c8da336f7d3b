"""Whether a loaded model does what training takes for granted: tokens see earlier ones, of their own document alone.

D width
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from lit_alignment.errors import ConfigError
from lit_alignment.models.adapters import is_prompt_learning
from lit_alignment.models.attention import document_arguments
from lit_alignment.models.head import base_model, hidden_states

LENGTHS = (6, 9)  # of the two documents
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Of the same numbers computed in other shapes: a share of the largest.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
ROUGH = 3e-2  # in half precision


@torch.no_grad()
def check_isolation(network: nn.Module, packing: bool, shared_prompts: bool = False) -> None:
    """Change some tokens of a row, and see which hidden states change.

    To be called on every process of a sharded model, under the precision that steps have.

    Args:
        network: A model, with or without adapters.
        packing: Whether it will see rows of several documents.
        shared_prompts: Whether documents of a row continue another one.

    Raises:
        ConfigError: Naming the setting that helps.
    """
    training = [layer for layer in network.modules() if layer.training]
    network.eval()
    try:
        row = _Row(network)
        causal = {layer.is_causal for layer in base_model(network).modules() if hasattr(layer, "is_causal")}
        if causal == {False}:
            raise ConfigError(
                f"{row.name}: an encoder (config.is_decoder is false), no causal language model. Choose a decoder as "
                "model.backbone.path."
            )
        if row.changes(row.first, None, slice(0, LENGTHS[0] - 1), only=slice(LENGTHS[0] - 1, LENGTHS[0])):
            raise ConfigError(
                f"{row.name}: its tokens see those that follow them. Set backbone.attention: eager, which may know its "
                "mask, and data's packing: false; or choose another model."
            )
        if not is_prompt_learning(network) and row.differ(row.counted(row.first), row.hidden(row.first, None)):
            raise ConfigError(
                f"{row.name}: it does not count positions from 0, so a packed or padded row would be another text to "
                "it. It cannot be trained here; choose another model."
            )
        if packing:
            _check_documents(row, shared_prompts)
    finally:
        for layer in training:
            layer.training = True


def check_positions(network: nn.Module, longest: int, new_tokens: int = 0) -> None:
    """Refuse conversations that are longer than a model has learned positions.

    Args:
        network: A model, with or without adapters.
        longest: Tokens of the longest conversation.
        new_tokens: That are sampled behind it.

    Raises:
        ConfigError: Naming the setting that helps.
    """
    base = base_model(network)
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    tables = [n for n, layer in base.named_modules() if isinstance(layer, nn.Embedding) and re.search("wpe|pos", n)]
    if most is not None and longest + new_tokens > most and tables:
        behind = f", behind which {new_tokens} tokens are sampled" if new_tokens else ""
        raise ConfigError(
            f"{type(base).__name__} has {most} learned positions, and data.encoding.max_length is {longest}{behind}. "
            f"Set that to {max(1, most - new_tokens)} or less."
        )


def _check_documents(row: "_Row", shared_prompts: bool) -> None:
    second = slice(LENGTHS[0], sum(LENGTHS))
    whole = torch.cat([row.first, row.second], 1)
    leaks = row.changes(whole, list(LENGTHS), second, only=slice(0, LENGTHS[0]))
    packed = row.hidden(whole, list(LENGTHS))[:, second]
    alone = row.hidden(row.second, [LENGTHS[1]])
    differs = row.differ(packed, alone)
    if shared_prompts and not leaks and not differs:
        # Two responses that continue one prompt: the second as if it had followed the prompt itself.
        answers = torch.cat([row.first, row.second, row.second.flip(1)], 1)
        shared = row.hidden(answers, [*LENGTHS, LENGTHS[1]], [-1, 0, 0])[:, sum(LENGTHS) :]
        plain = row.hidden(torch.cat([row.first, row.second.flip(1)], 1), [sum(LENGTHS)])[:, LENGTHS[0] :]
        differs = row.differ(shared, plain)
    if leaks or differs:
        raise ConfigError(
            f"{row.name}: the documents of a packed row are not kept apart: its layers do not hand on where documents "
            "begin, or carry state from one to the next. Set data's packing: false."
        )


class _Row:
    """Rows of tokens, and what a model makes of them."""

    def __init__(self, network: nn.Module) -> None:
        base = base_model(network)
        self.network, self.name = network, type(base).__name__
        self.config = base.config.get_text_config()
        self.implementation = str(base.config._attn_implementation)
        self.device = next(network.parameters()).device
        # Products of experts have other shapes when a token chooses another; so have those of outliers in 8 bits.
        mixed = any(self.config.to_dict().get(name) for name in EXPERTS)
        self.to_the_bit = not mixed and getattr(base, "quantization_method", None) is None
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, int(self.config.vocab_size), (1, sum(LENGTHS)), generator=generator).to(self.device)
        self.first, self.second = ids[:, : LENGTHS[0]], ids[:, LENGTHS[0] :]

    def hidden(self, ids: Tensor, lengths: list[int] | None, parents: list[int] | None = None) -> Tensor:
        """Hidden states of a row of documents, or of one that is not packed, [1, T, D]."""
        if lengths is None:
            return hidden_states(self.network, input_ids=ids)
        begins = [0 if parent < 0 else lengths[parent] for parent in parents or [-1] * len(lengths)]
        positions = [torch.arange(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]
        arguments: dict[str, Any] = {"position_ids": torch.cat(positions)[None].to(self.device)}
        arguments |= document_arguments(self.implementation, lengths, self.device, parents)
        return hidden_states(self.network, input_ids=ids, **arguments)

    def counted(self, ids: Tensor) -> Tensor:
        """Hidden states of a row whose positions are told, as in padded batches, [1, T, D]."""
        return hidden_states(
            self.network, input_ids=ids, position_ids=torch.arange(ids.shape[1], device=self.device)[None]
        )

    def changes(self, ids: Tensor, lengths: list[int] | None, seen: slice, only: slice) -> bool:
        """Whether hidden states change when other tokens of the row do.

        Args:
            ids: The row.
            lengths: Of its documents; None if it is not packed.
            seen: Whose hidden states are looked at.
            only: The tokens that change, each of them.
        """
        other = ids.clone()
        other[:, only] = (other[:, only] + 1 + self.config.vocab_size // 2) % self.config.vocab_size
        before, after = (self.hidden(each, lengths)[:, seen] for each in (ids, other))
        return not torch.equal(before, after) if self.to_the_bit else self.differ(after, before)

    def differ(self, found: Tensor, expected: Tensor) -> bool:
        """Whether hidden states differ by more than rounding."""
        largest = float(expected.abs().max())
        return float((found - expected).abs().max()) > TOLERANCE.get(expected.dtype, ROUGH) * max(largest, 1e-6)
