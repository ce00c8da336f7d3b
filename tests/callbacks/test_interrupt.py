"""Ctrl-C stops a run even where its exception is lost."""

import signal

import pytest
from lightning.pytorch import Callback

from lit_alignment.callbacks.interrupt import Interrupt
from tests.helpers import chats, sft_data, sft_module, trainer


class Destroyed:
    """Something whose destructor runs when the signal arrives."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


class SignalsInADestructor(Callback):
    """Sends the signal during the second step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        if number == 1:
            Destroyed()


@pytest.fixture
def signals():
    """The handlers of the tests' own process, put back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_that_a_destructor_swallows_stops_the_run_at_the_next_batch(tmp_path, signals):
    module = sft_module()
    run = trainer(tmp_path, callbacks=[SignalsInADestructor(), Interrupt()])
    with pytest.raises(SystemExit):
        run.fit(module, sft_data(module, chats(16), packing=False, batch_size=1))
    assert run.global_step == 2


def test_signal_is_left_as_it_was(tmp_path, signals):
    module = sft_module()
    trainer(tmp_path, callbacks=[Interrupt()], max_steps=1).fit(module, sft_data(module, chats(2)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
