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


def _decoded(path, data, shape) -> np.ndarray:
    """All bits of the pixels: those above BitsStored tell padding, overlays and wrong headers."""
    from pydicom import uid
    from pydicom.pixels import get_decoder

    if "PixelData" not in data:
        raise InputError(f"{path}: no PixelData (7FE0,0010); expected an image")
    if not getattr(data.file_meta, "TransferSyntaxUID", None):  # files without preamble: these two are what there is
        implicit = data.original_encoding[0]
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
    syntax = data.file_meta.TransferSyntaxUID
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
    from pydicom.uid import SecondaryCaptureImageStorage, UID_dictionary, generate_uid

    name = f"{syntax.name} ({syntax})" if syntax in UID_dictionary else "unknown"
    message, remedy = f"{path}: no decoder for its transfer syntax, {name}", f"run: pip install {DECODERS}"
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
