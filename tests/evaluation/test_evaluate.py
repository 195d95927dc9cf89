"""Evaluation: numbers equal an independent computation, wrong pairings are refused."""

import csv
import json
import math
import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch

import evaluate
from dataset import PatientDataset, mean_volume
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import make_checkpoint, make_model
from xray2ct.checkpoints import load_checkpoint, weights_fingerprint
from xray2ct.evaluation import run, scoring, tables
from xray2ct.evaluation.protocols import COLUMNS, PROTOCOLS
from xray2ct.files import InputError, run_cli
from xray2ct.geometry.projector import Geometry
from xray2ct.inference.predictor import LoadedCheckpoint
from xray2ct.models.loading import load_base_model
from xray2ct.training.config import config_hash

EARLIER = ("psnr_strict", "psnr_strict_masked", "psnr_x2ct", "ssim_3d", "ssim_slices", "mae_hu", "rmse_hu")


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


def test_every_protocol_is_a_column_of_each_row_and_a_line_of_the_summary(results):
    rows, summary = read_rows(results), json.loads((results / "summary.json").read_text())
    assert all(list(row) == ["method", "id", *COLUMNS, "seconds"] for row in rows)
    assert all(math.isfinite(float(row[column])) for row in rows for column in COLUMNS)  # no tissue is missing here
    assert summary["protocols"] == COLUMNS
    assert summary["protocol_columns"]["pm1024"] == ["psnr_pm1024", "ssim_pm1024"]
    for method in ("model", "mean_volume"):
        assert set(summary["methods"][method]) == {*COLUMNS, "seconds"}
    assert set(summary["minus_mean_volume"]["model"]) == set(COLUMNS)


def test_body_and_projection_equal_an_independent_computation(root, base, results):
    from xray2ct.geometry.projector import render_xrays
    from xray2ct.imaging.body import body_mask

    row = next(r for r in read_rows(results) if (r["method"], r["id"]) == ("model", "p5"))
    data = PatientDataset(root, "test", 16, 64)
    item = data[data.ids.index("p5")]
    with torch.no_grad():
        prediction = load_base_model(base)[0](item["xrays"][None])[0]
        rendered = render_xrays(prediction, data.geometry, (32, 32))
    hu = item["ct_volume"][0].numpy() * 2500.0 - 1024
    error = prediction[0, 0].numpy() * 2500.0 - 1024 - hu
    inside = body_mask(hu, 360 / 16) & (item["mask"][0].numpy() > 0)
    assert 0.1 < inside.mean() < 0.9
    assert float(row["body_mae_hu"]) == pytest.approx(np.abs(error[inside]).mean(), rel=1e-4)
    assert float(row["body_bias_hu"]) == pytest.approx(error[inside].mean(), rel=1e-4)
    assert float(row["bone_rmse_hu"]) == pytest.approx(np.sqrt((error[inside & (hu >= 150)] ** 2).mean()), rel=1e-3)
    halves = rendered[0].reshape(2, 16, 2, 16, 2).mean((2, 4)), item["xrays"].reshape(2, 16, 4, 16, 4).mean((2, 4))
    expected = (halves[0] - halves[1]).abs().mean().item()
    assert float(row["projection_mae"]) == pytest.approx(expected, rel=1e-4)
    assert float(row["projection_relative"]) == pytest.approx(expected / item["xrays"].mean().item(), rel=1e-4)


def test_the_summary_names_configuration_split_and_weights_of_the_checkpoint(root, base, results):
    (entry,) = json.loads((results / "summary.json").read_text())["checkpoints"]
    checkpoint = load_checkpoint(base)
    assert entry == {
        "file": "base.pt",
        "kind": "enhanced_direct",
        "epoch": 3,
        "config_hash": config_hash(checkpoint["config"]),
        "split_hash": PatientDataset(root, "test", 16, None).split_hash,
        "weights": weights_fingerprint(checkpoint["model_state_dict"]),
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [({"config_hash": "abc", "config": {"a": 1}}, "abc"), ({"config": {"a": 1}}, config_hash({"a": 1})), ({}, None)],
)
def test_the_configuration_hash_is_the_stored_one_or_computed(more, expected):
    entry = run.provenance(LoadedCheckpoint("c.pt", {"epoch": 1, "split_hash": "f", **more}, "0" * 16))
    assert entry["config_hash"] == expected
    assert entry["file"] == "c.pt"


