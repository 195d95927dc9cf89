"""Physics loss: the projection loss of volumes in [-1, 1], weighted by signal-to-noise."""

import pytest
import torch
import torch.nn.functional as F

from hybrid_vit_cascade.physics import PhysicsLoss
from hybrid_vit_cascade.settings import load_cascade_config
from losses import ProjectionLoss
from tests.helpers.paths import ROOT
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry, render_xrays


def phantom(size=32):
    """An asymmetric volume in [0, 1]."""
    volume = torch.zeros(2, 1, size, size, size)
    a, b = size // 4, size // 2
    volume[0, :, a:b, a : 3 * a, a : 3 * a] = 0.5
    volume[1, :, a : 3 * a, a:b, b : 3 * a] = 0.8
    return volume


def test_it_is_zero_for_the_volume_that_made_the_xrays_and_only_for_it():
    volume = phantom()
    physics = PhysicsLoss(Acquisition())
    xrays = F.avg_pool2d(render_xrays(volume, Geometry(), (64, 64)), 2)
    assert physics(2 * volume - 1, xrays).item() < 1e-6
    assert physics(2 * volume.flip(0) - 1, xrays).item() > 0.01
    assert physics(2 * volume.flip(-1) - 1, xrays).item() > 0.001


def test_it_is_the_projection_loss_of_volumes_in_another_range():
    volume, xrays = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 32, 32)
    wide = Acquisition(Geometry("parallel"), (-1024.0, 3072.0), 5.0)
    expected = ProjectionLoss(wide)(volume, xrays)
    assert PhysicsLoss(wide)(2 * volume - 1, xrays).item() == pytest.approx(expected.item(), rel=1e-4)


def test_estimates_above_64_voxels_are_rendered_at_64():
    x0_hat = torch.rand(1, 1, 72, 72, 72, requires_grad=True)  # above vacuum: attenuation is linear
    (gradient,) = torch.autograd.grad(PhysicsLoss(Acquisition())(x0_hat, torch.zeros(1, 2, 64, 64)), x0_hat)
    inner = gradient[0, 0, 20:52, 20:52, 20:52]
    assert inner.any()
    assert torch.equal(inner[::2, ::2, ::2], inner[1::2, 1::2, 1::2])  # two voxels per axis are averaged


@pytest.mark.parametrize(("snr", "expected"), [(0.0, 0.0), (1.0, 0.5), (3.0, 0.75), (float("inf"), 1.0)])
def test_noisy_steps_count_by_their_share_of_signal(snr, expected):
    physics = PhysicsLoss(Acquisition())
    x0_hat, xrays = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 2, 16, 16)
    full = physics(x0_hat, xrays).item()
    assert physics(x0_hat, xrays, torch.tensor([snr])).item() == pytest.approx(expected * full, rel=1e-5)
    raised = PhysicsLoss(Acquisition(), minimum_weight=0.2)
    wanted = (0.2 + 0.8 * expected) * full
    assert raised(x0_hat, xrays, torch.tensor([snr])).item() == pytest.approx(wanted, rel=1e-5)


def test_a_minimum_weight_above_one_is_named():
    with pytest.raises(InputError, match=r"physics_minimum_weight is 2"):
        load_cascade_config(
            ROOT / "hybrid_vit_cascade" / "config" / "demo_cpu.json", ["stage1.physics_minimum_weight=2"]
        )


def test_each_sample_has_its_own_weight():
    physics = PhysicsLoss(Acquisition())
    x0_hat, xrays = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 16, 16)
    second = physics(x0_hat[1:], xrays[1:]).item()
    found = physics(x0_hat, xrays, torch.tensor([0.0, 1.0]))
    assert found.item() == pytest.approx(0.5 * second / 2, rel=1e-5)


def test_the_gradient_against_a_finite_difference():
    torch.manual_seed(0)
    physics, xrays = PhysicsLoss(Acquisition()), torch.zeros(1, 2, 16, 16)
    x0_hat = (0.5 * torch.rand(1, 1, 16, 16, 16)).requires_grad_()
    physics(x0_hat, xrays).backward()
    direction = torch.randn_like(x0_hat)
    with torch.no_grad():
        plus, minus = (physics(x0_hat + step * direction, xrays).item() for step in (1e-2, -1e-2))
    assert (plus - minus) / 2e-2 == pytest.approx((x0_hat.grad * direction).sum().item(), rel=1e-2, abs=1e-5)


def test_it_stays_float32_under_autocast():
    physics = PhysicsLoss(Acquisition())
    x0_hat, xrays = torch.rand(1, 1, 16, 16, 16).bfloat16(), torch.rand(1, 2, 16, 16)
    expected = physics(x0_hat.float(), xrays)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = physics(x0_hat, xrays)
    assert found.dtype == torch.float32
    assert found.item() == expected.item()
