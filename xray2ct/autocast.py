"""Parts of a network that work in the dtype of their inputs, under autocast or not."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which operations on ``device`` keep the dtype of their inputs.

    Where no autocast is on there is nothing to switch off: an export would make a graph of its own of each such
    context, and a network has dozens of them.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
