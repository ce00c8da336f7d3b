"""`lit-alignment merge`: export with the adapters merged."""

from lit_alignment.tools import export


def main(arguments: list[str]) -> None:
    """Merge and compare the logits before and after."""
    export.main(arguments, merge=True)
