"""Smooth warps of volumes: an affine map and displaced control points, sampled without holding a grid of all voxels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


def unit_volumes(volumes: torch.Tensor) -> torch.Tensor:
    """Float32 volumes in [0, 1] from uint16 ones (65535 = 1) or floating point."""
    return volumes.float().div_(65535.0) if volumes.dtype == torch.uint16 else volumes.float()


class DensityChange(NamedTuple):
    """Density (HU + 1000) of everything that is not air, stretched and shifted, as scanners and contrast agents do.

    stretch, offset: ``(B, 1, 1, 1, 1)``; the stretch minus 1, and the offset in units of the HU window, which fades out
    below -500 HU: air stays air. air: its value in the window.
    """

    stretch: torch.Tensor
    offset: torch.Tensor
    air: float

    def __call__(self, volumes: torch.Tensor) -> torch.Tensor:
        """Changed volumes ``(B, 1, D, H, W)`` in [0, 1]."""
        density = (volumes - self.air).clamp_min_(0.0)
        changed = torch.addcmul(volumes, density, self.stretch)
        return changed.addcmul_(density.mul_(5.0).clamp_max_(1.0), self.offset).clamp_(0.0, 1.0)


def _kernel(device: torch.device) -> Callable | None:
    """:func:`warp_triton.warp` where it works: on a GPU with triton."""
    if device.type != "cuda":
        return None
    from xray2ct.triton_kernels import kernels_work

    if not kernels_work(device):
        return None
    from xray2ct.data import warp_triton

    return warp_triton.warp


class SmoothWarp:
    """Where each voxel of a warped batch is read: an affine map of its place, plus an interpolated displacement.

    theta: ``(B, 3, 4)`` as ``affine_grid`` takes it with ``align_corners=False`` (x, y, z = W, H, D; the cube is
    [-1, 1]; output -> input). displacement: ``(B, n, n, n, 3)`` in the same units, of n control points along D, H and W
    from the first voxel to the last (see :func:`control_weights`), components (x, y, z); None for none.
    shape: (D, H, W) of the volumes. anatomy: ``(B, 3, m, m, m)``, another displacement (x, y, z) at m points along D, H
    and W from face to face, which is made first: the volume is read at p + anatomy(p), p being the place that theta and
    displacement give. It is taken at m control points and interpolated between them as the other one is.

    All are trilinear expansions of control points, because these keep linear functions: three small matrix products
    make the grid of any part of the volume, and volumes are sampled once.
    """

    def __init__(
        self, theta: torch.Tensor, displacement: torch.Tensor | None, shape, anatomy: torch.Tensor | None = None
    ):
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
        self.anatomy = None if anatomy is None else self._in_place(anatomy)  # (B, m, m, m, 3), at control points

    def _in_place(self, anatomy: torch.Tensor) -> torch.Tensor:
        """The displacement of the anatomy where each of its control points is read."""
        shares = control_weights(self.nodes.shape[1], anatomy.shape[-1], anatomy.device)
        rows, columns = _spread(self.nodes, [shares] * 3)
        places = (rows @ _three(columns)).unflatten(-1, (-1, 3))
        moved = F.grid_sample(anatomy, places, align_corners=True, padding_mode="border")
        return moved.permute(0, 2, 3, 4, 1)

    def sample(self, volumes: torch.Tensor, density: DensityChange) -> torch.Tensor:
        """Volumes ``(B, 1, D, H, W)``, uint16 or float32, warped and changed: float32 in [0, 1], zero outside."""
        rows, columns = self.expanded()
        kernel = _kernel(volumes.device)
        if kernel is not None:
            return kernel(volumes, rows, columns, density)
        volumes, columns = unit_volumes(volumes), _three(columns)
        depth = self._slab(volumes.device)
        slabs = []
        for start in range(0, self.shape[0], depth):
            grid = (rows[:, start : start + depth] @ columns).unflatten(-1, (-1, 3))
            slabs.append(density(F.grid_sample(volumes, grid, align_corners=False)))
        return slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=2)

    def sample_cells(self, volumes: torch.Tensor, size) -> torch.Tensor:
        """The warped volumes at the centres of ``size`` equal cells, ``(B, 1, *size)``: for masks, which are coarse."""
        rows, columns = self.expanded(size)
        return F.grid_sample(volumes, (rows @ _three(columns)).unflatten(-1, (-1, 3)), align_corners=False)

    def expanded(self, cells=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Nodes expanded along D and H, ``(B, D, H, 3 n)``, and their shares along W, ``(n, W)``.

        For voxels, or for the centres of so many equal ``cells`` along D, H and W. n counts the points of both
        displacements: the expansion of one set of nodes and that of the other add up.
        """
        parts = []
        for nodes in (self.nodes, self.anatomy):
            if nodes is not None:
                weights = [control_weights(nodes.shape[1], n, nodes.device) for n in self.shape]
                if cells is not None:
                    weights = [averaged_to(w[None, :, None], (1, n))[0, :, 0] for w, n in zip(weights, cells)]
                parts.append(_spread(nodes, weights))
        rows, columns = zip(*parts)
        return torch.cat(rows, dim=-1), torch.cat(columns)

    def _slab(self, device: torch.device) -> int:
        """Planes of the grid that are made at a time."""
        _, height, width = self.shape
        plane = self.nodes.shape[0] * height * width * 3 * 4
        return max(1, SLAB_BYTES.get(device.type, LARGE_SLAB_BYTES) // plane)


def _spread(nodes: torch.Tensor, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes ``(B, n, n, n, 3)`` expanded along D and H, ``(B, D, H, 3 n)``, and the weights along W."""
    along_z, along_y, along_x = weights
    rows = (along_z.T @ nodes.flatten(2)).unflatten(-1, (nodes.shape[1], -1))  # (B, D, n, 3 n)
    return along_y.T @ rows, along_x


def _three(columns: torch.Tensor) -> torch.Tensor:
    """The matrix ``(3 n, 3 W)`` that expands three components at once."""
    return torch.kron(columns, torch.eye(3, device=columns.device))
