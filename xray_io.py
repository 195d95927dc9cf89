"""Reading and writing X-ray pictures: any common format to float32 in [0, 1], attenuation bright (bone white).

from xray_io import check_views, read_xray, write_png16
pa = read_xray("ID_pa_drr.png", size=512).pixels
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from files import InputError, atomic_path

NORMALIZATIONS = ("manifest", "percentile")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
# 1st and 99th percentile of the project's own X-rays (PA, lateral): means over 25 public chest CTs rendered with
# the default geometry and scale; an X-ray of unknown scale is stretched onto them.
REFERENCE_PERCENTILES = ((0.01, 0.53), (0.0, 0.74))
MIN_SIZE = 32
# Body width in the lateral view over that in the PA view was 0.89 at most in those CTs; swapped, 1.12 at least.
SWAPPED_WIDTH_RATIO = 1.05


@dataclass
class XrayImage:
    """One X-ray: ``pixels`` (H, W) float32 in [0, 1], and what was done to it, in words."""

    pixels: np.ndarray
    notes: list[str] = field(default_factory=list)


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
) -> XrayImage:
    """Read one X-ray: PNG, JPEG, TIFF or BMP (8 or 16 bit), ``.npy``, or DICOM (with pydicom).

    normalization: ``"manifest"`` takes the project's own linear scale (16 bit / 65535, 8 bit / 255,
        floats as they are, in [0, 1]); ``"percentile"`` assumes an unknown linear scale and maps the 1st
        and 99th percentile to :data:`REFERENCE_PERCENTILES` of ``view`` (0 PA, 1 lateral): right only for
        a picture that is linear in attenuation (logarithm taken) and frames a chest with some air beside
        it. Local contrast enhancement and burnt-in text stay as they are.
    size: edge of the result; the picture is padded to a square with its border's value (never
        stretched), then averaged by area down or interpolated linearly up. None: as it comes.
    invert: dark bone in, bright bone out.

    Raises :class:`InputError` naming the file: missing, truncated, of an unknown format, 1 bit, not one
    2D picture, smaller than 32 pixels, all black or constant, NaN or infinity, bone dark instead of
    bright (seen on 9 of 10 inverted chests, where the body leaves air at the sides).
    """
    path = Path(path)
    if normalization not in NORMALIZATIONS:
        raise InputError(f"X-ray normalization is {normalization!r}; expected one of {', '.join(NORMALIZATIONS)}")
    if not path.is_file():
        raise InputError(f"{path}: no such X-ray file")
    raw, full_scale, notes = _decode(path)
    if raw.ndim != 2 or min(raw.shape) < MIN_SIZE:
        raise InputError(f"{path}: shape {raw.shape}; expected one grey picture of at least {MIN_SIZE} x {MIN_SIZE}")
    if not np.isfinite(raw).all():
        raise InputError(f"{path}: holds NaN or infinite pixels")
    if raw.max() == raw.min():
        what = "all black" if raw.max() == 0 else f"constant ({raw.max():g})"
        raise InputError(f"{path}: the picture is {what}; expected an X-ray")
    if invert:
        raw = full_scale - raw
        notes.append("inverted")
    pixels = _normalise(path, raw, full_scale, normalization, view)
    _check_polarity(path, pixels)
    if size is not None:
        pixels = _fit(pixels, size, notes)
    return XrayImage(np.ascontiguousarray(pixels, dtype=np.float32), notes)


# ------------------------------------------------------------------------------------------------
# Decoding


def _decode(path: Path):
    """``(float64 array, full scale, notes)``; full scale is the value that means 1."""
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return _decode_picture(path)
    if suffix == ".npy":
        return _decode_array(path)
    if suffix in (".dcm", ".dicom") or _is_dicom(path):
        return _decode_dicom(path)
    raise InputError(f"{path}: unknown X-ray format; expected {', '.join(PICTURES)}, .npy or DICOM")


def _decode_picture(path):
    notes = []
    try:
        with Image.open(path) as picture:
            picture.load()
            mode = picture.mode
            if mode in ("P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "PA"):
                notes.append(f"converted from colour ({mode}) to grey")
                picture = picture.convert("RGB").convert("L")
            array = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture, or truncated ({error})") from None
    if mode == "1":
        raise InputError(f"{path}: a 1-bit picture, black and white only; expected 8 or 16 bit grey")
    scales = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0, np.dtype(np.int32): 65535.0}
    if array.dtype.kind == "f":
        return array.astype(np.float64), 1.0, notes
    if array.dtype.newbyteorder("=") not in scales:
        raise InputError(f"{path}: pixel type {array.dtype}; expected 8 or 16 bit grey")
    return array.astype(np.float64), scales[array.dtype.newbyteorder("=")], notes


def _decode_array(path):
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy array ({error})") from None
    if array.dtype.kind not in "uif":
        raise InputError(f"{path}: array of {array.dtype}; expected numbers")
    array = np.squeeze(array) if array.ndim > 2 else array
    scale = {1: 255.0, 2: 65535.0}.get(array.dtype.itemsize, 1.0) if array.dtype.kind == "u" else 1.0
    return array.astype(np.float64), scale, []


def _is_dicom(path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _decode_dicom(path):
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{path}: reading DICOM X-rays needs pydicom; run: pip install pydicom") from None
    try:
        data = pydicom.dcmread(path)
        array = data.pixel_array.astype(np.float64)
    except (
        pydicom.errors.InvalidDicomError,
        AttributeError,
        ValueError,
        EOFError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise InputError(f"{path}: not a readable DICOM picture ({error})") from None
    full_scale = float(2 ** int(data.get("BitsStored", 16)) - 1)
    notes = []
    if data.get("PhotometricInterpretation") == "MONOCHROME1":
        array = full_scale - array
        notes.append("MONOCHROME1: inverted, so that bone is bright")
    array = array * float(data.get("RescaleSlope", 1) or 1) + float(data.get("RescaleIntercept", 0) or 0)
    return array, full_scale, notes


# ------------------------------------------------------------------------------------------------
# Values and size


def _normalise(path, raw, full_scale, normalization, view):
    if normalization == "percentile":
        low, high = np.percentile(raw, [1, 99])
        if high <= low:
            raise InputError(f"{path}: 98 % of the pixels have the same value; expected an X-ray")
        to_low, to_high = REFERENCE_PERCENTILES[view]
        return ((raw - low) / (high - low) * (to_high - to_low) + to_low).clip(0.0, 1.0)
    pixels = raw / full_scale
    if pixels.min() < -1e-6 or pixels.max() > 1 + 1e-6:
        raise InputError(
            f"{path}: values {raw.min():g} to {raw.max():g}; expected 0 to {full_scale:g}"
            " (an X-ray of unknown scale needs the normalization 'percentile')"
        )
    return pixels.clip(0.0, 1.0)


def _check_polarity(path, pixels) -> None:
    """Air beside the body is dark where bone is bright: a border far brighter than the middle is inverted."""
    rows, columns = pixels.shape
    edge = max(1, columns // 32)
    border = np.median(np.concatenate([pixels[:, :edge], pixels[:, -edge:]], axis=1))
    middle = np.median(pixels[rows // 4 : -rows // 4, columns // 4 : -columns // 4])
    if border > middle + 0.25 * (pixels.max() - pixels.min()):
        raise InputError(
            f"{path}: bone looks dark and air bright; expected bone bright (invert the picture, or pass --invert)"
        )


def _fit(pixels, size, notes):
    rows, columns = pixels.shape
    if rows != columns:
        notes.append(f"padded from {columns} x {rows} to a square, not stretched")
        edge = max(rows, columns)
        top, left = (edge - rows) // 2, (edge - columns) // 2
        pixels = np.pad(pixels, ((top, edge - rows - top), (left, edge - columns - left)), mode="edge")
    if pixels.shape[0] != size:
        notes.append(f"resized from {pixels.shape[1]} x {pixels.shape[0]} to {size} x {size}")
        if pixels.shape[0] > size:
            shares = _area_shares(pixels.shape[0], size)
            pixels = shares @ pixels @ shares.T
        else:
            picture = Image.fromarray(pixels.astype(np.float32))
            pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return pixels


def _area_shares(edge: int, size: int) -> np.ndarray:
    """``(size, edge)``: the share of each of ``edge`` pixels in each of ``size`` larger ones; rows sum to 1."""
    old, new = np.arange(edge + 1.0), np.linspace(0.0, edge, size + 1)
    overlap = np.minimum.outer(new[1:], old[1:]) - np.maximum.outer(new[:-1], old[:-1])
    return overlap.clip(0.0) * (size / edge)


# ------------------------------------------------------------------------------------------------
# Two views


def body_width(pixels: np.ndarray) -> float:
    """Mean width of the body as a share of the picture's width: pixels above 0.15 of the 99th percentile."""
    return float((pixels > 0.15 * np.percentile(pixels, 99)).mean())


