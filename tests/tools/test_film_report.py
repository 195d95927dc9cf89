"""The report on films: scores by hand, the control, the files that it writes."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import film_report
from xray2ct.files import InputError, read_json


def test_ncc_by_hand():
    picture = np.array([[0.0, 1.0], [2.0, 5.0]])
    assert film_report.ncc(picture, 3 * picture + 1) == pytest.approx(1)
    assert film_report.ncc(picture, -picture) == pytest.approx(-1)
    # (-1, 1) x 2 against (-1, -1, 1, 1): orthogonal
    assert film_report.ncc([[0, 2], [0, 2]], [[0, 0], [2, 2]]) == 0
    assert film_report.ncc(picture, np.ones((2, 2))) == 0
    ramp = np.arange(9.0).reshape(3, 3) ** 2
    assert film_report.gradient_ncc(ramp, 2 * ramp + 7) == pytest.approx(1)


def test_the_control_is_five_millimetres_lower_and_turned():
    volume = torch.zeros(72, 72, 72)  # voxels of 5 mm
    volume[30:40, 30:42, 30:42] = 1  # a block in the middle
    volume[30:40, 35:37, 50:60] = 1  # an arm towards the left
    moved = film_report.misplaced(volume, 360.0)
    centres = [np.array(np.nonzero(v.numpy() > 0.5)).mean(axis=1) for v in (volume, moved)]
    assert centres[1][0] - centres[0][0] == pytest.approx(1, abs=0.05)
    arms = [np.nonzero(v[34].numpy()[:, 50:60] > 0.5)[0].mean() - 35.5 for v in (volume, moved)]
    # 5 degrees at 19 voxels from the axis: 1.7 voxels.
    assert abs(arms[1] - arms[0]) == pytest.approx(19 * np.tan(np.deg2rad(5)), abs=0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = make_dataset(tmp_path_factory.mktemp("film_report") / "data")
    return root, make_checkpoint(root.parent / "base.pt", root)


def test_a_report_and_a_sheet_are_written(trained, tmp_path, capsys):
    root, base = trained
    films = [str(root / "p4" / f"p4_{view}_drr.png") for view in ("pa", "lat")]
    words = ["--pa", films[0], "--lateral", films[1], "--base", str(base), "--output", str(tmp_path / "out")]
    assert film_report.main([*words, "--device", "cpu"]) == 0
    report = read_json(tmp_path / "out" / "report.json")["p4_pa_drr"]
    assert report["pa"]["picture"]["pixels"] == [64, 64]
    assert set(report["projection"]["lateral"]) == {"ncc", "gradient_ncc", "control_ncc", "control_gradient_ncc"}
    assert report["scale"]["pa_mm"] > 0
    assert set(report["anatomy"]) == {"head-feet", "front-back", "left-right"}
    assert Image.open(tmp_path / "out" / "p4_pa_drr.png").size == (9 * 224, 240)
    assert "gradient NCC" in capsys.readouterr().out


def test_a_folder_goes_on_after_a_pair_that_is_refused(trained, tmp_path, capsys):
    root, base = trained
    films = tmp_path / "films"
    films.mkdir()
    for patient in ("p4", "p5"):
        for view in ("pa", "lat"):
            (films / f"{patient}_{view}.png").write_bytes((root / patient / f"{patient}_{view}_drr.png").read_bytes())
    Image.new("L", (64, 64)).save(films / "p4_pa.png")  # black
    words = ["--folder", str(films), "--base", str(base), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert film_report.main(words) == 1
    reports = read_json(tmp_path / "out" / "report.json")
    assert "one value" in reports["p4"]["error"]
    assert "projection" in reports["p5"]
    with pytest.raises(InputError, match="--folder"):
        film_report.main([*words, "--pa", "x.png"])
