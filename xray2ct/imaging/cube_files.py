"""Write and read prepared cubes and their scan masks (NIfTI, ``.npy``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xray2ct.conventions import AIR_HU, MAX_HU, suffix_of
from xray2ct.files import InputError, atomic_path, read_npy
from xray2ct.geometry.projector import FOV_MM
from xray2ct.imaging.body import locate_cube
from xray2ct.imaging.ct_checks import check_data, check_hu
from xray2ct.imaging.cube import area_average, cube_affine, resample_cube
from xray2ct.imaging.read_ct import CtImage, read_ct
from xray2ct.imaging.read_nifti import read_nifti

if TYPE_CHECKING:  # slow to import: it brings pydicom along
    import nibabel as nib


def nifti_image(data: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """A NIfTI-1 image whose sform and qform both state ``affine`` (RAS mm), so that every program sees the same."""
    import nibabel as nib

    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    return image


def write_cube(path, volume: np.ndarray, affine: np.ndarray, description: str = "") -> None:
    """Write ``(D, H, W)`` as NIfTI with axes (W, H, D); ``affine`` from :func:`cube_affine`. Atomic.

    description: for the header's field of that name (``descrip``), which takes 79 bytes.
    """
    import nibabel as nib

    image = nifti_image(volume.transpose(2, 1, 0), affine)  # a view, in the order of the bytes on disk
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def mask_path(path) -> Path:
    """``ID.nii.gz`` -> ``ID_mask.nii.gz`` in the same folder."""
    path = Path(path)
    return path.with_name(path.name[: len(path.name) - len(suffix_of(path))] + "_mask.nii.gz")


def read_cube(path, fov_mm: float = FOV_MM, size: int = 256, assume_ras: bool = False):
    """Read a CT as a patient cube: ``(hu float32 (D, H, W), mask uint8 (D, H, W), affine)``, edge ``size``.

    A file that already is a cube of this field of view keeps its place (area-averaged when its edge is a
    multiple of ``size``, else resampled); any other CT is located and resampled. Its ``ID_mask.nii.gz``, if there is
    one, goes the same way and leaves of the mask what both show. ``affine`` is that of the returned cube on disk.
    Raises InputError as :func:`read_ct`, and for a scan mask that does not lie on the grid of the file.
    """
    ct = read_ct(path, assume_ras=assume_ras)
    scan = _read_mask(mask_path(path), ct) if Path(path).is_file() else None
    edge = ct.data.shape[0]
    centre = ct.affine[:3, 3] - fov_mm / edge * (edge - 1) / 2
    is_cube = ct.data.shape == (edge,) * 3 and np.allclose(ct.affine, cube_affine(centre, fov_mm, edge), atol=1e-2)
    if not is_cube:
        centre = locate_cube(ct, fov_mm)
    if is_cube and edge % size == 0:
        hu = area_average(np.clip(ct.data, AIR_HU, MAX_HU).transpose(2, 1, 0), edge // size)
        inside = np.ones_like(ct.data, np.uint8) if scan is None else scan.data
        mask = area_average(inside.transpose(2, 1, 0), edge // size) >= 0.5
    else:
        hu, mask = resample_cube(ct, centre, fov_mm, size)
        if scan is not None:
            mask &= resample_cube(scan, centre, fov_mm, size)[0] > 0
    return hu.astype(np.float32), mask.astype(np.uint8), cube_affine(centre, fov_mm, size)


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


def _read_mask(path: Path, ct: CtImage) -> CtImage | None:
    if not path.exists():
        return None
    data, affine = read_nifti(path, assume_ras=False)
    data = check_data(path, data)
    if data.shape != ct.data.shape or not np.allclose(affine, ct.affine, atol=1e-2):
        raise InputError(f"{path}: the scan mask does not lie on the grid of {ct.name}")
    return CtImage(data, ct.affine, str(path))
