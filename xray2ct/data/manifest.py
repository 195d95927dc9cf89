"""Patient folders and ``dataset.json``: what a data set holds and how it was made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xray2ct.conventions import CUBE_SIZE, MANIFEST, MANIFEST_VERSION, VIEW_NAMES, VOLUME_SUFFIXES
from xray2ct.data.archive.collections import is_non_commercial
from xray2ct.data.archive.sources import licence_of
from xray2ct.data.patient_files import PatientFolder, loose_files, some, visible
from xray2ct.data.splits import check_split, split_by_hash
from xray2ct.files import InputError, check_patient_id, is_file_name, read_json, shown, stays_inside
from xray2ct.geometry.projector import HU_WINDOW, MU_WATER, XRAY_SCALE, Geometry

MAX_CUBE_SIZE = 1024  # 4 GiB as float32


def find_patients(root: Path) -> dict[str, PatientFolder]:
    """All folders of ``root`` that hold any file of a patient, by id, whether usable or not: :func:`check_patients`.

    A folder without and a file outside any patient's folder are left out with a warning that names them.
    Raises :class:`InputError` when ``root`` is missing or holds no volume, and for a folder's name that
    :func:`files.check_patient_id` does not take.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected a data set (see prepare_data.py)")
    folders = [PatientFolder(path) for path in visible(root) if path.is_dir()]
    patients = {p.id: p for p in folders if p.holds_data}
    for patient, folder in patients.items():
        if folder.names(folder.volume):
            check_patient_id(patient, folder.folder)
    if not any(p.volume is not None for p in patients.values()):
        found = "".join(f". {problem}" for p in folders for problem in p.problems[:1])
        raise InputError(
            f"{root}: no patient folder found; expected {root}/ID/ID.nii.gz (or {', '.join(VOLUME_SUFFIXES[1:])})."
            f" A folder of CTs is turned into such a data set by prepare_data.py{found[:500]}"
        )
    empty = [p.folder.name for p in folders if not p.holds_data]
    if empty:
        warnings.warn(f"{root}: no volume in {some(empty)}: left out", stacklevel=4)
    loose = loose_files(root)
    if loose:
        names = some(p.name for p in loose)
        warnings.warn(f"{root}: {names}: outside the patients' folders, left out (expected ID/ID.nii.gz)", stacklevel=4)
    return patients


def check_patients(patients: dict[str, PatientFolder], root: Path) -> None:
    """Raise :class:`InputError` naming the first file or folder that cannot be used; warn of files that are not taken.

    Ids that differ only in upper and lower case are refused, too: on many systems they are one folder.
    """
    seen: dict[str, str] = {}
    for patient, folder in patients.items():
        check_patient_id(patient, folder.folder)
        other = seen.setdefault(patient.lower(), patient)
        if other != patient:
            raise InputError(f"{root}: {other} and {patient} differ only in upper and lower case; rename one of them")
    problems = [problem for folder in patients.values() for problem in folder.problems]
    if problems:
        more = f" ({len(problems) - 1} more such problems: dataset.py --check names them)" if problems[1:] else ""
        raise InputError(f"{problems[0]}{more}")
    unused = [path.relative_to(root) for folder in patients.values() for path in folder.unused]
    if unused:
        warnings.warn(f"{root}: not used: {some(unused)}", stacklevel=4)


class Manifest:
    """How a data set was made: read from ``dataset.json``, or stated defaults where there is none.

    Raises :class:`InputError` naming file and key for anything missing or impossible, for patient ids and file
    names that leave their folder, and for patients whose folder or files are links out of the data set: with a
    manifest, everything it speaks of lies below ``root``. Folders without manifest may hold links.
    """

    def __init__(self, root: Path, patients: dict[str, PatientFolder]):
        path = root / MANIFEST
        self.present = path.exists()
        data = _read_object(path) if self.present else {}
        values, problems = read_values(data) if self.present else (DEFAULTS, [])
        if problems:
            raise InputError(f"{path}: {problems[0]}")
        self.geometry: Geometry = values["geometry"]
        self.hu_window: tuple[float, float] = values["hu_window"]
        self.xray_scale: float = values["xray_scale"]
        self.cube_size: int = values["cube_size"]
        if self.present:
            listed = _listed(path, data)
            _match_folders(path, listed, patients)
            self.split = check_split(data.get("split"), listed, f"{path} (split)")
            entries = data["patients"].items()
            self.non_commercial = {patient for patient, entry in entries if is_non_commercial(licence_of(entry))}
        else:
            self.non_commercial = set()
            self.split = split_by_hash(patients)


