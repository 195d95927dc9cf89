"""A run goes on only with its own data: whatever describes a data set is compared and named, old checkpoints too."""

import re
import shutil

import pytest

from dataset import PatientDataset
from tests.helpers import toy_task
from tests.helpers.runs import build
from tests.helpers.tiny_data import make_dataset, make_hu
from xray2ct.checkpoints import load_checkpoint, save_checkpoint
from xray2ct.files import InputError, read_json, write_json
from xray2ct.imaging.cube import cube_affine
from xray2ct.imaging.cube_files import write_cube
from xray2ct.training.distributed import Processes
from xray2ct.training.run_identity import data_header
from xray2ct.training.task import refuse_losses
from xray2ct.training.trainer import Trainer


@pytest.fixture(scope="module")
def state(root, tmp_path_factory):
    """The folder of a run that has just begun."""
    folder = tmp_path_factory.mktemp("begun")
    config, task, model = build(root)
    Trainer(model, task, config, folder, Processes()).save_last()
    return folder


def resume(root, folder):
    config, task, model = build(root)
    return Trainer(model, task, config, folder, Processes()).resume()


def change(root, target, **values):
    """The same data set with other entries in its manifest."""
    shutil.copytree(root, target, ignore=shutil.ignore_patterns(".cache"))
    write_json(target / "dataset.json", {**read_json(root / "dataset.json"), **values})
    return target


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hu_window": [-1024, 1024]}, "hu_window is not the data's: [-1024.0, 1476.0] against [-1024.0, 1024.0]"),
        ({"xray_scale": 5.0}, "xray_scale is not the data's: "),
        ({"couch_removed": True}, "volumes is not the data's: couch_removed False against True"),
        ({"assume_ras": True}, "volumes is not the data's: assume_ras False against True"),
    ],
)
def test_another_manifest_is_refused_by_key_and_both_values(root, state, tmp_path, values, words):
    other = change(root, tmp_path / "other", **values)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        resume(other, state)
    assert str(state / "last.pt") in str(error.value)
    assert str(other) in str(error.value)


def test_a_field_of_view_and_a_cube_of_another_size_are_refused(root, state, tmp_path):
    manifest = read_json(root / "dataset.json")
    smaller = {**manifest["geometry"], "fov_mm": 300.0}
    with pytest.raises(InputError, match=r"geometry is not the data's: .*fov_mm 360\.0 against 300\.0"):
        resume(change(root, tmp_path / "fov", geometry=smaller), state)
    coarse = make_dataset(tmp_path / "coarse", cube_size=32)
    with pytest.raises(InputError, match="volumes is not the data's: cube_size 64 against 32"):
        resume(coarse, state)


@pytest.mark.parametrize(("patient", "refused"), [("p0", True), ("p3", True), ("p4", False)])
def test_other_voxels_of_a_training_or_validation_patient_are_noticed(root, state, tmp_path, patient, refused):
    patients = read_json(root / "dataset.json")["patients"]
    patients[patient]["files"][f"{patient}.nii.gz"] = "0" * 64  # as prepare_data.py writes it for other voxels
    other = change(root, tmp_path / "other", patients=patients)
    if refused:
        with pytest.raises(InputError, match=r"data_fingerprint .* against .*files of training or validation patients"):
            resume(other, state)
    else:
        assert resume(other, state)


def test_the_same_data_in_another_place_goes_on(root, state, tmp_path):
    assert resume(change(root, tmp_path / "moved"), state)


def test_without_a_manifest_names_and_sizes_tell(root, tmp_path):
    plain = change(root, tmp_path / "plain")
    (plain / "dataset.json").unlink()
    with pytest.warns(UserWarning, match=r"no dataset\.json"):
        data = PatientDataset(plain, "train", 16, None)
    before = data_header(data)["data_fingerprint"]
    assert data_header(data)["data_fingerprint"] == before
    patient = data.splits["val"][0]
    write_cube(plain / patient / f"{patient}.nii.gz", make_hu(9), cube_affine((0, 0, 0), 360.0, 64))
    assert data_header(data)["data_fingerprint"] != before


def test_a_checkpoint_of_an_earlier_version_goes_on_where_nothing_differs(root, state, tmp_path):
    old = load_checkpoint(state / "last.pt")
    for key in ("volumes", "data_fingerprint"):
        del old[key]
    save_checkpoint(tmp_path / "last.pt", old)
    assert resume(root, tmp_path)
    with pytest.raises(InputError, match="hu_window is not the data's"):
        resume(change(root, tmp_path / "other", hu_window=[-1024, 1024]), tmp_path)


def test_other_training_patients_of_the_same_split_are_named(root, state, tmp_path):
    old = load_checkpoint(state / "last.pt")
    save_checkpoint(tmp_path / "last.pt", {**old, "train_patients": ["p0", "x"]})
    with pytest.raises(InputError, match=r"train_patients differ \(only there: x; only in .*data: p1, p2\)"):
        resume(root, tmp_path)


def test_a_loss_that_cannot_be_computed_is_named_with_its_weight(root):
    config, _, _ = build(root)
    refuse_losses(config.loss, {"projection": "nothing"})
    with pytest.raises(InputError, match=r"loss\.multiscale_weight is 0\.3, but there is no aux: expected 0"):
        refuse_losses(config.loss, {"multiscale": "there is no aux"})


def test_a_run_that_is_refused_leaves_the_settings_of_the_folder_as_they_were(tmp_path):
    assert toy_task.main(toy_task.words(tmp_path, "training.num_epochs=1")) == 0
    before = read_json(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"training\.learning_rate 0\.002 -> 0\.1"):
        toy_task.main(toy_task.words(tmp_path, "training.num_epochs=1", "training.learning_rate=0.1"))
    assert read_json(tmp_path / "config.json") == before