def test_the_table_is_grouped_by_protocol_with_main_figures_by_default(results, capsys):
    summary = json.loads((results / "summary.json").read_text())
    tables.print_table(summary)
    short = capsys.readouterr().out
    shown = {column for column in COLUMNS if f" {column} " in short}
    assert shown == {column for protocol in PROTOCOLS.values() for column in protocol.main}
    assert max(len(line) for line in short.splitlines()) < 100
    assert "model minus mean_volume" in short
    tables.print_table(summary, full=True)
    assert all(f" {column} " in text for text in [capsys.readouterr().out] for column in COLUMNS)


def rows_with_gaps():
    """Three patients, one without bone."""
    rows = []
    for index, patient in enumerate("abc"):
        for method in ("model", "mean_volume"):
            scores = dict.fromkeys(COLUMNS, 10.0 + index + (method == "model"))
            scores["bone_mae_hu"] = None if patient == "b" else scores["bone_mae_hu"]
            rows.append({"method": method, "id": patient, **scores, "seconds": 0.1})
    return rows


def test_a_missing_tissue_is_an_empty_cell_and_not_counted(tmp_path, capsys):
    rows = rows_with_gaps()
    tables.write_rows(tmp_path / "per_patient.csv", rows)
    cells = {(r["method"], r["id"]): r["bone_mae_hu"] for r in read_rows(tmp_path)}
    assert cells["model", "b"] == ""
    assert cells["model", "a"] == "11"
    summary = scoring.summary_of(rows)
    assert summary["methods"]["model"]["bone_mae_hu"]["n"] == 2
    assert summary["methods"]["model"]["bone_mae_hu"]["mean"] == 12.0
    assert summary["methods"]["model"]["body_mae_hu"]["n"] == 3
    assert summary["minus_mean_volume"]["model"]["bone_mae_hu"]["n"] == 2
    tables.print_table(summary, full=True)
    line = next(line for line in capsys.readouterr().out.splitlines() if "bone_mae_hu" in line)
    assert "12.0 +- 1.4 (n 2)" in line
    back = tables.read_rows(tmp_path / "per_patient.csv", "model", ["a", "b", "c"])
    assert [row["bone_mae_hu"] for row in back] == [11.0, None, 13.0]
    gains = scoring.differences([r for r in rows if r["method"] == "mean_volume"], back)
    assert (gains["bone_mae_hu"]["mean"], gains["bone_mae_hu"]["n"]) == (-1.0, 2)


