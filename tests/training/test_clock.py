"""The limit of a run in minutes: schedule, end, resume, several processes; estimates; what a run says at its end."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex

import pytest
import torch

from tests.helpers import toy_task
from tests.helpers.faults import Run
from tests.training.test_signals import in_two_workers
from xray2ct import progress
from xray2ct.checkpoints import load_checkpoint
from xray2ct.training.clock import RunClock, is_finished, minutes_limit
from xray2ct.training.distributed import Processes
from xray2ct.training.plan import learning_rate_at
from xray2ct.training.reporting import command_of, epoch_line, slow_warning
from xray2ct.training.run_identity import restoring_command
from xray2ct.training.signals import Interrupted, SignalCatcher
from xray2ct.training.trainer import Trainer

STEPS_OF_AN_EPOCH = 6
SECONDS_OF_A_STEP, SECONDS_OF_A_VALIDATION = 4.0, 10.0


# -- schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "share", "expected"),
    [
        (0, 0.0, 1e-4),  # a tenth of the warm-up
        (0, 0.025, 5e-4),  # half of the time that the warm-up may take
        (0, 0.05, 1e-3),
        (60, 0.5, 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 50 / 90)))),  # the steps are further
        (20, 0.525, 1e-3 * (0.1 + 0.9 * 0.5)),  # the time is: half of the 95 % after the warm-up
        (20, 1.0, 1e-4),
        (0, 3.0, 1e-4),
    ],
)
def test_warm_up_and_cosine_are_as_far_as_steps_or_time(step, share, expected):
    assert learning_rate_at(step, 100, 10, 1e-3, 0.1, share) == pytest.approx(expected)


def test_without_a_limit_the_learning_rate_is_bit_for_bit_that_of_the_steps():
    for step in range(101):
        exact = 3e-4 * (step + 1) / 7
        if step >= 7:
            exact = 3e-4 * (0.01 + (1.0 - 0.01) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - 7) / 93))))
        assert learning_rate_at(step, 100, 7, 3e-4, 0.01) == exact


# -- clock -----------------------------------------------------------------------------------------


class Time:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_time_for_the_last_validation_is_kept_back():
    now = Time()
    clock = RunClock(10, now)
    now.now += 300
    assert clock.own_share == 0.5
    clock.validation = 100.0
    assert clock.own_share == 0.6  # 300 of the 500 seconds before it
    clock.validation = 1e6  # longer than the limit: half of it is trained in any case
    assert clock.own_share == 1.0


def test_a_validation_that_would_take_the_last_steps_time_is_left_to_the_end():
    now = Time()
    clock = RunClock(10, now)
    clock.validation = 100.0  # 500 seconds are for steps: one that began after 400 would end with them
    for seconds, comes in ((399, False), (401, True), (499, True), (501, False)):  # after 500 it is the last one
        now.now = 1000.0 + seconds
        clock.agree(clock.own_share)
        assert clock.last_validation_comes == comes
    assert not RunClock(None, now).last_validation_comes


def test_earlier_starts_count_and_another_limit_is_noted():
    now = Time()
    first = RunClock(10, now)
    now.now += 120
    first.validation = 5.0
    for minutes, limit, note in ((None, 10, None), (10, 10, None), (20, 20, "20 minutes now, before to 10 minutes")):
        clock = RunClock(minutes, now)
        said = clock.load(first.state())
        assert (clock.seconds, clock.minutes, clock.validation) == (120, limit, 5.0)
        assert said == note or note in said
    lifted = RunClock(0, now)
    assert "to its epochs now, before to 10 minutes" in lifted.load(first.state())
    assert (lifted.own_share, lifted.state()) == (0.0, None)


def test_a_run_without_a_limit_keeps_no_time():
    assert RunClock().state() is None
    assert RunClock().load(None) is None
    assert not is_finished({"epoch": 3}, 3)
    assert is_finished({"epoch": 4}, 3)
    assert is_finished({"epoch": 2, "clock": {"stopped": True}}, 3)


def test_the_pace_of_this_start_tells_what_is_left():
    now = Time()
    clock = RunClock(None, now)
    now.now += 500  # preparations
    clock.start(100)
    now.now += 30
    assert clock.second_step(101) is None
    now.now += 10
    assert clock.second_step(102) == 10.0
    now.now += 10
    assert clock.second_step(103) is None
    assert clock.left(105, 205) == 1000.0  # 50 seconds for five steps
    clock.minutes = 10.0
    assert clock.left(105, 205) == 50.0  # of 600 seconds 550 have passed


@pytest.mark.parametrize(("text", "minutes"), [("90", 90.0), ("0.5", 0.5), ("0", 0.0)])
def test_minutes_are_numbers(text, minutes):
    assert minutes_limit(text) == minutes


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1h", ""])
def test_other_limits_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected minutes above 0, or 0 for no limit"):
        minutes_limit(text)


# -- runs ------------------------------------------------------------------------------------------


class Timed(toy_task.ToyTask):
    """Each step and each validation takes a known time."""

    def __init__(self, config, processes, now: Time):
        super().__init__(config, processes)
        self.now, self.rates = now, []

    def loss(self, model, batch):
        if model.training:
            self.now.now += SECONDS_OF_A_STEP
        return super().loss(model, batch)

    def validate(self, model, processes, precision):
        self.now.now += SECONDS_OF_A_VALIDATION
        return super().validate(model, processes, precision)


def timed_trainer(output, minutes, now, *overrides):
    settings = ("training.num_epochs=100", "logging.log_interval=100", "logging.checkpoint_minutes=100", *overrides)
    _, config = toy_task.parse(toy_task.words(output, *settings))
    output.mkdir(exist_ok=True)
    task = Timed(config, Processes(), now)
    trainer = Trainer(task.build_model(), task, config, output, Processes(), clock=RunClock(minutes, now))
    trainer.optimizer.register_step_pre_hook(lambda opt, *_: task.rates.append(opt.param_groups[0]["lr"]))
    return trainer


def train(trainer) -> None:
    """What ``fit`` does with a trainer."""
    trainer.resume()
    trainer.clock.start(trainer.updates)
    with SignalCatcher() as catcher:
        while not trainer.finished:
            trainer.finish_epoch(trainer.train_epoch(catcher))
            trainer._act_on(trainer.collect(catcher))
    trainer.close()


def test_a_run_ends_in_time_with_its_cosine_finished_and_its_last_epoch_validated(tmp_path):
    now = Time()
    trainer = timed_trainer(tmp_path, 2.0, now)  # 120 seconds; validations after epochs 2, 4, ...
    train(trainer)
    assert 120 - SECONDS_OF_A_STEP - SECONDS_OF_A_VALIDATION <= now.now - 1000 <= 120 + SECONDS_OF_A_STEP
    rates = trainer.task.rates
    assert len(rates) == trainer.updates < 100 * STEPS_OF_AN_EPOCH
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[peak] == pytest.approx(2e-3, rel=0.05)
    assert rates[-1] < 0.02 * 2e-3  # it ends at 0.01 of the peak
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events[-2:]] == ["epoch", "validation"]
    last = events[-1]["epoch"]
    assert last == trainer.epoch - 1 < 100
    saved = load_checkpoint(tmp_path / "last.pt")["training_state"]
    assert saved["clock"]["stopped"]
    assert (saved["epoch"], saved["step_in_epoch"]) == (last + 1, 0)
    # Losses of an epoch that ended early are means over its steps.
    short = trainer.updates - (last - 1) * STEPS_OF_AN_EPOCH
    assert 1 <= short <= STEPS_OF_AN_EPOCH
    full = [e["mse"] for e in events if e["event"] == "epoch"]
    assert full[-1] == pytest.approx(full[-2], rel=0.5)


def test_a_resumed_run_ends_by_the_time_of_all_its_starts(tmp_path):
    now = Time()
    trainer = timed_trainer(tmp_path, 5.0, now)

    class Stop(SignalCatcher):
        """A signal after 100 seconds."""

        @property
        def received(self):
            return 15 if now.now >= 1100 else None

        @received.setter
        def received(self, _):
            pass

    def until_the_signal():
        while True:
            trainer.finish_epoch(trainer.train_epoch(Stop()))

    with pytest.raises(Interrupted):
        until_the_signal()
    trainer.close()
    now.now += 5000  # the machine was somebody else's
    began, steps = now.now, trainer.updates
    again = timed_trainer(tmp_path, None, now)
    train(again)
    assert now.now - began == pytest.approx(200, abs=SECONDS_OF_A_STEP + SECONDS_OF_A_VALIDATION)
    assert again.updates > steps
    assert again.task.rates[0] == pytest.approx(trainer.task.rates[-1], rel=0.1)
    assert again.task.rates[-1] < 0.02 * 2e-3
    done = timed_trainer(tmp_path, None, now)
    done.resume()
    assert done.finished


def test_a_run_that_its_epochs_end_before_the_limit_is_finished_as_ever(tmp_path):
    plain, limited = (
        timed_trainer(tmp_path / name, minutes, Time(), "training.num_epochs=2")
        for name, minutes in (("plain", None), ("limited", 1000.0))
    )
    for trainer in (plain, limited):
        train(trainer)
    assert plain.task.rates == limited.task.rates
    one, other = (trainer.model.state_dict() for trainer in (plain, limited))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert limited.finished
    assert not limited.clock.stopped
    assert "clock" not in load_checkpoint(tmp_path / "plain" / "last.pt")["training_state"]


def test_the_command_says_how_it_ended_and_has_nothing_to_do_again(tmp_path, capsys):
    words = [*toy_task.words(tmp_path, "training.num_epochs=100000"), "--max-minutes", "0.01"]
    assert toy_task.main(words) == 0
    text = capsys.readouterr().out
    assert "Stopped after 0.01 minutes: epoch " in text
    assert f"dB: {tmp_path / 'best_model.pt'}" in text
    before = (tmp_path / "last.pt").read_bytes()
    assert toy_task.main(words) == 0
    assert f"Nothing to do: {tmp_path / 'last.pt'} ended after 0.01 minutes in epoch " in capsys.readouterr().out
    assert (tmp_path / "last.pt").read_bytes() == before


def limited(words, console, fault, pipe):
    in_two_workers([*words, "--max-minutes", "0.02"], console, fault, pipe)


@pytest.mark.skipif(os.name == "nt", reason="processes are forked")
def test_two_processes_end_together(tmp_path):
    run = Run(tmp_path / "run", ("none",), ("world_size=2", "training.num_epochs=100000"), target=limited)
    assert run.end() == 0, run.text()
    assert "Stopped after 0.02 minutes" in run.text()
    assert load_checkpoint(tmp_path / "run" / "last.pt")["training_state"]["clock"]["stopped"]


def test_processes_agree_on_the_mean_of_their_clocks(tmp_path):
    class Two(Processes):
        """This process, and one whose clock is a quarter of the limit ahead."""

        def mean(self, tensor):
            ahead = torch.zeros_like(tensor)
            ahead[2] = 0.125  # after the two signals
            return tensor + ahead

    now = Time()
    trainer = timed_trainer(tmp_path, 1.0, now)
    trainer.processes = Two()
    now.now += 30
    trainer.collect(SignalCatcher())
    assert trainer.clock.share == pytest.approx(0.625)


# -- what is said ----------------------------------------------------------------------------------


def test_quiet_runs_print_one_line_an_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_quiet", False)  # and back to it
    assert toy_task.main([*toy_task.words(tmp_path, "training.num_epochs=2"), "--quiet"]) == 0
    out, error = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("Epoch")]
    assert [line.split(":")[0] for line in lines] == ["Epoch 1/2", "Epoch 2/2"]
    assert "Loss" not in out
    assert "steps" not in error


def test_an_epochs_line_holds_scores_and_the_time_left():
    line = epoch_line(3, 46, {"psnr": 24.104}, 25.31, 4320.0)
    assert line == "Epoch 3/46: PSNR 24.10 dB, best 25.31 dB, 1 h 12 min left"
    assert epoch_line(46, 46, None, None, 0.0) == "Epoch 46/46: done"


def test_days_on_a_cpu_are_warned_of():
    # 200 epochs of 576 steps at 9 s: 1,036,800 s, 12 days
    warning = slow_warning(9.0, 200 * 576 * 9.0, 200, "--max-minutes N ends it")
    assert warning == "warning: at 9 s a step these 200 epochs take 12 days on this CPU; --max-minutes N ends it"
    assert slow_warning(0.5, 3600.0, 200, "") is None


def test_a_long_run_on_a_cpu_warns_once_after_its_second_step(tmp_path, capsys):
    now = Time()
    trainer = timed_trainer(tmp_path, None, now, "training.num_epochs=3000")  # 18,000 steps of 4 seconds: 20 hours
    trainer.clock.start(0)
    trainer.train_epoch(SignalCatcher())
    text = capsys.readouterr().out
    assert text.count("warning: at 4 s a step these 3000 epochs take 20 h") == 1
    assert "--max-minutes N" in text


def test_the_command_that_goes_on_with_a_run_is_printed():
    old = {"model": {"size": [8, 8]}, "training": {"seed": 0, "compile": "blocks"}, "base_checkpoint": "a.pt"}
    new = {"model": {"size": [4, 4]}, "training": {"seed": 1, "compile": False}, "base_checkpoint": "b.pt"}
    argv = ["train.py", "--data", "my data", "--base", "b.pt"]
    words = shlex.split(restoring_command(old, new, argv))
    assert words[:5] == ["python", *argv[:3], "--base"]
    args = argparse.ArgumentParser()
    args.add_argument("script")
    for option in ("--data", "--base"):
        args.add_argument(option)
    args.add_argument("--set", action="append")
    parsed = args.parse_args(words[1:])
    assert (parsed.data, parsed.base) == ("my data", "a.pt")
    assert parsed.set == ["model.size=[8, 8]", "training.compile=blocks", "training.seed=0"]
    assert restoring_command(old, {**new, "training": {"seed": 1}}, argv) is None  # compile is not known any more
    assert restoring_command({"earlier_stages": {}}, {"earlier_stages": {}}, argv) is None


def test_commands_can_be_copied():
    text = command_of("evaluate.py", data="my data", cache_dir="x")
    script = shlex.split(text)[1]
    assert os.path.samefile(script, command_of.__globals__["ROOT"] / "evaluate.py")
    assert text.endswith("--data 'my data' --cache-dir x")
