"""Preparation in shards, the merge, and the list of CTs that restarts and shards share."""

import json
import multiprocessing
import os

import pytest

from prepare_data import main
from tests.helpers.ct_cases import save_nifti, thorax
from xray2ct.data import prepare_folder, work_list
from xray2ct.data.shards import Shard
from xray2ct.file_lock import locked
from xray2ct.files import InputError
from xray2ct.imaging.find_cts import search_cts

SMALL = ("--size", "16", "--xray-size", "32", "--workers", "1")


@pytest.fixture
def cts(tmp_path):
    """Five CTs, one of them in a sub-folder and one that cannot be read."""
    folder = tmp_path / "cts"
    for index, name in enumerate(("a", "b", "sub/c", "d")):
        save_nifti(folder / f"{name}.nii.gz", thorax(centre=(5 * index, 0)))
    (folder / "e.nii.gz").write_bytes(b"not a CT")
    return folder


def shard(cts, which, *more, output="shards"):
    where = ("--input", str(cts), "--output", str(cts.parent / output))
    return main([*where, *SMALL, "--shard", which, *more])


def merge(cts, *more, output="shards"):
    return main(["--output", str(cts.parent / output), "--merge", *more])


def manifest(cts, output):
    return json.loads((cts.parent / output / "dataset.json").read_text())


def test_shards_and_merge_give_the_data_set_of_one_run(cts, capsys):
    assert main(["--input", str(cts), "--output", str(cts.parent / "whole"), *SMALL]) == 1  # e is named
    statuses = [shard(cts, f"{i}/3") for i in (2, 3, 1)]
    assert statuses == [1, 0, 0]  # a d | b e | c
    assert not (cts.parent / "shards" / "dataset.json").exists()
    assert merge(cts) == 1
    assert "  e: " in capsys.readouterr().out.split("1 of 5 CTs could not be prepared:")[-1]
    assert manifest(cts, "shards") == manifest(cts, "whole")
    for patient in "abcd":
        for name in (f"{patient}.nii.gz", f"{patient}_mask.nii.gz", f"{patient}_pa_drr.png", f"{patient}_lat_drr.png"):
            one, other = (cts.parent / root / patient / name for root in ("shards", "whole"))
            assert one.read_bytes() == other.read_bytes()


def test_the_split_is_made_by_the_merge(cts):
    (cts / "e.nii.gz").unlink()
    lists = {"train": ["d", "b"], "val": ["a"], "test": ["c"]}
    (cts.parent / "split.json").write_text(json.dumps(lists))
    for i in (1, 2):
        assert shard(cts, f"{i}/2") == 0
    with pytest.raises(InputError, match="--split: cannot go with --shard"):
        shard(cts, "1/2", "--split", str(cts.parent / "split.json"))
    assert merge(cts, "--split", str(cts.parent / "split.json")) == 0
    assert manifest(cts, "shards")["split"] == {"train": ["b", "d"], "val": ["a"], "test": ["c"]}
    (cts.parent / "split.json").write_text(json.dumps({**lists, "test": []}))
    with pytest.raises(InputError, match="found but not listed: c"):
        merge(cts, "--split", str(cts.parent / "split.json"))


def test_a_merge_names_the_shards_that_are_not_there(cts):
    with pytest.raises(InputError, match="no such folder"):
        merge(cts)
    shard(cts, "2/4")
    with pytest.raises(InputError, match="shard 1, 3, 4 of 4 is missing"):
        merge(cts)
    shard(cts, "1/2")
    with pytest.raises(InputError, match="shards of 2 and of 4"):
        merge(cts)
    (cts.parent / "empty").mkdir()
    with pytest.raises(InputError, match="no finished shard"):
        merge(cts, output="empty")


def test_a_shard_that_is_started_again_counts_as_unfinished(cts, monkeypatch):
    for i in (1, 2):
        shard(cts, f"{i}/2")

    def stopped(source, folder, settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_folder, "try_patient", stopped)
        with pytest.raises(KeyboardInterrupt):
            shard(cts, "1/2", "--overwrite")
    with pytest.raises(InputError, match="shard 1 of 2 is missing"):
        merge(cts)
    assert shard(cts, "1/2") == 1  # e is named
    assert merge(cts) == 1


def test_shards_of_other_settings_or_another_list_do_not_merge(cts):
    (cts / "e.nii.gz").unlink()
    shard(cts, "1/2")
    shard(cts, "2/2", "--remove-couch", "--overwrite")
    with pytest.raises(InputError, match="shard 2/2 was prepared with other settings"):
        merge(cts)
    save_nifti(cts / "late.nii.gz", thorax())
    shard(cts, "2/2", "--overwrite")
    with pytest.raises(InputError, match="shard 2/2 was prepared from another list of CTs"):
        merge(cts)
    shard(cts, "1/2")
    assert merge(cts) == 0
    assert sorted(manifest(cts, "shards")["patients"]) == ["a", "b", "c", "d", "late"]


