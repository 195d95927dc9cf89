"""Smooth warps: against torch's own grids, the statistics of displacements, axes and components in their order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.data.test_augment import centroid_mm
from tests.helpers.interpreter import check_in_interpreter
from xray2ct.data import warp as warp_module
from xray2ct.data.augment import AugmentConfig, random_affine, random_displacement
from xray2ct.data.sample_random import SampleRandom
from xray2ct.data.warp import DensityChange, SmoothWarp, control_weights

FOV = 360.0
SAME = DensityChange(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), air=0.0)


def field_by_torch(displacement, shape):
    """The displacement of every voxel ``(B, D, H, W, 3)`` by torch's own trilinear upsampling, twice."""
    field = displacement.permute(0, 4, 1, 2, 3)
    for size in ([2 * displacement.shape[1]] * 3, shape):
        field = F.interpolate(field, size=size, mode="trilinear", align_corners=True)
    return field.permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize("shape", [(32, 32, 32), (12, 20, 17)])
@pytest.mark.parametrize("slab_bytes", [1, 30_000, 2**30])
def test_a_warp_is_torchs_affine_grid_plus_the_upsampled_displacement(shape, slab_bytes, monkeypatch):
    monkeypatch.setitem(warp_module.SLAB_BYTES, "cpu", slab_bytes)
    random, config = SampleRandom([3, 4]), AugmentConfig(elastic_mm=20.0)
    theta, displacement = random_affine(config, FOV, random), random_displacement(config, FOV, random)
    volumes = random.uniform("volume", (1, *shape))
    for moved in (displacement, None):
        grid = F.affine_grid(theta, volumes.shape, align_corners=False)
        grid = grid if moved is None else grid + field_by_torch(moved, shape)
        expected = F.grid_sample(volumes, grid, align_corners=False)
        assert torch.allclose(SmoothWarp(theta, moved, shape).sample(volumes, SAME), expected, atol=3e-5)
        cells = F.adaptive_avg_pool3d(grid.permute(0, 4, 1, 2, 3), 4).permute(0, 2, 3, 4, 1)
        if shape[0] == 32:  # whole cells
            found = SmoothWarp(theta, moved, shape).sample_cells(volumes, (4, 4, 4))
            assert torch.allclose(found, F.grid_sample(volumes, cells, align_corners=False), atol=3e-5)


def test_density_is_stretched_and_shifted_above_air():
    """Values by hand: air at 0.1, +50 %, offset 0.04 that fades out below 0.2 above air."""
    volumes = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5, 0.9]).view(1, 1, 1, 1, 6)
    change = DensityChange(torch.full((1, 1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1, 1), 0.04), air=0.1)
    expected = [0.0, 0.1, 0.1 + 0.15 + 0.02, 0.1 + 0.3 + 0.04, 0.1 + 0.6 + 0.04, 1.0]
    assert change(volumes).flatten().tolist() == pytest.approx(expected, abs=1e-6)


TRITON = """
import torch
from xray2ct.data import warp_triton
from xray2ct.data.sample_random import SampleRandom
from xray2ct.data.augment import AugmentConfig, random_affine, random_displacement
from xray2ct.data.warp import DensityChange, SmoothWarp
warp_triton.TILE = (4, 8)  # several tiles along both axes of these small sizes
random = SampleRandom([3, 4])
theta = random_affine(AugmentConfig(mirror_probability=0.5), 360.0, random)
moved = random_displacement(AugmentConfig(elastic_mm=20.0, elastic_points=3), 360.0, random)
one = (1, 1, 1, 1)
change = DensityChange(random.uniform("a", one, -0.3, 0.3), random.uniform("b", one, -0.1, 0.1), 0.01)
for shape, displacement, coded in (((3, 6, 9), moved, True), ((2, 3, 7), None, False)):
    volumes = random.uniform("volume", (1, *shape))
    volumes = volumes.mul(65535).round().to(torch.uint16) if coded else volumes
    warp = SmoothWarp(theta, displacement, shape)
    found, expected = warp_triton.warp(volumes, *warp.expanded(), change), warp.sample(volumes, change)
    assert found.shape == volumes.shape and expected.std() > 0.1
    assert torch.allclose(found, expected, atol=3e-5), (found - expected).abs().max()
print("equal")
"""


def test_the_triton_kernel_is_torchs_sampling_and_the_change():
    check_in_interpreter(TRITON)


def test_shares_of_control_points_sum_to_one_and_keep_lines():
    weights = control_weights(5, 33, "cpu")
    assert torch.allclose(weights.sum(0), torch.ones(33))
    assert torch.allclose(torch.linspace(-3.0, 7.0, 5) @ weights, torch.linspace(-3.0, 7.0, 33), atol=1e-5)
    assert (weights >= 0).all()


def test_displacements_have_the_deviation_that_their_control_points_give():
    """The standard deviation at a voxel is elastic_mm times the root of the squared shares' sum, along each axis."""
    config, size = AugmentConfig(elastic_mm=8.0, elastic_points=5), 9
    displacement = random_displacement(config, FOV, SampleRandom(range(1500)))
    weights = control_weights(5, size, "cpu")
    field = torch.einsum("bijkc,iz,jy,kx->bzyxc", displacement, weights, weights, weights) * FOV / 2  # mm
    assert torch.allclose(field, field_by_torch(displacement, (size,) * 3) * FOV / 2, atol=1e-3)
    along = weights.square().sum(0)
    expected = 8.0 * torch.einsum("z,y,x->zyx", along, along, along).sqrt()
    ratio = field.std(dim=0) / expected[..., None]
    assert (ratio - 1).abs().max() < 0.1  # 2,187 of them, each from 1,500 samples
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.005)
    assert expected[0, 0, 0] == pytest.approx(8.0)  # kept at the corners
    fine = control_weights(5, 256, "cpu").square().sum(0)
    share = torch.einsum("z,y,x->zyx", fine, fine, fine).mean().sqrt()
    assert 0.45 < share < 0.6  # about half over the cube
    assert field.mean().abs() < 0.05
    components = torch.corrcoef(displacement.reshape(-1, 3).T) - torch.eye(3)
    assert components.abs().max() < 0.02


@pytest.mark.parametrize("axis", [0, 1, 2])  # of the volume: D, H, W
def test_displacements_act_along_their_axis_at_their_place(axis):
    """Only component ``axis`` is set, and only on one side of the next axis: that ball moves, along that axis."""
    side = (axis + 1) % 3
    displacement = torch.zeros(1, 5, 5, 5, 3)
    displacement[..., 2 - axis].movedim(1 + side, 0)[2:] = 2 * 16.0 / FOV
    moves = []
    for place in (10, 52):
        ball = torch.zeros(64, 64, 64)
        ball[27:37, 27:37, 27:37] = 1.0
        ball = ball.roll(place - 32, dims=side)[None, None]
        after = SmoothWarp(torch.eye(3, 4)[None], displacement, (64, 64, 64)).sample(ball, SAME)
        moves.append([b - a for a, b in zip(centroid_mm(ball), centroid_mm(after))])
    still, moved = moves
    assert max(abs(v) for v in still) < 0.5
    assert moved[axis] == pytest.approx(-16.0, abs=1.5)  # the grid says where to read: content moves the other way
    assert max(abs(v) for k, v in enumerate(moved) if k != axis) < 1.5