def check_views(pa: np.ndarray, lateral: np.ndarray, names=("the PA view", "the lateral view")) -> list[str]:
    """Look for mixed-up views; ``pa`` and ``lateral`` are (H, W) in [0, 1], ``names`` are for messages.

    A chest is wider than it is deep, so the lateral shadow is the narrower one: the other way round the
    views are swapped and :class:`InputError` is raised, as it is for one picture given twice. Where both
    shadows fill the picture nothing can be said. Returns doubts that are no errors: row profiles that do
    not match (both views see the same height, so they should).
    """
    if pa.shape == lateral.shape and np.array_equal(pa, lateral):
        raise InputError(f"{names[0]} and {names[1]} are the same picture; expected a PA and a lateral view")
    widths = body_width(pa), body_width(lateral)
    if widths[1] > SWAPPED_WIDTH_RATIO * widths[0] and widths[0] < 0.95:
        raise InputError(
            f"{names[0]} (PA) and {names[1]} (lateral) look swapped: the body is {widths[0]:.0%} of the picture wide"
            f" in the first and {widths[1]:.0%} in the second, but a chest is wider than deep"
        )
    count = min(pa.shape[0], lateral.shape[0], 64)
    profiles = [np.array([chunk.mean() for chunk in np.array_split(view, count, axis=0)]) for view in (pa, lateral)]
    if min(p.std() for p in profiles) > 0:
        match = float(np.corrcoef(*profiles)[0, 1])
        if match < 0.5:
            return [
                f"{names[0]} and {names[1]} hardly match row by row (correlation {match:.2f}):"
                " same patient, both upright?"
            ]
    return []
