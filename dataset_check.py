"""The geometry doctor: is a data set what its manifest says, the right way round, and free of duplicates?

    python dataset.py --check data
    python dataset.py --check data --json report.json

Nothing is written below the data set. Each patient is looked at in four ways: files (there, checksums, grid,
value range), anatomy (which way head, front and left point, from lungs, spine, heart and liver alone),
X-rays (against the ones rendered from the stored volume) and likeness to other patients. Anatomy may be odd:
where a measure is not clear the answer is "cannot tell", which is no failure. Thresholds were set on 25 public
chest CTs of eleven collections (supine, with couch, with and without contrast agent, masses and effusions) and
on phantoms; the comments give the ranges seen there.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from anatomy import orientation
from ct_io import AIR_HU, MAX_HU, area_average, body_mask, cube_affine, read_array_cube, read_ct, read_cube
from dataset import CUBE_SIZE, MANIFEST, MANIFEST_VERSION
from files import InputError, check_writable, read_json, write_json
from findings import FAILED, OK, SIDES, UNKNOWN, Finding, print_report, report_dict
from patient_files import VIEW_LABELS, VIEW_NAMES, PatientFolder, loose_files, suffix_of, visible
from prepare_data import RECORD, sha256
from projector import HU_WINDOW, MU_WATER, XRAY_SCALE, Geometry, hu_to_unit, unit_to_hu
from splits import SPLITS, split_hash
from xray_comparison import (
    SAME_XRAY_COARSE,
    compare_xray,
    miss_of,
    name_geometry,
    other_geometries,
    render,
    resize,
)
from xray_io import PICTURES, XrayImage, check_spacings, read_xray

VIEW_CHECKS = ("PA X-ray", "lateral X-ray")
RENDER_SIZE = 128  # voxels and pixels per edge at which X-rays are compared, at most
ANATOMY_MM = 5.0  # organs are measured on voxels of at least this edge
PRINT_SIZE = 64  # pixels per edge of what is kept of each X-ray to be compared between patients

# Mean difference in HU at 22 mm: seen 0 for a copy, 60 at least between patients.
COPY_HU, NEAR_COPY_HU = 2.0, 15.0


@dataclass
class Settings:
    """What the manifest says, or stated defaults; None where the manifest's own value is unusable."""

    present: bool
    geometry: Geometry | None
    hu_window: tuple[float, float]
    xray_scale: float
    cube_size: int
    xray_size: int | None
    split: dict[str, list[str]]
    entries: dict[str, dict]
    raw: dict

    def split_of(self, patient: str) -> str:
        """Names of the splits that list a patient, or "no split"."""
        return " and ".join(name for name in SPLITS if patient in self.split.get(name, ())) or "no split"


@dataclass
class Volume:
    """A patient's volume at working resolution: ``unit`` (n, n, n) in [0, 1] over the window, axes (D, H, W)."""

    unit: np.ndarray
    spacing_mm: float


@dataclass
class Prints:
    """What is kept of each patient to compare it with the others."""

    volumes: dict[str, np.ndarray] = field(default_factory=dict)  # (16, 16, 16) HU
    renders: dict[str, np.ndarray] = field(default_factory=dict)  # (2, p, p), from the volume
    unexplained: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)  # (p, p), stored, of no known cause
    pictures: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))  # by SHA-256


# ------------------------------------------------------------------------------------------------
# Data set


