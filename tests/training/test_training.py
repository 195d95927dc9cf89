"""Whole training runs as users start them: killed, interrupted, on two processes, with bad input."""

from __future__ import annotations

import os
import signal

import pytest

import train_enhanced_4gpu
from tests.helpers.runs import (
    LONGER,
    arguments,
    assert_same_weights,
    command,
    events,
    run,
    run_ranks,
    start_and_signal,
    weights,
)
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    done = run(command(root, output, *LONGER))
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_killed_in_the_middle_of_an_epoch_ends_with_the_same_weights_bit_for_bit(root, uninterrupted, tmp_path):
    words = command(root, tmp_path, *LONGER)
    assert start_and_signal(words, tmp_path, 9, signal.SIGKILL) == -signal.SIGKILL
    state = load_checkpoint(tmp_path / "last.pt")["training_state"]
    assert state["updates"] < 18
    again = run(words)
    assert again.returncode == 0, again.stderr
    assert "Resumed" in again.stdout
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_sigterm_finishes_the_step_saves_and_the_same_command_goes_on(root, uninterrupted, tmp_path):
    words = command(root, tmp_path, *LONGER[:2])  # no checkpoint within an epoch but the signal's
    assert start_and_signal(words, tmp_path, 8, signal.SIGTERM) == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "last.pt")["training_state"]["step_in_epoch"] > 0
    again = run(words)
    assert again.returncode == 0, again.stderr
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.skipif(os.name == "nt", reason="forked processes are POSIX")
def test_two_processes_follow_the_same_loss_curve_as_one(root, tmp_path):
    """Same global batch, float32: only the order of summation differs (relative tolerance 1e-4)."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(command(root, one)).returncode == 0
    done = run_ranks(command(root, two))
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "Processes: 2 on cpu" in done[0].stdout
    a, b = events(one, "step"), events(two, "step")
    assert len(a) == len(b) == 4
    for left, right in zip(a, b):
        for name in ("loss", "l1", "ssim", "edge", "multiscale"):
            assert left[name] == pytest.approx(right[name], rel=1e-4), name
    assert events(one, "validation")[-1]["psnr"] == pytest.approx(events(two, "validation")[-1]["psnr"], abs=1e-3)
    a, b = weights(one / "last.pt"), weights(two / "last.pt")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4


def test_dry_run_prints_sizes_and_writes_nothing(root, tmp_path, capsys):
    assert train_enhanced_4gpu.main([*arguments(root, tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "M parameters" in printed
    assert "global batch 2 = 1 x 1 x 2" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--data", "nowhere"], ["nowhere", "prepare_data.py"]),
        (["--set", "training.num_epoch=1"], ["training.num_epoch", "did you mean training.num_epochs"]),
        (["--config", "missing.json"], ["missing.json", "no such file"]),
        (["--set", "model.volume_size=[16,16,32]"], ["model.volume_size", "equal"]),
        (["--set", "model.base_channels=20"], ["model.base_channels", "multiple of 16"]),
        (["--set", "loss.perceptual_weight=0.1", "--set", "loss.perceptual_weights=nowhere.pth"], ["nowhere.pth"]),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(root, tmp_path, changes, words):
    with pytest.raises(InputError) as error:
        train_enhanced_4gpu.main([*arguments(root, tmp_path / "out"), *changes])
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_on_the_console(root, tmp_path):
    done = run([*command(root, tmp_path / "out"), "--set", "trainin.num_epochs=1"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
