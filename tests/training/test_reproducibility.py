"""The same run again gives the same result; every run records what it ran on; wrong convolutions are noticed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_enhanced_4gpu
from model_enhanced import EnhancedDirectModel
from tests.helpers import toy_task
from tests.helpers.convolutions import PLAIN, spoiled
from tests.helpers.hooks import at_forward
from tests.helpers.runs import arguments, assert_same_tensors, build
from tools import environment
from xray2ct.checkpoints import WriteError, load_checkpoint
from xray2ct.files import read_json
from xray2ct.training import provenance, trainer
from xray2ct.training.config import config_hash
from xray2ct.training.convolution_check import (
    Convolution,
    convolution_defect,
    recorded_convolutions,
    reduced_precision_defects,
)
from xray2ct.training.determinism import deterministic
from xray2ct.training.distributed import Processes
from xray2ct.training.provenance import command_line, describe_environment, recorded_run
from xray2ct.training.trainer import fit


def final_weights(root, output, *overrides):
    """Train stage 1 for one epoch of three steps; see :func:`outcome`."""
    config, task, model = build(root, "training.num_epochs=1", "world_size=1", *overrides)
    fit(model, task, config, output, Processes())
    return outcome(output)


def toy_weights(output, *overrides):
    """Train the toy network; see :func:`outcome`."""
    assert toy_task.main(toy_task.words(output, "training.num_epochs=1", *overrides)) == 0
    return outcome(output)


def outcome(output):
    """All weights at the end, the losses on the way, and the log."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    return load_checkpoint(output / "last.pt")["training_state"]["model"], losses, lines


# -- the same again --------------------------------------------------------------------------------
def test_the_same_seed_gives_identical_weights_and_another_one_does_not(root, tmp_path):
    one, first_losses, _ = final_weights(root, tmp_path / "one")
    torch.manual_seed(99)  # what happened before in the process does not matter
    with deterministic():
        other, losses, _ = final_weights(root, tmp_path / "other")
    assert first_losses == losses
    assert_same_tensors(one, other)


def test_another_seed_gives_other_weights(tmp_path):
    runs = [toy_weights(tmp_path / str(i), f"training.seed={seed}") for i, seed in enumerate((0, 0, 1))]
    assert_same_tensors(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] != runs[2][1]


def flags():
    cudnn = torch.backends.cudnn
    switches = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    return (*switches, cudnn.benchmark, cudnn.deterministic, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))


