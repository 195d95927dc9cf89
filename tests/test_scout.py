"""From CTs to a volume in scout geometry: prepared, trained, reconstructed; the geometry travels with the weights."""

import json

import nibabel as nib
import numpy as np
import pytest

import evaluate
import prepare_data
import reconstruct
from tests.helpers.ct_cases import save_nifti, thorax
from tests.helpers.runs import build
from tests.helpers.tiny_data import make_dataset
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry
from xray2ct.training.distributed import Processes
from xray2ct.training.trainer import fit


def test_scouts_are_prepared_trained_on_and_reconstructed(tmp_path):
    for place, name in enumerate("abc"):
        save_nifti(tmp_path / "cts" / f"{name}.nii.gz", thorax(centre=(10 * place, 0)))
    data, output = tmp_path / "data", tmp_path / "run"
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "val": ["b"], "test": ["c"]}))
    options = ["--geometry", "scout", "--sid-mm", "595", "--sdd-mm", "1085", "--split", str(tmp_path / "split.json")]
    sizes = ["--size", "32", "--xray-size", "64", "--workers", "1"]
    assert prepare_data.main(["--input", str(tmp_path / "cts"), "--output", str(data), *options, *sizes]) == 0

    config, task, model = build(data, "training.num_epochs=1", "data.repeats=1")
    fit(model, task, config, output, Processes())
    geometry = Geometry("scout", 360.0, 1085.0, 595.0)
    assert model.geometry == Geometry.from_dict(load_checkpoint(output / "last.pt")["geometry"]) == geometry
    losses = [json.loads(line).get("l1") for line in (output / "log.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss is not None and 0 < loss < 1]

    pa, lateral, volume = data / "c" / "c_pa_drr.png", data / "c" / "c_lat_drr.png", tmp_path / "c.nii.gz"
    words = ["--pa", str(pa), "--lateral", str(lateral), "--base", str(output / "last.pt"), "--output", str(volume)]
    assert reconstruct.main(words) == 0
    image = nib.load(volume)
    assert image.shape == (16, 16, 16)
    assert np.asarray(image.dataobj).std() > 0
    with pytest.raises(
        InputError, match=r"(?s)cone.*scout|scout.*cone"
    ):  # X-rays of another geometry than the weights'
        evaluate.main(
            ["--data", str(make_dataset(tmp_path / "cone", 3)), "--base", str(output / "last.pt")]
            + ["--output", str(tmp_path / "evaluation")]
        )
