"""Which sample each process takes at each step of an epoch, with which seed and learning rate."""

from __future__ import annotations

import math

import torch

from xray2ct.files import InputError
from xray2ct.training.distributed import Processes


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float, minimum_ratio: float) -> float:
    """Linear warm-up from 0, then a cosine to ``minimum_ratio * peak`` (Loshchilov and Hutter, 2017)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * (minimum_ratio + (1.0 - minimum_ratio) * cosine)


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """Seed of one sample's augmentation: the same whichever process draws it."""
    return ((seed * 1_000_003 + epoch) * 1_000_003 + position) % (2**63 - 1)


class EpochPlan:
    """Which samples each process takes at each step of an epoch.

    Patients are repeated ``repeats`` times, shuffled by (seed, epoch) and padded from the front to
    whole global batches; step s takes positions ``[s G, (s + 1) G)``, split over micro-batches and ranks.
    """

    def __init__(
        self, patients: int, repeats: int, batch_size: int, accumulation: int, processes: Processes, seed: int
    ):
        self.count, self.repeats, self.batch_size = patients, repeats, batch_size
        self.accumulation, self.processes, self.seed = accumulation, processes, seed
        self.global_batch = batch_size * accumulation * processes.world_size
        self.steps = math.ceil(patients * repeats / self.global_batch)

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
            for micro in range(self.accumulation):
                start = (
                    step * self.global_batch
                    + (micro * self.processes.world_size + self.processes.rank) * self.batch_size
                )
                batches.append(list(range(start, start + self.batch_size)))
        return batches


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
