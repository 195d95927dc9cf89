"""The cascade in the same tables as the direct system, with the coverage of its standard deviation."""

import csv
import json

import pytest
import torch

import evaluate
from dataset import PatientDataset
from hybrid_vit_cascade.cascade import Cascade
from hybrid_vit_cascade.system import CascadeSystem
from tests.helpers.tiny_cascade import make_cascade
from xray2ct.evaluation.statistics import coverage
from xray2ct.files import InputError
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
    assert "for a perfect model" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "p4.png").exists()


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
