"""The table of perturbations: paired with the unperturbed case, worst case named, wrong input refused."""

import json

import pytest

from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import robustness
from xray2ct.files import InputError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    root = make_dataset(folder / "data", cube_size=32)
    return root, make_checkpoint(folder / "base.pt", root)


def test_differences_are_paired_and_the_worst_case_is_drawn(trained, tmp_path, capsys):
    root, base = trained
    options = ["--base", str(base), "--data", str(root), "--only", "cut off", "exposure", "--output", str(tmp_path)]
    assert robustness.main(options) == 0
    result = json.loads((tmp_path / "robustness.json").read_text())
    rows = {(row["perturbation"], row["id"]): row["psnr_strict"] for row in result["rows"]}
    name = "upper 20 % cut off"
    losses = [rows[name, patient] - rows["as trained", patient] for patient in result["patients"]]
    assert result["summary"]["differences"][name]["psnr_strict"]["mean"] == pytest.approx(sum(losses) / len(losses))
    assert len(result["rows"]) == 2 * (1 + 4 + 3)
    assert result["measured"]["weights"]
    assert result["measured"]["command"].startswith("python -m tools.robustness")
    text = (tmp_path / "robustness.md").read_text()
    assert f"| {name} | {result['summary']['differences'][name]['psnr_strict']['mean']:+.2f} (" in text
    assert (tmp_path / "worst.png").stat().st_size > 1000
    assert text.strip() in capsys.readouterr().out


def test_wrong_input_is_refused(trained, tmp_path):
    root, base = trained
    common = ["--base", str(base), "--data", str(root), "--output", str(tmp_path / "new")]
    with pytest.raises(InputError, match="--patients p0: is not in the test split"):
        robustness.main([*common, "--patients", "p0"])
    with pytest.raises(InputError, match="was trained on p0"):
        robustness.main([*common, "--split", "train", "--patients", "p0"])
    with pytest.raises(InputError, match="--only 'gravity': is in no perturbation's name"):
        robustness.main([*common, "--only", "gravity"])
    assert not (tmp_path / "new").exists()
