"""Triton where it is installed and works: the decorator of the project's kernels, and a probe of a GPU.

The import takes half a second: a caller that may do without kernels imports this module when it is about to use one.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from xray2ct.files import InputError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def kernel(function):
    """``triton.jit``; without triton the function stays as it is, so that its module can be imported."""
    return triton.jit(function) if triton else function


def require_triton(what: str) -> None:
    """Raise :class:`InputError` saying that ``what`` needs triton where it is not installed."""
    if triton is None:
        raise InputError(f"{what} needs the package triton; run: pip install triton")


@kernel
def _copy(source, target):
    tl.store(target, tl.load(source))


@cache
def kernels_work(device: torch.device) -> bool:
    """Whether kernels can be built and run on a GPU: triton needs a C compiler there. Warns once where it has none."""
    if triton is None:
        return False
    source = torch.ones(1, device=device)
    target = torch.zeros_like(source)
    try:
        with torch.cuda.device_of(source):
            _copy[(1,)](source, target)
        return bool(target.item() == 1.0)
    except Exception as error:  # noqa: BLE001 - whatever a compiler, a driver or a version may say
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"Triton kernels do not run on {device}, slower ways are taken ({reason})", stacklevel=2)
        return False
