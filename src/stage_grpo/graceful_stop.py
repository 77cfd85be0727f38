"""Ending a run at a signal: the step is finished, a checkpoint saved, nothing lost."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What clusters send before they take a machine away, and what Ctrl-C sends."""


class GracefulStop(TrainerCallback):
    """Ends training after the step in which a signal arrives in any process, with a checkpoint.

    Signals are caught inside ``with``; there a second one ends the process at once, as if nothing were caught.

    Attributes:
        received: Name of the signal that arrived in this process, if any.
        stopped_at: Step after which training ended because of a signal; None if it did not.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopped_at: int | None = None
        self._accelerator: Accelerator | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        """Catch signals; outside the main thread Python allows none, and they are left alone."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Let signals do what they did."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        self.__exit__()

    def watch(self, accelerator: Accelerator) -> None:
        """Ask all processes of a run at the end of each step: the signal may have reached only one of them."""
        self._accelerator = accelerator

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process received a signal."""
        if self._accelerator is None:
            asked = self.received is not None
        else:
            if self.received is not None:
                self._accelerator.set_trigger()
            asked = self._accelerator.check_trigger()
        if asked:
            logger.warning("%s: saving and stopping after step %d", self.received or "a signal", state.global_step)
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