@pytest.mark.parametrize("damage", ["[]", '{"shard": [1, 2]}', "{", None])
def test_a_damaged_result_is_named(cts, damage):
    for i in (1, 2):
        shard(cts, f"{i}/2")
    path = cts.parent / "shards" / ".prepare" / "shard-1-of-2.json"
    path.write_text(path.with_name("shard-2-of-2.json").read_text() if damage is None else damage)
    with pytest.raises(InputError, match=r"shard-1-of-2\.json"):
        merge(cts)


def _hold(path, ready, done):
    with locked(path, "another process prepares shard 1/2 here"):
        ready.set()
        done.wait(60)


def test_two_shards_with_one_number_are_refused(cts):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    path = Shard(1, 2).file(cts.parent / "shards", "lock")
    holder = context.Process(target=_hold, args=(path, ready, done))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(InputError, match=rf"another process prepares shard 1/2 here \(process {holder.pid}"):
            shard(cts, "1/2")
        assert shard(cts, "2/2") == 0  # the other one is free
    finally:
        done.set()
        holder.join()


@pytest.mark.parametrize("text", ["3", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2", ""])
def test_shards_are_numbered_from_1(text):
    with pytest.raises(InputError, match="--shard"):
        Shard.parse(text)


def test_options_that_do_not_go_together(cts):
    with pytest.raises(InputError, match="--size: cannot go with --merge"):
        merge(cts, "--size", "16")
    with pytest.raises(InputError, match="--shard: cannot go with --merge"):
        merge(cts, "--shard", "1/2")
    with pytest.raises(SystemExit):
        main(["--output", str(cts.parent / "out")])


# ------------------------------------------------------------------------------------------------
# The list of CTs


class Searches(list):
    """Stands for ``search_cts`` and counts its calls."""

    def __call__(self, folder):
        self.append(folder)
        return search_cts(folder)


@pytest.fixture
def searches(monkeypatch):
    calls = Searches()
    monkeypatch.setattr(work_list, "search_cts", calls)
    return calls


def test_a_restart_and_other_shards_search_no_second_time(cts, searches, capsys):
    (cts / "e.nii.gz").unlink()
    for i in (1, 2, 1):
        shard(cts, f"{i}/2")
    assert len(searches) == 1
    assert "4 CTs by the list of an earlier search" in capsys.readouterr().out
    shard(cts, "2/2", "--rescan")
    assert len(searches) == 2
    save_nifti(cts / "sub" / "new.nii.gz", thorax())
    shard(cts, "1/2")
    assert len(searches) == 3
    assert merge_ids(cts) == {"a", "c", "new"}  # every other one of a, b, c, d, new


def merge_ids(cts):
    return set(json.loads((cts.parent / "shards" / ".prepare" / "shard-1-of-2.json").read_text())["entries"])


def test_what_could_not_be_read_is_tried_again(cts, searches):
    unreadable = cts / "sub2"
    unreadable.mkdir()
    shard(cts, "1/2")
    path = cts.parent / "shards" / ".prepare" / "worklist.json"
    listed = json.loads(path.read_text())
    path.write_text(json.dumps({**listed, "left_out": [f"{unreadable}: cannot be read (Permission denied)"]}))
    shard(cts, "1/2")
    assert len(searches) == 2


def test_a_list_of_another_input_or_a_damaged_one_is_not_used(cts, searches, tmp_path):
    shard(cts, "1/2")
    other = tmp_path / "other"
    save_nifti(other / "x.nii.gz", thorax())
    shard(other, "1/1")
    assert len(searches) == 2
    (cts.parent / "shards" / ".prepare" / "worklist.json").write_text('{"version": 1}')
    shard(cts, "1/2")
    assert len(searches) == 3


def test_finished_patients_are_not_read_again_but_changed_ones_are(cts):
    (cts / "e.nii.gz").unlink()
    output = cts.parent / "whole"
    command = ["--input", str(cts), "--output", str(output), *SMALL]
    assert main(command) == 0
    path = output / "b" / "b.nii.gz"
    before, times = path.read_bytes(), path.stat()
    # Same bytes with another time: compared by checksum and kept; other bytes are made again.
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    stamp = path.stat().st_mtime_ns
    assert main(command) == 0
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert main(command) == 0
    assert path.read_bytes() == before
