"""export_weights: files that load again, a card with licences and scores; patients without a licence are refused."""

import json
import re

import pytest

import evaluate
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import export_weights, film_benchmark
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError, read_csv, sha256
from xray2ct.weights import resolve

HEAD = "id,collection,patient,licence,doi\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    root = make_dataset(folder / "data")
    config = {**load_checkpoint(make_checkpoint(folder / "plain.pt", root))["config"]}
    config["data"] = {**config["data"], "dataset_path": str(root)}
    rows = "".join(f"p{i},lidc_idri,LIDC-IDRI-000{i},CC BY 3.0,10.7937/x\n" for i in range(3))
    (folder / "licences.csv").write_text(HEAD + rows)
    (folder / "citations.csv").write_text("doi,citation\n10.7937/x,Somebody (2015). Data From LIDC-IDRI.\n")
    return make_checkpoint(folder / "best_model.pt", root, config=config), root, folder / "licences.csv"


def export(made, folder, *more):
    words = [str(made[0]), "tiny", "--licences", str(made[2]), "--output", str(folder), *more]
    assert export_weights.main(words) == 0
    return json.loads((folder / "tiny.json").read_text())


def test_the_json_says_what_the_file_is_and_names_no_machines_folders(made, tmp_path):
    found = export(made, tmp_path)
    assert found["sha256"] == sha256(tmp_path / "tiny.safetensors")
    assert found["bytes"] == (tmp_path / "tiny.safetensors").stat().st_size
    assert found["checkpoint"]["config"]["data"]["dataset_path"] == "data"
    assert str(made[1].parent) not in (tmp_path / "tiny.json").read_text()
    assert found["split"] == {"val": ["p3"], "test": ["p4", "p5"]}
    assert [row["patient"] for row in found["patients"]] == [f"LIDC-IDRI-000{i}" for i in range(3)]
    assert found["citations"] == {"10.7937/x": "Somebody (2015). Data From LIDC-IDRI."}
    assert (tmp_path / "LICENSE-CC-BY-4.0").read_text() == (ROOT / "weights" / "LICENSE-CC-BY-4.0").read_text()
    card = (tmp_path / "tiny.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: xray2ct\n")
    for words in ("LIDC-IDRI-0001", "https://doi.org/10.7937/x", "Somebody (2015)", "Not evaluated yet"):
        assert words in card


def test_the_commit_machine_and_minutes_are_those_of_the_run(made, tmp_path):
    code, machine = {"commit": "abc", "dirty": False}, {"cpu": "CPU", "threads": 2, "gpus": []}
    environment = {"code": code, "packages": {"torch": "2.13"}, **machine}
    runs = [("2026-11-27T10:00:00+00:00", "2026-11-27T10:10:00+00:00"), ("2026-11-28T00:00:00+00:00", None)]
    common = {"environment": environment, "processes": 1, "device": "cpu"}
    (tmp_path / "run.json").write_text(json.dumps({"runs": [{"began": a, "ended": b, **common} for a, b in runs]}))
    (tmp_path / "log.jsonl").write_text('{"event": "step", "time": 1795824300.0}\n')  # 2026-11-28 00:05 UTC
    facts = export_weights.run_facts(tmp_path)
    assert (facts["minutes"], facts["commit"], facts["date"]) == (15.0, "abc", "2026-11-28")
    assert export_weights.run_facts(tmp_path / "nowhere") == {}


def test_float32_keeps_every_bit(made, tmp_path):
    found = export(made, tmp_path, "--dtype", "float32")
    assert found["fingerprint"] == found["source"]["fingerprint"]


