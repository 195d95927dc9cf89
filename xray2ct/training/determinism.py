"""``--deterministic``: torch's deterministic algorithms, and the names of operations that have none."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Generator

import torch

NO_DETERMINISTIC_VERSION = re.compile(r"^(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def deterministic(enabled: bool = True) -> Generator[list[str]]:
    """Use torch's deterministic algorithms within the block; what was set before comes back.

    ``torch.use_deterministic_algorithms``, no cuDNN benchmark, ``CUBLAS_WORKSPACE_CONFIG`` (has to be set before the
    first product on a GPU). Operations without a deterministic version run as they are: yields the list that their
    names are put into (such as ``upsample_trilinear3d_backward_out_cuda``), and prints them once at the end. On one
    machine a run that names none repeats bit for bit; on a CPU that is so without the switch.
    """
    unsafe: list[str] = []
    if not enabled:
        yield unsafe
        return
    cudnn, name = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags, variable = (cudnn.benchmark, cudnn.deterministic), os.environ.get(name)
    os.environ.setdefault(name, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with _collected(unsafe):
            yield unsafe
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, cudnn.deterministic = flags
        if variable is None:
            os.environ.pop(name, None)
        if unsafe:
            print(f"note: without a deterministic version: {', '.join(unsafe)}; a repeated run may differ", flush=True)


@contextlib.contextmanager
def _collected(names: list[str]):
    """Torch's warnings on operations without a deterministic version become entries of ``names``."""
    show = warnings.showwarning

    def collect(message, *args, **kwargs):
        match = NO_DETERMINISTIC_VERSION.match(str(message))
        if match is None:
            show(message, *args, **kwargs)
        elif match[1] not in names:
            names.append(match[1])

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=NO_DETERMINISTIC_VERSION.pattern)
        warnings.showwarning = collect
        yield
