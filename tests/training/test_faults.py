"""Faults: processes killed at any moment, full disks, damaged files, dying ranks and data workers.

Whole training runs of a toy network (:mod:`toy_task`) through the project's command line, trainer and checkpoints, each
in a process of its own, forked from a server that has imported torch: twenty starts cost what one does. The reference
is the same run without any fault. Runs of the real network are killed in test_training.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import dataset
from dataset import PatientDataset
from tests.helpers import toy_task
from tests.helpers.faults import REPORT, SECONDS, Run, child, die, fingerprint, toy
from tests.helpers.paths import ROOT
from tests.helpers.runs import assert_same_weights, build, environment
from tests.helpers.tiny_data import largest_difference, make_dataset
from tools import launch
from xray2ct.checkpoints import (
    DamagedCheckpoint,
    WriteError,
    find_state,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from xray2ct.data import cache
from xray2ct.files import InputError
from xray2ct.training import distributed
from xray2ct.training.distributed import Processes, process_group, spawn
from xray2ct.training.signals import SignalCatcher
from xray2ct.training.trainer import Trainer, TrainingError, fit

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and forked processes are POSIX")
KILLS = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run without faults, and the fingerprint of its weights after each step."""
    output = tmp_path_factory.mktemp("reference") / "run"
    states = output.parent / "states.jsonl"
    run = Run(output, ("record", str(states)))
    assert run.end() == 0, run.text()
    return output, dict(json.loads(line) for line in states.read_text().splitlines())


def unfinished(output):
    return [path for path in output.iterdir() if path.name.startswith(".")] if output.exists() else []


def check_every_file(output, states):
    """No unreadable checkpoint, the state that of the uninterrupted run at the same step, a log of whole lines."""
    for path in output.glob("[!.]*.pt"):
        checkpoint = load_checkpoint(path)
        if "training_state" in checkpoint:
            assert fingerprint(checkpoint) == states[checkpoint["step"]], path
    if (output / "log.jsonl").exists():
        [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# -- SIGKILL and SIGTERM ---------------------------------------------------------------------------
def kill_plan(draw):
    """Twenty faults: ten at any moment, ten around a write; the last one leaves half a file."""
    in_write = [("write", draw.randint(1, 2), share, signal.SIGKILL) for share in (0.0, 0.3, 0.6, 0.9, 1.0, 0.5)]
    around_it = [("link", draw.randint(1, 2), signal.SIGKILL) for _ in range(2)]
    around_it += [("replace", draw.randint(1, 2), signal.SIGKILL) for _ in range(2)]
    last = in_write.pop()
    plan = [*in_write, *around_it, *[REPORT] * (KILLS - len(in_write) - len(around_it) - 1)]
    draw.shuffle(plan)
    return [*plan, last]


def test_twenty_kills_lose_nothing_and_leave_no_unreadable_checkpoint(reference, tmp_path):
    draw, (finished, states) = random.Random(20261122), reference
    output, halves = tmp_path / "run", 0
    for fault in kill_plan(draw):
        run = Run(output, fault)
        if fault == REPORT:
            time.sleep(draw.uniform(0, 1.5) * run.wait_for_step())
            run.process.kill()
        assert run.end() == -signal.SIGKILL, (fault, run.text())
        left = unfinished(output)
        assert len(left) <= 1, "files of an earlier kill were not removed"
        if fault[0] == "write":
            halves += 1
            assert [re.fullmatch(r"\.\w+\.pt\.\w+\.tmp\.pt", path.name) is not None for path in left] == [True]
        check_every_file(output, states)
    assert halves == 6
    assert load_checkpoint(output / "last.pt")["step"] < max(states), "the run was over before the last kill"
    last = Run(output)
    assert last.end() == 0, last.text()
    assert "Removed unfinished checkpoint files" in last.text()
    assert "Resumed" in last.text()
    assert unfinished(output) == []
    check_every_file(output, states)
    assert_same_weights(output, finished)
    runs = json.loads((output / "run.json").read_text())["runs"]
    assert [entry["outcome"] for entry in runs] == [None] * KILLS + ["finished"]


def test_sigterm_at_any_moment_ends_with_a_saved_state(reference, tmp_path):
    """Within a step, twice; in the middle of a write; during a validation."""
    finished, states = reference
    output = tmp_path / "run"
    faults = [REPORT, ("write", 2, 0.5, signal.SIGTERM), ("validation", 1, signal.SIGTERM), REPORT]
    for fault in faults:
        run = Run(output, fault)
        if fault == REPORT:
            run.wait_for_step()
            run.process.terminate()
        assert run.end() == 128 + signal.SIGTERM, run.text()
        assert "SIGTERM: saved" in run.text()
        assert unfinished(output) == []
        check_every_file(output, states)
    last = Run(output)
    assert last.end() == 0, last.text()
    assert_same_weights(output, finished)
    runs = json.loads((output / "run.json").read_text())["runs"]
    assert [entry["outcome"] for entry in runs] == ["Interrupted: SIGTERM"] * len(faults) + ["finished"]


# -- damaged checkpoints ---------------------------------------------------------------------------
@pytest.fixture
def three_states(reference, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("last.pt", "last_previous.pt", "epoch_5.pt", "epoch_10.pt", "best_model.pt"):
        shutil.copyfile(reference[0] / name, folder / name)
    return folder


def truncate(path, tenths):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])


