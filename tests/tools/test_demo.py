"""The demo from phantoms to pictures on a tiny network, and what happens when it is run again."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_data import TINY_MODEL, TINY_REFINEMENT
from tools import demo
from xray2ct.files import InputError, read_json
from xray2ct.training.config import EnhancedConfig, RefinementConfig, load_config

TINY = {f"model.{key}": value for key, value in TINY_MODEL.items()}
TINY |= {"model.volume_size": [32, 32, 32], "training.num_epochs": 1, "data.repeats": 2, "training.batch_size": 2}
TINY_STAGE_2 = {f"model.{key}": value for key, value in TINY_REFINEMENT.items()}
TINY_STAGE_2 |= {"training.num_epochs": 1, "data.repeats": 1, "patch.size": 8, "patch.per_volume": 1}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    options = ["--output", str(output), "--patients", "3", "--workers", "1"]
    for key, value in TINY.items():
        options += ["--set", f"{key}={value}"]
    for key, value in TINY_STAGE_2.items():
        options += ["--set-refinement", f"{key}={json.dumps(value)}"]
    return options


def test_demo_ends_with_scores_a_volume_and_a_picture(options, capsys):
    assert demo.main(options) == 0
    text = capsys.readouterr().out
    output = Path(options[1])
    methods = read_json(output / "results" / "summary.json")["methods"]
    assert methods["refined"]["psnr_strict"]["n"] == 1
    for method in ("refined", "trilinear", "mean_volume"):
        assert f"{methods[method]['psnr_strict']['mean']:.2f} dB" in text
    assert f"{output / 'results' / 'report.html'}: open it in a browser" in text
    assert "phantom_0002" in (output / "results" / "report.html").read_text(encoding="utf-8")
    image = nib.load(output / "reconstruction.nii.gz")
    assert image.shape == (128, 128, 128)
    assert np.allclose(image.affine, np.diag([-2.8125, -2.8125, -2.8125, 1]) + _corner(128))
    picture = np.asarray(Image.open(output / "reconstruction.png"))
    assert min(picture.shape) > 500
    assert picture.std() > 20


def _corner(size):
    """Translation that puts the middle of a cube of 360 mm at the origin."""
    matrix = np.zeros((4, 4))
    matrix[:3, 3] = 360 / size * (size - 1) / 2
    return matrix


def test_running_it_again_skips_what_is_done(options, capsys):
    output = Path(options[1])
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.nii.gz") if p.name != "reconstruction.nii.gz"}
    for folder in ("training", "training_refinement"):
        before[output / folder / "last.pt"] = (output / folder / "last.pt").stat().st_mtime_ns
    assert demo.main(options) == 0
    text = capsys.readouterr().out
    assert text.count("Nothing to do") == 2
    assert "has the scores of these checkpoints already" in text
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_demo_says_how_its_environment_is_activated(tmp_path):
    venv = str(tmp_path / "my venv")
    assert demo.activation(venv, "/usr", None, windows=False) == f"source '{venv}/bin/activate'"
    assert demo.activation(venv, "/usr", str(tmp_path), windows=False).startswith("source")
    assert demo.activation(venv, "/usr", venv) is None  # it is active
    assert demo.activation("/usr", "/usr", None) is None  # there is none
    assert demo.activation(venv, "/usr", None, windows=True).endswith("activate")


def test_a_folder_of_another_demo_is_refused(options):
    with pytest.raises(InputError, match=r"demo\.json.*choose another --output"):
        demo.main([*options, "--seed", "5"])


def test_a_step_that_fails_ends_the_demo_with_its_status():
    steps = {"one": lambda: 0, "two": lambda: 3, "three": lambda: pytest.fail("went on")}
    assert demo.run_steps(steps) == 3


@pytest.mark.parametrize("patients", [3, 4, 24, 100])
def test_split_holds_out_phantoms_for_each_purpose(patients):
    split = demo.split_of(patients)
    ids = [patient for part in ("train", "val", "test") for patient in split[part]]
    assert ids == [f"phantom_{i:04d}" for i in range(patients)]
    assert len(split["train"]) >= len(split["test"]) >= len(split["val"]) >= 1


def test_too_few_phantoms_are_refused(tmp_path):
    with pytest.raises(InputError, match="--patients is 2"):
        demo.main(["--output", str(tmp_path / "out"), "--patients", "2"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "name"), [(EnhancedConfig, "configs/demo.json"), (RefinementConfig, "configs/demo_refinement.json")]
)
def test_configuration_needs_no_download(kind, name):
    config = load_config(kind, Path(demo.__file__).parent.parent / name)
    assert config.loss.perceptual_weight == 0
    assert config.world_size == 1
