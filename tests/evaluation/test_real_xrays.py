"""Scores of scouts and films: by hand where they can be, and never a voxel for films."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch

import evaluate
from tests.helpers.tiny_data import make_checkpoint, make_dataset
from xray2ct.evaluation.protocols import COLUMNS, Case
from xray2ct.evaluation.real_xrays import RESIDUAL_COLUMNS, VOLUME_COLUMNS, lung_volume, lungs, residual
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, hu_to_unit, render_xrays

SIZE, FOV = 48, 360.0


def chest(radius=55.0, lowest=0.0):
    """HU of a soft-tissue trunk with two spherical lungs of ``radius`` and a small bubble of bowel gas."""
    axis = ((np.arange(SIZE) + 0.5) / SIZE - 0.5) * FOV
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    hu = np.where((y / 100) ** 2 + (x / 150) ** 2 < 1, 40.0, -1000.0) + 0 * z
    for side in (-65, 65):
        hu[(z - lowest) ** 2 + y**2 + (x - side) ** 2 < radius**2] = -800.0
    hu[(z - 130) ** 2 + y**2 + x**2 < 25**2] = -900.0
    return hu.astype(np.float32)


def case(prediction, target=None, mask=None, xrays=None, geometry=None):
    unit = [torch.from_numpy(hu_to_unit(hu)) for hu in (prediction, prediction if target is None else target)]
    return Case(*unit, mask=mask, xrays=xrays, geometry=geometry or Geometry())


def test_lungs_are_the_air_in_the_body_without_bowel():
    found = lungs(chest(), FOV)
    volume = found.sum() * (FOV / SIZE) ** 3
    assert volume == pytest.approx(2 * 4 / 3 * math.pi * 55**3, rel=0.03)
    assert not found[:, :, SIZE // 2].any()  # the bubble
    assert not lungs(np.full((SIZE,) * 3, -1000.0, np.float32), FOV).any()


def test_lung_volumes_are_compared_unless_the_scan_cuts_the_lungs():
    scores = lung_volume(case(chest(60.0), chest(50.0)))
    by_hand = [2 * 4 / 3 * math.pi * radius**3 / 1e6 for radius in (60.0, 50.0)]
    assert scores["lung_litres"] == pytest.approx(by_hand[0], rel=0.03)
    assert scores["lung_litres_ct"] == pytest.approx(by_hand[1], rel=0.03)
    assert scores["lung_litres_error"] == pytest.approx(scores["lung_litres"] - scores["lung_litres_ct"])
    less = lung_volume(case(chest(50.0), chest(60.0)))
    assert less["lung_litres_error"] == pytest.approx(-scores["lung_litres_error"])
    assert less["lung_litres_absolute_error"] == pytest.approx(scores["lung_litres_error"])
    mask = torch.ones(SIZE, SIZE, SIZE)
    mask[: SIZE // 2] = 0  # the scan begins in the middle of the lungs
    cut = lung_volume(case(chest(60.0), chest(50.0), mask))
    assert cut["lung_litres"] == scores["lung_litres"]
    assert [cut[name] for name in list(VOLUME_COLUMNS)[1:]] == [None] * 3


@pytest.mark.parametrize("kind", ["cone", "scout"])
def test_the_right_volume_fits_its_xrays_and_the_control_does_not(kind):
    geometry, hu = Geometry(kind), chest(lowest=-20.0)
    xrays = render_xrays(torch.from_numpy(hu_to_unit(hu))[None, None], geometry, (96, 96))[0]
    scores = residual(case(hu, xrays=xrays, geometry=geometry))
    assert list(scores) == list(RESIDUAL_COLUMNS)
    for view in ("pa", "lateral"):
        assert scores[f"{view}_ncc"] == pytest.approx(1)
        assert scores[f"{view}_control_ncc"] < 0.998
        assert scores[f"{view}_gradient_ncc"] == pytest.approx(1)
        assert scores[f"{view}_control_gradient_ncc"] < 0.95


def test_scouts_count_at_the_heights_that_the_scan_covers():
    hu, mask = chest(), torch.ones(SIZE, SIZE, SIZE)
    mask[: SIZE // 4] = 0
    scores = {}
    for kind in ("scout", "cone"):
        geometry = Geometry(kind)
        xrays = render_xrays(torch.from_numpy(hu_to_unit(hu))[None, None], geometry, (96, 96))[0].clone()
        xrays[:, :24] = 0.5  # what the scout shows there the CT has not seen
        scores[kind] = residual(case(hu, mask=mask, xrays=xrays, geometry=geometry))["pa_ncc"]
    assert scores["scout"] == pytest.approx(1)
    assert scores["cone"] < 0.9


# ------------------------------------------------------------------------------------------------
# The command


def with_real(root, kind, patients):
    """Copies of the rendered X-rays, which carry the mark of the project's scale, as real ones of ``kind``."""
    for patient in patients:
        for view in ("pa", "lat"):
            source = root / patient / f"{patient}_{view}_drr.png"
            shutil.copy(source, root / patient / f"{patient}_{view}_{kind}.png")
    return root


