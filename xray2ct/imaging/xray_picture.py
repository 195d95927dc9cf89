"""X-rays as picture files (PNG, JPEG, TIFF, BMP; with Pillow) and ``.npy`` arrays: pixels upright, bone as stored.

What a file says about its pixels besides their values (pages, EXIF orientation, transparency, polarity, bits, shape of
a pixel) is used here, or the file is refused.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from xray2ct.files import InputError, read_npy, shown_name
from xray2ct.imaging.stored_xray import StoredXray, converted, reduction
from xray2ct.imaging.xray_scale import has_own_scale

COLOUR = ("P", "PA", "RGB", "RGBA", "LA", "YCbCr")
# Pillow's modes of one channel, and the value that means 1.
GREY = {"L": 255.0, "I;16": 65535.0, "I;16B": 65535.0, "I;16L": 65535.0, "I": 65535.0, "F": 1.0}
ORIENTATION, PHOTOMETRIC, BITS, SAMPLE_FORMAT = 274, 262, 258, 339  # tags of TIFF and EXIF
WHITE_IS_ZERO = 0
OWN_MARK = ("Software", "xray2ct: linear in attenuation")  # text chunk of a PNG on the project's scale
# EXIF orientation -> the upright picture.
UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.T,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].T,
    8: lambda pixels: np.rot90(pixels),
}


def decode_picture(path, check_shape, edge: int | None = None) -> StoredXray:
    """Read one picture file; transparent pixels are NaN.

    check_shape: called with the two edges before memory is taken. edge: average by whole factors while the longer edge
    stays at so many pixels. Raises :class:`InputError` naming the file:
    unreadable, several pages or frames, 1 bit, print colours, partly transparent pixels, pixels that are not square,
    WhiteIsZero where the white value is not known, NaN.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged metadata
            # By its path, Pillow maps a TIFF into memory and garbles one that lies on its side.
            with open(path, "rb") as stream, Image.open(stream) as picture:
                check_shape(picture.size)
                _check_kind(path, picture)
                return _decode(path, picture, edge)
    except InputError:
        raise
    except Exception as error:  # Pillow's many formats raise whatever they stumble on in damaged bytes
        raise InputError(f"{path}: not a readable picture, or truncated ({shown_name(str(error))})") from error


def decode_array(path) -> StoredXray:
    """Read one ``.npy`` array: unsigned 8 and 16 bit by their full range, other numbers as they are.

    Raises :class:`InputError` naming the file for what is no array of finite numbers.
    """
    array = read_npy(path)
    if array.dtype.kind not in "uif":
        raise InputError(f"{path}: array of {array.dtype}; expected numbers")
    array = np.squeeze(array) if array.ndim > 2 else array
    scale = {1: 255.0, 2: 65535.0}.get(array.dtype.itemsize, 1.0) if array.dtype.kind == "u" else 1.0
    pixels = _finite(path, array, array.astype(np.float32))
    return StoredXray(pixels, scale, [], own=array.dtype.kind == "f" and has_own_scale(pixels))


def _finite(path, given, pixels):
    """``pixels``, of float32, unless there is NaN or infinity in them; beyond float32, ``given`` is told as it is."""
    if not np.isfinite(pixels).all():
        if np.isfinite(given).all():
            raise InputError(f"{path}: values {given.min():g} to {given.max():g}; expected an X-ray")
        raise InputError(f"{path}: holds NaN or infinite pixels")
    return pixels


def _check_kind(path, picture) -> None:
    pages, mode = getattr(picture, "n_frames", 1), picture.mode
    if pages > 1:
        raise InputError(f"{path}: holds {pages} pages or frames; expected one picture")
    if mode == "1":
        raise InputError(f"{path}: a 1-bit picture, black and white only; expected 8 or 16 bit grey")
    if mode not in COLOUR and mode not in GREY:
        raise InputError(f"{path}: a picture of mode {mode}; expected 8 or 16 bit grey, or RGB")
    for key in ("dpi", "resolution", "aspect", "jfif_density"):
        across, down = (float(value) for value in picture.info.get(key) or (1, 1))
        if across > 0 and down > 0 and abs(across - down) > 0.01 * down:
            raise InputError(f"{path}: its resolution is {across:g} across and {down:g} down; expected square pixels")


def _decode(path, picture, edge) -> StoredXray:
    mode, notes, is_tiff = picture.mode, [], picture.format == "TIFF"
    tags = dict(picture.tag_v2) if is_tiff else {}
    raw_mode = str(picture.tile[0][3]) if picture.tile else ""  # loading forgets it
    picture.load()  # also turns a TIFF by its orientation
    clear = _transparent(path, picture, raw_mode)
    if mode in COLOUR:
        notes.append(f"converted from colour ({mode}) to grey")
        if ";16" in raw_mode:
            notes.append("only the upper 8 of the 16 bits of its colours are read")
        array, full_scale = np.asarray(picture.convert("RGB").convert("L")), 255.0
    else:
        array, full_scale = np.asarray(picture), GREY[mode]
        if mode == "I" and tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
            array = array.view(np.uint32)
        if mode == "I;16" and tags.get(BITS, (16,))[0] < 16:
            full_scale = 2.0 ** tags[BITS][0] - 1
    white_is_zero = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if white_is_zero:
        if not mode.startswith("I;16") and mode != "L":
            raise InputError(f"{path}: a WhiteIsZero TIFF of mode {mode}; expected 8 or 16 bit, or BlackIsZero")
        notes.append("WhiteIsZero: inverted, so that bone is bright")
    factor = reduction(array.shape, edge)
    inverted = white_is_zero and mode != "L"  # which Pillow inverts itself
    if mode == "F":
        _finite(path, array, array)
    pixels = converted(array, clear, factor, (lambda x: full_scale - x.astype(np.float32)) if inverted else np.asarray)
    orientation = tags.get(ORIENTATION) if is_tiff else picture.getexif().get(ORIENTATION)
    if orientation in UPRIGHT:
        notes.append(f"turned by its EXIF orientation ({orientation})")
        pixels = pixels if is_tiff else np.ascontiguousarray(UPRIGHT[orientation](pixels))
    own = picture.format == "PNG" and mode.startswith("I") and full_scale == 65535
    own = own and (
        picture.info.get(OWN_MARK[0]) == OWN_MARK[1] or (is_rendered(path) and has_own_scale(pixels / 65535))
    )
    return StoredXray(pixels, full_scale, notes, reduced=factor, own=own)


def is_rendered(path) -> bool:
    """True for names like those that ``prepare_data.py`` gives to rendered X-rays."""
    return Path(path).stem.lower().endswith("_drr")


def _transparent(path, picture, raw_mode) -> np.ndarray | None:
    """``(H, W)`` bool of the transparent pixels; None without any."""
    if not picture.has_transparency_data:
        return None
    key = picture.info.get("transparency")
    if isinstance(key, tuple) and ";16" in raw_mode:  # Pillow has dropped the lower bytes that would tell
        raise InputError(f"{path}: 16-bit colours, one of them transparent; expected grey, or an opaque picture")
    if isinstance(key, int) and picture.mode in GREY:
        clear = np.asarray(picture) == key * {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
    else:
        alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
        if ((alpha > 0) & (alpha < 255)).any():
            raise InputError(f"{path}: holds partly transparent pixels; expected opaque or wholly transparent ones")
        clear = alpha == 0
    return clear if clear.any() else None
