"""Upsampling as matrix products, one an axis: trilinear, and a cubic spline that keeps the area averages."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from xray2ct.autocast import without_autocast
from xray2ct.models.window import Window


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
    with without_autocast(x.device):  # a volume stays in float32
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


def upsample_spline(coarse: torch.Tensor, scale: int = 4, window: Window | None = None) -> torch.Tensor:
    """``(B, 1, D, H, W)`` -> ``(B, 1, scale D, scale H, scale W)``, float32: cubic, and consistent with ``coarse``.

    The cubic spline whose average over each coarse voxel's ``scale``^3 fine ones is that voxel's value, where
    trilinear interpolation blurs. Linear; not clamped: next to edges it leaves the range of ``coarse``.

    It is the limit of iterative back-projection (Irani and Peleg, CVGIP 53, 1991), which upsamples what the averages
    still lack and adds it, for interpolation in the space of cubic B-splines (Unser, IEEE Signal Process. Mag. 16,
    1999): all steps together are one matrix an axis. window: only this box of the coarse volume, as the same part of
    the whole, ``(windows, 1, ...)`` as of :meth:`Window.crop`; the spline sees all of ``coarse`` even so.
    """
    batch, _, *size = coarse.shape
    window = window or Window.whole(size)
    if len(window.origins) > 1:
        coarse = coarse.repeat_interleave(len(window.origins) // batch, 0)
    depth, height, width = (_window_rows(window, axis, scale, coarse.device) for axis in range(3))
    with without_autocast(coarse.device):  # a volume stays in float32
        y = coarse[:, 0].float() @ width.mT[:, None]
        y = height[:, None] @ y
        y = depth @ y.flatten(2)
    return y.view(coarse.shape[0], 1, *(scale * n for n in window.size))


def _window_rows(window: Window, axis: int, scale: int, device) -> torch.Tensor:
    """``(origins, scale size, full)``: the fine voxels of each window from all coarse ones, along one axis."""
    full, rows = window.full[axis], scale * window.size[axis]
    # Traced tensors belong to their trace: no cache then.
    make = _spline_rows if torch.compiler.is_compiling() else _cached_spline_rows
    whole = make(full, scale, device)
    return torch.stack([whole[scale * origin[axis] :][:rows] for origin in window.origins])


def _spline_rows(have: int, scale: int, device) -> torch.Tensor:
    """``(scale have, have)`` float32: cubic B-splines S at the fine voxels, times the inverse of their averages A S."""
    # Knots at the coarse centres; one more on either side is the outermost voxel mirrored at the volume's face.
    fine = (np.arange(scale * have) + 0.5) / scale - 0.5
    away = np.abs(fine[:, None] - np.arange(-2, have + 2))
    spline = np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, np.maximum(0, 2 - away) ** 3 / 6)
    mirrored = np.zeros((have + 4, have))
    knots = np.mod(np.arange(-2, have + 2), 2 * have)
    mirrored[np.arange(have + 4), np.where(knots < have, knots, 2 * have - 1 - knots)] = 1
    spline = spline @ mirrored
    averages = spline.reshape(have, scale, have).mean(axis=1)
    return torch.from_numpy((spline @ np.linalg.inv(averages)).astype(np.float32)).to(device)


@lru_cache(maxsize=16)
def _cached_spline_rows(have, scale, device):
    with torch.inference_mode(False):  # can also be saved for a backward pass
        return _spline_rows(have, scale, device)
