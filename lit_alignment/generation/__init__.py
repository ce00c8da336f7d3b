"""Answering prompts: settings, answers, and the engine on transformers."""

from lit_alignment.generation.settings import Answer, DecodingConfig

__all__ = ["Answer", "DecodingConfig"]
