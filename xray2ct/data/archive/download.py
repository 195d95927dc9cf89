"""A download from the archive as a whole: what is planned, where it may go, and the record of what came."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

from xray2ct.data.archive.catalogue import gigabytes
from xray2ct.data.archive.collections import is_free, person
from xray2ct.data.archive.index import ArchiveIndex
from xray2ct.data.archive.selection import Series, Taken
from xray2ct.data.archive.sources import SOURCES, read_sources, source_row, write_sources
from xray2ct.data.archive.transfer import ENDPOINT, Folder, folders_of, transfer
from xray2ct.files import InputError, check_writable
from xray2ct.progress import progress_bar

SPARE_GB = 1.0  # left free on the disk


def people_in(output: Path) -> dict[str, Taken]:
    """The CTs that earlier commands fetched, by person; InputError for a folder that holds something else."""
    rows = read_sources(output)
    if not rows and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: holds something else (no {SOURCES}); expected a new or empty folder")
    cts = [row for row in rows if row["kind"] == "ct"]
    return {person(row["collection"], row["patient"]): Taken(row["id"], row["series_uid"]) for row in cts}


def plan(series: list[Series], index: ArchiveIndex) -> list[str]:
    """Lines for the user before anything is fetched: patients, gigabytes, licence, how to cite."""
    lines = []
    for name in dict.fromkeys(one.collection for one in series):
        ours = [one for one in series if one.collection == name]
        kinds = Counter(one.kind for one in ours)
        people = {kind: len({one.id for one in ours if one.kind == kind}) for kind in kinds}
        more = "".join(f", {people[kind]} with {kind}s" for kind in ("scout", "film") if kind in kinds)
        licences = sorted({one.licence for one in ours})
        lines.append(f"{name}: {people['ct']} patients{more}, {gigabytes(ours):.1f} GB, {' and '.join(licences)}")
        lines += [f"  cite: {index.citation(doi)}" for doi in sorted({one.doi for one in ours if one.doi})]
        if not all(is_free(licence) for licence in licences):
            lines.append("  not free for any use: these terms also hold for weights and volumes made from the data")
    return lines


def download(
    series: list[Series],
    output: Path,
    endpoint_url: str = ENDPOINT,
    workers: int = 32,
) -> dict[Path, str]:
    """Fetch what is not there yet, with a progress bar; returns a sentence for each folder that is not complete.

    ``sources.csv`` is written before the transfer (the folder is then ours, and the same command goes on) and after it
    with the rows of what is there. Raises :class:`InputError` where the output cannot be written or has no room.
    """
    people_in(output)
    check_writable(output / SOURCES, "--output")
    rows: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in read_sources(output):
        rows[row["id"], row["kind"]].append(row)
    complete: list[Folder] = []
    todo: list[Folder] = []
    for folder in folders_of(series, output):
        (complete if folder.done and _is_recorded(folder, rows[_key(folder)]) else todo).append(folder)
    size = gigabytes(one for folder in todo for one in folder.series)
    _check_room(output, size)
    if complete:
        print(f"{len(complete)} of {len(complete) + len(todo)} folders are there already")
    write_sources(output, chain(*rows.values()))
    try:
        with progress_bar(total=round(size * 1e9), desc="downloading", unit="B", unit_scale=True) as bar:
            return transfer(todo, endpoint_url, workers, complete.append, bar.update)
    finally:
        for folder in complete:
            rows[_key(folder)] = [source_row(one) for one in folder.series]
        write_sources(output, chain(*rows.values()))


def _key(folder: Folder) -> tuple[str, str]:
    return folder.series[0].id, folder.series[0].kind


def _is_recorded(folder: Folder, rows: list[dict]) -> bool:
    """True unless ``sources.csv`` says that the folder holds other series (chosen from an earlier index)."""
    return not rows or {row["series_uid"] for row in rows} == {one.series_uid for one in folder.series}


def _check_room(output: Path, size: float) -> None:
    here = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(here).free / 1e9
    if size + SPARE_GB > free:
        raise InputError(f"--output {output}: {size:.1f} GB to come, {free:.1f} GB free; expected {SPARE_GB:g} GB more")
