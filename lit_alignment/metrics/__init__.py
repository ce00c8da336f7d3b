"""Metrics that are right under any batch size, packing and number of ranks."""

from lit_alignment.metrics.tokens import TokenMean

__all__ = ["TokenMean"]
