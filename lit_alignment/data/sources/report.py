"""What became of the records: kept, dropped by reason, tokens and trained share."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lit_alignment.errors import ConfigError, writing
from lit_alignment.terminal import printable


@dataclass
class DataReport:
    """Counts for one split.

    Args:
        split: train, val, test or predict.
        sources: Records read, by source.
        examples: Examples in an epoch, repeats included.
        dropped: Records that did not become examples, by reason.
        details: One example of each reason that has something to tell.
        tokens: Tokens in the examples.
        trained_tokens: Tokens that the loss applies to.
        longest: Tokens of the longest example.
        notes: How often something happened in encoding that is worth a word.
        remarks: What somebody should know about the way of encoding.
    """

    split: str
    sources: dict[str, int] = field(default_factory=dict)
    examples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line for the console."""
        share = f", {self.trained_tokens / self.tokens:.1%} of them trained" if self.trained_tokens else ""
        dropped = "; ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        detail = "".join(f"\n  {reason}: {text}" for reason, text in sorted(self.details.items()))
        notes = "".join(f"; {count} {note}" for note, count in sorted(self.notes.items()))
        remarks = "".join(f"\n  note: {remark}" for remark in self.remarks)
        return printable(
            f"{self.split}: {self.examples} examples from {sum(self.sources.values())} records, "
            f"{self.tokens} tokens{share}, longest {self.longest}; dropped: {dropped or 'none'}{notes}{detail}{remarks}"
        )


def write_reports(reports: dict[str, DataReport], directory: Path) -> Path:
    """Write the reports as `data_report.json`.

    Raises:
        ConfigError: If the disk is full or the folder cannot be written.
    """
    path = directory / "data_report.json"
    fix = "Free its disk, or set the logger's save_dir, or the PredictionWriter's output_dir, to another folder"
    with writing(path, ConfigError, fix):
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({split: vars(report) for split, report in reports.items()}, indent=2) + "\n")
    return path