def test_scores_of_these_weights_get_into_the_card_and_others_are_refused(made, tmp_path):
    export(made, tmp_path)
    words = ["--data", str(made[1]), "--weights", str(tmp_path / "tiny.safetensors"), "--device", "cpu"]
    evaluate.main([*words, "--output", str(tmp_path / "scores")])
    found = export(made, tmp_path, "--scores", str(tmp_path / "scores"))
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert found["scores"]["methods"] == summary["methods"]
    scores = found["scores"]["per_patient"]
    assert sum(scores.values()) / 2 == pytest.approx(summary["methods"]["model"]["psnr_strict"]["mean"], abs=1e-3)
    card = (tmp_path / "tiny.md").read_text()
    assert f"Worst of them: {min(scores, key=scores.get)}, {min(scores.values()):.2f} dB strict" in card
    assert (tmp_path / "tiny_worst.png").exists()
    other = make_checkpoint(tmp_path / "other.pt", made[1], settings={"base_channels": 32})
    with pytest.raises(InputError, match=r"summary.json: is an evaluation of the weights .*; expected"):
        export_weights.main([str(other), "tiny", "--output", str(tmp_path), "--scores", str(tmp_path / "scores")])


def test_a_film_benchmark_of_these_weights_gets_into_the_card_and_others_are_refused(made, tmp_path):
    export(made, tmp_path)
    other = make_checkpoint(tmp_path / "other.pt", made[1], settings={"base_channels": 32})
    common = ["--data", str(made[1]), "--case", "clean", "--case", "display", "--max-patients", "1"]
    own = ["--checkpoint", str(tmp_path / "tiny.safetensors"), "--output", str(tmp_path / "own")]
    film_benchmark.main([*common, *own, "--checkpoint", str(other)])
    table = tmp_path / "own" / "film_benchmark.json"
    found = export(made, tmp_path, "--film-scores", str(table))["film_scores"]
    assert found["patients"] == ["p4"]
    assert list(found["cases"]) == ["clean", "display"]
    psnr = found["cases"]["clean"][found["networks"][0]]["psnr"]
    assert f"| clean | {psnr:.2f} (" in (tmp_path / "tiny.md").read_text()
    film_benchmark.main([*common, "--checkpoint", str(other), "--output", str(tmp_path / "others")])
    with pytest.raises(InputError, match=r"film_benchmark.json: is a film benchmark of .*other, auto on test patients"):
        export(made, tmp_path, "--film-scores", str(tmp_path / "others" / "film_benchmark.json"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("p0,c,P,CC BY 3.0,\np1,c,P,CC BY-NC 3.0,\np2,c,P,CC BY 4.0,\n", "p1 has the licence CC BY-NC 3.0"),
        ("p0,c,P,CC BY 3.0,\np1,c,P,,\np2,c,P,CC BY 4.0,\n", "p1 has the licence none"),
        ("p0,c,P,CC BY 3.0,\n", "has no row for p1, who was trained on"),
    ],
)
def test_patients_whose_licence_is_missing_or_forbids_it_are_refused(made, tmp_path, rows, words):
    (tmp_path / "l.csv").write_text(HEAD + rows)
    with pytest.raises(InputError, match=re.escape(f"l.csv: {words}")):
        export_weights.main([str(made[0]), "tiny", "--licences", str(tmp_path / "l.csv"), "--output", str(tmp_path)])
    (tmp_path / "l.csv").write_text("id,collection\n")
    with pytest.raises(InputError, match="column 'patient' is missing"):
        export_weights.main([str(made[0]), "tiny", "--licences", str(tmp_path / "l.csv"), "--output", str(tmp_path)])
    assert not list(tmp_path.glob("tiny*"))


def test_the_hubs_layout_loads_again(made, tmp_path):
    words = [str(made[0]), "tiny", "--licences", str(made[2]), "--huggingface", str(tmp_path / "hub")]
    assert export_weights.main(words) == 0
    files = {path.name for path in (tmp_path / "hub").iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md", "LICENSE-CC-BY-4.0"}
    assert resolve(tmp_path / "hub" / "model.safetensors")["train_patients"] == ["p0", "p1", "p2"]


def test_the_committed_table_covers_the_citations():
    rows = read_csv(ROOT / "weights" / "patients.csv", export_weights.COLUMNS)
    found = export_weights.attribution(ROOT / "weights" / "patients.csv", [row["id"] for _, row in rows])
    assert {row["doi"] for row in found["patients"]} == found["citations"].keys()
    assert all(len(text) > 60 for text in found["citations"].values())
