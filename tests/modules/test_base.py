"""What all modules share, where no method shows it."""

import copy

import pytest

from lit_alignment.checkpoints.restore import CHECKPOINT_KEY
from tests.helpers import sft_module, trainer


@pytest.mark.parametrize(("ranks", "expected"), [(1, 6), (2, 12), (4, 24)])
def test_batches_of_more_ranks_count_as_that_many_of_one(ranks, expected, tmp_path):
    """Six batches on each of two ranks are twelve of one; one that is processed and not completed stays open."""
    module = sft_module()
    module._trainer = trainer(tmp_path)
    counts = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    progress = {"total": dict(counts), "current": dict(counts)}
    saved = {
        "state_dict": {},
        CHECKPOINT_KEY: {"ranks": ranks},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": copy.deepcopy(progress)}},
    }
    module.on_load_checkpoint(saved)
    wanted = {"ready": expected, "started": expected, "processed": expected, "completed": expected - 1}
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"] == {"total": wanted, "current": wanted}