@pytest.mark.parametrize("tenths", range(10))
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(three_states, tenths):
    truncate(three_states / "last.pt", tenths)
    with pytest.raises(DamagedCheckpoint, match=r"last\.pt"):
        load_checkpoint(three_states / "last.pt")
    path, state, notes = find_state(three_states)
    assert path.name == "last_previous.pt"
    assert state["step"] == 60
    assert len(notes) == 1
    assert str(three_states / "last.pt") in notes[0]


def test_the_newest_readable_state_is_found_and_without_one_it_is_said(three_states):
    for name in ("last.pt", "last_previous.pt", "epoch_10.pt"):
        truncate(three_states / name, 5)
    path, _, notes = find_state(three_states)
    assert path.name == "epoch_5.pt"
    assert len(notes) == 3
    truncate(three_states / "epoch_5.pt", 5)
    with pytest.raises(InputError, match=r"last\.pt.*last_previous\.pt.*epoch_10\.pt.*epoch_5\.pt.*start anew"):
        find_state(three_states)
    assert find_state(three_states.parent) is None


def test_a_flipped_bit_in_a_checkpoint_is_never_read_as_weights(three_states):
    draw, path = random.Random(1), three_states / "best_model.pt"
    whole, refused = path.read_bytes(), 0
    original = load_checkpoint(path)
    for _ in range(40):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            found = load_checkpoint(path)
        except DamagedCheckpoint:
            refused += 1
        else:
            assert largest_difference(found, original) == 0  # the bit was in the padding between tensors
    assert refused >= 30


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(reference, tmp_path):
    finished, states = reference
    output = tmp_path / "run"
    killed = Run(output, ("replace", 17, signal.SIGKILL))
    assert killed.end() == -signal.SIGKILL, killed.text()
    truncate(output / "last.pt", 5)
    step = load_checkpoint(output / "last_previous.pt")["step"]
    run = Run(output)
    assert run.end() == 0, run.text()
    assert "last.pt: truncated or not a checkpoint" in run.text()
    assert f"Resumed {output / 'last_previous.pt'} at epoch" in run.text()
    assert 1 < step < max(states)
    assert (output / "last.pt.damaged").exists()
    assert_same_weights(output, finished)


class OtherRankReadsAnOlderState(Processes):
    def gather_objects(self, value):
        return [value, ("last_previous.pt", 3)]


def test_processes_that_read_different_states_do_not_go_on(tmp_path):
    config, task, model = toy(tmp_path, "training.num_epochs=1")
    fit(model, task, config, tmp_path, Processes())
    with pytest.raises(InputError, match=r"rank 0: last\.pt at step 6, rank 1: last_previous\.pt at step 3.*shared"):
        fit(task.build_model(), task, config, tmp_path, OtherRankReadsAnOlderState())


