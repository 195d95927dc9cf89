"""Checkpoints: whole or absent, read without running code."""

import os
import pickle
import resource
import signal
import sys

import pytest
import torch

from tests.helpers.runs import run
from xray2ct.checkpoints import check_compatible, load_checkpoint, save_checkpoint
from xray2ct.files import InputError, atomic_path, run_cli, write_json
from xray2ct.geometry.projector import Geometry


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.pt"
    save_checkpoint(path, {"kind": "enhanced_direct", "weights": torch.arange(50_000.0), "note": "first"})
    return path


def test_round_trip_and_no_temporary_file_is_left(good):
    data = load_checkpoint(good, kind="enhanced_direct")
    assert torch.equal(data["weights"], torch.arange(50_000.0))
    assert os.listdir(good.parent) == ["good.pt"]


@pytest.mark.parametrize("tenths", range(10))
def test_truncated_file_is_named(good, tenths):
    whole = good.read_bytes()
    good.write_bytes(whole[: len(whole) * tenths // 10])
    with pytest.raises(InputError, match=r"good\.pt"):
        load_checkpoint(good)


class MakesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, zipped):
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    payload = {"format": 1, "kind": "enhanced_direct", "x": MakesAFile(str(trace))}
    if zipped:
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(InputError, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not trace.exists()


def test_foreign_and_missing_files(tmp_path, good):
    with pytest.raises(InputError, match=r"none\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"foreign\.pt.*format"):
        load_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"good\.pt.*'enhanced_direct'.*'refinement'"):
        load_checkpoint(good, kind="refinement")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(InputError, match=r"text\.pt"):
        load_checkpoint(tmp_path / "text.pt")


def test_compatibility_names_both_sides():
    cone, other = Geometry(), Geometry(sid_mm=1500.0)
    check_compatible("c.pt", {"geometry": cone.to_dict()}, geometry=Geometry().to_dict())
    with pytest.raises(InputError, match=r"c\.pt.*geometry.*sid_mm 1600\.0 against 1500\.0"):
        check_compatible("c.pt", {"geometry": cone.to_dict()}, geometry=other.to_dict())
    with pytest.raises(InputError, match=r"hu_window.*-1000.*-1024"):
        check_compatible("c.pt", {"hu_window": [-1000.0, 1000.0]}, hu_window=(-1024.0, 1476.0))


def test_a_failing_write_keeps_the_old_file(good, monkeypatch):
    def fail(*_):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"good\.pt"):
        save_checkpoint(good, {"kind": "enhanced_direct", "note": "second"})
    monkeypatch.undo()
    assert load_checkpoint(good)["note"] == "first"
    assert os.listdir(good.parent) == ["good.pt"]


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_a_full_disk_keeps_the_old_file(good, tmp_path_factory):
    """The operating system refuses bytes in the middle of the write, as a full disk does."""
    script = tmp_path_factory.mktemp("script") / "save.py"
    script.write_text(f"""
import resource, signal, torch
from xray2ct.checkpoints import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save_checkpoint({str(good)!r}, {{"kind": "enhanced_direct", "weights": torch.zeros(1_000_000), "note": "second"}})
""")
    done = run([sys.executable, str(script)])
    assert done.returncode != 0
    assert "could not be written" in done.stderr or "File too large" in done.stderr
    assert load_checkpoint(good)["note"] == "first"
    assert os.listdir(good.parent) == ["good.pt"]
    assert hasattr(resource, "RLIMIT_FSIZE")
    assert hasattr(signal, "SIGXFSZ")


def test_atomic_path_replaces_only_on_success(tmp_path):
    path = tmp_path / "new" / "out.nii.gz"
    with atomic_path(path) as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def fail_halfway():
        with atomic_path(path) as temporary:
            temporary.write_text("two")
            raise KeyError("halfway")

    with pytest.raises(KeyError, match="halfway"):
        fail_halfway()
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["out.nii.gz"]


def test_a_failing_write_names_the_file_and_commands_say_it_in_one_line(tmp_path, capsys):
    path = tmp_path / "table.csv"

    def full():
        with atomic_path(path):
            raise OSError(28, "No space left on device")

    def below_a_file():
        path.touch()
        write_json(path / "new.json", {})

    for main, words in ((full, "table.csv: No space left on device"), (below_a_file, "table.csv: ")):
        with pytest.raises(SystemExit) as stopped:
            run_cli(main)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    with pytest.raises(BrokenPipeError):  # of no file: not for this sentence
        run_cli(lambda: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
