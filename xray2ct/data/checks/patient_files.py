"""Check of one patient's files: there, unchanged, on the manifest's grid, with plausible values."""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from xray2ct.conventions import AIR_HU, MAX_HU, PICTURES, RECORD, VIEW_LABELS, VIEW_NAMES, suffix_of
from xray2ct.data.checks.findings import UNKNOWN, Finding, one_per_problem
from xray2ct.files import InputError, is_file_name, read_json, sha256
from xray2ct.imaging.cube import cube_affine
from xray2ct.imaging.read_ct import read_ct


@dataclass
class Volume:
    """A patient's volume at working resolution: ``unit`` (n, n, n) in [0, 1] over the window, axes (D, H, W)."""

    unit: np.ndarray
    spacing_mm: float


@dataclass
class Fingerprints:
    """What is kept of each patient to compare it with the others."""

    volumes: dict[str, np.ndarray] = field(default_factory=dict)  # (16, 16, 16) HU
    renders: dict[str, np.ndarray] = field(default_factory=dict)  # (2, p, p), from the volume
    unexplained: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)  # (p, p), stored, of no known cause
    pictures: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))  # by SHA-256


def file_problems(folder, settings) -> list[str]:
    if not folder.folder.is_dir():
        return ["its folder is missing"]
    problems = []
    listed = settings.entries.get(folder.id, {}).get("files", {})
    for name in listed:
        if not is_file_name(name):
            problems.append(f"file {name!r} of the manifest leaves the patient's folder: not read")
        elif not (folder.folder / name).is_file():
            problems.append(f"{name} is missing")
    if settings.present:
        for view, path in enumerate(folder.xrays):
            if path is None and not any(f"{folder.id}{stem}" in name for name in listed for stem in VIEW_NAMES[view]):
                problems.append(f"there is no {VIEW_LABELS[view]} X-ray")
        if folder.volume is None and not problems and not folder.problems:
            problems.append("there is no volume")
    problems += folder.problems
    problems += [f"{path.relative_to(folder.folder)} is not used" for path in folder.unused]
    return problems + _record_problems(folder, settings)


def _record_problems(folder, settings) -> list[str]:
    path = folder.folder / RECORD
    if not path.is_file():
        return []
    try:
        record = read_json(path)
    except InputError:
        return [f"{RECORD} is not readable"]
    if not isinstance(record, dict) or not record.get("complete"):
        return ["its preparation was interrupted; run prepare_data.py again"]
    made = record.get("settings") or {}
    different = [key for key in made if settings.present and made[key] != settings.raw.get(key)]
    return [f"prepared with other settings than the manifest's: {', '.join(sorted(different))}"] if different else []


def check_checksums(folder, settings, fingerprints) -> list[Finding]:
    listed = settings.entries.get(folder.id, {}).get("files", {})
    views = {path.name: view for view, path in enumerate(folder.xrays) if path is not None}
    problems, digests = [], {}
    for name in {**listed, **views}:
        path = folder.folder / name
        if is_file_name(name) and path.is_file():
            digests[name] = sha256(path)
    for name, view in views.items():
        fingerprints.pictures[digests[name]].append((folder.id, view))
    for name, digest in digests.items():
        if name in listed and listed[name] != digest:
            problems.append(f"{name} was changed after the preparation (SHA-256 differs)")
    if not listed:
        return [Finding(folder.id, "checksums", UNKNOWN, "none recorded")]
    return one_per_problem(folder.id, "checksums", problems)


def read_raw(path):
    """``(data (D, H, W) as stored, affine or None, problems)``; an unreadable file raises InputError."""
    import nibabel as nib  # slow to import: it brings pydicom along
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, SpatialImage

    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False), None, []
        if suffix_of(path) not in (".nii.gz", ".nii"):
            ct = read_ct(path)
            return ct.data.T, ct.affine, []
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise ImageFileError("not a volume")
        data = np.asanyarray(image.dataobj)
    except (EOFError, zlib.error, OSError, ValueError, ImageFileError) as error:
        raise InputError(f"{path.name} cannot be read, or is truncated ({error})") from None
    except HeaderDataError as error:
        raise InputError(f"{path.name} has a damaged header ({error})") from None
    return data.T, image.affine, _header_problems(image)


def _header_problems(image) -> list[str]:
    (sform, sform_code), (qform, qform_code) = image.get_sform(coded=True), image.get_qform(coded=True)
    if not sform_code and not qform_code:
        return ["states no orientation (sform and qform code are both 0)"]
    if sform_code and qform_code and not np.allclose(sform, qform, atol=0.05):
        return ["sform and qform disagree: other programs may see another orientation"]
    return []


def grid_problems(folder, data, affine, settings) -> list[str]:
    size = settings.cube_size
    if data.shape != (size,) * 3:
        return [f"shape is {data.shape}; the manifest says {size} voxels per edge"]
    problems = []
    if affine is not None and settings.geometry is not None:
        centre = settings.entries[folder.id].get("centre_mm")
        problems += _affine_problems(affine, settings.geometry.fov_mm, size, centre)
    if folder.mask is not None:
        problems += _mask_problems(folder.mask, data, affine, settings.entries[folder.id].get("scan_fraction"))
    for view, path in enumerate(folder.xrays):
        problems += _picture_problems(path, settings.xray_size, view)
    return problems


