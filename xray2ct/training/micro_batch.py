"""How many samples of a step a process computes at once: what is asked for, or what fits into the memory."""

from __future__ import annotations

from collections.abc import Callable

from xray2ct.files import InputError
from xray2ct.training.distributed import Processes


def divisors(share: int) -> list[int]:
    """Sizes of micro-batches into which ``share`` samples can be cut, ascending."""
    return [size for size in range(1, share + 1) if share % size == 0]


def wanted_micro_batch(wanted: int, share: int) -> int:
    """``training.micro_batch`` as it is set (0: not), which has to divide the ``share`` of a process in each step."""
    if wanted and share % wanted:
        sizes = ", ".join(str(size) for size in divisors(share))
        raise InputError(
            f"training.micro_batch is {wanted}; each process has {share} samples of a step: expected 0, or one of"
            f" {sizes}"
        )
    return wanted


def largest_fitting(share: int, fits: Callable[[int], bool], processes: Processes) -> int:
    """The largest divisor of ``share`` for which ``fits`` is true on every process; 1 when none does.

    ``fits(size)`` tries it on this process alone; every process tries the same sizes.
    """
    for size in reversed(divisors(share)):
        if size == 1 or not processes.any(not fits(size)):
            return size
    raise ValueError(f"a share of {share} samples; expected at least 1")
