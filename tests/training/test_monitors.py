"""TensorBoard and W&B: names of the curves, what is really written and read back, and packages that are missing."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch

import train_enhanced_4gpu
from tests.helpers.runs import TINY
from tests.helpers.tiny_data import make_dataset
from xray2ct.command_line import Parser
from xray2ct.files import InputError, read_json
from xray2ct.training.distributed import Processes
from xray2ct.training.monitors import Monitors, add_arguments, check_arguments, curves, monitors_from


def parse(*words, tensorboard=False):
    parser = Parser()
    add_arguments(parser, tensorboard)
    return parser.parse_args(words)


@pytest.fixture
def without(monkeypatch):
    """Makes a package impossible to import, as if it were not installed."""

    def hide(package):
        for name in list(sys.modules):
            if name.split(".")[0] == package or name.startswith("torch.utils.tensorboard"):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return hide


SAMPLE = {
    "id": "p3",
    "xrays": torch.rand(2, 32, 32),
    "prediction": torch.rand(16, 16, 16),
    "target": torch.rand(16, 16, 16),
    "hu_window": (-1024.0, 1476.0),
}


# -- curves --------------------------------------------------------------------------------------


def test_curves_have_the_promised_names():
    losses = {"epoch": 1, "diffusion": 0.5, "physics": 0.2, "loss": 0.7}
    epoch = curves("epoch", {**losses, "samples_per_second": 3.0, "learning_rate": 1e-4, "gpu_memory_gib": 1.5})
    assert epoch == {
        "Loss": 0.7,
        "Diffusion Loss": 0.5,
        "Physics Loss": 0.2,
        "Samples per Second": 3.0,
        "Learning Rate": 1e-4,
        "GPU Memory (GiB)": 1.5,
    }
    assert curves("step", {**losses, "step": 7, "step_in_epoch": 2}) == {
        "Loss (step)": 0.7,
        "Diffusion Loss (step)": 0.5,
        "Physics Loss (step)": 0.2,
    }
    validation = curves("validation", {"loss": 0.6, "psnr": 24.0, "physics": 0.1, "ssim_3d": 0.7, "patients": 2})
    assert validation == {"Val Loss": 0.6, "PSNR": 24.0, "Val Physics Loss": 0.1, "SSIM": 0.7}
    assert curves("interrupted", losses) == {}


def test_no_writer_costs_nothing_and_other_ranks_write_nothing(tmp_path):
    with Monitors() as monitors:
        monitors.start(3)
        monitors.log("epoch", 3, {"loss": 1.0})
        monitors.pictures([{"id": "a picture that would fail"}], 3)
    args = parse("--tensorboard", "--wandb")
    pytest.importorskip("wandb")
    assert monitors_from(args, {}, tmp_path, Processes(rank=1, world_size=2)).writers == []
    assert list(tmp_path.iterdir()) == []


# -- TensorBoard ---------------------------------------------------------------------------------


def read_events(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def points(events, name):
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def test_tensorboard_files_hold_curves_and_pictures(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with monitors_from(parse("--tensorboard"), {}, tmp_path, Processes()) as monitors:
        stage = monitors.stage("stage1", tmp_path / "stage1")
        stage.start(0)
        stage.log("epoch", 4, {"epoch": 1, "diffusion": 0.5, "learning_rate": 1e-4})
        stage.log("validation", 4, {"epoch": 1, "loss": 0.25, "psnr": 20.0})
        stage.log("epoch", 8, {"epoch": 2, "diffusion": 0.4, "learning_rate": 1e-4})
        stage.pictures([SAMPLE], 8)
        stage.close()
    events = read_events(tmp_path / "stage1" / "tensorboard")
    assert points(events, "Diffusion Loss") == [(4, 0.5), (8, 0.4)]
    assert points(events, "Val Loss") == [(4, 0.25)]
    assert points(events, "PSNR") == [(4, 20.0)]
    assert points(events, "Learning Rate") == [(4, 1e-4), (8, 1e-4)]
    (picture,) = events.Images("Sample p3")
    assert picture.step == 8
    assert picture.width > 500


def test_a_resumed_run_drops_the_points_that_it_draws_again(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    args = parse("--tensorboard")
    for start, steps, value in ((0, (2, 4, 6), 1.0), (4, (6, 8), 2.0)):
        with monitors_from(args, {}, tmp_path, Processes()) as monitors:
            monitors.start(start)
            for step in steps:
                monitors.log("epoch", step, {"loss": value})
    events = read_events(tmp_path / "tensorboard")
    assert points(events, "Loss") == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0)]


def test_a_training_run_leaves_event_files(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    root = make_dataset(tmp_path / "data")
    options = [word for text in (*TINY, "training.num_epochs=1") for word in ("--set", text)]
    options += ["--data", str(root), "--output", str(tmp_path / "run"), "--tensorboard"]
    assert train_enhanced_4gpu.main(options) == 0
    events = read_events(tmp_path / "run" / "tensorboard")
    assert {"Loss", "Loss (step)", "Val Loss", "PSNR", "Learning Rate", "Samples per Second"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["Sample p3"]


# -- W&B -----------------------------------------------------------------------------------------


def wandb_bytes(folder, wanted):
    """What W&B's files hold; its service may still be writing for a while after the run has ended."""
    deadline, found = time.monotonic() + 60, b""
    while not all(words in found for words in wanted) and time.monotonic() < deadline:
        found = b"".join(path.read_bytes() for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")))
        time.sleep(0.1)
    return found


def test_wandb_offline_keeps_curves_pictures_and_settings_and_a_resumed_run_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = parse("--wandb", "--wandb-project", "my-xray2ct")
    for step in (4, 8):
        with monitors_from(args, {"num_views": 2}, tmp_path, Processes()) as monitors:
            stage = monitors.stage("stage1_low", tmp_path / "stage1_low")
            stage.start(0)
            stage.log("epoch", step, {"epoch": 1, "diffusion": 0.5})
            stage.pictures([SAMPLE], step)
            stage.close()
    wanted = (b"my-xray2ct", b"num_views", b"stage1_low/Diffusion Loss", b"stage1_low/Step")
    found = wandb_bytes(tmp_path, wanted)
    for words in wanted:
        assert words in found
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/stage1_low/*.png"))) == 2
    state = read_json(tmp_path / "wandb.json")
    assert state["project"] == "my-xray2ct"
    assert {path.name.split("-")[-1] for path in tmp_path.glob("wandb/offline-run-*")} == {state["id"]}


def test_wandb_that_cannot_start_advises_what_to_do(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")

    def init(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(InputError, match=r"No API key configured.*wandb login.*WANDB_MODE=offline"):
        monitors_from(parse("--wandb"), {}, tmp_path, Processes())


# -- missing packages, options -------------------------------------------------------------------


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_its_installation_before_training(tmp_path, without, package):
    without(package)
    with pytest.raises(InputError, match=rf"--{package} needs the package {package}.*pip install {package}$"):
        train_enhanced_4gpu.main(["--data", str(tmp_path), "--output", str(tmp_path / "run"), f"--{package}"])
    assert not (tmp_path / "run").exists()


def test_tensorboard_by_itself_is_written_where_it_is_installed(tmp_path, without):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert len(monitors_from(parse(tensorboard=None), {}, tmp_path, Processes()).writers) == 1
    assert monitors_from(parse("--no-tensorboard", tensorboard=None), {}, tmp_path, Processes()).writers == []
    without("tensorboard")
    assert monitors_from(parse(tensorboard=None), {}, tmp_path, Processes()).writers == []


def test_a_project_without_wandb_is_a_mistake():
    with pytest.raises(InputError, match="--wandb-project mine is given without --wandb"):
        check_arguments(parse("--wandb-project", "mine"))


def test_the_picture_is_the_panel_of_the_sample():
    class Keeper:
        def picture(self, name, image, step):
            self.kept = name, image, step

    keeper = Keeper()
    Monitors([keeper]).pictures([SAMPLE], 5)
    name, image, step = keeper.kept
    assert name == "Sample p3"
    assert step == 5
    assert image.dtype == np.uint8
    assert image.ndim == 2
    assert image.std() > 10
