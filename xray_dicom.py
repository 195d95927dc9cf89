"""DICOM X-rays (CR, DX, secondary capture): pixels the right way round, and how the picture was taken.

Only pixels and the acquisition's numbers are taken: no name, id or text of the header gets into a result or a message.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from dataclasses import dataclass

import numpy as np

from files import InputError

MAX_VALUE = 1e30  # beyond it float32 and differences overflow
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}
WORDS = {"L": "left", "R": "right", "A": "anterior", "P": "posterior", "H": "head", "F": "feet"}
# Where columns and rows of the project's views run to (projector.py): PA, lateral.
WANTED = (("L", "F"), ("P", "F"))
VIEW_NAMES = ("PA", "lateral")


@dataclass(frozen=True)
class Acquisition:
    """How an X-ray was taken, all in millimetres; None where it is not known.

    pixel_spacing_mm: of the detector. sdd_mm, sid_mm: source to detector, source to the middle of the patient.
    Raises :class:`InputError` for lengths that are none, or a patient behind the detector.
    """

    pixel_spacing_mm: float | None = None
    sdd_mm: float | None = None
    sid_mm: float | None = None

    def __post_init__(self):
        for name in ("pixel_spacing_mm", "sdd_mm", "sid_mm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e5:
                raise InputError(f"--{name.replace('_', '-')} is {value:g}; expected a length above 0 mm")
        if self.sdd_mm and self.sid_mm and self.sid_mm > self.sdd_mm:
            raise InputError(f"--sid-mm is {self.sid_mm:g}, beyond the detector (--sdd-mm {self.sdd_mm:g})")

    def over(self, other: Acquisition) -> Acquisition:
        """What is known here, else what ``other`` knows."""
        return Acquisition(
            self.pixel_spacing_mm if self.pixel_spacing_mm is not None else other.pixel_spacing_mm,
            self.sdd_mm if self.sdd_mm is not None else other.sdd_mm,
            self.sid_mm if self.sid_mm is not None else other.sid_mm,
        )


@dataclass
class DicomXray:
    """``pixels`` (H, W) float64, bone bright as far as the header says; ``full_scale`` is the value that means 1."""

    pixels: np.ndarray
    full_scale: float
    notes: list[str]
    acquisition: Acquisition


def is_dicom(path) -> bool:
    """True when the file has DICOM's preamble, whatever it is called."""
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def decode_dicom(path, view: int, check_shape) -> DicomXray:
    """Read one DICOM X-ray.

    view: 0 PA, 1 lateral: Patient Orientation (0020,0020) turns the picture to the project's axes, which a note says.
    check_shape: called with ``(rows, columns)`` before memory is taken. Applied in DICOM's order (PS3.4, N.2):
    Rescale Slope and Intercept, VOI LUT tables and sigmoids (a linear window only clips: left out), MONOCHROME1.
    Raises :class:`InputError` naming the file: unreadable, several frames, the other view, without pydicom.
    """
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{path}: reading DICOM X-rays needs pydicom; run: pip install pydicom") from None
    try:
        with _silenced("pydicom"):
            data = pydicom.dcmread(path)
            pixels, full_scale, notes = _values(path, data, check_shape)
            _check_view(path, data, view)
            acquisition = _acquisition(path, data, notes)
            return DicomXray(_turned(path, data, pixels, view, notes), full_scale, notes, acquisition)
    except InputError:
        raise
    except Exception as error:  # damaged files make pydicom and its decoders raise whatever they stumble on
        reason = type(error).__name__ if not isinstance(error, AttributeError | NotImplementedError) else error
        raise InputError(f"{path}: not a readable DICOM picture ({reason})") from error


