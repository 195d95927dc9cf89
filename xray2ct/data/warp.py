"""Smooth warps of volumes: an affine map and displaced control points, sampled without holding a grid of all voxels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from xray2ct.geometry.lifting import averaged_to

# Bytes of the sampling grid at a time. On a CPU it then stays in the cache between being made and being used; on a GPU
# it only has to be small beside the volumes (201 MB each at 256^3 as a whole), and few kernels matter more.
SLAB_BYTES = {"cpu": 2**21}
LARGE_SLAB_BYTES = 2**29


def control_weights(points: int, size: int, device) -> torch.Tensor:
    """``(points, size)``: share of each control point in each sample along an axis, both from its first to its last.

    Two linear upsamplings, to ``2 points`` and to ``size``: the second one rounds the creases of the first. Columns
    sum to 1, and a linear function of the position stays one.
    """
    unit = torch.eye(points, device=device)[None]
    for samples in (2 * points, size):
        unit = F.interpolate(unit, size=samples, mode="linear", align_corners=True)
    return unit[0]


class SmoothWarp:
    """Where each voxel of a warped batch is read: an affine map of its place, plus an interpolated displacement.

    theta: ``(B, 3, 4)`` as ``affine_grid`` takes it with ``align_corners=False`` (x, y, z = W, H, D; the cube is
    [-1, 1]; output -> input). displacement: ``(B, n, n, n, 3)`` in the same units, of n control points along D, H and W
    from the first voxel to the last (see :func:`control_weights`), components (x, y, z); None for none.
    shape: (D, H, W) of the volumes.

    Both are one trilinear expansion of control points, because it keeps linear functions: three small matrix products
    make the grid of any part of the volume.
    """

    def __init__(self, theta: torch.Tensor, displacement: torch.Tensor | None, shape):
        self.shape = tuple(shape)
        points = 2 if displacement is None else displacement.shape[1]
        ends = [1.0 - 1.0 / size for size in self.shape]
        axes = [torch.linspace(-end, end, points, device=theta.device) for end in ends]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        places = torch.stack([x, y, z], dim=-1)[None, ..., None, :]  # (1, n, n, n, 1, 3)
        rows = theta[:, None, None, None]  # (B, 1, 1, 1, 3, 4)
        self.nodes = (rows[..., :3] * places).sum(-1) + rows[..., 3]
        if displacement is not None:
            self.nodes += displacement

    def sample(self, volumes: torch.Tensor, change: Callable = lambda slab: slab) -> torch.Tensor:
        """Volumes ``(B, 1, D, H, W)`` float warped, zero outside; ``change`` is called on each slab (B, 1, d, H, W)."""
        rows, columns = self._expanded([control_weights(self._points, n, volumes.device) for n in self.shape])
        depth = self._slab(volumes.device)
        slabs = []
        for start in range(0, self.shape[0], depth):
            grid = (rows[:, start : start + depth] @ columns).unflatten(-1, (-1, 3))
            slabs.append(change(F.grid_sample(volumes, grid, align_corners=False)))
        return slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=2)

    def sample_cells(self, volumes: torch.Tensor, size) -> torch.Tensor:
        """The warped volumes at the centres of ``size`` equal cells, ``(B, 1, *size)``: for masks, which are coarse."""
        weights = [control_weights(self._points, n, volumes.device) for n in self.shape]
        cells = [averaged_to(w[None, :, None], (1, n))[0, :, 0] for w, n in zip(weights, size)]
        rows, columns = self._expanded(cells)
        return F.grid_sample(volumes, (rows @ columns).unflatten(-1, (-1, 3)), align_corners=False)

    @property
    def _points(self) -> int:
        return self.nodes.shape[1]

    def _expanded(self, weights) -> tuple[torch.Tensor, torch.Tensor]:
        """Nodes expanded along D and H, ``(B, D, H, 3 n)``, and the matrix ``(3 n, 3 W)`` that expands them along W."""
        along_z, along_y, along_x = weights
        rows = (along_z.T @ self.nodes.flatten(2)).unflatten(-1, (self._points, -1))  # (B, D, n, 3 n)
        return along_y.T @ rows, torch.kron(along_x, torch.eye(3, device=along_x.device))

    def _slab(self, device: torch.device) -> int:
        """Planes of the grid that are made at a time."""
        _, height, width = self.shape
        plane = self.nodes.shape[0] * height * width * 3 * 4
        return max(1, SLAB_BYTES.get(device.type, LARGE_SLAB_BYTES) // plane)