def check_dataset(root, progress=None) -> list[Finding]:
    """Check a whole data set; returns findings in the order data set, then patients by id.

    progress: wraps the iterable of patient ids (such as ``tqdm``).
    Raises :class:`InputError` where there is nothing to check: no such folder, no patients in it, or a
    manifest that is not readable JSON.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected a data set (see prepare_data.py)")
    folders = [PatientFolder(path) for path in visible(root) if path.is_dir()]
    settings, findings = _read_settings(root)
    findings += _check_split(settings)
    holding = [folder.id for folder in folders if folder.volume is not None]
    patients = sorted(settings.entries) if settings.present else holding
    if not patients:
        raise InputError(f"{root}: no patient {f'in {MANIFEST}' if settings.present else 'folder found'}")
    findings += _check_folders(root, folders, patients, settings)
    prints = Prints()
    for patient in progress(patients) if progress else patients:
        findings += _check_patient(root, patient, settings, prints)
    findings = _name_other_patients(findings, prints, settings)
    return findings + _check_duplicates(patients, prints, settings)


def _read_settings(root) -> tuple[Settings, list[Finding]]:
    path = root / MANIFEST
    default = Settings(False, Geometry(), HU_WINDOW, XRAY_SCALE, CUBE_SIZE, None, {}, {}, {})
    if not path.exists():
        text = f"no {MANIFEST}: defaults assumed; checksums, grid and brightness cannot be checked"
        return default, [Finding(None, "manifest", UNKNOWN, text)]
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("patients"), dict):
        raise InputError(f"{path}: expected an object with the patients' entries under 'patients'")
    settings, problems = replace(default, present=True, raw=data), []
    version = data.get("format_version")
    if version != MANIFEST_VERSION:
        problems.append(f"format_version {version}; this version reads {MANIFEST_VERSION}")
    if data.get("mu_water") != MU_WATER:
        problems.append(f"mu_water is {data.get('mu_water')}; this version renders with {MU_WATER}")
    readers = {
        "geometry": lambda value: Geometry.from_dict(value),
        "hu_window": _read_window,
        "xray_scale": _positive(float),
        "cube_size": _positive(int),
        "xray_size": _positive(int),
    }
    for key, reader in readers.items():
        try:
            setattr(settings, key, reader(data[key]))
        except KeyError:
            problems.append(f"key '{key}' is missing")
        except (TypeError, ValueError, AttributeError) as error:
            problems.append(f"{key}: {error}")
        else:
            continue
        settings.geometry = None  # without all of these no X-ray can be rendered
    settings.split = _usable_split(data.get("split"))
    for patient, entry in data["patients"].items():
        if not _is_plain_name(patient):
            problems.append(f"patient id {patient!r} leaves its folder: not read")
        elif not isinstance(entry, dict) or not isinstance(entry.get("files"), dict):
            problems.append(f"the entry of {patient} lists no files")
            settings.entries[patient] = {"files": {}}
        else:
            settings.entries[patient] = entry
    return settings, _answers(None, "manifest", problems)


def _read_window(value):
    low, high = (float(v) for v in value)
    if not low < high:
        raise ValueError(f"{value}; expected two HU, the lower first")
    return low, high


def _positive(kind):
    def read(value):
        if isinstance(value, bool) or not kind(value) > 0:
            raise ValueError(f"{value!r}; expected a number above 0")
        return kind(value)

    return read


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _usable_split(split) -> dict[str, list[str]]:
    split = split if isinstance(split, dict) else {}
    lists = {name: split.get(name) for name in SPLITS}
    return {name: [p for p in ids if isinstance(p, str)] for name, ids in lists.items() if isinstance(ids, list)}


def _check_split(settings) -> list[Finding]:
    if not settings.present:
        return [Finding(None, "split", UNKNOWN, "no manifest: patients are split by hash of their id")]
    split = settings.raw.get("split")
    if not isinstance(split, dict) or set(split) != set(SPLITS) or set(settings.split) != set(SPLITS):
        return [Finding(None, "split", FAILED, "expected lists of patient ids under exactly train, val and test")]
    listed, problems = Counter(p for name in SPLITS for p in settings.split[name]), []
    for patient in sorted(listed):
        inside = [name for name in SPLITS if patient in settings.split[name]]
        if len(inside) > 1:
            problems.append(f"{patient} is in {' and '.join(inside)}")
        elif listed[patient] > 1:
            problems.append(f"{patient} is listed {listed[patient]} times in {inside[0]}")
        if patient not in settings.entries:
            problems.append(f"{patient} ({inside[0]}) is not a patient of the data set")
    problems += [f"{patient} is in no split" for patient in sorted(set(settings.entries) - set(listed))]
    if not problems and settings.raw.get("split_hash", split_hash(split)) != split_hash(split):
        problems.append("split_hash is not that of the lists: they were changed after the preparation")
    return _answers(None, "split", problems)


def _check_folders(root, folders, patients, settings) -> list[Finding]:
    problems = []
    for folder in folders:
        if folder.id not in patients:
            what = [f"is not in {MANIFEST}"] if settings.present else folder.problems or ["holds no volume"]
            problems.append(f"extra folder {folder.id}: {what[0]}")
    problems += [f"{path.name} lies outside the patients' folders: not used" for path in loose_files(root)]
    spellings = defaultdict(list)
    for name in {*(folder.id for folder in folders), *patients}:
        spellings[name.lower()].append(name)
    for names in spellings.values():
        if len(names) > 1:
            problems.append(f"{' and '.join(sorted(names))} differ only in upper and lower case")
    return _answers(None, "folders", problems)


def _answers(patient, check, problems, fine="") -> list[Finding]:
    """One failed finding per problem, or one that says all is well."""
    return [Finding(patient, check, FAILED, text) for text in problems] or [Finding(patient, check, OK, fine)]


# ------------------------------------------------------------------------------------------------
# One patient: files, grid, values


def _check_patient(root, patient, settings, prints) -> list[Finding]:
    folder = PatientFolder(root / patient)
    findings = _answers(patient, "files", _file_problems(folder, settings))
    findings += _check_checksums(folder, settings, prints)
    if folder.volume is None:
        return findings + _not_checked(patient, ("grid", "values", *SIDES, *VIEW_CHECKS), "there is no volume")
    try:
        data, affine, problems = _read_raw(folder.volume)
    except InputError as error:
        return [
            *findings,
            Finding(patient, "values", FAILED, str(error)),
            *_not_checked(patient, ("grid", *SIDES, *VIEW_CHECKS), "the volume cannot be read"),
        ]
    if settings.present:
        problems += _grid_problems(folder, data, affine, settings)
    findings += _answers(patient, "grid", problems)
    problem = value_problem(data, prepared=settings.present)
    try:
        volume = None if problem else _working_volume(folder.volume, data, bool(problems), settings)
    except InputError as error:  # off its grid, that is a consequence and no failure of its own
        problem, volume = None if problems else str(error), None
    del data
    if volume is not None:
        hu, spacing_mm = _coarse_hu(volume, settings)
        body = body_mask(hu, spacing_mm)
        problem = level_problem(hu, body)
    findings += _answers(patient, "values", [problem] if problem else [])
    if volume is None:
        return findings + _not_checked(patient, (*SIDES, *VIEW_CHECKS), "the volume is unusable")
    findings += [Finding(patient, side, *answer) for side, answer in orientation(hu, spacing_mm, body).items()]
    prints.volumes[patient] = resize(hu, 16)
    return findings + _check_xrays(folder, volume, settings, prints)


def _not_checked(patient, checks, why) -> list[Finding]:
    return [Finding(patient, check, UNKNOWN, f"not checked: {why}") for check in checks]


def _file_problems(folder, settings) -> list[str]:
    if not folder.folder.is_dir():
        return ["its folder is missing"]
    problems = []
    listed = settings.entries.get(folder.id, {}).get("files", {})
    for name in listed:
        if not _is_plain_name(name):
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


def _check_checksums(folder, settings, prints) -> list[Finding]:
    listed = settings.entries.get(folder.id, {}).get("files", {})
    views = {path.name: view for view, path in enumerate(folder.xrays) if path is not None}
    problems, digests = [], {}
    for name in {**listed, **views}:
        path = folder.folder / name
        if _is_plain_name(name) and path.is_file():
            digests[name] = sha256(path)
    for name, view in views.items():
        prints.pictures[digests[name]].append((folder.id, view))
    for name, digest in digests.items():
        if name in listed and listed[name] != digest:
            problems.append(f"{name} was changed after the preparation (SHA-256 differs)")
    if not listed:
        return [Finding(folder.id, "checksums", UNKNOWN, "none recorded")]
    return _answers(folder.id, "checksums", problems)


def _read_raw(path):
    """``(data (D, H, W) as stored, affine or None, problems)``; an unreadable file raises InputError."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False), None, []
        if suffix_of(path) not in (".nii.gz", ".nii"):
            ct = read_ct(path)
            return ct.data.T, ct.affine, []
        image = nib.load(path)
        data = np.asanyarray(image.dataobj)
    except (EOFError, zlib.error, OSError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path.name} cannot be read, or is truncated ({error})") from None
    except nib.spatialimages.HeaderDataError as error:
        raise InputError(f"{path.name} has a damaged header ({error})") from None
    return data.T, image.affine, _header_problems(image)


