"""Strategies: FSDP2, DeepSpeed, sequence and tensor parallelism."""
