"""A second pass: its conjugate gradients against a dense solve, what an untrained one gives, gradients, freezing."""

import pytest
import torch
from torch import nn

from tests.helpers.dispatch import OperatorCounter
from tests.helpers.tiny_data import TINY_MODEL, make_model
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import HU_WINDOW, Geometry, back_project, line_integrals
from xray2ct.models.consistent_step import XrayResidual, consistent_change, consistent_step
from xray2ct.models.second_pass import SecondPass

GEOMETRIES = [Geometry(), Geometry("parallel"), Geometry("scout")]
KINDS = [geometry.kind for geometry in GEOMETRIES]


def soft(*shape):
    """A volume well above air, where attenuation is linear."""
    torch.manual_seed(3)
    return 0.3 + 0.2 * torch.rand(*shape)


def dense_operator(residual: XrayResidual) -> torch.Tensor:
    """The step's forward projector as a matrix, by finite differences of rendered X-rays, column by column."""
    size, columns = residual.volume_size, []
    flat = torch.full((1, 1, *size), 0.4)
    for index in range(flat.numel()):
        more = flat.clone()
        more.view(-1)[index] += 0.5
        columns.append((residual.of(flat) - residual.of(more)).double().flatten() / 0.5)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=KINDS)
@pytest.mark.parametrize("image_size", [(6, 6), (5, 9)])
def test_back_projection_is_the_adjoint_of_the_line_integrals_and_the_other_way_round(geometry, image_size):
    torch.manual_seed(0)
    volume = torch.rand(2, 1, 4, 5, 6, requires_grad=True)
    images = torch.rand(2, 2, *image_size, requires_grad=True)
    integrals = line_integrals(volume, geometry, image_size)
    spread = back_project(images, geometry, (4, 5, 6))
    assert (integrals * images).sum().item() == pytest.approx((volume * spread).sum().item(), rel=1e-5)
    gradient = torch.autograd.grad((integrals * images.detach()).sum(), volume)[0]
    assert torch.allclose(gradient, spread, rtol=1e-5)
    gradient = torch.autograd.grad((spread * volume.detach()).sum(), images)[0]
    assert torch.allclose(gradient, integrals, rtol=1e-5)
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 6, 6\)"):
        back_project(torch.rand(2, 3, 6, 6), geometry, (4, 5, 6))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=KINDS)
def test_the_steps_solve_the_regularised_least_squares_problem(geometry):
    """Against a dense solve in float64; part of the lateral view is not seen and has no say."""
    acquisition, weight = Acquisition(geometry), 0.02
    seen = torch.ones(1, 2, 8, 8)
    seen[:, 1, 4:] = 0
    xrays = acquisition.render(soft(1, 1, 4, 4, 4), (8, 8))
    whole, residual = (XrayResidual(xrays, acquisition, (4, 4, 4), mask) for mask in (None, seen))
    start = torch.full((1, 1, 4, 4, 4), 0.4)
    rows = residual.seen.double().flatten()
    matrix = rows[:, None] * dense_operator(whole)
    normal = matrix.T @ matrix / residual.norm + weight * torch.eye(64)
    exact = torch.linalg.solve(normal, matrix.T @ (rows * whole.of(start).double().flatten()) / residual.norm)
    found = consistent_change(residual.of(start), residual, steps=30, weight=weight).double().flatten()
    assert exact.abs().max() > 0.01
    assert (found - exact).abs().max() < 1e-4
    few = consistent_change(residual.of(start), residual, steps=3, weight=weight).double().flatten()
    assert (few - exact).norm() < 0.2 * exact.norm()


def test_the_norm_is_what_a_full_cube_is_multiplied_by():
    residual = XrayResidual(torch.rand(1, 2, 16, 16), Acquisition(Geometry("parallel")), (8, 8, 8))
    inside = residual.normal(torch.ones(1, 1, 8, 8, 8))[..., 2:-2, 2:-2, 2:-2]  # rays fade out at the cube's edge
    assert torch.allclose(inside, torch.full_like(inside, residual.norm))


@pytest.mark.parametrize("window", [HU_WINDOW, (-1000.0, 1000.0)])
def test_a_step_explains_the_xrays_and_leaves_a_right_volume_alone(window):
    acquisition = Acquisition(Geometry(), window, 7.0)
    truth = soft(2, 1, 8, 8, 8)
    residual = XrayResidual(acquisition.render(truth, (16, 16)), acquisition, (8, 8, 8))
    assert torch.allclose(consistent_step(truth, residual), truth, atol=1e-6)
    start = truth.mean(dim=(2, 3, 4), keepdim=True).expand_as(truth)
    errors = [residual.of(volume).square().sum().item() for volume in (start, consistent_step(start, residual))]
    assert errors[1] < 0.1 * errors[0]


