"""Optimizers of our own, and the groups of parameters of any."""
