"""Trained models behind vLLM: the predict loop and the server."""
