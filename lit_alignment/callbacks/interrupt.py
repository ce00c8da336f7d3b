"""Ctrl-C that is never lost."""

import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer


class Interrupt(Callback):
    """Stops a run at its next batch where the exception of a Ctrl-C was lost.

    Python raises KeyboardInterrupt at whatever line runs when the signal arrives. In a destructor, which garbage
    collection may call at any time, exceptions are printed and forgotten, and the run would go on.
    """

    def __init__(self) -> None:
        """Nothing has come."""
        self.signalled = False
        self.previous: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the signal from now on; only the main thread may."""
        if threading.current_thread() is threading.main_thread() and self.previous is None:
            self.previous = signal.signal(signal.SIGINT, self._note)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signal as it was; after an error the handler stays, which raises what Python's own does."""
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None

    def on_train_batch_start(self, *args: Any) -> None:
        """Stop if the signal has come.

        Raises:
            KeyboardInterrupt: As the signal does.
        """
        self._stop()

    def on_validation_batch_start(self, *args: Any) -> None:
        """The same."""
        self._stop()

    def on_test_batch_start(self, *args: Any) -> None:
        """The same."""
        self._stop()

    def on_predict_batch_start(self, *args: Any) -> None:
        """The same."""
        self._stop()

    def _stop(self) -> None:
        if self.signalled:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> NoReturn:
        self.signalled = True
        raise KeyboardInterrupt
