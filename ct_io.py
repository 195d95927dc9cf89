"""Read CTs of any orientation, place the patient cube, resample, and write or read prepared cubes.

Library module, used by ``prepare_data.py``, ``dataset.py`` and ``reconstruct.py``. NIfTI headers are decoded by
nibabel; MetaImage and NRRD are read by SimpleITK, DICOM by pydicom (both optional). World coordinates are nibabel's
RAS+ millimetres everywhere; cubes are arrays ``(D, H, W)`` in the patient axes of ``projector.py``.
Only voxels and positions are taken from a file: no text of a header gets into anything that is written.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from files import InputError, atomic_path, read_npy
from find_cts import SUFFIXES, CtSource, find_cts, suffix_of  # noqa: F401 - CtSource and find_cts for importers
from image_headers import NRRD, check_header, data_files
from projector import FOV_MM
from read_dicom import read_series

AIR_HU = -1024  # also everything outside the scan
MAX_HU = 3071  # end of the 12-bit scale; metal above it carries no information
PADDING_BELOW_HU = -1500  # scanners fill the area outside the reconstruction circle with -2000 to -32768
SPACING_RANGE_MM = (0.05, 20.0)
COARSE_MM = 4.0  # grid on which the body and the lungs are located
MIN_BODY_LITRES = 0.5  # an infant's chest has about 1; far less means a wrong unit of length
MAX_SCAN_MM = 3000.0
MAX_SCAN_LITRES = 4000.0  # a couch's length of the widest bore; what is located is sampled at COARSE_MM first
MAX_ORIGIN_MM = 1e5  # beyond it float32 affines lose millimetres
MAX_DISAGREEMENT_MM = 1.0  # between two statements of one file about where its voxels lie
MAX_VOXELS = 2**31  # 1024 x 1024 x 2048
MAX_INFLATION = 1032  # bytes that one byte of deflate can become at most (zlib's technical details)
MIN_LUNG_MM3 = 100e3  # below this, air inside the body is bowel gas
IN_PLANE = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))])  # neighbours per slice


@dataclass
class CtImage:
    """One CT: ``data`` in HU over voxel indices (i, j, k), ``affine`` 4 x 4 from indices to RAS mm.

    ``notes``: what was left out of it, one sentence each.
    """

    data: np.ndarray
    affine: np.ndarray
    name: str
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------
# Reading


def read_ct(path, kind: str | None = None, assume_ras: bool = False) -> CtImage:
    """Read one CT and check that it is a 3D volume in Hounsfield units with a usable position.

    path: a NIfTI, MetaImage or NRRD file or a folder with one DICOM series; ``kind`` as in
    :class:`CtSource` (by default from the name). A NIfTI that states no orientation (sform and qform
    code both 0) is refused, because left and right could be swapped unnoticed; ``assume_ras`` takes
    its axes as right, anterior, superior instead. ``data`` is int16/int32 or float32.
    Raises InputError naming the file: missing, truncated, damaged or unreadable, larger by its header than it
    can be (before memory is taken), not 3D (a last axis of length 1 is dropped), NaN or infinity, zero, negative
    or absurd spacing, lengths not in mm, singular affine, data in another folder, not in HU; spacing, directions or
    origin that are not stated, or stated twice with different values. DICOM: :func:`read_dicom.read_series`.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: neither a file nor a folder")
    kind = kind or ("dicom" if path.is_dir() else SUFFIXES.get(suffix_of(path)))
    notes: list[str] = []
    if kind == "nifti":
        data, affine = _read_nifti(path, assume_ras)
    elif kind == "image":
        data, affine = _read_image(path)
    elif kind == "dicom":
        data, affine, notes = read_series(path, MAX_VOXELS)
        affine = _lps_to_ras(affine)
    else:
        raise InputError(f"{path}: unknown format; expected {', '.join(SUFFIXES)} or a folder with a DICOM series")
    data = _check_data(path, data)
    _check_affine(path, affine, data.shape)
    _check_hu(path, data)
    return CtImage(data, np.asarray(affine, dtype=np.float64), str(path), notes)


