"""DICOM X-rays (CR, DX, secondary capture): pixels the right way round, and how the picture was taken.

Only pixels and the exposure's numbers are taken: no name, id or text of the header gets into a result or a message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import numpy as np
from scipy.special import expit

from xray2ct.conventions import VIEW_LABELS
from xray2ct.files import InputError
from xray2ct.imaging.dicom_files import is_dicom, reading
from xray2ct.imaging.dicom_pixels import stored_frames
from xray2ct.imaging.optional import import_pydicom

MAX_VALUE = 1e30  # beyond it float32 and differences overflow
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}
WORDS = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "H": "head", "F": "feet"}
# Where columns and rows of the project's views run to (projector.py): PA, lateral.
WANTED = (("L", "F"), ("P", "F"))
MODALITIES = ("CR", "DX", "DR", "RG", "RF", "XA", "OT", "SC", "")  # projections; OT and SC are scanned films
GREY = {"MONOCHROME1": True, "MONOCHROME2": False}  # True: low values are shown white
COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")


@dataclass(frozen=True)
class Exposure:
    """How an X-ray was taken, all in millimetres; None where it is not known.

    pixel_spacing_mm: of the detector, or with spacing_at_patient of the plane through the middle of the patient.
    sdd_mm, sid_mm: source to detector, source to the middle of the patient.
    Raises :class:`InputError` for lengths that are none, or a patient behind the detector.
    """

    pixel_spacing_mm: float | None = None
    sdd_mm: float | None = None
    sid_mm: float | None = None
    spacing_at_patient: bool = False

    def __post_init__(self):
        for name in ("pixel_spacing_mm", "sdd_mm", "sid_mm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e5:
                raise InputError(f"--{name.replace('_', '-')} is {value:g}; expected a length above 0 mm")
        if self.sdd_mm and self.sid_mm and self.sid_mm > self.sdd_mm:
            raise InputError(f"--sid-mm is {self.sid_mm:g}, beyond the detector (--sdd-mm {self.sdd_mm:g})")

    def over(self, other: Exposure) -> Exposure:
        """What is known here, else what ``other`` knows."""
        spacing = self if self.pixel_spacing_mm is not None else other
        return Exposure(
            spacing.pixel_spacing_mm,
            self.sdd_mm if self.sdd_mm is not None else other.sdd_mm,
            self.sid_mm if self.sid_mm is not None else other.sid_mm,
            spacing.spacing_at_patient,
        )


@dataclass
class StoredXray:
    """An X-ray as its file has it, whatever the format: ``pixels`` (H, W) float64, bone bright as far as the file says.

    ``full_scale`` is the value that means 1. NaN marks padding and transparency: pixels that show nothing.
    """

    pixels: np.ndarray
    full_scale: float
    notes: list[str]
    exposure: Exposure


def decode_dicom(path, view: int, check_shape) -> StoredXray:
    """Read one DICOM X-ray.

    view: 0 PA, 1 lateral: Patient Orientation (0020,0020) turns the picture to the project's axes, which a note says.
    check_shape: called with ``(rows, columns)`` before memory is taken. Applied in DICOM's order (PS3.4, N.2):
    Modality LUT or Rescale Slope and Intercept, VOI LUT tables and sigmoids (a linear window only clips: left out),
    MONOCHROME1. Padding is NaN.
    Raises :class:`InputError` naming the file: unreadable, no X-ray, in colour, several frames, a header that
    contradicts the pixels or itself, the other view, compressed without a decoder at hand, without pydicom.
    """
    pydicom = import_pydicom(path, "reading DICOM X-rays")
    with reading(path):
        data = pydicom.dcmread(path, force=is_dicom(path))  # also without preamble
        pixels, full_scale, notes = _values(path, data, check_shape)
        _check_view(path, data, view)
        exposure = _exposure(path, data, notes)
        return StoredXray(_turned(path, data, pixels, view, notes), full_scale, notes, exposure)


def _values(path, data, check_shape):
    _check_kind(path, data, check_shape)
    bits, signed = int(data.BitsStored), data.PixelRepresentation == 1
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    full_scale, notes = high - low, []
    (values,), padding = stored_frames(path, data, (1, int(data.Rows), int(data.Columns)))
    if data.get("ModalityLUTSequence"):
        values, high = _look_up(path, data, "Modality LUT", values, (low, high), notes)
        low, full_scale = 0.0, high
    else:
        slope, intercept = _number(data, "RescaleSlope", 1.0), _number(data, "RescaleIntercept", 0.0)
        if not (0 < abs(slope) < MAX_VALUE and abs(intercept) < MAX_VALUE):
            raise InputError(f"{path}: RescaleSlope is {slope:g}, RescaleIntercept {intercept:g}; expected a slope")
        values = values.astype(np.float64) * slope + intercept
        low, high = sorted((low * slope + intercept, high * slope + intercept))
    if data.get("VOILUTSequence"):
        values, high = _look_up(path, data, "VOI LUT", values, (low, high), notes)
        low, full_scale = 0.0, high
    elif _curve(path, data) == "SIGMOID":
        values = _sigmoid(path, data, values, notes)
        low, high, full_scale = 0.0, 1.0, 1.0
    shape = str(data.get("PresentationLUTShape") or "")
    inverted = GREY[data.PhotometricInterpretation] or shape == "INVERSE"
    if inverted:
        values = high + low - values
        name = "MONOCHROME1" if GREY[data.PhotometricInterpretation] else "Presentation LUT Shape INVERSE"
        notes.append(f"{name}: inverted, so that bone is bright")
    notes += _intensity_notes(data, inverted)
    if padding is not None:
        values[padding[0]] = np.nan
    return values, full_scale, notes


def _check_kind(path, data, check_shape) -> None:
    """Raise :class:`InputError` for what is no single grey X-ray, or a header that this reader does not know."""
    check_shape((int(data.Rows), int(data.Columns)))
    modality = str(data.get("Modality") or "")
    if modality not in MODALITIES:
        shown = modality if len(modality) == 2 and modality.isalpha() else "another"  # never a text of the header
        raise InputError(f"{path}: Modality is {shown}; expected an X-ray ({', '.join(filter(None, MODALITIES))})")
    if int(data.get("NumberOfFrames") or 1) > 1:
        frames = int(data.NumberOfFrames)
        raise InputError(f"{path}: shape {(frames, int(data.Rows), int(data.Columns))}; expected one picture")
    photometric = str(data.get("PhotometricInterpretation") or "")
    if photometric not in GREY:
        shown = photometric if photometric in COLOUR else "missing or unknown"
        raise InputError(f"{path}: Photometric Interpretation is {shown}; expected {' or '.join(GREY)}")
    stored = int(data.get("BitsStored", 0))
    if not 2 <= stored <= 32:
        raise InputError(f"{path}: {stored} bits per pixel; expected 8 to 16")


@overload
def _number(data, key: str) -> float | None: ...
@overload
def _number(data, key: str, default: float) -> float: ...
def _number(data, key, default=None):
    """The first value of a tag as a float; ``default`` where it is missing or empty."""
    value = data.get(key)
    if value is None or value == "":
        return default
    value = value[0] if isinstance(value, list | tuple) or hasattr(value, "append") else value
    return float(value)


def _look_up(path, data, name, values, span, notes) -> tuple[np.ndarray, float]:
    """``values``, of the possible range ``span``, through the first table of a sequence, and the table's full scale."""
    items = data[f"{name.replace(' ', '')}Sequence"].value
    entries, first, depth = (int(value) for value in items[0].LUTDescriptor)
    entries = entries % 65536 or 65536
    # Signed or unsigned is not always told, or wrong: what lies in the range is meant.
    first = next((start for start in (first, first - 65536, first + 65536) if span[0] <= start <= span[1]), first)
    table = items[0].LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, "<u2" if data.original_encoding[1] else ">u2")
    table = np.atleast_1d(np.asarray(table, dtype=np.int64)) & 0xFFFF
    if depth == 8 and len(table) == (entries + 1) // 2:  # two to a word
        table = table.astype("<u2").view(np.uint8)
    if len(table) < entries or not 8 <= depth <= 16 or table[:entries].max() >= 2**depth:
        raise InputError(
            f"{path}: its {name} holds {len(table)} entries up to {table.max()}; expected {entries} of {depth} bits"
            " by its LUT Descriptor"
        )
    notes.append(f"{name} applied" + (f", the first of {len(items)}" if len(items) > 1 else ""))
    index = (np.rint(values) - first).clip(0, entries - 1).astype(np.intp)
    return table[index].astype(np.float64), 2.0**depth - 1


