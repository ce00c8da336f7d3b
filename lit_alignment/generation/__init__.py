"""Responses to prompts: the interface of engines, the one on transformers, and predictions on disk."""

from lit_alignment.generation.engine import Completion, Engine, Request
from lit_alignment.generation.settings import DecodingConfig

__all__ = ["Completion", "DecodingConfig", "Engine", "Request"]
