"""Weights that a trace for export makes once, however often a network renders with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

_made: dict | None = None  # by function and arguments; None outside of a trace


@contextlib.contextmanager
def each_made_once():
    """Within this context :func:`made_once` keeps what it makes: for a trace, which traced tensors belong to."""
    global _made
    _made = {}
    try:
        yield
    finally:
        _made = None


def made_once(make: Callable[..., torch.Tensor], *arguments) -> torch.Tensor:
    """``make(*arguments)``; within :func:`each_made_once` the tensor of the first call with equal arguments.

    Elsewhere nothing is kept: weights take memory, and are made in no time.
    """
    if _made is None:
        return make(*arguments)
    key = (make, *arguments)
    if key not in _made:
        _made[key] = make(*arguments)
    return _made[key]
