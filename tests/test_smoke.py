"""The smoke test script: passes on a sound project and data set, and each kind of damage makes a line fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import test_enhanced
from test_enhanced import Bench, CheckError
from tests.helpers.tiny_data import TINY_MODEL, make_dataset
from xray2ct.geometry.projector import Geometry, line_integrals
from xray2ct.imaging.read_xray import write_png16
from xray2ct.training.config import EnhancedConfig, load_config

# float32: on a CPU, torch 2.13's bfloat16 weight gradient of a 3D convolution over 2 x 2 x 2 cells reads memory
# that was never written; the bottleneck of 16^3 has that size.
TINY = [f"model.{key}={value}" for key, value in TINY_MODEL.items()]
TINY += ["training.precision=float32", "loss.perceptual_weight=0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("smoke") / "data")


def make_bench(data=None, *settings, kind=Bench) -> Bench:
    config = load_config(EnhancedConfig, None, [*TINY, "augment.source_size=64", *settings])
    return kind(config, torch.device("cpu"), Geometry(), data)


def test_a_sound_project_and_data_set_pass(data, capsys):
    options = [part for setting in TINY for part in ("--set", setting)]
    assert test_enhanced.main(["--data", str(data), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17
    assert all(line.startswith("ok   ") for line in lines[:-1])
    assert lines[-1] == "16 of 16 checks ok"
    assert not (data / ".cache").exists()  # looking does not change the data


def test_a_failing_check_is_named_the_others_run_and_the_status_is_1(capsys):
    assert test_enhanced.main([], lambda bench: CHECKS) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in lines[:3]] == ["FAIL one", "FAIL two", "ok   three"]
    assert "too large" in lines[0]
    assert "no memory" in lines[1]
    assert lines[3] == "1 of 3 checks ok"


def _too_large(bench):
    test_enhanced.require(False, "too large")


def _no_memory(bench):
    raise RuntimeError("no memory")


CHECKS = [("one", _too_large), ("two", _no_memory), ("three", lambda bench: "fine")]


@pytest.mark.parametrize("kind", ["cone", "parallel", "scout"])
def test_renderer_check_sees_a_wrong_scale(kind):
    bench = make_bench()
    bench.geometry = Geometry(kind)
    assert kind in test_enhanced.check_renderer(bench)
    with pytest.raises(CheckError, match="chords"):
        test_enhanced.check_renderer(bench, lambda *a: 1.04 * line_integrals(*a))


class Narrow(Bench):
    """A model of other than the configured width, as after a slip in the network."""

    def build_model(self, **changes):
        return super().build_model(base_channels=32, **changes)


def test_parameter_check_counts_the_default_model():
    with pytest.raises(CheckError, match=r"^[4-6]\.\d+ M; expected 15 to 20 M"):
        test_enhanced.check_parameters(Narrow(EnhancedConfig(), torch.device("cpu"), Geometry(), None))


class Frozen(Bench):
    """A model with a parameter that no gradient reaches."""

    def build_model(self, **changes):
        model = super().build_model(**changes)
        model.prior.requires_grad_(False)
        return model


def test_backward_check_sees_a_parameter_without_gradient():
    with pytest.raises(CheckError, match="prior"):
        test_enhanced.check_backward(make_bench(kind=Frozen))


def test_loss_check_sees_a_loss_that_is_not_zero_for_a_perfect_prediction(monkeypatch):
    monkeypatch.setattr("losses.edge_loss", lambda p, t, m=None: (p - t + 1).abs().mean())
    with pytest.raises(CheckError, match="edge of a perfect prediction"):
        test_enhanced.check_losses(make_bench())


def test_learning_check_sees_a_loss_that_does_not_fall():
    with pytest.raises(CheckError, match="expected it to fall"):
        test_enhanced.check_learning(make_bench(None, "training.learning_rate=0"))


def test_data_check_sees_x_rays_of_another_scale(tmp_path):
    root = make_dataset(tmp_path / "data")
    path = root / "p4" / "p4_lat_drr.png"
    write_png16(path, np.asarray(Image.open(path)) / 65535.0 * 0.9)
    with pytest.raises(CheckError, match=r"X-rays differ from rendered ones by \d"):
        test_enhanced.check_split(make_bench(str(root)), "test")
    assert "3 patients checked" in test_enhanced.check_split(make_bench(str(root)), "train")


def test_importing_it_runs_and_collects_nothing():
    assert not [name for name in vars(test_enhanced) if name.lower().startswith("test")]
