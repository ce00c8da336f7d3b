"""Everything that writes or reads a checkpoint."""
