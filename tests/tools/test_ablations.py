"""Ablations: two levers trained on a tiny data set, resumed, tabled; tables from results written by hand."""

import json

import pytest
import torch

from dataset import PatientDataset
from model_enhanced import load_base_model
from tests.helpers.runs import TINY
from tests.helpers.tiny_data import make_dataset
from tools import ablations
from xray2ct.checkpoints import load_checkpoint, weights_fingerprint
from xray2ct.files import InputError, read_json, write_json
from xray2ct.metrics import psnr


def page(folder):
    path = folder / "page.md"
    path.write_text(f"# Title\n\n{ablations.BEGIN}\nold\n{ablations.END}\nend\n", encoding="utf-8")
    return path


def test_levers_train_at_equal_budget_are_scored_and_go_on(tmp_path):
    root, levers, output = make_dataset(tmp_path / "data"), tmp_path / "levers.json", tmp_path / "out"
    from_plain = "--init={output}/plain-seed{seed}/best_model.pt"
    write_json(
        levers, {"plain": [], "layout": ["model.layout_head=half", "loss.layout_weight=0.1"], "on": [from_plain]}
    )
    write_json(tmp_path / "config.json", {})
    settings = [word for text in [s for s in TINY if "num_epochs" not in s] for word in ("--set", text)]
    words = ["--levers", str(levers), "--data", str(root), "--config", str(tmp_path / "config.json"), *settings]
    words += ["--output", str(output), "--table", str(page(tmp_path)), "--set", "world_size=1", "--epochs", "1"]
    assert ablations.main(words) == 0
    results = {name: read_json(output / f"{name}-seed0.json") for name in ("plain", "layout", "on")}
    assert load_checkpoint(output / "layout-seed0" / "best_model.pt")["model_config"]["layout_head"] == "half"
    model, _ = load_base_model(output / "plain-seed0" / "best_model.pt")
    item = PatientDataset(root, "val", 16, 64)[0]
    with torch.no_grad():
        volume = model(item["xrays"][None])[0]
    assert results["plain"]["psnr"] == pytest.approx(psnr(volume[0, 0], item["ct_volume"][0]), abs=1e-3)
    rendered = PatientDataset(root, "val", 16, 64).acquisition.render(volume, (64, 64))[0]
    error = ((rendered - item["xrays"]).square().sum() / item["xrays"].square().sum()).sqrt().item()
    assert results["plain"]["projection_error"] == pytest.approx(error, rel=1e-3)
    assert f"--init={output}/plain-seed0/best_model.pt" in results["on"]["command"]
    start = load_checkpoint(output / "plain-seed0" / "best_model.pt")
    begun = load_checkpoint(output / "on-seed0" / "best_model.pt")["init"]
    assert begun["fingerprint"].startswith(weights_fingerprint(start["model_state_dict"])[:8])
    assert results["plain"]["psnr_consistent"] > results["plain"]["psnr"]
    assert results["layout"]["cpu_seconds"] > 0
    assert "layout_head=half" in results["layout"]["command"]
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    gain = results["layout"]["psnr"] - results["plain"]["psnr"]
    assert text.startswith("# Title")
    assert text.endswith("end\n")
    assert "old" not in text
    assert f"| {results['layout']['psnr']:.2f} | {gain:+.2f} |" in text
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*.pt")}
    assert ablations.main(words) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in output.rglob("*.pt")}
    with pytest.raises(InputError, match="its epochs is 1, not 2; choose another --output"):
        ablations.main([*words[:-1], "2"])


def result(lever, seed, value):
    scores = {
        "psnr": value,
        "ssim_3d": 0.5,
        "projection_error": 0.034,
        "psnr_consistent": value + 1,
        "epochs": 3,
        "cpu_seconds": 90.0,
    }
    about = {"machine": "CPU", "date": "2026-11-28", "commit": "0123456789", "config": "a.json", "common": ["b.c=2"]}
    return {"lever": lever, "seed": seed, **scores, **about}


def test_the_report_pairs_seeds_and_writes_the_table_alone(tmp_path):
    levers, output, table = tmp_path / "levers.json", tmp_path / "out", page(tmp_path)
    write_json(levers, {"plain": [], "other": ["a.b=1"], "missing": []})
    for lever, seed, value in (("plain", 0, 20.0), ("plain", 1, 21.0), ("other", 0, 20.5), ("other", 1, 20.9)):
        write_json(output / f"{lever}-seed{seed}.json", result(lever, seed, value))
    assert ablations.main(["--levers", str(levers), "--output", str(output), "--table", str(table), "--report"]) == 0
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows[2:] == [
        "| plain | - | 2 | 20.50 | - | 0.500 | 3.4 % | 21.50 | - | 3 / 3 | 2 / 2 |",
        "| other | `a.b=1` | 2 | 20.70 | +0.50 / -0.10 | 0.500 | 3.4 % | 21.70 | +0.50 / -0.10 | 3 / 3 | 2 / 2 |",
    ]
    assert "All runs: `--config a.json --set b.c=2`; CPU, 2026-11-28, commit 0123456." in lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object of at least one lever"),
        ({"../x": []}, "is no name for a folder"),
        ({"x": "model.passes=2"}, "expected a list of settings"),
        ({"x": ["--output=x"]}, "x has '--output=x'; expected settings, or --init=WEIGHTS"),
    ],
)
def test_levers_that_are_none_are_named(tmp_path, content, message):
    (tmp_path / "levers.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        ablations.read_levers(tmp_path / "levers.json")


def test_a_page_without_marks_is_kept(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Mine\n", encoding="utf-8")
    with pytest.raises(InputError, match="expected the lines"):
        ablations.write_table(path, "x")
    assert path.read_text(encoding="utf-8") == "# Mine\n"
