"""Scale of two films: least squares against simulated patients, the lungs' box on renderings of an unseen CT."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xray2ct.imaging.film_scale import estimate, lung_box, solve

FILMS = Path(__file__).with_name("films")
MM = 360 / 128  # per pixel of the two renderings, in the patient
SIZES = np.log([230.0, 260.0, 180.0])
SPREAD = np.array([[0.014, 0.006, 0.005], [0.006, 0.006, 0.004], [0.005, 0.004, 0.009]])
ERRORS = np.diag([0.04, 0.03, 0.05, 0.06]) ** 2
STATISTICS = {"log_size": SIZES, "size_covariance": SPREAD, "error_covariance": ERRORS}


def film(view):
    return np.asarray(Image.open(FILMS / f"lidc_0001_{view}.png"), dtype=float)


def test_lungs_of_mean_size_give_the_scale_exactly():
    found = solve(np.array([230 / 0.5, 260 / 0.5, 230 / 0.7, 180 / 0.7]), STATISTICS)
    assert (found.pa_mm, found.lateral_mm) == pytest.approx((0.5, 0.7))
    assert (found.lung_height_mm, found.lung_width_mm, found.lung_depth_mm) == pytest.approx((230, 260, 180))
    assert "0.500 (PA) and 0.700 mm per pixel (lateral)" in found.note()


def test_the_stated_uncertainty_is_that_of_simulated_patients():
    random = np.random.default_rng(0)
    height, width, depth = random.multivariate_normal(SIZES, SPREAD, 4000).T
    measured = np.exp(
        np.stack([height, width, height, depth], 1) + random.multivariate_normal(np.zeros(4), ERRORS, 4000)
    )
    found = [solve(row / (0.5, 0.5, 0.7, 0.7), STATISTICS) for row in measured]
    errors = np.log([[one.pa_mm / 0.5, one.lateral_mm / 0.7] for one in found])
    assert errors.std(axis=0) == pytest.approx(found[0].relative_sd, rel=0.05)
    assert (errors[:, 0] - errors[:, 1]).std() == pytest.approx(found[0].ratio_sd, rel=0.05)
    assert np.abs(errors.mean(axis=0)).max() < 0.01
    assert found[0].ratio_sd < found[0].relative_sd[0]


def test_a_ct_that_the_network_has_not_seen():
    found = estimate(film("pa"), film("lat"))
    for mm, sd in zip((found.pa_mm, found.lateral_mm), found.relative_sd):
        assert abs(np.log(mm / MM)) < 2.5 * sd
    assert 0.02 < found.relative_sd[0] < 0.25
    larger = np.kron(film("pa"), np.ones((2, 2)))
    assert estimate(larger, film("lat")).pa_mm == pytest.approx(found.pa_mm / 2, rel=0.02)


@pytest.mark.parametrize("view", [0, 1])
def test_the_lungs_box_lies_within_the_film_and_does_not_mind_a_frame(view):
    pixels = film(("pa", "lat")[view])
    top, bottom, left, right = lung_box(pixels, view)
    assert 0 < top < bottom < 128
    assert 0 < left < right < 128
    framed = np.pad(pixels, 16, constant_values=255.0)
    assert np.subtract(lung_box(framed, view), 16) == pytest.approx((top, bottom, left, right), abs=0.05 * 128)
    assert 150 < (bottom - top) * MM < 340
