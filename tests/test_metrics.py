"""The scores against scikit-image, plain numpy and closed forms."""

import json
import math

import numpy as np
import pytest
import torch

from metrics import (
    bootstrap_interval,
    mae_hu,
    paired_interval,
    psnr,
    psnr_x2ct,
    rmse_hu,
    score_volume,
    ssim_3d,
    ssim_slices,
    summarise,
)


def volumes(shape=(17, 19, 23), noise=0.1, dtype=torch.float32):
    generator = np.random.default_rng(0)
    target = generator.random(shape)
    target = (target + np.roll(target, 1, 0) + np.roll(target, 1, 1) + np.roll(target, 1, 2)) / 4
    prediction = target + noise * generator.standard_normal(shape)
    return torch.tensor(prediction, dtype=dtype), torch.tensor(target, dtype=dtype)


# ------------------------------------------------------------------------------------------------
# One volume


def test_psnr_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    prediction, target = volumes()
    expected = metrics.peak_signal_noise_ratio(target.double().numpy(), prediction.double().numpy(), data_range=1)
    assert psnr(prediction, target) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("offset", [0.5, 0.01])
def test_constant_offset_has_the_closed_form_scores(offset):
    _, target = volumes(dtype=torch.float64)
    prediction = target + offset
    assert psnr(prediction, target) == pytest.approx(-20 * math.log10(offset))
    assert psnr(prediction, target, peak=2.0) == pytest.approx(-20 * math.log10(offset) + 6.0206, abs=1e-4)
    assert mae_hu(prediction, target, (-1024, 1476)) == pytest.approx(2500 * offset)
    assert rmse_hu(prediction, target, (-200, 200)) == pytest.approx(400 * offset)


def test_mae_and_rmse_in_hu_differ_as_their_definitions():
    target = torch.zeros(2, 2, 2)
    prediction = target.clone()
    prediction[0, 0, 0] = 0.8
    assert mae_hu(prediction, target) == pytest.approx(250)
    assert rmse_hu(prediction, target) == pytest.approx(2500 * 0.8 / math.sqrt(8))


def test_mask_leaves_out_what_is_outside():
    prediction, target = volumes()
    mask = torch.zeros_like(target)
    mask[3:9, 2:, 5:20] = 1
    inside = np.s_[3:9, 2:, 5:20]
    expected = -10 * math.log10(((prediction - target)[inside].double() ** 2).mean())
    wild = torch.where(mask > 0, prediction, torch.full_like(prediction, 7.0))
    assert psnr(wild, target, mask) == pytest.approx(expected)
    assert mae_hu(wild, target, mask=mask) == pytest.approx(
        2500 * (prediction - target)[inside].abs().double().mean().item()
    )
    with pytest.raises(ValueError, match="mask is empty"):
        psnr(prediction, target, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="mask has shape"):
        psnr(prediction, target, mask[1:])


def x2ct_by_loops(prediction, target):
    """The protocol written out slice by slice."""
    a, b = ((np.clip(v.numpy(), 0, 1) * 2500).astype(np.int32).astype(np.float64) for v in (prediction, target))
    axes = []
    for axis in range(3):
        scores = []
        for i in range(a.shape[axis]):
            mse = np.mean((a.take(i, axis) - b.take(i, axis)) ** 2)
            scores.append(100.0 if mse == 0 else 20 * math.log10(4095 / math.sqrt(mse)))
        axes.append(np.mean(scores))
    return np.mean(axes)


def test_x2ct_protocol_equals_its_loops_with_identical_slices_at_100_db():
    prediction, target = volumes(noise=0.3)
    assert prediction.min() < 0  # clipping matters
    assert prediction.max() > 1
    assert psnr_x2ct(prediction, target) == pytest.approx(x2ct_by_loops(prediction, target), abs=1e-9)
    padded = prediction.clone()
    padded[:4] = target[:4]
    assert psnr_x2ct(padded, target) == pytest.approx(x2ct_by_loops(padded, target), abs=1e-9)
    assert psnr_x2ct(padded, target) > psnr_x2ct(prediction, target) + 4
    assert psnr_x2ct(target, target) == 100.0
    # Less than one unit of 2,500: the truncation makes the volumes equal.
    whole = torch.full((7, 7, 7), 0.5)
    assert psnr_x2ct(whole + 0.0003, whole) == 100.0


def test_x2ct_reads_4_3_db_above_the_strict_definition():
    target = torch.full((8, 8, 8), 0.2, dtype=torch.float64)
    prediction = target + 0.1
    gain = psnr_x2ct(prediction, target) - psnr(prediction, target)
    assert gain == pytest.approx(20 * math.log10(4095 / 2500), abs=0.02)


def test_ssim_3d_equals_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for shape in ((11, 12, 13), (17, 19, 23), (75, 12, 11)):  # one slab and several
        prediction, target = volumes(shape)
        expected = metrics.structural_similarity(prediction.double().numpy(), target.double().numpy(), **options)
        assert ssim_3d(prediction, target) == pytest.approx(expected, abs=1e-9)
    assert ssim_3d(target, target) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="expected at least"):
        ssim_3d(prediction[:10], target[:10])


