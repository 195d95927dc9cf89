"""``sources.csv``: which series of which collection was downloaded, under which licence, how to cite it."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from xray2ct.data.archive.collections import is_non_commercial, person
from xray2ct.data.archive.selection import KINDS, Series
from xray2ct.files import InputError, atomic_path, check_patient_id, read_csv, shown
from xray2ct.imaging.find_cts import SOURCES

FIELDS = ("id", "kind", "collection", "patient", "study_uid", "series_uid", "files", "megabytes", "licence", "doi")
PUBLIC = ("collection", "patient", "series_uid", "licence", "doi")  # what a data set's manifest carries
_FORMS = {
    "collection": re.compile(r"[a-z0-9_]{1,80}"),
    "patient": re.compile(r"[A-Za-z0-9._ -]{1,64}"),  # DICOM LO
    "series_uid": re.compile(r"[0-9.]{1,64}"),  # DICOM UI
    "licence": re.compile(r"[A-Za-z0-9 .,;:()/-]{1,120}"),
    "doi": re.compile(r"(10\.[A-Za-z0-9./();:_-]{1,120})?"),
}


def write_sources(folder: Path, rows: Iterable[dict]) -> None:
    """Write ``sources.csv`` of a download folder; rows: dicts of :data:`FIELDS`, sorted here by id and kind."""
    with atomic_path(folder / SOURCES) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["id"], row["kind"], row["series_uid"])))


def source_row(series: Series) -> dict:
    """The row of one series."""
    return {**series._asdict(), "megabytes": f"{series.megabytes:.3f}"}


def read_sources(folder: Path) -> list[dict[str, str]]:
    """Rows of ``sources.csv`` in ``folder``, none where there is no such file.

    Raises :class:`InputError` naming line and column for anything that :func:`write_sources` would not write: the
    file's texts go into manifests and reports.
    """
    path = folder / SOURCES
    if not path.exists():
        return []
    return [_checked(row, f"{path}, line {line}") for line, row in read_csv(path, FIELDS)]


def _checked(row: dict, origin: str) -> dict[str, str]:
    check_patient_id(row["id"], origin)
    if row["kind"] not in KINDS:
        raise InputError(f"{origin}: kind is {shown(row['kind'])}; expected {', '.join(KINDS)}")
    for name, form in _FORMS.items():
        if not form.fullmatch(row[name]):
            raise InputError(f"{origin}: {name} is {shown(row[name])}; expected what get_data.py writes")
    return row


def provenance(folder: Path) -> dict[str, dict[str, str]]:
    """``{id: {collection, patient, series_uid, licence, doi}}`` of the CTs in a download folder."""
    return {row["id"]: {name: row[name] for name in PUBLIC} for row in read_sources(folder) if row["kind"] == "ct"}


def read_provenance(entry) -> dict[str, str] | None:
    """What a manifest's entry says of its origin; None where it says nothing, or not what prepare_data.py writes."""
    found = entry.get("provenance") if isinstance(entry, dict) else None
    usable = isinstance(found, dict) and all(
        isinstance(found.get(name), str) and form.fullmatch(found[name]) for name, form in _FORMS.items()
    )
    return found if usable else None


def licence_of(entry) -> str:
    """Licence of a manifest's entry, empty where it states none."""
    return (read_provenance(entry) or {}).get("licence", "")


def licence_lines(entries: dict) -> list[str]:
    """One line per licence with the number of patients; none for a data set that does not know any."""
    counts = Counter(filter(None, map(licence_of, entries.values())))
    terms = {licence: ", no commercial use" for licence in counts if is_non_commercial(licence)}
    return [f"licence {text}: {count} patients{terms.get(text, '')}" for text, count in sorted(counts.items())]


def person_of(entry: dict | None, patient_id: str) -> str:
    """Who a patient is: the same for one person in two collections; ``entry``: the provenance, if known."""
    return person(entry["collection"], entry["patient"]) if entry else patient_id