def _read_nifti(path, assume_ras):
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
            _check_claim(path, math.prod(shape), offset + count, path.stat().st_size, MAX_INFLATION if packed else 1)
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
    if not 1 <= int(header["dim"][0]) <= 7:
        raise InputError(f"{path}: not a readable NIfTI file ({int(header['dim'][0])} dimensions; expected 3)")
    shape = tuple(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
    _check_shape(path, shape)
    try:
        kind = header.get_data_dtype()
        header.get_slope_inter()
    except KeyError:
        raise InputError(f"{path}: not a readable NIfTI file (there is no datatype {header['datatype']})") from None
    except nib.spatialimages.HeaderDataError as error:
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


def _check_claim(path, voxels, claimed, stored, inflation):
    """Before memory is taken: can a file of ``stored`` bytes hold ``claimed`` ones, and can that be a CT?"""
    if voxels > MAX_VOXELS:
        raise InputError(
            f"{path}: {voxels:.3g} voxels by its header; expected at most {MAX_VOXELS:.3g} (is it damaged?)"
        )
    if claimed > stored * inflation:
        raise InputError(
            f"{path}: not a readable NIfTI file, or truncated (the header speaks of {claimed} bytes,"
            f" a file of {stored} cannot hold them)"
        )


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
    handedness = float(header["pixdim"][0])
    quaternion = np.array([float(header[f"quatern_{letter}"]) for letter in "bcd"])
    if handedness not in (-1, 0, 1) or not quaternion @ quaternion <= 1 + 1e-5:
        raise InputError(
            f"{path}: the qform (pixdim[0] {handedness:g}, quaternion {[round(float(v), 4) for v in quaternion]})"
            " is no rotation; expected -1 or 1 and parts of a unit quaternion"
        )
    rest = 1.0 - quaternion @ quaternion  # a^2; nibabel's own function takes small ones for 0
    rotation = nib.quaternions.quat2mat([math.sqrt(max(0.0, rest)), *quaternion])
    spacing = np.asarray(header["pixdim"][1:4], dtype=float) * (1, 1, -1 if handedness < 0 else 1)
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _check_pixdim(path, header):
    spacing = [float(value) for value in header["pixdim"][1:4]]
    if not all(np.isfinite(value) and value > 0 for value in spacing):
        raise InputError(f"{path}: spacing (pixdim) is {spacing} mm; expected three lengths above 0 mm")


def _import_sitk(path):
    try:
        import SimpleITK  # optional, and slow to import
    except ImportError:
        raise InputError(f"{path}: MetaImage and NRRD need SimpleITK: pip install SimpleITK") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # its warnings become errors below
    return SimpleITK


def _read_image(path):
    sitk = _import_sitk(path)
    check_header(path)
    stored = sum(file.stat().st_size for file in [path, *data_files(path)])
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if suffix_of(path) in NRRD else "MetaImageIO")  # none that its content asks for
    try:
        reader.ReadImageInformation()
        voxels = math.prod(reader.GetSize())
        _check_claim(path, voxels, voxels, stored, MAX_INFLATION)
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{path}: SimpleITK cannot read it ({_last_line(error)})") from None
    return _from_sitk(path, sitk, image)


def _last_line(error) -> str:
    return str(error).strip().splitlines()[-1]


def _from_sitk(path, sitk, image):
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(f"{path}: {image.GetNumberOfComponentsPerPixel()} values per voxel; expected one (HU)")
    data = sitk.GetArrayFromImage(image).T
    if data.ndim != 3:
        raise InputError(f"{path}: shape is {data.shape}; expected a 3D volume")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return data, _lps_to_ras(affine)


def _lps_to_ras(affine):
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _check_shape(path, shape):
    shape = tuple(shape)
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or min(shape) < 2:
        raise InputError(f"{path}: shape is {shape}; expected a 3D volume (one CT)")


def _check_data(path, data):
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    _check_shape(path, data.shape)
    if data.dtype.kind == "f":
        with np.errstate(over="ignore"):  # beyond float32 is infinity
            data = data.astype(np.float32, copy=False)
        if not np.isfinite(data).all():
            raise InputError(f"{path}: holds NaN or infinite values; expected finite Hounsfield units")
        return data
    if data.dtype.kind not in "iu":
        raise InputError(f"{path}: voxel type is {data.dtype}; expected one number (HU) per voxel")
    return data


