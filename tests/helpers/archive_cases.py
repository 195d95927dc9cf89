"""A small archive: rows of its index as a parquet file, and its objects on a local S3 server."""

import itertools

import pytest

duckdb = pytest.importorskip("duckdb", reason="get_data.py needs idc-index, which brings duckdb")

BUCKET = "idc-open-data"
COLUMNS = {
    "collection_id": "lidc_idri",
    "analysis_result_id": None,
    "PatientID": "LIDC-IDRI-0001",
    "StudyInstanceUID": "1.2.1",
    "SeriesInstanceUID": "1.2.1.1",
    "SeriesDescription": "Thorax  2.0  B31f",
    "StudyDescription": "CT THORAX",
    "BodyPartExamined": "CHEST",
    "Modality": "CT",
    "sop_class_name": "CT Image Storage",
    "StudyDate": "2000-01-01",
    "instanceCount": 150,
    "series_size_MB": 80.0,
    "license_short_name": "CC BY 3.0",
    "source_DOI": "10.7937/k9/tcia.2015.lo9ql9sx",
    "series_aws_url": f"s3://{BUCKET}/0001/*",
}
SOURCES = (
    """[{'source_doi': '10.7937/k9/tcia.2015.lo9ql9sx', 'citation': 'Armato, S. &amp; others\n<i>LIDC-IDRI</i>'}]"""
)
_numbers = itertools.count(1)


def row(**values) -> dict:
    """One series as the index holds it; ``values`` replace those of an ordinary chest CT. Each has a UID of its own."""
    return COLUMNS | {"SeriesInstanceUID": f"1.2.3.{next(_numbers)}"} | values


def write_index(folder, rows) -> None:
    """Write ``idc_index.parquet`` and ``collections_index.parquet`` as idc-index-data has them."""
    types = {"instanceCount": "BIGINT", "series_size_MB": "DOUBLE"}
    columns = ", ".join(f"{name} {types.get(name, 'VARCHAR')}" for name in COLUMNS)
    with duckdb.connect() as database:
        database.execute(f"CREATE TABLE series ({columns})")
        marks = ", ".join("?" for _ in COLUMNS)
        database.executemany(f"INSERT INTO series VALUES ({marks})", [[row[name] for name in COLUMNS] for row in rows])
        database.execute(f"COPY series TO '{folder / 'idc_index.parquet'}' (FORMAT parquet)")
        database.execute("CREATE TABLE collections (sources STRUCT(source_doi VARCHAR, citation VARCHAR)[])")
        database.execute(f"INSERT INTO collections VALUES ({SOURCES})")
        database.execute(f"COPY collections TO '{folder / 'collections_index.parquet'}' (FORMAT parquet)")
