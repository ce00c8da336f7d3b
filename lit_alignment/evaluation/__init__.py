"""Metrics of generated answers, and what models say of them."""
