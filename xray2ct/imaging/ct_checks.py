"""Checks every CT passes whatever its format: size, shape, finite values, affine, Hounsfield units."""

from __future__ import annotations

import numpy as np

from xray2ct.files import InputError

PADDING_BELOW_HU = -1500  # scanners fill the area outside the reconstruction circle with -2000 to -32768
SPACING_RANGE_MM = (0.05, 20.0)
MAX_SCAN_MM = 3000.0
MAX_SCAN_LITRES = 4000.0  # a couch's length of the widest bore; what is located is sampled at COARSE_MM first
MAX_ORIGIN_MM = 1e5  # beyond it float32 affines lose millimetres
MAX_VOXELS = 2**31  # 1024 x 1024 x 2048
MAX_INFLATION = 1032  # bytes that one byte of deflate can become at most (zlib's technical details)


def check_claim(path, voxels: int, claimed: int, stored: int, inflation: int) -> None:
    """Before memory is taken: can a file of ``stored`` bytes hold ``claimed`` ones, and can that be a CT?"""
    check_voxels(path, voxels)
    if claimed > stored * inflation:
        raise InputError(
            f"{path}: not a readable NIfTI file, or truncated (the header speaks of {claimed} bytes,"
            f" a file of {stored} cannot hold them)"
        )


def check_voxels(path, voxels: int) -> None:
    if voxels > MAX_VOXELS:
        raise InputError(
            f"{path}: {voxels:.3g} voxels by its header; expected at most {MAX_VOXELS:.3g} (is it damaged?)"
        )


def check_shape(path, shape):
    shape = tuple(shape)
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 2:
        raise InputError(f"{path}: shape is {shape}; expected a 3D volume (one CT)")


def check_data(path, data):
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    check_shape(path, data.shape)
    if data.dtype.kind == "f":
        with np.errstate(over="ignore"):  # beyond float32 is infinity
            data = data.astype(np.float32, copy=False)
        if not np.isfinite(data).all():
            raise InputError(f"{path}: holds NaN or infinite values; expected finite Hounsfield units")
        return data
    if data.dtype.kind not in "iu":
        raise InputError(f"{path}: voxel type is {data.dtype}; expected one number (HU) per voxel")
    return data


def check_affine(path, affine, shape):
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: the affine holds NaN or infinite values")
    if np.abs(affine).max() > MAX_ORIGIN_MM:
        raise InputError(f"{path}: the affine holds {np.abs(affine).max():.3g}; expected at most {MAX_ORIGIN_MM:g} mm")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_RANGE_MM
    if not all(low <= value <= high for value in spacing):
        raise InputError(
            f"{path}: spacing is {[round(float(v), 4) for v in spacing]} mm; expected {low} to {high} mm per axis"
        )
    if (spacing * shape).max() > MAX_SCAN_MM:
        raise InputError(
            f"{path}: {shape} voxels of {[round(float(v), 4) for v in spacing]} mm are more than {MAX_SCAN_MM:g} mm;"
            " is the spacing in mm?"
        )
    litres = np.prod(spacing * shape) / 1e6
    if litres > MAX_SCAN_LITRES:
        raise InputError(
            f"{path}: {shape} voxels of {[round(float(v), 4) for v in spacing]} mm are {litres:.0f} litres; expected at"
            f" most {MAX_SCAN_LITRES:g}: is the spacing in mm?"
        )
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.1:
        raise InputError(f"{path}: the affine is singular (two voxel axes point the same way)")


def check_hu(path, data):
    """Refuse what cannot be a body in HU. Padding below -1500 does not count as air."""
    hint = "; expected Hounsfield units with air near -1000 and water at 0"
    low, high = int(data.min()), int(data.max())
    if low >= 0:
        raise InputError(f"{path}: all values are positive ({low} to {high}){hint} (HU + 1024? a mask?)")
    air = np.count_nonzero((data < -500) & (data > PADDING_BELOW_HU)) / data.size
    if air < 1e-3:
        raise InputError(f"{path}: no air (values {low} to {high}, {air:.2%} between -1500 and -500){hint}")
    if np.count_nonzero((data > -300) & (data < 300)) / data.size < 1e-3:
        raise InputError(f"{path}: no soft tissue (values {low} to {high}, hardly any between -300 and 300){hint}")