def _check_affine(path, affine, shape):
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: the affine holds NaN or infinite values")
    if np.abs(affine).max() > MAX_ORIGIN_MM:
        raise InputError(f"{path}: the affine holds {np.abs(affine).max():.3g}; expected at most {MAX_ORIGIN_MM:g} mm")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = SPACING_RANGE_MM
    if not all(low <= value <= high for value in spacing):
        raise InputError(
            f"{path}: spacing is {[round(float(v), 4) for v in spacing]} mm; expected {low} to {high} mm per axis"
        )
    if (spacing * shape).max() > MAX_SCAN_MM:
        raise InputError(
            f"{path}: {shape} voxels of {[round(float(v), 4) for v in spacing]} mm are more than {MAX_SCAN_MM:g} mm;"
            " is the spacing in mm?"
        )
    litres = np.prod(spacing * shape) / 1e6
    if litres > MAX_SCAN_LITRES:
        raise InputError(
            f"{path}: {shape} voxels of {[round(float(v), 4) for v in spacing]} mm are {litres:.0f} litres; expected at"
            f" most {MAX_SCAN_LITRES:g}: is the spacing in mm?"
        )
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.1:
        raise InputError(f"{path}: the affine is singular (two voxel axes point the same way)")


def _check_hu(path, data):
    """Refuse what cannot be a body in HU. Padding below -1500 does not count as air."""
    hint = "; expected Hounsfield units with air near -1000 and water at 0"
    low, high = int(data.min()), int(data.max())
    if low >= 0:
        raise InputError(f"{path}: all values are positive ({low} to {high}){hint} (HU + 1024? a mask?)")
    air = np.count_nonzero((data < -500) & (data > PADDING_BELOW_HU)) / data.size
    if air < 1e-3:
        raise InputError(f"{path}: no air (values {low} to {high}, {air:.2%} between -1500 and -500){hint}")
    if np.count_nonzero((data > -300) & (data < 300)) / data.size < 1e-3:
        raise InputError(f"{path}: no soft tissue (values {low} to {high}, hardly any between -300 and 300){hint}")


# ------------------------------------------------------------------------------------------------
# Resampling


def cube_affine(centre_mm, fov_mm: float, size: int) -> np.ndarray:
    """Affine (RAS mm) of the cube as stored on disk, axes (W, H, D) = (left, posterior, inferior)."""
    step = fov_mm / size
    affine = np.diag([-step, -step, -step, 1.0])
    affine[:3, 3] = np.asarray(centre_mm, dtype=np.float64) + step * (size - 1) / 2
    return affine


def resample_cube(ct: CtImage, centre_mm, fov_mm: float, size: int):
    """Resample a CT from its own affine to the patient cube around ``centre_mm`` (RAS mm).

    Returns ``(hu, mask)``, both ``(size, size, size)`` as (D, H, W): int16 HU in [-1024, 3071], and
    uint8, 1 inside the scan. Outside the scan, and where the scan is padded (below -1500), HU is -1024
    and the mask 0. Trilinear; source axes finer than the cube are low-pass filtered first, by the
    Gaussian that makes up the difference of the full widths at half maximum (Cardoso et al., MICCAI 2015).
    """
    to_world = cube_affine(centre_mm, fov_mm, size)[:, [2, 1, 0, 3]]  # columns for (d, h, w)
    return _resample(ct, to_world, (size, size, size))


def _resample(ct, to_world, shape):
    """``to_world``: 4 x 4 from output indices to RAS mm."""
    to_source = np.linalg.inv(ct.affine) @ to_world
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    source_mm = np.linalg.norm(ct.affine[:3, :3], axis=0)
    target_mm = np.linalg.norm(to_world[:3, :3], axis=0).min()
    ratio = target_mm / source_mm
    sigma = np.sqrt(np.maximum(ratio**2 - 1.0, 0.0) / (8.0 * np.log(2.0)))
    data, start = _crop(ct.data, matrix, offset, shape, margin=np.ceil(4 * sigma).astype(int) + 2)
    if data.size == 0:
        return np.full(shape, AIR_HU, np.int16), np.zeros(shape, np.uint8)

    def sample(values):
        for axis in range(3):
            if sigma[axis] > 0.1:
                values = ndimage.gaussian_filter1d(values, sigma[axis], axis=axis, mode="nearest", truncate=4.0)
        return ndimage.affine_transform(
            values, matrix, offset - start, output_shape=shape, order=1, mode="nearest", prefilter=False
        )

    inside = _inside(matrix, offset, shape, ct.data.shape)
    padding = data < PADDING_BELOW_HU
    if padding.any():
        inside &= sample((~padding).astype(np.float32)) >= 0.5
    hu = sample(np.clip(data, AIR_HU, MAX_HU).astype(np.float32))
    hu = np.where(inside, np.rint(hu), AIR_HU).astype(np.int16)
    return hu, inside.astype(np.uint8)


