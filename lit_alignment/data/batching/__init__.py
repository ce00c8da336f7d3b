"""From examples to batches that know the weight of their optimizer step."""
