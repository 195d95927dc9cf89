"""Physics loss: zero at agreement, closed forms, weights by signal-to-noise, sizes, gradients."""

import pytest
import torch
import torch.nn.functional as F

from hybrid_vit_cascade.physics import PhysicsLoss
from losses import ProjectionLoss
from xray2ct.files import InputError
from xray2ct.geometry.projector import FOV_MM, HU_WINDOW, MU_WATER, XRAY_SCALE, Geometry, hu_to_unit, render_xrays

WATER = 2 * float(hu_to_unit(torch.tensor(0.0))) - 1  # in [-1, 1]


def phantom(size=32):
    """An asymmetric volume in [0, 1]."""
    volume = torch.zeros(2, 1, size, size, size)
    a, b = size // 4, size // 2
    volume[0, :, a:b, a : 3 * a, a : 3 * a] = 0.5
    volume[1, :, a : 3 * a, a:b, b : 3 * a] = 0.8
    return volume


def test_it_is_zero_for_the_volume_that_made_the_xrays_and_only_for_it():
    volume = phantom()
    physics = PhysicsLoss(Geometry())
    xrays = F.avg_pool2d(render_xrays(volume, Geometry(), (64, 64)), 2)
    assert physics(2 * volume - 1, xrays).item() < 1e-6
    assert physics(2 * volume.flip(0) - 1, xrays).item() > 0.01
    assert physics(2 * volume.flip(-1) - 1, xrays).item() > 0.001


def test_a_cube_of_water_against_the_closed_form():
    """Parallel rays: mu_water * 360 mm / scale everywhere, against black X-rays."""
    expected = MU_WATER * FOV_MM / XRAY_SCALE
    x0_hat = torch.full((1, 1, 16, 16, 16), WATER)
    physics = PhysicsLoss(Geometry("parallel"))
    # Rays within half a voxel of the cube's faces read the zeros outside; a 16th of the edge at each side.
    found = physics._render(x0_hat)[0, 0]
    assert torch.allclose(found[1:-1, 1:-1], torch.full((14, 14), expected), rtol=1e-5)
    assert physics(x0_hat, torch.zeros(1, 2, 16, 16)).item() == pytest.approx(found.mean().item(), rel=1e-5)
    doubled = PhysicsLoss(Geometry("parallel"), xray_scale=2 * XRAY_SCALE)
    assert doubled(x0_hat, torch.zeros(1, 2, 16, 16)).item() == pytest.approx(found.mean().item() / 2, rel=1e-5)


def test_it_is_the_projection_loss_at_the_same_resolution():
    volume, xrays = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 32, 32)
    expected = ProjectionLoss(Geometry())(volume, xrays)
    assert PhysicsLoss(Geometry())(2 * volume - 1, xrays).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_hounsfield_window_matters():
    volume = torch.rand(1, 1, 16, 16, 16)
    wide = (-1024.0, 3072.0)
    xrays = F.avg_pool2d(render_xrays(volume, Geometry(), (32, 32), wide), 2)
    assert PhysicsLoss(Geometry(), wide)(2 * volume - 1, xrays).item() < 1e-6
    assert PhysicsLoss(Geometry(), HU_WINDOW)(2 * volume - 1, xrays).item() > 0.01


def test_a_large_volume_is_rendered_small_and_agrees():
    """Averaging attenuation keeps line integrals: a smooth 64^3 volume compared at 16^2."""
    axis = torch.linspace(-1, 1, 64)
    ball = (1 - axis.view(-1, 1, 1) ** 2 - 0.6 * axis.view(1, -1, 1) ** 2 - 0.8 * axis.view(1, 1, -1) ** 2).clamp_min(0)
    volume = (0.4 * ball)[None, None]
    xrays = render_xrays(volume, Geometry(), (128, 128))
    physics = PhysicsLoss(Geometry(), size=16)
    assert physics._render(2 * volume - 1).shape == (1, 2, 16, 16)
    exact = physics(2 * volume - 1, xrays).item()
    assert exact < 0.02 * xrays.mean().item()
    assert physics(2 * (0.9 * volume) - 1, xrays).item() > 3 * exact


@pytest.mark.parametrize(("snr", "expected"), [(0.0, 0.0), (1.0, 0.5), (3.0, 0.75), (float("inf"), 1.0)])
def test_noisy_steps_count_by_their_share_of_signal(snr, expected):
    physics = PhysicsLoss(Geometry())
    x0_hat, xrays = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 2, 16, 16)
    full = physics(x0_hat, xrays).item()
    assert physics(x0_hat, xrays, torch.tensor([snr])).item() == pytest.approx(expected * full, rel=1e-5)
    raised = PhysicsLoss(Geometry(), minimum_weight=0.2)
    wanted = (0.2 + 0.8 * expected) * full
    assert raised(x0_hat, xrays, torch.tensor([snr])).item() == pytest.approx(wanted, rel=1e-5)


def test_each_sample_has_its_own_weight():
    physics = PhysicsLoss(Geometry())
    x0_hat, xrays = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 16, 16)
    each = physics.per_sample(x0_hat, xrays)
    assert each.shape == (2,)
    found = physics(x0_hat, xrays, torch.tensor([0.0, 1.0]))
    assert found.item() == pytest.approx(0.5 * each[1].item() / 2, rel=1e-5)


def test_the_gradient_against_a_finite_difference():
    torch.manual_seed(0)
    physics, xrays = PhysicsLoss(Geometry()), torch.zeros(1, 2, 16, 16)
    x0_hat = (0.5 * torch.rand(1, 1, 16, 16, 16)).requires_grad_()
    physics(x0_hat, xrays).backward()
    direction = torch.randn_like(x0_hat)
    with torch.no_grad():
        plus, minus = (physics(x0_hat + step * direction, xrays).item() for step in (1e-2, -1e-2))
    assert (plus - minus) / 2e-2 == pytest.approx((x0_hat.grad * direction).sum().item(), rel=1e-2, abs=1e-5)


def test_it_stays_float32_under_autocast():
    physics = PhysicsLoss(Geometry())
    x0_hat, xrays = torch.rand(1, 1, 16, 16, 16).bfloat16(), torch.rand(1, 2, 16, 16)
    expected = physics(x0_hat.float(), xrays)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = physics(x0_hat, xrays)
    assert found.dtype == torch.float32
    assert found.item() == expected.item()


def test_one_view_compares_the_pa_image_alone():
    physics, x0_hat = PhysicsLoss(Geometry()), torch.rand(1, 1, 16, 16, 16)
    xrays = torch.rand(1, 1, 16, 16)
    agreeing = F.avg_pool2d(render_xrays((x0_hat + 1) / 2, Geometry(), (32, 32)), 2)[:, 1:]
    both = physics(x0_hat, torch.cat([xrays, agreeing], dim=1))  # the lateral view adds nothing to the sum
    assert physics(x0_hat, xrays).item() == pytest.approx(2 * both.item(), rel=1e-5)


def test_xrays_that_do_not_fit_are_named():
    physics, x0_hat = PhysicsLoss(Geometry()), torch.rand(2, 1, 16, 16, 16)
    with pytest.raises(ValueError, match=r"\(1, 2, 16, 16\); expected \(2, 2, H, W\)"):
        physics(x0_hat, torch.rand(1, 2, 16, 16))
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\)"):
        physics(x0_hat, torch.rand(2, 3, 16, 16))
    with pytest.raises(InputError, match="minimum_weight 2"):
        PhysicsLoss(Geometry(), minimum_weight=2)
