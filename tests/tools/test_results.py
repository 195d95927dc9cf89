"""The tables of docs/results.md are what was measured; what is older than its code or weights is named."""

import json
import re
import subprocess

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import make_checkpoint, make_dataset, make_model
from tools import results
from xray2ct.files import InputError, read_json, write_json

STATISTICS = {"mean": 25.123, "sd": 0.5, "n": 3}


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("at_root")
def test_the_published_tables_are_what_their_json_says(capsys):
    assert results.main(["--check"]) == 0
    printed = capsys.readouterr().out
    assert "old: real_cpu: no commit recorded (2026-11-22)" in printed
    assert "\nREADME.md: 1 table as the JSON says\n" in printed
    text = results.TEXT.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| model | ")]
    values = read_json("results/real_cpu/per_patient.csv".replace("per_patient.csv", "summary.json"))
    assert rows[0][1] == f"{values['methods']['model']['psnr_strict']['mean']:.2f} +- 0.98"


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize(("page", "figure"), [("docs/results.md", "24.89 +- 0.98"), ("README.md", "26.01 +- 0.24")])
def test_an_altered_figure_is_found(tmp_path, capsys, page, figure):
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("docs/results.md", "README.md")}
    copies = {name: tmp_path / name.rpartition("/")[2] for name in texts}
    for name, text in texts.items():
        copies[name].write_text(text.replace(figure, "29.00 +- 0.98") if name == page else text, encoding="utf-8")
    systems = read_json(results.SYSTEMS)
    for table in systems["tables"].values():
        table |= {"page": str(copies[table["page"]])} if "page" in table else {}
    write_json(tmp_path / "systems.json", systems)
    options = ["--systems", str(tmp_path / "systems.json"), "--text", str(copies["docs/results.md"])]
    assert results.main([*options, "--check"]) == 1
    assert f"{copies[page]}: a table is not what its JSON says" in capsys.readouterr().out
    assert results.main(options) == 0
    assert {name: copy.read_text(encoding="utf-8") for name, copy in copies.items()} == texts


def write_systems(folder, base) -> list[str]:
    systems = [{"name": "tiny", "folder": str(folder / "tiny"), "base": str(base)}]
    rows = [
        {"label": "tiny network", "system": "tiny", "method": "model"},
        {"label": "gain", "system": "tiny", "method": "model", "minus": "mean_volume"},
    ]
    table = {"kind": "scores", "title": "patients", "columns": {"psnr_strict": "PSNR, dB"}, "rows": rows}
    write_json(folder / "systems.json", {"systems": systems, "tables": {"one": table}})
    (folder / "text.md").write_text("before\n<!-- table one -->\n<!-- end of table -->\nafter\n", encoding="utf-8")
    return ["--systems", str(folder / "systems.json"), "--text", str(folder / "text.md")]


def test_systems_are_measured_and_other_weights_are_found(tmp_path, capsys):
    root = make_dataset(tmp_path / "data", cube_size=32)
    base = make_checkpoint(tmp_path / "base.pt", root)
    options = write_systems(tmp_path, base)
    assert results.main([*options, "--data", str(root)]) == 0
    summary, record = read_json(tmp_path / "tiny/summary.json"), read_json(tmp_path / "tiny/measured.json")
    statistics = summary["methods"]["model"]["psnr_strict"]
    text = (tmp_path / "text.md").read_text()
    assert text.startswith("before\n<!-- table one -->\n| patients, n = 2 | PSNR, dB |")
    assert text.endswith("<!-- end of table -->\nafter\n")
    assert f"| tiny network | {statistics['mean']:.2f} +- {statistics['sd']:.2f} |" in text
    assert re.search(r"\| gain \| [+-]\d+\.\d\d \([+-]\d+\.\d\d to [+-]\d+\.\d\d\) \|", text)
    assert record["weights"] == [summary["checkpoints"][0]["weights"]]
    assert f"weights {record['weights'][0]}" in text
    assert len(list((tmp_path / "tiny/pictures").iterdir())) == 2
    assert results.main([*options, "--check"]) == 0
    assert "holds other weights" not in capsys.readouterr().out
    make_checkpoint(base, root, make_model(seed=1))
    assert results.main([*options, "--check"]) == 0
    assert "base.pt holds other weights" in capsys.readouterr().out


def test_a_summary_has_patients_and_date_and_figures_in_files_have_an_age(tmp_path):
    write_json(
        tmp_path / "summary.json", {"patients": ["a", "b", "c"], "methods": {"model": {"psnr_strict": STATISTICS}}}
    )
    write_json(tmp_path / "measured.json", {"date": "2026-11-28", "commit": None})
    write_json(tmp_path / "figures.json", {"measured": {"date": "2026-11-27", "commit": "0" * 40}})
    rows = [{"label": "ours", "system": "one", "method": "model"}]
    table = {"title": "network", "columns": {"psnr_strict": "PSNR, dB"}, "rows": rows}
    lines = results.summary_table(table, {"one": tmp_path}).splitlines()
    assert lines[0] == "| network | PSNR, dB | patients | date |"
    assert lines[2] == "| ours | 25.12 +- 0.50 | 3 | 2026-11-28 |"
    systems = {"systems": [], "tables": {"worse": {"file": str(tmp_path / "figures.json")}}}
    assert results.ages(systems) == ["table worse: measured at commit 0000000, which is not in this checkout"]
    with pytest.raises(InputError, match="has no 'refined' for 'ours'"):
        results.summary_table({**table, "rows": [rows[0] | {"method": "refined"}]}, {"one": tmp_path})


def test_commits_to_the_code_make_a_figure_old():
    assert results.newer_commits("0" * 40) is None
    words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert results.newer_commits(done.stdout.strip()) == 0


def test_wrong_lists_are_refused(tmp_path):
    options = write_systems(tmp_path, tmp_path / "base.pt")
    path = tmp_path / "systems.json"
    good = json.loads(path.read_text())

    def refused(message, **changes):
        write_json(path, {**good, **changes})
        with pytest.raises(InputError, match=message):
            results.main(options)

    refused("system 'tiny': unknown key bass", systems=[{**good["systems"][0], "bass": "x"}])
    refused("system 'tiny': a name of its own", systems=good["systems"] * 2)
    rows = [{"label": "a", "system": "other", "method": "model"}]
    refused("table one: row 'a' has an unknown key or system", tables={"one": {**good["tables"]["one"], "rows": rows}})
    refused("table two is to be in the text", tables={**good["tables"], "two": good["tables"]["one"]})
    refused("table one: kind is 'pie'", tables={"one": {**good["tables"]["one"], "kind": "pie"}})
    refused(r"tiny/summary\.json", tables=good["tables"])
    write_json(path, good)
    with pytest.raises(InputError, match="--only small: no system of that name"):
        results.main([*options, "--only", "small"])
