"""The factor on samples' standard deviations: Gaussian toys whose right factor is known, and files that do not fit."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from xray2ct.evaluation.statistics import coverage
from xray2ct.files import InputError, write_json
from xray2ct.inference.sample_calibration import SampleCalibration, fit, read_sample_calibration

WEIGHTS = {"low": "abc", "high": "def"}
SAMPLING = {"steps": 25}


def toy(samples, ratio, seed, voxels=200_000):
    """Samples N(0, sd^2) of voxels with different sd, and truths N(0, (ratio sd)^2): mean, sd of samples, truth."""
    random = np.random.default_rng(seed)
    sd = random.uniform(10, 100, voxels)
    draws = sd * random.standard_normal((samples, voxels))
    return draws.mean(0), draws.std(0, ddof=1), ratio * sd * random.standard_normal(voxels)


def fitted(samples, ratio, seed=0):
    mean, std, truth = toy(samples, ratio, seed)
    return fit(np.abs(mean - truth) / std, samples, SAMPLING, None, WEIGHTS)


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.7])
def test_the_factor_of_one_number_of_samples_is_right_for_others(ratio):
    calibration = fitted(6, ratio)
    assert calibration.spread_ratio == pytest.approx(ratio, rel=0.02)
    for samples in (4, 6, 16):
        other = calibration.for_samples(samples)
        mean, std, truth = (torch.from_numpy(values).view(20, 100, 100) for values in toy(samples, ratio, 1))
        covered = coverage(mean, other.factor * std, truth)["coverage_1sd"]
        wide = coverage(mean, other.factor95 * other.factor * std, truth)["coverage_1sd"]
        assert covered == pytest.approx(0.6827, abs=0.008)
        assert wide == pytest.approx(0.9545, abs=0.008)


def test_a_perfect_model_needs_no_more_than_students_t():
    """For 8 samples 1.0767 sqrt(1 + 1 / 8); for many none, and twice the standard deviation for 95 %."""
    perfect = SampleCalibration(8, 1.142, 2.26, 1.0, SAMPLING, None, WEIGHTS)
    assert fitted(8, 1.0).factor == pytest.approx(stats.t(7).ppf(0.84135) * math.sqrt(1.125), rel=0.01)
    assert fitted(8, 1.0).factor95 == pytest.approx(stats.t(7).ppf(0.97725) / stats.t(7).ppf(0.84135), rel=0.01)
    many = perfect.for_samples(5000)
    assert (many.factor, many.factor95) == pytest.approx((1.0, 2.0), abs=0.01)
    assert perfect.for_samples(8) is perfect


def test_samples_that_are_all_the_same_have_no_factor():
    ratio = np.where(np.arange(1000) < 60, np.inf, 1.0)  # 6 % of the voxels
    with pytest.raises(InputError, match=r"6\.0% of the body's voxels are the same in all 8 samples"):
        fit(ratio, 8, SAMPLING, None, WEIGHTS)
    assert fit(np.r_[ratio[60:], np.inf], 8, SAMPLING, None, WEIGHTS).factor == 1.0


def test_a_file_is_used_for_what_it_is_of_alone(tmp_path):
    path = tmp_path / "std_calibration.json"
    good = SampleCalibration(8, 1.5, 2.4, 1.2, SAMPLING, None, WEIGHTS).to_dict()

    def read(weights=WEIGHTS, samples=8, sampling=SAMPLING, consistency=None, **changes):
        write_json(path, {**good, **changes})
        return read_sample_calibration(path, weights, samples, sampling, consistency)

    found, why = read_sample_calibration(path, WEIGHTS, 8, SAMPLING, None)
    assert found is None
    assert "there is no" in why
    found, why = read()
    assert (found.factor, found.factor95, why) == (1.5, 2.4, "")
    assert read(samples=32)[0].factor == pytest.approx(math.sqrt(1.2**2 + 1 / 32) * stats.t(31).ppf(0.84135))
    for options, words in (
        ({"weights": {"low": "abc"}}, "stages ['low', 'high'], these are with ['low']"),
        ({"sampling": {"steps": 10}}, "steps 25, these are with 10"),
        ({"consistency": {"steps": 4}}, "consistency None, these are with {'steps': 4}"),
        ({"sampling": {**SAMPLING, "guidance": 1}}, "guidance None, these are with 1"),
    ):
        found, why = read(**options)
        assert found is None
        assert words in why
    with pytest.raises(InputError, match=r"other weights of stage high \(def, these are new\)"):
        read(weights={"low": "abc", "high": "new"})
    wrong = ({"format": 2}, {"factor": 0}, {"factor95": "wide"}, {"spread_ratio": None}, {"samples": 1})
    for changes in (*wrong, {"weights": ["abc"]}, {"sampling": 25}, {"patients": 3}):
        write_json(path, {**good, **changes})
        with pytest.raises(InputError, match=r"is not what tools/calibrate\.py --cascade writes"):
            read_sample_calibration(path, WEIGHTS, 8, SAMPLING, None)
    path.write_text("[]")
    with pytest.raises(InputError, match="is not what"):
        read_sample_calibration(path, WEIGHTS, 8, SAMPLING, None)
