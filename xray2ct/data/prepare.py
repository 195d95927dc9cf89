"""Prepare one CT: the patient cube, its scan mask, two X-rays, and a record of how they were made.

Restartable: a patient is done when ``prepared.json`` says so and every checksum holds.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from xray2ct.conventions import REAL_XRAYS, RECORD, VIEW_LABELS
from xray2ct.data.films import choose_films
from xray2ct.data.scouts import Cube, place_scouts
from xray2ct.files import InputError, check_patient_id, read_json, sha256, write_json
from xray2ct.geometry.projector import Geometry, hu_to_unit, render_xrays
from xray2ct.imaging.body import locate_cube, remove_couch
from xray2ct.imaging.cube import cube_affine, resample_cube
from xray2ct.imaging.cube_files import write_cube
from xray2ct.imaging.dicom_files import dicom_files
from xray2ct.imaging.find_cts import XRAY_FOLDERS, CtSource, source_files, xray_folder
from xray2ct.imaging.read_ct import read_ct
from xray2ct.imaging.read_scout import find_scouts, frame_of_reference
from xray2ct.imaging.read_xray import write_png16


def prepare_patient(source: CtSource, folder, settings: dict) -> tuple[dict, list[str]]:
    """Write one patient's folder; ``settings`` as in the manifest. Returns the manifest entry and notes.

    Each file is replaced atomically, and the record that makes the patient count as done comes last. Computed on one
    thread, so that the bytes do not depend on how many a machine has.
    """
    with _one_thread():
        return _prepare(source, Path(folder), settings)


@contextlib.contextmanager
def _one_thread():
    """torch on one thread: sums over several come out different in their last bits, and so does a rounded pixel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(source, folder, settings):
    patient = check_patient_id(source.patient_id, source.path)
    geometry = Geometry.from_dict(settings["geometry"])
    fov_mm, size = geometry.fov_mm, settings["cube_size"]
    signature = signature_of(source, _files_beside(source, settings))  # before reading: notices a change meanwhile
    scouts = find_scouts(source) if settings.get("scouts") else []
    films = dicom_files(xray_folder(source, "films")) if settings.get("films") else []
    ct = read_ct(source.path, source.kind, assume_ras=settings["assume_ras"])
    notes = list(ct.notes)
    centre = locate_cube(ct, fov_mm)
    hu, mask = resample_cube(ct, centre, fov_mm, size)
    del ct
    if settings["couch_removed"]:
        hu = remove_couch(hu, fov_mm / size)
    xrays = _render(hu, geometry, settings, notes)
    cube = Cube.of(hu, mask, fov_mm, centre) if scouts else None
    pictures, records = _real_pictures(source, scouts, films, cube, geometry, settings, notes)

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"complete": False, "settings": settings})  # marks the folder as ours
    for name in (patient, RECORD):
        for stale in folder.glob(f".{name}*.tmp*"):  # a run that was killed while writing
            stale.unlink()
    names = patient_files(patient)
    affine = cube_affine(centre, fov_mm, size)
    write_cube(folder / names[0], hu, affine)
    write_cube(folder / names[1], mask, affine)
    for name, image in zip(names[2:], xrays):
        write_png16(folder / name, image)
    for name, image in pictures.items():
        write_png16(folder / name, image, own_scale=True)
    names = (*names, *pictures)
    entry = {
        "source": source.path.name,  # relative to --input in the manifest
        "centre_mm": [round(value, 3) for value in centre],
        "scan_fraction": round(float(mask.mean()), 4),
        "files": {name: sha256(folder / name) for name in names},
    }
    entry |= records
    written = {name: _stamp(folder / name) for name in names}
    record = {"complete": True, "settings": settings, "signature": signature, "written": written, "patient": entry}
    write_json(folder / RECORD, record)
    return entry, notes


def _real_pictures(source, scouts, films, cube: Cube | None, geometry, settings, notes):
    """``({file: pixels}, {"scouts": {file: record}, "films": ...})`` of the kinds that the settings ask for."""
    patient, size = source.patient_id, settings["xray_size"]
    pictures, records = {}, {kind: {} for kind in XRAY_FOLDERS if settings.get(kind)}
    if cube is not None:
        frame = frame_of_reference(source)
        placed, left_out = place_scouts(scouts, cube, geometry, settings["xray_scale"], size, frame)
        notes += left_out
        pictures |= {real_xray(patient, "scout", view): scout.pixels for view, scout in placed.items()}
        records["scouts"] = {real_xray(patient, "scout", view): scout.record() for view, scout in placed.items()}
    if films:
        pair, found, left_out = choose_films(films, geometry, size)
        notes += left_out
        views = enumerate(() if pair is None else pair.views)
        pictures |= {real_xray(patient, "film", view): image.pixels for view, image in views}
        records["films"] = {real_xray(patient, "film", view): record for view, record in found.items()}
    return pictures, records


