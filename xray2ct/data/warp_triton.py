"""The warp of a volume and its change of density as one Triton kernel: 16-bit volumes in, float32 volumes out.

Each program makes a tile of voxels of one plane: where they are read from, the eight voxels around that place, the
density. Nothing but the result is stored. triton comes with torch for CUDA; TRITON_INTERPRET=1 runs it on a CPU.
"""

from __future__ import annotations

import torch

from xray2ct.triton_kernels import kernel, require_triton, tl, triton

TILE = (4, 128)  # rows and columns of a program's voxels


def warp(volumes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, density) -> torch.Tensor:
    """Warped volumes ``(B, 1, D, H, W)`` float32 with changed density, zero outside.

    volumes: ``(B, 1, D, H, W)``, uint16 (65535 = 1) or float32. rows: ``(B, D, H, 3 n)`` float32, the places (x, y, z)
    of the control points, expanded along D and H. columns: ``(n, W)``, the share of each point in each column (see
    :meth:`warp.SmoothWarp.expanded`). density: :class:`warp.DensityChange`. Raises :class:`InputError` without triton.
    """
    require_triton("the warp's kernel")
    coded = volumes.dtype == torch.uint16
    source = volumes.contiguous().view(torch.int16) if coded else volumes.contiguous()
    batch, _, depth, height, width = volumes.shape
    made = torch.empty(volumes.shape, dtype=torch.float32, device=volumes.device)
    grid = (triton.cdiv(height, TILE[0]) * triton.cdiv(width, TILE[1]), depth, batch)
    with torch.cuda.device_of(volumes):
        _warp[grid](
            source, rows.contiguous(), columns.contiguous(), density.stretch, density.offset, made,
            float(density.air), len(columns), depth, height, width, coded, *TILE,
        )  # fmt: skip
    return made


@kernel
def _warp(
    source, rows, columns, stretch, offset, made, air, points, depth, height, width,
    CODED: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(width, TILE_COLS)
    plane, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) // tiles) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = (tl.program_id(0) % tiles) * TILE_COLS + tl.arange(0, TILE_COLS)
    x = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    y, z = x, x
    places = rows + ((batch * depth + plane) * height + row) * (3 * points)
    for point in range(points):
        share = tl.load(columns + point * width + col, col < width, 0.0)[None, :]
        x += tl.load(places + 3 * point, row < height, 0.0)[:, None] * share
        y += tl.load(places + 3 * point + 1, row < height, 0.0)[:, None] * share
        z += tl.load(places + 3 * point + 2, row < height, 0.0)[:, None] * share
    x, y, z = 0.5 * ((x + 1) * width - 1), 0.5 * ((y + 1) * height - 1), 0.5 * ((z + 1) * depth - 1)
    i, j, k = tl.floor(z).to(tl.int32), tl.floor(y).to(tl.int32), tl.floor(x).to(tl.int32)
    z, y, x = z - i, y - j, x - k  # weights of the next voxel along each axis
    volume = source + batch * depth * height * width
    value = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    for up in tl.static_range(2):
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                a, b, c = i + up, j + down, k + right
                weight = (z if up else 1 - z) * (y if down else 1 - y) * (x if right else 1 - x)
                inside = (a >= 0) & (a < depth) & (b >= 0) & (b < height) & (c >= 0) & (c < width)
                voxel = tl.load(volume + (a * height + b) * width + c, inside, 0)
                if CODED:  # unsigned, as signed integers
                    voxel = (voxel.to(tl.int32) & 0xFFFF).to(tl.float32) * (1.0 / 65535.0)
                value += weight * voxel
    above = tl.maximum(value - air, 0.0)
    value += above * tl.load(stretch + batch) + tl.minimum(5.0 * above, 1.0) * tl.load(offset + batch)
    value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    place = ((batch * depth + plane) * height + row)[:, None] * width + col[None, :]
    tl.store(made + place, value, (row < height)[:, None] & (col < width)[None, :])
