"""Check of a data set: is it what its manifest says, the right way round, and free of near-duplicates?

    python dataset.py --check data
    python dataset.py --check data --json report.json

Nothing is written below the data set. Each patient is looked at in four ways: files (there, checksums, grid,
value range), anatomy (orientation of the volume by its lungs, spine, heart and liver alone),
X-rays (against the ones rendered from the stored volume) and near-duplicates among other patients. Anatomy may be odd:
where a measure is not clear the answer is "cannot tell", which is no failure. Thresholds were set on 25 public
chest CTs of eleven collections (supine, with couch, with and without contrast agent, masses and effusions) and
on phantoms; the comments give the ranges seen there.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from xray2ct.conventions import MANIFEST
from xray2ct.data.archive.sources import licence_lines
from xray2ct.data.checks.anatomy import orientation
from xray2ct.data.checks.findings import FAILED, SIDES, UNKNOWN, Finding, one_per_problem, print_report, report_dict
from xray2ct.data.checks.near_duplicates import VIEW_CHECKS, check_duplicates, name_other_patients
from xray2ct.data.checks.patient_files import (
    Fingerprints,
    Volume,
    check_checksums,
    file_problems,
    grid_problems,
    level_problem,
    read_raw,
    value_problem,
)
from xray2ct.data.checks.settings import check_folders, check_split_lists, read_settings
from xray2ct.data.checks.xray_comparison import compare_xray, name_geometry, other_geometries, render, resize
from xray2ct.data.patient_files import PatientFolder, visible
from xray2ct.files import InputError, check_writable, write_json
from xray2ct.geometry.projector import Geometry, hu_to_unit, unit_to_hu
from xray2ct.imaging.body import body_mask
from xray2ct.imaging.cube import area_average
from xray2ct.imaging.cube_files import read_array_cube, read_cube
from xray2ct.imaging.film import check_spacings
from xray2ct.imaging.read_films import read_films
from xray2ct.imaging.read_xray import read_xray
from xray2ct.progress import progress_bar

RENDER_SIZE = 128  # voxels and pixels per edge at which X-rays are compared, at most
ANATOMY_MM = 5.0  # organs are measured on voxels of at least this edge
FINGERPRINT_SIZE = 64  # pixels per edge of what is kept of each X-ray to be compared between patients


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
    settings, findings = read_settings(root)
    findings += check_split_lists(settings)
    holding = [folder.id for folder in folders if folder.volume is not None]
    patients = sorted(settings.entries) if settings.present else holding
    if not patients:
        raise InputError(f"{root}: no patient {f'in {MANIFEST}' if settings.present else 'folder found'}")
    findings += check_folders(root, folders, patients, settings)
    fingerprints = Fingerprints()
    for patient in progress(patients) if progress else patients:
        findings += _check_patient(root, patient, settings, fingerprints)
    findings = name_other_patients(findings, fingerprints, settings)
    return findings + check_duplicates(patients, fingerprints, settings)


# ------------------------------------------------------------------------------------------------
# One patient: files, grid, values


def _check_patient(root, patient, settings, fingerprints) -> list[Finding]:
    folder = PatientFolder(root / patient)
    findings = one_per_problem(patient, "files", file_problems(folder, settings))
    findings += check_checksums(folder, settings, fingerprints)
    if folder.volume is None:
        return findings + _not_checked(patient, ("grid", "values", *SIDES, *VIEW_CHECKS), "there is no volume")
    try:
        data, affine, problems = read_raw(folder.volume)
    except InputError as error:
        return [
            *findings,
            Finding(patient, "values", FAILED, str(error)),
            *_not_checked(patient, ("grid", *SIDES, *VIEW_CHECKS), "the volume cannot be read"),
        ]
    if settings.present:
        problems += grid_problems(folder, data, affine, settings)
    findings += one_per_problem(patient, "grid", problems)
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
    findings += one_per_problem(patient, "values", [problem] if problem else [])
    if volume is None:
        return findings + _not_checked(patient, (*SIDES, *VIEW_CHECKS), "the volume is unusable")
    findings += [Finding(patient, side, *answer) for side, answer in orientation(hu, spacing_mm, body).items()]
    fingerprints.volumes[patient] = resize(hu, 16)
    return findings + _check_xrays(folder, volume, settings, fingerprints)


def _not_checked(patient, checks, why) -> list[Finding]:
    return [Finding(patient, check, UNKNOWN, f"not checked: {why}") for check in checks]


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


def _check_xrays(folder, volume, settings, fingerprints) -> list[Finding]:
    if settings.geometry is None:
        return _not_checked(folder.id, VIEW_CHECKS, "the manifest's geometry is unusable")
    size = volume.unit.shape[0]
    rendered = render(volume.unit, settings.geometry, settings)
    fingerprints.renders[folder.id] = np.stack([resize(image, min(size, FINGERPRINT_SIZE)) for image in rendered])
    findings, others = [], []
    for view, answer in enumerate((_read_stored if settings.present else _read_by_hand)(folder.xrays, size, settings)):
        status, text = UNKNOWN, "not checked: there is no X-ray"
        if isinstance(answer, InputError):
            status, text = FAILED, str(answer)
        elif answer is not None:
            stored, notes = answer
            status, text = compare_xray(stored, rendered, view, linear=settings.present)
            if status == FAILED and not text:
                others = others or list(other_geometries(volume.unit, settings))
                sure, text = name_geometry(stored, rendered, others, view)
                if not sure:  # another patient's, perhaps: seen when all are known
                    fingerprints.unexplained[folder.id, view] = resize(stored, min(size, FINGERPRINT_SIZE))
            if notes and settings.present:
                status = FAILED
            text = "; ".join(filter(None, [*notes, text]))
        findings.append(Finding(folder.id, VIEW_CHECKS[view], status, text))
    return findings


Read = tuple[np.ndarray, list[str]] | InputError | None  # a view's picture with notes, why there is none, no file


def _read_stored(paths, size, settings) -> list[Read]:
    """X-rays that prepare_data.py wrote, one by one; a picture refused for its polarity is inverted, and noted."""
    answers: list[Read] = []
    spacings: dict = {}
    for view, path in enumerate(paths):
        notes: list[str] = []
        try:
            if path is not None:
                try:
                    xray = read_xray(path, "manifest", size, view, geometry=settings.geometry)
                except InputError as error:
                    if "invert" not in str(error):
                        raise
                    xray = read_xray(path, "manifest", size, view, invert=True, geometry=settings.geometry)
                    notes = ["inverted (bone dark, air bright)"]
                spacings[path] = xray
                check_spacings(spacings)
            answers.append(None if path is None else (xray.pixels, notes))
        except InputError as error:
            answers.append(error)
    return answers


def _read_by_hand(paths, size, settings) -> list[Read]:
    """Any X-rays as the data set reads them: both together, with what their pixels decided or left in doubt."""
    try:
        pair = read_films(tuple(paths), "auto", size, settings.geometry)
    except InputError as error:
        return [None if path is None else error for path in paths]
    said = [[doubt for doubt in pair.doubts if doubt.startswith(f"{path}: ")] for path in paths]
    return [None if xray is None else (xray.pixels, notes) for xray, notes in zip(pair.views, said)]


# ------------------------------------------------------------------------------------------------
# Command


def check_command(root, json_file=None) -> int:
    """``python dataset.py --check ROOT [--json FILE]``: exit status 0 when all is well, 1 when something failed."""
    if json_file is not None and (os.path.isdir(json_file) or not os.path.isdir(Path(json_file).resolve().parent)):
        raise InputError(f"--json {json_file}: expected a file name in an existing folder")
    if json_file is not None:
        check_writable(json_file, "--json")
    findings = check_dataset(
        root, progress=lambda ids: progress_bar(ids, desc="checking", unit="patients", leave=False)
    )
    print_report(findings)
    for line in licence_lines(read_settings(Path(root))[0].entries):
        print(line)
    if json_file is not None:
        write_json(json_file, report_dict(findings))
    return int(any(finding.status == FAILED for finding in findings))
