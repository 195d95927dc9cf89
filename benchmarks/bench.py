"""Measuring on a device until a deadline, one figure at a time."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from xray2ct.training.precision import Precision


class Bench:
    """Where, how large and how long to measure; what was measured, in ``rows``.

    device: torch's. small: tiny sizes. seconds: from now to the deadline. output: file of JSON lines, or None.
    """

    def __init__(self, device: torch.device, small: bool, seconds: float, output: Path | None = None):
        self.device, self.small, self.output = device, small, output
        self.deadline = time.monotonic() + seconds
        self.precision = Precision("auto", device)
        self.rows: list[dict] = []

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def pick(self, full, small):
        """One of two sets of sizes."""
        return small if self.small else full

    def record(self, **row) -> None:
        self.rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def measure(self, part: str, what: str, batch: int, function, budget_seconds: float = 1.0) -> None:
        """Record the median time of ``function()``, which handles ``batch`` samples: 2 to 10 calls after two others.

        Of tiny sizes that of the second call: their times are of no use.
        """
        if self.seconds_left <= 0:
            self.record(part=part, what=what, batch=batch, skipped="deadline")
            return
        try:
            self._run(function)  # compiles, allocates
            once = self._run(function)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            calls = 0 if self.small else max(2, min(10, int(budget_seconds / once)))
            times = [self._run(function) for _ in range(calls)] or [once]
        except (RuntimeError, ValueError) as error:  # out of memory, say: other cases still have something to say
            reason = (
                "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            )
            self.record(part=part, what=what, batch=batch, error=reason)
            return
        seconds = statistics.median(times)
        self.record(
            part=part,
            what=what,
            batch=batch,
            ms=round(1e3 * seconds, 2),
            samples_per_second=round(batch / seconds, 2),
            **self.peak(),
        )

    def peak(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"peak_gib": round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)}

    def _run(self, function) -> float:
        self._synchronise()
        start = time.perf_counter()
        function()
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
