"""The patient cube: its affine, and resampling a CT to it.

Cubes are arrays ``(D, H, W)`` in the patient axes of :mod:`xray2ct.geometry.projector`.
"""

from __future__ import annotations

import numpy as np
import scipy

from xray2ct.conventions import AIR_HU, MAX_HU
from xray2ct.imaging.ct_checks import PADDING_BELOW_HU
from xray2ct.imaging.read_ct import CtImage

# ------------------------------------------------------------------------------------------------
# Resampling


def cube_affine(centre_mm, fov_mm: float, size: int) -> np.ndarray:
    """Affine (RAS mm) of the cube as stored on disk, axes (W, H, D) = (left, posterior, inferior)."""
    step = fov_mm / size
    affine = np.diag([-step, -step, -step, 1.0])
    affine[:3, 3] = np.asarray(centre_mm, dtype=np.float64) + step * (size - 1) / 2
    return affine


def resample_cube(ct: CtImage, centre_mm, fov_mm: float, size: int):
    """Resample a CT from its own affine to the patient cube around ``centre_mm`` (RAS mm).

    Returns ``(hu, mask)``, both ``(size, size, size)`` as (D, H, W): int16 HU in [-1024, 3071], and
    uint8, 1 inside the scan. Outside the scan, and where the scan is padded (below -1500), HU is -1024
    and the mask 0. Trilinear; source axes finer than the cube are low-pass filtered first, by the
    Gaussian that makes up the difference of the full widths at half maximum (Cardoso et al., MICCAI 2015).
    """
    to_world = cube_affine(centre_mm, fov_mm, size)[:, [2, 1, 0, 3]]  # columns for (d, h, w)
    return resample(ct, to_world, (size, size, size))


def resample(ct, to_world, shape):
    """``to_world``: 4 x 4 from output indices to RAS mm."""
    to_source = np.linalg.inv(ct.affine) @ to_world
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    source_mm = np.linalg.norm(ct.affine[:3, :3], axis=0)
    target_mm = np.linalg.norm(to_world[:3, :3], axis=0).min()
    ratio = target_mm / source_mm
    sigma = np.sqrt(np.maximum(ratio**2 - 1.0, 0.0) / (8.0 * np.log(2.0)))
    data, start = _crop(ct.data, matrix, offset, shape, margin=np.ceil(4 * sigma).astype(int) + 2)
    if data.size == 0:
        return np.full(shape, AIR_HU, np.int16), np.zeros(shape, np.uint8)

    def sample(values):
        for axis in range(3):
            if sigma[axis] > 0.1:
                values = scipy.ndimage.gaussian_filter1d(values, sigma[axis], axis=axis, mode="nearest", truncate=4.0)
        return scipy.ndimage.affine_transform(
            values, matrix, offset - start, output_shape=shape, order=1, mode="nearest", prefilter=False
        )

    inside = _inside(matrix, offset, shape, ct.data.shape)
    padding = data < PADDING_BELOW_HU
    if padding.any():
        inside &= sample((~padding).astype(np.float32)) >= 0.5
    hu = sample(np.clip(data, AIR_HU, MAX_HU).astype(np.float32))
    hu = np.where(inside, np.rint(hu), AIR_HU).astype(np.int16)
    return hu, inside.astype(np.uint8)


def _crop(data, matrix, offset, shape, margin):
    """The part of the source that the output grid touches, and its first index."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    index = corners @ matrix.T + offset
    low = np.clip(np.floor(index.min(axis=0)).astype(int) - margin, 0, data.shape)
    high = np.clip(np.ceil(index.max(axis=0)).astype(int) + margin + 1, 0, data.shape)
    return data[tuple(slice(a, b) for a, b in zip(low, high))], low


def _inside(matrix, offset, shape, source_shape):
    """Output voxels whose centre lies in a source voxel (a voxel reaches half a step beyond its centre)."""
    inside = np.ones(shape, dtype=bool)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    for axis in range(3):
        # Broadcasting: where the grids are parallel, an axis of the source depends on one of the cube alone.
        index = offset[axis] + sum(step * along for step, along in zip(matrix[axis], grid) if step)
        inside &= (index >= -0.501) & (index <= source_shape[axis] - 0.499)
    return inside


# ------------------------------------------------------------------------------------------------
# Body, lungs, couch


def area_average(volume: np.ndarray, factor: int) -> np.ndarray:
    """Mean over blocks of ``factor`` voxels per axis: ``(D, H, W)`` -> float32 ``(D/f, H/f, W/f)``."""
    if factor == 1:
        return volume.astype(np.float32)
    d, h, w = (n // factor for n in volume.shape)
    return volume.reshape(d, factor, h, factor, w, factor).mean(axis=(1, 3, 5), dtype=np.float32)