@pytest.mark.parametrize("cell", ["nan", "high", None])
def test_a_cell_that_is_no_score_is_named(tmp_path, cell):
    lines = ["method,id,psnr_strict,mae_hu", "model,a,20,30", "model,b,21" + ("" if cell is None else f",{cell}")]
    (tmp_path / "per_patient.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"per_patient\.csv: mae_hu of b is .*, not a number"):
        tables.read_rows(tmp_path / "per_patient.csv", "model", ["a", "b"])


def test_results_of_earlier_versions_are_compared_on_what_they_have(tmp_path, capsys):
    with open(ROOT / "results" / "real_cpu" / "per_patient.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    path = tmp_path / "per_patient.csv"
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["method", "id", *EARLIER], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    patients = [row["id"] for row in rows if row["method"] == "model"]
    others = tables.read_rows(path, "model_consistent", patients, otherwise="model")
    assert [list(row) for row in others] == [[c for c in COLUMNS if c in EARLIER]] * 6
    note = capsys.readouterr().out
    assert "has no method model_consistent; compared with model" in note
    assert all(column in note for column in COLUMNS if column not in EARLIER)
    mine = [{**row, "psnr_strict": row["psnr_strict"] + 1, "psnr_pm1024": 20.0} for row in others]
    gains = scoring.differences(mine, others)
    assert set(gains) == set(EARLIER)
    assert gains["psnr_strict"]["mean"] == pytest.approx(1)


def test_compared_with_another_method_of_an_older_run_at_another_size(root, base, results, tmp_path, capsys):
    with open(tmp_path / "per_patient.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["method", "id", *EARLIER], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(read_rows(results))
    (tmp_path / "summary.json").write_text(json.dumps({"volume_size": [64, 64, 64], "hu_window": [-1024.0, 1476.0]}))
    options = ["--compare", str(tmp_path / "per_patient.csv"), "--compare-method", "mean_volume", "--pictures", "0"]
    assert evaluate.main(command(root, base, tmp_path / "out", *options)) == 0
    printed = capsys.readouterr().out
    assert "was scored with volume_size [64, 64, 64], this with [16, 16, 16]: not the same task" in printed
    assert "hu_window" not in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    against = summary[f"minus_{tmp_path.name}"]["model"]
    assert set(against) == set(EARLIER)
    expected = summary["minus_mean_volume"]["model"]["mae_hu"]["mean"]
    assert against["mae_hu"]["mean"] == pytest.approx(expected, rel=1e-3)


def test_options_of_the_comparison_belong_together(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--data", "d", "--base", "b", "--output", "o", "--compare-method", "model"])
    assert "--compare-method belongs to --compare" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["--allow-seen", "--allow_seen"])
def test_both_spellings_allow_seen_patients(spelling):
    assert evaluate.parse_args(["--data", "d", "--base", "b", "--output", "o", spelling]).allow_seen
    assert not evaluate.parse_args(["--data", "d", "--base", "b", "--output", "o"]).allow_seen


def test_a_perfect_method_beats_the_mean_volume(root):
    data = PatientDataset(root, "all", 16, 64)
    mean = scoring.mean_method(PatientDataset(root, "train", 16, None))
    rows = scoring.score_patients(data, {"perfect": lambda item: item["ct_volume"][0], "mean_volume": mean})
    summary = scoring.summary_of(rows)
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


def test_another_split_is_noted_with_what_it_means(root, base, tmp_path, capsys):
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


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_earlier_evaluation_is_removed_and_nothing_else(root, base, tmp_path, monkeypatch):
    output = tmp_path / "out"
    evaluate.main(command(root, base, output, "--report", "--pictures", "2"))
    (output / "pictures" / "mine.png").write_bytes(b"precious")
    (output / "notes.txt").write_text("precious")
    before = contents(output)
    assert {"report.html", "pictures/p4.png", "pictures/p5.png"} < set(before)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # the last file of all
        patch.setattr(run, "write_json", fail)
        with pytest.raises(OSError, match=r"No space left on device.*out"):
            evaluate.main(command(root, base, output, "--pictures", "1"))
        with pytest.raises(OSError, match="No space"):
            evaluate.main(command(root, base, tmp_path / "new" / "deep"))
    assert contents(output) == before
    assert not (tmp_path / "new").exists()

    evaluate.main(command(root, base, output, "--pictures", "1"))
    after = contents(output)
    assert set(after) == {"notes.txt", "per_patient.csv", "pictures/mine.png", "pictures/p4.png", "summary.json"}
    assert after["pictures/mine.png"] == b"precious"
    (output / "pictures" / "mine.png").unlink()
    evaluate.main(command(root, base, output, "--pictures", "0"))
    assert sorted(path.name for path in output.iterdir()) == ["notes.txt", "per_patient.csv", "summary.json"]


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output .*per_patient\.csv: cannot be written \(Not a directory"):
        evaluate.main(command(root, "none.pt", tmp_path / "file" / "out"))


def test_weights_that_predict_nan_are_named_and_nothing_is_written(root, tmp_path):
    model = make_model()
    with torch.no_grad():
        list(model.parameters())[-1].fill_(torch.nan)
    damaged = make_checkpoint(tmp_path / "nan.pt", root, model)
    with pytest.raises(InputError, match=r"nan\.pt: the predicted volume holds NaN"):
        evaluate.main(command(root, damaged, tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["nan.pt"]


def test_gains_stand_apart_from_their_names_and_few_patients_are_no_proof(results, capsys):
    summary = json.loads((results / "summary.json").read_text())
    tables.print_table(summary)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("model minus mean_volume"))
    assert "95 % t interval" in lines[start]
    assert [line.split()[0] for line in lines[start + 1 : -1]] == list(tables.GAINS)
    assert lines[-1] == "  (below 10 patients an interval does not show a difference by itself)"
    for statistics in summary["methods"]["model"].values():
        statistics["n"] = 10
    tables.print_table(summary)
    assert "does not show" not in capsys.readouterr().out


def test_volumes_made_otherwise_than_those_of_training_are_noted(root, tmp_path, capsys):
    """The data set's couch_removed is False; the checkpoint knows nothing of assume_ras."""
    path = make_checkpoint(tmp_path / "other.pt", root, volumes={"cube_size": 64, "couch_removed": True})
    assert evaluate.main(command(root, path, tmp_path / "out", "--pictures", "0", "--report")) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    expected = "other.pt was trained on volumes of couch_removed True, these are of couch_removed False"
    assert len(notes) == 1
    assert expected in notes[0]
    assert expected in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_missing_files_and_devices_are_named(root, base, tmp_path):
    with pytest.raises(InputError, match=r"none\.pt: no such checkpoint"):
        evaluate.main(command(root, tmp_path / "none.pt", tmp_path / "out"))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        evaluate.main(command(tmp_path / "nowhere", base, tmp_path / "out"))
    with pytest.raises(InputError, match="--device abacus"):
        evaluate.main(command(root, base, tmp_path / "out", "--device", "abacus"))
