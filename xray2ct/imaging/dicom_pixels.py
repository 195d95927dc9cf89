"""Pixels of a DICOM file as they are stored: decoded, with the right sign, and which of them are padding.

CTs and X-rays use it; slopes, tables and curves are applied by ``read_dicom.py`` and ``dicom_xray.py``.
"""

from __future__ import annotations

import math
import tempfile

import numpy as np

from xray2ct.files import InputError
from xray2ct.imaging.optional import import_sitk

DECODERS = "SimpleITK pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
COLOUR_SPREAD, COLOURED = 0.06, 0.01  # of the scale, between a pixel's colours; share of pixels beyond it


def stored_frames(path, data, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """``(pixels, padding)`` of a pydicom dataset, both of ``shape`` (frames, rows, columns).

    pixels: integers before any slope, intercept or table; outside the padding they lie in the range of BitsStored.
    Bits above may repeat the sign or hold an overlay (60xx,0102), and are refused otherwise. padding: bool, by Pixel
    Padding Value and Range Limit; None where the header states none.
    Raises InputError naming the file for pixels that are missing, cut off, too many, of several samples, of more bits
    than BitsStored, or compressed without a decoder at hand; pydicom may raise anything for damaged ones (see
    :func:`dicom_files.reading`).
    """
    bits, high = int(data.BitsStored), int(data.get("HighBit", int(data.BitsStored) - 1))
    if not 1 <= bits <= int(data.BitsAllocated) or high != bits - 1:
        raise InputError(f"{path}: BitsStored {bits} and HighBit {high} do not fit; expected HighBit {bits - 1}")
    if int(data.get("SamplesPerPixel", 1)) != 1:
        raise InputError(f"{path}: {data.SamplesPerPixel} values per pixel; expected one grey value")
    stored = _decoded(path, data, shape)
    if stored.size != math.prod(shape):
        raise InputError(f"{path}: {stored.size} pixels; expected {' x '.join(map(str, shape))} by its header")
    stored = stored.reshape(shape)
    padding = _padding(data, stored)
    return _used_bits(path, data, stored, padding), padding


def grey_of_colours(path, data, shape: tuple[int, int]) -> np.ndarray:
    """Grey pixels ``shape`` (rows, columns) of a coloured pydicom dataset, such as a grey secondary capture.

    Raises InputError naming the file for a picture that is coloured indeed, and as :func:`stored_frames`.
    """
    from pydicom.pixels import pixel_array

    syntax = _syntax(path, data)
    try:
        colours = pixel_array(data)  # as RGB
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f"{_no_decoder(path, syntax)}; run: pip install {DECODERS}") from error
    if colours.shape != (*shape, 3):
        raise InputError(f"{path}: shape {colours.shape}; expected one picture of 3 colours")
    red, green, blue = (colours[..., channel] for channel in range(3))
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    coloured = float((spread > COLOUR_SPREAD * (2 ** int(data.BitsStored) - 1)).mean())
    if coloured > COLOURED:
        raise InputError(f"{path}: {coloured:.0%} of its pixels are coloured; expected an X-ray in grey")
    return green


def _syntax(path, data):
    """The transfer syntax; raises InputError without pixels."""
    from pydicom import uid

    if "PixelData" not in data:
        raise InputError(f"{path}: no PixelData (7FE0,0010); expected an image")
    if not getattr(data.file_meta, "TransferSyntaxUID", None):  # files without preamble: these two are what there is
        implicit = data.original_encoding[0]
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
    return data.file_meta.TransferSyntaxUID


def _no_decoder(path, syntax) -> str:
    from pydicom.uid import UID_dictionary

    name = f"{syntax.name} ({syntax})" if syntax in UID_dictionary else "unknown"
    return f"{path}: no decoder for its transfer syntax, {name}"


def _decoded(path, data, shape) -> np.ndarray:
    """All bits of the pixels: those above BitsStored tell padding, overlays and wrong headers."""
    from pydicom import uid
    from pydicom.pixels import get_decoder

    syntax = _syntax(path, data)
    if syntax in uid.UncompressedTransferSyntaxes:  # not by pydicom, which needs header fields that old CTs lack
        size = {8: 1, 16: 2, 32: 4}[int(data.BitsAllocated)]  # KeyError, named by the caller, for what no image has
        kind = np.dtype(f"{'<' if syntax.is_little_endian else '>'}{'iu'[not data.PixelRepresentation]}{size}")
        count = math.prod(shape)
        if len(data.PixelData) < count * size:
            raise InputError(
                f"{path}: not a readable DICOM file, truncated (its pixels take {count * size} bytes, fewer are there)"
            )
        return np.frombuffer(data.PixelData, kind, count)
    try:
        if get_decoder(syntax).is_available:
            data.pixel_array_options(correct_unused_bits=False)
            return data.pixel_array
    except (RuntimeError, NotImplementedError, AttributeError):  # unknown to pydicom, or a decoder that is not enough
        pass
    return _decoded_by_sitk(path, data, syntax)


def _decoded_by_sitk(path, data, syntax) -> np.ndarray:
    """As :func:`_decoded`; SimpleITK gets a file of the pixels alone, so that it applies nothing of the header."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

    message, remedy = _no_decoder(path, syntax), f"run: pip install {DECODERS}"
    try:
        sitk = import_sitk(path)
    except InputError:
        raise InputError(f"{message}; {remedy}") from None
    plain = Dataset()
    keys = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
    for key in (*keys, "NumberOfFrames"):
        if key in data:
            setattr(plain, key, data[key].value)
    plain.PhotometricInterpretation, plain[0x7FE00010] = "MONOCHROME2", data["PixelData"]
    plain.SOPClassUID, plain.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = syntax
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain.save_as(f"{folder}/x.dcm", enforce_file_format=True)
            return sitk.GetArrayFromImage(sitk.ReadImage(f"{folder}/x.dcm", imageIO="GDCMImageIO"))
    except (AttributeError, RuntimeError, ValueError):
        raise InputError(f"{message}, or its pixels are damaged; {remedy}") from None


def _padding(data, stored) -> np.ndarray | None:
    """True where pixels are padding by Pixel Padding Value and Range Limit; None without them."""
    value, limit = data.get("PixelPaddingValue"), data.get("PixelPaddingRangeLimit")
    if value in (None, ""):
        return None
    span = 2 ** int(data.BitsAllocated)
    ends = [int(end) % span for end in (value, value if limit in (None, "") else limit)]  # written as unsigned, too
    if data.PixelRepresentation:
        ends = [end - span if end >= span // 2 else end for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))


def _used_bits(path, data, stored, padding) -> np.ndarray:
    """``stored`` with the sign of BitsStored and without overlays; refuses values that do not fit into it."""
    bits, signed = int(data.BitsStored), bool(data.PixelRepresentation)
    first, last = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    valid = stored if padding is None else stored[~padding]
    low, high = (int(valid.min()), int(valid.max())) if valid.size else (0, 0)
    if first <= low and high <= last:
        return stored
    groups = [group for group in range(0x6000, 0x6020, 2) if (group, 0x0102) in data]
    overlay = any(data[group, 0x0102].value for group in groups)
    if not overlay and not (signed and low >= 0 and high < 2**bits):  # the latter: the bits above hold no sign
        raise InputError(f"{path}: pixels from {low} to {high}; expected {bits} bits as BitsStored says")
    values = stored.astype(np.int64) & (2**bits - 1)
    return np.where(values > last, values - 2**bits, values)
