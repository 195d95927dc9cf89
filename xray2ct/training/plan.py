"""Which sample each process takes at each step of an epoch, with which seed and learning rate."""

from __future__ import annotations

import math

import torch

from xray2ct.files import InputError
from xray2ct.training.distributed import Processes

WARMUP_SHARE = 0.05  # of a run's minutes after which its warm-up has ended, however few its steps were


def learning_rate_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, minimum_ratio: float, share: float = 0.0
) -> float:
    """Linear warm-up from 0, then a cosine to ``minimum_ratio * peak`` (Loshchilov and Hutter, 2017).

    share: of the run's minutes that have passed (:class:`clock.RunClock`); 0 where it has no limit. Warm-up and cosine
    are as far as their steps are, or their share of the minutes where that is more: a run that its limit ends before
    ``total_steps`` has its cosine finished.
    """
    if step < warmup_steps and share < WARMUP_SHARE:
        return max(peak * (step + 1) / warmup_steps, peak * share / WARMUP_SHARE)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    progress = max(progress, (share - WARMUP_SHARE) / (1.0 - WARMUP_SHARE))
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * (minimum_ratio + (1.0 - minimum_ratio) * cosine)


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """Seed of one sample's augmentation: the same whichever process draws it."""
    return ((seed * 1_000_003 + epoch) * 1_000_003 + position) % (2**63 - 1)


class EpochPlan:
    """Which samples each process takes at each step of an epoch.

    Patients are repeated ``repeats`` times, shuffled by (seed, epoch) and padded from the front to
    whole global batches; step s takes positions ``[s G, (s + 1) G)``, split over accumulation and ranks. How many of
    its samples a process computes at once (``micro_batch``, a divisor of its share) does not change which they are.
    """

    def __init__(
        self, patients: int, repeats: int, batch_size: int, accumulation: int, processes: Processes, seed: int
    ):
        self.count, self.repeats, self.batch_size = patients, repeats, batch_size
        self.accumulation, self.processes, self.seed = accumulation, processes, seed
        self.global_batch = batch_size * accumulation * processes.world_size
        self.steps = math.ceil(patients * repeats / self.global_batch)
        self.micro_batch = batch_size

    @property
    def share(self) -> int:
        """Samples of one process in each step."""
        return self.batch_size * self.accumulation

    @property
    def micro_batches(self) -> int:
        """How many this process computes one after the other in each step."""
        return self.share // self.micro_batch

    def order(self, epoch: int) -> list[int]:
        """Patient index at every position of the epoch."""
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, 0))
        order = torch.cat([torch.randperm(self.count, generator=generator) for _ in range(self.repeats)])
        padded = order.repeat(math.ceil(self.steps * self.global_batch / len(order)))
        return padded[: self.steps * self.global_batch].tolist()

    def batches(self, first_step: int) -> list[list[int]]:
        """Positions of this rank's micro-batches from ``first_step`` on."""
        batches = []
        for step in range(first_step, self.steps):
            share = self.positions(step)
            batches += [share[i : i + self.micro_batch] for i in range(0, self.share, self.micro_batch)]
        return batches

    def positions(self, step: int) -> list[int]:
        """Positions of this rank's samples in a step."""
        world, rank = self.processes.world_size, self.processes.rank
        groups = range(step * self.accumulation * world + rank, (step + 1) * self.accumulation * world, world)
        return [group * self.batch_size + i for group in groups for i in range(self.batch_size)]


def accumulation_steps(config, world_size: int) -> int:
    """Micro-batches per step that keep the configured global batch on ``world_size`` processes."""
    training = config.training
    wanted = training.batch_size * training.gradient_accumulation_steps * config.world_size
    per_round = training.batch_size * world_size
    if wanted % per_round:
        raise InputError(
            f"the global batch of {wanted} (training.batch_size x gradient_accumulation_steps x world_size)"
            f" cannot be made of {world_size} processes x {training.batch_size};"
            " change training.batch_size or world_size"
        )
    return wanted // per_round
