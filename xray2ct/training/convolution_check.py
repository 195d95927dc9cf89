"""Are this machine's reduced-precision 3D convolutions right? Compared with float32 before a run.

cuDNN 9.10 silently computed large bfloat16 Conv3d wrongly (pytorch issue 163539), and torch 2.13 on a CPU with AVX512
computes the weight gradient of small ones wrongly (3^3 kernel on 2^3 voxels).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

CPU_SIZE = 16  # see reduced_precision_defects()


@dataclass(frozen=True)
class Convolution:
    """One Conv3d as it is called: weight (O, I / groups, k, k, k), input (B, I, D, H, W), and how."""

    weight: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    channels_last: bool

    def __str__(self) -> str:
        kernel = "x".join(str(n) for n in self.weight[2:])
        size = " x ".join(str(n) for n in self.shape)
        return f"{kernel} Conv3d {self.shape[1]} -> {self.weight[0]} channels on {size}"


def recorded_convolutions(run: Callable[[], object]) -> list[Convolution]:
    """The different Conv3d calls that ``run()`` makes, in the order of their first call, whatever network has them."""
    found: dict[Convolution, None] = {}

    def note(module, inputs):
        if isinstance(module, nn.Conv3d):
            x, weight = inputs[0], module.weight
            kept = weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
            how = (module.stride, module.padding, module.dilation, module.groups, kept)
            found[Convolution(tuple(weight.shape), tuple(x.shape), *how)] = None

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return list(found)


def convolution_defect(case: Convolution, dtype: torch.dtype, device, convolve=F.conv3d) -> str | None:
    """What is wrong with ``convolve`` in ``dtype`` on one case: output or a gradient, by how much; None if nothing.

    The same random numbers, representable in ``dtype``, go through ``convolve`` in ``dtype`` and ``F.conv3d`` in
    float32 (TF32 off): they may differ by the rounding of the result alone. Beyond 4 epsilon in the root mean square,
    or anywhere by a quarter of the values' own, it is a defect, as a value that is not finite.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape, scale=1.0):
        numbers = scale * torch.randn(shape, generator=generator, device=device)
        layout = torch.channels_last_3d if case.channels_last else torch.contiguous_format
        return numbers.to(dtype).contiguous(memory_format=layout)

    fan_in = case.weight[1] * case.weight[2] * case.weight[3] * case.weight[4]
    x, weight = draw(case.shape), draw(case.weight, fan_in**-0.5)
    with torch.autocast(torch.device(device).type, enabled=False):
        with torch.no_grad():
            gradient = draw(convolve(x, weight, None, *_how(case)).shape)
        found = _with_gradients(convolve, case, x, weight, gradient)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            wanted = _with_gradients(F.conv3d, case, x.float(), weight.float(), gradient.float())
    for name, ours, right in zip(("output", "input gradient", "weight gradient"), found, wanted):
        error = _relative_error(ours.float(), right, torch.finfo(dtype).eps)
        if error is not None:
            return f"{name} of a {case}: {error}"
    return None


def _how(case: Convolution) -> tuple:
    return case.stride, case.padding, case.dilation, case.groups


def _with_gradients(convolve, case, x, weight, gradient):
    """Output, gradient of the input and gradient of the weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        output = convolve(x, weight, None, *_how(case))
        return output.detach(), *torch.autograd.grad(output, (x, weight), gradient)


def _relative_error(found: torch.Tensor, wanted: torch.Tensor, epsilon: float) -> str | None:
    if not torch.isfinite(found).all():
        return "not finite"
    size = wanted.square().mean().sqrt().clamp_min(1e-12)
    difference = (found - wanted).abs_()
    mean = (difference.square().mean().sqrt() / size).item()
    worst = ((difference - 4 * epsilon * wanted.abs()).max() / size).item()
    if mean > 4 * epsilon or worst > 0.25:
        return f"differs from float32 by {mean:.2g} (root mean square), {worst:.2g} at most, of its size"
    return None


def reduced_precision_defects(run: Callable[[], object], dtype: torch.dtype, device, convolve=F.conv3d) -> list[str]:
    """Defects (:func:`convolution_defect`) of the Conv3d calls that ``run()`` makes; empty when all are right.

    A case that is too large for the memory that is free is tried with one sample, or left out with a note. On a CPU
    volumes are cut to ``CPU_SIZE`` voxels per axis: the defects known there are of small ones, large ones take minutes.
    """
    defects, cases = [], recorded_convolutions(run)
    if torch.device(device).type == "cpu":
        cases = dict.fromkeys(replace(c, shape=(*c.shape[:2], *(min(n, CPU_SIZE) for n in c.shape[2:]))) for c in cases)
    for case in cases:
        try:
            defect = _checked(case, dtype, device, convolve)
        except torch.OutOfMemoryError:
            print(f"note: {case}: not enough memory to compare {dtype} with float32", flush=True)
            continue
        if defect is not None:
            defects.append(defect)
    return defects


@functools.cache  # the same for every run of a process
def _checked(case: Convolution, dtype, device, convolve) -> str | None:
    with contextlib.suppress(torch.OutOfMemoryError):
        return convolution_defect(case, dtype, device, convolve)
    return convolution_defect(replace(case, shape=(1, *case.shape[1:])), dtype, device, convolve)
