"""Joseph's interpolation as Triton kernels: each pixel, and each voxel of the adjoint, is gathered in one pass.

Forward, a program has a tile of pixels and runs over the slices. The adjoint is a gather, too, since the weights are
separable hats: a voxel adds up the few pixels that read it. No atomic additions, so results repeat bit for bit, and
nothing but the result is stored. triton comes with torch for CUDA; TRITON_INTERPRET=1 runs the kernels on a CPU.
"""

from __future__ import annotations

import torch

from xray2ct.geometry.band import Band
from xray2ct.triton_kernels import kernel, require_triton, tl, triton

TILE = (16, 32)  # rows and columns of a program's pixels or voxels


def project(slabs: torch.Tensor, rows: Band, cols: Band) -> torch.Tensor:
    """Sum over slices of ``R_k S_k C_k^T``: slabs ``(B, K, D, C)``, float32 -> ``(B, rows.pixels, cols.pixels)``.

    Raises :class:`InputError` where triton is not installed.
    """
    require_triton("backend 'triton'")
    # Neighbouring threads take neighbouring columns, which must lie side by side in memory.
    slabs = slabs if slabs.stride(3) == 1 else slabs.contiguous()
    image = slabs.new_empty(len(slabs), rows.pixels, cols.pixels)
    grid = (triton.cdiv(rows.pixels, TILE[0]), triton.cdiv(cols.pixels, TILE[1]), len(slabs))
    with torch.cuda.device_of(slabs):
        _project[grid](slabs, image, *slabs.stride()[:3], rows.slices, *_numbers(rows), *_numbers(cols), *TILE)
    return image


def back_project(image: torch.Tensor, rows: Band, cols: Band, slabs: torch.Tensor) -> None:
    """Adjoint of :func:`project`: writes ``R_k^T G C_k`` to each slice k of ``slabs (B, K, D, C)``.

    image: ``(B, rows.pixels, cols.pixels)``, float32. Raises :class:`InputError` where triton is not installed.
    """
    require_triton("backend 'triton'")
    image = image.contiguous()
    made = slabs if slabs.stride(3) == 1 else torch.empty(slabs.shape, device=slabs.device)
    tiles = triton.cdiv(rows.voxels, TILE[0]) * triton.cdiv(cols.voxels, TILE[1])
    most = rows.most_pixels, cols.most_pixels
    with torch.cuda.device_of(image):
        _back_project[(tiles, rows.slices, len(slabs))](
            image, made, *made.stride()[:3], *most, *_numbers(rows), *_numbers(cols), *TILE
        )
    if made is not slabs:
        slabs.copy_(made)


def _numbers(band: Band) -> tuple[float, float, int, int]:
    return band.step, band.slope, band.pixels, band.voxels


@kernel
def _project(
    slabs, image, batch_stride, slice_stride, depth_stride, slices,
    row_step, row_slope, row_pixels, row_voxels, col_step, col_slope, col_pixels, col_voxels,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tl.program_id(1) * TILE_COLS + tl.arange(0, TILE_COLS)
    from_middle_row = row - 0.5 * (row_pixels - 1)
    from_middle_col = col - 0.5 * (col_pixels - 1)
    total = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    volume = slabs + batch * batch_stride
    for k in range(slices):
        at_row = 0.5 * (row_voxels - 1) + (row_step + row_slope * k) * from_middle_row
        at_col = 0.5 * (col_voxels - 1) + (col_step + col_slope * k) * from_middle_col
        i, j = tl.floor(at_row).to(tl.int32), tl.floor(at_col).to(tl.int32)
        low_row, low_col = (at_row - i)[:, None], (at_col - j)[None, :]  # weights of the next voxel
        here = volume + k * slice_stride + i[:, None] * depth_stride + j[None, :]
        up, down = ((i >= 0) & (i < row_voxels))[:, None], ((i >= -1) & (i < row_voxels - 1))[:, None]
        left, right = ((j >= 0) & (j < col_voxels))[None, :], ((j >= -1) & (j < col_voxels - 1))[None, :]
        above = tl.load(here, up & left, 0.0) * (1 - low_col) + tl.load(here + 1, up & right, 0.0) * low_col
        here += depth_stride
        below = tl.load(here, down & left, 0.0) * (1 - low_col) + tl.load(here + 1, down & right, 0.0) * low_col
        total += above * (1 - low_row) + below * low_row
    inside = (row < row_pixels)[:, None] & (col < col_pixels)[None, :]
    place = batch * row_pixels * col_pixels + row[:, None] * col_pixels + col[None, :]
    tl.store(image + place, total, inside)


@kernel
def _back_project(
    image, slabs, batch_stride, slice_stride, depth_stride, most_rows, most_cols,
    row_step, row_slope, row_pixels, row_voxels, col_step, col_slope, col_pixels, col_voxels,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(col_voxels, TILE_COLS)
    k, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = (tl.program_id(0) // tiles) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    c = (tl.program_id(0) % tiles) * TILE_COLS + tl.arange(0, TILE_COLS)
    row_step, col_step = row_step + row_slope * k, col_step + col_slope * k
    middle_row, middle_col = 0.5 * (row_pixels - 1), 0.5 * (col_pixels - 1)
    from_middle_d, from_middle_c = d - 0.5 * (row_voxels - 1), c - 0.5 * (col_voxels - 1)
    first_row = tl.floor((from_middle_d - 1) / row_step + middle_row).to(tl.int32)
    first_col = tl.floor((from_middle_c - 1) / col_step + middle_col).to(tl.int32)
    picture = image + batch * row_pixels * col_pixels
    total = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    for i in range(most_rows):
        row = first_row + i
        row_weight = 1 - tl.abs(row_step * (row - middle_row) - from_middle_d)
        row_inside = (row >= 0) & (row < row_pixels) & (row_weight > 0)
        line = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
        for j in range(most_cols):
            col = first_col + j
            col_weight = 1 - tl.abs(col_step * (col - middle_col) - from_middle_c)
            inside = row_inside[:, None] & ((col >= 0) & (col < col_pixels) & (col_weight > 0))[None, :]
            value = tl.load(picture + row[:, None] * col_pixels + col[None, :], inside, 0.0)
            line += value * col_weight[None, :]
        total += line * row_weight[:, None]
    place = batch * batch_stride + k * slice_stride + d[:, None] * depth_stride + c[None, :]
    tl.store(slabs + place, total, (d < row_voxels)[:, None] & (c < col_voxels)[None, :])
