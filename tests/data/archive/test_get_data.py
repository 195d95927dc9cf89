"""The command: from a name to a folder that prepare_data.py takes, with its sources; what it refuses."""

import io
import json
import sys

import pytest

from get_data import main
from prepare_data import main as prepare
from tests.helpers.archive_cases import BUCKET, row, write_index
from tests.helpers.runs import build
from tests.helpers.tiny_data import make_dataset
from xray2ct.data.archive.download import download
from xray2ct.data.archive.index import ArchiveIndex
from xray2ct.data.archive.selection import Series
from xray2ct.data.archive.sources import PUBLIC, read_sources
from xray2ct.data.checks.dataset_check import check_command
from xray2ct.files import InputError, write_json

SLICES = 80


@pytest.fixture
def index_of(tmp_path):
    def make(*rows):
        (tmp_path / "index").mkdir(exist_ok=True)
        write_index(tmp_path / "index", rows)
        return ArchiveIndex(tmp_path / "index", "25.0.5")

    return make


def test_from_a_name_to_a_data_set(archive, index_of, tmp_path, capsys):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    from tests.helpers.dicom_cases import lps_ct, write_slices

    def put(prefix, only=None):
        ct = lps_ct((20, 18, SLICES), (18.0, 18.0, 3.0))
        for path in write_slices(tmp_path / prefix, ct, only=only, series=2 if only else 1).iterdir():
            archive.put(f"{prefix}/{path.name}", path.read_bytes())
        return {"series_aws_url": f"s3://{BUCKET}/{prefix}/*", "instanceCount": len(only) if only else SLICES}

    ct = row(**put("one"), SeriesDescription="Thorax")
    rows = [ct, row(**put("scouts", only=[5, 9]), SeriesDescription="SCOUT AP/LAT")]
    output = tmp_path / "cts"
    arguments = ["lidc", "--with-scouts", "--output", str(output), "--endpoint-url", archive.url]
    assert main([*arguments, "--dry-run"], index_of(*rows)) == 0
    printed = capsys.readouterr().out
    assert "lidc_idri: 1 patients, 1 with scouts, 0.2 GB, CC BY 3.0" in printed
    assert "cite: Armato, S. & others LIDC-IDRI" in printed
    assert not output.exists()

    assert main(arguments, index_of(*rows)) == 0
    assert len(list((output / "LIDC-IDRI-0001" / "ct").iterdir())) == SLICES
    assert len(list((output / "LIDC-IDRI-0001" / "scouts").iterdir())) == 2
    assert [(r["id"], r["kind"]) for r in read_sources(output)] == [
        ("LIDC-IDRI-0001", "ct"),
        ("LIDC-IDRI-0001", "scout"),
    ]
    capsys.readouterr()
    assert main(arguments, index_of(*rows)) == 0
    assert "2 of 2 folders are there already" in capsys.readouterr().out

    data = tmp_path / "data"
    small = ["--size", "32", "--xray-size", "48", "--workers", "1"]
    assert prepare(["--input", str(output), "--output", str(data), *small]) == 0
    patients = json.loads((data / "dataset.json").read_text())["patients"]
    assert list(patients) == ["LIDC-IDRI-0001"]
    entry = patients["LIDC-IDRI-0001"]["provenance"]
    assert tuple(entry) == PUBLIC
    assert entry["series_uid"] == ct["SeriesInstanceUID"]
    assert (entry["collection"], entry["patient"], entry["licence"]) == ("lidc_idri", "LIDC-IDRI-0001", "CC BY 3.0")


def test_licences_and_one_person_twice_are_seen_in_a_data_set(tmp_path, capsys):
    root = make_dataset(tmp_path / "data", patients=3)
    manifest = json.loads((root / "dataset.json").read_text())
    for patient in (manifest["split"]["train"][0], manifest["split"]["test"][0]):
        origin = ("nsclc_radiomics", "LUNG1-001", "1.2.3", "CC BY-NC 3.0", "10.7937/x")
        manifest["patients"][patient]["provenance"] = dict(zip(PUBLIC, origin))
    write_json(root / "dataset.json", manifest)
    assert check_command(root) == 1
    printed = capsys.readouterr().out
    assert "the same person, by the archive's ids, as" in printed
    assert "a leak" in printed
    assert "licence CC BY-NC 3.0: 2 patients, no commercial use" in printed
    _, task, _ = build(root)
    assert task.patients() == "1 training and 1 validation patients (1 of the former under a non-commercial licence)"


