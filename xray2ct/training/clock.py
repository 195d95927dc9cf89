"""The clock of a run: its limit in minutes, how much of that has passed, how long the rest takes."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable


def minutes_limit(text: str) -> float:
    """Value of ``--max-minutes``: minutes, 0 for none; :class:`argparse.ArgumentTypeError` for anything else."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected minutes above 0, or 0 for no limit")
    return minutes


class RunClock:
    """Seconds of one run, over all of its starts, and its limit.

    minutes: ``--max-minutes``: 0 for no limit, None for that of the state the run goes on from (else no limit). now:
    seconds that only grow.

    :attr:`share` of the limit that has passed is what the processes of a run have agreed on (:meth:`agree`), and so is
    :attr:`validation`: the learning rate, validations and the last step are the same on all of them. Time for the last
    validation, as long as the one before, is kept back.
    """

    def __init__(self, minutes: float | None = None, now: Callable[[], float] = time.monotonic):
        self.minutes, self.now, self.began = minutes, now, now()
        self.earlier = 0.0  # seconds of earlier starts
        self.validation = 0.0  # seconds of the last validation
        self.share = 0.0
        self.stopped = False  # the limit has ended the run: its last epoch is validated and saved
        self.paced_from, self.pace_began, self.last_step = 0, self.began, self.began

    # -- the limit -------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Of all starts so far."""
        return self.earlier + self.now() - self.began

    @property
    def own_share(self) -> float:
        """Of the limit that has passed by this process's own clock; 0 without a limit."""
        if not self.minutes:
            return 0.0
        return self.seconds / (60 * self.minutes - self._kept_back)

    @property
    def _kept_back(self) -> float:
        """Seconds for the last validation: as many as the one before took, at most half of the limit."""
        return min(self.validation, 30 * (self.minutes or 0))

    def agree(self, share: float) -> None:
        """Take the share that all processes have agreed on."""
        self.share = share

    @property
    def over(self) -> bool:
        """Whether the limit's time has passed."""
        return self.share >= 1

    @property
    def last_validation_comes(self) -> bool:
        """Whether a validation now would leave no time for steps before the last one, and the cosine unfinished."""
        if not self.minutes or self.over:
            return False
        trained = 60 * self.minutes - self._kept_back
        return self.share * trained + self._kept_back >= trained

    def state(self) -> dict | None:
        """What a checkpoint keeps: None without a limit, so that equal runs leave equal files."""
        if not self.minutes:
            return None
        seconds = {"seconds": self.seconds, "validation_seconds": self.validation}
        return {"minutes": self.minutes, **seconds, "stopped": self.stopped}

    def load(self, state: dict | None) -> str | None:
        """Go on from :meth:`state`; returns a note where the limit changes, which changes the learning rate."""
        if state is None:
            return None
        self.earlier, self.validation, self.stopped = state["seconds"], state["validation_seconds"], state["stopped"]
        old, self.minutes = state["minutes"], state["minutes"] if self.minutes is None else self.minutes
        self.share = self.own_share
        if self.stopped or old == self.minutes:
            return None
        return f"the run is limited to {limit_words(self.minutes)} now, before to {limit_words(old)}"

    # -- the pace --------------------------------------------------------------------------------

    def start(self, updates: int) -> None:
        """Training begins, or goes on, after so many steps: the pace is measured from here."""
        self.paced_from, self.pace_began = updates, self.now()
        self.last_step = self.pace_began

    def second_step(self, updates: int) -> float | None:
        """Seconds of this start's second step, right after it; else None. The first one also takes memory."""
        before, self.last_step = self.last_step, self.now()
        return self.last_step - before if updates == self.paced_from + 2 else None

    def left(self, updates: int, total: int) -> float:
        """Seconds to the end of ``total`` steps at this start's pace, validations included, or to the limit."""
        steps = max(1, updates - self.paced_from)
        rest = (self.now() - self.pace_began) / steps * (total - updates)
        return min(rest, max(0.0, 60 * self.minutes - self.seconds)) if self.minutes else rest


def limit_words(minutes: float | None) -> str:
    """A limit in words."""
    return f"{minutes:g} minutes" if minutes else "its epochs"


def is_finished(state: dict, epochs: int) -> bool:
    """Whether a ``training_state`` is that of a run at its end: of its epochs, or of its minutes."""
    return state["epoch"] > epochs or bool((state.get("clock") or {}).get("stopped"))