def _crop(data, matrix, offset, shape, margin):
    """The part of the source that the output grid touches, and its first index."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    index = corners @ matrix.T + offset
    low = np.clip(np.floor(index.min(axis=0)).astype(int) - margin, 0, data.shape)
    high = np.clip(np.ceil(index.max(axis=0)).astype(int) + margin + 1, 0, data.shape)
    return data[tuple(slice(a, b) for a, b in zip(low, high))], low


def _inside(matrix, offset, shape, source_shape):
    """Output voxels whose centre lies in a source voxel (a voxel reaches half a step beyond its centre)."""
    inside = np.ones(shape, dtype=bool)
    d, h, w = np.ogrid[tuple(slice(n) for n in shape)]
    for axis in range(3):
        index = (matrix[axis, 0] * d + offset[axis]) + matrix[axis, 1] * h + matrix[axis, 2] * w
        inside &= (index >= -0.501) & (index <= source_shape[axis] - 0.499)
    return inside


# ------------------------------------------------------------------------------------------------
# Body, lungs, couch


def locate_cube(ct: CtImage, fov_mm: float = FOV_MM) -> tuple[float, float, float]:
    """Centre (x, y, z RAS mm) of the cube for one CT.

    Along the axis of the body: the centre of the scan when its whole height fits into ``fov_mm``; else
    the middle of the lungs (large regions of -960 to -400 HU inside the body), moved no further than
    needed for the cube to stay within the scan; without lungs the centre of the scan.
    In-plane: the median over the slices of the cube of the centre of the trunk's bounding box; the trunk
    is the deep part of the body (:func:`body_mask`, without couch), which leaves out an arm at one side.
    Raises InputError when there is no body.
    """
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in ct.data.shape], indexing="ij")).reshape(3, -1)
    world = ct.affine[:3, :3] @ corners + ct.affine[:3, 3:]
    low, high = world.min(axis=1), world.max(axis=1)
    shape = tuple(int(n) for n in np.ceil((high - low) / COARSE_MM).astype(int)[::-1])
    to_world = np.zeros((4, 4))  # (d, h, w) runs from the superior, anterior, right corner
    to_world[[2, 1, 0], [0, 1, 2]] = -COARSE_MM
    to_world[:3, 3] = high - COARSE_MM / 2
    to_world[3, 3] = 1.0
    hu, _ = _resample(ct, to_world, shape)
    body = body_mask(hu, COARSE_MM)
    litres = np.count_nonzero(body) * COARSE_MM**3 / 1e6
    if litres < MIN_BODY_LITRES:
        raise InputError(
            f"{ct.name}: no body found (largest region above -300 HU: {litres:.2f} litres; expected at least"
            f" {MIN_BODY_LITRES}); is the spacing in mm, are the values in HU?"
        )

    z = (low[2] + high[2]) / 2
    if high[2] - low[2] > fov_mm:
        lungs = _lung_rows(hu, body)
        if lungs is not None:
            middle = high[2] - COARSE_MM * (lungs[0] + lungs[1] + 1) / 2
            z = float(np.clip(middle, low[2] + fov_mm / 2, high[2] - fov_mm / 2))
    depth_mm = high[2] - COARSE_MM * (np.arange(shape[0]) + 0.5)
    near = body[np.abs(depth_mm - z) <= fov_mm / 2]
    trunk = _trunk(near if near.any() else body)
    y = high[1] - COARSE_MM * _middle(trunk.any(axis=2))
    x = high[0] - COARSE_MM * _middle(trunk.any(axis=1))
    return float(x), float(y), float(z)


def _trunk(body):
    """The deep part of the body in each slice: an arm at one side, thinner than the trunk, drops out."""
    trunk = np.zeros_like(body)
    for d, slab in enumerate(body):
        if slab.any():
            depth = ndimage.distance_transform_edt(np.pad(slab, 1))[1:-1, 1:-1]
            trunk[d] = depth > 0.6 * depth.max()
    return trunk


def _middle(profiles):
    """Median over the non-empty rows of the middle, in voxels, of the occupied range; ``(rows, n)`` bool."""
    profiles = profiles[profiles.any(axis=1)]
    first = profiles.argmax(axis=1)
    last = profiles.shape[1] - 1 - profiles[:, ::-1].argmax(axis=1)
    return float(np.median((first + last + 1) / 2))


def _lung_rows(hu, body):
    """First and last row (coarse voxels) of the lungs, or None."""
    air = ndimage.binary_opening((hu > -960) & (hu < -400) & body)
    labels, count = ndimage.label(air)
    sizes = np.bincount(labels.ravel())[1:]
    if not count or sizes.max() * COARSE_MM**3 < MIN_LUNG_MM3:
        return None
    lungs = np.isin(labels, 1 + np.flatnonzero(sizes >= 0.2 * sizes.max()))
    cumulative = np.cumsum(lungs.sum(axis=(1, 2))) / lungs.sum()
    return int(np.searchsorted(cumulative, 0.005)), int(np.searchsorted(cumulative, 0.995))


def body_mask(hu: np.ndarray, spacing_mm: float) -> np.ndarray:
    """The patient without couch, ``(D, H, W)`` bool, from HU ``(D, H, W)`` with cubic voxels.

    Tissue (above -300 HU) is opened by 4 mm per axial slice (thin couch shells vanish) and its largest 3D
    component taken; lungs and what else it encloses are added, with the chest wall the opening cost; per
    slice closed by 10 mm, holes filled, opened by 10 mm (cuts what barely touches the body); of this the
    largest 3D component again.
    """
    thin, thick = 4 / spacing_mm, 10 / spacing_mm
    tissue = hu > -300
    body = _largest(_dilate(_erode(tissue, thin), thin))
    cavities = _cavities(tissue, _dilate(body, thin))
    body |= cavities | (tissue & _dilate(cavities, thin + thick))
    body = _fill_holes(_erode(_dilate(body, thick), thick))
    return _largest(_dilate(_erode(body, thick), thick))


def _cavities(tissue, body):
    """Holes of the tissue of a slice with at least 60 % of their rim in the body: lungs, not a hollow couch."""
    labels, count = ndimage.label(_fill_holes(tissue) & ~tissue, structure=IN_PLANE)
    grown = ndimage.grey_dilation(labels, size=(1, 3, 3))
    rim = (grown > 0) & (labels == 0)
    length = np.bincount(grown[rim], minlength=count + 1)
    shared = np.bincount(grown[rim], weights=body[rim], minlength=count + 1)
    accepted = shared >= 0.6 * length
    accepted[0] = False
    return accepted[labels]


def _largest(mask):
    """The largest 3D component of ``mask``; empty when that is."""
    labels, count = ndimage.label(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else mask


def _disc(radius):
    reach = int(radius)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    return (y * y + x * x <= radius * radius)[None]


def _erode(mask, radius):
    return ndimage.binary_erosion(mask, _disc(radius), border_value=1)  # a body cut by the border ends there


def _dilate(mask, radius):
    return ndimage.binary_dilation(mask, _disc(radius))


def _fill_holes(mask):
    return ndimage.binary_fill_holes(mask, structure=IN_PLANE)


def remove_couch(hu: np.ndarray, spacing_mm: float | None = None) -> np.ndarray:
    """Set everything but the patient to air (-1024): couch, blankets, tubes. HU ``(D, H, W)``, same dtype out.

    spacing_mm: edge of the cubic voxels (default: those of a cube of the standard field of view). The
    body is :func:`body_mask` at about 2.8 mm, grown by 3 mm to keep the skin; arms stay while connected.
    """
    spacing_mm = FOV_MM / hu.shape[0] if spacing_mm is None else spacing_mm
    factor = max(1, round(2.8 / spacing_mm))
    if any(n % factor for n in hu.shape):
        factor = 1
    body = body_mask(area_average(hu, factor), spacing_mm * factor)
    body = _dilate(body, 3 / (spacing_mm * factor))
    for axis in range(3):
        body = body.repeat(factor, axis=axis)
    return np.where(body, hu, np.asarray(AIR_HU, dtype=hu.dtype))


def area_average(volume: np.ndarray, factor: int) -> np.ndarray:
    """Mean over blocks of ``factor`` voxels per axis: ``(D, H, W)`` -> float32 ``(D/f, H/f, W/f)``."""
    if factor == 1:
        return volume.astype(np.float32)
    d, h, w = (n // factor for n in volume.shape)
    return volume.reshape(d, factor, h, factor, w, factor).mean(axis=(1, 3, 5), dtype=np.float32)


# ------------------------------------------------------------------------------------------------
# Prepared cubes


def write_cube(path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write ``(D, H, W)`` as NIfTI with axes (W, H, D); ``affine`` from :func:`cube_affine`. Atomic."""
    image = nib.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def mask_path(path) -> Path:
    """``ID.nii.gz`` -> ``ID_mask.nii.gz`` beside it."""
    path = Path(path)
    return path.with_name(path.name[: len(path.name) - len(suffix_of(path))] + "_mask.nii.gz")


