"""The archive's index of all series, read from the package idc-index-data, offline."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from xray2ct.files import InputError

_COLUMNS = (
    "collection_id, PatientID, StudyInstanceUID, SeriesInstanceUID, SeriesDescription, StudyDescription,"
    " BodyPartExamined, Modality, sop_class_name, analysis_result_id, StudyDate, instanceCount, series_size_MB,"
    " license_short_name, source_DOI, series_aws_url"
)


def _import(name: str):
    try:
        return __import__(name)
    except ImportError:
        raise InputError(f"get_data.py needs {name}; run: pip install 'idc-index>=0.13'") from None


class ArchiveIndex:
    """The index as a table of series.

    folder: holds ``idc_index.parquet`` and ``collections_index.parquet``; by default that of the installed package
    idc-index-data, else InputError saying what to install. version: of that package, for the record.
    """

    def __init__(self, folder: Path | None = None, version: str = ""):
        duckdb = _import("duckdb")
        if folder is None:
            package = _import("idc_index_data")
            folder, version = Path(package.__file__).parent, package.__version__
        self.version = version
        self._collections = folder / "collections_index.parquet"
        self._connection = duckdb.connect()
        try:
            self._connection.read_parquet(str(folder / "idc_index.parquet")).create_view("series")
        except duckdb.Error as error:
            what = str(error).splitlines()[0]
            raise InputError(
                f"{folder / 'idc_index.parquet'}: cannot be read ({what}); reinstall idc-index-data"
            ) from None

    def collections(self) -> dict[str, list[str]]:
        """Every collection that holds CTs, with the licences of its CTs."""
        rows = self._connection.execute(
            "SELECT collection_id, list(DISTINCT license_short_name) FROM series WHERE Modality = 'CT'"
            " GROUP BY 1 ORDER BY 1"
        )
        return {name: sorted(filter(None, licences)) for name, licences in rows.fetchall()}

    def series(self, collections: Sequence[str], condition: str) -> list[dict]:
        """Rows of ``collections`` for which the SQL ``condition`` holds, one dict of columns per series."""
        query = f"SELECT {_COLUMNS} FROM series WHERE list_contains(?, collection_id) AND analysis_result_id IS NULL"
        rows = self._connection.execute(f"{query} AND ({condition})", [list(collections)])
        names = [column[0] for column in rows.description]
        return [dict(zip(names, row)) for row in rows.fetchall()]

    def citation(self, doi: str) -> str:
        """How the source with this DOI asks to be cited, in one line; its address where the index does not say."""
        sources = "SELECT unnest(sources) AS source FROM read_parquet(?)"
        query = f"SELECT source FROM ({sources}) WHERE lower(source.source_doi) = ?"
        found = self._connection.execute(query, [str(self._collections), doi.lower()]).fetchone()
        text = html.unescape(re.sub(r"<[^>]+>", "", found[0]["citation"] or "")) if found else ""
        return " ".join(text.split()) or f"https://doi.org/{doi}"