def _read_object(path: Path) -> dict:
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, as prepare_data.py writes it")
    return data


# ------------------------------------------------------------------------------------------------
# Settings of a manifest


def _same(expected, what: str):
    def read(value):
        if value != expected:
            raise ValueError(f"{shown(value)}; this version {what} {expected}")
        return value

    return read


def _window(value) -> tuple[float, float]:
    if not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]):
        raise ValueError(f"{shown(value)}; expected two HU, the lower first")
    return float(value[0]), float(value[1])


def _scale(value) -> float:
    if not (_is_number(value) and value > 0):
        raise ValueError(f"{shown(value)}; expected a number above 0")
    return float(value)


def edge_up_to(limit: int):
    """A reader of voxels or pixels per edge for :func:`read_values`."""

    def read(value) -> int:
        if not (type(value) is int and 1 <= value <= limit):
            raise ValueError(f"{shown(value)}; expected a whole number from 1 to {limit}")
        return value

    return read


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


DEFAULTS: dict[str, Any] = {
    "geometry": Geometry(),
    "hu_window": HU_WINDOW,
    "xray_scale": XRAY_SCALE,
    "cube_size": CUBE_SIZE,
}
READERS = {
    "format_version": _same(MANIFEST_VERSION, "reads"),
    "geometry": Geometry.from_dict,
    "hu_window": _window,
    "xray_scale": _scale,
    "cube_size": edge_up_to(MAX_CUBE_SIZE),
    "mu_water": _same(MU_WATER, "renders with"),
}


def read_values(data: dict, more: dict[str, Callable] | None = None) -> tuple[dict[str, Any], list[str]]:
    """``(values, problems)``: the settings of a manifest that are usable, and a sentence for each that is not.

    more: further keys that the caller needs, with a reader each, which raises ``ValueError`` for what it does not take.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, read in (READERS | (more or {})).items():
        try:
            values[key] = read(data[key])
        except KeyError:
            problems.append(f"key '{key}' is missing; prepare the data again")
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            problems.append(f"{key}: {error}")
    return values, problems


# ------------------------------------------------------------------------------------------------
# Patients of a manifest


def _listed(path: Path, data: dict) -> set[str]:
    """Ids of the manifest's patients; :class:`InputError` for an id or a file name that leaves its folder."""
    entries = data.get("patients")
    if not isinstance(entries, dict):
        raise InputError(f"{path}: patients is {shown(entries)}; expected an object of patients")
    for patient, entry in entries.items():
        check_patient_id(patient, f"{path}: patients")
        files = entry.get("files", {}) if isinstance(entry, dict) else None
        if not isinstance(files, dict):
            expected = "expected an object with its files"
            raise InputError(f"{path}: the entry of patient {patient} is {shown(entry)}; {expected}")
        for name in files:
            if not is_file_name(name):
                raise InputError(f"{path}: patients: {patient} names the file {shown(name)}, which leaves its folder")
    return set(entries)


def _match_folders(path: Path, listed: set[str], patients: dict[str, PatientFolder]) -> None:
    """Check that listed patients have their files; remove the others from ``patients``, with a warning."""
    missing = sorted(p for p in listed if p not in patients or not patients[p].names(patients[p].volume))
    if missing:
        raise InputError(f"{path}: no volume for patient {missing[0]}")
    for patient in sorted(listed):
        _check_links(path.parent, patients[patient])
        for view, xray in zip(VIEW_NAMES, patients[patient].xrays):
            if not patients[patient].names(xray):
                raise InputError(f"{path.parent / patient / (patient + view[0] + '.png')}: this view is missing")
    for extra in set(patients) - listed:
        warnings.warn(f"{path.parent / extra} is not in {MANIFEST}: left out", stacklevel=4)
        del patients[extra]


def _check_links(root: Path, patient: PatientFolder) -> None:
    real = (path for pair in patient.real.values() for path in pair)
    for path in (patient.folder, patient.volume, patient.mask, *patient.xrays, *real):
        if path is not None and path.is_symlink() and not stays_inside(path, root):
            raise InputError(
                f"{path}: is a link that leaves the data set {root}; expected the files themselves"
                " (cp -al makes a copy that takes no space)"
            )
