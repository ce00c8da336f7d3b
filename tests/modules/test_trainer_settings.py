"""What the Trainer can be asked for, and what each method still counts right under it."""

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import Logger

from lit_alignment.errors import ConfigError
from lit_alignment.optimization import OptimizerConfig
from tests.helpers import Seen, chats, sft_data, sft_module, trainer


class Losses(Logger):
    """Keeps loss and gradient norm of each step."""

    name, version = "log", "0"

    def __init__(self):
        super().__init__()
        self.found = {}

    def log_metrics(self, metrics, step=None):
        for name in ("train/loss", "train/grad_norm"):
            if name in metrics:
                self.found.setdefault(step, {})[name] = metrics[name]

    def log_hyperparams(self, *args, **kwargs):
        pass


def run(folder, callbacks=(), rate=1e-12, **options):
    """Two epochs of seven batches, with weights that stand still."""
    losses, seen = Losses(), Seen()
    module = sft_module(optimizer=OptimizerConfig(learning_rate=rate, schedule="constant", warmup=0))
    usual = {"max_epochs": 2, "log_every_n_steps": 1, "logger": losses}
    data = sft_data(module, chats(14), chats(2, seed=1), packing=False, batch_size=2)
    trainer(folder, callbacks=[seen, *callbacks], **(usual | options)).fit(module, data)
    return losses.found, seen


def test_windows_that_change_between_epochs_are_means_over_their_own_tokens(tmp_path):
    """Seven steps, and then two: of four batches and of three."""
    changing, _ = run(tmp_path, [GradientAccumulationScheduler({0: 1, 1: 4})])
    single, _ = run(tmp_path)
    four, _ = run(tmp_path, accumulate_grad_batches=4)
    expected = [*(single[step] for step in range(7)), *(four[step] for step in range(2, 4))]
    assert [changing[step] for step in range(9)] == [pytest.approx(each, rel=1e-5) for each in expected]


def test_schedule_ends_where_the_windows_of_all_epochs_end(tmp_path):
    module = sft_module(optimizer=OptimizerConfig(learning_rate=1.0, schedule="linear", warmup=0))
    scheduler = GradientAccumulationScheduler({0: 1, 1: 4})
    runner = trainer(tmp_path, callbacks=[scheduler], max_epochs=2)
    runner.fit(module, sft_data(module, chats(14), packing=False, batch_size=2))
    assert runner.global_step == 9 and runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_epochs_of_a_few_batches_have_the_same_ones(tmp_path):
    _, seen = run(tmp_path, overfit_batches=3)
    assert len(seen.ids) == 6 and seen.ids[:3] == seen.ids[3:]
    _, other = run(tmp_path, limit_train_batches=3)
    assert other.ids[:3] == seen.ids[:3] and other.ids[:3] != other.ids[3:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0; use 1 or more"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val is -1.0; use 0 for none, or more"),
        ({"limit_train_batches": 0.01}, "limit_train_batches is 0.01, which is less than one batch"),
        ({"limit_train_batches": 0}, "limit_train_batches is 0, which is less than one batch"),
        ({"val_check_interval": 8}, "val_check_interval is 8, and an epoch has 7 batches"),
        ({"callbacks": [StochasticWeightAveraging(1e-3)]}, "Use lightning.pytorch.callbacks.EMAWeightAveraging"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_would_train_nothing_or_something_else_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, **options)
