"""The transfer by s5cmd from an S3 server on this machine: complete, stopped, damaged, gone, no room, no network."""

import os

import pytest

from xray2ct.data.archive.selection import Series
from xray2ct.data.archive.transfer import folders_of, transfer
from xray2ct.files import InputError

BUCKET = "idc-open-data"
CONTENT = [bytes([65 + number]) * (20_000 + number) for number in range(3)]


@pytest.fixture
def series(archive, request):
    """One series of three objects that are on the server."""
    for number, content in enumerate(CONTENT):
        archive.put(f"{request.node.name}/{number}.dcm", content)
    return make(request.node.name)


def make(prefix, patient="P1", kind="ct", files=3):
    uids = "1.2", f"1.2.{len(prefix)}"
    return Series(patient, kind, "lidc_idri", patient, *uids, files, 0.06, "CC BY 3.0", "", f"s3://{BUCKET}/{prefix}/*")


def fetch(archive, output, *series, **more):
    return transfer(folders_of(list(series), output), archive.url, **more)


def content(folder):
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_a_series_arrives_whole(archive, series, tmp_path):
    output = tmp_path / "it's a folder"  # quoted for s5cmd
    sizes, finished = [], []
    assert fetch(archive, output, series, progress=sizes.append, finished=finished.append) == {}
    assert content(output / "P1" / "ct") == CONTENT
    assert sum(sizes) == sum(map(len, CONTENT))
    assert [folder.path for folder in finished] == [output / "P1" / "ct"]
    assert os.listdir(output / "P1") == ["ct"]


def test_stopped_and_resumed(archive, series, tmp_path):
    def stop(size):
        if size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(archive, tmp_path, series, progress=stop)
    staging = tmp_path / "P1" / ".ct.part"
    assert not (tmp_path / "P1" / "ct").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in staging.glob("*.dcm")}
    assert kept
    (staging / "2.dcm1234").write_bytes(b"a piece that s5cmd left")
    assert fetch(archive, tmp_path, series) == {}
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "P1" / "ct").iterdir()}
    assert len(there) == 3
    assert kept.items() <= there.items()  # not fetched again


def test_files_that_were_taken_away_are_fetched_again(archive, series, tmp_path):
    fetch(archive, tmp_path, series)
    (folder,) = folders_of([series], tmp_path)
    assert folder.done
    (folder.path / "1.dcm").unlink()
    assert not folder.done
    assert fetch(archive, tmp_path, series) == {}
    assert content(folder.path) == CONTENT


def test_a_file_of_the_right_size_and_other_content_is_found_by_its_md5(archive, series, tmp_path):
    staging = tmp_path / "P1" / ".ct.part"
    staging.mkdir(parents=True)
    (staging / "0.dcm").write_bytes(bytes(len(CONTENT[0])))
    (problem,) = fetch(archive, tmp_path, series).values()
    assert "0.dcm: size or MD5 is not the archive's" in problem
    assert not (tmp_path / "P1" / "ct").exists()
    assert fetch(archive, tmp_path, series) == {}
    assert content(tmp_path / "P1" / "ct") == CONTENT


def test_half_a_file_is_fetched_again(archive, series, tmp_path):
    staging = tmp_path / "P1" / ".ct.part"
    staging.mkdir(parents=True)
    (staging / "0.dcm").write_bytes(CONTENT[0][:100])
    assert fetch(archive, tmp_path, series) == {}
    assert content(tmp_path / "P1" / "ct") == CONTENT


def test_what_is_withdrawn_changed_or_closed_is_named_and_the_others_come(archive, series, tmp_path):
    archive.put("fewer/0.dcm", CONTENT[0])
    archive.put("closed/0.dcm", CONTENT[0], public=False)
    gone, fewer = make("withdrawn", "P2"), make("fewer", "P3")
    closed = make("closed", "P4", files=1)
    problems = fetch(archive, tmp_path, gone, fewer, closed, series)
    texts = {path.parent.name: text for path, text in problems.items()}
    assert "patient P2, series 1.2.9: not in the archive any more (withdrawn?)" in texts.pop("P2")
    assert "1 files in the archive, 3 in the index" in texts.pop("P3")
    assert "0.dcm: Forbidden" in texts.pop("P4")
    assert not texts
    assert content(tmp_path / "P1" / "ct") == CONTENT


def test_an_object_that_goes_during_the_transfer(archive, series, tmp_path):
    def remove(_):
        archive.delete("test_an_object_that_goes_during_the_transfer/1.dcm")

    (problem,) = fetch(archive, tmp_path, series, progress=remove).values()  # called first with what is there already
    assert "1.dcm: NoSuchKey" in problem
    assert not (tmp_path / "P1" / "ct").exists()


def test_a_full_disk_ends_it_in_one_sentence(archive, series, tmp_path):
    resource = pytest.importorskip("resource", reason="limits of a process, on POSIX systems")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(
            InputError, match=r"ct\.part.*cannot be written \(file too large\).*run the same command again"
        ):
            fetch(archive, tmp_path, series)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fetch(archive, tmp_path, series) == {}


def test_no_network_ends_it_in_one_sentence(tmp_path):
    with pytest.raises(
        InputError, match=r"no connection to http://127\.0\.0\.1:9 \(connection refused\); what is here stays"
    ):
        transfer(folders_of([make("any")], tmp_path), "http://127.0.0.1:9")


def test_several_series_share_the_folder_of_scouts(archive, tmp_path):
    archive.put("scout1/a.dcm", CONTENT[0])
    archive.put("scout2/b.dcm", CONTENT[1])
    scouts = [make(prefix, kind="scout", files=1) for prefix in ("scout1", "scout2")]
    assert fetch(archive, tmp_path, *scouts) == {}
    assert content(tmp_path / "P1" / "scouts") == CONTENT[:2]
