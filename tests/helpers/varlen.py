"""Slow kernels with the contract of `torch.nn.attention.varlen.varlen_attn`, which runs on CUDA alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_alignment.models import attention, varlen


def newest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Of PyTorch 2.13: sliding windows, a scale, groups of query heads."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size[1] == 0, "not causal"
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _attention(query, keys, values, (cu_seq_q, cu_seq_k, max_q, max_k), window_size[0], scale)


def oldest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: None = None,
) -> Tensor:
    """Of PyTorch 2.10."""
    assert is_causal and query.shape[1] == key.shape[1]
    return _attention(query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), -1, None)


def top_left(*tensors: Tensor | int, is_causal: bool = False) -> Tensor:
    """One that aligns the first query with the first key."""
    query, key, value, *ends = tensors
    return _attention(query, key, value, ends, -1, None, bottom_right=False)


def without_gradient_of_keys(
    query: Tensor, key: Tensor, value: Tensor, *ends: Tensor | int, is_causal: bool = False
) -> Tensor:
    """One whose outputs are right and whose gradients are not."""
    return _attention(query, key.detach() + 0 * key, value, ends, -1, None)


def _attention(query, key, value, ends, left, scale, bottom_right=True):
    """Softmax of the scores of each document, written out."""
    cu_seq_q, cu_seq_k, max_q, max_k = ends
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    outputs = []
    for row in range(len(cu_seq_q) - 1):
        own = slice(int(cu_seq_q[row]), int(cu_seq_q[row + 1]))
        seen = slice(int(cu_seq_k[row]), int(cu_seq_k[row + 1]))
        q, k, v = query[own].transpose(0, 1), key[seen].transpose(0, 1), value[seen].transpose(0, 1)
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        at = torch.arange(q.shape[1])[:, None] + (k.shape[1] - q.shape[1] if bottom_right else 0)
        distance = at - torch.arange(k.shape[1])
        hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.tensor(False))
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def use_kernel(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor] = newest) -> None:
    """Let it be the kernel of the installed PyTorch on a device that has one, in fp32 and fp64 too."""
    monkeypatch.setattr(attention, "installed_kernel", lambda: varlen.kernel_of(function))
    monkeypatch.setattr(attention, "varlen_obstacle", lambda: None)
    monkeypatch.setattr(varlen, "DTYPES", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
