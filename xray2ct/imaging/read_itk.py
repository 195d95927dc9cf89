"""Read MetaImage and NRRD through SimpleITK, after checking what their headers leave open or contradict."""

from __future__ import annotations

import math

import numpy as np

from xray2ct.conventions import suffix_of
from xray2ct.files import InputError
from xray2ct.imaging.ct_checks import MAX_INFLATION, check_claim
from xray2ct.imaging.image_headers import NRRD, check_header, data_files
from xray2ct.imaging.optional import import_sitk


def read_image(path):
    sitk = import_sitk(path)
    check_header(path)
    stored = sum(file.stat().st_size for file in [path, *data_files(path)])
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if suffix_of(path) in NRRD else "MetaImageIO")  # none that its content asks for
    try:
        reader.ReadImageInformation()
        voxels = math.prod(reader.GetSize())
        check_claim(path, voxels, voxels, stored, MAX_INFLATION)
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{path}: SimpleITK cannot read it ({last_line(error)})") from None
    return from_sitk(path, sitk, image)


def last_line(error) -> str:
    return str(error).strip().splitlines()[-1]


def from_sitk(path, sitk, image):
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(f"{path}: {image.GetNumberOfComponentsPerPixel()} values per voxel; expected one (HU)")
    data = sitk.GetArrayFromImage(image).T
    if data.ndim != 3:
        raise InputError(f"{path}: shape is {data.shape}; expected a 3D volume")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return data, lps_to_ras(affine)


def lps_to_ras(affine):
    """A 4 x 4 map to LPS mm (ITK, DICOM) as one to RAS mm (NIfTI), and the other way round."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
