"""Evaluation: numbers equal an independent computation, wrong pairings are refused."""

import csv
import json
import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from tiny_data import make_checkpoint, make_dataset, make_model

import evaluate
from dataset import PatientDataset, mean_volume
from files import InputError, run_cli
from model_enhanced import load_base_model
from projector import Geometry


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("evaluate") / "data")


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base.pt", root)


@pytest.fixture(scope="module")
def results(root, base, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    assert evaluate.main(command(root, base, output, "--pictures", "1")) == 0
    return output


def command(root, base, output, *more):
    return ["--data", str(root), "--base", str(base), "--output", str(output), "--device", "cpu", *more]


def read_rows(output):
    with open(output / "per_patient.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_rows_equal_an_independent_computation(root, base, results):
    rows = {(r["method"], r["id"]): r for r in read_rows(results)}
    assert set(rows) == {(m, i) for m in ("model", "mean_volume") for i in ("p4", "p5")}
    data = PatientDataset(root, "test", 16, 64)
    model, _ = load_base_model(base)
    mean = mean_volume(PatientDataset(root, "train", 16, None))[0].numpy()
    for index in range(2):
        item = data[index]
        target, inside = item["ct_volume"][0].numpy(), item["mask"][0].numpy() > 0
        with torch.no_grad():
            prediction = model(item["xrays"][None])[0][0, 0].numpy()
        for method, volume in (("model", prediction), ("mean_volume", mean)):
            row = rows[method, item["id"]]
            error = volume.astype(np.float64) - target
            assert float(row["psnr_strict"]) == pytest.approx(-10 * np.log10((error**2).mean()), abs=1e-3)
            assert float(row["psnr_strict_masked"]) == pytest.approx(
                -10 * np.log10((error[inside] ** 2).mean()), abs=1e-3
            )
            assert float(row["mae_hu"]) == pytest.approx(2500 * np.abs(error).mean(), rel=1e-4)


def test_the_summary_is_the_mean_of_the_rows(root, results):
    summary, rows = json.loads((results / "summary.json").read_text()), read_rows(results)
    for method in ("model", "mean_volume"):
        values = [float(r["psnr_strict"]) for r in rows if r["method"] == method]
        statistics = summary["methods"][method]["psnr_strict"]
        assert statistics["mean"] == pytest.approx(np.mean(values), rel=1e-4)
        assert statistics["sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-3)
        assert statistics["n"] == 2
        assert statistics["ci95"][0] <= statistics["mean"] <= statistics["ci95"][1]
    differences = [
        float(a["psnr_strict"]) - float(b["psnr_strict"])
        for a in rows
        for b in rows
        if (a["method"], b["method"]) == ("model", "mean_volume") and a["id"] == b["id"]
    ]
    assert summary["minus_mean_volume"]["model"]["psnr_strict"]["mean"] == pytest.approx(np.mean(differences), abs=1e-3)
    assert summary["split_hash"] == PatientDataset(root, "test", 16, None).split_hash
    assert summary["patients"] == ["p4", "p5"]
    assert str(root.parent) not in (results / "summary.json").read_text()  # no path of this machine
    assert [p.name for p in (results / "pictures").iterdir()] == ["p4.png"]


def test_a_perfect_method_beats_the_mean_volume(root):
    data = PatientDataset(root, "all", 16, 64)
    mean = evaluate.mean_predictor(PatientDataset(root, "train", 16, None))
    rows = evaluate.score_patients(data, {"perfect": lambda item: item["ct_volume"][0], "mean_volume": mean})
    summary = evaluate.summary_of(rows)
    assert summary["methods"]["perfect"]["psnr_strict"]["mean"] == 100
    assert summary["minus_mean_volume"]["perfect"]["psnr_strict"]["ci95"][0] > 10
    assert summary["minus_mean_volume"]["perfect"]["mae_hu"]["ci95"][1] < 0


def test_patients_of_the_training_set_are_refused_unless_asked_for(root, base, tmp_path):
    with pytest.raises(InputError, match=r"base\.pt was trained on p0, p1, p2 \(3 of the train split's 3"):
        evaluate.main(command(root, base, tmp_path / "out", "--split", "train"))
    assert not (tmp_path / "out").exists()
    assert evaluate.main(command(root, base, tmp_path / "out", "--split", "train", "--allow-seen")) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"geometry": Geometry(sid_mm=1500.0).to_dict()}, "geometry.*sid_mm 1500.0 against 1600.0"),
        ({"hu_window": [-1000.0, 1000.0]}, "hu_window.*-1000"),
        ({"xray_scale": 5.0}, "xray_scale.*5.0 against 10.0"),
        ({"kind": "refinement"}, "'refinement'.*'enhanced_direct'"),
    ],
)
def test_checkpoints_of_other_data_are_refused(root, tmp_path, changes, words):
    path = make_checkpoint(tmp_path / "other.pt", root, model=make_model(), **changes)
    with pytest.raises(InputError, match=words):
        evaluate.main(command(root, path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_another_split_is_said_with_what_it_means(root, base, tmp_path, capsys):
    arguments = command(root, make_checkpoint(tmp_path / "other.pt", root, split_hash="0" * 64), tmp_path / "out")
    assert evaluate.main([*arguments, "--pictures", "0"]) == 0
    assert (
        "other.pt was trained with another split of its data; of the 2 patients scored here 0"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "out" / "pictures").exists()
    assert evaluate.main(command(root, base, tmp_path / "all", "--split", "all", "--allow-seen")) == 0
    assert "trained on p0, p1, p2 (3 of the all split's 6 patients)" in capsys.readouterr().out
    assert json.loads((tmp_path / "all" / "summary.json").read_text())["seen_in_training"] == ["p0", "p1", "p2"]


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_by_the_command(root, tmp_path, capsys):
    with open(tmp_path / "evil.pt", "wb") as stream:
        pickle.dump({"format": 1, "kind": "enhanced_direct", "payload": Payload(tmp_path / "owned")}, stream, 2)
    torch.save({"format": 1, "payload": Payload(tmp_path / "owned")}, tmp_path / "evil_zip.pt")
    for name in ("evil.pt", "evil_zip.pt"):
        with pytest.raises(SystemExit) as stopped:
            run_cli(partial(evaluate.main, command(root, tmp_path / name, tmp_path / "out")))
        assert stopped.value.code == 2
        assert name in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pt", "evil_zip.pt"]


def test_results_never_replace_a_file_named_like_their_folder(root, base, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="out is a file; expected a folder"):
        evaluate.main(command(root, base, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "precious"


def test_missing_files_and_devices_are_named(root, base, tmp_path):
    with pytest.raises(InputError, match=r"none\.pt: no such checkpoint"):
        evaluate.main(command(root, tmp_path / "none.pt", tmp_path / "out"))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        evaluate.main(command(tmp_path / "nowhere", base, tmp_path / "out"))
    with pytest.raises(InputError, match="--device abacus"):
        evaluate.main(command(root, base, tmp_path / "out", "--device", "abacus"))
