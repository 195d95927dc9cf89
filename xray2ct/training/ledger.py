"""What training steps leave on the device until the host reads it: losses, gradient norms, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from xray2ct.training.distributed import Processes


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step.

    number: step in its epoch, from 1. losses: means over the micro-batches of all processes. own: losses of each
    micro-batch of this process; ids: its patients. norm: of the gradient before clipping, the same on every process.
    """

    number: int
    losses: dict[str, float]
    own: list[dict[str, float]]
    ids: list[list[str]]
    norm: float


class Ledger:
    """The steps since the last reading. Entering one makes no process and no device wait; :meth:`read` does, once."""

    def __init__(self):
        self._names: list[str] = []
        self._steps: list[tuple[int, list[list[str]], torch.Tensor, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def enter(
        self, number: int, ids: list[list[str]], losses: Sequence[Mapping[str, torch.Tensor]], norm: torch.Tensor
    ) -> None:
        """Note a step: patients and losses (0-d tensors, the same names in every step) of each micro-batch."""
        self._names = sorted(losses[0])
        rows = [torch.stack([micro[name].detach().float() for name in self._names]) for micro in losses]
        self._steps.append((number, ids, torch.stack(rows), norm.detach().float()))

    def read(self, processes: Processes, flags: Sequence[float] = ()) -> tuple[list[StepRecord], list[float]]:
        """The steps since the last call, and the mean over the processes of each of ``flags``.

        Every process has to call it after the same step: losses and flags travel in one reduction.
        """
        steps, self._steps = self._steps, []
        # From pageable memory the copy returns once the values are staged: nothing waits for the device.
        shared = torch.tensor(flags, dtype=torch.float32).to(processes.device, non_blocking=True)
        if not steps:
            return [], processes.mean(shared).tolist()
        own = torch.stack([values for *_, values, _ in steps])  # (steps, micro-batches, names)
        norms = torch.stack([norm for *_, norm in steps])
        shared = processes.mean(torch.cat([shared, own.mean(dim=1).flatten()]))
        values = torch.cat([shared, own.flatten(), norms]).tolist()  # the one wait for the device
        width, (_, micros, names) = len(flags), own.shape
        means = _rows(values[width : width + len(steps) * names], names)
        parts = _rows(_rows(values[width + len(steps) * names : -len(steps)], names), micros)
        records = [
            StepRecord(number, self._named(mean), [self._named(row) for row in part], ids, norm)
            for (number, ids, *_), mean, part, norm in zip(steps, means, parts, values[-len(steps) :])
        ]
        return records, values[:width]

    def _named(self, values: list[float]) -> dict[str, float]:
        return dict(zip(self._names, values))


def _rows(values: list, width: int) -> list[list]:
    return [values[start : start + width] for start in range(0, len(values), width)]
