"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MovingAverage:
    """Exponential moving average of a model's parameters, in a second model kept in eval mode.

    The decay grows as (1 + n) / (10 + n) up to its limit, so that early averages forget the start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        decay = min(self.decay, (1 + updates) / (10 + updates))
        ours, theirs = list(self.model.parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(ours, theirs, 1.0 - decay)
        for our, their in zip(self.model.buffers(), model.buffers()):
            our.copy_(their)
