"""Pixels of a DICOM file as they are stored: decoded, with the right sign, and which of them are padding.

Library module, used by ``read_dicom.py``; slope and intercept are applied there, frame by frame.
"""

from __future__ import annotations

import math
import os
import tempfile

import numpy as np

from xray2ct.files import InputError


def stored_frames(path, data, shape):
    """``(pixels, padding)`` of a pydicom dataset, both of ``shape`` (frames, rows, columns).

    pixels: integers without slope and intercept. padding: bool, or None where the header states no padding value.
    Raises InputError naming the file for pixels that are missing, cut off, too many, or of more bits than BitsStored;
    pydicom and the decoders may raise anything for damaged ones.
    """
    stored = _stored(path, data, shape)
    if stored.size != math.prod(shape):
        raise InputError(f"{path}: {stored.size} pixels; expected {' x '.join(map(str, shape))} by its header")
    stored = stored.reshape(shape)
    padding = _padding(data, stored)
    return _used_bits(path, data, stored, padding), padding


def _stored(path, data, shape):
    if "PixelData" not in data:
        raise InputError(f"{path}: no PixelData; expected an image")
    if not getattr(data.file_meta, "TransferSyntaxUID", None):  # files without preamble: these two are what there is
        from pydicom import uid

        data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        if data.original_encoding[0]:
            data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_compressed:
        try:
            return data.pixel_array
        except (RuntimeError, NotImplementedError, AttributeError):  # no decoder for it in pydicom
            return _decoded_by_sitk(path, data)
    # not by pydicom, which drops the bits above BitsStored: they tell padding and wrong headers
    kind = np.dtype(f"{'<' if syntax.is_little_endian else '>'}{'iu'[not data.PixelRepresentation]}{_bytes(data)}")
    count = math.prod(shape)
    if len(data.PixelData) < count * kind.itemsize:
        raise InputError(f"{path}: truncated (its pixels take {count * kind.itemsize} bytes, fewer are there)")
    return np.frombuffer(data.PixelData, kind, count)


def _bytes(data) -> int:
    """Bytes per pixel; KeyError, named by the caller, for what no CT has."""
    return {8: 1, 16: 2, 32: 4}[int(data.BitsAllocated)]


def _decoded_by_sitk(path, data):
    """Pixels of a compressed file by SimpleITK, from a copy without slope and intercept, which it would apply."""
    try:
        import SimpleITK  # optional, and slow to import
    except ImportError:
        raise InputError(f"{path}: compressed DICOM pixels need SimpleITK; run: pip install SimpleITK") from None
    bare = type(data)("", {}, file_meta=data.file_meta, preamble=b"\0" * 128)
    keys = "Rows Columns SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation"
    for key in [*keys.split(), "NumberOfFrames", "SOPInstanceUID"]:
        if key in data:
            setattr(bare, key, data[key].value)
    bare.SOPClassUID = bare.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture
    bare["PixelData"] = data["PixelData"]
    handle, name = tempfile.mkstemp(suffix=".dcm")
    os.close(handle)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        bare.save_as(name)
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(name, imageIO="GDCMImageIO"))
    finally:
        os.unlink(name)


def _padding(data, stored):
    """True where pixels are padding by Pixel Padding Value and Range Limit; None without them."""
    value = data.get("PixelPaddingValue")
    if value is None or value == "":
        return None
    limit = data.get("PixelPaddingRangeLimit")
    bits, signed = 8 * stored.dtype.itemsize, stored.dtype.kind == "i"
    ends = [int(v) % 2**bits for v in (value, value if limit in (None, "") else limit)]  # written as if unsigned, too
    low, high = sorted(v - 2**bits if signed and v >= 2 ** (bits - 1) else v for v in ends)
    return (stored >= low) & (stored <= high)


def _used_bits(path, data, stored, padding):
    """``stored`` with the sign of BitsStored; refuses values that do not fit into it."""
    bits = int(data.BitsStored)
    if not 1 <= bits <= 8 * stored.dtype.itemsize or int(data.get("HighBit", bits - 1)) != bits - 1:
        raise InputError(f"{path}: BitsStored {bits} and HighBit do not fit; expected HighBit {bits - 1}")
    valid = stored if padding is None else stored[~padding]
    low, high = (int(valid.min()), int(valid.max())) if valid.size else (0, 0)
    signed = stored.dtype.kind == "i"
    end = 2 ** (bits - 1) if signed else 2**bits
    if low >= (-end if signed else 0) and high < end:
        return stored
    if signed and low >= 0 and high < 2**bits:  # the bits above hold no sign
        return np.where(stored >= end, stored.astype(np.int64) - 2**bits, stored)
    raise InputError(f"{path}: pixels from {low} to {high}; expected {bits} bits as BitsStored says")
