"""The loader's workers: which signals they leave to the process that trains."""

import signal

import pytest

from lit_alignment.data.batching.loader import PlannedLoader
from lit_alignment.data.batching.packing import PlannedBatch


def ignored(planned):
    return [signal.getsignal(each) is signal.SIG_IGN for each in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("handled", [True, False])
def test_workers_ignore_what_the_process_that_trains_handles_and_nothing_else(handled):
    """A worker that hangs can then be ended where nobody handles SIGTERM, as by the DataLoader itself."""
    before = signal.signal(signal.SIGTERM, (lambda number, frame: None) if handled else signal.SIG_DFL)
    try:
        (found,) = PlannedLoader(lambda epoch: [PlannedBatch([0], 0.0)], ignored, 1, num_workers=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [True, handled]
