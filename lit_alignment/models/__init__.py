"""Loading models, their attention, and their output heads."""
