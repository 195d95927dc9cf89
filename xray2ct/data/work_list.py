"""The list of CTs below a folder, kept with the output: a restart, and other shards, read no headers again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from xray2ct.file_lock import locked
from xray2ct.files import InputError, read_json, write_json
from xray2ct.imaging.find_cts import CtSource, search_cts

WORK_FOLDER = ".prepare"
LIST = "worklist.json"
VERSION = 1


def find_work(
    folder: Path, output: Path, rescan: bool = False, shared: bool = False
) -> tuple[list[CtSource], list[str]]:
    """:func:`find_cts.search_cts` of ``folder``, from the list kept in ``output`` where that still holds.

    It holds as long as no folder below was changed (a file added, removed or renamed) and nothing was unreadable; what
    changes inside a CT's files is noticed when its patient is checked. rescan: search in any case. shared: other
    processes start on the same output; one searches, the others wait for its list.
    """
    path = output / WORK_FOLDER / LIST
    if not shared and not path.exists():  # nothing is written before the output was found fit: see save_work
        return search_cts(folder)
    with locked(path.with_suffix(".lock"), "another search for CTs goes on", wait=True):
        known = None if rescan else _known(path, folder)
        if known is None:
            known = search_cts(folder)
            save_work(folder, output, *known)
        else:
            print(f"{len(known[0])} CTs by the list of an earlier search (--rescan searches again)")
        return known


def save_work(folder: Path, output: Path, sources: list[CtSource], left_out: list[str]) -> None:
    """Keep the list for the next run."""
    listed = [[source.patient_id, source.path.relative_to(folder).as_posix(), source.kind] for source in sources]
    found = {"version": VERSION, "input": str(folder.resolve()), "folders": _folders(folder)}
    path = output / WORK_FOLDER / LIST
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**found, "cts": listed, "left_out": left_out})


def fingerprint(sources: list[CtSource]) -> str:
    """What two shards must agree on: ids and places of all CTs."""
    lines = "\n".join(f"{source.patient_id}\t{source.path}" for source in sources)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _known(path: Path, folder: Path) -> tuple[list[CtSource], list[str]] | None:
    if not path.exists():
        return None
    try:
        data = read_json(path)
        if (data["version"], data["input"]) != (VERSION, str(folder.resolve())):
            return None
        if any("cannot be read" in text for text in data["left_out"]):  # may have been mended
            return None
        # Without a search: one call per folder instead of one or two per file.
        if any((folder / name).stat().st_mtime_ns != time for name, time in data["folders"].items()):
            return None
        return [CtSource(name, folder / place, kind) for name, place, kind in data["cts"]], data["left_out"]
    except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _folders(folder: Path) -> dict[str, int]:
    """Time of the last change of ``folder`` and all folders below it, links followed once."""
    times: dict[str, int] = {}
    seen: set[str] = set()
    for root, names, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = [name for name in names if not name.startswith(".")]
        times[Path(root).relative_to(folder).as_posix()] = os.stat(root).st_mtime_ns
    return times
