"""The benchmark of films: its pictures are what their names say, its scores are right, its table counts refusals."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import film_benchmark
from tools.film_benchmark import best_psnr
from tools.film_cases import CASES, Rendering, detected, displayed, make_case, moved
from tools.model_card import film_table
from xray2ct.files import InputError, read_json
from xray2ct.metrics import psnr


@pytest.fixture(scope="module")
def rendering():
    """A smooth body before air, 72 pixels of 5 mm, of which the CT covers 60 rows."""
    axis = np.linspace(-1, 1, 72)
    body = [5 * np.exp(-((axis[None] / width) ** 4 + (axis[:, None] / 1.2) ** 4)) for width in (0.8, 0.6)]
    return Rendering(np.stack([view + 0.5 * (np.roll(axis, 9)[None] > 0.7) for view in body]), 5.0, (6, 66))


def case(name, rendering, seed=0):
    return make_case(name, rendering, "p1", seed)


def test_pictures_follow_from_case_patient_and_seed(rendering):
    for name in CASES:
        one, two = case(name, rendering), case(name, rendering)
        assert all(np.array_equal(a, b) for a, b in zip(one, two))
    changed = [make_case("display", rendering, "p2", 0), make_case("display", rendering, "p1", 1)]
    assert all(not np.array_equal(case("display", rendering)[0], other[0]) for other in changed)


def test_the_signal_of_thicker_matter_is_larger_and_bent():
    """Uniform slabs of 2, 4 and 6 attenuation lengths: increasing, but less than in proportion (hardening, scatter)."""
    slabs = [detected(np.full((24, 24), depth), 5.0, np.random.default_rng(0)).mean() for depth in (2.0, 4.0, 6.0)]
    assert slabs == sorted(slabs)
    assert slabs[2] - slabs[1] < slabs[1] - slabs[0] < 2.0


def test_a_display_uses_all_of_its_grey_levels(rendering):
    shown = displayed(rendering.integrals[0], 5.0, np.random.default_rng(1))
    assert (shown.dtype, shown.min(), shown.max()) == (np.uint8, 0, 255)


def test_cases_do_what_they_are_called(rendering):
    def of(name, maker):
        """A case and the plain film of the same draws."""
        key = [0, list(CASES).index(name), *b"p1"]
        return case(name, rendering), CASES[maker](rendering, np.random.default_rng(key))

    changed, plain = of("inverted", "display")
    assert all(np.array_equal(a, 255 - b) for a, b in zip(changed, plain))
    changed, plain = of("swapped", "display")
    assert np.array_equal(changed[0], plain[1])
    assert np.array_equal(changed[1], plain[0])
    changed, plain = of("mirrored", "display")
    assert np.array_equal(changed[0], plain[0])
    assert np.array_equal(changed[1], plain[1][:, ::-1])
    changed, plain = of("frame", "display")
    assert np.array_equal(changed[0][20:-20, 20:-20], plain[0])
    assert (changed[0][:14] == 255).all()
    assert (changed[0][14:20, 14:-14] == 0).all()
    changed, plain = of("collimated", "display")
    assert (changed[0][:6] == 0).all()
    assert np.array_equal(changed[0][15:-15, 15:-15], plain[0][15:-15, 15:-15])
    changed, plain = of("marker", "display")
    assert 20 < (changed[0] != plain[0]).sum() < 400


def test_films_end_with_the_ct_and_the_clean_case_is_the_rendering(rendering):
    assert case("display", rendering)[0].shape == (60, 72)
    assert np.allclose(case("no couch", rendering)[1] * 10, rendering.integrals[1])


@pytest.mark.parametrize(("across", "scale"), [(20.0, 1.0), (0.0, 1.07)])
def test_films_move_by_millimetres(rendering, across, scale):
    """20 mm are 4 pixels to the right, 7 % more is wider."""
    rows = rendering.integrals[0][36], moved(rendering, 0, across_mm=across, scale=scale)[36]
    (left, right), (new_left, new_right) = (np.flatnonzero(row > 2.5)[[0, -1]] for row in rows)
    assert new_right - new_left == pytest.approx(scale * (right - left), abs=1.5)
    assert (new_left + new_right) / 2 == pytest.approx((left + right) / 2 + across / 5, abs=1)


def test_best_psnr_moves_volumes_to_fit():
    """Against trying every shift one by one."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(16, 16, 16)
    target[4:11, 5:12, 4:12] = torch.rand(7, 7, 8, generator=generator)
    moved = torch.roll(target, (2, -3, 1), dims=(0, 1, 2))
    assert best_psnr(target, target, reach=3) == 100.0
    assert psnr(moved, target) < 20
    assert best_psnr(moved, target, reach=3) > 90
    other = (moved + 0.1 * torch.rand(16, 16, 16, generator=generator) * (moved > 0)).clamp(0, 1)
    padded = torch.nn.functional.pad(target, [3] * 6)
    errors = []
    for shift in np.ndindex(7, 7, 7):
        candidate = torch.zeros(22, 22, 22)
        z, y, x = shift
        candidate[z : z + 16, y : y + 16, x : x + 16] = other
        errors.append((candidate - padded).square().sum().item() / 16**3)
    assert best_psnr(other, target, reach=3) == pytest.approx(-10 * math.log10(min(errors)), abs=1e-4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("benchmark") / "data")