def test_the_switch_is_set_within_and_restored_after(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with contextlib.suppress(KeyError), deterministic():
        assert flags() == (True, True, False, True, ":4096:8")
        raise KeyError
    assert flags() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic():
        assert flags()[-1] == ":16:8"  # the user's own
    assert flags()[-1] == ":16:8"
    with deterministic(False):
        assert flags()[:-1] == before[:-1]


def test_operations_without_a_deterministic_version_are_named_once(capsys):
    with deterministic() as unsafe:
        for _ in range(2):
            torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
        with pytest.warns(UserWarning, match="something else"):
            warnings.warn("something else", stacklevel=1)
    assert unsafe == ["put_"]
    assert capsys.readouterr().out == "note: without a deterministic version: put_; a repeated run may differ\n"


def test_the_scripts_switch_reaches_the_training(root, tmp_path):
    seen = []
    noted = at_forward(EnhancedDirectModel, 1, lambda _: seen.append(flags()) or stop())
    with noted, pytest.raises(ZeroDivisionError):
        train_enhanced_4gpu.main([*arguments(root, tmp_path), "--deterministic"])
    assert seen[0][:2] == (True, True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert read_json(tmp_path / "run.json")["runs"][0]["deterministic"] is True


def stop():
    raise ZeroDivisionError("stopped by the test")


# -- run.json --------------------------------------------------------------------------------------
def test_every_run_is_recorded_with_its_end(root, tmp_path, monkeypatch):
    words = arguments(root, tmp_path, "training.num_epochs=1")
    monkeypatch.setattr("sys.argv", ["train_enhanced_4gpu.py", *words])
    with at_forward(EnhancedDirectModel, 1, lambda _: stop()), pytest.raises(ZeroDivisionError):
        train_enhanced_4gpu.main(words)
    assert train_enhanced_4gpu.main(words) == 0
    data = read_json(tmp_path / "run.json")
    failed, finished = data["runs"]
    assert failed["outcome"] == "ZeroDivisionError: stopped by the test"
    assert finished["outcome"] == "finished"
    assert finished["command"][1:] == ["train_enhanced_4gpu.py", *words]
    assert finished["folder"] == os.getcwd()
    assert finished["began"] <= finished["ended"]
    config = read_json(tmp_path / "config.json")
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert finished["config_hash"] == config_hash(config) == checkpoint["config_hash"]
    assert finished["split_hash"] == checkpoint["split_hash"]
    found = finished["environment"]
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"]
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert len(found["code"]["source_hash"]) == 16


def test_a_killed_run_has_no_outcome_and_other_processes_write_nothing(tmp_path):
    with recorded_run(tmp_path / "other", {}, enabled=False):
        assert not (tmp_path / "other").exists()
    with recorded_run(tmp_path, {"note": 1}):
        entry = read_json(tmp_path / "run.json")["runs"][0]
    assert (entry["outcome"], entry["ended"], entry["note"]) == (None, None, 1)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"format": 7}'])
def test_a_damaged_record_is_set_aside_and_said(tmp_path, capsys, content):
    (tmp_path / "run.json").write_text(content)
    with recorded_run(tmp_path, {}):
        pass
    assert len(read_json(tmp_path / "run.json")["runs"]) == 1
    assert (tmp_path / "run.json.damaged").read_text() == content
    assert "run.json.damaged" in capsys.readouterr().out


def test_a_record_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file.run\.json: could not be written"), recorded_run(tmp_path / "file", {}):
        pass


def test_no_secret_is_recorded(monkeypatch):
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "NCCL_AUTH_TOKEN", "TORCH_PASSWORD", "HOME_MADE"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert "hush" not in json.dumps(describe_environment())
    assert describe_environment()["variables"]["NCCL_DEBUG"] == "INFO"
    words = command_line(
        ["train.py", "--api-key", "hush", "--token=hush", "--set", "a=1", "secret=hush", "--data", "d"]
    )
    assert words[1:] == ["train.py", "--api-key", "***", "--token=***", "--set", "a=1", "secret=***", "--data", "d"]


def test_without_git_or_within_somebody_elses_checkout_the_sources_hash_remains(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "dataset.py").write_text("one")
    hashes = []

    def other_checkout(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout="/home/me\n", stderr="")

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    for run in (other_checkout, no_git):
        monkeypatch.setattr(subprocess, "run", run)
        found = describe_environment()["code"]
        assert (found["commit"], found["dirty"]) == (None, None)
        hashes.append(found["source_hash"])
    (tmp_path / "dataset.py").write_text("another")
    hashes.append(describe_environment()["code"]["source_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_checkout_is_recorded_with_its_commit_and_changes(monkeypatch, tmp_path):
    def git(*words):
        done = subprocess.run(["git", "-C", str(tmp_path), *words], capture_output=True, encoding="utf-8")
        if done.returncode:
            pytest.skip(f"git does not work here: {done.stderr.strip()}")
        return done.stdout.strip()

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "dataset.py").write_text("one")
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "ROOT", tmp_path.resolve())
    code = describe_environment()["code"]
    assert (code["commit"], code["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "dataset.py").write_text("two")
    assert describe_environment()["code"]["dirty"] is True


CASES = [
    PLAIN,
    Convolution((6, 2, 3, 3, 3), (1, 4, 8, 8, 8), (2, 2, 2), (1, 1, 1), (1, 1, 1), 2, True),
    Convolution((4, 4, 3, 3, 3), (1, 4, 12, 8, 8), (1, 1, 1), (2, 2, 2), (2, 2, 2), 1, False),
    Convolution((8, 32, 1, 1, 1), (1, 32, 6, 6, 6), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_convolutions_pass(case, dtype):
    assert convolution_defect(case, dtype, "cpu") is None


@pytest.mark.parametrize("which", ["output", "input gradient", "weight gradient", "not finite"])
def test_a_wrong_convolution_is_named(which):
    defect = convolution_defect(PLAIN, torch.bfloat16, "cpu", functools.partial(spoiled, which))
    assert which in defect
    assert "3x3x3 Conv3d 4 -> 6 channels on 2 x 4 x 8 x 9 x 10" in defect
    assert convolution_defect(PLAIN, torch.bfloat16, "cpu", functools.partial(spoiled, None)) is None


def test_the_convolutions_of_any_network_are_found_with_their_shapes():
    first = nn.Conv3d(2, 3, 3, padding=1)
    second = nn.Conv3d(3, 3, 3, stride=2, bias=False).to(memory_format=torch.channels_last_3d)
    image = nn.Conv2d(1, 1, 3)

    def run():
        image(torch.rand(1, 1, 5, 5))
        for _ in range(2):
            second(first(torch.rand(1, 2, 7, 7, 7)))

    found = recorded_convolutions(run)
    assert [(case.shape, case.stride, case.channels_last) for case in found] == [
        ((1, 2, 7, 7, 7), (1, 1, 1), False),
        ((1, 3, 7, 7, 7), (2, 2, 2), True),
    ]
    second(first(torch.rand(1, 2, 9, 9, 9)))  # the hook is gone
    assert len(found) == 2
    assert reduced_precision_defects(run, torch.bfloat16, "cpu") == []
    assert len(reduced_precision_defects(run, torch.bfloat16, "cpu", functools.partial(spoiled, "output"))) == 2


def test_on_a_cpu_large_volumes_are_cut_and_small_ones_are_not():
    seen = []

    def convolve(x, *args):
        seen.append(tuple(x.shape[2:]))
        return F.conv3d(x, *args)

    def run():
        nn.Conv3d(2, 3, 3)(torch.rand(1, 2, 20, 5, 17))

    assert reduced_precision_defects(run, torch.bfloat16, "cpu", convolve) == []
    assert set(seen) == {(16, 5, 16)}


def test_a_case_too_large_for_the_memory_is_tried_smaller_or_said(capsys):
    def hungry(limit, x, *args):
        if len(x) > limit:
            raise torch.OutOfMemoryError("too large")
        return F.conv3d(x, *args)

    def run():
        nn.Conv3d(2, 3, 3)(torch.rand(2, 2, 7, 7, 7))

    assert reduced_precision_defects(run, torch.bfloat16, "cpu", functools.partial(hungry, 1)) == []
    assert capsys.readouterr().out == ""
    assert reduced_precision_defects(run, torch.bfloat16, "cpu", functools.partial(hungry, 0)) == []
    assert "not enough memory to compare" in capsys.readouterr().out


def test_wrong_convolutions_make_the_run_fall_back_to_float32(tmp_path, monkeypatch, capsys):
    """What comes out is, bit for bit, the run that asked for float32; and it stays so when the run goes on."""
    wanted, _, _ = toy_weights(tmp_path / "float32", "training.precision=float32")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "CHECKED_DEVICES", ())
        plain, _, _ = toy_weights(tmp_path / "plain", "training.precision=bfloat16")
    checked, _, lines = toy_weights(tmp_path / "checked", "training.precision=bfloat16")
    assert_same_tensors(checked, plain)  # the check changes nothing
    assert "precision" not in [line["event"] for line in lines]
    capsys.readouterr()
    faulty = functools.partial(reduced_precision_defects, convolve=functools.partial(spoiled, "weight gradient"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "reduced_precision_defects", faulty)
        patch.setattr(trainer.Trainer, "finish_epoch", lambda self, _: self.save_last() or stop())
        with pytest.raises(ZeroDivisionError):
            toy_weights(tmp_path / "fallen", "training.precision=bfloat16")
    printed = capsys.readouterr().out
    assert printed.count("warning: bfloat16 convolutions are wrong here (weight gradient of a") == 1
    # Goes on after the last step of the epoch, now without a defect.
    fallen, _, lines = toy_weights(tmp_path / "fallen", "training.precision=bfloat16")
    assert_same_tensors(fallen, wanted)
    assert "float32, as before" in capsys.readouterr().out
    entry = next(line for line in lines if line["event"] == "precision")
    assert (entry["fallback"], entry["wanted"]) == ("float32", "bfloat16")
    assert not all(torch.equal(plain[key], wanted[key]) for key in wanted)


def test_the_command_prints_the_environment_and_what_is_wrong(tmp_path, monkeypatch, capsys):
    def networks(_):
        return [("stage 1", lambda: nn.Conv3d(2, 3, 3)(torch.rand(1, 2, 7, 7, 7)))]

    monkeypatch.setattr(environment, "default_networks", networks)
    assert environment.main(["--device", "cpu", "--json", str(tmp_path / "e.json")]) == 0
    assert "stage 1: bfloat16 Conv3d on cpu: right" in capsys.readouterr().out
    assert read_json(tmp_path / "e.json")["environment"]["packages"]["torch"] == torch.__version__
    faulty = functools.partial(reduced_precision_defects, convolve=functools.partial(spoiled, "output"))
    monkeypatch.setattr(environment, "reduced_precision_defects", faulty)
    assert environment.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "stage 1: bfloat16 Conv3d on cpu: WRONG\n  output of a 3x3x3 Conv3d" in printed
    assert "trains in float32 by itself" in printed
