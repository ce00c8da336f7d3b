"""From records to batches, one stage a file."""