def test_the_record_follows_when_another_index_chooses_another_series(archive, tmp_path):
    def series(name, uid):
        for number in range(2):
            archive.put(f"{name}/{number}.dcm", name.encode())
        address = f"s3://{BUCKET}/{name}/*"
        return Series("P1", "ct", "lidc_idri", "P1", "1.2", uid, 2, 0.1, "CC BY 3.0", "", address)

    output = tmp_path / "cts"
    for name, uid in (("first", "1.2.1"), ("first", "1.2.1"), ("second", "1.2.2")):
        assert download([series(name, uid)], output, archive.url) == {}
        assert [row["series_uid"] for row in read_sources(output)] == [uid]
        assert {path.read_bytes() for path in (output / "P1" / "ct").iterdir()} == {name.encode()}


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "idc_index_data", None)
    with pytest.raises(InputError, match=r"get_data\.py needs idc_index_data; run: pip install 'idc-index"):
        main(["lidc", "--output", str(tmp_path / "cts")])


def test_names_that_the_terminal_cannot_show_do_not_stop_it(index_of, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    doi = "10.7937/äöü"
    assert main(["lidc", "--dry-run"], index_of(row(source_DOI=doi))) == 0
    terminal.flush()
    assert b"https://doi.org/10.7937/???" in terminal.buffer.getvalue()


def test_a_series_that_is_gone_is_named_and_the_status_says_so(archive, index_of, tmp_path, capsys):
    arguments = ["lidc", "--output", str(tmp_path / "cts"), "--endpoint-url", archive.url]
    assert main(arguments, index_of(row(series_aws_url=f"s3://{BUCKET}/gone/*"))) == 1
    printed = capsys.readouterr().out
    assert "not in the archive any more" in printed
    assert "0 of 1 patients are complete" in printed
    assert read_sources(tmp_path / "cts") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ldic"], "'ldic' is not in the archive; nearest: lidc"),
        ([], "no collection named"),
        (["lidc", "--licence", "cc-bx"], "--licence 'cc-bx': expected cc-by .* nearest: cc-by"),
        (["lidc", "--patients", "0"], "--patients is 0; expected 1 or more"),
        (["lung1"], "its licence is CC BY-NC 3.0, which --licence cc-by does not allow; --licence any takes it"),
        (["lidc"], r"20\.5 GB are more than 20; expected --yes, or fewer --patients"),
        (["lidc", "--yes"], r"expected 1 GB more"),
    ],
)
def test_what_is_refused(index_of, tmp_path, arguments, words):
    size = 20_500.0 if "--yes" not in arguments else 1e12
    closed = row(collection_id="nsclc_radiomics", license_short_name="CC BY-NC 3.0")
    with pytest.raises(InputError, match=words):
        main([*arguments, "--output", str(tmp_path / "cts")], index_of(row(series_size_MB=size), closed))
    assert not (tmp_path / "cts").exists()


def test_an_output_that_holds_something_else_or_is_missing_is_refused(index_of, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for arguments, words in (
        (["--output", str(tmp_path / "other")], "holds something else"),
        (["--output", str(tmp_path / "other" / "thesis.txt")], "holds something else"),
        ([], "--output is missing"),
    ):
        with pytest.raises(InputError, match=words):
            main(["lidc", *arguments], index_of(row()))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("series_uid", "uid", "column 'series_uid' is missing"),
        ("CC BY 3.0", "<script>", r"sources\.csv, line 2: licence is '<script>'"),
        ("ct,lidc_idri", "mr,lidc_idri", "line 2: kind is 'mr'; expected ct, scout, film"),
        ("P1,ct", "../P1,ct", "line 2: patient id"),
    ],
)
def test_a_changed_sources_file_is_refused(tmp_path, old, new, words):
    text = "id,kind,collection,patient,study_uid,series_uid,files,megabytes,licence,doi\n"
    text += "P1,ct,lidc_idri,P1,1.2,1.2.3,80,40,CC BY 3.0,10.7937/x\n"
    (tmp_path / "sources.csv").write_text(text)
    assert read_sources(tmp_path)[0]["licence"] == "CC BY 3.0"
    (tmp_path / "sources.csv").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=words):
        read_sources(tmp_path)