def _affine_problems(affine, fov_mm, size, centre) -> list[str]:
    import nibabel as nib

    expected = cube_affine(centre if _is_point(centre) else (0, 0, 0), fov_mm, size)
    spacing, step = np.linalg.norm(affine[:3, :3], axis=0), fov_mm / size
    if not np.allclose(spacing, step, rtol=1e-3):
        return [f"spacing is {_times(spacing)} mm; the manifest says {step:.4g} mm"]
    if not np.allclose(affine[:3, :3], expected[:3, :3], atol=1e-3 * step):
        there, here = ("".join(nib.aff2axcodes(a)) for a in (affine, expected))
        turned = f"point to {there}, not {here}" if there != here else "are oblique"
        return [f"affine: the axes {turned}, so that the volume is read mirrored or turned"]
    if _is_point(centre) and not np.allclose(affine[:3, 3], expected[:3, 3], atol=0.02):
        off = np.abs(affine[:3, 3] - expected[:3, 3]).max()
        return [f"affine: the cube lies {off:.1f} mm from the centre_mm of the manifest"]
    return []


def _is_point(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)


def _times(values) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _mask_problems(path, data, affine, fraction) -> list[str]:
    try:
        mask, mask_affine, _ = read_raw(path)
    except InputError as error:
        return [str(error)]
    if mask.shape != data.shape or (affine is not None and not np.allclose(affine, mask_affine, atol=1e-2)):
        return [f"{path.name} does not lie on the grid of the volume"]
    outside = mask == 0
    if not (outside | (mask == 1)).all():
        return [f"{path.name} holds other values than 0 and 1"]
    if isinstance(fraction, (int, float)) and abs(1 - outside.mean() - fraction) > 1e-3:
        return [f"{path.name}: {1 - outside.mean():.2%} inside the scan; the manifest says {fraction:.2%}"]
    filled = np.count_nonzero(outside & (data > AIR_HU)) / data.size
    return [f"{path.name}: {filled:.1%} of the cube lies outside the scan but is not air"] if filled > 1e-3 else []


def _picture_problems(path, size, view) -> list[str]:
    if path is None or size is None or path.suffix.lower() not in PICTURES:
        return []
    try:
        with Image.open(path) as picture:
            shape, mode = picture.size, picture.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return []  # the X-ray's own check says why
    if shape != (size, size):
        return [f"the {VIEW_LABELS[view]} X-ray has {shape[0]} x {shape[1]} pixels; the manifest says {size} x {size}"]
    return [] if mode.startswith("I") else [f"the {VIEW_LABELS[view]} X-ray has mode {mode}, not 16-bit grey"]


def value_problem(data: np.ndarray, prepared: bool = True) -> str | None:
    """What makes voxels of any shape unusable as Hounsfield units, or None.

    prepared: also hold them to the range that prepare_data.py writes, [-1024, 3071].
    """
    if data.dtype.kind not in "iuf":
        return f"voxel type is {data.dtype}; expected one number (HU) per voxel"
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        return f"NaN or infinity in {np.count_nonzero(~np.isfinite(data)) / data.size:.2%} of the voxels"
    if data.size == 0 or data.ndim != 3:
        return f"shape is {data.shape}; expected a 3D volume"
    low, high = float(data.min()), float(data.max())
    span = f"values {low:g} to {high:g}"
    if low == high:
        return f"constant: every voxel is {low:g}"
    if low < -500 and high < -200:
        return f"air only ({span})"
    if low >= -1.5 and high <= 1.5:
        return f"not Hounsfield units: {span}, as of a volume scaled to [0, 1] or [-1, 1]"
    if low >= 0:
        return f"not Hounsfield units: no negative values ({span}), as of HU + 1024 or of a picture"
    if np.count_nonzero((data < -500) & (data > -1500)) < 1e-3 * data.size:
        return f"not Hounsfield units: no air ({span}, hardly any between -1500 and -500)"
    if np.count_nonzero((data > -300) & (data < 300)) < 1e-3 * data.size:
        return f"not Hounsfield units: no soft tissue ({span}, hardly any between -300 and 300)"
    if prepared and (low < AIR_HU or high > MAX_HU):
        return f"{span}; prepared volumes lie between {AIR_HU} and {MAX_HU} HU"
    return None


def level_problem(hu: np.ndarray, body: np.ndarray) -> str | None:
    """Scale or zero of the HU off: the levels of air and soft tissue tell. ``hu`` and ``body`` are (D, H, W)."""
    soft, air = hu[body & (hu > -300) & (hu < 350)], hu[~body & (hu < -500)]
    if min(soft.size, air.size) < 500:
        return None
    levels = float(np.median(soft)), float(np.median(air))
    # Seen: soft tissue -57 to 38 HU (the fat's share varies), air around the body -1024 to -969.
    if -130 < levels[0] < 120 and -1050 < levels[1] < -880:
        return None
    return (
        f"Hounsfield units shifted or scaled: soft tissue has a median of {levels[0]:.0f} HU and the air beside the"
        f" body {levels[1]:.0f} HU; expected about 0 and -1000"
    )
