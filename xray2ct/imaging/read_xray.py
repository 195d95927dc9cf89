"""Reading and writing X-ray pictures: any common format to float32 in [0, 1], attenuation bright (bone white).

from xray2ct.imaging.read_xray import read_xray
pa = read_xray("ID_pa_drr.png", size=512).pixels
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xray2ct.conventions import DICOM_SUFFIXES, PICTURES
from xray2ct.files import InputError, atomic_path
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.dicom_files import is_dicom
from xray2ct.imaging.dicom_view import check_view, turned
from xray2ct.imaging.dicom_xray import decode_dicom
from xray2ct.imaging.stored_xray import MAX_VALUE, Exposure, StoredXray
from xray2ct.imaging.xray_field import MAX_EDGE, fit
from xray2ct.imaging.xray_picture import OWN_MARK, decode_array, decode_picture, is_rendered
from xray2ct.imaging.xray_scale import NORMALIZATIONS, REFERENCE_PERCENTILES, normalise

__all__ = ["MAX_EDGE", "NORMALIZATIONS", "REFERENCE_PERCENTILES", "XrayImage", "decode", "read_xray", "write_png16"]
MIN_SIZE = 32


@dataclass
class XrayImage:
    """One X-ray: ``pixels`` (H, W) float32 in [0, 1]; what was done to it, in words; is its pixel spacing known?

    seen: how much of each pixel the file shows, of that shape, in [0, 1]; 0 for padding, shutters, transparent pixels
    and all beyond its edge, where ``pixels`` are air.
    """

    pixels: np.ndarray
    seen: np.ndarray
    notes: list[str] = field(default_factory=list)
    spacing_known: bool = False


def write_png16(path: str | os.PathLike, image01, own_scale: bool = False) -> None:
    """Write ``image01`` ``(H, W)`` as 16-bit grey PNG, atomically: pixel = round(65535 * clip(value, 0, 1)).

    own_scale, or a name that ends in ``_drr.png``, as rendered X-rays have it, marks the file as one on the project's
    scale, so that a copy under another name is still known (:data:`xray_picture.OWN_MARK`). Raises ``ValueError`` on
    another shape, NaN or infinity.
    """
    pixels = np.asarray(image01, dtype=np.float64)
    if pixels.ndim != 2:
        raise ValueError(f"{path}: X-ray has shape {pixels.shape}; expected (H, W)")
    if not np.isfinite(pixels).all():
        raise ValueError(f"{path}: X-ray contains NaN or infinity")
    pixels = np.rint(65535.0 * pixels.clip(0.0, 1.0)).astype(np.uint16)
    with atomic_path(path) as temporary:
        info = PngInfo()
        if own_scale or is_rendered(path):
            info.add_text(*OWN_MARK)
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)


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
    check_normalization(normalization)
    decoded = decode(path)
    if decoded.claims is not None:
        check_view(path, decoded.claims, view)
        decoded.pixels = turned(path, decoded.pixels, decoded.claims, view, decoded.notes)
    raw, full_scale, notes = decoded.pixels, decoded.full_scale, decoded.notes
    outside, shown = checked(path, raw, notes)
    if invert:
        raw = full_scale - raw
        notes.append("inverted")
    pixels = normalise(path, raw, full_scale, chosen(normalization, decoded), view)
    check_polarity(path, pixels[shown])
    known = (exposure or Exposure()).over(decoded.exposure)
    spacing_known = known.pixel_spacing_mm is not None
    pixels, seen = fit(path, pixels, outside, known, geometry if spacing_known else None, size, notes)
    return XrayImage(pixels, seen, notes, spacing_known)


def check_normalization(name: str) -> None:
    """Raise :class:`InputError` for a name that is none of :data:`NORMALIZATIONS`."""
    if name not in NORMALIZATIONS:
        raise InputError(f"X-ray normalization is {name!r}; expected one of {', '.join(NORMALIZATIONS)}")


def chosen(normalization: str, stored: StoredXray) -> str:
    """The normalisation that ``auto`` stands for: by the picture's own scale, by its header, by its histogram."""
    if normalization != "auto":
        return normalization
    if stored.own:
        return "manifest"
    return "percentile" if stored.linear else "body"


# ------------------------------------------------------------------------------------------------
# Decoding


def decode(path: str | os.PathLike, edge: int | None = None, strict: bool = True) -> StoredXray:
    """Pixels as they are stored and lie in the file, bone bright where a header says how.

    edge: average by whole factors while the longer edge stays at so many pixels. strict: refuse another body part.
    Raises :class:`InputError` naming the file for what cannot be read as one grey picture.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such X-ray file")
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return decode_picture(path, lambda shape: _check_edges(path, shape), edge)
    if suffix == ".npy":
        return decode_array(path)
    if suffix in DICOM_SUFFIXES or is_dicom(path):
        return decode_dicom(path, lambda shape: _check_edges(path, shape), edge, strict)
    raise InputError(f"{path}: unknown X-ray format; expected {', '.join(PICTURES)}, .npy or DICOM")


def checked(path, raw, notes):
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


def check_polarity(path, pixels) -> None:
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
