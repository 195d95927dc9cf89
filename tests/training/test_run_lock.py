"""One run in one folder: the second start is refused, and nothing that was killed blocks the next."""

import contextlib
import errno
import multiprocessing
import os
import signal

import pytest
import torch

import train_enhanced_4gpu
from hybrid_vit_cascade.training import train_progressive
from tests.helpers import tiny_cascade
from tests.helpers.faults import toy
from tests.helpers.runs import TINY
from tests.helpers.tiny_data import make_dataset
from tools import baselines
from xray2ct import file_lock
from xray2ct.checkpoints import remove_leftovers, save_checkpoint
from xray2ct.files import InputError, write_json
from xray2ct.training import run_lock
from xray2ct.training.distributed import Processes
from xray2ct.training.run_lock import locked_folder
from xray2ct.training.trainer import fit

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forked processes are POSIX")


def hold(folder, pipe):
    with locked_folder(folder, Processes()):
        pipe.send("locked")
        signal.pause()


@contextlib.contextmanager
def holder(folder, target=hold):
    """Another process that holds the folder; killed at the end."""
    pipe, other = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=target, args=(folder, other), daemon=True)
    process.start()
    try:
        assert pipe.poll(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_folder_in_use_is_refused_by_name_and_a_killed_run_blocks_nobody(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as process:
        with (
            pytest.raises(InputError, match=rf"run: another run is using.*process {process.pid} on .*since"),
            locked_folder(folder, Processes()),
        ):
            pass
        with locked_folder(tmp_path / "other", Processes()):
            pass
    for _ in range(2):  # SIGKILL left the file, but no lock; nor does a block that has ended
        with locked_folder(folder, Processes()):
            assert f"process {os.getpid()} on" in (folder / run_lock.LOCK).read_text()


def test_the_same_process_does_not_get_a_folder_twice(tmp_path):
    with (
        locked_folder(tmp_path, Processes()),
        pytest.raises(InputError, match="this very process"),
        locked_folder(tmp_path / "sub" / "..", Processes()),
    ):
        pass


class Refused(Processes):
    """Rank 1 of two, of which rank 0 was refused."""

    def any(self, flag):
        return True


def test_the_other_ranks_end_quietly_when_rank_0_is_refused(tmp_path):
    with pytest.raises(SystemExit) as error, locked_folder(tmp_path, Refused(1, 2)):
        pass
    assert error.value.code == 2
    assert list(tmp_path.iterdir()) == []  # rank 0's business


def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, capsys):
    def unsupported(_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(file_lock, "_lock", unsupported)
    with locked_folder(tmp_path, Processes()):
        assert "has no locks; start no second run" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file.run.run\.lock: could not be written"),
        locked_folder(tmp_path / "file" / "run", Processes()),
    ):
        pass


def write_slowly(folder, pipe):
    def save(data, path):
        path.write_bytes(b"half")
        pipe.send("writing")
        signal.pause()

    torch.save = save
    save_checkpoint(os.path.join(folder, "last.pt"), {})


def test_a_checkpoint_that_is_being_written_is_no_leftover(tmp_path):
    with holder(tmp_path, write_slowly):
        assert remove_leftovers(tmp_path) == 0
        assert len(list(tmp_path.iterdir())) == 1
    assert remove_leftovers(tmp_path) == 1  # its writer was killed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["stage 1", "mean", "cascade"])
def test_every_training_command_takes_the_folder_before_it_writes(script, tmp_path, monkeypatch):
    """Up to the lock nothing is written: what would follow is not reached."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    root, folder = make_dataset(tmp_path / "data"), tmp_path / "run"
    words = [word for text in (*TINY, "world_size=1") for word in ("--set", text)]
    common = ["--data", str(root), "--output", str(folder)]
    if script == "stage 1":
        command = (train_enhanced_4gpu.main, [*common, *words])
    elif script == "mean":
        command = (baselines.main, ["mean", *common, *words, "--set", "model.transformer_blocks=0"])
    else:
        config = tmp_path / "cascade.json"
        write_json(config, tiny_cascade.TINY)
        words = ["--config", str(config), "--data", str(root), "--checkpoint-dir", str(folder)]
        command = (train_progressive.main, words)
    with holder(folder), pytest.raises(InputError, match="another run is using this folder"):
        command[0](command[1])
    assert [path.name for path in folder.iterdir()] == [run_lock.LOCK]


def test_a_run_in_a_locked_folder_trains(tmp_path):
    config, task, model = toy(tmp_path, "training.num_epochs=1")
    with locked_folder(tmp_path, Processes()):
        fit(model, task, config, tmp_path, Processes())
    assert (tmp_path / "last.pt").exists()
