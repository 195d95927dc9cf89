"""Faults in the middle of a training, without touching its code: something happens at one call of the network."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

from torch.nn.modules.module import register_module_forward_hook


@contextlib.contextmanager
def at_forward(kind: type, call: int, action: Callable):
    """Call ``action(output)`` after the ``call``-th forward pass (from 1) of a training network of class ``kind``.

    What the action returns replaces the output, unless it is None.
    """
    calls = itertools.count(1)

    def hook(module, _inputs, output):
        return action(output) if isinstance(module, kind) and module.training and next(calls) == call else None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def raising(error: BaseException) -> Callable:
    """An action that raises ``error``."""

    def action(_output):
        raise error

    return action
