"""An X-ray as its file has it, whatever the format, and how it was taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from xray2ct.files import InputError
from xray2ct.imaging.dicom_view import HeaderClaims

MAX_VALUE = 1e30  # beyond it float32 and differences overflow
STRIP_PIXELS = 2**19  # converted at a time: few megabytes, whatever the size of the film


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

    def coarser(self, factor: float) -> Exposure:
        """The same for pixels ``factor`` times as large."""
        spacing = self.pixel_spacing_mm
        return self if spacing is None or factor == 1 else replace(self, pixel_spacing_mm=spacing * factor)


@dataclass
class StoredXray:
    """``pixels`` (H, W) float32, bone bright as far as the file says; NaN marks what shows nothing (padding, shutters).

    full_scale: the value that means 1. reduced: pixels of the file per edge of one of these (see :func:`converted`).
    linear: the values are linear in attenuation by the header. claims: what a DICOM header says of the view; None for
    pictures. own: an X-ray that the project rendered, on its own scale.
    """

    pixels: np.ndarray
    full_scale: float
    notes: list[str]
    exposure: Exposure = field(default_factory=Exposure)
    reduced: int = 1
    linear: bool = False
    claims: HeaderClaims | None = None
    own: bool = False


def reduction(shape, edge: int | None) -> int:
    """By how much each axis of ``shape`` can be reduced with its longer one staying at ``edge`` pixels or more."""
    return 1 if edge is None else max(1, max(shape) // edge)


def converted(
    stored: np.ndarray, hidden: np.ndarray | None, factor: int, convert: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """``convert(stored)`` as float32 with NaN where ``hidden``, averaged over blocks of ``factor`` x ``factor`` pixels.

    stored: (H, W) of any type; hidden: bool, or None. A block that is hidden in part is NaN as a whole; up to
    ``factor - 1`` rows and columns at the end are left out. Works in strips, so that no whole copy of higher precision
    exists.
    """
    rows, columns = (length // factor for length in stored.shape)
    result = np.empty((rows, columns), np.float32)
    step = max(1, STRIP_PIXELS // max(1, stored.shape[1] * factor))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part = np.s_[start * factor : (start + count) * factor, : columns * factor]
        values = np.array(convert(stored[part]), dtype=np.float64 if factor == 1 else np.float32)
        if hidden is not None:
            values[hidden[part]] = np.nan
        if factor > 1:
            lines = sum(values.reshape(count, factor, -1)[:, k] for k in range(factor))  # faster than mean((1, 3))
            values = sum(lines[:, k::factor] for k in range(factor)) / np.float32(factor**2)
        result[start : start + count] = values
    return result
