"""`python -m lit_alignment` is the command `lit-alignment`."""

from lit_alignment.cli import entry

entry()
