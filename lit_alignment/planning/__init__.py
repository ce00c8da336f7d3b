"""Memory, bytes and time on paper, before a launch."""
