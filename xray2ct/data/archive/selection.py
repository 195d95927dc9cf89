"""The series to download: one chest CT per person, and that person's scouts and films where they are asked for."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from xray2ct.data.archive.collections import folder_name, is_free, person
from xray2ct.data.archive.index import ArchiveIndex
from xray2ct.data.archive.series_rules import MAX_SLICES, MIN_SLICES, is_localizer, preference, refusal
from xray2ct.files import InputError

KINDS = {"ct": "ct", "scout": "scouts", "film": "films"}  # and the folder that each goes to
_CHEST_FILM = re.compile(r"chest|thorax|lung", re.IGNORECASE)
_URL = re.compile(r"s3://[a-z0-9.-]+/[A-Za-z0-9/_.-]+/\*")


class Series(NamedTuple):
    """A DICOM series of the archive. id: patient id and folder here; url: ``s3://BUCKET/PREFIX/*``; files: how many."""

    id: str
    kind: str
    collection: str
    patient: str
    study_uid: str
    series_uid: str
    files: int
    megabytes: float
    licence: str
    doi: str
    url: str

    @property
    def person(self) -> str:
        """The same text for the same person in two collections."""
        return person(self.collection, self.patient)

    @property
    def folder(self) -> str:
        """Where its files go, below the output: ``ID/ct``; scouts and films of several series share a folder."""
        return f"{self.id}/{KINDS[self.kind]}"


class Taken(NamedTuple):
    """A CT that the output holds already."""

    id: str
    series_uid: str


def select(
    index: ArchiveIndex,
    collections: list[str],
    licence: str = "cc-by",
    patients: int | None = None,
    with_scouts: bool = False,
    with_films: bool = False,
    taken: Mapping[str, Taken] | None = None,
) -> list[Series]:
    """The series for ``patients`` people (None: all) of ``collections``, by :mod:`series_rules`, in a stable order.

    The order is that of the SHA-256 of each person's name: the first 200 are among the first 400, over several
    collections each gives its share, and nothing depends on the index's order. People with two localizer images in the
    CT's session come first under ``with_scouts``, then people with films of the chest under ``with_films``.
    licence: ``cc-by`` leaves out everything that is not free for any use, ``any`` nothing.
    taken: CTs of people that the output holds already: these series stay, and nobody comes under a second id.
    Raises :class:`InputError` where a collection has nothing under this licence, or nothing that the rules take.
    """
    condition = f"Modality = 'CT' AND instanceCount BETWEEN {MIN_SLICES} AND {MAX_SLICES}"
    rows = [row for row in index.series(collections, condition) if _allowed(row, licence)]
    _check_licences(index, collections, licence, rows)
    scouts = _scouts(index, collections, licence) if with_scouts else {}
    films = _films(index, collections, licence) if with_films else {}
    candidates: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if refusal(row) is None:
            candidates[person(row["collection_id"], row["PatientID"])].append(row)
    chosen = {}
    for who, found in candidates.items():
        here = taken.get(who) if taken else None
        found = [row for row in found if here and row["SeriesInstanceUID"] == here.series_uid] or found
        best = min(found, key=lambda row: (row["StudyInstanceUID"] not in scouts, *preference(row)))
        ct = _series(best, "ct")
        if here is None or here.id == ct.id:
            chosen[who] = ct
    if not chosen and not taken:
        raise InputError(f"{', '.join(collections)}: no series is a chest CT by the rules of docs/datasets.md")

    def order(item):
        who, ct = item
        digest = hashlib.sha256(who.encode()).hexdigest()
        return ct.study_uid not in scouts, (ct.collection, ct.patient) not in films, digest

    people = sorted(chosen.items(), key=order)[:patients]
    return [
        series
        for _, ct in people
        for series in (ct, *scouts.get(ct.study_uid, ()), *films.get((ct.collection, ct.patient), ()))
    ]


def _allowed(row: dict, licence: str) -> bool:
    return licence == "any" or is_free(row["license_short_name"] or "")


def _check_licences(index, collections, licence, rows):
    left = {row["collection_id"] for row in rows}
    licences = index.collections() if set(collections) - left else {}
    for name in collections:
        if name not in left and not any(licence == "any" or is_free(text) for text in licences[name]):
            found = " or ".join(licences[name]) or "not stated"
            raise InputError(
                f"collection {name}: its licence is {found}, which --licence {licence} does not allow;"
                " --licence any takes it, and its terms then hold for everything made from it"
            )


def _series(row: dict, kind: str) -> Series:
    """A row as :class:`Series`; an address that is no plain S3 prefix is refused: it goes to another program."""
    if not _URL.fullmatch(row["series_aws_url"] or ""):
        raise InputError(
            f"series {row['SeriesInstanceUID']}: address {row['series_aws_url']!r} in the index; expected s3://"
        )
    return Series(
        folder_name(row["collection_id"], row["PatientID"]),
        kind,
        row["collection_id"],
        row["PatientID"],
        row["StudyInstanceUID"],
        row["SeriesInstanceUID"],
        row["instanceCount"],
        row["series_size_MB"],
        row["license_short_name"] or "",
        row["source_DOI"] or "",
        row["series_aws_url"],
    )


def _scouts(index, collections, licence) -> dict[str, list[Series]]:
    """``{StudyInstanceUID: localizer series}`` of the studies with two localizer images or more (one for each view)."""
    condition = "Modality = 'CT' AND instanceCount <= 10 AND sop_class_name = 'CT Image Storage'"
    rows = [row for row in index.series(collections, condition) if is_localizer(row["SeriesDescription"] or "")]
    studies = _by_key((row for row in rows if _allowed(row, licence)), "scout", lambda row: row["StudyInstanceUID"])
    return {study: found for study, found in studies.items() if sum(series.files for series in found) >= 2}


def _films(index, collections, licence) -> dict[tuple[str, str], list[Series]]:
    """``{(collection, PatientID): series}`` of chest radiographs; raw ones (For Processing) are left out."""
    rows = index.series(collections, "Modality IN ('CR', 'DX') AND sop_class_name NOT LIKE '%For Processing'")
    chest = (row for row in rows if not row["BodyPartExamined"] or _CHEST_FILM.search(row["BodyPartExamined"]))
    allowed = (row for row in chest if _allowed(row, licence))
    return _by_key(allowed, "film", lambda row: (row["collection_id"], row["PatientID"]))


def _by_key(rows: Iterable[dict], kind: str, key) -> dict:
    found = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["SeriesInstanceUID"]):
        found[key(row)].append(_series(row, kind))
    return found