def _header_problems(image) -> list[str]:
    (sform, sform_code), (qform, qform_code) = image.get_sform(coded=True), image.get_qform(coded=True)
    if not sform_code and not qform_code:
        return ["states no orientation (sform and qform code are both 0)"]
    if sform_code and qform_code and not np.allclose(sform, qform, atol=0.05):
        return ["sform and qform disagree: other programs may see another orientation"]
    return []


def _grid_problems(folder, data, affine, settings) -> list[str]:
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
    expected = cube_affine(centre if _is_point(centre) else (0, 0, 0), fov_mm, size)
    spacing, step = np.linalg.norm(affine[:3, :3], axis=0), fov_mm / size
    if not np.allclose(spacing, step, rtol=1e-3):
        return [f"spacing is {_numbers(spacing)} mm; the manifest says {step:.4g} mm"]
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


def _numbers(values) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _mask_problems(path, data, affine, fraction) -> list[str]:
    try:
        mask, mask_affine, _ = _read_raw(path)
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
    # Seen: soft tissue -57 to 38 HU (the fat's share varies), air beside the body -1024 to -969.
    if -130 < levels[0] < 120 and -1050 < levels[1] < -880:
        return None
    return (
        f"Hounsfield units shifted or scaled: soft tissue has a median of {levels[0]:.0f} HU and the air beside the"
        f" body {levels[1]:.0f} HU; expected about 0 and -1000"
    )


