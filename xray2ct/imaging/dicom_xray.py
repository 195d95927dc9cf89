"""DICOM X-rays (CR, DX, secondary capture): values that rise with attenuation, and how the picture was taken.

Only pixels and the exposure's numbers are taken: no name, id or text of the header gets into a result or a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import scipy

from xray2ct.files import InputError
from xray2ct.imaging.dicom_files import is_dicom, reading
from xray2ct.imaging.dicom_pixels import grey_of_colours, stored_frames
from xray2ct.imaging.dicom_shutter import hidden_pixels
from xray2ct.imaging.dicom_view import check_subject, read_claims
from xray2ct.imaging.optional import import_pydicom
from xray2ct.imaging.stored_xray import MAX_VALUE, Exposure, StoredXray, converted, reduction

GREY = {"MONOCHROME1": True, "MONOCHROME2": False}  # True: low values are shown white
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")


@dataclass
class _Values:
    """From stored values to ones that rise with attenuation: steps, and the range (low, high) that they can reach."""

    low: float
    high: float
    full_scale: float
    notes: list[str]
    steps: list[Callable[[np.ndarray], np.ndarray]] = field(default_factory=list)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        for step in self.steps:
            values = step(values)
        return values


def decode_dicom(path, check_shape, edge: int | None = None, strict: bool = True) -> StoredXray:
    """Read one DICOM X-ray, as it lies in the file (its ``claims`` say how that is).

    check_shape: called with ``(rows, columns)`` before memory is taken. edge: average by whole factors while the longer
    edge stays at so many pixels. strict: refuse another body part, which is a note otherwise.

    Applied in DICOM's order (PS3.4, N.2): Modality LUT or Rescale Slope and Intercept, VOI LUT tables and sigmoids (a
    linear window only clips: left out), MONOCHROME1. Values that are a logarithm of the intensity by the header
    (Rescale Type LOG_E REL, Pixel Intensity Relationship LOG) are linear in attenuation, so that no display curve is
    applied to them; of values proportional to the intensity (LIN) the logarithm is taken. Padding and what lies behind
    a shutter or the collimator is NaN.
    Raises :class:`InputError` naming the file: unreadable, no X-ray, another part of the body, in colour, several
    frames, a header that contradicts the pixels, compressed without a decoder at hand, without pydicom.
    """
    pydicom = import_pydicom(path, "reading DICOM X-rays")
    with reading(path):
        data = pydicom.dcmread(path, force=is_dicom(path))  # also without preamble
        rows, columns = shape = int(data.Rows), int(data.Columns)
        check_shape(shape)
        notes = check_subject(path, data, strict)
        stored, padding = _frame(path, data, shape, notes)
        values = _values(path, data, notes)
        hidden = hidden_pixels(data, shape, notes)
        hidden = padding if hidden is None else hidden if padding is None else hidden | padding
        exposure, factor = _exposure(path, data, notes), reduction((rows, columns), edge)
        return StoredXray(
            converted(stored, hidden, factor, values),
            values.full_scale,
            notes,
            exposure.coarser(factor),
            factor,
            _relation(data) != "",
            read_claims(data),
        )


def _frame(path, data, shape, notes) -> tuple[np.ndarray, np.ndarray | None]:
    """The one frame of a grey file, or the grey of a coloured one, and where it is padding."""
    if int(data.get("NumberOfFrames") or 1) > 1:
        raise InputError(f"{path}: shape {(int(data.NumberOfFrames), *shape)}; expected one picture")
    photometric = str(data.get("PhotometricInterpretation") or "")
    samples, bits = int(data.get("SamplesPerPixel") or 1), int(data.get("BitsStored", 0))
    if photometric not in GREY and not (photometric in COLOUR and samples == 3):
        shown = photometric if photometric in (*COLOUR, "PALETTE COLOR") else "missing or unknown"
        raise InputError(f"{path}: Photometric Interpretation is {shown}; expected {' or '.join(GREY)}, or grey as RGB")
    if not 2 <= bits <= 32:
        raise InputError(f"{path}: {bits} bits per pixel; expected 8 to 16")
    if photometric not in GREY:
        notes.append(f"converted from colour ({photometric}) to grey")
        return grey_of_colours(path, data, shape), None
    (stored,), padding = stored_frames(path, data, (1, *shape))
    return stored, None if padding is None else padding[0]


def _relation(data) -> str:
    """``log`` for values linear in the logarithm of the intensity, ``intensity`` for the intensity, "" for unknown."""
    table = data.get("ModalityLUTSequence")
    kind = str((table[0].get("ModalityLUTType") if table else data.get("RescaleType")) or "").upper()
    relationship = str(data.get("PixelIntensityRelationship") or "").upper()
    if kind.startswith("LOG_E"):
        return "log"
    if kind.startswith("P"):  # P-VALUES, P REL: made for a display
        return ""
    return {"LOG": "log", "LIN": "intensity"}.get(relationship, "")


def _values(path, data, notes) -> _Values:
    bits, signed = int(data.BitsStored), int(data.get("PixelRepresentation") or 0) == 1
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    values, relation = _Values(low, high, high - low, notes), _relation(data)
    if data.get("ModalityLUTSequence"):
        _look_up(path, data, "Modality LUT", values)
    else:
        slope, intercept = _number(data, "RescaleSlope", 1.0), _number(data, "RescaleIntercept", 0.0)
        if not (0 < abs(slope) < MAX_VALUE and abs(intercept) < MAX_VALUE):
            raise InputError(f"{path}: RescaleSlope is {slope:g}, RescaleIntercept {intercept:g}; expected a slope")
        if (slope, intercept) != (1.0, 0.0):
            values.steps.append(lambda x: x.astype(np.float64) * slope + intercept)
            values.low, values.high = sorted((low * slope + intercept, high * slope + intercept))
    grey = GREY.get(data.PhotometricInterpretation, False)
    inverted = grey or str(data.get("PresentationLUTShape") or "") == "INVERSE"
    if relation:
        inverted ^= _leave_out_curve(path, data, values)
    elif data.get("VOILUTSequence"):
        _look_up(path, data, "VOI LUT", values)
    elif _curve(path, data) == "SIGMOID":
        _sigmoid(path, data, values)
    if relation == "intensity":
        _take_logarithm(values, inverted)
    elif inverted:
        low, high = values.low, values.high
        values.steps.append(lambda x: (high + low) - x.astype(np.float64, copy=False))
        name = "MONOCHROME1" if grey else "Presentation LUT Shape INVERSE"
        notes.append(f"{name}: inverted, so that bone is bright")
    notes += _intensity_notes(data, inverted)
    return values


def _leave_out_curve(path, data, values: _Values) -> bool:
    """Note a display curve that is not applied; True where it falls: the values themselves are the other way."""
    sequence = data.get("VOILUTSequence")
    if not sequence and _curve(path, data) != "SIGMOID":
        return False
    values.notes.append("its display curve (VOI LUT) is left out: the values are physical ones already")
    if not sequence:
        return False
    table, _, _ = _table(path, data, "VOI LUT", (values.low, values.high))
    return bool(table[-1] < table[0])


def _take_logarithm(values: _Values, inverted: bool) -> None:
    """Attenuation of an intensity: log(highest / intensity), 0 to log(range). inverted: high values are shown dark."""
    low, high = values.low, values.high
    span = max(high - low, 2.0)
    base, sign = (low, 1.0) if inverted else (high, -1.0)
    values.steps.append(lambda x: math.log(span) - np.log(((x.astype(np.float64) - base) * sign).clip(1.0, span)))
    values.low, values.high, values.full_scale = 0.0, math.log(span), math.log(span)
    values.notes.append("pixels are proportional to the X-ray intensity (LIN): their logarithm was taken")


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


def _look_up(path, data, name, values: _Values) -> None:
    """``values`` through the first table of a sequence; the table's depth is their scale from then on."""
    table, first, depth = _table(path, data, name, (values.low, values.high))
    count = len(data[f"{name.replace(' ', '')}Sequence"].value)
    values.notes.append(f"{name} applied" + (f", the first of {count}" if count > 1 else ""))
    entries = table.astype(np.float32)
    last = len(entries) - 1

    def look_up(x):
        index = x.astype(np.int32) if x.dtype.kind in "ui" else np.rint(x)
        return entries[(index - first).clip(0, last).astype(np.int32)]

    values.steps.append(look_up)
    values.low, values.high = 0.0, 2.0**depth - 1
    values.full_scale = values.high


