"""Losses: plain functions on tensors."""

from lit_alignment.losses.language_modeling import linear_cross_entropy, token_cross_entropy

__all__ = ["linear_cross_entropy", "token_cross_entropy"]
