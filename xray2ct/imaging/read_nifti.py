"""Read NIfTI-1 and NIfTI-2 files with every field of the header checked as it is stored."""

from __future__ import annotations

import gzip
import math
import zlib

import numpy as np

from xray2ct.conventions import suffix_of
from xray2ct.files import InputError
from xray2ct.imaging.ct_checks import MAX_INFLATION, SPACING_RANGE_MM, check_claim, check_shape

MAX_DISAGREEMENT_MM = 1.0  # between two statements of one file about where its voxels lie


def read_nifti(path, assume_ras):
    """``(data, affine)`` of a single-file NIfTI-1 or NIfTI-2.

    nibabel's own loading repairs headers silently (an unknown orientation becomes a default one), takes memory
    before it looks at the file's size and leaves the gzip checksum unread: hence the header's numbers are
    checked as they are stored, and the stream is read to its end.
    """
    packed = suffix_of(path) == ".nii.gz"
    try:
        if packed and not _starts_with(path, b"\x1f\x8b"):
            raise InputError(f"{path}: not a readable NIfTI file (its name says gzip, its content does not)")
        # NaN of any kind is looked for below: no warnings about it
        with np.errstate(invalid="ignore", over="ignore"), gzip.open(path) if packed else open(path, "rb") as stream:
            header = _nifti_header(path, stream.read(540))
            shape, kind, offset = _check_nifti(path, header)
            affine = _nifti_affine(path, header, assume_ras)
            count = math.prod(shape) * kind.itemsize
            check_claim(path, math.prod(shape), offset + count, path.stat().st_size, MAX_INFLATION if packed else 1)
            stream.seek(offset)
            block = bytearray(count)
            if stream.readinto(block) != count:
                raise EOFError("it ends before its last voxel")
            if packed and len(stream.read(1 << 20)) == 1 << 20:  # the checksum comes after the last byte
                raise InputError(f"{path}: holds more data than its header says")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: truncated or damaged gzip file ({error}); copy it again") from None
    except OSError as error:
        raise InputError(f"{path}: not a readable NIfTI file ({error})") from None
    data = np.frombuffer(block, dtype=kind).reshape(shape, order="F")
    slope, inter = header.get_slope_inter()
    return (data if slope is None else _rescaled(data, slope, inter)), affine


def _starts_with(path, magic):
    with open(path, "rb") as stream:
        return stream.read(len(magic)) == magic


def _rescaled(data, slope, inter):
    if (slope, inter) == (1.0, 0.0):
        return data
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused with the data
        return data * slope + inter


def _nifti_header(path, block):
    """nibabel's header object of a file's first bytes, unchecked: numbers as they are stored."""
    import nibabel as nib  # slow to import: it brings pydicom along

    if block[344:348] == b"n+1\0" and len(block) >= 348:
        return nib.Nifti1Header(block[:348], check=False)
    if block[4:12] == b"n+2\0\r\n\x1a\n" and len(block) == 540:
        return nib.Nifti2Header(block, check=False)
    if block[344:348] == b"ni1\0" or block[4:8] == b"ni2\0":
        raise InputError(
            f"{path}: not a readable NIfTI file (one half of a pair .hdr and .img; expected a single file)"
        )
    raise InputError(f"{path}: not a readable NIfTI file (there is no NIfTI header)")


