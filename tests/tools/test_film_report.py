"""The report on films: the files that it writes."""

import pytest
from PIL import Image

from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import film_report
from xray2ct.files import InputError, read_json


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
