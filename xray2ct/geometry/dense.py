"""Joseph's interpolation as dense matrix products: any device, and what is traced for export."""

from __future__ import annotations

import torch

from xray2ct.geometry.band import Band
from xray2ct.geometry.traced import made_once

CHUNK = 25_000_000  # values at once: bounds the temporaries to about 100 MB


def project(slabs: torch.Tensor, rows: Band, cols: Band) -> torch.Tensor:
    """Sum over slices of ``R_k S_k C_k^T``: slabs ``(B, K, D, C)``, float32 -> ``(B, rows.pixels, cols.pixels)``."""
    batch, count, depth = slabs.shape[:3]
    image = slabs.new_zeros(batch, depth if rows.alike else rows.pixels, cols.pixels)
    step = _slices_at_once(batch, rows, cols)
    for start in range(0, count, step):
        stop = min(start + step, count)
        partial = slabs[:, start:stop]
        if not rows.alike:
            partial = torch.matmul(_matrices(rows.part(start, stop), slabs), partial)  # (B, k, rows, C)
        partial = partial.transpose(1, 2).flatten(2)  # (B, rows, k C)
        image = image + partial @ _matrices(cols.part(start, stop), slabs).transpose(1, 2).flatten(0, 1)
    return _matrices(rows.part(0, 1), slabs)[0] @ image if rows.alike else image


def back_project(image: torch.Tensor, rows: Band, cols: Band, slabs: torch.Tensor) -> None:
    """Adjoint of :func:`project`: writes ``R_k^T G C_k`` to each slice k of ``slabs (B, K, D, C)``.

    image: ``(B, rows.pixels, cols.pixels)``, float32.
    """
    batch, count = slabs.shape[:2]
    step = _slices_at_once(batch, rows, cols)
    if rows.alike:
        image = _matrices(rows.part(0, 1), image)[0].T @ image
    for start in range(0, count, step):
        stop = min(start + step, count)
        partial = torch.matmul(image.unsqueeze(1), _matrices(cols.part(start, stop), image))  # (B, k, rows, C)
        if not rows.alike:
            partial = torch.matmul(_matrices(rows.part(start, stop), image).transpose(1, 2), partial)
        slabs[:, start:stop] = partial


def _matrices(band: Band, like: torch.Tensor) -> torch.Tensor:
    return made_once(Band.matrices, band, like.device)


def _slices_at_once(batch, rows, cols):
    if not isinstance(batch, int):  # a trace for any batch
        batch = 1
    per_slice = rows.pixels * rows.voxels + cols.pixels * cols.voxels
    return max(1, CHUNK // (per_slice + 2 * batch * max(rows.pixels, rows.voxels) * cols.voxels))
