"""Scouts (localizers, topograms, surviews, scanograms): X-rays that a CT scanner takes with its table moving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xray2ct.files import InputError
from xray2ct.imaging.dicom_files import dicom_files, is_dicom, reading
from xray2ct.imaging.dicom_pixels import stored_frames
from xray2ct.imaging.find_cts import CtSource, xray_folder
from xray2ct.imaging.optional import import_pydicom

MAX_TILT = np.cos(np.deg2rad(3.0))  # of rows and columns against the patient's axes
MAX_EDGE = 8192  # pixels
AXES = "LPS"  # DICOM's patient axes: towards left, posterior, superior (head)


@dataclass(frozen=True)
class Scout:
    """One scout with its place, in DICOM's patient coordinates (LPS mm).

    pixels: ``(rows, columns)`` float32, NaN where the header says padding, in the scanner's own units. Rows run from
    head to feet, columns to the patient's left (frontal, ``view`` 0) or back (lateral, ``view`` 1).
    z_mm: position of each row towards the head. across_mm: of each column towards left or back, measured in the plane
    of the isocentre. depth_mm: where that plane lies, towards the back (frontal) or left (lateral), by the header.
    sid_mm, sdd_mm: source to isocentre and to detector, None where the header has none.
    frame: Frame of Reference UID, "" where the header has none.
    """

    path: Path
    view: int
    pixels: np.ndarray
    z_mm: np.ndarray
    across_mm: np.ndarray
    depth_mm: float
    sid_mm: float | None
    sdd_mm: float | None
    frame: str


def read_scout(path) -> Scout:
    """Read one DICOM scout (PS3.3 C.8.2.1: Image Type value 3 is LOCALIZER).

    Raises :class:`InputError` naming the file: damaged, no scout, without position, orientation or spacing, neither
    frontal nor lateral (a tilted or oblique one), too large, constant.
    """
    path = Path(path)
    pydicom = import_pydicom(path, "reading scouts")
    with reading(path):
        data = pydicom.dcmread(path, force=is_dicom(path))
        if data.get("Modality") != "CT" or "LOCALIZER" not in [str(v).upper() for v in data.get("ImageType") or ()]:
            raise InputError(f"{path}: no scout; expected Modality CT and Image Type LOCALIZER")
        rows, columns = int(data.Rows), int(data.Columns)
        if not 32 <= min(rows, columns) <= max(rows, columns) <= MAX_EDGE:
            raise InputError(f"{path}: {columns} x {rows} pixels; expected 32 to {MAX_EDGE} per edge")
        (stored,), padding = stored_frames(path, data, (1, rows, columns))
        pixels = stored * _number(data, "RescaleSlope", 1.0) + _number(data, "RescaleIntercept", 0.0)
        if padding is not None:
            pixels[padding[0]] = np.nan
        position = _numbers(path, data, "ImagePositionPatient", 3)
        directions = _numbers(path, data, "ImageOrientationPatient", 6).reshape(2, 3)
        spacing = _numbers(path, data, "PixelSpacing", 2)
        distances = (_number(data, name) for name in ("DistanceSourceToPatient", "DistanceSourceToDetector"))
        sid, sdd = (value if value and 100 < value < 3000 else None for value in distances)
        frame = str(data.get("FrameOfReferenceUID") or "")
    pixels = pixels.astype(np.float32)
    if not np.nanmax(pixels) > np.nanmin(pixels):
        raise InputError(f"{path}: the picture is constant; expected a scout")
    return _upright(path, pixels, position, directions, spacing, (sid, sdd, frame))


def _upright(path, pixels, position, directions, spacing, rest) -> Scout:
    """Rows from head to feet and columns to the left or back, however the file has them."""
    # Image Orientation: along a row (columns grow), then along a column (rows grow); Pixel Spacing: rows, columns.
    axes = [int(np.abs(direction).argmax()) for direction in directions]
    if any(abs(direction[axis]) < MAX_TILT for direction, axis in zip(directions, axes)) or axes[0] == axes[1]:
        raise InputError(f"{path}: lies obliquely to the patient's axes; expected a frontal or a lateral scout")
    if 2 not in axes:
        raise InputError(f"{path}: runs along {AXES[axes[0]]} and {AXES[axes[1]]}; expected one axis from head to feet")
    steps = [directions[0][axes[0]] * spacing[1], directions[1][axes[1]] * spacing[0]]
    if axes[0] == 2:  # head to feet along the columns of the file
        pixels, axes, steps = pixels.T, axes[::-1], steps[::-1]
    across, view = axes[0], 0 if axes[0] == 0 else 1
    across_mm = position[across] + steps[0] * np.arange(pixels.shape[1])
    z_mm = position[2] + steps[1] * np.arange(pixels.shape[0])
    if steps[0] < 0:
        pixels, across_mm = pixels[:, ::-1], across_mm[::-1]
    if steps[1] > 0:
        pixels, z_mm = pixels[::-1], z_mm[::-1]
    return Scout(path, view, np.ascontiguousarray(pixels), z_mm, across_mm, float(position[1 - across]), *rest)


def find_scouts(source: CtSource) -> list[Path]:
    """DICOM files that may be scouts of a CT, sorted.

    Those in its folder of scouts (:func:`find_cts.xray_folder`), and the localizers among a DICOM CT's slices.
    """
    inside = [path for path in dicom_files(source.path) if _is_localizer(path)] if source.kind == "dicom" else []
    return [*dicom_files(xray_folder(source, "scouts")), *inside]


def frame_of_reference(source: CtSource) -> str:
    """Frame of Reference UID of a DICOM CT; "" where it has none, and for other formats."""
    if source.kind != "dicom":
        return ""
    pydicom = import_pydicom(source.path)
    for path in dicom_files(source.path):
        if not _is_localizer(path):
            with reading(path):
                data = pydicom.dcmread(path, force=True, specific_tags=["FrameOfReferenceUID"], stop_before_pixels=True)
                return str(data.get("FrameOfReferenceUID") or "")
    return ""


def _is_localizer(path) -> bool:
    pydicom = import_pydicom(path)
    with reading(path):
        data = pydicom.dcmread(path, force=True, specific_tags=["ImageType"], stop_before_pixels=True)
        return "LOCALIZER" in [str(value).upper() for value in data.get("ImageType") or ()]


def _number(data, key: str, default: float | None = None):
    value = data.get(key)
    return default if value in (None, "") else float(value)


def _numbers(path, data, key: str, count: int) -> np.ndarray:
    value = data.get(key)
    numbers = np.array([float(v) for v in value], dtype=np.float64) if value else np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all() or (key == "PixelSpacing" and numbers.min() <= 0):
        raise InputError(f"{path}: {key} is missing or no {count} numbers; expected the scout's place")
    return numbers