def test_samples_have_steps_of_their_own():
    acquisition, truth = Acquisition(), soft(3, 1, 8, 8, 8)
    xrays, start = acquisition.render(truth, (16, 16)), torch.full((3, 1, 8, 8, 8), 0.35)
    start[2] = truth[2]
    together = consistent_step(start, XrayResidual(xrays, acquisition, (8, 8, 8)))
    alone = [consistent_step(s[None], XrayResidual(x[None], acquisition, (8, 8, 8))) for s, x in zip(start, xrays)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert together.isfinite().all()


def test_a_step_is_float32_under_autocast_waits_for_nothing_and_has_its_numerical_gradient():
    acquisition, start = Acquisition(), soft(1, 1, 4, 4, 4).requires_grad_()
    xrays = acquisition.render(start.detach().flip(2), (8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16), OperatorCounter() as counter:
        reduced = consistent_step(start, XrayResidual(xrays, acquisition, (4, 4, 4)))
        direction = torch.linspace(-1, 1, 64).view_as(start)
        (slope,) = torch.autograd.grad((reduced * direction).sum(), start)
    assert counter.waiting == []
    residual = XrayResidual(xrays, acquisition, (4, 4, 4))
    assert torch.equal(reduced, consistent_step(start, residual))
    along, h = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1)), 5e-4
    with torch.no_grad():
        ends = [(consistent_step(start + side * h * along, residual).double() * direction).sum() for side in (1, -1)]
    assert (slope * along).sum().item() == pytest.approx(((ends[0] - ends[1]) / (2 * h)).item(), rel=0.03)


# -- the network ---------------------------------------------------------------------------------------


def untrained(**settings):
    """A tiny network whose second pass has not been trained, in eval mode."""
    model = make_model(**settings)
    for parameter in model.second_pass.head.parameters():
        nn.init.zeros_(parameter)
    return model


def test_it_has_the_stated_size_and_scales_with_the_decoder():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in SecondPass(width).parameters()) for width in (32, 64)]
    assert 2.6e6 < counts[0] < 2.7e6
    assert 3.9 < counts[1] / counts[0] < 4.1


@pytest.mark.parametrize("passes", [2, 3])
def test_an_untrained_second_pass_is_exactly_the_consistent_volume(passes):
    one, several = make_model(), untrained(passes=passes)
    several.load_state_dict(one.state_dict(), strict=False)
    xrays = torch.rand(2, 2, 64, 64)
    with torch.no_grad():
        volume, aux = several(xrays)
        expected = one.train()(xrays)[0]  # not clamped
        assert torch.equal(aux["volume_pass_1"], expected)
        for _ in range(passes - 1):
            expected = consistent_step(expected, XrayResidual(xrays, one.acquisition, (16, 16, 16)))
    assert torch.equal(volume, expected.clamp(0, 1))
    assert list(aux) == ["volume_4", "volume_8", "volume_pass_1", "volume_pass_2"][: 1 + passes]


def test_what_is_not_seen_changes_nothing_in_the_second_pass():
    model, volume = make_model(passes=2), soft(1, 1, 16, 16, 16)
    xrays = torch.rand(1, 2, 2, 64, 64)
    xrays[:, :, 1] = 1
    xrays[:, 1, 1, 32:] = 0
    other = xrays.clone()
    other[:, 1, 0, 32:] += 0.5
    with torch.no_grad():
        step = [
            consistent_step(volume, XrayResidual(*x.unbind(2)[:1], model.acquisition, (16,) * 3, x[:, :, 1]))
            for x in (xrays, other)
        ]
    assert torch.equal(*step)
    seen = make_model(passes=2, seen_channel=True)
    with torch.no_grad():
        assert seen(xrays)[0].shape == (1, 1, 16, 16, 16)


def test_every_parameter_gets_a_gradient_and_recomputing_changes_none():
    gradients, xrays = [], torch.rand(1, 2, 64, 64)
    for recompute in (False, True):
        model = make_model(passes=2, activation_checkpointing=recompute).train()
        volume, aux = model(xrays)
        (volume.square().mean() + sum(v.square().mean() for v in aux.values())).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        gradients.append([model.encoder.stem.weight.grad, model.second_pass.inlet.weight.grad])
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-7) for pair in zip(*gradients))


def test_a_frozen_first_pass_has_no_gradient_and_predicts_the_same():
    frozen, free = (make_model(passes=2, freeze_first_pass=freeze) for freeze in (True, False))
    xrays = torch.rand(1, 2, 64, 64)
    volume, aux = frozen.train()(xrays)
    assert torch.equal(volume, free.train()(xrays)[0])
    assert [name for name, value in aux.items() if value.requires_grad] == []
    volume.square().mean().backward()
    trained = {name for name, p in frozen.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in frozen.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in frozen.named_parameters() if name.startswith("second_pass.")}


def test_the_acquisition_travels_with_the_weights():
    model, other = make_model(passes=2), make_model(passes=2)
    model.acquisition = Acquisition(Geometry(sdd_mm=1000.0, sid_mm=700.0), (-1000.0, 1000.0), 5.0)
    other.load_state_dict(model.state_dict())
    assert other.acquisition == model.acquisition
    earlier = {**model.state_dict(), "_extra_state": {"geometry": Geometry().to_dict(), "xray_size": 64}}
    other.load_state_dict(earlier)
    assert other.acquisition == Acquisition(Geometry(), (-1000.0, 1000.0), 5.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"passes": 0}, "passes is 0; expected a whole number, at least 1"),
        ({"passes": 4}, "passes is 4; expected 1, 2 or 3"),
        ({"freeze_first_pass": True}, "freeze_first_pass is true with model.passes 1"),
    ],
)
def test_other_numbers_of_passes_are_refused(settings, words):
    with pytest.raises(InputError, match=f"model.{words}"):
        make_model(**settings)


def test_old_weights_are_those_of_a_single_pass():
    assert TINY_MODEL.keys().isdisjoint({"passes", "freeze_first_pass"})
    names = make_model().state_dict().keys()
    assert not [name for name in names if name.startswith("second_pass")]
