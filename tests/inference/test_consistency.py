"""Projection consistency against a dense solution, a perfect volume, air around a body, and X-rays that do not fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.helpers.tiny_data import make_checkpoint, make_dataset
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry
from xray2ct.inference.consistency import STEPS, consistent, how_of, make_consistent, prior_spread, steps_of
from xray2ct.inference.reconstruction import Pipeline
from xray2ct.inference.system import DirectSystem
from xray2ct.models.consistent_step import XrayResidual

N = 6
WINDOW = (-1024.0, 1476.0)
AIR = 24 / 2500  # -1000 HU


def block(value=0.4):
    volume = torch.full((1, 1, N, N, N), value)
    volume[..., 2:4, 2:4] += 0.2
    return volume


def cylinder(radius, n=24):
    """A patient of water along the first axis, ``radius`` voxels wide, in air: ``(1, 1, n, n, n)``."""
    axis = torch.arange(n) - (n - 1) / 2
    inside = (axis[:, None] ** 2 + axis**2).sqrt() < radius
    return torch.where(inside, 1024 / 2500, AIR).expand(1, 1, n, n, n).clone()


@pytest.mark.parametrize("kind", ["cone", "parallel", "scout"])
@pytest.mark.parametrize("views", [2, 1])
def test_many_steps_solve_the_dense_normal_equations(kind, views):
    """In float64, with the spread of errors and with pixels that count for a part or not at all."""
    torch.manual_seed(0)
    acquisition, start = Acquisition(Geometry(kind)), block()
    shares = torch.rand(1, views, N, N)
    shares[..., :2] = 0
    xrays = acquisition.render(start, (2 * N, 2 * N))[:, :views]
    xrays = torch.nn.functional.avg_pool2d(xrays, 2) + 0.002 * torch.randn(1, views, N, N)
    voxels = torch.eye(N**3).view(N**3, 1, N, N, N)
    empty = XrayResidual(torch.zeros(1, views, N, N), acquisition, (N,) * 3)
    matrix = (empty.rendered(voxels + AIR) - empty.rendered(torch.full_like(start, AIR))).flatten(1).T.double()
    share, spread = shares.flatten().double(), prior_spread(start, WINDOW).flatten().double()
    norm = 2 * (0.02 * 2.5 / 10 * 360 * N) ** 2 / N**3  # attenuation of 1 along 360 mm, twice, per voxel
    left = matrix.T @ (share[:, None] * matrix) / norm + torch.diag(0.12 / spread**2)
    residual = (xrays - empty.rendered(start)).flatten().double()
    expected = torch.linalg.solve(left, matrix.T @ (share * residual) / norm)
    moved = (consistent(start, xrays, acquisition, 60, 0.12, shares) - start).flatten().double()
    assert expected.abs().max() > 1e-4
    assert torch.allclose(moved, expected, atol=2e-5)


def test_the_spread_is_the_local_contrast_and_in_the_body_140_hu_besides():
    """Against SciPy's uniform filter; -975 HU, half way from air to where the body begins, counts half."""
    hu = np.random.default_rng(0).uniform(-900, 1000, (7, 8, 9))
    mean = ndimage.uniform_filter(hu, 3, mode="nearest")
    variance = ndimage.uniform_filter(hu**2, 3, mode="nearest") - mean**2
    volume = torch.from_numpy((hu + 1024) / 2500)[None, None]
    assert np.allclose(prior_spread(volume, WINDOW)[0, 0].numpy(), np.sqrt(variance + 140**2) / 140)
    narrow = torch.from_numpy((hu + 1000) / 2000)[None, None]
    assert torch.allclose(prior_spread(narrow, (-1000, 1000)), prior_spread(volume, WINDOW))
    for value, share in ((-1024, 0), (-1000, 0), (-975, 0.5), (-950, 1), (0, 1)):
        flat = torch.full((1, 1, 3, 3, 3), (value + 1024) / 2500, dtype=torch.float64)
        assert prior_spread(flat, WINDOW).mean().item() == pytest.approx(share, abs=1e-6)


