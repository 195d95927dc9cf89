"""The learning curve: nested subsets, equal steps, the slope that was put in."""

import json
import math

import pytest

from dataset import PatientDataset, chosen_patients
from tests.helpers.runs import TINY
from tests.helpers.tiny_data import make_dataset
from tools import learning_curve
from xray2ct.files import InputError


def test_subsets_of_a_seed_are_nested_and_others_differ():
    ids = [f"p{i:02}" for i in range(40)]
    subsets = [chosen_patients(ids, count, 5) for count in (8, 17, 32)]
    assert [len(subset) for subset in subsets] == [8, 17, 32]
    assert set(subsets[0]) < set(subsets[1]) < set(subsets[2])
    assert subsets[1] == sorted(subsets[1])
    assert chosen_patients(ids, 8, 6) != subsets[0] != ids[:8]
    assert chosen_patients(ids, 8, None) == ids[:8]
    assert chosen_patients(ids, None, 5) == chosen_patients(ids, None, None) == ids


def test_equal_steps_or_a_refusal():
    assert learning_curve.equal_repeats([8, 17, 32], 8) == [32, 15, 8]
    with pytest.raises(InputError, match="--patients 17: 2 repeats are 34 samples an epoch, 32 patients have 32"):
        learning_curve.equal_repeats([17, 32], 1)


def entry(name, patients, offset):
    rows = [
        {
            "id": f"t{k}",
            "psnr_strict": 20 + k + (0.5 + 0.1 * k) * math.log2(patients) + offset,
            "psnr_pm1024": 18 + k + 0.5 * math.log2(patients),
            "ssim_3d": 0.6 + 0.02 * math.log2(patients),
            "projection_relative": 0.1,
        }
        for k in range(3)
    ]
    patients = [f"p{i:02}" for i in range(patients)]
    measured = {"command": "c", "date": "2026-01-01", "machine": "m"}
    return {"run": name, "patients": patients, "steps": 100, "rows": rows, "measured": measured}


def test_the_slope_per_doubling_is_found():
    result = learning_curve.summary_of([entry("a", 8, 0), entry("b", 17, 0), entry("c", 32, 0)])
    slope = result["slope_per_doubling"]
    assert slope["psnr_strict"]["mean"] == pytest.approx(0.6)  # of 0.5, 0.6, 0.7
    assert slope["psnr_strict"]["sd"] == pytest.approx(0.1)
    assert slope["ssim_3d"]["mean"] == pytest.approx(0.02)
    assert slope["projection_relative"]["mean"] == pytest.approx(0, abs=1e-12)
    assert result["notes"] == []
    text = learning_curve.table(result)
    assert "| per doubling |  | +0.60 (+0.35 to +0.85) | +0.50 (+0.50 to +0.50) |" in text  # 0.1 t(2, 0.975) / sqrt(3)
    assert "- b: `c`; 2026-01-01, m, no commit recorded" in text
    others = entry("c", 32, 0) | {"patients": [f"q{i}" for i in range(32)], "steps": 200}
    notes = learning_curve.not_nested([entry("b", 17, 0), others])
    assert notes == ["the patients of b are not all among those of c", "best checkpoints after 100 to 200 steps"]
    with pytest.raises(InputError, match="at least two numbers"):
        learning_curve.slopes([entry("a", 8, 0), entry("b", 8, 1)])


def test_a_curve_is_trained_evaluated_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    root = make_dataset(tmp_path / "data", cube_size=32)  # 3 to train
    options = [word for text in (*TINY, "training.num_epochs=1", "data.repeats=2") for word in ("--set", text)]
    output = tmp_path / "curve"
    common = ["--data", str(root), "--output", str(output)]
    assert learning_curve.main([*common, "--patients", "1", "3", *options, "--set", "world_size=1"]) == 0
    result = json.loads((output / "learning_curve.json").read_text())
    small, large = result["runs"]
    assert (small["run"], large["run"], len(small["patients"]), len(large["patients"])) == ("p1_s0", "p3_s0", 1, 3)
    assert small["steps"] == large["steps"] == 6
    assert small["patients"] == PatientDataset(root, "train", 16, None, max_patients=1, subset_seed=0).ids
    gain = large["summary"]["psnr_strict"]["mean"] - small["summary"]["psnr_strict"]["mean"]
    assert result["slope_per_doubling"]["psnr_strict"]["mean"] == pytest.approx(gain / math.log2(3))
    assert (output / "learning_curve.png").stat().st_size > 10_000
    runs = ["--evaluate-only", str(output / "p3_s0"), str(output / "p1_s0")]
    assert learning_curve.main(["--data", str(root), "--output", str(tmp_path / "again"), *runs]) == 0
    again = json.loads((tmp_path / "again/learning_curve.json").read_text())
    assert [run["run"] for run in again["runs"]] == ["p1_s0", "p3_s0"]
    assert again["slope_per_doubling"] == result["slope_per_doubling"]
    with pytest.raises(InputError, match=r"--patients 9: .* has 3 patients to train on"):
        learning_curve.main([*common, "--patients", "9", *options])