def _files_beside(source: CtSource, settings) -> list[Path]:
    """Files in the CT's folders of scouts and films, as far as the settings ask for them.

    Scouts among the CT's own slices are files of the CT: a restart need not read its headers to find them.
    """
    kinds = [kind for kind in XRAY_FOLDERS if isinstance(settings, dict) and settings.get(kind)]
    return [path for kind in kinds for path in dicom_files(xray_folder(source, kind))]


def real_xray(patient: str, kind: str, view: int) -> str:
    """File name of a patient's real X-ray of a kind and view."""
    return f"{patient}{REAL_XRAYS[kind][view]}.png"


def _render(hu, geometry, settings, notes):
    volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32), settings["hu_window"]))[None, None]
    size = settings["xray_size"]
    with torch.inference_mode():
        xrays = render_xrays(volume, geometry, (size, size), settings["hu_window"], settings["xray_scale"])[0].numpy()
    for view, image in zip(VIEW_LABELS, xrays):
        if image.max() > 1:
            notes.append(
                f"{view} X-ray: {np.mean(image > 1):.2%} of the pixels above 1 clipped (maximum {image.max():.2f})"
            )
    return xrays.clip(0, 1)


def patient_files(patient: str) -> tuple[str, str, str, str]:
    """Names of the four files of a patient: cube, scan mask, frontal and lateral X-ray."""
    return f"{patient}.nii.gz", f"{patient}_mask.nii.gz", f"{patient}_pa_drr.png", f"{patient}_lat_drr.png"


def signature_of(source: CtSource, xrays: Sequence[Path] = ()) -> dict[str, str]:
    """What tells a changed source from the one that was prepared, of all its files (the .raw of a .mhd, every slice).

    xrays: further files that were used.

    ``state``: names, sizes and times, quick to compare. ``content``: names and bytes, which decide where times differ.
    """
    content = hashlib.sha256()
    state = _state(source, xrays)
    for path in (*source_files(source), *xrays):
        content.update(f"{path.name}\n{sha256(path)}\n".encode("utf-8", "surrogateescape"))
    return {"state": state, "content": content.hexdigest()}


def _state(source, xrays):
    digest = hashlib.sha256()
    for path in (*source_files(source), *xrays):
        stat = path.stat()  # the time of the last change of status moves even when a copy keeps that of the content
        line = f"{path.name}\n{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _stamp(path) -> list[int]:
    """Size and time of a file's last change, which spare reading it again: dataset.py --check compares checksums."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _unchanged(source, settings, signature) -> bool:
    xrays = _files_beside(source, settings)
    if not isinstance(signature, dict):  # of an earlier version, which did not look at all files
        return False
    return (
        signature.get("state") == _state(source, xrays)
        or signature.get("content") == signature_of(source, xrays)["content"]
    )


def read_record(folder) -> dict:
    record = read_json(folder / RECORD)
    if not isinstance(record, dict):
        raise InputError(f"{folder / RECORD}: not a record of prepare_data.py; remove it, or choose another --output")
    return record


def finished_entry(source: CtSource, folder: Path) -> dict | None:
    """The manifest entry of a patient that is done: source unchanged, all files there and as they were written."""
    if not (folder / RECORD).exists():
        return None
    record = read_record(folder)
    try:
        if not record.get("complete") or not _unchanged(source, record.get("settings"), record.get("signature")):
            return None
    except (InputError, OSError):  # reading it says what is wrong
        return None
    entry = record.get("patient")
    files = entry.get("files") if isinstance(entry, dict) else None
    real = [entry.get(kind) for kind in XRAY_FOLDERS] if isinstance(entry, dict) else []
    wanted = {*patient_files(source.patient_id), *(name for part in real if isinstance(part, dict) for name in part)}
    if not isinstance(files, dict) or set(files) != wanted:
        return None
    written = record.get("written")
    stamps = written if isinstance(written, dict) else {}  # none of an earlier version
    for name, checksum in files.items():
        path = folder / name
        if not path.exists() or (stamps.get(name) != _stamp(path) and sha256(path) != checksum):
            return None
    return entry
