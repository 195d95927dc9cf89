"""The table of perturbations: paired with the unperturbed case, worst case named, wrong input refused."""

import json

import pytest
from PIL import Image

from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import robustness
from xray2ct.checkpoints import load_checkpoint, weights_fingerprint
from xray2ct.files import InputError
from xray2ct.weights_file import write_weights


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
    with Image.open(tmp_path / "worst.png") as picture:
        assert picture.height > 4 * 256  # as trained, perturbed, truth, difference
    assert text.strip() in capsys.readouterr().out


def test_weights_are_taken_by_name_and_by_path_as_by_the_commands(trained, tmp_path, monkeypatch):
    root, base = trained
    checkpoint = load_checkpoint(base)
    write_weights(tmp_path / "weights" / "mine.safetensors", checkpoint, "float32", {})
    monkeypatch.setenv("XRAY2CT_WEIGHTS", str(tmp_path / "weights"))
    common = ["--data", str(root), "--only", "exposure", "--patients", "p4"]
    found = []
    for name in ("mine", str(base)):
        assert robustness.main([*common, "--weights", name, "--output", str(tmp_path / "out")]) == 0
        found.append(json.loads((tmp_path / "out" / "robustness.json").read_text()))
    assert found[0]["rows"] == found[1]["rows"]
    assert found[0]["measured"]["weights"] == [weights_fingerprint(checkpoint["model_state_dict"])]
    with pytest.raises(InputError, match="--weights stands for --base and --refinement"):
        robustness.main([*common, "--weights", "mine", "--base", str(base), "--output", str(tmp_path / "out")])


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
