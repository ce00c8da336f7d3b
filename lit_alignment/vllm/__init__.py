"""The vLLM engine, offline predict with it, and its server."""
