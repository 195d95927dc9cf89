"""Patient folders and ``dataset.json``: what a data set holds and how it was made."""

from __future__ import annotations

import warnings
from pathlib import Path

from xray2ct.conventions import CUBE_SIZE, MANIFEST, MANIFEST_VERSION, VIEW_NAMES, VOLUME_SUFFIXES
from xray2ct.data.patient_files import PatientFolder, loose_files, some, visible
from xray2ct.data.splits import check_split, split_by_hash
from xray2ct.files import InputError, check_patient_id, read_json, shown, stays_inside
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
        warnings.warn(f"{root}: no volume in {some(empty)}: left out", stacklevel=3)
    loose = loose_files(root)
    if loose:
        names = some(p.name for p in loose)
        warnings.warn(f"{root}: {names}: outside the patients' folders, left out (expected ID/ID.nii.gz)", stacklevel=3)
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
        warnings.warn(f"{root}: not used: {some(unused)}", stacklevel=3)


class Manifest:
    """How a data set was made: read from ``dataset.json``, or stated defaults where there is none.

    Raises :class:`InputError` naming file and key for anything missing or impossible, for patient ids and file
    names that leave their folder, and for patients whose folder or files are links out of the data set: with a
    manifest, everything it speaks of lies below ``root``. Folders without manifest may hold links.
    """

    def __init__(self, root: Path, patients: dict[str, PatientFolder]):
        path = root / MANIFEST
        self.present = path.exists()
        if self.present:
            self._read(path, patients)
        else:
            self.geometry, self.hu_window, self.xray_scale, self.cube_size = (
                Geometry(),
                HU_WINDOW,
                XRAY_SCALE,
                CUBE_SIZE,
            )
            self.split = split_by_hash(patients)

    def _read(self, path, patients):
        data = read_json(path)
        if not isinstance(data, dict):
            raise InputError(f"{path}: expected a JSON object, as prepare_data.py writes it")
        version = data.get("format_version")
        if version != MANIFEST_VERSION:
            raise InputError(f"{path}: format_version {shown(version)}; this version reads {MANIFEST_VERSION}")
        try:
            self.geometry = Geometry.from_dict(data["geometry"])
            self.hu_window = _numbers(data["hu_window"])
            (self.xray_scale,) = _numbers([data["xray_scale"]])
            self.cube_size = data["cube_size"]
            mu_water, listed, split = data["mu_water"], _listed(data["patients"]), data["split"]
        except KeyError as error:
            raise InputError(f"{path}: key {error} is missing; prepare the data again") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: {error}") from None
        if len(self.hu_window) != 2 or not self.hu_window[0] < self.hu_window[1]:
            raise InputError(f"{path}: hu_window is {shown(data['hu_window'])}; expected two HU, the lower first")
        if not self.xray_scale > 0:
            raise InputError(f"{path}: xray_scale is {self.xray_scale}; expected a number above 0")
        if type(self.cube_size) is not int or not 1 <= self.cube_size <= MAX_CUBE_SIZE:
            raise InputError(
                f"{path}: cube_size is {shown(data['cube_size'])}; expected a whole number up to {MAX_CUBE_SIZE}"
            )
        if mu_water != MU_WATER:
            raise InputError(f"{path}: mu_water {shown(mu_water)}; this version renders with {MU_WATER}")
        missing = sorted(p for p in listed if p not in patients or not patients[p].names(patients[p].volume))
        if missing:
            raise InputError(f"{path}: no volume for patient {missing[0]}")
        for patient in sorted(listed):
            _check_links(path.parent, patients[patient])
            for view, xray in zip(VIEW_NAMES, patients[patient].xrays):
                if not patients[patient].names(xray):
                    raise InputError(f"{path.parent / patient / (patient + view[0] + '.png')}: this view is missing")
        for extra in set(patients) - listed:
            warnings.warn(f"{path.parent / extra} is not in {MANIFEST}: left out", stacklevel=3)
            del patients[extra]
        self.split = check_split(split, listed, f"{path} (split)")


def _numbers(values) -> tuple[float, ...]:
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError(f"{shown(values)}; expected numbers")
    return tuple(float(value) for value in values)


def _listed(entries) -> set[str]:
    """Ids of the manifest's patients; ``ValueError`` for an id or a file name that leaves its folder."""
    if not isinstance(entries, dict):
        raise ValueError(f"patients is {shown(entries)}; expected an object of patients")
    for patient, entry in entries.items():
        check_patient_id(patient, "patients")
        files = entry.get("files", {}) if isinstance(entry, dict) else None
        if not isinstance(files, dict):
            raise ValueError(f"the entry of patient {patient} is {shown(entry)}; expected an object with its files")
        for name in files:
            if not set(name).isdisjoint("/\\:\0") or name in ("", ".", ".."):
                raise ValueError(f"patients: {patient} names the file {shown(name)}, which leaves its folder")
    return set(entries)


def _check_links(root: Path, patient: PatientFolder) -> None:
    for path in (patient.folder, patient.volume, patient.mask, *patient.xrays):
        if path is not None and path.is_symlink() and not stays_inside(path, root):
            raise InputError(
                f"{path}: is a link that leaves the data set {root}; expected the files themselves"
                " (cp -al makes a copy that takes no space)"
            )