def read_cube(path, fov_mm: float = FOV_MM, size: int = 256, assume_ras: bool = False):
    """Read a CT as a patient cube: ``(hu float32 (D, H, W), mask uint8 (D, H, W), affine)``, edge ``size``.

    A file that already is a cube of this field of view keeps its place (area-averaged when its edge is a
    multiple of ``size``, else resampled) and its ``ID_mask.nii.gz``, if there is one; any other CT is
    located and resampled. ``affine`` is that of the returned cube on disk. Raises InputError as :func:`read_ct`.
    """
    ct = read_ct(path, assume_ras=assume_ras)
    edge = ct.data.shape[0]
    centre = ct.affine[:3, 3] - fov_mm / edge * (edge - 1) / 2
    is_cube = ct.data.shape == (edge,) * 3 and np.allclose(ct.affine, cube_affine(centre, fov_mm, edge), atol=1e-2)
    if not is_cube:
        centre = locate_cube(ct, fov_mm)
        hu, mask = resample_cube(ct, centre, fov_mm, size)
        return hu.astype(np.float32), mask, cube_affine(centre, fov_mm, size)
    scan = _read_mask(mask_path(path), ct)
    if edge % size:
        hu, mask = resample_cube(ct, centre, fov_mm, size)
        scan = resample_cube(CtImage(scan.data, ct.affine, scan.name), centre, fov_mm, size)[0]
        return hu.astype(np.float32), (mask & (scan > 0)).astype(np.uint8), cube_affine(centre, fov_mm, size)
    hu = area_average(np.clip(ct.data, AIR_HU, MAX_HU).transpose(2, 1, 0), edge // size)
    mask = area_average(scan.data.transpose(2, 1, 0), edge // size) >= 0.5
    return hu, mask.astype(np.uint8), cube_affine(centre, fov_mm, size)


def read_array_cube(path, fov_mm: float = FOV_MM, size: int = 256):
    """An ``.npy`` volume, as :func:`read_cube` gives it.

    An array has no affine, so its meaning is fixed: HU, the project's axes (D, H, W), one cube of
    ``fov_mm`` with equal edges; it is centred at the origin. Raises InputError for anything else.
    """
    path = Path(path)
    data = _check_data(path, read_npy(path))
    if len(set(data.shape)) != 1:
        raise InputError(f"{path}: shape is {data.shape}; expected a cube (N, N, N), axes (D, H, W), in HU")
    _check_hu(path, data)
    centre = (0.0, 0.0, 0.0)
    ct = CtImage(data.transpose(2, 1, 0), cube_affine(centre, fov_mm, data.shape[0]), str(path))
    hu, mask = resample_cube(ct, centre, fov_mm, size)
    return hu.astype(np.float32), mask, cube_affine(centre, fov_mm, size)


def _read_mask(path, ct):
    if not path.exists():
        return CtImage(np.ones(ct.data.shape, np.uint8), ct.affine, str(path))
    data, affine = _read_nifti(path, assume_ras=False)
    data = _check_data(path, data)
    if data.shape != ct.data.shape or not np.allclose(affine, ct.affine, atol=1e-2):
        raise InputError(f"{path}: the scan mask does not lie on the grid of {ct.name}")
    return CtImage(data, ct.affine, str(path))
