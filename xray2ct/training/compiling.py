"""torch.compile for training: of the repeated blocks or of the whole network, where this machine has a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xray2ct.models.blocks import RRDB, ResidualBlock

# Blocks of one class share their code, and each number of channels and resolution is compiled for itself.
SHAPES_OF_A_BLOCK = 64


def compiled(model: nn.Module, mode: bool | str, device: torch.device, say=print, backend: str = "inductor") -> Any:
    """What to call instead of ``model`` in training, with the same parameters and ``state_dict``.

    mode: False: ``model`` itself. "blocks": its :class:`ResidualBlock` and :class:`RRDB` instances are compiled where
    they stand (regional compilation: blocks that are alike are compiled once; about half the time to compile of the
    whole, most of the gain). "model" or True: all of it. "graphs": all of it, its kernels launched as CUDA graphs, for
    inputs of one shape; results then stay valid until the next call alone. What was compiled is kept on disk
    (TORCHINDUCTOR_CACHE_DIR), so that the next start does not compile again. Without a working compiler ``say`` gets
    one line, and nothing is compiled. backend: of torch.compile; tests take one that needs no compiler.
    """
    if not mode:
        return model
    problem = compiler_problem(device, backend)
    if problem is not None:
        say(f"note: training.compile is off: no working compiler for {device.type} here ({problem})")
        return model
    if mode != "blocks":
        return torch.compile(model, backend=backend, mode="reduce-overhead" if mode == "graphs" else None)
    torch._dynamo.config.recompile_limit = max(SHAPES_OF_A_BLOCK, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, ResidualBlock | RRDB):
            module.compile(dynamic=False, backend=backend)
    return model


def compiler_problem(device: torch.device, backend: str = "inductor") -> str | None:
    """Why torch.compile does not work on ``device`` here; None where it does."""
    try:
        torch.compile(lambda x: x.sin() + 1.0, backend=backend)(torch.ones(16, device=device))
    except Exception as error:  # noqa: BLE001 - the compilers' errors share no class: missing, broken, without headers
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
