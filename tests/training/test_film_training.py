"""Training with simulated films: batches on demand, and settings that contradict them."""

import re

import pytest
import torch

from tests.helpers.paths import ROOT
from tests.helpers.runs import build
from xray2ct.files import InputError
from xray2ct.training.config import EnhancedConfig, load_config
from xray2ct.training.distributed import Processes
from xray2ct.training.precision import Precision
from xray2ct.training.validation_films import FILMS


def batch(root, *overrides):
    _, task, _ = build(root, *overrides)
    raw = {key: value[None] for key, value in task.train_data[0].items() if torch.is_tensor(value)}
    return raw, task.make_batch(raw, [3], torch.device("cpu"))


def test_films_change_the_xrays_and_take_the_couch_out_of_both(root):
    """The tiny patients have no couch, so the target stays as it is but for noise around the body."""
    raw, films = batch(root, "augment.film.probability=1")
    assert raw["body"].shape == (1, 1, 32, 32, 32)
    assert 0.3 < raw["body"].float().mean() < 0.7
    plain_raw, plain = batch(root)
    assert "body" not in plain_raw
    assert (films["xrays"] - plain["xrays"]).abs().mean() > 0.02
    assert (films["ct_volume"] - plain["ct_volume"]).abs().mean() < 0.01


def test_validation_scores_every_patient_as_the_same_films_each_time(root):
    _, task, model = build(root, "augment.film.probability=0.5", "augment.xray_noise=0.1")
    processes = Processes(device=torch.device("cpu"))
    clean = task.val_data[0]
    once, again = (list(task.val_films.batches(0, processes.device)) for _ in range(2))
    assert len(once) == FILMS
    for film, same in zip(once, again):
        assert torch.equal(film["xrays"], same["xrays"])
        assert (film["xrays"][0] - clean["xrays"]).abs().mean() > 0.02
        # Neither moved nor deformed, whatever augmentation does: the cubes differ by rounding and the air outside.
        assert (film["ct_volume"][0] - clean["ct_volume"]).abs().mean() < 0.01
    assert not torch.equal(once[0]["xrays"], once[1]["xrays"])
    rows = task.validate(model.eval(), processes, Precision("float32", processes.device))
    assert [row["id"] for row in rows] == task.val_data.ids
    for row in rows:
        assert row["psnr"] == pytest.approx((row["psnr_clean"] + row["psnr_film"]) / 2, abs=1e-4)
        assert row["psnr_clean"] != row["psnr_film"]


def test_validation_without_films_scores_renderings_alone(root):
    _, task, model = build(root)
    processes = Processes(device=torch.device("cpu"))
    (row, *_) = task.validate(model.eval(), processes, Precision("float32", processes.device))
    assert task.val_films is None
    assert "psnr_film" not in row


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.xray_source=files"], "augment.film.probability is 0.5, but X-rays are read from files"),
        (["loss.projection_weight=0.1"], "loss.projection_weight is 0.1, but simulated films"),
        (["augment.film.scatter_mm=[60, 25]"], "augment.film.scatter_mm is [60.0, 25.0]"),
    ],
)
def test_settings_that_films_contradict_are_refused(root, overrides, words):
    with pytest.raises(InputError, match=re.escape(words)):
        build(root, "augment.film.probability=0.5", *overrides)


def test_the_configuration_for_films_is_the_small_one_with_every_second_pair_a_film():
    plain, film = (load_config(EnhancedConfig, ROOT / "configs" / f"{name}.json") for name in ("cpu", "film"))
    assert film.augment.film.probability == 0.5
    film.augment.film.probability = 0.0
    assert film == plain
