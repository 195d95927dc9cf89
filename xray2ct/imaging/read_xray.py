"""Reading and writing X-ray pictures: any common format to float32 in [0, 1], attenuation bright (bone white).

from xray2ct.imaging.read_xray import read_xray
pa = read_xray("ID_pa_drr.png", size=512).pixels
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xray2ct.conventions import DICOM_SUFFIXES, PICTURES
from xray2ct.files import InputError, atomic_path
from xray2ct.geometry.lifting import averaged_to
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.dicom_files import is_dicom
from xray2ct.imaging.dicom_xray import MAX_VALUE, Exposure, StoredXray, decode_dicom
from xray2ct.imaging.xray_picture import decode_array, decode_picture
from xray2ct.imaging.xray_scale import (
    NORMALIZATIONS,
    normalise,
)

MIN_SIZE = 32
MAX_EDGE = 8192  # pixels; the picture is padded to a square in memory


@dataclass
class XrayImage:
    """One X-ray: ``pixels`` (H, W) float32 in [0, 1]; what was done to it, in words; is its pixel spacing known?"""

    pixels: np.ndarray
    notes: list[str] = field(default_factory=list)
    spacing_known: bool = False


def write_png16(path: str | os.PathLike, image01) -> None:
    """Write ``image01`` ``(H, W)`` as 16-bit grey PNG, atomically: pixel = round(65535 * clip(value, 0, 1)).

    Raises ``ValueError`` on another shape, NaN or infinity.
    """
    pixels = np.asarray(image01, dtype=np.float64)
    if pixels.ndim != 2:
        raise ValueError(f"{path}: X-ray has shape {pixels.shape}; expected (H, W)")
    if not np.isfinite(pixels).all():
        raise ValueError(f"{path}: X-ray contains NaN or infinity")
    pixels = np.rint(65535.0 * pixels.clip(0.0, 1.0)).astype(np.uint16)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def read_xray(
    path: str | os.PathLike,
    normalization: str = "manifest",
    size: int | None = None,
    view: int = 0,
    invert: bool = False,
    geometry: Geometry | None = None,
    exposure: Exposure | None = None,
) -> XrayImage:
    """Read one X-ray: PNG, JPEG, TIFF or BMP (8 or 16 bit), ``.npy``, or DICOM (with pydicom).

    normalization: ``"manifest"`` takes the project's own linear scale (16 bit / 65535, 8 bit / 255,
        floats as they are, in [0, 1]); ``"percentile"`` assumes an unknown linear scale and maps the 1st
        and 99th percentile to :data:`REFERENCE_PERCENTILES` of ``view`` (0 PA, 1 lateral): right only for
        a picture that is linear in attenuation (logarithm taken) and frames a chest with some air around
        it; ``"histogram"`` assumes an unknown increasing function of attenuation (logarithm not taken, gamma,
        a display curve) and gives the picture the mean distribution of the project's X-rays of ``view``: right only
        for a picture that frames the chest as they do. Local contrast enhancement and burnt-in text stay as they are.
    size: edge of the result; the picture is padded to a square with its border's value (never
        stretched), then averaged by area down or interpolated linearly up. None: as it comes.
    invert: dark bone in, bright bone out.
    geometry: what the picture is for. Where the detector's pixel spacing is known, from ``exposure`` or a DICOM
        header, it is cut or padded to the part of the patient that this geometry's detector sees; otherwise the whole
        picture is taken for that. exposure: spacing and distances, in place of what the file says.

    Padding (by a DICOM header) and wholly transparent pixels have no part in a normalization and become air. EXIF
    orientation, WhiteIsZero and what a DICOM header says of its pixels are used (:mod:`xray_picture`,
    :mod:`dicom_xray`). Only pixels are taken from a file: no text of a header gets into the result or its notes.
    Raises :class:`InputError` naming the file: missing, truncated, damaged, of an unknown format, 1 bit, not one
    2D picture (several pages or frames), partly transparent, in print colours, the other view or no X-ray (by a DICOM
    header), smaller than 32 or (by its header, before memory is taken) larger than 8192 pixels, all black or constant,
    with ``"manifest"`` beyond or within a sixteenth of the scale, NaN or infinity, bone dark instead of bright (seen on
    9 of 10 inverted chests, where the body leaves air at the sides), a pixel spacing that cannot be, pixels that are
    not square.
    """
    path = Path(path)
    if normalization not in NORMALIZATIONS:
        raise InputError(f"X-ray normalization is {normalization!r}; expected one of {', '.join(NORMALIZATIONS)}")
    if not path.is_file():
        raise InputError(f"{path}: no such X-ray file")
    decoded = _decode(path, view)
    raw, full_scale, notes = decoded.pixels, decoded.full_scale, decoded.notes
    outside, shown = _checked(path, raw, notes)
    if invert:
        raw = full_scale - raw
        notes.append("inverted")
    pixels = normalise(path, raw, full_scale, normalization, view)
    _check_polarity(path, pixels[shown])
    pixels = np.where(outside, np.nanmin(pixels), pixels)
    known = (exposure or Exposure()).over(decoded.exposure)
    if geometry is not None and known.pixel_spacing_mm is not None:
        pixels = _fit_field(path, pixels, known, geometry, notes)
    if size is not None:
        pixels = _fit(pixels, size, notes)
    return XrayImage(np.ascontiguousarray(pixels, dtype=np.float32), notes, known.pixel_spacing_mm is not None)


# ------------------------------------------------------------------------------------------------
# Decoding


def _decode(path: Path, view: int) -> StoredXray:
    """Pixels as they are stored, bone bright where a header says how."""
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return decode_picture(path, lambda shape: _check_edges(path, shape))
    if suffix == ".npy":
        return decode_array(path)
    if suffix in DICOM_SUFFIXES or is_dicom(path):
        return decode_dicom(path, view, lambda shape: _check_edges(path, shape))
    raise InputError(f"{path}: unknown X-ray format; expected {', '.join(PICTURES)}, .npy or DICOM")


def _checked(path, raw, notes):
    """Raise :class:`InputError` for what is no X-ray of any scale.

    Returns where there is padding, and the index of the part that has other rows and columns than padding.
    """
    if raw.ndim != 2 or min(raw.shape) < MIN_SIZE:
        raise InputError(f"{path}: shape {raw.shape}; expected one grey picture of at least {MIN_SIZE} x {MIN_SIZE}")
    _check_edges(path, raw.shape)
    outside = np.isnan(raw)
    shown = np.ix_(~outside.all(axis=1), ~outside.all(axis=0))
    if min(raw[shown].shape) < MIN_SIZE:
        rows, columns = raw[shown].shape
        raise InputError(
            f"{path}: {rows} x {columns} without padding and transparent pixels; expected {MIN_SIZE} x {MIN_SIZE}"
        )
    if outside.any():
        notes.append(f"{outside.mean():.1%} of the pixels are padding or transparent: taken for air")
    low, high = float(np.nanmin(raw)), float(np.nanmax(raw))
    if max(abs(low), abs(high)) > MAX_VALUE:
        raise InputError(f"{path}: values {low:g} to {high:g}; expected an X-ray")
    if high == low:
        what = "all black" if high == 0 else f"constant ({high:g})"
        raise InputError(f"{path}: the picture is {what}; expected an X-ray")
    return outside, shown


def _check_edges(path, shape) -> None:
    if max(shape, default=0) > MAX_EDGE:
        raise InputError(f"{path}: {' x '.join(map(str, shape))} pixels; expected at most {MAX_EDGE} per edge")


# ------------------------------------------------------------------------------------------------
# Values and size


def _check_polarity(path, pixels) -> None:
    """Air next to the body is dark where bone is bright: a border far brighter than the middle is inverted.

    ``pixels`` without rows and columns of padding, which would pass for air.
    """
    rows, columns = pixels.shape
    edge = max(1, columns // 32)
    border = np.concatenate([pixels[:, :edge], pixels[:, -edge:]], axis=1)
    middle = pixels[rows // 4 : -rows // 4, columns // 4 : -columns // 4]
    border, middle = (part[np.isfinite(part)] for part in (border, middle))
    span = np.nanmax(pixels) - np.nanmin(pixels)
    if len(middle) and np.median(border) > np.median(middle) + 0.25 * span:
        raise InputError(
            f"{path}: bone looks dark and air bright; expected bone bright (invert the picture, or pass --invert)"
        )


def _fit_field(path, pixels, exposure: Exposure, geometry: Geometry, notes) -> np.ndarray:
    """Cut or pad the picture to a square of what the geometry's detector sees at the isocentre.

    The isocentre stands where it does in the geometry, before the detector, unless ``sid_mm`` is known. The rays'
    other slant where the source stood nearer stays: only the scale is made right.
    """
    wanted, spacing = geometry.detector_mm, exposure.pixel_spacing_mm
    assert wanted is not None
    assert spacing is not None  # known to the caller
    if geometry.kind == "cone":
        assert geometry.sdd_mm is not None
        assert geometry.sid_mm is not None
        wanted *= geometry.sid_mm / geometry.sdd_mm
        if not exposure.spacing_at_patient:
            behind = geometry.sdd_mm - geometry.sid_mm
            sdd = exposure.sdd_mm or geometry.sdd_mm
            sid = exposure.sid_mm or sdd - behind
            if not 0 < sid <= sdd:
                raise InputError(
                    f"{path}: source to detector is {sdd:g} mm; expected more than {behind:g}, or --sid-mm too"
                )
            spacing *= sid / sdd
    edge = round(wanted / spacing)
    if not max(pixels.shape) / 4 <= edge <= min(MAX_EDGE, 4 * max(pixels.shape)):
        seen = " x ".join(f"{n * spacing:.0f}" for n in reversed(pixels.shape))
        raise InputError(
            f"{path}: shows {seen} mm of the patient by its pixel spacing of {exposure.pixel_spacing_mm:g} mm;"
            f" expected about {wanted:.0f} x {wanted:.0f} mm (--pixel-spacing-mm gives another)"
        )
    if pixels.shape != (edge, edge):
        seen = " x ".join(f"{n * spacing:.0f}" for n in reversed(pixels.shape))
        notes.append(f"cut or padded from {seen} mm to the {wanted:.0f} x {wanted:.0f} mm that the model sees")
    return _to_edge(pixels, edge)


def _to_edge(pixels, edge: int) -> np.ndarray:
    """Cut or pad both axes about the middle to ``edge`` pixels; what is added has the border's value."""
    for axis in range(2):
        missing = edge - pixels.shape[axis]
        if missing < 0:
            start = -missing // 2
            pixels = pixels[start : start + edge] if axis == 0 else pixels[:, start : start + edge]
        elif missing:
            padding = [(0, 0), (0, 0)]
            padding[axis] = (missing // 2, missing - missing // 2)
            pixels = np.pad(pixels, padding, mode="edge")
    return pixels


def _fit(pixels, size, notes):
    rows, columns = pixels.shape
    if rows != columns:
        notes.append(f"padded from {columns} x {rows} to a square, not stretched")
        pixels = _to_edge(pixels, max(rows, columns))
    if pixels.shape[0] != size:
        notes.append(f"resized from {pixels.shape[1]} x {pixels.shape[0]} to {size} x {size}")
        if pixels.shape[0] > size:
            pixels = averaged_to(torch.from_numpy(np.array(pixels, np.float64))[None, None], (size, size))[0, 0].numpy()
        else:
            picture = Image.fromarray(pixels.astype(np.float32))
            pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return pixels
