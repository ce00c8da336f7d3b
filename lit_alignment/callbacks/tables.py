"""Tables for the loggers that can show one."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger


def log_table(loggers: Sequence[Logger], key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    """Write one table to TensorBoard, W&B, and a running ClearML task; other loggers are passed over.

    Args:
        loggers: The trainer's loggers.
        key: Name of the table, the same at every step, so that steps can be compared.
        columns: Headings.
        rows: Cells, one list a row.
        step: Optimiser step.
    """
    for logger in loggers:
        match logger:
            case TensorBoardLogger():
                logger.experiment.add_text(key, markdown_table(columns, rows), step)
            case WandbLogger():
                logger.log_table(key, columns=columns, data=rows, step=step)
            case _:
                pass
    _log_clearml(key, columns, rows, step)


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown; cells keep to one line."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *(line(row) for row in rows)])


def _log_clearml(key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    import sys

    if "clearml" not in sys.modules:  # no task can be running
        return
    task = sys.modules["clearml"].Task.current_task()
    if task is not None:
        task.get_logger().report_table(key, "table", iteration=step, table_plot=[columns, *rows])
