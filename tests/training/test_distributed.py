"""Processes started by plain python: they find each other, fail as one, and hear signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT
from xray2ct.files import InputError
from xray2ct.training.distributed import MPI_SIZES, Processes, launch, launched_place, lost_peer, process_group, spawn


def meet(folder):
    with process_group() as processes:
        ranks = processes.gather_objects(processes.rank)
        total = processes.mean(torch.tensor([float(processes.rank)]))
        heard = processes.any(processes.rank == 1)
        Path(folder, str(processes.rank)).write_text(f"{ranks} {total.item()} {heard}")
    return 0


def fail_on_rank_one(_):
    with process_group() as processes:
        if processes.rank == 1:
            raise InputError("rank one does not like its input")
        processes.barrier()  # would wait for ever if nobody ended it
    return 0


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_processes_meet_and_agree(tmp_path, on_cpu):
    assert spawn(meet, 2, str(tmp_path)) == 0
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"0": "[0, 1] 0.5 True", "1": "[0, 1] 0.5 True"}


def test_one_failing_process_ends_all_with_its_status(on_cpu, capfd):
    assert spawn(fail_on_rank_one, 2, None) != 0
    assert "error: rank one does not like its input" in capfd.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_signals_reach_the_workers(tmp_path):
    code = f"""
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from xray2ct.training.distributed import spawn

def worker(folder):
    import os
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
    Path(folder, os.environ["RANK"]).touch()
    time.sleep(60)
    return 0

if __name__ == "__main__":
    sys.exit(spawn(worker, 2, {str(tmp_path)!r}))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    deadline = time.monotonic() + 120
    while not all((tmp_path / name).exists() for name in "01") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 77


def test_a_single_process_needs_no_group():
    alone = Processes()
    assert alone.is_main
    assert alone.gather_objects("x") == ["x"]
    assert alone.any(True)
    assert not alone.any(False)
    assert torch.equal(alone.mean(torch.ones(2)), torch.ones(2))


def test_errors_of_a_lost_process_are_told_from_others():
    two = Processes(0, 2)
    lost = [
        "[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer",
        "NCCL watchdog",
        "Timed out waiting",
    ]
    assert all(lost_peer(RuntimeError(text), two) for text in lost)
    assert lost_peer(torch.distributed.DistBackendError("anything"), two)
    assert not lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), two)
    assert not lost_peer(RuntimeError(lost[0]), Processes())


# -- the launcher's environment --------------------------------------------------------------------

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
SECOND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
STEP = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these variables of launchers."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *MPI_SIZES)

    def change(**values):
        for name in (*names, *(name for name in os.environ if name.startswith("SLURM_"))):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, None),
        ({"RANK": "", "WORLD_SIZE": " "}, None),
        (ALONE, (0, 1, 0)),
        (SECOND, (1, 2, 1)),
        ({**SECOND, **STEP, "SLURM_STEP_ID": "0"}, (1, 2, 1)),  # torchrun under srun
        (STEP, None),  # a batch script runs once, whatever its allocation has
        ({**STEP, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun -n 1 in such an allocation
        ({"SLURM_NTASKS": "2"}, None),  # salloc's shell
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_a_launcher_s_environment_is_read_whole(environment, values, place):
    environment(**values)
    assert launched_place() == place


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "torchrun"]),
        ({"WORLD_SIZE": "1"}, ["WORLD_SIZE=1 without RANK, LOCAL_RANK;", "unset them"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0 without RANK, WORLD_SIZE"]),
        ({**SECOND, "LOCAL_RANK": ""}, ["without LOCAL_RANK;"]),
        ({**SECOND, "MASTER_PORT": ""}, ["without MASTER_PORT;"]),
        ({**SECOND, "RANK": "2"}, ["RANK=2, but WORLD_SIZE=2"]),
        ({**SECOND, "LOCAL_RANK": "7"}, ["LOCAL_RANK=7, but WORLD_SIZE=2"]),
        ({**SECOND, "RANK": "-1"}, ["RANK=-1; expected a whole number"]),
        ({**SECOND, "WORLD_SIZE": "two"}, ["WORLD_SIZE=two; expected a whole number"]),
        ({**SECOND, "MASTER_PORT": "99999"}, ["MASTER_PORT=99999; expected a whole number"]),
        ({**STEP, "SLURM_STEP_ID": "0"}, ["SLURM_NTASKS=2", "docs/clusters.md"]),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2"}, ["SLURM_STEP_NUM_TASKS=2", "torchrun"]),
        ({**STEP, "SLURM_PROCID": "1"}, ["SLURM_NTASKS=2", "a whole run of its own"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE=4", "4 processes"]),
    ],
)
def test_an_incomplete_or_contradictory_environment_is_one_sentence(environment, values, words):
    environment(**values)
    for start in (process_group().__enter__, lambda: launch(meet, 2)):  # nothing is started
        with pytest.raises(InputError) as error:
            start()
        assert all(word in str(error.value) for word in words)
