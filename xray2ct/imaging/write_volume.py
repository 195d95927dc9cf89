"""Writing reconstructed volumes: NIfTI, NRRD, MetaImage or a DICOM series, each marked as synthetic.

from xray2ct.imaging.write_volume import write_volume
write_volume("ct.nii.gz", hu, affine)     # nibabel
write_volume("ct.nrrd", hu, affine)       # pip install SimpleITK; also .mha
write_volume("ct_dicom", hu, affine)      # a new folder: one DICOM file per slice; pip install pydicom
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from datetime import datetime
from pathlib import Path

import numpy as np

from xray2ct.conventions import AIR_HU
from xray2ct.files import InputError, atomic_path, check_writable, naming
from xray2ct.imaging.cube_files import write_cube
from xray2ct.imaging.optional import import_pydicom, import_sitk
from xray2ct.imaging.read_itk import lps_to_ras

NIFTI = (".nii.gz", ".nii")
SITK = (".nrrd", ".mha")
FORMATS = {"nifti": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "dicom": ""}  # and what names of that format end in
EXPECTED = "expected a name ending in .nii.gz, .nii, .nrrd or .mha, or a folder's (no suffix) for a DICOM series"
SYNTHETIC = "Synthetic CT from X-rays"  # first words of every volume's description
CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


def format_of(path: str | os.PathLike) -> str:
    """``nifti``, ``nrrd``, ``mha`` or ``dicom`` by a name's ending; :class:`InputError` for any other."""
    name = Path(path).name.lower()
    if name.endswith(NIFTI):
        return "nifti"
    if name.endswith(SITK):
        return name.rpartition(".")[2]
    if "." in name or not name:
        raise InputError(f"{path}: unknown format; {EXPECTED}")
    return "dicom"


def kind_of(path: str | os.PathLike, kind: str | None = None) -> str:
    """One of :data:`FORMATS`: ``kind`` when it is given and the name does not end otherwise, else by the name.

    A folder for ``dicom`` may be called anything, also with dots, as UIDs have them. Raises :class:`InputError`.
    """
    if kind is None:
        return format_of(path)
    name = Path(path).name.lower()
    other = format_of(path) if kind != "dicom" or name.endswith((*NIFTI, *SITK)) else "dicom"
    if other != kind:
        ending = f"a name ending in {FORMATS[kind]}" if FORMATS[kind] else "a folder's name"
        raise InputError(f"{path}: expected {ending} for the format {kind}")
    return kind


def check_output(path: str | os.PathLike, option: str = "", series: bool = True, kind: str | None = None) -> None:
    """Raise :class:`InputError` for an output that :func:`write_volume` could not write: before any work is done.

    option: the option it was given by, for the message. series: a DICOM series is possible. kind: see :func:`kind_of`.
    Unknown endings, missing packages, a folder in a file's place, a file or a folder with something in it in a series'
    place, and what the system does not let write (permission, a file as folder, a name too long) are refused.
    """
    try:
        _check_output(Path(path), kind_of(path, kind), series)
    except InputError as error:
        raise InputError(f"{option} {error}".strip()) from None


def _check_output(path: Path, kind: str, series: bool) -> None:
    if kind == "dicom" and not series:
        raise InputError(f"{path}: expected a name ending in .nii.gz, .nii, .nrrd or .mha")
    if kind == "dicom":
        import_pydicom(path, "writing DICOM")
    elif kind != "nifti":
        import_sitk(path, "writing NRRD and MetaImage")
    check_writable(path)
    if kind == "dicom" and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: is there already; a DICOM series needs a new or empty folder")
    if kind != "dicom" and path.is_dir():
        raise InputError(f"{path}: is a folder; expected a file name")


def write_volume(
    path: str | os.PathLike, hu: np.ndarray, affine: np.ndarray, kind: str | None = None, origin: str = ""
) -> None:
    """Write a volume in the format of its name, atomically, with a mark that it is synthetic.

    hu: ``(D, H, W)`` int16, axes as in ``projector.py``. affine: 4 x 4, voxel ``(w, h, d)`` -> RAS millimetres, as from
    :func:`cube.cube_affine`. Every format puts each voxel at the same place of the patient. kind: see :func:`kind_of`.
    origin: what made it, for the mark: ``weights 084aa54d7d2a3e0e`` (:attr:`Pipeline.origin`). The mark is ``descrip``
    in NIfTI, the key ``description`` in NRRD and MetaImage, Image Type and Derivation Description in DICOM.
    Raises :class:`InputError` as :func:`check_output`, and an ``OSError`` naming ``path`` when writing fails.
    """
    check_output(path, kind=kind)
    kind, mark = kind_of(path, kind), ", ".join(filter(None, (SYNTHETIC, origin)))
    if kind == "nifti":
        write_cube(path, hu, affine, mark)
    elif kind == "dicom":
        _write_series(Path(path), hu, affine, origin)
    else:
        _write_sitk(path, hu, affine, mark)


