"""Joseph's interpolation as sparse sums: what a CPU does fastest, as each pixel reads two voxels of a row of hundreds.

A slice k of the cube, ``S_k (D, C)``, contributes ``R_k S_k C_k^T`` to the picture: ``R_k`` and ``C_k`` interpolate
along rows and columns and are banded. A product with one of them is a weighted sum of a few rows (taps) of a matrix, an
embedding bag; its adjoint is another one, over the few pixels that read a voxel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xray2ct.geometry.band import Band

CHUNK = 4_000_000  # values at once, so that temporaries stay in a CPU's cache


def _sum_rows(matrix: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out[i] = sum_j weight[i, j] * matrix[index[i, j]]``: matrix ``(n, features)`` -> ``(len(index), features)``."""
    return F.embedding_bag(index, matrix.contiguous(), per_sample_weights=weight, mode="sum")


def _per_slice(index, weight, size):
    """Taps ``(K, n, taps)`` within each slice of ``size`` -> ``(K n, taps)`` within the slices stacked."""
    offset = size * torch.arange(len(index), device=index.device)
    return (index + offset[:, None, None]).flatten(0, 1), weight.flatten(0, 1)


def _over_slices(index, weight, size):
    """Taps ``(K, n, taps)`` -> ``(n, K taps)`` within the slices stacked: all slices add up."""
    offset = size * torch.arange(len(index), device=index.device)
    return (index + offset[:, None, None]).transpose(0, 1).flatten(1), weight.transpose(0, 1).flatten(1)


def project(slabs: torch.Tensor, rows: Band, cols: Band) -> torch.Tensor:
    """Sum over slices of ``R_k S_k C_k^T``: slabs ``(B, K, D, C)``, float32 -> ``(B, rows.pixels, cols.pixels)``."""
    if slabs.stride(3) == 1:  # whole rows of memory are gathered: rows first
        return _project(slabs, rows, cols).mT
    return _project(slabs.mT, cols, rows)


def _project(slabs, first, second):
    """slabs ``(B, K, first.voxels, second.voxels)`` -> ``(B, second.pixels, first.pixels)``."""
    batch, count = slabs.shape[:2]
    alike = second.alike  # one interpolation for all slices: after their sum
    total, step = 0, _slices_at_once(batch, first, second)
    for start in range(0, count, step):
        stop = min(start + step, count)
        taps = first.part(start, stop).taps(slabs.device)
        chunk = slabs[:, start:stop].permute(1, 2, 0, 3).reshape(-1, batch * second.voxels)
        if alike:
            total = total + _sum_rows(chunk, *_over_slices(*taps, first.voxels))  # (first pixels, B second voxels)
            continue
        chunk = _sum_rows(chunk, *_per_slice(*taps, first.voxels))  # (k first pixels, B second voxels)
        chunk = _swapped(chunk, first.pixels, second.voxels)
        total = total + _sum_rows(chunk, *_over_slices(*second.part(start, stop).taps(slabs.device), second.voxels))
    if alike:
        total = _sum_rows(
            _swapped(total, first.pixels, second.voxels),
            *_per_slice(*second.part(0, 1).taps(slabs.device), second.voxels),
        )
    return total.view(second.pixels, batch, first.pixels).transpose(0, 1)


def back_project(image: torch.Tensor, rows: Band, cols: Band, slabs: torch.Tensor) -> None:
    """Adjoint of :func:`project`: writes ``R_k^T G C_k`` to each slice k of ``slabs (B, K, D, C)``.

    image: ``(B, rows.pixels, cols.pixels)``, float32.
    """
    if slabs.stride(3) == 1:
        _back_project(image.mT, rows, cols, slabs)
    else:
        _back_project(image, cols, rows, slabs.mT)


def _back_project(image, first, second, slabs):
    """image ``(B, second.pixels, first.pixels)`` -> slabs ``(B, K, first.voxels, second.voxels)``."""
    batch, count = slabs.shape[:2]
    image = image.transpose(0, 1).reshape(second.pixels, -1)  # (second pixels, B first pixels)
    alike = second.alike
    if alike:
        image = _swapped(
            _sum_rows(image, *_per_slice(*second.part(0, 1).adjoint_taps(image.device), 0)), second.voxels, first.pixels
        )
    step = _slices_at_once(batch, first, second)
    for start in range(0, count, step):
        stop = min(start + step, count)
        chunk = image  # alike: (first pixels, B second voxels), read by all slices
        if not alike:
            chunk = _sum_rows(image, *_per_slice(*second.part(start, stop).adjoint_taps(image.device), 0))
            chunk = _swapped(chunk, second.voxels, first.pixels)  # (k first pixels, B second voxels)
        taps = first.part(start, stop).adjoint_taps(image.device)
        chunk = _sum_rows(chunk, *_per_slice(*taps, 0 if alike else first.pixels))
        slabs[:, start:stop] = chunk.view(-1, first.voxels, batch, second.voxels).permute(2, 0, 1, 3)


def _slices_at_once(batch, first, second):
    return max(1, CHUNK // (batch * second.voxels * (first.voxels + 2 * first.pixels)))


def _swapped(matrix, outer, inner):
    """``(k outer, B inner)`` -> ``(k inner, B outer)``."""
    batch = matrix.shape[1] // inner
    return matrix.view(-1, outer, batch, inner).permute(0, 3, 2, 1).reshape(-1, batch * outer)
