"""SIGTERM and SIGINT: the step in progress is finished and saved, and one request is never taken for two.

A signal reaches a worker more than once. Ctrl-C on a terminal, Slurm and ``kill -- -GROUP`` signal every process, and
each parent (plain python, launch.py, torchrun's agent) passes on what it got, because it cannot know whether its
children got it too. So parents always pass signals on, and whoever saves takes all signals within ``REPEAT_SECONDS``
as one; a later one stops at once. Standard library only: launch.py runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Generator

REPEAT_SECONDS = 5.0  # copies of a signal come within milliseconds; a person who asks again has waited
STOPPING = (signal.SIGTERM, signal.SIGINT)
# What a parent passes on. Windows has no signals between processes: its console gives Ctrl-C to all of them, and
# "sending" one would end the process at once.
PASSED_ON = STOPPING if os.name != "nt" else (signal.SIGTERM,)


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the state has been saved."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class SignalCatcher:
    """Turns SIGTERM and SIGINT into :attr:`received`, so that the step in progress is finished first.

    A second request (see the module's text) raises ``KeyboardInterrupt``. Copies of the first that arrive after the
    block are ignored, too, so that the process ends as it was about to; then the earlier handlers hold again.
    """

    def __init__(self):
        self.received: int | None = None
        self._since = 0.0  # when the last request came

    def __enter__(self):
        self._old = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def take(self, number: int) -> bool:
        """Note a signal, however it was learned; False for a copy of an earlier one."""
        now = time.monotonic()
        if self.received is not None and now - self._since < REPEAT_SECONDS:
            return False
        self._since = now
        return True

    def receive(self, number: int) -> None:
        """Take ``number`` as received: another process has, and this one will."""
        if self.received is None and self.take(number):
            self.received = number

    def _handle(self, number, _frame):
        if not self.take(number):
            return
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def _handle_late(self, number, _frame):
        if self.take(number):
            self._restore()
            signal.raise_signal(number)

    def _restore(self):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def __exit__(self, *_):
        if self.received is None:
            self._restore()
            return
        for number in STOPPING:
            signal.signal(number, self._handle_late)


@contextlib.contextmanager
def passed_on(send: Callable[[int], None]) -> Generator[list[int]]:
    """Within the block call ``send(number)`` for every SIGTERM and SIGINT (``PASSED_ON``); yields those that came."""
    received: list[int] = []

    def handle(number, _frame):
        received.append(number)
        if number in PASSED_ON:
            send(number)

    old = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def exit_status(status: int, received: list[int]) -> int:
    """Status of a parent whose child ended with ``status`` (negative: by that signal) after the signals ``received``.

    After a signal, 1 and an end by a signal become 128 + its number: torchrun ends with 1 whatever its workers return,
    a process that was still being started with a traceback. What a job chose itself stays, such as 2 on a full disk.
    """
    if received and (status == 1 or status < 0):
        return 128 + received[0]
    return status if status >= 0 else 128 - status
