"""What libraries say about themselves, and a user of a command can do nothing about."""

import logging
import sys
import warnings

from datasets import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

QUIET = (
    r".*The dirpath has changed from.*",
    r".*Be aware that when using `ckpt_path`, callbacks used to create.*",
    r".*`weights_only` was not set.*",
    r".*Total length of `.*` across ranks is zero.*",
    r".*the dataloader .* is not resumable.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*LightningCLI's args parameter is intended.*",
    r".*`loftq_config` specified but will be ignored.*",
    r".*Precision .* is not supported by the model summary.*",
    r".*does not have many workers.*",
    r".*is smaller than the logging interval.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*is_gradient_checkpointing.* is deprecated.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*past_key_values.* (is|are) deprecated.*",
    r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*",  # torchmetrics have been summed over all ranks
    r".*Trainer was configured with `enable_model_summary.*",
)
# Of Lightning's log; why a training stopped EndSummary says, with what was best.
SAID = ("Tip: ", "`Trainer.fit` stopped", "TPU available: False", "configured with model summary callbacks")


def quiet_libraries() -> None:
    """Say none of it, and show no bars for the loading of a model or a file where no terminal is."""
    for pattern in QUIET:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    if not sys.stderr.isatty():
        disable_progress_bars()
        disable_progress_bar()


def _no_advertisement(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(said in text for said in SAID)
