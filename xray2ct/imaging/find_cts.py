"""Find the CTs below a folder: files by their suffix, DICOM series by their content, and a patient id for each."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from xray2ct.conventions import OTHER_VOLUMES, SUFFIXES, suffix_of
from xray2ct.files import InputError, safe_name
from xray2ct.imaging.dicom_files import is_dicom
from xray2ct.imaging.image_headers import data_files
from xray2ct.imaging.optional import import_pydicom
from xray2ct.imaging.read_dicom import (
    MIN_SERIES_SLICES,
    SeriesInfo,
    files_of_dicomdir,
    may_lie_with_slices,
    series_of,
)

# In a folder that get_data.py made: its record, and the folders of each patient.
SOURCES, CT_FOLDER, XRAY_FOLDERS = "sources.csv", "ct", ("scouts", "films")


@dataclass(frozen=True)
class CtSource:
    """Where one CT lies: ``kind`` is ``nifti``, ``image`` (MetaImage, NRRD) or ``dicom`` (a folder)."""

    patient_id: str
    path: Path
    kind: str


def find_cts(folder) -> list[CtSource]:
    """List every CT below ``folder``: each NIfTI, MetaImage or NRRD file, each folder of DICOM files.

    Folders of a CT's scouts and films (:func:`xray_folder`) are left out.
    The patient id is the file name without its suffix (DICOM: the folder's name, ``ID`` for ``ID/ct``), made a plain
    name by
    :func:`files.safe_name`; never a name from a DICOM header. Where ids collide
    (ignoring case), the names of the parent folders are put in front. Sorted by id; hidden files and
    folders are left out, links are followed. Raises InputError when the folder is missing or holds no CT, or ids
    still collide. :func:`search_cts` also tells what was left out.
    """
    sources, left_out = search_cts(folder)
    if not sources:
        raise InputError(f"{folder}: no CT found that can be used; {len(left_out)} left out: {left_out[0]}")
    return sources


def search_cts(folder) -> tuple[list[CtSource], list[str]]:
    """:func:`find_cts`, and a sentence for each file or folder that may hold a CT but is not read.

    Those are: volumes and archives of other formats, unreadable files and folders, dangling links, DICOM files that
    are none, folders that share one DICOM series, short series in the folder of a CT (but no localisers), and files
    that a DICOMDIR lists but that are not there. Raises InputError when there is neither a CT nor anything left out,
    and as :func:`find_cts`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of CTs")
    found: list[tuple[Path, str]] = []
    left_out: list[str] = []
    slices: dict[Path, list[Path]] = {}
    for root, paths in _walk(folder, left_out):
        kinds = {path: SUFFIXES.get(suffix_of(path)) for path in paths}
        found += [(path, kind) for path, kind in kinds.items() if kind]
        others = [path for path, kind in kinds.items() if kind is None]
        dicom, rest = _dicom_files(others, left_out)
        if dicom:
            slices[root] = dicom
            rest = [path for path in rest if may_lie_with_slices(path)]  # any other is named when the folder is read
        left_out += _not_read(rest, [path for path, kind in kinds.items() if kind == "image"])
    left_out += _missing_of_dicomdir(folder, slices)
    series = _series(slices)
    shared = _shared_series(series)
    left_out += [*shared.values(), *_short_series(series)]
    found += [(root, "dicom") for root in slices if root not in shared]
    if not found and not left_out:
        raise InputError(
            f"{folder}: no CT found; expected .nii.gz, .nii, .mhd, .mha, .nrrd or .nhdr files or folders of DICOM files"
        )
    return _with_ids(folder, found), left_out


def source_files(source: CtSource) -> list[Path]:
    """All files that :func:`read_ct.read_ct` reads for one CT, sorted."""
    if source.path.is_dir():
        return sorted(path for path in source.path.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted([source.path, *(data_files(source.path) if source.kind == "image" else [])])


def xray_folder(source: CtSource, kind: str) -> Path:
    """Where a CT's ``scouts`` or ``films`` lie: ``ID/films`` next to ``ID/ct``; ``ID_films`` next to another CT.

    That is, next to ``ID.nii.gz`` or the like, or the folder ``ID`` of DICOM files.
    """
    path = source.path
    if source.kind == "dicom" and path.name == CT_FOLDER:
        return path.parent / kind
    return path.parent / f"{_stem(path)}_{kind}"


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.name[: len(path.name) - len(suffix_of(path))]


def _walk(folder, left_out):
    """Yield ``(folder, files)``, links followed once; unreadable folders and dangling links go to ``left_out``."""

    def unreadable(error):
        left_out.append(f"{error.filename}: cannot be read ({error.strerror})")

    top = folder.resolve()
    linked: list[Path] = []
    for root, directories, names in os.walk(folder, onerror=unreadable, followlinks=True):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        others = _xray_folders(directories, names)
        directories[:] = [name for name in directories if name not in others]
        for path in [Path(root, name) for name in directories if Path(root, name).is_symlink()]:
            target = path.resolve()
            if any(start.is_relative_to(target) for start in (top, *linked) if start != target):
                left_out.append(f"{path}: a link to a folder around others that are searched; expected one beside them")
                directories.remove(path.name)
            elif any(_holds(start, target) for start in (top, *linked)):  # searched there
                directories.remove(path.name)
            else:
                linked.append(target)
        paths = [Path(root) / name for name in sorted(names) if not name.startswith(".")]
        left_out += [f"{path}: a link to nothing; expected a file" for path in paths if not path.exists()]
        yield Path(root), [path for path in paths if path.is_file()]


def _xray_folders(directories, names) -> set[str]:
    """The ones of ``directories`` that hold a CT's scouts or films, by their names; see :func:`xray_folder`."""
    stems = {*directories, *(name[: len(name) - len(suffix_of(name))] for name in names if suffix_of(name) in SUFFIXES)}
    found = {f"{stem}_{kind}" for stem in stems for kind in XRAY_FOLDERS}
    return found | set(XRAY_FOLDERS) if CT_FOLDER in directories else found


def _holds(start, target) -> bool:
    """True when a search from ``start`` comes to the folder ``target`` (hidden folders are not searched)."""
    return target.is_relative_to(start) and not any(p.startswith(".") for p in target.relative_to(start).parts)


def _dicom_files(paths, left_out):
    """``(DICOM files, the others)``; those that cannot be opened go to ``left_out``."""
    dicom, rest = [], []
    for path in paths:
        try:
            (dicom if is_dicom(path) else rest).append(path)
        except OSError as error:
            if not may_lie_with_slices(path) or suffix_of(path) in OTHER_VOLUMES:
                left_out.append(f"{path}: cannot be read ({error.strerror})")
    return dicom, rest


def _not_read(paths, headers) -> list[str]:
    """A sentence for each of ``paths`` that may hold a CT; ``headers``: MetaImage and NRRD files of the same folder."""
    suspects = [path for path in paths if suffix_of(path) in OTHER_VOLUMES or _named_like_a_slice(path)]
    used: set[Path] = set()
    for header in headers if suspects else []:
        try:
            used |= set(data_files(header))
        except (InputError, OSError):  # the header's own error comes when it is read
            continue
    other = "may hold a CT, in a format that is not read"
    expected = "; expected .nii.gz, .nii, .mhd, .mha, .nrrd, .nhdr or DICOM"
    texts = {".img": "half of a pair .hdr and .img", ".hdr": "half of a pair .hdr and .img"}
    texts |= dict.fromkeys((".dcm", ".dicom", ".dic", ".ima"), "not a DICOM file (empty or damaged?)")
    texts |= dict.fromkeys((".raw", ".zraw", ".raw.gz"), "no MetaImage or NRRD header beside it says what it holds")
    return [
        f"{path}: {texts.get('.dcm' if _named_like_a_slice(path) else suffix_of(path), other)}{expected}"
        for path in suspects
        if path not in used
    ]


def _named_like_a_slice(path) -> bool:
    """True for names as scanners and archives give them to DICOM files: IM0001, 00000012, 1.2.840.113619.2.55."""
    suffix = path.suffix[1:]
    return not may_lie_with_slices(path) and (not suffix or suffix.isdigit()) and bool(re.search(r"\d", path.name))


def _series(slices) -> dict[Path, dict[Path, SeriesInfo]]:
    """``{folder: {file: its series}}``; without pydicom empty, and without files that cannot be read."""
    try:
        import_pydicom("")
    except InputError:  # comes for each folder when it is read
        return {}
    found: dict[Path, dict[Path, SeriesInfo]] = {root: {} for root in slices}
    for root, paths in slices.items():
        for path in paths:
            with contextlib.suppress(InputError):  # likewise
                found[root][path] = series_of(path)
    return found


def _shared_series(series) -> dict[Path, str]:
    """``{folder: sentence}`` of the folders that hold files of one DICOM series, which are no CTs of their own."""
    owners: dict[str, dict[Path, Path]] = defaultdict(dict)
    for root, files in series.items():
        for path, info in files.items():
            if info.uid:
                owners[info.uid].setdefault(root, path)
    texts = {}
    for places in owners.values():
        for root, path in places.items() if len(places) > 1 else ():
            other = next(other for where, other in places.items() if where != root)
            texts[root] = (
                f"{root}: holds files of the same DICOM series as {other.parent} ({path.name} and {other.name} have one"
                " SeriesInstanceUID); expected one series per folder, whole: put them together, or take copies away"
            )
    return texts


def _short_series(series) -> list[str]:
    """A sentence for each short series of CT slices (no localiser) that is left out for a long one of its folder."""
    texts = []
    for files in series.values():
        counts = Counter()
        for info in files.values():
            counts[info.uid] += info.frames
        if max(counts.values(), default=0) < MIN_SERIES_SLICES:
            continue
        for uid in [uid for uid, count in counts.items() if 0 < count < MIN_SERIES_SLICES]:
            paths = [path for path, info in files.items() if info.uid == uid and info.is_ct]
            if paths:
                texts.append(
                    f"{paths[0]}: CT slice of a short DICOM series ({counts[uid]} slices) beside the CT of its folder,"
                    f" which is read without it; expected {MIN_SERIES_SLICES} or more, in a folder of their own"
                )
    return texts


def _missing_of_dicomdir(folder, slices) -> list[str]:
    """A sentence for each DICOMDIR that lists images which are not there (a copy that was interrupted)."""
    texts = []
    for path in sorted({place for root in (folder, *slices) for place in _dicomdirs(root, folder)}):
        try:
            names = files_of_dicomdir(path)
        except InputError as error:
            texts.append(str(error))
            continue
        missing = sum(not any((path.parent / name).exists() for name in (name, name.lower())) for name in names)
        if missing:
            texts.append(f"{path}: lists {len(names)} files, of which {missing} are not there; copy all of them")
    return texts


def _dicomdirs(root, folder):
    """DICOMDIR files in ``root`` and the folders above it, up to ``folder``."""
    for place in (root, *root.parents):
        if not place.is_relative_to(folder):
            return
        yield from (path for path in (place / "DICOMDIR", place / "dicomdir") if path.is_file())


def _of_download(folder, path) -> bool:
    """True for ``ID/ct`` as get_data.py makes it; in other trees a folder ``ct`` is a name like any other."""
    if path.name != CT_FOLDER or not path.is_dir():
        return False
    return (folder / SOURCES).exists() or any((path.parent / name).is_dir() for name in XRAY_FOLDERS)


def _with_ids(folder, found):
    parts = []
    for path, kind in found:
        names = list(path.relative_to(folder).parts) or [path.resolve().name]
        names[-1] = names[-1][: len(names[-1]) - len(suffix_of(path))] if kind != "dicom" else names[-1]
        if len(names) > 1 and _of_download(folder, path):
            names.pop()
        parts.append([safe_name(name) for name in names])
    short = Counter(names[-1].lower() for names in parts)
    ids = [names[-1] if short[names[-1].lower()] == 1 else safe_name("_".join(names)) for names in parts]
    owners: dict[str, Path] = {}
    for patient_id, (path, _) in zip(ids, found):
        other = owners.setdefault(patient_id.lower(), path)
        if other != path:
            raise InputError(f"{other} and {path} would both become patient {patient_id!r}; rename one of them")
    sources = [CtSource(patient_id, path, kind) for patient_id, (path, kind) in zip(ids, found)]
    return sorted(sources, key=lambda source: source.patient_id)
