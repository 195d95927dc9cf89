"""Weights in autocast's dtype, cast together once a step instead of one by one at each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable

Layer = TypeVar("Layer", bound=nn.Module)


def full_precision(layer: Layer) -> Layer:
    """Mark a layer that computes in float32 under autocast, too: its weights are never cast."""
    layer.__dict__["full_precision"] = True
    return layer


def castable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Float32 parameters of a module and its parts by name, without those of layers marked :func:`full_precision`."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, part in module.named_modules()
        if not getattr(part, "full_precision", False)
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    }


def working_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype where it is on and reduced, else None."""
    if not torch.is_autocast_enabled(device_type):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return None if dtype == torch.float32 else dtype


def with_cast_weights(module: nn.Module) -> Callable[..., Any]:
    """A call of ``module`` with its weights cast to autocast's dtype in one operation, and so their gradients back.

    Values as with autocast alone, which casts each weight on its own, and each gradient: hundreds of small kernels a
    step. Modules called one after the other get their gradients one after the other, so that DistributedDataParallel
    still overlaps their reduction with the backward pass.
    """
    weights = {} if torch.compiler.is_compiling() else castable(module)  # a compiler fuses the casts by itself
    dtype = working_dtype(next(iter(weights.values())).device.type) if weights else None
    if dtype is None:
        return module
    copies = dict(zip(weights, _Cast.apply(dtype, *weights.values())))
    return lambda *inputs: torch.func.functional_call(module, copies, inputs, tie_weights=False)


def cast_weights_(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep :func:`castable` weights in ``dtype`` for good: for inference under autocast, which then casts none."""
    for parameter in castable(module).values():
        parameter.data = parameter.data.to(dtype)
    return module


class _Cast(torch.autograd.Function):
    """Float32 tensors -> copies in ``dtype``; gradients come back in float32. One foreach operation each way."""

    @staticmethod
    def forward(ctx, dtype, *weights):
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        there = [gradient for gradient in gradients if gradient is not None]
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in there]
        if there:
            torch._foreach_copy_(wide, there)
        left = iter(wide)
        return None, *(None if gradient is None else next(left) for gradient in gradients)
