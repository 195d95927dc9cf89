"""CT series and multi-frame CT files of a known volume, for the tests; imports pydicom, so import it after a check."""

from __future__ import annotations

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tests.helpers.ct_cases import thorax
from xray2ct.imaging.read_ct import CtImage

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
ROOT = "1.2.826.0.1.3680043.2.1125"


def lps_ct(shape=(20, 18, 10), spacing=(12.0, 14.0, 15.0), shear=0.0, centre=(0, 0, 0)) -> CtImage:
    """A thorax whose axes run left, posterior, superior; ``shear``: mm to the back per mm upwards (a tilted gantry)."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-spacing[0], -spacing[1], spacing[2]])
    affine[1, 2] = -shear * spacing[2]
    affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return thorax(shape, affine, centre=centre[:2], lung_z=centre[2])


def geometry(ct: CtImage):
    """In LPS mm: ``(origin of each slice, two in-plane directions as six numbers, spacing of rows, of columns)``."""
    lps = np.diag([-1.0, -1, 1, 1]) @ ct.affine
    length = np.linalg.norm(lps[:3, :2], axis=0)
    origins = lps[:3, 3] + np.arange(ct.data.shape[2])[:, None] * lps[:3, 2]
    return origins, (lps[:3, :2] / length).T.ravel(), length[::-1]


def texts(numbers):
    return [f"{number:.8g}" for number in numbers]


def base(sop_class, name, series) -> Dataset:
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = sop_class, f"{ROOT}.{series}.1{name}", "CT"
    data.PatientID, data.SeriesInstanceUID, data.StudyInstanceUID = "1", f"{ROOT}.{series}", f"{ROOT}.9"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = sop_class, data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return data


def set_pixels(data, hu, slope=1.0, intercept=-1024.0, signed=False, bits=16):
    """Store HU ``(rows, columns)`` or ``(frames, rows, columns)``; the header's slope is the caller's matter."""
    data.Rows, data.Columns = hu.shape[-2:]
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, bits, bits - 1, int(signed)
    data.PixelData = np.rint((hu - intercept) / slope).astype("<i2" if signed else "<u2").tobytes()


def write_slices(folder, ct: CtImage, change=None, only=None, series=1):
    """One file per slice, in an order that is not that of the positions; ``change(data, k)`` edits each."""
    folder.mkdir(parents=True, exist_ok=True)
    origins, axes, spacing = geometry(ct)
    for k in range(ct.data.shape[2]) if only is None else only:
        data = base(CT, k, series)
        data.PixelSpacing, data.ImageOrientationPatient = texts(spacing), texts(axes)
        data.ImagePositionPatient = texts(origins[k])
        data.RescaleSlope, data.RescaleIntercept = "1", "-1024"
        set_pixels(data, ct.data[:, :, k].T)
        if change:
            change(data, k)
        data.save_as(folder / f"im{k * 7 % 101:03d}.dcm", enforce_file_format=True)
    return folder


def item(**values) -> pydicom.Sequence:
    data = Dataset()
    for key, value in values.items():
        setattr(data, key, value)
    return pydicom.Sequence([data])


def write_frames(path, ct: CtImage, order=None, slopes=None, change=None, series=1):
    """One Enhanced CT file with frames in ``order``; ``slopes``: per frame; ``change(data)`` edits it all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    origins, axes, spacing = geometry(ct)
    order = range(ct.data.shape[2]) if order is None else order
    data, frames, stored = base(ENHANCED_CT, 0, series), [], []
    for n, k in enumerate(order):
        slope = 1.0 if slopes is None else slopes[n]
        frame = Dataset()
        frame.PlanePositionSequence = item(ImagePositionPatient=texts(origins[k]))
        frame.FrameContentSequence = item(StackID="1", InStackPositionNumber=n + 1)
        frame.PixelValueTransformationSequence = item(RescaleSlope=f"{slope:g}", RescaleIntercept="-1024")
        frames.append(frame)
        stored.append((ct.data[:, :, k].T + 1024) / slope)
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=texts(axes))
    shared.PixelMeasuresSequence = item(PixelSpacing=texts(spacing))
    data.NumberOfFrames = len(frames)
    data.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    data.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    set_pixels(data, np.stack(stored), intercept=0)
    if change:
        change(data)
    data.save_as(path, enforce_file_format=True)
    return path.parent
