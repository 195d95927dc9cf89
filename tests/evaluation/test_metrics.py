"""The scores against scikit-image, plain numpy and closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from xray2ct.evaluation.statistics import paired_interval, summarise, t_interval
from xray2ct.metrics import error_statistics, psnr, psnr_slices, ssim_3d, ssim_uniform


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
    statistics = error_statistics(prediction - target)
    assert statistics == pytest.approx({"mae": offset, "rmse": offset, "bias": offset})
    assert error_statistics(target - prediction)["bias"] == pytest.approx(-offset)


def test_mae_rmse_and_bias_differ_as_their_definitions():
    error = torch.tensor([[300.0, -100.0], [0.0, 0.0]])
    assert error_statistics(error) == pytest.approx({"mae": 100.0, "rmse": math.sqrt(25000), "bias": 50.0})
    assert error_statistics(error[:0]) == {"mae": None, "rmse": None, "bias": None}


def test_mask_leaves_out_what_is_outside():
    prediction, target = volumes()
    mask = torch.zeros_like(target)
    mask[3:9, 2:, 5:20] = 1
    inside = np.s_[3:9, 2:, 5:20]
    expected = -10 * math.log10(((prediction - target)[inside].double() ** 2).mean())
    wild = torch.where(mask > 0, prediction, torch.full_like(prediction, 7.0))
    assert psnr(wild, target, mask) == pytest.approx(expected)
    with pytest.raises(ValueError, match="mask is empty"):
        psnr(prediction, target, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="mask has shape"):
        psnr(prediction, target, mask[1:])


def slices_by_loops(prediction, target, scale, peak):
    """The definition written out slice by slice."""
    a, b = ((v.numpy() * scale).astype(np.int32).astype(np.float64) for v in (prediction, target))
    axes = []
    for axis in range(3):
        scores = []
        for i in range(a.shape[axis]):
            mse = np.mean((a.take(i, axis) - b.take(i, axis)) ** 2)
            scores.append(100.0 if mse == 0 else 20 * math.log10(peak / math.sqrt(mse)))
        axes.append(np.mean(scores))
    return np.mean(axes)


def test_psnr_of_slices_equals_its_loops_with_identical_slices_at_100_db():
    prediction, target = volumes(noise=0.3)
    assert prediction.min() < 0  # truncation is towards zero
    expected = slices_by_loops(prediction, target, 2500, 4095)
    assert psnr_slices(prediction, target, 2500, 4095) == pytest.approx(expected, abs=1e-9)
    assert psnr_slices(prediction, target, 2500, 2500) == pytest.approx(expected - 20 * math.log10(4095 / 2500))
    padded = prediction.clone()
    padded[:4] = target[:4]
    assert psnr_slices(padded, target, 500, 4095) == pytest.approx(slices_by_loops(padded, target, 500, 4095), abs=1e-9)
    assert psnr_slices(padded, target, 2500, 4095) > expected + 4
    assert psnr_slices(target, target, 2500, 4095) == 100.0
    # Less than one unit of 2,500: the truncation makes the volumes equal.
    whole = torch.full((7, 7, 7), 0.5)
    assert psnr_slices(whole + 0.0003, whole, 2500, 4095) == 100.0


def test_peak_4095_reads_4_3_db_above_the_strict_definition():
    target = torch.full((8, 8, 8), 0.2, dtype=torch.float64)
    prediction = target + 0.1
    gain = psnr_slices(prediction, target, 2500, 4095) - psnr(prediction, target)
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


@pytest.mark.parametrize("shape", [(9, 40, 8), (33, 7, 12), (17, 9, 7), (22, 8, 8)])  # one slab, whole ones, remnants
def test_uniform_ssim_equals_scikit_image_slice_by_slice_and_in_3d(shape):
    metrics = pytest.importorskip("skimage.metrics")
    prediction, target = volumes(shape)
    x, y = prediction.double().numpy(), target.double().numpy()
    axes = []
    for axis in range(3):
        pairs = [(x.take(i, axis), y.take(i, axis)) for i in range(x.shape[axis])]
        axes.append(np.mean([metrics.structural_similarity(a, b, data_range=1.5) for a, b in pairs]))
    both = ssim_uniform(prediction, target, slices=1.5, volume=0.7)
    assert both["slices"] == pytest.approx(np.mean(axes), abs=1e-9)
    assert both["volume"] == pytest.approx(metrics.structural_similarity(x, y, data_range=0.7), abs=1e-9)
    assert ssim_uniform(prediction, target, slices=1.5) == {"slices": both["slices"]}
    assert ssim_uniform(prediction, target, volume=0.7) == {"volume": both["volume"]}
    assert ssim_uniform(target, target, 1.0, 1.0) == pytest.approx({"slices": 1.0, "volume": 1.0})


def test_uniform_ssim_needs_a_window():
    with pytest.raises(ValueError, match="at least 7"):
        ssim_uniform(torch.rand(9, 6, 9), torch.rand(9, 6, 9), slices=1.0)


SCORES = {
    "psnr": psnr,
    "psnr_slices": lambda x, y: psnr_slices(x, y, 2500, 4095),
    "ssim_3d": ssim_3d,
    "ssim_uniform": lambda x, y: ssim_uniform(x, y, slices=1.0),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
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


def test_the_interval_is_students():
    values = np.random.default_rng(4).normal(25.0, 2.0, size=12)
    expected = stats.ttest_1samp(values, 0.0)
    for confidence in (0.95, 0.5):
        assert t_interval(values, confidence) == pytest.approx(expected.confidence_interval(confidence))
    half = 12.706 * math.sqrt(2) / math.sqrt(2)  # t(0.975) of one degree of freedom, from a table
    assert t_interval([1.0, 3.0]) == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert t_interval([2.0, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("draw", "mean", "least"),
    [("normal", 0.0, 0.94), ("uniform", 0.5, 0.93), ("laplace", 0.0, 0.94), ("gamma", 4.0, 0.92)],
)
def test_the_interval_of_six_patients_covers_what_it_says(draw, mean, least):
    """Of 4,000 samples of six; a percentile bootstrap covers 0.87 of the normal ones. gamma(4): skewness 1."""
    shape = (4.0,) if draw == "gamma" else ()
    samples = getattr(np.random.default_rng(0), draw)(*shape, size=(4000, 6))
    covered = np.mean([low <= mean <= high for low, high in map(t_interval, samples)])
    assert least < covered < 0.97


def test_the_interval_needs_two_finite_values():
    assert t_interval([24.0]) is None
    assert t_interval([]) is None
    with pytest.raises(ValueError, match="finite"):
        t_interval([24.0, math.nan])


def test_paired_differences_see_what_separate_intervals_hide():
    patients = np.random.default_rng(2).normal(22.0, 3.0, size=12)
    better = patients + np.linspace(0.2, 0.6, 12)
    result = paired_interval(better, patients)
    assert result["mean"] == pytest.approx(0.4)
    assert result["n"] == 12
    assert 0.2 < result["ci95"][0] < 0.4 < result["ci95"][1] < 0.6
    separate = t_interval(better), t_interval(patients)
    assert separate[0][0] < separate[1][1]  # they overlap
    with pytest.raises(ValueError, match="12 values against 11"):
        paired_interval(better, patients[1:])


def test_patients_without_a_score_are_left_out_and_counted():
    rows = [{"id": "a", "bone": None}, {"id": "b", "bone": 2.0}, {"id": "c", "bone": 4.0}]
    table = summarise(rows)["bone"]
    assert (table["mean"], table["n"]) == (3.0, 2)
    assert table["ci95"] == list(t_interval([2.0, 4.0]))
    assert summarise(rows[:1])["bone"] == {"mean": None, "sd": None, "n": 0, "ci95": None}
    paired = paired_interval([None, 5.0, 6.0, 1.0], [1.0, 4.0, None, 4.0])
    assert (paired["mean"], paired["n"]) == (-1.0, 2)
    assert paired_interval([None], [1.0])["n"] == 0


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
    assert table["psnr"]["ci95"] == list(t_interval([20.0, 22.0, 27.0]))
    assert summarise(rows[:1])["psnr"] == {"mean": 20.0, "sd": None, "n": 1, "ci95": None}
    json.dumps(summarise(rows[:1]), allow_nan=False)
    with pytest.raises(ValueError, match="mae"):
        summarise([*rows, {"id": "d", "psnr": 20.0}])
    with pytest.raises(ValueError, match="no rows"):
        summarise([])
