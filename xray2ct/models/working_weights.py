"""Weights in autocast's dtype, cast together once a step instead of one by one at each call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable

Layer = TypeVar("Layer", bound=nn.Module)
Place = tuple[nn.Module, str]  # a parameter by its module and its name there


def full_precision(layer: Layer) -> Layer:
    """Mark a layer that computes in float32 under autocast, too: its weights are never cast."""
    layer.__dict__["full_precision"] = True
    return layer


def castable(*modules: nn.Module) -> dict[Place, nn.Parameter]:
    """Float32 parameters of modules and their parts, without those of layers marked :func:`full_precision`."""
    return {
        (part, name): parameter
        for module in modules
        for part in module.modules()
        if not getattr(part, "full_precision", False)
        for name, parameter in part._parameters.items()
        if parameter is not None and parameter.dtype == torch.float32
    }


def cast_weights_(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep :func:`castable` weights in ``dtype`` for good: for inference under autocast, which then casts none."""
    for parameter in castable(module).values():
        parameter.data = parameter.data.to(dtype)
    return module


def with_cast_weights(function: Callable[..., Any], *modules: nn.Module) -> Callable[..., Any]:
    """``function`` with the weights of ``modules``, which it calls, cast to autocast's dtype, and so gradients back.

    Values as with autocast alone, which casts each weight, and each gradient, by a kernel of its own: hundreds a step.
    Here it is one operation for all of them. Functions called one after the other get their gradients one after the
    other, so that DistributedDataParallel still overlaps reduction and backward pass.
    """
    weights = {} if torch.compiler.is_compiling() else castable(*modules)  # a compiler fuses the casts by itself
    dtype = _autocast_dtype(next(iter(weights.values())).device.type) if weights else None
    if dtype is None:
        return function
    copies = dict(zip(weights, _Cast.apply(dtype, *weights.values())))

    def call(*inputs):
        with _in_place_of_parameters(copies):
            return function(*inputs)

    return call


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of an autocast that is on and reduces precision, else None."""
    if not torch.is_autocast_enabled(device_type):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return None if dtype == torch.float32 else dtype


@contextlib.contextmanager
def _in_place_of_parameters(copies: dict[Place, torch.Tensor]) -> Iterator[None]:
    """What ``torch.func.functional_call`` does, for any function that calls the modules."""
    kept = {(module, name): module._parameters[name] for module, name in copies}
    try:
        for (module, name), copy in copies.items():
            module._parameters[name] = copy
        yield
    finally:
        for (module, name), parameter in kept.items():
            module._parameters[name] = parameter


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
