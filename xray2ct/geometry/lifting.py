"""Back-projection (unprojection) of 2D features: each voxel reads both views where it projects.

The forward projector's geometry, :class:`projector.Geometry`, decides where that is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from xray2ct.autocast import without_autocast
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


def lift_view(maps: torch.Tensor, view: int, geometry: Geometry, volume_size, boxes=None) -> torch.Tensor:
    """:func:`lift_features` of one view, without aliasing: maps ``(B, C, h, w)`` -> ``(B, C, D, H, W)``.

    Along each axis with at least two pixels per voxel, pixels are averaged to as many cells as the cube has voxels
    there (:func:`pooled_to`). volume_size: ``(D, H, W)`` of the whole cube.

    boxes: ``(origins, size)`` in voxels, to lift to parts of the cube alone: ``[(z, y, x), ...]`` and one common size.
    One origin serves all maps; several are dealt to them in turn, ``(len(origins), C, *size)``. Each box reads the
    rows and columns that it projects to, and no other.
    """
    depth, height, width = volume_size
    maps = pooled_to(maps, (depth, width if view == 0 else height))
    if boxes is None:
        return _lift_view(maps, *_whole_weights(geometry, view, tuple(volume_size), maps), view)
    origins, size = boxes
    device, each = maps.device, len(origins) // maps.shape[0]
    # From pageable memory, but small: the copy does not wait for the device.
    index = torch.tensor(origins).T.to(device, non_blocking=True)
    grid_mm = [
        geometry.voxel_centres_mm(n, device=device)[first[:, None] + torch.arange(s, device=device)]
        for n, first, s in zip(volume_size, index, size)
    ]
    crop = _seen_pixels(geometry, view, volume_size, origins, size, maps.shape[-2:])
    (_, rows), (_, columns) = crop
    parts = [
        maps[i // each if len(origins) > 1 else slice(None), :, top : top + rows, left : left + columns]
        for i, (top, left) in enumerate(zip(crop[0][0], crop[1][0]))
    ]
    weights = [w.to(maps.dtype) for w in _lift_weights_at(geometry, view, grid_mm, maps.shape[-2:], crop)]
    if len(origins) == 1:
        return _lift_view(parts[0], *(w[0] for w in weights), view)
    return _lift_view(torch.stack(parts), *weights, view)


def _seen_pixels(geometry, view, volume_size, origins, size, feature_size):
    """First pixels ``[one per box]`` and their common number, for rows and for columns, that the boxes project to.

    Computed on the host, from the corners: a coordinate on the detector is extreme at one of them.
    """
    first = torch.tensor(origins, dtype=torch.float64)
    steps = [geometry.fov_mm / n for n in volume_size]
    ends = [
        torch.stack([(first[:, a] + 0.5) * step, (first[:, a] + s - 0.5) * step]) - geometry.fov_mm / 2
        for a, (step, s) in enumerate(zip(steps, size))
    ]
    z, y, x = ends[0][:, None, None], ends[1][None, :, None], ends[2][None, None]
    crop = []
    for places, pixels in zip(geometry.project(view, z, y, x), feature_size):
        pixel = (places / geometry.detector_mm + 0.5) * pixels - 0.5
        low = pixel.amin(dim=(0, 1, 2)).floor().long() - 1
        high = pixel.amax(dim=(0, 1, 2)).ceil().long() + 2
        count = min(pixels, max((high - low).tolist()))
        crop.append((low.clamp(0, pixels - count).tolist(), count))
    return crop


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
            with without_autocast(x.device):
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
    if grid_mm is None:
        weights = [_whole_weights(geometry, v, tuple(volume_size), x) for v, x in enumerate(views)]
    else:
        grid_mm = tuple(axis.to(views[0].device, torch.float32) for axis in grid_mm)
        weights = [_lift_weights_at(geometry, v, grid_mm, x.shape[-2:]) for v, x in enumerate(views)]
    lifted = [_lift_view(x, *(w.to(x.dtype) for w in weights[v]), view=v) for v, x in enumerate(views)]
    return torch.stack(lifted, dim=1)


def _lift_weights_at(geometry, view, grid_mm, feature_size, crop=None):
    """Rows ``(..., K, D, h)`` and columns ``(..., K, A, w)`` for the K depths of a view; A runs across the view.

    grid_mm: three tensors ``(..., n)`` of voxel centres. crop: see :func:`_seen_pixels`, of as many boxes as the grid.
    """
    z_mm, y_mm, x_mm = grid_mm
    depth_mm, across_mm = (y_mm, x_mm) if view == 0 else (x_mm, y_mm)
    v_mm = geometry.row_magnification(view, depth_mm)[..., None] * z_mm[..., None, :]
    u_mm = geometry.magnification(view, depth_mm)[..., None] * across_mm[..., None, :]
    weights = []
    for places_mm, pixels, part in zip((v_mm, u_mm), feature_size, crop or (None, None)):
        extent_mm, count = geometry.detector_mm, pixels
        if part is not None:
            first, count = part
            centres = [extent_mm * (n + 0.5 * (count - pixels)) / pixels for n in first]
            middle = torch.tensor(centres).to(places_mm.device, non_blocking=True)
            places_mm, extent_mm = places_mm - middle[:, None, None], extent_mm * count / pixels
        weights.append(hat_weights(places_mm, extent_mm, count))
    return weights


def _whole_weights(geometry, view, volume_size, maps):
    """Weights for the whole cube in the dtype of ``maps``, kept for the next step."""
    wanted = (geometry, view, volume_size, tuple(maps.shape[-2:]), maps.device, maps.dtype)
    return _lift_weights(*wanted) if torch.compiler.is_compiling() else _kept_lift_weights(*wanted)


def _lift_weights(geometry, view, volume_size, feature_size, device, dtype):
    grid = tuple(geometry.voxel_centres_mm(n, device=device, dtype=torch.float32) for n in volume_size)
    return [weights.to(dtype) for weights in _lift_weights_at(geometry, view, grid, feature_size)]


@lru_cache(maxsize=64)
def _kept_lift_weights(*wanted):
    # Outside inference mode, so that cached weights can also be saved for a backward pass.
    with torch.inference_mode(False), torch.no_grad():
        return _lift_weights(*wanted)


def _lift_view(features, rows, cols, view):
    """features (B, C, h, w) -> (B, C, D, H, W) for one view.

    rows ``(K, D, h)``, cols ``(K, A, w)``; or ``(B, K, D, h)``, ``(B, K, A, w)``: each sample has its own.
    """
    own = rows.ndim == 4
    groups = features if own else features.flatten(0, 1)[None]  # (G, M, h, w): maps that share their weights
    count, maps, height, width = groups.shape
    depths, size_z, _ = rows.shape[-3:]
    across = cols.shape[-2]
    # Rows: every depth k and row d at once, one product.     (K D, h) x (h, M w)
    sampled = rows.reshape(count, -1, height) @ groups.transpose(1, 2).reshape(count, height, -1)
    # Columns: one product per depth, on memory as it lies.    (G K; D M, w) x (G K; w, A)
    lifted = torch.bmm(sampled.view(count * depths, -1, width), cols.reshape(-1, across, width).transpose(1, 2))
    lifted = lifted.view(count, depths, size_z, maps, across)
    # Depth is y and across is x for the PA view; the other way round for the lateral one.
    lifted = lifted.permute(0, 3, 2, 1, 4) if view == 0 else lifted.permute(0, 3, 2, 4, 1)
    return lifted if own else lifted[0].unflatten(0, features.shape[:2])
