"""Strategies of our own, and checkpoints in shards."""
