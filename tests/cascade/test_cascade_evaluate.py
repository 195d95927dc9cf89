"""The cascade in the same tables as the direct system, with the coverage of its standard deviation."""

import csv
import json
import re

import pytest
import torch

import evaluate
from dataset import PatientDataset
from hybrid_vit_cascade.cascade import Cascade
from hybrid_vit_cascade.system import CascadeSystem
from tests.helpers.tiny_cascade import make_cascade
from tools import calibrate
from xray2ct.evaluation.spectrum import compare_spectra
from xray2ct.evaluation.statistics import coverage
from xray2ct.files import InputError, read_json, write_json
from xray2ct.geometry.projector import unit_to_hu
from xray2ct.imaging.body import body_mask
from xray2ct.metrics import psnr


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    return make_cascade(tmp_path_factory.mktemp("cascade"), root)


def run(root, folder, output, *more):
    options = ["--data", root, "--cascade", folder, "--output", output, "--device", "cpu", "--pictures", "1", *more]
    return evaluate.main([str(word) for word in options])


def test_posterior_mean_sample_and_mean_of_samples_are_compared_with_the_baseline(root, folder, tmp_path, capsys):
    assert run(root, folder, tmp_path, "--steps", "2", "--samples", "3") == 0
    with open(tmp_path / "per_patient.csv", newline="") as stream:
        rows = {(r["method"], r["id"]): r for r in csv.DictReader(stream)}
    methods = ("cascade_mean", "cascade_mean_of_3", "cascade_sample", "trilinear", "mean_volume")
    assert set(rows) == {(m, i) for m in methods for i in ("p4", "p5")}
    item, cascade = PatientDataset(root, "test", 32, 32)[0], Cascade.load(folder)
    for method, predict in CascadeSystem(cascade, 3, 2).methods().items():
        score = psnr(predict(item), item["ct_volume"][0])
        assert float(rows[method, "p4"]["psnr_strict"]) == pytest.approx(score, abs=1e-3), method
    first_stage = cascade.posterior_mean(item["xrays"][None], stages=1)
    upsampled = torch.nn.functional.interpolate(first_stage, size=(32, 32, 32), mode="trilinear")[0, 0]
    trilinear = float(rows["trilinear", "p4"]["psnr_strict"])
    assert trilinear == pytest.approx(psnr(upsampled, item["ct_volume"][0]), abs=1e-3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    gains = [
        float(rows["cascade_mean", i]["psnr_strict"]) - float(rows["trilinear", i]["psnr_strict"]) for i in ("p4", "p5")
    ]
    found = summary["minus_trilinear"]["cascade_mean"]["psnr_strict"]["mean"]
    assert found == pytest.approx(sum(gains) / 2, abs=1e-3)
    assert summary["stages"] == ["low", "high"]
    assert summary["volume_size"] == [32, 32, 32]
    assert summary["coverage"]["expected"]["coverage_1sd"] == pytest.approx(0.5, abs=0.1)
    shares = []
    for item in PatientDataset(root, "test", 32, 32):
        mean_of = CascadeSystem(cascade, 3, 2).methods()["cascade_mean_of_3"]
        volume, target = mean_of(item), item["ct_volume"][0]
        body = torch.from_numpy(body_mask(unit_to_hu(target, cascade.hu_window).numpy(), 360 / 32))
        shares.append(coverage(volume, mean_of.std, target, body & (item["mask"][0] > 0))["coverage_2sd"])
    assert summary["coverage"]["coverage_2sd"]["mean"] == pytest.approx(sum(shares) / 2, abs=1e-6)
    printed = capsys.readouterr().out
    assert "for a perfect model" in printed
    check_sharpness(printed, summary, rows, item, cascade)
    assert (tmp_path / "pictures" / "p4.png").exists()


def check_sharpness(printed, summary, rows, item, cascade):
    """The table has each way's sharpness and PSNR, and what the one costs of the other, of the same volumes."""
    ways = ("cascade_mean", "cascade_mean_of_3", "cascade_sample")
    for column in ("psnr_strict", "fine_power_db"):
        line = next(line for line in printed.splitlines() if line[15:].startswith(column))
        cells = re.findall(r"(\S+) \+- \S+", line)
        assert cells[:3] == [f"{summary['methods'][way][column]['mean']:.2f}" for way in ways]
    draw = CascadeSystem(cascade, 3, 2).methods()["cascade_sample"](item)
    assert float(rows["cascade_sample", "p5"]["fine_power_db"]) == pytest.approx(
        compare_spectra(draw, item["ct_volume"][0])["fine_power_db"], abs=1e-3
    )
    for way in ways[1:]:
        costs = {
            column: sum(float(rows[way, i][column]) - float(rows["cascade_mean", i][column]) for i in ("p4", "p5")) / 2
            for column in ("psnr_strict", "fine_power_db")
        }
        line = next(line for line in printed.splitlines() if line.startswith(f"  {way} "))
        found = {
            column: float(value) for column, value in re.findall(r"(psnr_strict|fine_power_db) ([+-][\d.]+)", line)
        }
        assert found == pytest.approx(costs, abs=0.006)


def test_coverage_of_calibrated_standard_deviations(root, tmp_path, capsys):
    """Calibrated on two patients and scored on them: of all their voxels 68.27 and 95.45 % are covered."""
    folder, options = make_cascade(tmp_path / "cascade", root, stages=1), ("--steps", "2", "--samples", "3")
    calibration = [*options, "--cascade", str(folder), "--data", str(root), "--splits", "test", "--check", "val"]
    for consistency, method in (("off", "cascade_mean_of_3"), ("2", "cascade_mean_of_3_consistent")):
        assert calibrate.main([*calibration, "--consistency", consistency]) == 0
        found = read_json(folder / "std_calibration.json")
        assert found["patients"] == ["p4", "p5"]
        assert found["sampling"] == {"steps": 2, "data_consistency": 0}
        assert found["checked"]["rows"][0]["id"] == "p3"
        capsys.readouterr()
        run(root, folder, tmp_path / "scored", *options, "--consistency", consistency)
        printed = capsys.readouterr().out
        assert "note: the standard deviation was calibrated on p4, p5: its coverage says nothing" in printed
        result = json.loads((tmp_path / "scored" / "summary.json").read_text())["coverage"]
        assert result["method"] == method
        assert result["calibration"] == {"factor": found["factor"], "factor95": found["factor95"]}
        rows = found["coverage"]["summary"]
        for key, name in (
            ("coverage_1sd", "samples_within_1sd"),
            ("calibrated_1sd", "within_1sd"),
            ("calibrated_2sd", "within_twice_the_sd"),
            ("calibrated_factor95", "within_2sd"),
        ):
            assert result[key]["mean"] == pytest.approx(rows[name]["mean"], abs=1e-3)
        assert result["calibrated_1sd"]["mean"] == pytest.approx(0.6827, abs=0.01)
        assert result["calibrated_factor95"]["mean"] == pytest.approx(0.9545, abs=0.01)
        assert f"calibrated_1sd      {result['calibrated_1sd']['mean']:.3f}; the standard deviation times" in printed
    assert "calibrated_1sd" not in result["others"]["cascade_mean_of_3"]  # whose errors it was not fitted on
    run(root, folder, tmp_path / "scored", "--steps", "3", "--samples", "3")
    assert "is not calibrated: " in capsys.readouterr().out
    assert "calibrated_1sd" not in json.loads((tmp_path / "scored" / "summary.json").read_text())["coverage"]
    write_json(folder / "std_calibration.json", {**found, "weights": {"low": "other"}})
    with pytest.raises(InputError, match="is of other weights of stage low"):
        run(root, folder, tmp_path / "scored", *options)


def test_one_step_alone_needs_no_samples(root, folder, tmp_path):
    assert run(root, folder, tmp_path, "--max-stages", "1") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["methods"]) == {"cascade_mean", "mean_volume"}
    assert summary["volume_size"] == [16, 16, 16]
    assert "coverage" not in summary


def test_patients_it_was_trained_on_are_refused(root, tmp_path):
    seen = make_cascade(tmp_path / "seen", root, changes={0: {"train_patients": ["p4"]}})
    with pytest.raises(InputError, match="was trained on p4"):
        run(root, seen, tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        ["--base", "b.pt", "--cascade", "c"],
        ["--cascade", "c", "--refinement", "r.pt"],
        ["--cascade", "c", "--samples", "-1"],
        ["--cascade", "c", "--steps", "0"],
    ],
)
def test_options_that_do_not_go_together(options, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate.parse_args(["--data", "d", "--output", "o", *options])
    assert error.value.code == 2
    assert capsys.readouterr().err
