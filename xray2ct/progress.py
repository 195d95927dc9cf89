"""Progress of long work: a bar on a terminal, one line a minute elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 60.0  # between lines where there is no terminal

_quiet = False  # see be_quiet()


def be_quiet() -> None:
    """No bars and no lines of progress from now on in this process: ``--quiet``."""
    global _quiet
    _quiet = True


def is_quiet() -> bool:
    """Whether :func:`be_quiet` was called."""
    return _quiet


def progress_bar(iterable: Iterable | None = None, **options) -> Any:
    """``tqdm(iterable, **options)`` on a terminal, :class:`ProgressLines` elsewhere; neither after :func:`be_quiet`.

    Options: ``total``, ``desc``, ``unit``, ``initial``, ``leave``, ``disable``, ``unit_scale`` of tqdm. What is
    returned is iterable, has ``update(n)`` and ``close()``, and closes itself as a context manager.
    """
    if options.pop("disable", False) or _quiet:
        return tqdm(iterable, disable=True, total=options.get("total"))
    return tqdm(iterable, **options) if sys.stderr.isatty() else ProgressLines(iterable, **options)


class ProgressLines:
    """What a log file can hold of a progress bar: a line every ``LINE_SECONDS``, none for what takes less.

    clock: seconds that only grow. stream: where the lines go.
    """

    def __init__(
        self,
        iterable: Iterable | None = None,
        total: float | None = None,
        desc: str = "",
        unit: str = "it",
        initial: float = 0,
        unit_scale: bool = False,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
        **_options,
    ):
        self.iterable, self.desc, self.unit, self.n, self.initial = iterable, desc, unit, initial, initial
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.clock, self.stream, self.started = clock, stream, clock()
        self.number = tqdm.format_sizeof if unit_scale else "{:.0f}".format
        self.printed = self.started

    def __iter__(self) -> Iterator:
        for item in self.iterable or ():
            yield item
            self.update()

    def update(self, n: float = 1) -> None:
        """``n`` more are done."""
        self.n, now = self.n + n, self.clock()
        if now - self.printed >= LINE_SECONDS:
            self.printed = now
            print(self._line(now - self.started), file=self.stream or sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        whole = "" if self.total is None else f" of {self.number(self.total)}"
        text = f"{self.desc}: {self.number(self.n)}{whole} {self.unit} in {duration(seconds)}"
        done = self.n - self.initial
        if self.total is None or done <= 0:
            return text
        return f"{text}, {duration(seconds / done * (self.total - self.n))} left"

    def set_postfix(self, *_, **__) -> None:
        """Numbers beside a bar; lines have none."""

    def close(self) -> None:
        """Nothing is left to do."""

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Seconds in words, in the two largest units: ``40 s``, ``12 min``, ``1 h 12 min``, ``3 days 4 h``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if days < 10 else f"{days} days"