def _curve(path, data) -> str:
    function = str(data.get("VOILUTFunction") or "LINEAR")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise InputError(f"{path}: VOI LUT Function is unknown; expected LINEAR, LINEAR_EXACT or SIGMOID")
    return function


def _sigmoid(path, data, values, notes) -> np.ndarray:
    """Through the first window of a sigmoid, to 0 to 1 (PS3.3, C.11.2.1.3.1)."""
    center, width = _number(data, "WindowCenter"), _number(data, "WindowWidth")
    if center is None or width is None or not (abs(center) < MAX_VALUE and 0 < width < MAX_VALUE):
        raise InputError(f"{path}: VOI LUT Function is SIGMOID; expected a Window Center, and a Window Width above 0")
    count = data["WindowCenter"].VM
    notes.append("VOI LUT applied: a sigmoid" + (f", the first of {count}" if count > 1 else ""))
    return expit(4 * (values - center) / width)


def _intensity_notes(data, inverted: bool) -> list[str]:
    """Doubts by what the header says of pixel values and X-ray intensity."""
    notes, relationship = [], data.get("PixelIntensityRelationship")
    if relationship == "LIN":
        notes.append("pixels are proportional to the X-ray intensity (LIN): the normalization 'histogram' fits such")
    if relationship == "DISP":
        notes.append("pixels went through a display's curve (DISP): the normalization 'histogram' fits such")
    sign = _number(data, "PixelIntensityRelationshipSign")
    if sign in (1, -1) and not data.get("ModalityLUTSequence") and not data.get("VOILUTSequence"):
        sign *= math.copysign(1, _number(data, "RescaleSlope", 1.0))
        if (sign > 0) != inverted:
            notes.append(
                "Pixel Intensity Relationship Sign says that bone is dark, against the Photometric Interpretation,"
                " which was used: pass --invert if it is"
            )
    return notes


