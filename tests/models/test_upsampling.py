"""Cubic upsampling that keeps area averages, against SciPy's splines, iterative back-projection and its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline

from model_enhanced import RefinementNetwork
from xray2ct.models.blocks import upsample
from xray2ct.models.upsampling import upsample_spline
from xray2ct.models.window import Window


def volume(size, batch=1, seed=0):
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "scale"), [((8, 8, 8), 4), ((2, 6, 10), 4), ((5, 3, 7), 2)])
def test_its_area_average_is_the_coarse_volume(size, scale):
    coarse = volume(size, batch=2)
    fine = upsample_spline(coarse, scale)
    assert fine.shape == (2, 1, *(scale * n for n in size))
    assert torch.allclose(F.avg_pool3d(fine, scale), coarse, atol=1e-6)
    assert (F.avg_pool3d(upsample(coarse), 4) - coarse).abs().max() > 0.1  # which trilinear's is not


def test_a_constant_and_the_inside_of_a_ramp_are_kept():
    flat = torch.full((1, 1, 4, 4, 4), 0.3)
    assert torch.allclose(upsample_spline(flat), torch.full((1, 1, 16, 16, 16), 0.3), atol=1e-6)
    ramp = torch.arange(32.0).expand(1, 1, 4, 4, 32)
    exact = (torch.arange(128.0) + 0.5) / 4 - 0.5
    inside = slice(40, 88)  # the mirrored edge fades by a factor of 3 or more in each coarse voxel
    assert torch.allclose(upsample_spline(ramp)[0, 0, 7, 7, inside], exact[inside], atol=1e-4)


def test_it_is_the_cubic_spline_of_scipy_with_these_averages():
    """Along one axis: SciPy's B-splines on the mirrored line of 3 n voxels, least squares for the averages."""
    n, scale = 8, 4
    values = np.random.default_rng(0).random(n)
    line = np.concatenate([values[::-1], values, values[::-1]])
    knots = np.arange(-2, 3 * n + 6) - 2.0  # cubic: splines centred at -1 .. 3 n + 1
    fine = (np.arange(3 * n * scale) + 0.5) / scale - 0.5
    basis = BSpline.design_matrix(fine, knots, 3).toarray()
    averages = basis.reshape(3 * n, scale, -1).mean(axis=1)
    spline = basis @ np.linalg.lstsq(averages, line, rcond=None)[0]
    coarse = torch.from_numpy(values).float()[:, None, None].expand(1, 1, n, 4, 4)
    found = upsample_spline(coarse)[0, 0, :, 5, 6].numpy()
    # The free ends of SciPy's line are one mirrored volume away.
    assert np.abs(found - spline[n * scale : 2 * n * scale]).max() < 2e-3
    assert np.abs(found - np.repeat(values, scale)).max() > 0.05


def test_it_is_the_limit_of_iterative_back_projection():
    """Start from the interpolating cubic spline (SciPy), add the upsampled lack of area average, again and again."""
    from scipy.ndimage import map_coordinates

    coarse = volume((8, 8, 8))
    places = np.meshgrid(*[(np.arange(32) + 0.5) / 4 - 0.5] * 3, indexing="ij")

    def interpolated(values):
        fine = map_coordinates(values[0, 0].double().numpy(), places, order=3, mode="reflect")
        return torch.from_numpy(fine)[None, None].float()

    expected, errors = interpolated(coarse), []
    for _ in range(12):
        errors.append((expected - upsample_spline(coarse)).abs().max().item())
        expected = expected + interpolated(coarse - F.avg_pool3d(expected, 4))
    assert errors[0] > 0.1
    assert errors[4] < 0.25 * errors[0]  # four steps
    assert errors[-1] < 0.02


def test_edges_are_sharper_than_those_of_trilinear_interpolation():
    """A ball at 64^3, averaged to 16^3 and upsampled again."""
    z, y, x = torch.meshgrid(*[torch.arange(64.0)] * 3, indexing="ij")
    truth = (((z - 30) ** 2 + (y - 33) ** 2 + (x - 28) ** 2).sqrt() < 18).float()[None, None]
    coarse = F.avg_pool3d(truth, 4)
    errors = [(fine.clamp(0, 1) - truth).square().mean() for fine in (upsample_spline(coarse), upsample(coarse))]
    assert errors[0] < 0.7 * errors[1]


def test_a_window_is_a_part_of_the_whole():
    coarse = volume((8, 10, 12), batch=2)
    whole = upsample_spline(coarse)
    for origins, size in (([(1, 3, 5)], (4, 2, 7)), ([(0, 0, 0), (4, 6, 5), (1, 2, 3), (3, 0, 0)], (4, 4, 6))):
        window = Window(origins, size, (8, 10, 12))
        assert torch.allclose(upsample_spline(coarse, 4, window), window.crop(whole, 4), atol=1e-6)


def test_it_stays_in_float32_under_autocast_and_has_the_gradient_of_a_linear_map():
    coarse = volume((4, 6, 8)).requires_grad_()
    fine = upsample_spline(coarse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(upsample_spline(coarse), fine)
    weight = volume(fine.shape[2:], seed=1)
    gradient = torch.autograd.grad((fine * weight).sum(), coarse)[0]
    assert (gradient * coarse).sum().item() == pytest.approx((fine * weight).sum().item(), rel=1e-4)


def test_its_cached_matrices_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        upsample_spline(volume((6, 6, 14)))
    coarse = volume((6, 6, 14)).requires_grad_()
    upsample_spline(coarse).square().sum().backward()
    assert coarse.grad.abs().max() > 0


def test_a_compiled_trace_holds_no_cached_matrix():
    program = torch.export.export(_Upsampling(), (volume((4, 4, 4)),), strict=False)
    coarse = volume((4, 4, 4), seed=2)
    assert torch.allclose(program.module()(coarse), upsample_spline(coarse), atol=1e-6)


class _Upsampling(torch.nn.Module):
    def forward(self, coarse):
        return upsample_spline(coarse, RefinementNetwork.scale)
