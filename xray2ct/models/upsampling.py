"""Trilinear upsampling as three matrix products, where that is faster than torch's own kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F


def upsample_trilinear(x: torch.Tensor, size) -> torch.Tensor:
    """``(B, C, d, h, w)`` -> ``(B, C, *size)`` in the dtype of ``x``: ``F.interpolate`` without aligned corners.

    The interpolation factors over the axes into three products with small matrices. On a GPU that takes less time
    than torch's kernel, and its backward pass, unlike torch's, is deterministic. On a CPU torch's kernel is the
    faster one for channels-last features, and the slower one for volumes of one channel.
    """
    size = tuple(size)
    if tuple(x.shape[2:]) == size:
        return x
    if x.device.type == "cpu" and x.shape[1] > 1:
        return F.interpolate(x, size=size, mode="trilinear", align_corners=False)
    depth, height, width = (_matrix(have, want, x.device, x.dtype) for have, want in zip(x.shape[2:], size))
    volumes = x.shape[0] * x.shape[1]
    rows = volumes * x.shape[2]
    with torch.autocast(x.device.type, enabled=False):  # a volume stays in float32
        y = x.reshape(-1, x.shape[4]) @ width.T
        y = torch.bmm(height.expand(rows, -1, -1), y.view(rows, x.shape[3], size[2]))
        y = torch.bmm(depth.expand(volumes, -1, -1), y.view(-1, x.shape[2], size[1] * size[2]))
    return y.view(*x.shape[:2], *size)


def _matrix(have: int, want: int, device, dtype) -> torch.Tensor:
    """``(want, have)``: linear interpolation along one axis, constant beyond the outermost cell centres."""
    if torch.compiler.is_compiling():  # no cache: traced tensors belong to their trace
        return _interpolated_unit_vectors(have, want, device, dtype)
    return _cached_matrix(have, want, device, dtype)


@lru_cache(maxsize=64)
def _cached_matrix(have, want, device, dtype):
    # Outside inference mode, so that cached matrices can also be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        return _interpolated_unit_vectors(have, want, device, dtype)


def _interpolated_unit_vectors(have, want, device, dtype):
    identity = torch.eye(have, device=device)[None]
    return F.interpolate(identity, size=want, mode="linear", align_corners=False)[0].T.contiguous().to(dtype)
