"""The notebooks run to their ends, print and write what the commands do, and are stored with clean outputs."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from dataset import PatientDataset
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import TINY_MODEL, make_checkpoint, make_dataset, make_refinement_checkpoint
from tools import demo
from xray2ct.geometry.projector import unit_to_hu
from xray2ct.inference.reconstruction import load_pipeline

NOTEBOOK = ROOT / "notebooks" / "inference.ipynb"
TRAINING = ROOT / "notebooks" / "train_on_phantoms.ipynb"
NOTEBOOKS = [NOTEBOOK, TRAINING]


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def paths_cell() -> dict:
    (cell,) = (cell for cell in cells() if cell["metadata"].get("tags") == ["parameters"])
    return cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_with_its_outputs_and_without_traces_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    book = json.loads(text)
    assert set(book["metadata"]) == {"kernelspec", "language_info"}
    assert book["metadata"]["language_info"] == {"name": "python"}
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert all(set(cell["metadata"]) <= {"tags"} for cell in book["cells"])
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.findall(r"(?:^|[\s'\"=])(/\w+/|[A-Z]:\\)", printed)  # no path of where it ran
    assert len(text) < 800_000


def test_the_notebook_says_what_it_needs():
    assert "pip install matplotlib" in "".join(next(c for c in cells() if c["cell_type"] == "code")["source"])


def test_its_paths_are_those_of_the_demo():
    names = {"ROOT": Path("here")}
    exec("".join(paths_cell()["source"]), names)
    made = demo.Demo(SimpleNamespace(output=Path("here") / demo.parse_args([]).output, patients=24))
    assert (names["BASE"], names["REFINEMENT"], names["DATA"]) == (made.checkpoint, made.refinement, made.data)


def test_it_runs_and_shows_and_writes_what_the_pipeline_gives(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for package in ("ipykernel", "matplotlib"):
        pytest.importorskip(package)
    root = make_dataset(tmp_path / "data")
    base = make_checkpoint(tmp_path / "base.pt", root)
    refinement = make_refinement_checkpoint(tmp_path / "refinement.pt", root, base)
    output = tmp_path / "out.nii.gz"
    book = nbformat.read(NOTEBOOK, as_version=4)
    (paths,) = (cell for cell in book.cells if cell.metadata.get("tags") == ["parameters"])
    values = {"BASE": base, "REFINEMENT": refinement, "DATA": root, "PATIENT": "p5", "OUTPUT": output}
    paths.source = "\n".join(f"{name} = {str(value)!r}" for name, value in values.items())
    client = nbclient.NotebookClient(
        book, timeout=None, startup_timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()

    outputs = [part for cell in book.cells if cell.cell_type == "code" for part in cell.outputs]
    assert sum("image/png" in part.get("data", {}) for part in outputs) == 2
    assert not [part.text for part in outputs if part.get("name") == "stderr"]
    xrays = [root / "p5" / f"p5_{view}_drr.png" for view in ("pa", "lat")]
    hu, affine = load_pipeline(base, refinement, device="cpu")(*xrays)
    image = nib.load(output)
    assert image.shape == (64, 64, 64)
    assert np.abs(np.asarray(image.dataobj).transpose(2, 1, 0) - hu).max() <= 1
    assert np.allclose(image.affine, affine)
    data = PatientDataset(root, "test", 64, None)
    truth = unit_to_hu(data[data.ids.index("p5")]["ct_volume"][0].numpy(), data.hu_window)
    printed = "".join(part.get("text", "") for part in outputs)
    assert f"mean absolute error {np.abs(hu - truth).mean():.1f} HU" in printed
    rms = np.sqrt(np.square((hu - truth) / 2500).mean())
    assert float(printed.split("PSNR (strict) ")[1].split()[0]) == pytest.approx(-20 * np.log10(rms), abs=0.02)


def test_the_training_notebook_trains_and_scores(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for package in ("ipykernel", "matplotlib"):
        pytest.importorskip(package)
    book = nbformat.read(TRAINING, as_version=4)
    (settings,) = (cell for cell in book.cells if cell.metadata.get("tags") == ["parameters"])
    tiny = {f"model.{key}": value for key, value in TINY_MODEL.items()} | {"model.volume_size": [32, 32, 32]}
    tiny |= {"data.repeats": 2, "training.batch_size": 2}
    words = [f"{key}={json.dumps(value)}".replace(" ", "") for key, value in tiny.items()]
    settings.source = f"PHANTOMS, EPOCHS, OUTPUT, SETTINGS = 3, 1, {str(tmp_path / 'run')!r}, {words!r}"
    nbclient.NotebookClient(
        book, timeout=None, startup_timeout=600, resources={"metadata": {"path": str(TRAINING.parent)}}
    ).execute()
    outputs = [part for cell in book.cells if cell.cell_type == "code" for part in cell.outputs]
    assert sum("image/png" in part.get("data", {}) for part in outputs) == 2
    scores = json.loads((tmp_path / "run" / "results" / "summary.json").read_text(encoding="utf-8"))["methods"]
    printed = "".join(part.get("text", "") for part in outputs)
    assert f"{scores['model']['psnr_strict']['mean']:.2f}" in printed
    assert (tmp_path / "run" / "results" / "report.html").exists()
