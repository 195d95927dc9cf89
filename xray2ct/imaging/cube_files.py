"""Write and read prepared cubes and their scan masks (NIfTI, ``.npy``)."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from xray2ct.conventions import AIR_HU, MAX_HU, suffix_of
from xray2ct.files import InputError, atomic_path, read_npy
from xray2ct.geometry.projector import FOV_MM
from xray2ct.imaging.body import locate_cube
from xray2ct.imaging.ct_checks import check_data, check_hu
from xray2ct.imaging.cube import area_average, cube_affine, resample_cube
from xray2ct.imaging.read_ct import CtImage, read_ct
from xray2ct.imaging.read_nifti import read_nifti


def write_cube(path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write ``(D, H, W)`` as NIfTI with axes (W, H, D); ``affine`` from :func:`cube_affine`. Atomic."""
    image = nib.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def mask_path(path) -> Path:
    """``ID.nii.gz`` -> ``ID_mask.nii.gz`` beside it."""
    path = Path(path)
    return path.with_name(path.name[: len(path.name) - len(suffix_of(path))] + "_mask.nii.gz")


def read_cube(path, fov_mm: float = FOV_MM, size: int = 256, assume_ras: bool = False):
    """Read a CT as a patient cube: ``(hu float32 (D, H, W), mask uint8 (D, H, W), affine)``, edge ``size``.

    A file that already is a cube of this field of view keeps its place (area-averaged when its edge is a
    multiple of ``size``, else resampled) and its ``ID_mask.nii.gz``, if there is one; any other CT is
    located and resampled. ``affine`` is that of the returned cube on disk. Raises InputError as :func:`read_ct`.
    """
    ct = read_ct(path, assume_ras=assume_ras)
    edge = ct.data.shape[0]
    centre = ct.affine[:3, 3] - fov_mm / edge * (edge - 1) / 2
    is_cube = ct.data.shape == (edge,) * 3 and np.allclose(ct.affine, cube_affine(centre, fov_mm, edge), atol=1e-2)
    if not is_cube:
        centre = locate_cube(ct, fov_mm)
        hu, mask = resample_cube(ct, centre, fov_mm, size)
        return hu.astype(np.float32), mask, cube_affine(centre, fov_mm, size)
    scan = _read_mask(mask_path(path), ct)
    if edge % size:
        hu, mask = resample_cube(ct, centre, fov_mm, size)
        scan = resample_cube(CtImage(scan.data, ct.affine, scan.name), centre, fov_mm, size)[0]
        return hu.astype(np.float32), (mask & (scan > 0)).astype(np.uint8), cube_affine(centre, fov_mm, size)
    hu = area_average(np.clip(ct.data, AIR_HU, MAX_HU).transpose(2, 1, 0), edge // size)
    mask = area_average(scan.data.transpose(2, 1, 0), edge // size) >= 0.5
    return hu, mask.astype(np.uint8), cube_affine(centre, fov_mm, size)


def read_array_cube(path, fov_mm: float = FOV_MM, size: int = 256):
    """An ``.npy`` volume, as :func:`read_cube` gives it.

    An array has no affine, so its meaning is fixed: HU, the project's axes (D, H, W), one cube of
    ``fov_mm`` with equal edges; it is centred at the origin. Raises InputError for anything else.
    """
    path = Path(path)
    data = check_data(path, read_npy(path))
    if len(set(data.shape)) != 1:
        raise InputError(f"{path}: shape is {data.shape}; expected a cube (N, N, N), axes (D, H, W), in HU")
    check_hu(path, data)
    centre = (0.0, 0.0, 0.0)
    ct = CtImage(data.transpose(2, 1, 0), cube_affine(centre, fov_mm, data.shape[0]), str(path))
    hu, mask = resample_cube(ct, centre, fov_mm, size)
    return hu.astype(np.float32), mask, cube_affine(centre, fov_mm, size)


def _read_mask(path, ct):
    if not path.exists():
        return CtImage(np.ones(ct.data.shape, np.uint8), ct.affine, str(path))
    data, affine = read_nifti(path, assume_ras=False)
    data = check_data(path, data)
    if data.shape != ct.data.shape or not np.allclose(affine, ct.affine, atol=1e-2):
        raise InputError(f"{path}: the scan mask does not lie on the grid of {ct.name}")
    return CtImage(data, ct.affine, str(path))
