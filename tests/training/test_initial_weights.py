"""``--init``: a run begins with another's weights, says so, and refuses those that are not this network's or data's."""

import re

import pytest
import torch

from tests.helpers.runs import assert_same_tensors, build, command, run
from tests.helpers.tiny_data import make_checkpoint
from xray2ct.checkpoints import load_checkpoint, weights_fingerprint
from xray2ct.files import InputError
from xray2ct.training.distributed import Processes
from xray2ct.training.initial_weights import start_from
from xray2ct.training.run_identity import check_same_run
from xray2ct.training.trainer import Trainer


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base.pt", root, epoch=7)


def test_the_run_begins_with_the_checkpoints_weights_and_average(root, base, tmp_path):
    config, task, model = build(root)
    line = start_from(base, model, task)
    stored = load_checkpoint(base)["model_state_dict"]
    assert_same_tensors(model.state_dict(), stored)
    assert f"{base} (epoch 7, {weights_fingerprint(stored)})" in line
    trainer = Trainer(model, task, config, tmp_path, Processes())
    assert_same_tensors(trainer.best_weights.state_dict(), stored)
    assert trainer.updates == 0
    assert trainer.checkpoint()["init"] == {"fingerprint": weights_fingerprint(stored), "epoch": 7}


def test_patients_of_the_earlier_training_count_as_seen(root, tmp_path):
    base = make_checkpoint(tmp_path / "base.pt", root, train_patients=["p1", "elsewhere"])
    _, task, model = build(root)
    start_from(base, model, task)
    assert task.header()["train_patients"] == ["p0", "p1", "p2", "elsewhere"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"base_channels": 32}}, "its model.base_channels is 32, this run's is 16; expected the same"),
        ({"hu_window": [-1024.0, 1024.0]}, "hu_window is not the data's"),
        ({"xray_scale": 5.0}, "xray_scale is not the data's"),
        ({"train_patients": ["p3"]}, "was trained on p3, validation patients of this data set"),
        ({"kind": "baseline_unet"}, "is a checkpoint of 'baseline_unet'; expected 'enhanced_direct'"),
    ],
)
def test_other_weights_are_refused_by_what_differs(root, tmp_path, changes, words):
    base = make_checkpoint(tmp_path / "base.pt", root, **changes)
    _, task, model = build(root)
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    with pytest.raises(InputError, match=re.escape(words)):
        start_from(base, model, task)
    assert_same_tensors(model.state_dict(), before)


def test_activation_checkpointing_may_differ(root, base):
    _, task, model = build(root, "model.activation_checkpointing=true")
    start_from(base, model, task)


def test_a_resumed_run_wants_the_same_beginning(root, base, tmp_path):
    config, task, model = build(root)
    start_from(base, model, task)
    trainer = Trainer(model, task, config, tmp_path, Processes())
    trainer.save_last()
    check_same_run("last.pt", load_checkpoint(tmp_path / "last.pt"), task.header(), config)
    _, plain, _ = build(root)
    with pytest.raises(InputError, match=r"began with other weights \(--init\)"):
        check_same_run("last.pt", load_checkpoint(tmp_path / "last.pt"), plain.header(), config)


def test_settings_of_a_later_version_count_as_their_defaults(root, tmp_path):
    """A run that began before films were simulated goes on, as long as they are off."""
    config, task, model = build(root)
    Trainer(model, task, config, tmp_path, Processes()).save_last()
    old = load_checkpoint(tmp_path / "last.pt")
    del old["config"]["augment"]["film"]
    check_same_run("last.pt", old, task.header(), config)
    config.augment.film.probability = 0.5
    with pytest.raises(InputError, match=r"augment.film.probability 0.0 -> 0.5"):
        check_same_run("last.pt", old, task.header(), config)


def test_the_command_trains_films_from_a_checkpoint_and_resumes(root, base, tmp_path):
    """As a user starts it: films in the batches, the line in the output, the facts in best_model.pt."""
    words = command(root, tmp_path / "run", "augment.film.probability=0.5", "training.num_epochs=1")
    done = run([*words, "--init", str(base)])
    assert done.returncode == 0, done.stderr
    assert "Initial weights: " in done.stdout
    best = load_checkpoint(tmp_path / "run" / "best_model.pt")
    assert best["init"]["epoch"] == 7
    assert best["config"]["augment"]["film"]["probability"] == 0.5
    again = run([*words, "--init", str(base)])
    assert again.returncode == 0, again.stderr
    assert "Nothing to do" in again.stdout
