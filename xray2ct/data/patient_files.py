"""Which file is what, by its name: volumes, scan masks and X-rays of a patient's folder, pairs in a folder of X-rays.

    folder = PatientFolder(root / "P1")       # folder.volume, folder.mask, folder.xrays; folder.problems, folder.unused
    pairs, unused = find_pairs("XRAYS")       # {id: (PA, lateral)}

The one place that knows suffixes and view names; upper and lower case are the same everywhere. Whatever lies in such a
folder is used, or it is in ``problems`` or ``unused``: nothing is left out silently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from xray2ct.conventions import (
    DICOM_SUFFIXES,
    OTHER_PICTURES,
    PICTURES,
    REAL_XRAYS,
    SUFFIXES,
    VIEW_LABELS,
    VIEW_NAMES,
    VOLUME_SUFFIXES,
    XRAY_SUFFIXES,
    suffix_of,
)
from xray2ct.files import InputError
from xray2ct.imaging.cube_files import mask_path
from xray2ct.imaging.dicom_files import is_dicom

HEADERS = (".mhd", ".nhdr")  # their voxels lie in other files of the folder
# Files that are neither X-rays nor volumes, and may lie in the same folders.
OTHER_FILES = (".json", ".txt", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".pdf", ".html", ".log", ".md5")
OTHER_FILES += (".sha256", ".db", ".ini")  # Thumbs.db, desktop.ini
SHOWN = 5  # names in a message
_PA, _LATERAL = ("|".join(name[1:] for name in names) for names in VIEW_NAMES)
_XRAY_NAME = re.compile(rf"(?:(.*)_)?(?:({_PA})|(?:{_LATERAL}))(\.nii\.gz|\.[^.]*)?", re.IGNORECASE | re.DOTALL)


class XrayName(NamedTuple):
    """What an X-ray's file name says. patient: None for ``pa.png``; view: 0 PA, 1 lateral; suffix: lower case or ""."""

    patient: str | None
    view: int
    suffix: str


