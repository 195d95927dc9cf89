"""Calibrated standard deviation: coverage on voxels it was not fitted on, and reconstruct.py --std."""

import json

import nibabel
import numpy as np
import pytest
import torch

import reconstruct
from dataset import PatientDataset
from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import calibrate
from xray2ct.evaluation.protocols import scanned_body
from xray2ct.files import InputError, read_json, write_json
from xray2ct.geometry.projector import unit_to_hu
from xray2ct.inference.consistency import STEPS, how_of
from xray2ct.inference.reconstruction import Pipeline
from xray2ct.inference.system import DirectSystem
from xray2ct.inference.uncertainty import Calibration, calibration_path, fit, local_contrast, read_calibration
from xray2ct.weights import find


def test_contrast_is_the_standard_deviation_of_27_voxels():
    hu = np.random.default_rng(0).normal(0, 300, (6, 7, 8))
    found = local_contrast(hu)
    assert found[3, 4, 5] == pytest.approx(hu[2:5, 3:6, 4:7].std(), rel=1e-5)
    corner = np.pad(hu, 1, mode="edge")[0:3, 0:3, 0:3]
    assert found[0, 0, 0] == pytest.approx(corner.std(), rel=1e-5)


def errors_of(seed, count=200_000):
    """Errors whose spread is 20 HU + a tenth of the contrast, three times as wide in bone: Gaussian."""
    random = np.random.default_rng(seed)
    hu, contrast = random.uniform(-1000, 1000, count), random.uniform(0, 500, count)
    sigma = (20 + contrast / 10) * np.where(hu > 200, 3, 1)
    return hu, contrast, random.normal(0, sigma), sigma


def test_other_gaussian_errors_are_covered_as_they_should():
    calibration = fit(*errors_of(0)[:3], weights=["w"])
    hu, contrast, error, sigma = errors_of(1)
    std = calibration.look_up(hu, contrast)
    shares = calibrate.coverage_of(np.abs(error) / std, calibration.factor95)
    assert shares["within_1sd"] == pytest.approx(0.6827, abs=0.005)
    assert shares["within_2sd"] == pytest.approx(0.9545, abs=0.005)
    assert calibration.factor95 == pytest.approx(2.0, abs=0.06)  # little more: cells of a table mix widths
    ratio = std / sigma
    pure = (hu < 100) | (hu > 300)  # away from the range whose cells hold bone and what is not
    assert np.quantile(ratio[pure], [0.02, 0.98]) == pytest.approx([1.0, 1.0], abs=0.15)


def test_heavy_tails_need_more_than_two():
    random = np.random.default_rng(2)
    hu, contrast = random.uniform(-1000, 1000, (2, 200_000))
    calibration = fit(hu, contrast, random.laplace(0, 50, 200_000), ["w"])
    # a Laplace distribution of scale b holds 1 - exp(-x / b): x(0.9545) / x(0.6827) = 3.09 / 1.148
    assert calibration.factor95 == pytest.approx(np.log(1 - 0.9545) / np.log(1 - 0.6827), abs=0.05)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncertainty")
    root = make_dataset(folder / "data", patients=9, cube_size=32)
    return root, make_checkpoint(folder / "base.pt", root)