# -- files of a run --------------------------------------------------------------------------------
@pytest.mark.parametrize("links", [True, False])
def test_the_replaced_checkpoint_stays_as_the_previous_one(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links here")))
    last, previous = tmp_path / "last.pt", tmp_path / "last_previous.pt"
    for step in range(3):
        save_checkpoint(last, {"step": step}, keep=previous)
    assert (load_checkpoint(last)["step"], load_checkpoint(previous)["step"]) == (2, 1)
    if links:  # killed between the two renames: both names are of one file
        previous.unlink()
        os.link(last, previous)
        save_checkpoint(last, {"step": 3}, keep=previous)
        assert (load_checkpoint(last)["step"], load_checkpoint(previous)["step"]) == (3, 2)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last_previous.pt"]


def test_only_unfinished_checkpoints_are_removed(tmp_path):
    keep = {"last.pt", ".hidden.pt", "epoch_1.pt", ".run.json.abc.tmp.json", "notes.tmp.pt"}
    for name in (*keep, ".last.pt.a1b2c3d4.tmp.pt", ".epoch_10.pt.zzz.tmp.pt", ".last_previous.pt.link.tmp.pt"):
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == 3
    assert set(os.listdir(tmp_path)) == keep


def test_a_log_line_cut_off_is_dropped_and_the_others_stay(tmp_path):
    config, task, model = toy(tmp_path, "training.num_epochs=1")
    (tmp_path / "log.jsonl").write_text('{"event": "step", "epoch": 1}\n{"event": "st')
    fit(model, task, config, tmp_path, Processes())
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events[:2]] == ["step", "step"]