def _check_view(path, data, view) -> None:
    """Raise :class:`InputError` where View Position (0018,5101) says that it is the other view."""
    position = str(data.get("ViewPosition") or "").upper()
    lateral = position in ("LL", "RL", "LATERAL", "LLD", "RLD")
    if position and ((view == 0 and lateral) or (view == 1 and position in ("PA", "AP"))):
        raise InputError(
            f"{path}: View Position is {position}; expected the {VIEW_LABELS[view]} view"
            " (are --pa and --lateral swapped?)"
        )


def _turned(path, data, pixels, view, notes):
    """The picture with columns and rows running as the project's, by Patient Orientation where there is one."""
    letters = [str(value)[:1].upper() for value in data.get("PatientOrientation") or ()]
    if len(letters) != 2 or any(letter not in OPPOSITE for letter in letters):
        return pixels
    given, (columns, rows) = tuple(letters), letters
    wanted_columns, wanted_rows = WANTED[view]
    if columns in "HF":
        pixels, columns, rows = pixels.T, rows, columns
    if {columns, rows} - {wanted_columns, OPPOSITE[wanted_columns], "H", "F"} or rows not in "HF":
        runs = " and ".join(WORDS[letter] for letter in given)
        raise InputError(f"{path}: Patient Orientation says it runs to {runs}; that is no {VIEW_LABELS[view]} view")
    if columns != wanted_columns:
        pixels = pixels[:, ::-1]
    if rows != wanted_rows:
        pixels = pixels[::-1]
    if given != WANTED[view]:
        notes.append(f"turned by Patient Orientation: it ran to {WORDS[given[0]]} and {WORDS[given[1]]}")
    return np.ascontiguousarray(pixels)


def _exposure(path, data, notes) -> Exposure:
    """Spacing and distances of the header; what is impossible counts as unknown.

    Imager Pixel Spacing and that of a scanned film lie in the detector's plane. So does Pixel Spacing (PS3.3, 10.7),
    unless its calibration puts it into the patient's.
    """
    imager = data.get("ImagerPixelSpacing") or data.get("NominalScannedPixelSpacing")
    spacing = imager or data.get("PixelSpacing") or data.get("PixelAspectRatio")
    spacing = [float(value) for value in spacing] if spacing else []
    edge = spacing[0] if imager or data.get("PixelSpacing") else None
    if len(spacing) == 2 and abs(spacing[0] - spacing[1]) > 0.01 * spacing[0]:
        unit = "" if edge is None else " mm"
        raise InputError(f"{path}: its pixels are {spacing[0]:g} x {spacing[1]:g}{unit}; expected square ones")
    at_patient = not imager and data.get("PixelSpacingCalibrationType") in ("GEOMETRY", "FIDUCIAL")
    sdd, sid = _number(data, "DistanceSourceToDetector"), None
    magnification = _number(data, "EstimatedRadiographicMagnificationFactor")
    if magnification and 1 <= magnification < 10:
        if sdd:
            sid = sdd / magnification
        elif edge and not at_patient:
            edge, at_patient = edge / magnification, True
    if str(data.get("ViewPosition") or "").upper() == "AP":
        notes.append("an AP view: the heart is magnified more than in the PA views that the models know")
    known = (value if value and 0 < value < 1e5 else None for value in (edge, sdd, sid))
    return Exposure(*known, spacing_at_patient=at_patient)