def xray_name(name: str) -> XrayName | None:
    """``ID_PA.png`` -> ``("ID", 0, ".png")``; None for a name that ends in none of :data:`VIEW_NAMES`."""
    match = _XRAY_NAME.fullmatch(name)
    return match and XrayName(match[1] or None, int(match[2] is None), (match[3] or "").lower())


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden names; empty when there is no such folder."""
    # Sorted as names, which compare faster than paths: a large data set asks for many folders.
    names = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []
    return [folder / name for name in names]


def some(paths: Iterable) -> str:
    """The first few names, and how many more there are."""
    names = [str(path) for path in paths]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def can_be_xray(path: Path, suffix: str) -> bool:
    """True for what :func:`read_xray.read_xray` has a reader for: by suffix (lower case), or DICOM by content."""
    return suffix in XRAY_SUFFIXES or _holds_dicom(path)


def _holds_dicom(path: Path) -> bool:
    return path.is_file() and is_dicom(path)


# ------------------------------------------------------------------------------------------------
# Patient folders


class PatientFolder:
    """One patient's files, as :class:`dataset.PatientDataset` uses them.

    volume: a file, or a folder with one DICOM series; None when there is none. Expected is ``ID.nii.gz`` (or another of
        :data:`VOLUME_SUFFIXES`); without it the only other volume there is taken, whatever it is called.
    mask: the scan mask that belongs to the volume, or None.
    xrays: PA and lateral, ``ID_pa.png`` or plainly ``pa.png`` and the like; None where one has to be rendered.
    real: the patient's real X-rays by kind (:data:`REAL_XRAYS`), each PA and lateral, None where there is none.
    problems: sentences, each naming a file or the folder, for what makes it unusable. unused: what is not taken.
    """

    def __init__(self, folder: Path):
        self.id = folder.name
        self.folder = folder
        self.problems: list[str] = []
        self.unused: list[Path] = []
        self._volumes: tuple[list[Path], list[Path]] = ([], [])  # called as expected, otherwise
        self._views: tuple[tuple[list[Path], list[Path]], ...] = (([], []), ([], []))
        self._masks: list[Path] = []
        self.real: dict[str, list[Path | None]] = {kind: [None, None] for kind in REAL_XRAYS}
        slices = [path for path in visible(folder) if self._sort(path)]
        if slices:  # DICOM files of the CT in the patient's folder itself
            self._volumes[1].append(folder)
        self.volume = self._choose("volume", *self._volumes, f"{self.id}.nii.gz")
        if self.volume != folder:
            self.unused += [path for path in slices if path not in self.unused]
        self.xrays = tuple(
            self._choose(f"{label} X-ray", *self._views[view], f"{self.id}{VIEW_NAMES[view][1]}.png")
            for view, label in enumerate(VIEW_LABELS)
        )
        self.mask = self._choose_mask()
        if self.volume is not None and self.volume.suffix.lower() in HEADERS:
            self.unused = [path for path in self.unused if suffix_of(path) in (*XRAY_SUFFIXES, *VOLUME_SUFFIXES)]
        if self.volume is None and self._all:
            known = f"{self.id}.nii.gz (or {', '.join(VOLUME_SUFFIXES[1:])}) or a folder with a DICOM series"
            self.problems.append(f"{folder}: holds no volume, only {some(p.name for p in self._all)}; expected {known}")

    @property
    def _all(self) -> list[Path]:
        return [path for path in visible(self.folder) if suffix_of(path) not in OTHER_FILES]

    @property
    def holds_data(self) -> bool:
        """True when there is anything in it that could be a patient's: not only text, tables and other folders."""
        return self.volume is not None or any(path.is_file() for path in self._all)

    @property
    def volume_files(self) -> list[Path]:
        """The volume and its scan mask, as far as they are there."""
        return [path for path in (self.volume, self.mask) if path is not None]

    @property
    def xray_sources(self) -> list[Path]:
        """X-rays and volume, as far as they are there: what X-rays in use come from."""
        return [path for path in (*self.xrays, self.volume) if path is not None]

    def names(self, path: Path | None) -> bool:
        """True for a file that is called after the patient: what a manifest speaks of always is."""
        return path is not None and path.name.lower().startswith(self.id.lower())

    def _sort(self, path: Path) -> bool:
        """Put a file where it belongs; True for a DICOM file of the CT."""
        suffix, name = suffix_of(path), xray_name(path.name)
        stem = path.name[: len(path.name) - len(suffix)].lower()
        if path.is_dir():
            if any(_holds_dicom(inner) for inner in visible(path)):
                self._volumes[path.name.lower() != self.id.lower()].append(path)
            elif visible(path):
                self.unused.append(path)
        elif stem == self.id.lower() and suffix in VOLUME_SUFFIXES:
            self._volumes[0].append(path)
        elif suffix in OTHER_FILES or path.name.upper() == "DICOMDIR":
            return False
        elif name is not None:
            self._sort_xray(path, name)
        elif self._is_real(path, stem, suffix):
            return False
        elif stem.endswith("_mask") and suffix in SUFFIXES:
            self._masks.append(path)
        elif suffix in SUFFIXES:
            self._volumes[1].append(path)
        elif suffix in DICOM_SUFFIXES or _holds_dicom(path):
            return True
        else:
            self.unused.append(path)
        return False

    def _is_real(self, path: Path, stem: str, suffix: str) -> bool:
        """True for a scout or film, which is noted; a second one of the same kind and view is a problem."""
        for kind, names in REAL_XRAYS.items():
            for view, name in enumerate(names):
                if stem == self.id.lower() + name and can_be_xray(path, suffix):
                    other = self.real[kind][view]
                    if other is not None:
                        self.problems.append(f"{self.folder}: {other.name} and {path.name} are one {kind}'s view")
                    self.real[kind][view] = path
                    return True
        return False

    def _sort_xray(self, path, name: XrayName) -> None:
        if not can_be_xray(path, name.suffix):
            self.problems.append(f"{path}: no format of X-rays; expected {', '.join(XRAY_SUFFIXES)}, or DICOM")
        elif name.patient is None or name.patient.lower() == self.id.lower():
            self._views[name.view][name.patient is None].append(path)
        else:
            self._views[name.view][1].append(path)

    def _choose(self, what: str, expected: list[Path], others: list[Path], example: str) -> Path | None:
        found = expected or others
        names = [path.name for path in found]
        if len(found) > 1:
            self.problems.append(f"{self.folder}: more than one {what}: {some(names)}; expected one ({example})")
        elif found and what != "volume" and not expected:
            name = xray_name(names[0])
            if name is not None and name.patient is not None:
                self.problems.append(
                    f"{found[0]}: is called the {what} of {name.patient!r}; expected {self.id} ({example}), or no X-ray"
                )
        if expected:
            self.unused += [path for path in others if path != self.folder]
        return found[0] if found else None

    def _choose_mask(self) -> Path | None:
        """The mask that :func:`cube_files.read_cube` looks for; one that is called almost so is a problem."""
        volume = self.volume
        reads = volume is not None and volume.is_file() and suffix_of(volume) in SUFFIXES
        expected = mask_path(volume) if volume is not None and reads else None
        for path in self._masks:
            if path == expected:
                continue
            if path.name.lower().startswith(f"{self.id.lower()}_mask."):
                wanted = f"expected {expected.name}" if expected else "there is no volume file that it could belong to"
                self.problems.append(f"{path}: would not be read as the scan mask; {wanted}")
            else:
                self.unused.append(path)
        return expected if expected in self._masks else None