@contextlib.contextmanager
def _silenced(library: str):
    """No warnings, and nothing in the library's log: both quote the values of tags, such as a patient's name."""
    logger = logging.getLogger(library)
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _values(path, data, check_shape):
    check_shape((int(data.Rows), int(data.Columns)))
    if int(data.get("NumberOfFrames") or 1) > 1:
        frames = int(data.NumberOfFrames)
        raise InputError(f"{path}: shape {(frames, int(data.Rows), int(data.Columns))}; expected one picture")
    stored = int(data.get("BitsStored", 16))
    if not 2 <= stored <= 32:
        raise InputError(f"{path}: {stored} bits per pixel; expected 8 to 16")
    slope, intercept = _number(data, "RescaleSlope", 1.0), _number(data, "RescaleIntercept", 0.0)
    if not (0 < slope < MAX_VALUE and abs(intercept) < MAX_VALUE):
        raise InputError(f"{path}: RescaleSlope is {slope:g}, RescaleIntercept {intercept:g}; expected a slope above 0")
    full_scale, notes = float(2**stored - 1), []
    values, low, high = data.pixel_array, intercept, full_scale * slope + intercept
    if _has_curve(data):
        values, low, high = _through_voi_lut(data, values, low, high)
        full_scale = high
        notes.append("VOI LUT applied")
    else:
        values = values.astype(np.float64) * slope + intercept
    if data.get("PhotometricInterpretation") == "MONOCHROME1" or data.get("PresentationLUTShape") == "INVERSE":
        values = high + low - values
        notes.append("MONOCHROME1: inverted, so that bone is bright")
    if data.get("PixelIntensityRelationship") == "LIN":
        notes.append("pixels are proportional to the X-ray intensity (LIN): the normalization 'histogram' fits such")
    return values, full_scale, notes


def _number(data, key, default: float | None = None) -> float | None:
    value = data.get(key)
    if value is None or value == "":
        return default
    value = value[0] if isinstance(value, list | tuple) or hasattr(value, "append") else value
    value = float(value)
    return value if math.isfinite(value) else default


def _has_curve(data) -> bool:
    return bool(data.get("VOILUTSequence")) or data.get("VOILUTFunction") == "SIGMOID"


def _through_voi_lut(data, values, low, high):
    try:
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:  # pydicom 2
        from pydicom.pixel_data_handlers.util import apply_modality_lut, apply_voi_lut
    values = apply_voi_lut(apply_modality_lut(values, data), data).astype(np.float64)
    if data.get("VOILUTSequence"):
        entries = np.asarray(data.VOILUTSequence[0].LUTData)
        low, high = 0.0, float(2 ** int(np.ceil(np.log2(max(2.0, float(entries.max()) + 1)))) - 1)
    return values, low, high


def _check_view(path, data, view) -> None:
    """Raise :class:`InputError` where View Position (0018,5101) says that it is the other view."""
    position = str(data.get("ViewPosition") or "").upper()
    lateral = position in ("LL", "RL", "LATERAL", "LLD", "RLD")
    if position and ((view == 0 and lateral) or (view == 1 and position in ("PA", "AP"))):
        raise InputError(
            f"{path}: View Position is {position}; expected the {VIEW_NAMES[view]} view"
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
        raise InputError(f"{path}: Patient Orientation says it runs to {runs}; that is no {VIEW_NAMES[view]} view")
    if columns != wanted_columns:
        pixels = pixels[:, ::-1]
    if rows != wanted_rows:
        pixels = pixels[::-1]
    if given != WANTED[view]:
        notes.append(f"turned by Patient Orientation: it ran to {WORDS[given[0]]} and {WORDS[given[1]]}")
    return np.ascontiguousarray(pixels)


def _acquisition(path, data, notes) -> Acquisition:
    """Spacing and distances of the header; what is impossible counts as unknown."""
    spacing = data.get("ImagerPixelSpacing") or data.get("PixelSpacing")
    spacing = [float(value) for value in spacing] if spacing else []
    if len(spacing) == 2 and abs(spacing[0] - spacing[1]) > 0.01 * spacing[0]:
        raise InputError(f"{path}: its pixels are {spacing[0]:g} x {spacing[1]:g} mm; expected square ones")
    sdd = _number(data, "DistanceSourceToDetector")
    magnification = _number(data, "EstimatedRadiographicMagnificationFactor")
    sid = sdd / magnification if sdd and magnification and magnification >= 1 else None
    if str(data.get("ViewPosition") or "").upper() == "AP":
        notes.append("an AP view: the heart is magnified more than in the PA views that the models know")
    known = (spacing[0] if spacing else None, sdd, sid)
    return Acquisition(*(value if value and 0 < value < 1e5 else None for value in known))