# -- full disks ------------------------------------------------------------------------------------
def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_under_the_log_or_the_cache_is_one_sentence(root, tmp_path, monkeypatch):
    config, task, model = toy(tmp_path)
    trainer = Trainer(model, task, config, tmp_path / "run", Processes())
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)  # cannot be written either
    with pytest.raises(WriteError, match=r"epoch 1, step 2: .*log\.jsonl: could not be written.*[Dd]irectory"):
        trainer.train_epoch(SignalCatcher())
    monkeypatch.setattr(np, "save", no_space)
    with pytest.raises(InputError, match=r"p3.*volume16.*No space left.*data\.cache_dir"):
        PatientDataset(root, "val", 16, None, cache_dir=tmp_path / "cache").build_cache()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, and what changes its size (MiB)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs Linux and root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        pytest.skip(f"mounting a small file system is refused here: {done.stderr.strip()}")

    def resize(kibibytes):
        subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", str(folder)], check=True)

    yield folder, resize
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_with_room_it_goes_on(reference, small_disk):
    (folder, resize), (finished, states) = small_disk, reference
    size = (finished / "last.pt").stat().st_size
    for share in (0.5, 1.5, 2.5):  # of the first, second, third file only a half fits
        resize(int(share * size) // 1024 + 24)  # and config.json, run.json, log.jsonl
        run = Run(folder / "run")
        assert run.end() == 2, run.text()
        error = [line.strip() for line in run.text().splitlines() if "error: " in line]
        assert len(error) == 1
        assert error[0].startswith("error: ")
        assert "could not be written" in error[0]
        assert "Traceback" not in run.text()
        assert unfinished(folder / "run") == []
        check_every_file(folder / "run", states)
    resize(64 * 1024)
    run = Run(folder / "run")
    assert run.end() == 0, run.text()
    assert_same_weights(folder / "run", finished)


# -- data ------------------------------------------------------------------------------------------
def test_a_damaged_cache_file_is_always_noticed_and_made_again(root, tmp_path):
    data = PatientDataset(root, "val", 16, 64, cache_dir=tmp_path)
    data.build_cache()
    draw, files = random.Random(2), sorted(tmp_path.rglob("*.npy"))
    whole = {path: path.read_bytes() for path in files}
    expected, names = data[0], [path.name.split("-")[0] for path in files]
    assert names == ["affine16", "mask16", "volume16", "xrays64"]
    for trial in range(50):
        path = files[trial % 4]
        content, stamp = bytearray(whole[path]), path.stat().st_mtime_ns
        if trial < 10:
            del content[len(content) * trial // 10 :]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        os.utime(path, ns=(stamp, stamp))  # a disk that forgets does not change the time
        cache._verified.clear()  # as in a new process
        with pytest.warns(UserWarning, match=re.escape(f"{path}: damaged")):
            found = data[0]
        assert all(torch.equal(found[key], expected[key]) for key in ("ct_volume", "mask", "affine", "xrays"))
        assert path.read_bytes() == whole[path]


def test_a_cache_file_is_verified_once_per_process(root, tmp_path, monkeypatch):
    data = PatientDataset(root, "val", 16, 64, cache_dir=tmp_path)
    data.build_cache()
    calls, original = [], cache._checksum_holds
    monkeypatch.setattr(cache, "_checksum_holds", lambda *a: calls.append(a) or original(*a))
    for _ in range(3):
        data[0]
    assert len(calls) == 4


def train_with_a_data_worker(config, task, model, output):
    trainer = Trainer(model, task, config, output, Processes())
    trainer.feed.workers = 1
    with contextlib.closing(trainer):
        trainer.train_epoch(SignalCatcher())


def test_a_data_worker_that_raises_names_patient_and_file(tmp_path):
    broken = make_dataset(tmp_path / "data")
    config, task, model = build(broken)
    shutil.rmtree(broken / ".cache" / "p1")
    truncate(broken / "p1" / "p1.nii.gz", 5)
    (tmp_path / "run").mkdir()
    expected = r"^epoch 1, step \d: patient p1: .*p1\.nii\.gz"
    with pytest.raises(TrainingError, match=expected) as error:
        train_with_a_data_worker(config, task, model, tmp_path / "run")
    assert "Traceback" not in str(error.value)
    with pytest.raises(InputError, match=r"^patient p1: .*p1\.nii\.gz"):  # and a new start is refused at once
        build(broken)


def test_an_unforeseen_error_of_a_reader_names_patient_and_file(root, tmp_path, monkeypatch):
    data = PatientDataset(root, "val", 16, None, cache_dir=tmp_path)
    monkeypatch.setattr(dataset, "read_cube", lambda *_: {}["affine"])
    with pytest.raises(InputError, match=r"patient p3: .*p3\.nii\.gz.*p3_mask\.nii\.gz.*KeyError: 'affine'"):
        data[0]


class DiesInWorker(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        die()


def test_a_data_worker_that_is_killed_is_one_sentence(tmp_path):
    config, task, model = toy(tmp_path)
    task.train_data = DiesInWorker()
    with pytest.raises(TrainingError, match=r"epoch 1, step 1: a data worker ended.*data\.num_workers=0"):
        train_with_a_data_worker(config, task, model, tmp_path)


# -- processes -------------------------------------------------------------------------------------
def rank_child(rank, port, *args):
    distributed_environment(rank, port)
    child(*args)


def distributed_environment(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


@pytest.mark.parametrize(("number", "fault"), [(signal.SIGKILL, ""), (signal.SIGSTOP, "stop_answering")])
def test_when_one_of_two_ranks_is_gone_the_other_ends_with_an_error(tmp_path, number, fault):
    """Killed: at once. Silent: after the process group's time limit (here 6 s)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = ("world_size=2",)
    output = tmp_path / "run"
    ranks = []
    for rank in range(2):
        place = {"target": rank_child, "extra": (rank, port)}
        ranks.append(Run(output, ("report", 0, fault), overrides, **place))
    survivor, victim = ranks
    for _ in range(2):  # the state after the first step is on disk
        victim.wait_for_step()
    os.kill(victim.process.pid, number)
    assert survivor.end() == 2, survivor.text()
    victim.process.kill()
    kept = load_checkpoint(output / "last.pt")
    assert kept["training_state"]["updates"] >= 1
    assert json.loads((output / "run.json").read_text())["runs"][0]["outcome"].startswith("TrainingError: epoch")


def deaf_or_dead(_):
    with process_group():
        if os.environ["RANK"] == "1":
            die()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that waits inside a GPU library for ever
        time.sleep(10 * SECONDS)


def test_the_launcher_ends_a_process_that_waits_for_a_dead_one(monkeypatch):
    forked = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(distributed.mp, "spawn", forked)
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 1.0)
    began = time.monotonic()
    assert spawn(deaf_or_dead, 2, None) == 128 + signal.SIGKILL
    assert time.monotonic() - began < SECONDS


def test_torchrun_and_the_launcher_end_when_a_rank_dies(tmp_path, monkeypatch, capfd):
    """The job that launch_4gpu.sh starts on several GPUs, here on two CPU processes."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, signal, sys\nsys.path[:0] = [{str(ROOT)!r}]\n"
        "from tests.helpers import toy_task\nfrom xray2ct.training import trainer\n"
        "step = trainer.Trainer.step\n"
        "def dying(self, iterator):\n"
        "    if self.updates == 2 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, iterator)\n"
        "trainer.Trainer.step = dying\n"
        "from xray2ct.files import run_cli\n"
        "run_cli(toy_task.main)\n"
    )
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    words = toy_task.words(tmp_path / "run", "world_size=2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert launch.run_child([*torchrun, str(script), *words]) == 1
    printed = capfd.readouterr()
    assert "SIGKILL" in printed.err
    assert find_state(tmp_path / "run")[1]["step"] == 2