def _table(path, data, name, span) -> tuple[np.ndarray, int, int]:
    """Entries, first value mapped and depth in bits of a sequence's first table; ``span``: range of what it maps."""
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
    return table[:entries], first, depth


def _curve(path, data) -> str:
    function = str(data.get("VOILUTFunction") or "LINEAR")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise InputError(f"{path}: VOI LUT Function is unknown; expected LINEAR, LINEAR_EXACT or SIGMOID")
    return function


def _sigmoid(path, data, values: _Values) -> None:
    """Through the first window of a sigmoid, to 0 to 1 (PS3.3, C.11.2.1.3.1)."""
    center, width = _number(data, "WindowCenter"), _number(data, "WindowWidth")
    if center is None or width is None or not (abs(center) < MAX_VALUE and 0 < width < MAX_VALUE):
        raise InputError(f"{path}: VOI LUT Function is SIGMOID; expected a Window Center, and a Window Width above 0")
    count = data["WindowCenter"].VM
    values.notes.append("VOI LUT applied: a sigmoid" + (f", the first of {count}" if count > 1 else ""))
    values.steps.append(lambda x: scipy.special.expit(4 * (x.astype(np.float64, copy=False) - center) / width))
    values.low, values.high, values.full_scale = 0.0, 1.0, 1.0


def _intensity_notes(data, inverted: bool) -> list[str]:
    """Doubts by what the header says of pixel values and X-ray intensity."""
    notes = []
    if data.get("PixelIntensityRelationship") == "DISP":
        notes.append("pixels went through a display's curve (DISP)")
    sign = _number(data, "PixelIntensityRelationshipSign")
    if sign in (1, -1) and not data.get("ModalityLUTSequence") and not data.get("VOILUTSequence"):
        sign *= math.copysign(1, _number(data, "RescaleSlope", 1.0))
        if (sign > 0) != inverted:
            notes.append(
                "Pixel Intensity Relationship Sign says that bone is dark, against the Photometric Interpretation,"
                " which was used: pass --invert if it is"
            )
    return notes


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