def run(root, base, output, *more):
    words = ["--data", str(root), "--base", str(base), "--output", str(output), "--device", "cpu", "--pictures", "1"]
    assert evaluate.main([*words, *more]) == 0
    with open(output / "per_patient.csv", newline="") as stream:
        return list(csv.DictReader(stream)), json.loads((output / "summary.json").read_text())


@pytest.fixture(scope="module")
def scouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    root = with_real(make_dataset(folder / "data", geometry=Geometry("scout")), "scout", ["p5"])
    return root, make_checkpoint(folder / "base.pt", root)


def test_scouts_have_voxel_scores_and_residuals(scouts, tmp_path, capsys):
    rendered, _ = run(*scouts, tmp_path / "drr")
    rows, summary = run(
        *scouts, tmp_path / "out", "--xrays", "scout", "--compare", str(tmp_path / "drr" / "per_patient.csv")
    )
    assert list(rows[0]) == ["method", "id", *COLUMNS, *RESIDUAL_COLUMNS, "seconds"]
    assert list(rendered[0]) == ["method", "id", *COLUMNS, "seconds"]
    assert [row["id"] for row in rendered] == ["p4", "p4", "p5", "p5"]
    assert [row["id"] for row in rows] == ["p5", "p5"]
    for row, other in zip(rows, rendered[2:]):  # here scouts and rendered X-rays are the same pictures
        assert {key: row[key] for key in COLUMNS} == {key: other[key] for key in COLUMNS}
    assert summary["xrays"] == "scout"
    assert list(summary["protocols"]) == [*COLUMNS, *RESIDUAL_COLUMNS]
    assert summary["minus_drr"]["model"]["psnr_strict"]["mean"] == pytest.approx(0, abs=1e-4)
    text = capsys.readouterr().out
    assert "lateral_control_ncc" in text
    assert "was scored with xrays drr, this with scout: not the same task" in text


def test_films_have_no_voxel_scores(tmp_path, capsys):
    root = with_real(make_dataset(tmp_path / "data"), "film", ["p5"])
    base = make_checkpoint(tmp_path / "base.pt", root)
    rows, summary = run(root, base, tmp_path / "out", "--xrays", "film")
    assert list(rows[0]) == ["method", "id", *RESIDUAL_COLUMNS, *VOLUME_COLUMNS, "seconds"]
    assert [row["id"] for row in rows] == ["p5", "p5"]
    assert summary["protocol_columns"] == {"residual": list(RESIDUAL_COLUMNS), "lung_volume": list(VOLUME_COLUMNS)}
    assert not {"psnr_strict", "mae_hu"} & summary["methods"]["model"].keys()
    assert (tmp_path / "out" / "pictures" / "p5.png").exists()
    text = capsys.readouterr().out
    assert "1 patients have no film of both views: p4" in text
    assert "lung_litres_ct" in text
    assert "psnr" not in text
    run(root, base, tmp_path / "drr")
    rendered = str(tmp_path / "drr" / "per_patient.csv")
    with pytest.raises(InputError, match=r"not a per_patient\.csv of evaluate\.py --xrays film"):
        run(root, base, tmp_path / "again", "--xrays", "film", "--compare", rendered)


def test_a_report_compares_voxels_and_is_refused_for_films(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--data", "d", "--base", "b", "--output", "o", "--xrays", "film", "--report"])
    assert "--report compares voxels" in capsys.readouterr().err
