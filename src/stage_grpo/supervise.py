"""Runs a launcher, and passes signals to the training processes instead of the launcher.

The launchers (``accelerate launch``, which is torch's elastic agent for several processes) end their workers when
they are signalled, and kill what has not ended 30 seconds later: less than a step of a large model takes. A training
process that is signalled itself finishes its step and saves. So the launcher runs in a session of its own, where
Ctrl-C does not reach it, and signals go to its children; when they have ended, the launcher ends by itself.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil

SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal is gone: training processes know no such signal
}
"""What is caught, and what is passed on."""


def run(command: Sequence[str]) -> int:
    """Run a launcher to its end.

    Args:
        command: Words of the launcher's command line.

    Returns:
        Its exit code; 128 + n if signal n ended it.

    Raises:
        OSError: If the command cannot be started.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _: Any) -> None:
        if child is None:
            early.append(number)
        else:
            _signal_workers(child.pid, SIGNALS[signal.Signals(number)])

    # A signal that was ignored before, as SIGHUP is under nohup, stays ignored.
    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in caught}
    try:
        child = subprocess.Popen(command, start_new_session=True)
        for number in early:
            forward(number, None)
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _signal_workers(launcher: int, number: int) -> None:
    """Signal the children of a launcher, or the launcher itself before it has any."""
    try:
        parent = psutil.Process(launcher)
        targets = parent.children() or [parent]
    except psutil.NoSuchProcess:
        return
    for process in targets:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
