"""Projection consistency against a dense solution, a perfect volume, and X-rays that do not fit."""

from types import SimpleNamespace

import pytest
import torch

from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry
from xray2ct.inference.consistency import Projection, consistent, make_consistent, steps_of

N = 6


def block(value=0.4):
    volume = torch.full((1, 1, N, N, N), value)
    volume[..., 2:4, 2:4] += 0.2
    return volume


@pytest.mark.parametrize("kind", ["cone", "parallel", "scout"])
def test_many_steps_solve_the_dense_normal_equations(kind):
    torch.manual_seed(0)
    acquisition, start = Acquisition(Geometry(kind)), block()
    project = Projection(acquisition, start.shape, N)
    xrays = project.render(start) + 0.002 * torch.randn(1, 2, N, N)
    basis = torch.eye(N**3).view(N**3, 1, N, N, N)
    matrix = project(basis).flatten(1).T.double()
    residual = (xrays - project.render(start)).flatten().double()
    damping = 0.2 * N**2 / N**3 * torch.eye(N**3, dtype=torch.float64)
    expected = torch.linalg.solve(matrix.T @ matrix + damping, matrix.T @ residual)
    moved = (consistent(start, xrays, acquisition, 60) - start).flatten().double()
    assert expected.abs().max() > 1e-4
    assert torch.allclose(moved, expected, atol=2e-5)


def test_a_perfect_volume_stays_and_another_comes_nearer():
    acquisition, truth = Acquisition(), block()
    truth[0, 0, 0] = 0.0  # thinner than air
    project = Projection(acquisition, truth.shape, N)
    xrays = project.render(truth)
    assert torch.allclose(consistent(truth, xrays, acquisition), truth, atol=1e-6)
    start = torch.full_like(truth, 0.4)
    near = consistent(start, xrays, acquisition, 4)
    assert (project.render(near) - xrays).abs().mean() < 0.8 * (project.render(start) - xrays).abs().mean()
    assert (near - truth).norm() < (start - truth).norm()


def test_a_film_that_does_not_fit_changes_nothing_and_is_noted():
    torch.manual_seed(0)
    system = SimpleNamespace(geometry=Geometry(), hu_window=(-1024.0, 1476.0), xray_scale=10.0, device="cpu")
    volume = block()
    same, notes = make_consistent(system, volume, torch.rand(1, 2, N, N), 4, measured=True)
    assert torch.equal(same, volume)
    assert len(notes) == 2
    assert all("not used" in note for note in notes)


def test_options():
    assert steps_of("off") == 0
    assert steps_of("7") == 7
    assert steps_of("auto") > 0
    with pytest.raises(InputError, match="--consistency is 'much'"):
        steps_of("much")