def test_calibrate_and_reconstruct(trained, tmp_path, capsys):
    root, base = trained
    pair = [
        word for k, view in (("pa", "pa"), ("lateral", "lat")) for word in (f"--{k}", f"{root}/p8/p8_{view}_drr.png")
    ]
    outputs = ["--output", str(tmp_path / "ct.nii.gz"), "--std", str(tmp_path / "std.nii.gz")]
    options = [*pair, "--base", str(base), *outputs]
    with pytest.raises(InputError, match=r"base\.std\.json: no calibration beside the weights"):
        reconstruct.main(options)
    assert not (tmp_path / "ct.nii.gz").exists()
    with pytest.raises(InputError, match="--splits val: 1 patients"):
        calibrate.main(["--base", str(base), "--data", str(root)])
    # p0 to p4 were trained on, p5 is the split val
    assert calibrate.main(["--base", str(base), "--data", str(root), "--splits", "test", "--check", "val"]) == 0
    found = read_json(calibration_path(base))
    assert found["patients"] == ["p6", "p7", "p8"]
    assert [row["id"] for row in found["checked"]["rows"]] == ["p5"]
    capsys.readouterr()
    assert reconstruct.main(options) == 0
    printed, notes = capsys.readouterr()
    assert "films and scouts" not in notes  # renderings, as the table's
    std, ct = (np.asarray(nibabel.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("std", "ct"))
    assert std.shape == ct.shape == (16, 16, 16)
    assert f"std.nii.gz: standard deviation, {std.mean():.1f} HU on average" in printed
    with pytest.raises(InputError, match=r"is of plain predictions, .*; expected --consistency off, or run tools"):
        reconstruct.main([*options[:-3], str(tmp_path / "other.nii.gz"), *options[-2:], "--consistency", "3"])
    assert not (tmp_path / "other.nii.gz").exists()
    assert reconstruct.main([*options, "--xray-normalization", "percentile"]) == 0
    assert "std.nii.gz does not hold what films and scouts add" in capsys.readouterr().err
    assert set(np.unique(std)) <= set(np.float32(np.asarray(found["std_hu"])).ravel())


def test_the_shipped_table_is_of_the_volumes_that_are_written_by_default():
    record = read_json(find("chest64").with_suffix(".json"))
    assert read_calibration("chest64", [record["fingerprint"]], how_of(STEPS)).factor95 > 2


def test_the_table_is_of_volumes_with_the_consistency_asked_for(trained, tmp_path):
    root, base = trained
    options = ["--base", str(base), "--data", str(root), "--splits", "test", "--consistency"]
    paths = {steps: tmp_path / f"{steps}.json" for steps in ("off", "auto", "3")}
    for steps, path in paths.items():
        calibrate.main([*options, steps, "--output", str(path)])
    found = {steps: read_json(path) for steps, path in paths.items()}
    assert found["off"]["consistency"] is found["auto"]["consistency"] is None  # 16^3: not validated
    assert found["3"]["consistency"] == how_of(3)
    assert found["off"]["std_hu"] == found["auto"]["std_hu"] != found["3"]["std_hu"]
    data = PatientDataset(root, "test", 16, 64)
    pipeline, errors = Pipeline(DirectSystem(base), 3), []
    for item in data:
        body = scanned_body(item["ct_volume"][0], item["mask"][0], data.hu_window, 360.0)
        volume = unit_to_hu(pipeline.predict(item["xrays"]), data.hu_window)
        std = Calibration(**{key: found["3"][key] for key in Calibration.__dataclass_fields__}).std(volume.numpy())
        errors.append(
            ((volume - unit_to_hu(item["ct_volume"][0], data.hu_window)).abs() <= torch.from_numpy(std))[body]
        )
    assert torch.cat(errors).double().mean() == pytest.approx(0.6827, abs=0.001)


def test_wrong_calibrations_and_options_are_refused(trained, tmp_path):
    _, base = trained
    path = tmp_path / "base.pt"
    good = Calibration([0.0], [10.0], [[1.0, 2.0], [3.0, 4.0]], 2.5, ["abc"]).to_dict()

    def refused(message, **changes):
        write_json(calibration_path(path), {**good, **changes})
        with pytest.raises(InputError, match=message):
            read_calibration(path, ["abc"])

    write_json(calibration_path(path), good)
    read = read_calibration(path, ["abc"])
    assert read.std(np.array([[[-50, 50]]])).tolist() == [[[2.0, 4.0]]]  # contrast 47 HU
    refused("is of the weights other, these are abc", weights=["other"])
    refused("is not what tools/calibrate.py writes", std_hu=[[1.0, 2.0]])
    refused("is not what tools/calibrate.py writes", format=2)
    refused("is not what tools/calibrate.py writes", consistency="auto")
    refused(r"is of volumes with projection consistency \(steps 4, weight 0.12, .*not of plain", consistency=how_of(4))
    write_json(calibration_path(path), {**good, "consistency": {**how_of(4), "weight": 0.5}})
    with pytest.raises(InputError, match=r"body_spread_hu 140.0\); run tools/calibrate\.py --consistency 4 for these"):
        read_calibration(path, ["abc"], how_of(4))
    write_json(calibration_path(path), {key: value for key, value in good.items() if key != "consistency"})
    assert read_calibration(path, ["abc"]).consistency is None  # as files before there was a choice
    with pytest.raises(InputError, match=r"is of plain predictions, not of volumes with.*expected --consistency off"):
        read_calibration(path, ["abc"], how_of(4))
    calibration_path(path).write_text(json.dumps([1]))
    with pytest.raises(InputError, match="is not what"):
        read_calibration(path, ["abc"])
    common = ["--base", str(base), "--output", str(tmp_path / "ct.nii.gz"), "--pa", "a.png", "--lateral", "b.png"]
    with pytest.raises(InputError, match="is --output too"):
        reconstruct.main([*common, "--std", str(tmp_path / "ct.nii.gz")])
    with pytest.raises(InputError, match="--std is for one pair"):
        reconstruct.main(["--base", str(base), "--folder", str(tmp_path), "--output", str(tmp_path), "--std", "s.nii"])