def words(root, *checkpoints, output, options=()):
    given = [word for path in checkpoints for word in ("--checkpoint", str(path))]
    return ["--data", str(root), *given, "--output", str(output), "--max-patients", "1", *options]


def test_the_command_scores_networks_side_by_side_and_counts_refusals(root, tmp_path, capsys):
    base = make_checkpoint(tmp_path / "base.pt", root)
    cases = [word for name in ("clean", "display", "swapped") for word in ("--case", name)]
    options = ["--normalization", "manifest", "--normalization", "auto", "--films", str(tmp_path / "films"), *cases]
    assert film_benchmark.main(words(root, base, base, output=tmp_path / "out", options=options)) == 0
    result = read_json(tmp_path / "out" / "film_benchmark.json")
    names = [network["name"] for network in result["networks"]]
    assert [name.rsplit(", ", 1)[1] for name in names] == ["manifest", "auto"]
    assert [entry["case"] for entry in result["table"]] == ["clean", "display", "swapped"]
    clean = result["table"][0][names[0]]
    assert clean["patients"] == 1
    assert clean["refused"] == 0
    assert 0 < clean["psnr"] <= clean["psnr_moved"] + 1e-6
    for row in result["rows"]:
        assert ("psnr" in row) != ("refused" in row)
    for entry in result["table"]:
        for name in names:
            own = [r for r in result["rows"] if (r["case"], r["network"]) == (entry["case"], name)]
            assert entry[name]["refused"] == sum("refused" in row for row in own)
    text = (tmp_path / "out" / "film_benchmark.md").read_text(encoding="utf-8")
    assert text.endswith(capsys.readouterr().out)
    with Image.open(tmp_path / "films" / "p4_display_pa.png") as picture:
        assert picture.mode == "L"


def test_the_table_shows_scores_and_refusals_of_every_network():
    scores = {"psnr": 21.694, "psnr_moved": 22.021, "refused": 1, "patients": 8}
    cases = {"log": {"a": scores, "b": {**scores, "refused": 0}}}
    cases["turned"] = {"a": scores, "b": {"psnr": None, "psnr_moved": None, "refused": 8, "patients": 8}}
    assert film_table("film", ["b", "a"], cases).splitlines() == [
        "| film | b | a |",
        "| --- | --- | --- |",
        "| log | 21.69 (22.02) | 21.69 (22.02); 1 of 8 refused |",
        "| turned | 8 of 8 refused | 21.69 (22.02); 1 of 8 refused |",
    ]


def test_clean_is_what_evaluation_scores(root, tmp_path):
    """The data set's own pair and volume: the same PSNR as of the network applied by hand."""
    from dataset import PatientDataset
    from xray2ct.inference.reconstruction import load_pipeline

    base = make_checkpoint(tmp_path / "base.pt", root)
    options = ["--normalization", "manifest", "--case", "clean"]
    film_benchmark.main(words(root, base, output=tmp_path, options=options))
    row = read_json(tmp_path / "film_benchmark.json")["rows"][0]
    item = PatientDataset(root, "test", 16, 64)[0]
    expected = psnr(load_pipeline(base).predict(item["xrays"]), item["ct_volume"][0])
    assert row["psnr"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"train_patients": ["p4"]}, [], "was trained on p4, which it would be scored on"),
        ({"hu_window": [-1024.0, 1024.0]}, [], "hu_window is not the data's"),
        ({}, ["--normalization", "auto"] * 2, "--normalization is given 2 times; expected once, or once per"),
    ],
)
def test_networks_that_cannot_be_compared_are_refused(root, tmp_path, changes, options, message):
    base = make_checkpoint(tmp_path / "base.pt", root, **changes)
    with pytest.raises(InputError, match=message):
        film_benchmark.main(words(root, base, output=tmp_path, options=options))