def test_a_perfect_volume_stays_and_another_comes_nearer():
    acquisition, truth = Acquisition(), block()
    truth[0, 0, 0] = 0.0  # thinner than air
    residual = XrayResidual(torch.rand(1, 2, N, N), acquisition, (N,) * 3)
    xrays = residual.rendered(truth)
    assert torch.allclose(consistent(truth, xrays, acquisition), truth, atol=1e-6)
    start = torch.full_like(truth, 0.4)
    near = consistent(start, xrays, acquisition, 4)
    assert (residual.rendered(near) - xrays).abs().mean() < 0.8 * (residual.rendered(start) - xrays).abs().mean()
    assert (near - truth).norm() < (start - truth).norm()


def test_a_patient_predicted_too_thin_is_thickened_at_the_surface_and_the_air_around_stays_air():
    truth, start, acquisition = cylinder(9), cylinder(8), Acquisition()
    xrays = acquisition.render(truth, (48, 48))
    moved = consistent(start, xrays, acquisition)
    far = cylinder(11)[0, 0] == AIR
    assert (moved[0, 0][far] - AIR).abs().max() < 1e-6
    surface = (truth != start)[0, 0]
    assert (moved - start)[0, 0][surface].mean() > 3 * (moved - start)[0, 0][~surface & ~far].mean() > 0
    assert (moved - truth).abs().mean() < 0.9 * (start - truth).abs().mean()
    below = consistent(truth, 0.9 * xrays, acquisition)  # less than there is: no voxel becomes thinner than air
    assert below.min() >= AIR - 1e-7


def test_a_film_that_does_not_fit_changes_nothing_and_is_noted():
    torch.manual_seed(0)
    system = SimpleNamespace(geometry=Geometry(), hu_window=WINDOW, xray_scale=10.0, device="cpu")
    volume = block()
    same, notes = make_consistent(system, volume, torch.rand(1, 2, N, N), 4, measured=True)
    assert torch.equal(same, volume)
    assert len(notes) == 2
    assert all("not used" in note for note in notes)


def test_x_rays_count_where_they_are_seen_in_every_shape_that_a_system_takes():
    system = SimpleNamespace(geometry=Geometry(), hu_window=WINDOW, xray_scale=10.0, device="cpu")
    xrays = Acquisition(Geometry(), WINDOW, 10.0).render(block(), (N, N))
    seen = torch.ones_like(xrays)
    seen[..., 2:] = 0
    spoiled = torch.where(seen > 0, xrays, 0.9)

    def moved(*channels):
        return make_consistent(system, block(0.3), torch.stack(channels, dim=2), 4, measured=False)[0]

    plain, _ = make_consistent(system, block(0.3), xrays, 4, measured=False)
    assert not torch.equal(plain, block(0.3))
    for same in (moved(xrays), moved(xrays, torch.ones_like(xrays))):
        assert torch.equal(same, plain)
    assert torch.equal(moved(xrays, seen), moved(spoiled, seen))
    assert not torch.equal(moved(xrays, seen), plain)


def test_by_default_only_where_it_was_validated(tmp_path):
    shipped = DirectSystem("chest64", device="cpu")
    assert Pipeline(shipped).consistency_steps == STEPS
    assert Pipeline(shipped, "off").consistency_steps == 0
    tiny = DirectSystem(make_checkpoint(tmp_path / "base.pt", make_dataset(tmp_path / "data")), device="cpu")  # 16^3
    assert Pipeline(tiny).consistency_steps == 0
    assert Pipeline(tiny, 3).consistency_steps == 3


def test_options():
    assert steps_of("off") == steps_of("auto", validated=False) == 0
    assert steps_of("7", validated=False) == steps_of(7) == 7
    assert steps_of("auto") == STEPS > 0
    assert how_of(0) is None
    assert how_of(STEPS)["steps"] == STEPS
    with pytest.raises(InputError, match="--consistency is 'much'"):
        steps_of("much")
