"""Back-projection (unprojection) of 2D features: each voxel reads both views where it projects.

The forward projector's geometry, :class:`projector.Geometry`, decides where that is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from xray2ct.geometry.projector import Geometry, hat_weights


def lift_features(
    features: torch.Tensor,
    geometry: Geometry,
    volume_size=None,
    grid_mm=None,
) -> torch.Tensor:
    """Sample each view's feature map where every voxel projects; the two views stay apart.

    features: ``(B, 2, C, h, w)`` covering the whole detector.
    volume_size: ``(D, H, W)`` of a grid over the whole cube, or ``grid_mm``: three 1D tensors of
        voxel centres (z, y, x) in mm, for a crop of the cube.
    Returns ``(B, 2, C, D, H, W)`` in the dtype of ``features``; voxels that no detector pixel sees
    get zeros.

    Rows and columns of the bilinear interpolation factor for a fixed depth, so lifting is two
    matrix products; unlike ``grid_sample`` its backward pass is deterministic on a GPU.
    """
    _check_features(features)
    return _lift_views(features.unbind(1), geometry, volume_size, grid_mm)


def lift_pooled(features: torch.Tensor, geometry: Geometry, volume_size, grid_mm=None) -> torch.Tensor:
    """:func:`lift_features` without aliasing: where pixels are finer than voxels, their averages are sampled.

    Along each axis of a view with at least two pixels per voxel, pixels are averaged to as many cells as the cube
    has voxels there (:func:`pooled_to`). ``volume_size`` is always that of the whole cube; ``grid_mm`` picks voxels
    of it. Shapes as there.
    """
    _check_features(features)
    depth, height, width = volume_size
    views = [pooled_to(features[:, v], (depth, across)) for v, across in enumerate((width, height))]
    return _lift_views(views, geometry, volume_size, grid_mm)


def pooled_to(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Average maps ``(B, C, h, w)`` to ``size`` (rows, columns) along each axis with at least twice as many pixels."""
    return averaged_to(maps, [want if have >= 2 * want else have for have, want in zip(maps.shape[-2:], size)])


def averaged_to(x: torch.Tensor, size) -> torch.Tensor:
    """Average ``(B, C, *axes)`` over equal cells, ``size`` of them along the two or three axes, none finer than ``x``.

    Cells span the same extent as the pixels, whatever the ratio: a pixel that lies in two cells counts in both by
    its share. (Torch's adaptive pooling lets it count in both fully, its plain pooling drops the remainder.)
    """
    size = tuple(size)
    if any(cells > pixels for cells, pixels in zip(size, x.shape[2:])):
        raise ValueError(f"{tuple(x.shape[2:])} pixels cannot be averaged to {size} cells; expected at most as many")
    axes = range(2, x.ndim)
    for axis, cells in zip(axes, size):
        if x.shape[axis] % cells:
            shares = _area_shares(x.shape[axis], cells, x.device).to(x.dtype)
            with torch.autocast(x.device.type, enabled=False):
                x = (x.movedim(axis, -1) @ shares.T).movedim(-1, axis)
    if tuple(x.shape[2:]) == size:
        return x
    pool = F.avg_pool2d if len(size) == 2 else F.avg_pool3d
    return pool(x, tuple(x.shape[axis] // cells for axis, cells in zip(axes, size)))


def _area_shares(pixels: int, cells: int, device) -> torch.Tensor:
    """``(cells, pixels)``: the share of each pixel in each of ``cells`` larger cells; rows sum to 1."""
    edges = torch.arange(cells + 1, device=device, dtype=torch.float64) * pixels / cells
    start = torch.arange(pixels, device=device, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
    return overlap.clamp_min(0.0) * (cells / pixels)


def _check_features(features):
    if features.ndim != 5 or features.shape[1] != 2:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (B, 2, C, h, w)")


def _lift_views(views, geometry, volume_size, grid_mm):
    """Both views' features ``(B, C, h, w)``, each of its own size -> ``(B, 2, C, D, H, W)``."""
    device = views[0].device
    if grid_mm is None and torch.compiler.is_compiling():  # no cache: traced tensors belong to their trace
        grid_mm = tuple(geometry.voxel_centres_mm(n, device=device) for n in volume_size)
    if grid_mm is None:
        size = tuple(volume_size)
        weights = [_lift_weights(geometry, v, size, tuple(x.shape[-2:]), device) for v, x in enumerate(views)]
    else:
        grid_mm = tuple(axis.to(device, torch.float32) for axis in grid_mm)
        weights = [_lift_weights_at(geometry, v, grid_mm, x.shape[-2:]) for v, x in enumerate(views)]
    return torch.stack([_lift_view(x, *weights[v], view=v) for v, x in enumerate(views)], dim=1)


def _lift_weights_at(geometry, view, grid_mm, feature_size):
    """Rows ``(K, D, h)`` and columns ``(K, C, w)`` for the K depths of a view; C runs across the view."""
    z_mm, y_mm, x_mm = grid_mm
    depth_mm, across_mm = (y_mm, x_mm) if view == 0 else (x_mm, y_mm)
    v_mm = geometry.row_magnification(view, depth_mm)[:, None] * z_mm
    u_mm = geometry.magnification(view, depth_mm)[:, None] * across_mm
    rows = hat_weights(v_mm, geometry.detector_mm, feature_size[0])
    cols = hat_weights(u_mm, geometry.detector_mm, feature_size[1])
    return rows, cols


@lru_cache(maxsize=64)
def _lift_weights(geometry, view, volume_size, feature_size, device):
    # Outside inference mode, so that cached weights can also be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        grid = tuple(geometry.voxel_centres_mm(n, device=device, dtype=torch.float32) for n in volume_size)
        return _lift_weights_at(geometry, view, grid, feature_size)


def _lift_view(features, rows, cols, view):
    """features (B, C, h, w) -> (B, C, D, H, W) for one view."""
    batch, channels, height, width = features.shape
    depths, size_z, _ = rows.shape
    across = cols.shape[1]
    rows, cols = rows.to(features.dtype), cols.to(features.dtype)
    # Rows: every depth k and row d at once, one product.     (K D, h) x (h, B C w)
    sampled = rows.reshape(-1, height) @ features.permute(2, 0, 1, 3).reshape(height, -1)
    # Columns: one product per depth, on memory as it lies.    (K; D B C, w) x (K; w, A)
    lifted = torch.bmm(sampled.view(depths, -1, width), cols.transpose(1, 2))
    lifted = lifted.view(depths, size_z, batch, channels, across)
    if view == 0:  # depth is y, across is x
        return lifted.permute(2, 3, 1, 0, 4)
    return lifted.permute(2, 3, 1, 4, 0)
