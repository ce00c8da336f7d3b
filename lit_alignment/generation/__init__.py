"""Answering prompts: settings, answers, and the engine on transformers."""

from lit_alignment.generation.settings import Answer, GenerationSettings

__all__ = ["Answer", "GenerationSettings"]
