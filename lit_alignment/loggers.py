"""Loggers that Lightning does not bring itself."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lit_alignment.errors import require


class ClearMLLogger(Logger):
    """Metrics, settings and tables to a ClearML task, from rank 0.

    Address and keys of the server come from `clearml.conf` or the `CLEARML_` environment variables.

    Args:
        project_name: Project of the task.
        task_name: Name of the task.
        tags: Tags of the task.
        offline: Write into a folder of ClearML's cache instead of to a server; the folder's name is printed.
        save_dir: Where reports, and below it checkpoints, go if this is the first logger.
    """

    def __init__(
        self,
        project_name: str,
        task_name: str,
        tags: list[str] | None = None,
        offline: bool = False,
        save_dir: str = "runs",
    ) -> None:
        """The task begins when the run is set up."""
        super().__init__()
        self.project_name, self.task_name, self.tags, self.offline = project_name, task_name, tags, offline
        self._save_dir = save_dir
        self._task: Any | None = None
        self._version: str | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The running task; another one is begun after `finalize`.

        Raises:
            ConfigError: If clearml is not installed.
        """
        if self._task is None:
            clearml = require("clearml", "clearml")
            # On Linux ClearML reports from a forked process; a fork beside torch's threads can hang the run.
            settings = {"sdk": {"development": {"report_use_subprocess": False}}}
            require("clearml.config", "clearml").config_obj.set_overrides(settings)
            if self.offline:
                clearml.Task.set_offline(True)
            self._task = clearml.Task.init(
                project_name=self.project_name,
                task_name=self.task_name,
                tags=self.tags,
                reuse_last_task_id=False,  # a run must not write over the curves of the run before
                auto_connect_arg_parser=False,  # the configuration comes through log_hyperparams
                auto_connect_frameworks=False,  # it would upload each torch.save
            )
            self._version = str(self._task.id)
        return self._task

    @property
    @override
    def name(self) -> str:
        """The task's name."""
        return self.task_name

    @property
    @override
    def version(self) -> str | None:
        """The task's id, once it has begun."""
        return self._version

    @property
    @override
    def save_dir(self) -> str:
        """Folder of the run's reports."""
        return self._save_dir

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Report scalars: `val/loss` is the curve `loss` in the plot `val`."""
        logger = self.experiment.get_logger()
        for key, value in metrics.items():
            title, _, series = key.rpartition("/")
            logger.report_scalar(title or series, series, value, iteration=step or 0)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Show the settings in the task's configuration."""
        self.experiment.connect(_convert_params(params))

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Report a table; tables of one key can be paged through by step."""
        self.experiment.get_logger().report_table(key, "table", iteration=step, table_plot=[columns, *rows])

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the task and send what is left."""
        if self._task is not None:
            self._task.close()
            self._task = None
