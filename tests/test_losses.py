"""The losses against closed forms, scikit-image, scipy and a VGG16 built by hand."""

import importlib.util
import math
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

import losses
from losses import EnhancedLoss, PerceptualLoss, ProjectionLoss, edge_loss, multiscale_loss, ssim_loss
from tests.helpers.paths import ROOT
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import FOV_MM, MU_WATER, XRAY_SCALE, Geometry, hu_to_unit, render_xrays
from xray2ct.models import vgg16

TERMS = ("l1", "mse", "ssim", "perceptual", "edge", "multiscale", "projection")


def volumes(size=16, batch=2, noise=0.1, seed=0):
    """A smooth random target with structure at several scales, and a noisy prediction of it."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, 1, size, size, size, generator=generator)
    coarse = torch.rand(batch, 1, 4, 4, 4, generator=generator)
    coarse = nn.functional.interpolate(coarse, size=(size,) * 3, mode="trilinear")
    target = 0.3 * target + 0.7 * coarse
    return target + noise * torch.randn(target.shape, generator=generator), target


def criterion(**weights):
    """Only the given terms."""
    off = {f"{term}_weight": 0.0 for term in TERMS}
    options = {"perceptual_weights": "random", "acquisition": Acquisition()}
    return EnhancedLoss(**{**options, **off, **weights})


def all_terms(**options):
    return criterion(**{f"{term}_weight": 1.0 for term in TERMS}, **options)


def inputs_of_all_terms(prediction, target):
    aux = {
        "volume_4": nn.functional.avg_pool3d(prediction, 4),
        "volume_8": nn.functional.avg_pool3d(prediction, 2),
    }
    return aux, render_xrays(target, Geometry(), (32, 32))


# ------------------------------------------------------------------------------------------------
# Closed forms and references


def test_constant_offset_has_the_closed_form_values():
    _, target = volumes()
    _, parts = criterion(l1_weight=1, mse_weight=1, edge_weight=1)(target + 0.25, target)
    assert parts["l1"].item() == pytest.approx(0.25, rel=1e-5)
    assert parts["mse"].item() == pytest.approx(0.0625, rel=1e-5)
    assert parts["edge"].item() == pytest.approx(0.0, abs=1e-6)  # an offset has no edges


def test_every_term_is_zero_with_finite_gradient_at_equality():
    _, target = volumes()
    prediction = target.clone().requires_grad_()
    aux, _ = inputs_of_all_terms(prediction, target)
    xrays = nn.functional.avg_pool2d(render_xrays(target, Geometry(), (32, 32)), 2)
    total, parts = all_terms()(prediction, target, aux=aux, xrays=xrays)
    assert set(parts) == set(TERMS)
    for term, value in parts.items():
        assert value.item() == pytest.approx(0.0, abs=2e-6), term
    total.backward()
    assert prediction.grad.isfinite().all()


def test_total_is_the_weighted_sum_of_the_unweighted_terms():
    prediction, target = volumes()
    aux, xrays = inputs_of_all_terms(prediction, target)
    weights = dict(zip((f"{term}_weight" for term in TERMS), (0.5, 2.0, 0.25, 0.125, 3.0, 0.75, 4.0)))
    loss = criterion(**weights).eval()
    total, parts = loss(prediction, target, aux=aux, xrays=xrays)
    expected = sum(weights[f"{term}_weight"] * parts[term].item() for term in TERMS)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    _, alone = all_terms().eval()(prediction, target, aux=aux, xrays=xrays)
    for term in TERMS:
        assert parts[term].item() == alone[term].item() > 0, term


def test_ssim_equals_scikit_image_in_3d():
    metrics = pytest.importorskip("skimage.metrics")
    prediction, target = volumes(size=19)
    expected = [
        metrics.structural_similarity(
            x.numpy().astype(np.float64),
            y.numpy().astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
        for x, y in zip(prediction[:, 0], target[:, 0])
    ]
    assert ssim_loss(prediction, target).item() == pytest.approx(1 - np.mean(expected), abs=1e-5)


def test_ssim_map_equals_the_definition_at_single_positions():
    prediction, target = (v[0, 0].double() for v in volumes(size=14))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.einsum("i,j,k->ijk", window, window, window)
    window /= window.sum()
    result = losses.ssim_map(prediction, target).numpy()
    assert result.shape == (4, 4, 4)
    for d, h, w in ((0, 0, 0), (3, 1, 2), (2, 3, 0)):
        x, y = (v[d : d + 11, h : h + 11, w : w + 11].numpy() for v in (prediction, target))
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        cov = (window * (x - mx) * (y - my)).sum()
        expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
        assert result[d, h, w] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [ssim_loss, edge_loss])
def test_gradient_equals_finite_differences(loss):
    prediction, target = (v.double() for v in volumes(size=12, batch=1))
    mask = torch.zeros_like(target)
    mask[..., 2:9, 4:] = 1
    for weight in (None, mask):
        leaf = prediction.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda p, w=weight: loss(p, target, w), leaf, fast_mode=True, atol=1e-7)


def test_volumes_below_the_window_are_an_error():
    prediction, target = volumes(size=8)
    with pytest.raises(ValueError, match=r"\[8, 8, 8\] voxels.*at least \[11, 11, 11\]"):
        criterion(ssim_weight=1)(prediction, target)


def test_edge_equals_scipy_sobel():
    prediction, target = volumes(size=9, batch=1)
    x, y = prediction[0, 0].double().numpy(), target[0, 0].double().numpy()
    inner = (slice(1, -1),) * 3
    distances = [
        np.abs(ndimage.sobel(x, axis)[inner] - ndimage.sobel(y, axis)[inner]).mean() / 32 for axis in range(3)
    ]  # scipy's kernel is (-1, 0, 1) by (1, 2, 1) twice: 2 * 4 * 4 times a unit gradient
    assert edge_loss(prediction, target).item() == pytest.approx(np.mean(distances), rel=1e-5)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_edge_of_a_unit_ramp_is_one_in_its_own_direction(axis):
    shape = [1] * 5
    shape[axis] = 7
    ramp = torch.arange(7.0).view(shape).expand(1, 1, 7, 7, 7)
    assert edge_loss(ramp, torch.zeros_like(ramp)).item() == pytest.approx(1 / 3, rel=1e-6)


def test_multiscale_equals_block_means():
    _, target = volumes(size=8)
    generator = torch.Generator().manual_seed(3)
    aux = {
        "volume_4": torch.rand(2, 1, 4, 4, 4, generator=generator),
        "volume_2": torch.rand(2, 1, 2, 2, 2, generator=generator),
    }
    expected = []
    for coarse in aux.values():
        n = coarse.shape[-1]
        blocks = target.numpy().reshape(2, 1, n, 8 // n, n, 8 // n, n, 8 // n).mean(axis=(3, 5, 7))
        expected.append(np.abs(coarse.numpy() - blocks).mean())
    assert multiscale_loss(aux, target).item() == pytest.approx(np.mean(expected), rel=1e-5)
    with pytest.raises(ValueError, match="volume_3"):
        multiscale_loss({"volume_3": torch.zeros(2, 1, 3, 3, 3)}, target)


def test_projection_is_zero_at_the_truth_and_falls_towards_it():
    geometry = Geometry()
    _, target = volumes(size=16, batch=1)
    start = torch.rand(target.shape, generator=torch.Generator().manual_seed(9))
    loss = ProjectionLoss(Acquisition(geometry))
    xrays = nn.functional.avg_pool2d(render_xrays(target, geometry, (32, 32)), 2)
    values = [loss(target + step * (start - target), xrays).item() for step in (1.0, 0.5, 0.25, 0.0)]
    assert values[0] > values[1] > values[2] > values[3]
    assert values[3] == pytest.approx(0.0, abs=1e-6)
    assert loss(start, xrays[:, :, None]).item() == pytest.approx(values[0])  # (B, 2, 1, H, W)
    # X-rays at acquisition size: only the difference of sampling is left.
    assert loss(target, render_xrays(target, geometry, (128, 128))).item() < 0.05 * values[0]


@pytest.mark.parametrize("units", [{"hu_window": (-1000.0, 500.0)}, {"xray_scale": 5.0}])
def test_projection_is_in_the_units_of_the_data(units):
    _, target = volumes(size=16, batch=1)
    xrays = render_xrays(target, Geometry(), (32, 32), **units)
    assert ProjectionLoss(Acquisition(**units))(target, xrays).item() < 0.01
    assert ProjectionLoss(Acquisition())(target, xrays).item() > 0.05


def test_projection_sees_which_view_is_wrong():
    _, target = volumes(size=16, batch=1)
    xrays = render_xrays(target, Geometry(), (16, 16))
    loss = ProjectionLoss(Acquisition())
    assert loss(target, xrays.flip(1)).item() > 2 * loss(target, xrays).item()
    for other in (torch.cat([xrays, xrays], dim=1), xrays.repeat(2, 1, 1, 1), xrays[0]):
        with pytest.raises(ValueError, match=r"xrays have shape .*; expected \(1, 2, H, W\)"):
            loss(target, other)


def test_projection_of_one_view_compares_the_pa_image_alone():
    _, target = volumes(size=16, batch=1)
    pa = torch.rand(1, 1, 16, 16)
    lateral = nn.functional.avg_pool2d(render_xrays(target, Geometry(), (32, 32)), 2)[:, 1:]  # agrees: adds nothing
    loss = ProjectionLoss(Acquisition())
    both = loss(target, torch.cat([pa, lateral], dim=1))
    assert loss(target, pa).item() == pytest.approx(2 * both.item(), rel=1e-5)


def test_projection_weighs_samples():
    prediction, target = volumes(size=16)
    xrays, loss = render_xrays(target, Geometry(), (16, 16)), ProjectionLoss(Acquisition())
    each = loss.per_sample(prediction, xrays)
    assert each.shape == (2,)
    assert each[0].item() == pytest.approx(loss(prediction[:1], xrays[:1]).item(), rel=1e-6)
    assert loss(prediction, xrays, torch.tensor([0.0, 0.5])).item() == pytest.approx(each[1].item() / 4, rel=1e-6)


def test_projection_of_a_cube_of_water_against_the_closed_form():
    """Parallel rays: mu_water * 360 mm / scale everywhere, against black X-rays."""
    water = torch.full((1, 1, 16, 16, 16), float(hu_to_unit(torch.tensor(0.0))))
    # Of the 32 rays across, the outermost read a quarter of the zeros outside the cube.
    inside = (30 + 2 * 0.75) / 32
    expected = MU_WATER * FOV_MM / XRAY_SCALE * inside**2
    for scale in (1, 2):
        loss = ProjectionLoss(Acquisition(Geometry("parallel"), xray_scale=scale * XRAY_SCALE))
        assert loss(water, torch.zeros(1, 2, 16, 16)).item() == pytest.approx(expected / scale, rel=1e-5)


def test_projection_of_a_large_volume_is_made_small_and_agrees():
    """Averaging attenuation keeps line integrals: a smooth 64^3 volume compared at 16^2."""
    axis = torch.linspace(-1, 1, 64)
    ball = (1 - axis.view(-1, 1, 1) ** 2 - 0.6 * axis.view(1, -1, 1) ** 2 - 0.8 * axis.view(1, 1, -1) ** 2).clamp_min(0)
    volume = (0.1 + 0.4 * ball)[None, None].requires_grad_()  # above vacuum: attenuation is linear
    xrays = render_xrays(volume.detach(), Geometry(), (128, 128))
    loss = ProjectionLoss(Acquisition(), size=16)
    exact = loss(volume, xrays)
    assert exact.item() < 0.02 * xrays.mean().item()
    wrong = loss(0.9 * volume, xrays)
    assert wrong.item() > 3 * exact.item()
    (gradient,) = torch.autograd.grad(wrong, volume)
    blocks = nn.functional.avg_pool3d(gradient, 4)
    assert blocks.any()
    torch.testing.assert_close(blocks.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4), gradient)


# ------------------------------------------------------------------------------------------------
# Mask


def test_nothing_outside_the_mask_counts():
    prediction, target = volumes()
    mask = torch.zeros_like(target)
    mask[:, :, 3:14, 2:, 4:12] = 1
    loss = criterion(l1_weight=1, mse_weight=1, ssim_weight=1, perceptual_weight=1, edge_weight=1).eval()
    _, before = loss(prediction, target, mask=mask)
    garbage = torch.where(mask > 0, prediction, torch.full_like(prediction, float("nan"))).requires_grad_()
    total, after = loss(garbage, target, mask=mask)
    for term, value in before.items():
        assert after[term].item() == value.item() > 0, term
    total.backward()
    assert (garbage.grad[mask == 0] == 0).all()
    assert garbage.grad.isfinite().all()
    _, unmasked = loss(prediction, target)
    assert all(unmasked[term].item() != before[term].item() for term in before)


def uneven_masks(target):
    """A mask of many voxels for the first sample, of few for the second."""
    mask = torch.zeros_like(target)
    mask[0, :, :, :, 2:] = 1
    mask[1, :, 4:11:2, 6:] = 1
    return mask


MASKED = [term for term in TERMS if term != "projection"]  # an X-ray knows no mask


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_a_batch_is_the_mean_of_its_samples_losses(masked):
    """Whoever shares a batch: two processes with one sample each train as one process with both."""
    prediction, target = volumes()
    prediction.requires_grad_()
    aux, xrays = inputs_of_all_terms(prediction, target)
    mask = uneven_masks(target) if masked else None
    loss = all_terms().eval()

    def part(chosen):
        some = {name: volume[chosen] for name, volume in aux.items()}
        own = None if mask is None else mask[chosen]
        total, parts = loss(prediction[chosen], target[chosen], aux=some, mask=own, xrays=xrays[chosen])
        (gradient,) = torch.autograd.grad(total, prediction, retain_graph=True)
        return parts, gradient

    (whole, gradient), *halves = part(slice(0, 2)), part(slice(0, 1)), part(slice(1, 2))
    for term in TERMS:
        mean = (halves[0][0][term] + halves[1][0][term]) / 2
        assert whole[term].item() == pytest.approx(mean.item(), rel=1e-5), term
        assert halves[0][0][term].item() != pytest.approx(halves[1][0][term].item(), rel=1e-3)
    torch.testing.assert_close(gradient, (halves[0][1] + halves[1][1]) / 2, rtol=1e-4, atol=1e-9)


def test_a_sample_of_which_nothing_counts_adds_nothing():
    prediction, target = volumes()
    prediction.requires_grad_()
    aux, _ = inputs_of_all_terms(prediction, target)
    mask = uneven_masks(target)
    mask[1] = 0
    loss = criterion(**{f"{term}_weight": 1.0 for term in MASKED}).eval()
    total, parts = loss(prediction, target, aux=aux, mask=mask)
    _, alone = loss(prediction[:1], target[:1], aux={k: v[:1] for k, v in aux.items()}, mask=mask[:1])
    for term in MASKED:
        assert parts[term].item() == pytest.approx(alone[term].item() / 2, rel=1e-5), term
    total.backward()
    assert prediction.grad[0].any()
    assert not prediction.grad[1].any()


def test_masked_means_are_means_over_each_samples_mask():
    prediction, target = volumes()
    mask = uneven_masks(target)
    loss = criterion(l1_weight=1, mse_weight=1, ssim_weight=1, edge_weight=1)
    _, parts = loss(prediction, target, mask=mask)
    inside = torch.where(mask > 0, prediction, target)
    similarity = losses.ssim_map(inside, target)
    expected = {"l1": [], "mse": [], "ssim": [], "edge": []}
    for sample, weight, similar in zip((inside - target)[:, 0].numpy(), mask[:, 0].numpy(), similarity[:, 0].numpy()):
        difference = sample[weight > 0]
        expected["l1"].append(np.abs(difference).mean())
        expected["mse"].append(np.square(difference).mean())
        expected["ssim"].append(1 - similar[weight[5:-5, 5:-5, 5:-5] > 0].mean())
        centre = ndimage.binary_erosion(np.ones(weight.shape)) & (weight > 0)  # where the kernel fits
        expected["edge"].append(np.mean([np.abs(ndimage.sobel(sample, axis)[centre]) / 32 for axis in range(3)]))
    for term, values in expected.items():
        assert parts[term].item() == pytest.approx(np.mean(values), rel=1e-4), term


def test_multiscale_mask_weighs_coarse_voxels_by_their_share():
    target = torch.zeros(1, 1, 4, 4, 4)
    mask = torch.zeros_like(target)
    mask[:, :, :2] = 1  # both coarse slices of the upper half
    mask[:, :, 2] = 1  # half of the lower ones
    coarse = torch.zeros(1, 1, 2, 2, 2)
    coarse[:, :, 1] = 0.6
    assert multiscale_loss({"volume_2": coarse}, target, mask).item() == pytest.approx(0.6 * 0.5 / 1.5)


def test_an_empty_mask_gives_zero_and_no_nan():
    prediction, target = volumes()
    prediction.requires_grad_()
    aux, _ = inputs_of_all_terms(prediction, target)
    loss = criterion(**{f"{term}_weight": 1.0 for term in MASKED})
    total, parts = loss(prediction, target, aux=aux, mask=torch.zeros_like(target))
    assert total.item() == 0
    assert len(parts) == 6
    total.backward()
    assert (prediction.grad == 0).all()


def test_shapes_that_differ_are_an_error():
    prediction, target = volumes()
    loss = criterion(l1_weight=1)
    with pytest.raises(ValueError, match="target has shape"):
        loss(prediction, target[..., :8])
    with pytest.raises(ValueError, match="mask has shape"):
        loss(prediction, target, mask=torch.ones(2, 16, 16, 16))


# ------------------------------------------------------------------------------------------------
# Precision


def test_bfloat16_predictions_are_compared_in_float32():
    prediction, target = volumes()
    prediction = prediction.bfloat16()
    aux, xrays = inputs_of_all_terms(prediction.float(), target)
    aux = {name: volume.bfloat16() for name, volume in aux.items()}
    loss = all_terms().eval()
    _, expected = loss(prediction.float(), target, {k: v.float() for k, v in aux.items()}, xrays=xrays)
    _, plain = loss(prediction, target, aux, xrays=xrays)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, mixed = loss(prediction.requires_grad_(), target, aux, xrays=xrays)
    for term in TERMS:
        assert plain[term].dtype == mixed[term].dtype == torch.float32
        assert plain[term].item() == pytest.approx(expected[term].item(), rel=1e-6), term
        tolerance = 0.05 if term == "perceptual" else 1e-6  # its convolutions follow autocast
        assert mixed[term].item() == pytest.approx(expected[term].item(), rel=tolerance), term
    assert mixed["perceptual"].item() != expected["perceptual"].item()
    total.backward()
    assert prediction.grad.dtype == torch.bfloat16
    assert prediction.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------
# Perceptual loss


class HandMadeVgg(nn.Module):
    """VGG16 up to relu3_3 from its published table, with torchvision's parameter names."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for item in (64, 64, "pool", 128, 128, "pool", 256, 256, 256):
            if item == "pool":
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU()]
                channels = item
        self.features = nn.Sequential(*layers)

    def distance(self, x, y):
        """Mean L1 distance at relu1_2, relu2_2, relu3_3 (positions 3, 8, 15) of grey images in [0, 1]."""
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        x, y = ((v.repeat(1, 3, 1, 1) - mean) / std for v in (x, y))
        total = 0.0
        for position, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if position in (3, 8, 15):
                total = total + (x - y).abs().mean() / 3
        return total


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """A weights file as torchvision's, and the network it belongs to."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = HandMadeVgg().requires_grad_(False)
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    state = {
        **network.state_dict(),
        "features.28.bias": torch.zeros(512),
        "classifier.6.bias": torch.zeros(1000),
    }
    torch.save(state, path)
    return path, network


def test_perceptual_equals_a_vgg16_built_by_hand(vgg_file):
    path, network = vgg_file
    prediction, target = volumes(batch=2)
    # Three of 16 planes in eval mode: the middles of three equal parts.
    planes = torch.tensor([2, 8, 13])
    expected = []
    for axis in (2, 3, 4):
        x, y = (v.index_select(axis, planes).movedim(axis, 1).reshape(6, 1, 16, 16) for v in (prediction, target))
        expected.append(network.distance(x, y).item())
    loss = PerceptualLoss(path, slices=3).eval()
    assert loss(prediction, target).item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert EnhancedLoss(perceptual_weights=str(path), perceptual_slices=3).perceptual.slices == 3


def test_perceptual_chunks_change_neither_value_nor_gradient():
    prediction, target = volumes()
    results = []
    for chunk_pixels in (2**19, 5 * 16 * 16, 1):  # all at once, 5 and 3 of 8 slices, one by one
        leaf = prediction.clone().requires_grad_()
        value = PerceptualLoss("random", chunk_pixels=chunk_pixels).eval()(leaf, target)
        value.backward()
        results.append((value.item(), leaf.grad))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-9)


def test_perceptual_looks_at_planes_of_all_three_orientations():
    prediction, target = volumes(batch=1)
    prediction.requires_grad_()
    PerceptualLoss("random", slices=1).eval()(prediction, target).backward()
    seen = prediction.grad[0, 0] != 0
    expected = torch.zeros(16, 16, 16, dtype=torch.bool)
    expected[8] = expected[:, 8] = expected[:, :, 8] = True
    assert torch.equal(seen, expected)


def test_perceptual_slices_follow_the_saved_random_state_in_training_only():
    prediction, target = volumes()
    loss = PerceptualLoss("random", slices=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = loss(prediction, target).item(), loss(prediction, target).item()
    torch.set_rng_state(state)
    assert loss(prediction, target).item() == first != second
    state = torch.get_rng_state()
    fixed = loss.eval()(prediction, target).item()
    assert loss(prediction, target).item() == fixed
    assert torch.equal(torch.get_rng_state(), state)


def test_perceptual_slices_of_a_sample_follow_from_its_seed_whatever_the_batch():
    torch.manual_seed(0)
    prediction, target = torch.rand(4, 1, 16, 17, 18), torch.rand(4, 1, 16, 17, 18)
    loss, seeds = PerceptualLoss("random", slices=3), [7, 8]
    whole = loss(prediction, target, SampleRandom(seeds))  # of each sample two patches
    parts = [loss(prediction[i : i + 2], target[i : i + 2], SampleRandom(seeds[i // 2 :][:1])) for i in (0, 2)]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-5)
    assert loss(prediction, target, SampleRandom([7, 9])).item() != whole.item()
    seen = prediction.requires_grad_()
    loss(seen, target, SampleRandom(seeds)).backward()
    for patch in seen.grad[:, 0] != 0:
        # Three slices of each orientation: outside them no gradient.
        assert [patch.all(dim=axes).sum() for axes in ((1, 2), (0, 2), (0, 1))] == [3, 3, 3]
        assert patch.sum() == 16 * 17 * 18 - 13 * 14 * 15
    assert not torch.equal(seen.grad[0] != 0, seen.grad[1] != 0)  # patches of one sample have slices of their own


def test_random_weights_do_not_touch_or_follow_the_global_random_state():
    prediction, target = volumes()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = EnhancedLoss(perceptual_weights="random").eval()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = PerceptualLoss("random").eval()
    assert first.perceptual(prediction, target).item() == second(prediction, target).item()


def test_the_filters_are_neither_trained_nor_saved():
    loss = all_terms()
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert any(name.startswith("perceptual.") for name, _ in loss.named_buffers())  # .to(device) moves them


# ------------------------------------------------------------------------------------------------
# Options and weights files


def test_terms_of_weight_zero_are_neither_built_nor_computed(tmp_path):
    """With input on which each of the others fails."""
    prediction, target = torch.rand(2, 1, 2, 2, 2), torch.rand(2, 1, 2, 2, 2)
    aux, xrays = {"volume_3": torch.rand(2, 1, 3, 3, 3)}, torch.zeros(3)
    missing = str(tmp_path / "missing.pth")
    for name in ("ssim", "edge", "multiscale", "projection"):
        with pytest.raises(ValueError, match=r"shape|voxels"):
            criterion(**{f"{name}_weight": 1})(prediction, target, aux=aux, xrays=xrays)
    with pytest.raises(InputError, match="perceptual_weights"):
        criterion(perceptual_weight=1, perceptual_weights=missing)
    loss = criterion(mse_weight=2, perceptual_weights=missing, acquisition=None)
    _, parts = loss(prediction, target, aux=aux, xrays=xrays)
    assert set(parts) == {"mse"}


@pytest.mark.parametrize(("term", "missing"), [("multiscale", "aux"), ("projection", "xrays")])
def test_a_weighted_term_without_its_input_is_an_error(term, missing):
    prediction, target = volumes()
    loss = criterion(**{"l1_weight": 1, f"{term}_weight": 0.5})
    for given in ({}, {"aux": {}}):
        with pytest.raises(ValueError, match=rf"loss\.{term}_weight is 0\.5, which needs {missing}: none given"):
            loss(prediction, target, **given)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, "0.5"])
def test_impossible_weights_are_named(weight):
    with pytest.raises(InputError, match=r"loss\.edge_weight is .*at least 0"):
        criterion(l1_weight=1, edge_weight=weight)


def test_options_that_cannot_work_are_errors():
    with pytest.raises(InputError, match="every weight is 0"):
        criterion()
    with pytest.raises(InputError, match=r"loss\.projection_weight.*geometry"):
        criterion(projection_weight=1, acquisition=None)
    with pytest.raises(InputError, match=r"loss\.perceptual_slices is 0"):
        criterion(perceptual_weight=1, perceptual_slices=0)


class RunsCode:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_weights_files_that_are_not_vgg16_are_refused(tmp_path, vgg_file, capsys):
    good = torch.load(vgg_file[0], weights_only=True)
    short = {name: value for name, value in good.items() if name != "features.14.bias"}
    other = {**good, "features.0.weight": torch.zeros(64, 1, 3, 3)}
    vgg19 = {**good, "features.16.weight": torch.zeros(256, 256, 3, 3)}
    for name, content, reason in (
        ("short.pth", short, r"features\.14\.bias is missing"),
        ("other.pth", other, r"features\.0\.weight is \(64, 1, 3, 3\)"),
        ("vgg19.pth", vgg19, r"holds features\.16\.weight"),
        ("list.pth", [1, 2], "holds a list"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: .*{reason}"):
            PerceptualLoss(tmp_path / name)
    (tmp_path / "cut.pth").write_bytes(vgg_file[0].read_bytes()[:100_000])
    torch.save({"features.0.weight": RunsCode()}, tmp_path / "code.pth")
    for name in ("cut.pth", "code.pth"):
        with pytest.raises(InputError, match=f"{name}: not readable"):
            PerceptualLoss(tmp_path / name)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["imagenett", "missing/vgg16-397923af.pth", None, 3])
def test_unknown_perceptual_weights_are_an_error(name):
    with pytest.raises(InputError, match=r"loss\.perceptual_weights is .*'imagenet', 'random' or the path"):
        EnhancedLoss(perceptual_weights=name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty download cache on a machine without internet access."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")

    def no_network(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    return cache


def test_imagenet_weights_without_network_say_what_to_do(hub):
    with pytest.raises(InputError) as error:
        EnhancedLoss()
    for part in (
        "no route to host",
        "internet",
        "vgg16-397923af.pth",
        "'random'",
        "loss.perceptual_weight to 0",
        str(hub),
    ):
        assert part in str(error.value)


def test_imagenet_weights_come_from_the_cache(hub, vgg_file, capsys):
    path, _ = vgg_file
    (hub / path.name).write_bytes(path.read_bytes())
    prediction, target = volumes()
    cached = PerceptualLoss("imagenet").eval()(prediction, target)
    assert cached.item() == PerceptualLoss(path).eval()(prediction, target).item()
    (hub / path.name).write_bytes(path.read_bytes()[:100_000])  # a download that was cut off
    with pytest.raises(InputError, match=r"imagenet.*can neither be read from"):
        PerceptualLoss("imagenet")
    torch.save({"features.0.weight": RunsCode()}, hub / path.name)
    with pytest.raises(InputError, match=r"imagenet.*can neither be read from"):
        PerceptualLoss("imagenet")
    assert "must not run" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# torchvision


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_imports_and_names_the_layers_as_expected():
    torchvision = vgg16.import_torchvision()
    assert vgg16.import_torchvision() is torchvision
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None).features
    shapes = {name: tuple(value.shape) for name, value in features.named_parameters()}
    for index, inputs, outputs, _ in vgg16.VGG_LAYERS:
        assert shapes[f"{index}.weight"] == (outputs, inputs, 3, 3)
    assert {int(name.split(".")[0]) for name in shapes} == set(vgg16.VGG_CONVOLUTIONS)


def test_torchvision_without_its_compiled_operators_still_imports(tmp_path):
    """A stand-in that, as a CUDA build next to a CPU-only torch, gives shapes to operators nobody defined."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda *args: args[0])\n"
        "complete = True\n"
    )
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from xray2ct.models import vgg16\n"
        "assert 'torchvision' not in sys.modules\n"
        "try:\n    import torchvision\n"
        "except RuntimeError as error:\n    print(error)\n"
        "print(vgg16.import_torchvision().complete, vgg16.import_torchvision().complete)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", errors="replace", timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "torchvision::nms does not exist" in result.stdout
    assert result.stdout.endswith("True True\n")
