"""SIGTERM and SIGINT to one process or to its whole group: the state is saved, whoever else passes the signal on."""

import contextlib
import functools
import os
import signal
import sys
import time

import pytest
import torch

from tests.helpers.faults import REPORT, SECONDS, Run, around, child
from tests.helpers.paths import ROOT
from tools import launch
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import run_cli
from xray2ct.training import distributed, signals
from xray2ct.training.distributed import spawn
from xray2ct.training.feed import Feed
from xray2ct.training.signals import SignalCatcher, exit_status, passed_on

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and process groups are POSIX")
LONG_STEPS = ("report", 1)  # two seconds: all copies of a signal come within one
TWO = ("world_size=2", "logging.checkpoint_minutes=60")  # no state within an epoch but the signal's


# -- what counts as one ----------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """The catcher's time, set by the test."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def earlier(monkeypatch):
    """Handlers that note what reaches them, in place of those before the catcher."""
    seen = []
    old = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in signals.STOPPING}
    yield seen
    for number, handler in old.items():
        signal.signal(number, handler)


def test_copies_of_a_signal_are_one_request_and_a_later_one_stops_at_once(clock, earlier):
    with SignalCatcher() as catcher, contextlib.suppress(KeyboardInterrupt):
        for seconds in (0.0, 0.1, 4.9):  # also of another kind: torchrun passes SIGTERM on
            clock[0] = 100.0 + seconds
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert catcher.received == signal.SIGINT
        clock[0] = 105.1
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second request did not stop it")
    assert earlier == []


def test_copies_that_come_after_the_block_are_ignored_and_later_ones_are_not(clock, earlier):
    with SignalCatcher():
        signal.raise_signal(signal.SIGTERM)
    clock[0] = 101.0
    signal.raise_signal(signal.SIGTERM)
    assert earlier == []
    clock[0] = 106.0
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert earlier == [signal.SIGTERM, signal.SIGINT]


def test_what_another_process_has_received_counts_as_received_here(clock, earlier):
    with SignalCatcher() as catcher:
        catcher.receive(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # its own, a moment later
    assert catcher.received == signal.SIGTERM


def test_without_a_signal_the_earlier_handlers_hold_again(earlier):
    with SignalCatcher() as catcher:
        pass
    signal.raise_signal(signal.SIGINT)
    assert catcher.received is None
    assert earlier == [signal.SIGINT]


def test_a_parent_passes_every_signal_on(earlier):
    sent = []
    with passed_on(sent.append) as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert sent == received == [signal.SIGINT, signal.SIGTERM]
    assert earlier == []


def test_on_windows_the_console_gives_ctrl_c_to_every_process(earlier, monkeypatch):
    monkeypatch.setattr(signals, "PASSED_ON", (signal.SIGTERM,))
    sent = []
    with passed_on(sent.append) as received:
        signal.raise_signal(signal.SIGINT)
    assert (sent, received) == ([], [signal.SIGINT])


@pytest.mark.parametrize(
    ("status", "received", "expected"),
    [(0, [15], 0), (2, [15], 2), (1, [15], 143), (-15, [2], 130), (77, [15], 77), (7, [], 7), (-9, [], 137)],
)
def test_the_status_after_a_signal(status, received, expected):
    assert exit_status(status, received) == expected


# -- whole runs ------------------------------------------------------------------------------------


def in_two_workers(words, console, fault, pipe):
    """Plain python on a machine with two GPUs, here on the CPU: a process and two workers, in a group of their own."""
    os.setsid()
    distributed.mp.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    if "impatient" in fault:
        signals.REPEAT_SECONDS = 0.3
    run_worker = functools.partial(child, console=console, fault=fault[:2], pipe=pipe)
    run_cli(lambda: spawn(run_worker, 2, words))


def start(output, fault):
    return Run(output, fault, TWO, target=in_two_workers)


def to_group(run, number):
    os.killpg(run.process.pid, number)


def to_parent(run, number):
    os.kill(run.process.pid, number)


def test_a_signal_to_the_group_or_the_parent_leaves_the_state_and_the_same_command_goes_on(tmp_path):
    output, steps = tmp_path / "run", 0
    plan = [(to_group, signal.SIGINT, LONG_STEPS), (to_group, signal.SIGTERM, REPORT)]
    for send, number, fault in (*plan, (to_parent, signal.SIGINT, LONG_STEPS)):
        run = start(output, fault)
        run.wait_for_step()
        send(run, number)
        assert run.end() == 128 + number, run.text()
        assert f"{signal.Signals(number).name}: saved" in run.text()
        assert "Traceback" not in run.text()
        state = load_checkpoint(output / "last.pt")["training_state"]
        assert state["updates"] > steps
        steps = state["updates"]
    last = start(output, ("none",))
    assert last.end() == 0, last.text()
    assert load_checkpoint(output / "last.pt")["training_state"]["updates"] == 30


def test_a_second_ctrl_c_some_time_later_stops_at_once(tmp_path):
    run = start(tmp_path / "run", (*LONG_STEPS, "impatient"))
    for _ in range(2):
        run.wait_for_step()
    to_group(run, signal.SIGINT)
    time.sleep(0.6)
    to_group(run, signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT, run.text()
    assert "saved" not in run.text()
    assert not (tmp_path / "run" / "last.pt").exists()


def with_loader_processes(words, console, fault, pipe):
    """One process that trains and two that read for it, as on a GPU, in a group of their own."""
    os.setsid()
    torch.multiprocessing.set_start_method("fork", force=True)  # not the server that this process itself came from

    def reading(initialise, feed, *args):
        initialise(feed, *args)
        feed.workers = 2

    around(Feed, "__init__", reading)
    child(words, console, fault, pipe)


def test_a_signal_to_the_group_reaches_loader_processes_and_the_step_is_finished(tmp_path):
    output = tmp_path / "run"
    overrides = ("training.batch_size=1", "world_size=4", "data.prefetch_factor=1", "logging.checkpoint_minutes=60")
    run = Run(output, LONG_STEPS, overrides, target=with_loader_processes)
    run.wait_for_step()
    to_group(run, signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM, run.text()
    assert "SIGTERM: saved" in run.text()
    assert "Traceback" not in run.text()
    assert load_checkpoint(output / "last.pt")["training_state"]["updates"] > 0
    with pytest.raises(ProcessLookupError):
        os.killpg(run.process.pid, 0)  # nobody is left


def by_the_launcher(words, console, fault, pipe):
    """What launch_4gpu.sh does on several GPUs: launch.py, torchrun and two workers, here on the CPU."""
    os.setsid()
    stream = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    os.chdir(ROOT)
    sys.exit(launch.run_child([*torchrun, "-m", "tests.helpers.toy_task", *words]))


def test_a_signal_to_launcher_and_torchrun_leaves_the_state(tmp_path):
    output = tmp_path / "run"
    run = Run(output, overrides=(*TWO, "training.num_epochs=100000"), target=by_the_launcher)
    log, deadline = output / "log.jsonl", time.monotonic() + SECONDS
    while not (log.exists() and '"step"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    to_group(run, signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT, run.text()
    assert "SIGINT: saved" in run.text()
    assert load_checkpoint(output / "last.pt")["training_state"]["updates"] > 0
