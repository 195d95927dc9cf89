"""Films of a patient, next to the CT: the first frontal and lateral one of a study, read for the data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.dicom_files import is_dicom, reading
from xray2ct.imaging.optional import import_pydicom
from xray2ct.imaging.read_films import FilmPair, read_films, read_pair

LOOKED_AT = 512  # pixels per edge at which a film is looked at for its view
TIMES = (("AcquisitionDate", "AcquisitionTime"), ("ContentDate", "ContentTime"), ("StudyDate", "StudyTime"))


def choose_films(paths: Sequence[Path], geometry: Geometry, size: int) -> tuple[FilmPair | None, dict, list[str]]:
    """``(pair, {view: record}, notes)``: the earliest study with a frontal and a lateral film, read by ``read_pair``.

    Within a study the first film of each view by acquisition (else content, study) date and time, instance number and
    file name. Pixels: ``(size, size)``. Dates are used for the order alone; records hold the file's name and what was
    done to it. pair is None where no study has both views; the notes say why.
    """
    studies, notes = _studies(paths)
    for study in studies:
        pair = _first_of_each_view(study, notes)
        if None in pair:
            continue
        try:
            films = read_pair(*pair, size=size, geometry=geometry)
        except InputError as error:
            notes.append(f"{error}; both films of this study are left out")
            continue
        records = {view: _record(path, films) for view, path in enumerate(pair)}
        return films, records, [*notes, *films.doubts]
    notes.append(f"{len(paths)} films, but no study with a frontal and a lateral one that can be read")
    return None, {}, notes


def _studies(paths) -> tuple[list[list[Path]], list[str]]:
    """Films by study, studies by their first film; what cannot be read is in the notes."""
    pydicom = import_pydicom(paths[0], "reading films") if paths else None
    studies: dict[str, list[tuple]] = {}
    notes = []
    for path in paths:
        try:
            with reading(path):
                data = pydicom.dcmread(path, force=is_dicom(path), stop_before_pixels=True)
                key, order = str(data.get("StudyInstanceUID") or ""), _order(data)
        except InputError as error:
            notes.append(f"{error}; left out")
            continue
        studies.setdefault(key, []).append((*order, path.name, path))
    return [[film[-1] for film in study] for study in sorted(sorted(films) for films in studies.values())], notes


def _order(data) -> tuple[str, str, int]:
    """Date, time and number; what is missing sorts last, so that it never passes for the earliest."""
    for names in TIMES:
        date, time = (str(data.get(name) or "") for name in names)
        if date:
            break
    number = data.get("InstanceNumber")
    return date or "~", time or "~", int(number) if number not in (None, "") else 2**31


def _first_of_each_view(study: list[Path], notes: list[str]) -> list[Path | None]:
    pair: list[Path | None] = [None, None]
    for path in study:
        try:
            view = _view(path)
        except InputError as error:
            notes.append(f"{error}; left out")
            continue
        pair[view] = pair[view] or path
        if None not in pair:
            break
    return pair


def _view(path: Path) -> int:
    """0 for a film that is read as a frontal one, 1 for one that is read as a lateral; raises as the reader does."""
    try:
        read_films((path, None), size=LOOKED_AT)
    except InputError as error:
        try:
            read_films((None, path), size=LOOKED_AT)
        except InputError:
            raise error from None
        return 1
    return 0


def _record(path: Path, films: FilmPair) -> dict:
    """A film's entry in the manifest."""
    notes = [note.removeprefix(f"{path}: ") for note in films.notes if note.startswith(f"{path}: ")]
    return {"source": path.name, "notes": notes}