def loose_files(root: Path) -> list[Path]:
    """Volumes and X-rays that lie in a data set's folder itself instead of a patient's."""
    known = (*VOLUME_SUFFIXES, *XRAY_SUFFIXES, *OTHER_PICTURES)
    return [path for path in visible(root) if path.is_file() and suffix_of(path) in known]


# ------------------------------------------------------------------------------------------------
# Folders of X-rays


def find_pairs(folder, left_out: Iterable = ()) -> tuple[dict[str, tuple[Path | None, Path | None]], list[Path]]:
    """``{id: (PA, lateral)}`` of the X-rays in and below a folder, None where one is missing; and the files not used.

    Names are those of a data set: ``ID_pa``, ``ID_frontal`` or ``ID_pa_drr``; ``ID_lat``, ``ID_lateral`` or
    ``ID_lat_drr``, with a suffix that X-rays are read from or a DICOM file with another or none; the id of ``pa.png``
    is its folder's name. Unused are other pictures and DICOM files. left_out: folders that are not looked into.
    Raises :class:`InputError` without any pair, or with two files for the same view of the same id.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--folder {folder}: no such folder")
    found: dict[str, tuple[str, list[Path | None]]] = {}
    unused = []
    for path in _files_below(folder, left_out):
        name, suffix = xray_name(path.name), suffix_of(path)
        if suffix in OTHER_FILES:
            continue
        if name is None or not can_be_xray(path, name.suffix):
            if name is not None or _looks_like_xray(path, suffix):
                unused.append(path)
            continue
        patient = name.patient or path.resolve().parent.name
        _, pair = found.setdefault(patient.lower(), (patient, [None, None]))
        if pair[name.view] is not None:
            raise InputError(f"--folder {folder}: {pair[name.view]} and {path} are the same view of one patient")
        pair[name.view] = path
    if not found:
        names = ", ".join(f"ID{name}" for views in VIEW_NAMES for name in views)
        there = f"; it holds {some(unused)}" if unused else ""
        raise InputError(
            f"--folder {folder}: no X-rays in it; expected files called {names} with {', '.join(XRAY_SUFFIXES)}{there}"
        )
    return {patient: (pa, lateral) for patient, (pa, lateral) in sorted(found.values())}, unused


def _files_below(folder: Path, left_out) -> Iterable[Path]:
    """Files in a folder and all below it, sorted; links are followed, once; hidden names are skipped."""
    seen = {Path(path).resolve() for path in left_out if path} - {folder.resolve()}
    for root, directories, names in os.walk(folder, onerror=_stop, followlinks=True):
        real = Path(root).resolve()
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        yield from (Path(root) / name for name in sorted(names) if not name.startswith("."))


def _stop(error: OSError):
    raise error


def _looks_like_xray(path: Path, suffix: str) -> bool:
    if suffix == ".npy":
        return path.name[: -len(suffix)].lower() != path.resolve().parent.name.lower()  # else a patient's volume
    if suffix in (*PICTURES, *OTHER_PICTURES, *DICOM_SUFFIXES):
        return True
    return suffix not in SUFFIXES and _holds_dicom(path)
