"""Read one CT of any supported format and orientation: :func:`read_ct`.

World coordinates are nibabel's RAS+ millimetres. Only voxels and positions are taken from a file: no text of a header
gets into anything that is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xray2ct.conventions import SUFFIXES, suffix_of
from xray2ct.files import InputError
from xray2ct.imaging.ct_checks import check_affine, check_data, check_hu
from xray2ct.imaging.read_dicom import read_series
from xray2ct.imaging.read_itk import lps_to_ras, read_image
from xray2ct.imaging.read_nifti import read_nifti


@dataclass
class CtImage:
    """One CT: ``data`` in HU over voxel indices (i, j, k), ``affine`` 4 x 4 from indices to RAS mm.

    ``notes``: what was left out of it, one sentence each.
    """

    data: np.ndarray
    affine: np.ndarray
    name: str
    notes: list[str] = field(default_factory=list)


def read_ct(path, kind: str | None = None, assume_ras: bool = False) -> CtImage:
    """Read one CT and check that it is a 3D volume in Hounsfield units with a usable position.

    path: a NIfTI, MetaImage or NRRD file or a folder with one DICOM series; ``kind`` as in
    :class:`CtSource` (by default from the name). A NIfTI that states no orientation (sform and qform
    code both 0) is refused, because left and right could be swapped unnoticed; ``assume_ras`` takes
    its axes as right, anterior, superior instead. ``data`` is int16/int32 or float32.
    Raises InputError naming the file: missing, truncated, damaged or unreadable, larger by its header than it
    can be (before memory is taken), not 3D (a last axis of length 1 is dropped), NaN or infinity, zero, negative
    or absurd spacing, lengths not in mm, singular affine, data in another folder, not in HU; spacing, directions or
    origin that are not stated, or stated twice with different values. DICOM: :func:`read_dicom.read_series`.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: neither a file nor a folder")
    kind = kind or ("dicom" if path.is_dir() else SUFFIXES.get(suffix_of(path)))
    notes: list[str] = []
    if kind == "nifti":
        data, affine = read_nifti(path, assume_ras)
    elif kind == "image":
        data, affine = read_image(path)
    elif kind == "dicom":
        data, affine, notes = read_series(path)
        affine = lps_to_ras(affine)
    else:
        raise InputError(f"{path}: unknown format; expected {', '.join(SUFFIXES)} or a folder with a DICOM series")
    data = check_data(path, data)
    check_affine(path, affine, data.shape)
    check_hu(path, data)
    return CtImage(data, np.asarray(affine, dtype=np.float64), str(path), notes)
