"""Joseph's interpolation as dense matrix products: any device, and what is traced for export."""

from __future__ import annotations

import torch

from xray2ct.geometry.band import Band

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
            partial = torch.matmul(rows.part(start, stop).matrices(slabs.device), partial)  # (B, k, rows, C)
        partial = partial.transpose(1, 2).flatten(2)  # (B, rows, k C)
        image = image + partial @ cols.part(start, stop).matrices(slabs.device).transpose(1, 2).flatten(0, 1)
    return rows.part(0, 1).matrices(slabs.device)[0] @ image if rows.alike else image


def back_project(image: torch.Tensor, rows: Band, cols: Band, slabs: torch.Tensor) -> None:
    """Adjoint of :func:`project`: writes ``R_k^T G C_k`` to each slice k of ``slabs (B, K, D, C)``.

    image: ``(B, rows.pixels, cols.pixels)``, float32.
    """
    batch, count = slabs.shape[:2]
    step = _slices_at_once(batch, rows, cols)
    if rows.alike:
        image = rows.part(0, 1).matrices(image.device)[0].T @ image
    for start in range(0, count, step):
        stop = min(start + step, count)
        partial = torch.matmul(image.unsqueeze(1), cols.part(start, stop).matrices(image.device))  # (B, k, rows, C)
        if not rows.alike:
            partial = torch.matmul(rows.part(start, stop).matrices(image.device).transpose(1, 2), partial)
        slabs[:, start:stop] = partial


def _slices_at_once(batch, rows, cols):
    if not isinstance(batch, int):  # a trace for any batch
        batch = 1
    per_slice = rows.pixels * rows.voxels + cols.pixels * cols.voxels
    return max(1, CHUNK // (per_slice + 2 * batch * max(rows.pixels, rows.voxels) * cols.voxels))