def _working_volume(path, data, off_grid: bool, settings) -> Volume:
    """At most 128 voxels per edge; a file that is not the manifest's cube is read as PatientDataset reads it."""
    window = settings.hu_window
    fov_mm = (settings.geometry or Geometry()).fov_mm
    if settings.present and not off_grid:
        size = settings.cube_size
        factor = next(f for f in range(1, size + 1) if size % f == 0 and size // f <= RENDER_SIZE)
        unit = area_average(hu_to_unit(data.astype(np.float32), window), factor)
    else:
        size = min(settings.cube_size, RENDER_SIZE)
        reader = read_array_cube if path.suffix.lower() == ".npy" else read_cube
        unit = hu_to_unit(reader(path, fov_mm, size)[0], window).astype(np.float32)
    return Volume(unit, fov_mm / unit.shape[0])


def _coarse_hu(volume: Volume, settings) -> tuple[np.ndarray, float]:
    factor, size = 1, volume.unit.shape[0]
    while volume.spacing_mm * factor < ANATOMY_MM and size % (2 * factor) == 0:
        factor *= 2
    hu = unit_to_hu(area_average(volume.unit, factor), settings.hu_window)
    return hu, volume.spacing_mm * factor


# ------------------------------------------------------------------------------------------------
# X-rays against the ones rendered from the stored volume


def _check_xrays(folder, volume, settings, prints) -> list[Finding]:
    if settings.geometry is None:
        return _not_checked(folder.id, VIEW_CHECKS, "the manifest's geometry is unusable")
    size = volume.unit.shape[0]
    rendered = render(volume.unit, settings.geometry, settings)
    prints.renders[folder.id] = np.stack([resize(image, min(size, PRINT_SIZE)) for image in rendered])
    findings, others, read = [], [], {}
    for view, path in enumerate(folder.xrays):
        status, text = UNKNOWN, "not checked: there is no X-ray"
        try:
            if path is not None:
                read[path], notes = _read_stored(path, size, view, settings)
                check_spacings(read)
                stored = read[path].pixels
                status, text = compare_xray(stored, rendered, view, linear=settings.present)
                if status == FAILED and not text:
                    others = others or list(other_geometries(volume.unit, settings))
                    sure, text = name_geometry(stored, rendered, others, view)
                    if not sure:  # another patient's, perhaps: seen when all are known
                        prints.unexplained[folder.id, view] = resize(stored, min(size, PRINT_SIZE))
                if notes:
                    status, text = FAILED, "; ".join([*notes, *([text] if text else [])])
        except InputError as error:
            status, text = FAILED, str(error)
        findings.append(Finding(folder.id, VIEW_CHECKS[view], status, text))
    return findings


def _read_stored(path, size, view, settings) -> tuple[XrayImage, list[str]]:
    """The stored picture at ``size`` pixels; a picture refused for its polarity is inverted, and noted."""
    options = {"normalization": "manifest" if settings.present else "percentile", "size": size, "view": view}
    options["geometry"] = settings.geometry
    try:
        return read_xray(path, **options), []
    except InputError as error:
        if "invert" not in str(error):
            raise
        return read_xray(path, invert=True, **options), ["inverted (bone dark, air bright)"]


# ------------------------------------------------------------------------------------------------
# Between patients


def _name_other_patients(findings, prints, settings) -> list[Finding]:
    """Name the patient whose picture it is, where an X-ray does not show its own folder's volume."""
    named = []
    for finding in findings:
        view = VIEW_CHECKS.index(finding.check) if finding.check in VIEW_CHECKS else None
        stored = prints.unexplained.get((finding.patient, view))
        owner = None if stored is None else _owner(stored, finding.patient, prints)
        if owner:
            patient, other = owner
            what = f"shows another patient: it is {patient}'s {VIEW_LABELS[other]} view ({settings.split_of(patient)})"
            finding = replace(finding, message=what)
        named.append(finding)
    return named


def _owner(stored, patient, prints) -> tuple[str, int] | None:
    candidates = [
        (miss_of(stored, image), other, view)
        for other, images in prints.renders.items()
        if other != patient
        for view, image in enumerate(images)
        if image.shape == stored.shape
    ]
    miss, other, view = min(candidates, default=(1.0, "", 0))
    return (other, view) if miss <= SAME_XRAY_COARSE else None


def _check_duplicates(patients, prints, settings) -> list[Finding]:
    problems = defaultdict(list)

    def pair(one, other, words):
        sides = settings.split_of(one), settings.split_of(other)
        leak = " (across splits: a leak)" if settings.present and sides[0] != sides[1] else ""
        problems[one].append(f"{words} {other}, {sides[0]} and {sides[1]}{leak}")
        problems[other].append(f"{words} {one}, {sides[1]} and {sides[0]}{leak}")

    for one, other, words in _volume_pairs(prints.volumes):
        pair(one, other, words)
    for owners in prints.pictures.values():
        for (one, view), (other, view_other) in combinations(owners, 2):
            if one == other:
                problems[one].append("the PA and the lateral X-ray are the same file")
            else:
                pair(one, other, f"its {VIEW_LABELS[view]} X-ray is the same file as the {VIEW_LABELS[view_other]} of")
    sources = defaultdict(list)
    for patient, entry in settings.entries.items():
        if isinstance(entry.get("source"), str):
            sources[entry["source"]].append(patient)
    for source, owners in sources.items():
        for one, other in combinations(owners, 2):
            pair(one, other, f"made from the same source {source!r} as")
    return [found for patient in patients for found in _answers(patient, "duplicates", problems[patient])]


def _volume_pairs(volumes) -> Iterable[tuple[str, str, str]]:
    """(one, other, words) for volumes that are the same or nearly so, also mirrored left to right."""
    ids = list(volumes)
    if len(ids) < 2:
        return
    plain = np.stack([volumes[name].ravel() for name in ids])
    mirrored = np.stack([volumes[name][:, :, ::-1].ravel() for name in ids])
    for index, one in enumerate(ids[:-1]):
        for words, table in (("", plain), ("mirrored ", mirrored)):
            distances = np.abs(table[index + 1 :] - plain[index]).mean(axis=1)
            for step in np.flatnonzero(distances < NEAR_COPY_HU):
                near = "nearly " if distances[step] > COPY_HU else ""
                yield one, ids[index + 1 + step], f"{near}the same {words}volume as"


def check_command(root, json_file=None) -> int:
    """``python dataset.py --check ROOT [--json FILE]``: exit status 0 when all is well, 1 when something failed."""
    if json_file is not None and (os.path.isdir(json_file) or not os.path.isdir(Path(json_file).resolve().parent)):
        raise InputError(f"--json {json_file}: expected a file name in an existing folder")
    if json_file is not None:
        check_writable(json_file, "--json")
    findings = check_dataset(root, progress=lambda ids: tqdm(ids, desc="checking", unit="patient", leave=False))
    print_report(findings)
    if json_file is not None:
        write_json(json_file, report_dict(findings))
    return int(any(finding.status == FAILED for finding in findings))
