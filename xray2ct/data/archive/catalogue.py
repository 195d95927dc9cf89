"""What each collection of chest CTs holds by the rules of selection: the table of ``get_data.py --list``."""

from __future__ import annotations

from collections.abc import Iterable

from xray2ct.data.archive.collections import ALIASES, CHEST
from xray2ct.data.archive.index import ArchiveIndex
from xray2ct.data.archive.selection import Series, select

HEADER = ("name", "patients", "GB", "scouts", "films", "licence", "DOI", "good for")


def gigabytes(series: Iterable[Series]) -> float:
    """Size of series as stored, in GB (1e9 bytes; the index counts in 1e6)."""
    return sum(one.megabytes for one in series) / 1e3


def catalogue(index: ArchiveIndex, names: Iterable[str] = CHEST) -> list[tuple]:
    """One row of :data:`HEADER` per collection, the largest first; scouts and films: patients who have them as well.

    Each collection by itself: patients who are in two collections are in both rows.
    """
    known = index.collections()
    rows = []
    short = {name: alias for alias, name in reversed(ALIASES.items())}
    for name in names:
        if name not in known:
            continue
        series = select(index, [name], "any", with_scouts=True, with_films=True)
        cts = [one for one in series if one.kind == "ct"]
        people = {kind: len({one.id for one in series if one.kind == kind}) for kind in ("scout", "film")}
        licence = " or ".join(sorted({one.licence for one in cts}))
        doi = cts[0].doi
        title = f"{name} ({short[name]})" if name in short else name
        size = f"{gigabytes(cts):.1f}"
        rows.append((title, len(cts), size, people["scout"], people["film"], licence, doi, CHEST[name]))
    return sorted(rows, key=lambda row: -row[1])


def as_markdown(rows: list[tuple]) -> str:
    """The rows as a table in Markdown."""
    lines = [HEADER, ("---", "---:", "---:", "---:", "---:", "---", "---", "---"), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
