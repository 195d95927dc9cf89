"""Perturbed exams against geometry and physics worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.tiny_data import make_hu
from xray2ct.evaluation import perturbations
from xray2ct.evaluation.perturbations import PERTURBATIONS, Exam
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry, hu_to_unit, unit_to_mu


def make_exam(hu=None, kind="cone", size=32) -> Exam:
    hu = make_hu(0, 64) if hu is None else hu
    volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32)))[None, None]
    return Exam(volume, Acquisition(Geometry(kind)), size, seed=3)


def ball(z=0.0, y=0.0, x=0.0, radius=40.0, size=64) -> np.ndarray:
    axis = ((np.arange(size) + 0.5) / size - 0.5) * 360
    zs, ys, xs = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    inside = (zs - z) ** 2 + (ys - y) ** 2 + (xs - x) ** 2 < radius**2
    return np.where(inside, 0.0, -1024.0)


def centre_mm(volume) -> list[float]:
    mass = volume[0, 0].double() - volume.min()
    axis = ((torch.arange(64) + 0.5) / 64 - 0.5) * 360
    others = ((1, 2), (0, 2), (0, 1))
    return [float((mass.sum(dim=dims) * axis).sum() / mass.sum()) for dims in others]


def test_shifts_and_turns_go_where_they_should():
    exam = make_exam(ball(x=60.0, z=-30.0))
    shifted = perturbations.patient_moved(exam, shift_mm=(10.0, 20.0, -5.0))
    assert centre_mm(shifted.truth) == pytest.approx([-20.0, 20.0, 55.0], abs=0.5)
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    turned = perturbations.moved(exam, degrees=30.0, axis="z")
    assert centre_mm(turned) == pytest.approx([-30.0, 60 * s, 60 * c], abs=0.5)
    leaned = perturbations.moved(exam, degrees=30.0, axis="x")  # z = -30, y = 0
    assert centre_mm(leaned) == pytest.approx([-30 * c, 30 * s, 60.0], abs=0.5)
    tilted = perturbations.moved(exam, degrees=30.0, axis="y")  # (x, z) = (60, -30)
    assert centre_mm(tilted) == pytest.approx([-60 * s - 30 * c, 0.0, 60 * c - 30 * s], abs=0.5)


def test_a_view_angle_changes_the_lateral_view_alone():
    exam = make_exam(ball(x=80.0), "parallel", 64)
    shown = perturbations.view_angle(exam, 5.0)
    assert torch.equal(shown.xrays[:, 0], exam.nominal[:, 0].clamp(0, 1))
    assert shown.truth is exam.volume
    columns = ((torch.arange(64) + 0.5) / 64 - 0.5) * 360
    lateral = shown.xrays[0, 1].sum(dim=0)
    assert float((lateral * columns).sum() / lateral.sum()) == pytest.approx(80 * math.sin(math.radians(5)), abs=0.5)


def test_a_farther_source_magnifies_less():
    exam = make_exam(ball(y=0.0, x=100.0, radius=30.0), size=128)
    columns = ((torch.arange(128) + 0.5) / 128 - 0.5) * exam.geometry.detector_mm

    def column(xrays):
        pa = xrays[0, 0].sum(dim=0)
        return float((pa * columns).sum() / pa.sum())

    assert column(exam.nominal) == pytest.approx(100 * 1800 / 1600, rel=0.01)
    far = perturbations.source_distance(exam, 1.1)  # 1,980 mm to the detector, 200 mm of them behind the isocentre
    assert column(far.xrays) / column(exam.nominal) == pytest.approx((1980 / 1780) / (1800 / 1600), rel=1e-3)


def test_twice_the_photons_lower_the_picture_by_log_two():
    exam = make_exam()
    shown = perturbations.exposure(exam, 2.0)
    bright = exam.nominal > 0.1
    difference = (exam.nominal - shown.xrays)[bright]
    assert torch.allclose(difference, torch.full_like(difference, math.log(2) / 10), atol=1e-6)


def test_a_perfect_detector_changes_nothing_and_noise_has_the_variance_of_photons():
    water = np.where(ball(radius=70.0) > -1000, 0.0, -1024.0)
    exam = make_exam(water, size=64)
    assert (perturbations.detector(exam).xrays - exam.nominal.clamp(0, 1)).abs().max() < 1e-4
    noisy = perturbations.detector(replace(exam, seed=1), photons_per_mm2=[1e4, 1e4])
    centre = (slice(None), slice(None), slice(28, 36), slice(28, 36))
    integral = exam.nominal[centre] * 10
    pixel_mm2 = (360 / 64) ** 2
    expected = (1e4 * pixel_mm2 * torch.exp(-integral)) ** -0.5  # of -log of a count: 1 / sqrt(count)
    deviates = (noisy.xrays - exam.nominal)[centre] * 10 / expected
    assert deviates.std() == pytest.approx(1.0, abs=0.2)  # of 128 values: +-0.06


def test_cut_rows_are_air_and_not_seen():
    exam = make_exam(size=40)
    shown = perturbations.cut_off(exam, (0.1, 0.2))
    assert not shown.seen[..., :4, :].any()
    assert not shown.seen[..., 32:, :].any()
    assert shown.seen[..., 4:32, :].all()
    assert not shown.xrays[..., :4, :].any()
    assert not shown.xrays[..., 32:, :].any()
    assert torch.equal(shown.xrays[..., 4:32, :], exam.nominal[..., 4:32, :].clamp(0, 1))


def test_two_arms_add_their_water_to_the_lateral_view():
    exam = make_exam(size=360)
    added = (perturbations.arms_down(exam).xrays - exam.nominal.clamp(0, 1))[0, :, 0]  # the top row: air behind
    path = added[1].max() * 10 / 0.02
    assert float(path) == pytest.approx(2 * (90 + 0.8 * 22), rel=0.02)  # two chords through the centres
    assert not added[0].any()


def test_couch_and_board():
    hu = make_hu(0, 64).astype(np.float32)
    hu[:, 58:60, 10:54] = 100.0  # a slab behind the body, in the cube
    exam = make_exam(hu)
    clean = perturbations.couch_removed(exam)
    assert unit_to_mu(clean.truth)[0, 0, :, 58:60].max() == 0
    assert unit_to_mu(exam.volume)[0, 0, :, 58:60].max() > 0.02
    inside = exam.patient
    assert torch.equal(clean.truth[inside], exam.volume[inside])
    padded = perturbations.board(make_exam())
    more = padded.truth != make_exam().volume
    rows = more[0, 0].any(dim=0).any(dim=1).nonzero().flatten()
    assert len(rows) == round(20 / 5.625) - round(5 / 5.625)
    assert (padded.xrays - make_exam().nominal).mean() > 0


def test_every_perturbation_shows_something_else():
    exam = make_exam(make_hu(0, 32), size=16)
    nominal = exam.nominal.clamp(0, 1)
    for name, one in PERTURBATIONS.items():
        for variant in one.variants:
            shown = variant(exam)
            assert (shown.xrays.shape, shown.truth.shape) == (nominal.shape, exam.volume.shape), name
            assert shown.xrays.isfinite().all(), name
            assert not torch.equal(shown.xrays, nominal), name
    possible = [name for name, one in PERTURBATIONS.items() if not one.possible(Geometry("parallel"))]
    assert possible == ["source distance off by 10 %", "arms in the lateral beam"]