def test_ssim_slices_equals_scikit_image_slice_by_slice():
    metrics = pytest.importorskip("skimage.metrics")
    prediction, target = volumes((9, 40, 8))
    prediction = prediction.clamp(0, 1)
    x, y = prediction.double().numpy(), target.double().numpy()
    axes = []
    for axis in range(3):
        pairs = [(x.take(i, axis), y.take(i, axis)) for i in range(x.shape[axis])]
        axes.append(np.mean([metrics.structural_similarity(a, b, data_range=1.0) for a, b in pairs]))
    assert ssim_slices(prediction, target) == pytest.approx(np.mean(axes), abs=1e-9)
    assert ssim_slices(target, target) == pytest.approx(1.0)
    assert ssim_slices(target.round() * 2 - 0.5, target.round()) == pytest.approx(1.0)  # clipped to [0, 1]


def test_scores_of_one_volume_are_complete_and_finite():
    prediction, target = volumes((12, 12, 12))
    mask = torch.ones_like(target)
    mask[:, :, 6:] = 0
    row = score_volume(prediction, target, mask, (-1024, 1476))
    assert list(row) == [
        "psnr_strict",
        "psnr_strict_masked",
        "psnr_x2ct",
        "ssim_3d",
        "ssim_slices",
        "mae_hu",
        "rmse_hu",
    ]
    assert row["psnr_strict"] == psnr(prediction, target)
    assert row["psnr_strict_masked"] == psnr(prediction, target, mask)
    assert row["psnr_strict_masked"] != row["psnr_strict"]
    assert row["mae_hu"] < row["rmse_hu"]
    perfect = score_volume(target, target)
    assert perfect["psnr_strict"] == perfect["psnr_strict_masked"] == perfect["psnr_x2ct"] == 100.0
    json.dumps([row, perfect], allow_nan=False)


@pytest.mark.parametrize("score", [psnr, psnr_x2ct, ssim_3d, ssim_slices, mae_hu, rmse_hu])
def test_what_cannot_be_scored_is_an_error(score):
    prediction, target = volumes((12, 12, 12))
    with pytest.raises(ValueError, match="expected two volumes"):
        score(prediction[None], target[None])
    with pytest.raises(ValueError, match="expected two volumes"):
        score(prediction[1:], target)
    prediction[3, 4, 5] = math.nan  # must never pass for a perfect score
    with pytest.raises(ValueError, match="NaN"):
        score(prediction, target)


# ------------------------------------------------------------------------------------------------
# Statistics


def test_bootstrap_interval_is_seeded_and_close_to_the_normal_one():
    values = np.random.default_rng(4).normal(25.0, 2.0, size=200)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_bootstrap_interval_of_two_values_is_known():
    # Resampled means are 1, 2 and 3 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap_interval([1.0, 3.0]) == (1.0, 3.0)
    assert bootstrap_interval([1.0, 3.0], confidence=0.4) == (2.0, 2.0)
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_bootstrap_interval_needs_two_finite_values():
    assert bootstrap_interval([24.0]) is None
    assert bootstrap_interval([]) is None
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([24.0, math.nan])


def test_paired_differences_see_what_separate_intervals_hide():
    patients = np.random.default_rng(2).normal(22.0, 3.0, size=12)
    better = patients + np.linspace(0.2, 0.6, 12)
    result = paired_interval(better, patients)
    assert result["mean"] == pytest.approx(0.4)
    assert result["n"] == 12
    assert 0.2 < result["ci95"][0] < 0.4 < result["ci95"][1] < 0.6
    separate = bootstrap_interval(better), bootstrap_interval(patients)
    assert separate[0][0] < separate[1][1]  # they overlap
    with pytest.raises(ValueError, match="12 values against 11"):
        paired_interval(better, patients[1:])


def test_summary_has_mean_sample_deviation_and_n():
    rows = [
        {"id": "a", "psnr": 20.0, "mae": 1},
        {"id": "b", "psnr": 22.0, "mae": 4},
        {"id": "c", "psnr": 27.0, "mae": 4},
    ]
    table = summarise(rows)
    assert list(table) == ["psnr", "mae"]
    assert table["psnr"]["mean"] == pytest.approx(23.0)
    assert table["psnr"]["sd"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert table["psnr"]["n"] == 3
    assert 20.0 <= table["psnr"]["ci95"][0] < 23.0 < table["psnr"]["ci95"][1] <= 27.0
    assert summarise(rows[:1])["psnr"] == {"mean": 20.0, "sd": None, "n": 1, "ci95": None}
    json.dumps(summarise(rows[:1]), allow_nan=False)
    with pytest.raises(ValueError, match="mae"):
        summarise([*rows, {"id": "d", "psnr": 20.0}])
    with pytest.raises(ValueError, match="no rows"):
        summarise([])