def _feet_to_head(hu, affine) -> tuple[np.ndarray, np.ndarray]:
    """The volume with slices from feet to head, and its affine in LPS millimetres: right-handed axes.

    The project's own order, head to feet, is left-handed; viewers differ in how they take that.
    """
    lps = lps_to_ras(affine)  # its own inverse
    lps[:, 3] += (hu.shape[0] - 1) * lps[:, 2]
    lps[:3, 2] *= -1
    return np.ascontiguousarray(hu[::-1]), lps


def _write_sitk(path, hu, affine, mark: str) -> None:
    sitk = import_sitk(path, "writing NRRD and MetaImage")
    volume, lps = _feet_to_head(hu, affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(volume)  # array (z, y, x) -> image (x, y, z)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetMetaData("description", mark)
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:  # also of a full disk
            text = str(error).strip().splitlines()[-1].replace(str(temporary), str(path))
            raise OSError(errno.EIO, f"SimpleITK could not write it ({text})", str(path)) from None


# ------------------------------------------------------------------------------------------------
# DICOM


def _write_series(folder: Path, hu, affine, origin: str) -> None:
    """One file per slice into a temporary folder that is renamed when all are written."""
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            _write_slices(folder, temporary, hu, affine, origin)
            os.chmod(temporary, 0o755)
            if folder.exists():
                folder.rmdir()  # empty: checked before
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_slices(folder, temporary, hu, affine, origin: str) -> None:
    volume, lps = _feet_to_head(hu, affine)
    common = _series_header(folder, volume, lps)
    if origin:
        common.DerivationDescription += f"; {origin}"
    for index in range(len(volume)):
        data = _slice(common, volume, lps, index)
        data.save_as(temporary / f"slice_{index + 1:04d}.dcm", enforce_file_format=True)


def _series_header(folder, volume, lps):
    """What all slices share. Nothing of it comes from the X-rays' files: no patient is named.

    CT Image Storage (DICOM PS3.3, A.3); derived images are marked in Image Type and Derivation Description (C.7.6.1).
    """
    pydicom = import_pydicom(folder, "writing DICOM")
    generate_uid = pydicom.uid.generate_uid
    data, now, spacing = pydicom.Dataset(), datetime.now(), np.linalg.norm(lps[:3, :3], axis=0)
    data.SOPClassUID, data.Modality = CT_IMAGE_STORAGE, "CT"
    data.ImageType = ["DERIVED", "SECONDARY", "AXIAL", "SYNTHETIC"]
    data.DerivationDescription = (
        "Synthetic: estimated from two X-rays by a neural network, not acquired by a CT scanner"
    )
    data.SeriesDescription = "SYNTHETIC CT FROM TWO X-RAYS, NOT FOR DIAGNOSIS"
    data.PatientName, data.PatientID = "SYNTHETIC", "SYNTHETIC"
    data.PatientBirthDate = data.PatientSex = data.ReferringPhysicianName = data.AccessionNumber = ""
    data.PatientIdentityRemoved, data.DeidentificationMethod = "YES", "Nothing of the X-rays' headers was copied"
    data.StudyID, data.SeriesNumber, data.Manufacturer = "1", 1, ""
    data.StudyDate = data.SeriesDate = data.ContentDate = now.strftime("%Y%m%d")
    data.StudyTime = data.SeriesTime = data.ContentTime = now.strftime("%H%M%S")
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = generate_uid(), ""
    data.PatientPosition = "HFS"
    data.Rows, data.Columns = volume.shape[1:]
    data.PixelSpacing = [f"{spacing[1]:.10g}", f"{spacing[0]:.10g}"]
    data.SliceThickness = data.SpacingBetweenSlices = f"{spacing[2]:.10g}"
    data.ImageOrientationPatient = [f"{value:.10g}" for value in (lps[:3, :2] / spacing[:2]).T.ravel()]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = str(min(AIR_HU, int(volume.min()))), "1", "HU"
    data.WindowCenter, data.WindowWidth, data.KVP = "40", "400", ""
    data.AcquisitionNumber = ""
    return data


def _slice(common, volume, lps, index: int):
    """A data set of one slice, ready to be saved."""
    pydicom = import_pydicom("", "writing DICOM")
    data = pydicom.Dataset(common)
    data.SOPInstanceUID, data.InstanceNumber = pydicom.uid.generate_uid(), index + 1
    position = lps @ [0, 0, index, 1]
    data.ImagePositionPatient = [f"{value:.10g}" for value in position[:3]]
    stored = volume[index].astype(np.int32) - int(common.RescaleIntercept)
    data.PixelData = stored.astype("<u2").tobytes()
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT_IMAGE_STORAGE, data.SOPInstanceUID
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta = meta
    return data