def _check_nifti(path, header):
    """``(shape, dtype, offset of the data)``; refuses what the header cannot mean."""
    from nibabel.spatialimages import HeaderDataError

    if not 1 <= int(header["dim"][0]) <= 7:
        raise InputError(f"{path}: not a readable NIfTI file ({int(header['dim'][0])} dimensions; expected 3)")
    shape = tuple(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
    check_shape(path, shape)
    try:
        kind = header.get_data_dtype()
        header.get_slope_inter()
    except KeyError:
        raise InputError(f"{path}: not a readable NIfTI file (there is no datatype {header['datatype']})") from None
    except HeaderDataError as error:
        raise InputError(f"{path}: not a readable NIfTI file ({error})") from None
    if kind.kind not in "iuf":
        raise InputError(f"{path}: voxel type is {kind}; expected one number (HU) per voxel")
    if int(header["bitpix"]) not in (0, 8 * kind.itemsize):
        raise InputError(
            f"{path}: not a readable NIfTI file (bitpix is {int(header['bitpix'])}, but voxels are {kind})"
        )
    if np.isinf(header["scl_slope"]):
        raise InputError(f"{path}: not a readable NIfTI file (scl_slope is infinite)")
    offset, least = float(header["vox_offset"]), header.single_vox_offset
    if not (np.isfinite(offset) and offset == int(offset) and offset >= least):  # 0 is read as 0, 348 and 352 by others
        raise InputError(
            f"{path}: not a readable NIfTI file (vox_offset is {offset:g}; expected {least} or more bytes)"
        )
    return shape, kind, int(offset)


def _nifti_affine(path, header, assume_ras):
    _check_pixdim(path, header)
    unit = {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise InputError(f"{path}: states its lengths in {unit}; expected mm")
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    for name, code in (("sform_code", sform), ("qform_code", qform)):
        if not 0 <= code <= 5:
            raise InputError(f"{path}: {name} is {code}; expected 0 to 5 (is the header damaged?)")
    if sform:
        affine, shape = header.get_sform(), header["dim"][1:4]
        _check_agreement(path, affine, header["pixdim"][1:4], shape)
        if qform and np.isfinite(affine).all():
            corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], (1,), indexing="ij")).reshape(4, -1)
            apart = np.linalg.norm((affine - _qform_affine(path, header)) @ corners, axis=0).max()
            if not apart <= MAX_DISAGREEMENT_MM:
                raise InputError(
                    f"{path}: sform and qform place its voxels up to {apart:.4g} mm apart; expected one position: set"
                    " the wrong one's code to 0"
                )
        return affine
    if qform:
        return _qform_affine(path, header)
    if not assume_ras:
        raise InputError(
            f"{path}: states no orientation (sform and qform code are both 0), so left and right are unknown;"
            " set the right affine, or take the axes as right-anterior-superior with --assume-ras"
        )
    return np.diag([*np.asarray(header["pixdim"][1:4], dtype=float), 1.0])


def _check_agreement(path, affine, pixdim, shape):
    """The sform's spacing must be that of pixdim; along a sheared axis pixdim may be the distance between slices."""
    along = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_RANGE_MM
    if not all(low <= value <= high for value in along) or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        return  # refused with every other affine
    across = 1.0 / np.linalg.norm(np.linalg.inv(affine[:3, :3]), axis=1)
    apart = np.minimum(np.abs(along - pixdim), np.abs(across - pixdim)) * shape
    if not apart.max() <= MAX_DISAGREEMENT_MM:
        texts = [" x ".join(f"{value:.4g}" for value in values) for values in (along, np.asarray(pixdim))]
        raise InputError(f"{path}: spacing is {texts[0]} mm by its sform, {texts[1]} by pixdim; expected one")


def _qform_affine(path, header):
    """Affine of a header's quaternion; pixdim[0] is its handedness: -1, or 1 (0 counts as 1)."""
    from nibabel.quaternions import quat2mat

    handedness = float(header["pixdim"][0])
    quaternion = np.array([float(header[f"quatern_{letter}"]) for letter in "bcd"])
    if handedness not in (-1, 0, 1) or not quaternion @ quaternion <= 1 + 1e-5:
        raise InputError(
            f"{path}: the qform (pixdim[0] {handedness:g}, quaternion {[round(float(v), 4) for v in quaternion]})"
            " is no rotation; expected -1 or 1 and parts of a unit quaternion"
        )
    rest = 1.0 - quaternion @ quaternion  # a^2; nibabel's own function takes small ones for 0
    rotation = quat2mat([math.sqrt(max(0.0, rest)), *quaternion])
    spacing = np.asarray(header["pixdim"][1:4], dtype=float) * (1, 1, -1 if handedness < 0 else 1)
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _check_pixdim(path, header):
    spacing = [float(value) for value in header["pixdim"][1:4]]
    if not all(np.isfinite(value) and value > 0 for value in spacing):
        raise InputError(f"{path}: spacing (pixdim) is {spacing} mm; expected three lengths above 0 mm")
