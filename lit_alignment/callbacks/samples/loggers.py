"""Tables for the loggers that can show one."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lit_alignment.loggers import ClearMLLogger


def log_table(loggers: Sequence[Logger], key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    """Write one table to TensorBoard, W&B, MLflow and ClearML; other loggers are passed over.

    Args:
        loggers: The trainer's loggers.
        key: Name of the table, the same at every step, so that steps can be compared.
        columns: Headings.
        rows: Cells, one list a row.
        step: Optimizer step.
    """
    for logger in loggers:
        match logger:
            case TensorBoardLogger():
                logger.experiment.add_text(key, markdown_table(columns, rows), step)
            case WandbLogger():
                logger.log_table(key, columns=columns, data=rows, step=step)
            case MLFlowLogger():
                logger.experiment.log_table(logger.run_id, _columns(columns, rows, step), f"{key}.json")
            case ClearMLLogger():
                logger.log_table(key, columns, rows, step)
            case _:
                pass


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown; cells keep to one line."""

    def text(cell: Any) -> str:
        return "" if cell is None else str(cell).replace("|", "\\|").replace("\n", "<br>")

    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(map(text, cells))} |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *(line(row) for row in rows)])


def _columns(columns: list[str], rows: list[list[Any]], step: int) -> dict[str, list[Any]]:
    """Cells by column; MLflow appends to one table, so the step is a column of its own."""
    cells = {name: [row[index] for row in rows] for index, name in enumerate(columns)}
    return {"step": [step] * len(rows), **cells}
