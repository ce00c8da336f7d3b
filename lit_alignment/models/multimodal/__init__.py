"""Encoders and projectors: images and sounds as embeddings of a language model."""
