"""The cascade's network: starts as the identity, uses what it is given, geometry, memory, bad settings."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybrid_vit_cascade.blocks import (
    BANDS,
    PRIOR_BINS,
    DepthPrior,
    ModulatedBlock,
    PriorLifting,
    ViTBlock,
    sinusoidal_embedding,
)
from hybrid_vit_cascade.models import OUTPUT_SCALE, CascadeStage, default_token_grid
from xray2ct.files import InputError
from xray2ct.geometry.lifting import lift_features
from xray2ct.geometry.projector import Geometry, render_xrays
from xray2ct.models.blocks import lift_views, pixel_shuffle_3d
from xray2ct.training.precision import to_channels_last

TINY = {"volume_size": 16, "voxel_dim": 32, "vit_depth": 2, "num_heads": 2, "xray_size": 32, "token_grid": 4}
FOLDED = {**TINY, "volume_size": 72, "vit_depth": 1, "token_grid": 9, "conditioned": True}


def stage(awake=True, **changes):
    """A tiny stage; ``awake``: its zero-initialised layers are drawn too, so that every path is alive."""
    torch.manual_seed(0)
    model = CascadeStage(**{**TINY, **changes})
    if awake:
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model.eval()


def inputs(batch=2, size=16, views=2, previous=None, seed=1):
    """x_t, position, X-rays and, where wanted, a previous volume of edge ``previous``."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 1, size, size, size, generator=generator)
    values = [x_t, torch.linspace(0.2, 0.9, batch), torch.rand(batch, views, 32, 32, generator=generator)]
    if previous:
        values.append(2 * torch.rand(batch, 1, previous, previous, previous, generator=generator) - 1)
    return values


def change(model, values, other):
    """Largest difference of the outputs for two lists of inputs."""
    with torch.no_grad():
        return (model(*values) - model(*other)).abs().max().item()


# ------------------------------------------------------------------------------------------------
# Start


def test_blocks_start_as_the_identity_whatever_the_embedding():
    embedding = torch.randn(2, 32)
    volume, tokens = torch.randn(2, 16, 4, 4, 4), torch.randn(2, 64, 32)
    assert torch.equal(ModulatedBlock(16, 32)(volume, embedding), volume)
    block = ViTBlock(32, 4, 32)
    assert torch.equal(block(tokens, embedding, block.keys_values(torch.randn(2, 10, 32))), tokens)


def test_a_vit_block_follows_adaln_zero():
    """Against the formula written out with torch's own attention layer."""
    torch.manual_seed(0)
    block = ViTBlock(32, 4, 32)
    nn.init.normal_(block.modulation.weight, std=0.2)
    x, embedding, context = torch.randn(2, 6, 32), torch.randn(2, 32), torch.randn(2, 10, 32)
    reference = nn.MultiheadAttention(32, 4, batch_first=True)
    modulation = block.modulation(embedding).view(2, 9, 1, 32)
    expected = x
    for branch in range(3):
        normed = F.layer_norm(expected, (32,)) * (1 + modulation[:, 3 * branch]) + modulation[:, 3 * branch + 1]
        if branch == 2:
            y = block.mlp(normed)
        else:
            keys = normed if branch == 0 else context
            weights = block.qkv if branch == 0 else block.query
            others = weights.weight[32:] if branch == 0 else block.context.weight
            biases = weights.bias[32:] if branch == 0 else block.context.bias
            reference.in_proj_weight.data = torch.cat([weights.weight[:32], others]).detach()
            reference.in_proj_bias.data = torch.cat([weights.bias[:32], biases]).detach()
            reference.out_proj = block.attention_out if branch == 0 else block.cross_out
            y = reference(normed, keys, keys, need_weights=False)[0]
        expected = expected + modulation[:, 3 * branch + 2] * y
    assert torch.allclose(block(x, embedding, block.keys_values(context)), expected, atol=1e-5)


@pytest.mark.parametrize(("settings", "size", "previous"), [(TINY, 16, None), (FOLDED, 72, 36)])
def test_the_output_starts_at_zero_and_has_the_volume_s_shape(settings, size, previous):
    values = inputs(size=size, previous=previous)
    with torch.no_grad():
        output = stage(awake=False, **settings)(*values)
    assert output.shape == (2, 1, size, size, size)
    assert output.dtype == torch.float32
    assert not output.any()


def test_previous_plus_residual_is_one_number_away():
    """With the learned share of the previous volume at -1, v at pure noise is -x0 = -(previous upsampled)."""
    model = stage(awake=False, conditioned=True)
    values = inputs(previous=8)
    with torch.no_grad():
        model.mix.bias.copy_(torch.tensor([0.0, -1.0]))
        expected = -F.interpolate(values[3], size=16, mode="trilinear", align_corners=False)
        assert torch.allclose(model(*values), expected, atol=1e-6)
        model.mix.bias.copy_(torch.tensor([0.7, 0.0]))
        assert torch.allclose(model(*values), 0.7 * values[0], atol=1e-6)


def test_pure_noise_does_not_reach_the_features_of_a_fresh_network():
    model, values = stage(awake=False), inputs()
    nn.init.normal_(model.out.weight)
    noise, same = torch.ones(2), [*inputs(seed=2)[:2], values[2]]
    with torch.no_grad():
        assert torch.equal(model(values[0], noise, values[2]), model(same[0], noise, values[2]))
    assert change(model, values, same) > 1e-2


# ------------------------------------------------------------------------------------------------
# Inputs reach the output


def test_every_input_changes_the_result():
    model = stage(conditioned=True)
    values = inputs(previous=8)
    for index, other in enumerate(inputs(previous=8, seed=2)):
        if index == 1:
            other = values[1].flip(0)
        changed = [other if i == index else value for i, value in enumerate(values)]
        assert change(model, values, changed) > 1e-3, index
    level = torch.tensor([0.0, 0.5])
    found = (model(*values, previous_noise_level=level) - model(*values)).abs().flatten(1).amax(1)
    assert found[0] == 0  # no level given means none added
    assert found[1] > 1e-3


def test_the_views_are_kept_apart():
    values = inputs()
    assert change(stage(), values, [*values[:2], values[2].flip(1)]) > 1e-3


@pytest.mark.parametrize("conditioned", [False, True])
def test_every_parameter_gets_a_gradient(conditioned):
    model = stage(conditioned=conditioned).train()
    model(*inputs(previous=8 if conditioned else None)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_parameter_of_a_folded_stage_gets_a_gradient():
    model = stage(**FOLDED).train()
    model(*inputs(batch=1, size=72, previous=36)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_of_a_batch_do_not_mix():
    model, values = stage(conditioned=True), inputs(batch=3, previous=8)
    with torch.no_grad():
        together = model(*values)
        alone = torch.cat([model(*(value[i : i + 1] for value in values)) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_encoding_once_and_denoising_often_is_the_forward_pass():
    model, values = stage(conditioned=True), inputs(previous=8)
    with torch.no_grad():
        condition = model.encode(values[2], values[3])
        for position in (values[1], torch.ones(2)):
            expected = model(values[0], position, *values[2:])
            assert torch.equal(model.denoise(values[0], position, condition), expected)


def test_times_are_told_apart_over_the_whole_range():
    """The embedding's closed form, and that neither neighbouring steps nor the two ends look the same."""
    embedding = sinusoidal_embedding(torch.arange(1000) / 999)
    assert torch.allclose(embedding[0], torch.cat([torch.zeros(128), torch.ones(128)]))
    assert embedding[999, 0].item() == pytest.approx(math.sin(1000.0), abs=1e-4)
    distances = torch.cdist(embedding, embedding) + 100 * torch.eye(1000)
    assert distances.min() > 0.5


# ------------------------------------------------------------------------------------------------
# Lifting and its prior


def test_the_depth_prior_is_a_distribution_with_three_bands():
    prior = DepthPrior(2)
    found = prior.distribution()
    assert found.shape == (2, len(BANDS), PRIOR_BINS, PRIOR_BINS, PRIOR_BINS)
    assert torch.allclose(found.sum(dim=2), torch.ones(2, 3, PRIOR_BINS, PRIOR_BINS))
    depth = (torch.arange(PRIOR_BINS) + 0.5) / PRIOR_BINS
    means = (found * depth[None, None, :, None, None]).sum(dim=2)
    for band, expected in enumerate((1 / 6, 1 / 2, 5 / 6)):
        assert (means[:, band] - expected).abs().max() < 0.05
        third = slice(PRIOR_BINS * band // 3, -(-PRIOR_BINS * (band + 1) // 3))
        assert found[:, band, third].sum(dim=1).min() > 0.6  # most of a band lies in its third
    nn.init.normal_(prior.depth_prior, std=2.0)  # and after training it still sums to one
    assert torch.allclose(prior.distribution().sum(dim=2), torch.ones(2, 3, PRIOR_BINS, PRIOR_BINS))


def test_the_prior_lies_along_the_rays_of_each_view():
    """Parallel rays on the prior's own grid: density = bins x probability, depth along H (PA) and W (lateral)."""
    prior = DepthPrior(2)
    nn.init.normal_(prior.depth_prior)
    with torch.no_grad():
        density, expected = prior(Geometry("parallel"), PRIOR_BINS), PRIOR_BINS * prior.distribution()
    assert torch.allclose(density[0], expected[0].permute(0, 2, 1, 3), atol=1e-5)  # (band, z, y = depth, x)
    assert torch.allclose(density[1], expected[1].permute(0, 2, 3, 1), atol=1e-5)  # (band, z, y, x = depth)
    assert torch.allclose(density[0].mean(dim=2), torch.ones(3, 16, 16), atol=1e-5)


@pytest.mark.parametrize("geometry", [Geometry(sdd_mm=1200.0, sid_mm=700.0), Geometry("scout")], ids=["near", "scout"])
def test_the_prior_of_diverging_rays_against_grid_sample(geometry):
    size = 12
    prior = DepthPrior(2)
    nn.init.normal_(prior.depth_prior)
    axis = geometry.voxel_centres_mm(size)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    for view, depth in ((0, y), (1, x)):
        rows, columns = geometry.project(view, z, y, x)
        where = torch.stack([columns, rows], dim=-1) / (geometry.detector_mm / 2)
        where = torch.cat([where, depth[..., None] / (geometry.fov_mm / 2)], dim=-1)  # (column, row, depth)
        volume = PRIOR_BINS * prior.distribution()[view][None]
        expected = F.grid_sample(volume, where[None], padding_mode="border", align_corners=False)[0]
        with torch.no_grad():
            assert torch.allclose(prior(geometry, size)[view], expected, atol=1e-4)


def test_the_depth_lifting_switch_really_switches():
    with_prior, without = stage(), stage(use_depth_lifting=False)
    assert without.prior is None
    weights = with_prior.state_dict()
    without.load_state_dict({k: v for k, v in weights.items() if k != "prior.depth_prior"})
    values = inputs()
    with torch.no_grad():
        assert (with_prior(*values) - without(*values)).abs().max() > 1e-3
        with_prior.prior.depth_prior.zero_()  # an even spread is what being without a prior means
        assert torch.allclose(with_prior(*values), without(*values), atol=1e-5)


def test_a_quarter_of_the_channels_belongs_to_each_band_and_the_last_to_all_depths():
    lift, prior = PriorLifting(8, 8, 16, num_views=1), DepthPrior(1)
    with torch.no_grad():
        for layer in (lift.reduce[0], lift.fuse):
            layer.bias.zero_()
        lift.reduce[0].weight.copy_(torch.eye(8).view(8, 8, 1, 1))
        lift.fuse.weight.copy_(torch.eye(16, 8).view(16, 8, 1, 1, 1))
        found = lift(torch.ones(1, 8, 16, 16), prior, Geometry("parallel"), 8)[0, :8]
        density = prior(Geometry("parallel"), 8)[0]
    for band in range(3):
        assert torch.allclose(found[2 * band : 2 * band + 2], density[band].expand(2, -1, -1, -1), atol=1e-5)
    assert torch.allclose(found[6:], torch.ones(2, 8, 8, 8), atol=1e-5)


def test_a_mark_in_one_view_reaches_the_voxels_on_its_rays_alone():
    model = stage()
    lift, prior = model.lift[0], model.prior
    features = torch.randn(2, lift.reduce[0].in_channels, 16, 16)  # one pair of views
    marked = features.clone()
    marked[0, :, 3, 11] += 1.0  # PA
    indicator = torch.zeros(1, 2, 1, 16, 16)
    indicator[0, 0, 0, 3, 11] = 1.0
    hit = lift_features(indicator, model.geometry, (16, 16, 16))[0, 0, 0] > 0
    with torch.no_grad():
        found = lift(marked, prior, model.geometry, 16) - lift(features, prior, model.geometry, 16)
    found = found.abs().amax(dim=(0, 1))
    assert found[hit].min() > 0
    assert found[~hit].max() < 1e-6
    assert hit[:, :, :10].sum() == 0  # the ray stays on its side


def test_lifting_is_the_projector_s():
    """Also for one view alone: the same voxels as the first of two."""
    reduce = nn.ModuleList(nn.Identity() for _ in range(2))
    features = torch.randn(2 * 2, 3, 8, 8)
    expected = lift_features(features.unflatten(0, (2, 2)), Geometry(), (8, 8, 8))
    pa, lateral = lift_views(reduce, features, Geometry(), (8, 8, 8))
    assert torch.equal(torch.stack([pa, lateral], dim=1), expected)
    (alone,) = lift_views(reduce[:1], features[0::2], Geometry(), (8, 8, 8))
    assert torch.allclose(alone, pa, atol=1e-6)


def test_geometry_reaches_the_lifting_and_travels_with_the_weights():
    cone, parallel = stage(), stage(geometry=Geometry("parallel"))
    values = inputs()
    with torch.no_grad():
        assert (cone(*values) - parallel(*values)).abs().max() > 1e-5
        cone.load_state_dict(parallel.state_dict())
        assert cone.geometry == Geometry("parallel")
        assert torch.equal(cone(*values), parallel(*values))


# ------------------------------------------------------------------------------------------------
# Variants


def test_one_view_alone_works():
    model = stage(num_views=1)
    values = inputs(views=1)
    with torch.no_grad():
        assert model(*values).shape == (2, 1, 16, 16, 16)
    assert change(model, values, inputs(views=1, seed=2)) > 1e-3
    with pytest.raises(ValueError, match=r"\(2, 2, 32, 32\).*PA alone"):
        model(*inputs())
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\).*PA, then lateral"):
        stage()(*values)


def test_settings_rebuild_the_stage():
    model = stage(conditioned=True, base_channels=16, use_depth_lifting=False)
    again = CascadeStage(**model.settings, geometry=model.geometry)
    again.load_state_dict(model.state_dict())
    values = inputs(previous=8)
    with torch.no_grad():
        assert torch.equal(again.eval()(*values), model(*values))
    assert again.settings == model.settings


def test_other_xray_sizes_are_resampled_and_a_channel_axis_is_accepted():
    model, (x_t, position, _) = stage(), inputs(batch=1)
    phantom = torch.zeros(1, 1, 32, 32, 32)
    phantom[..., 8:20, 8:24, 10:30] = 0.5
    fine = render_xrays(phantom, Geometry(), (64, 64))
    with torch.no_grad():
        expected = model(x_t, position, F.interpolate(fine, size=32, mode="area"))
        assert torch.allclose(model(x_t, position, fine), expected, atol=1e-6)
        assert torch.allclose(model(x_t, position, fine.unsqueeze(2)), expected, atol=1e-6)


def test_the_networks_of_the_configurations_have_the_stated_scales():
    """Finest scale and widths: no wide feature at 128^3 of a 128^3 stage or at 256^3 of a 256^3 stage."""
    found = {}
    with torch.device("meta"):
        for size, dim, heads in ((64, 256, 4), (128, 384, 6), (128, 512, 8), (256, 512, 8)):
            model = CascadeStage(size, dim, 1, heads, conditioned=size > 64)
            found[size, dim] = (model.grids, model.widths)
    assert found == {
        (64, 256): ([64, 32, 16, 8], [32, 64, 128, 256]),
        (128, 384): ([64, 32, 16], [48, 96, 384]),
        (128, 512): ([64, 32, 16], [64, 128, 512]),
        (256, 512): ([128, 64, 32, 16], [32, 64, 128, 512]),
    }


@pytest.mark.parametrize(("dim", "base"), [(112, None), (208, None), (272, 136), (48, 24)])
def test_odd_widths_are_rounded_to_what_group_normalisation_divides(dim, base):
    with torch.device("meta"):  # GroupNorm refuses other widths when it is built
        model = CascadeStage(16, dim, 1, 2, xray_size=32, token_grid=4, base_channels=base)
    assert model.widths[-1] == dim
    assert model.widths[0] <= (base or dim // 8 + 8)


def test_a_folded_stage_puts_each_voxel_where_it_belongs():
    """The output layer's channels are sub-voxels: with only biases, every 2 x 2 x 2 block shows them in order."""
    model = stage(awake=False, **FOLDED)
    with torch.no_grad():
        model.out.bias.copy_(torch.arange(8.0))
        output = model(*inputs(batch=1, size=72, previous=36))
    cell = OUTPUT_SCALE * pixel_shuffle_3d(torch.arange(8.0).view(1, 8, 1, 1, 1))
    assert torch.equal(output, cell.repeat(1, 1, 36, 36, 36))


def test_activation_checkpointing_saves_memory_and_changes_no_gradient():
    kept = {}
    for saving in (False, True):
        model, total = stage(conditioned=True, activation_checkpointing=saving).train(), 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(*inputs(previous=8)).square().mean()
        loss.backward()
        kept[saving] = (total, {n: p.grad for n, p in model.named_parameters()})
    assert kept[True][0] < 0.5 * kept[False][0]
    for name, gradient in kept[False][1].items():
        assert torch.allclose(kept[True][1][name], gradient, atol=1e-7, rtol=1e-4), name


def test_channels_last_and_bfloat16_agree_with_float32():
    model, values = stage(conditioned=True), inputs(previous=8)
    with torch.no_grad():
        reference = model(*values)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(*values)
        last = to_channels_last(model)(*values)
    assert torch.allclose(last, reference, atol=1e-5)
    assert low.dtype == torch.float32
    assert 1250 * (low - reference).abs().mean() < 5.0  # HU, half of a CT's noise, with weights drawn at random


def test_the_output_s_parts_are_summed_in_float32_whatever_the_convolutions_run_in():
    """Output layer and shares as biases: a volume of a few HU's difference stays exact to 0.01 HU in bfloat16."""
    model, values = stage(awake=False, conditioned=True), inputs(previous=8)
    with torch.no_grad():
        model.mix.bias.copy_(torch.tensor([0.3007, -0.9003]))
        model.out.bias.fill_(0.1003)
        reference = model(*values)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(*values)
    assert reference.abs().mean() > 0.3
    assert 1250 * (low - reference).abs().max() < 0.01


def test_it_learns_the_posterior_mean_at_pure_noise():
    """From X-rays and noise alone, v = -x0: two cases that only the X-rays tell apart, other noise at each step."""
    model = stage(awake=False, vit_depth=1).train()
    x0 = torch.full((2, 1, 16, 16, 16), -1.0)
    x0[0, :, 4:12, 5:11, 3:9] = 0.2
    x0[1, :, 2:8, 3:13, 8:14] = 0.4
    xrays = render_xrays((x0 + 1) / 2, model.geometry, (32, 32))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(50):
        loss = (model(torch.randn_like(x0), torch.ones(2), xrays) + x0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    difference = (x0[0] - x0[1]).square().mean().item() / 4  # left when the mean of both cases is all it knows
    assert losses[-1] < 0.5 * difference


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume_size": 60, "token_grid": None}, r"volume_size is 60"),
        ({"volume_size": 8}, r"volume_size is 8"),
        ({"volume_size": 136, "token_grid": 17, "voxel_dim": 36}, r"voxel_dim is 36"),
        ({"volume_size": 264, "token_grid": None}, r"volume_size is 264.*patch of 16"),
        ({"num_heads": 3}, r"num_heads is 3.*voxel_dim, 32"),
        ({"num_heads": 0}, r"num_heads is 0"),
        ({"voxel_dim": 24}, r"voxel_dim is 24"),
        ({"vit_depth": 0}, r"vit_depth is 0"),
        ({"xray_size": 40}, r"xray_size is 40.*multiple of 32"),  # what forward() asks of X-rays
        ({"xray_size": 520}, r"xray_size is 520.*multiple of 32"),
        ({"num_views": 3}, r"num_views is 3"),
        ({"num_views": 1.0}, r"num_views is 1\.0; expected a whole number"),
        ({"vit_depth": -1}, r"vit_depth is -1; expected a whole number, at least 1"),
        ({"voxel_dim": "32"}, r"voxel_dim is '32'"),
        ({"volume_size": (16, 16, 16)}, r"volume_size is \(16, 16, 16\)"),
        ({"token_grid": 0}, r"token_grid is 0"),
        ({"base_channels": 0}, r"base_channels is 0"),
        ({"xray_channels": 3}, r"xray_channels is 3"),
        ({"token_grid": 5}, r"token_grid is 5 for volume_size 16"),
        ({"token_grid": 16}, r"token_grid is 16"),
        ({"base_channels": 12}, r"base_channels is 12"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        stage(**changes)


@pytest.mark.parametrize(
    ("size", "grid"), [(16, 8), (32, 8), (48, 12), (64, 8), (96, 12), (128, 16), (192, 12), (256, 16)]
)
def test_the_default_token_grid(size, grid):
    assert default_token_grid(size) == grid


def test_volumes_that_do_not_fit_are_named():
    first, second, values = stage(), stage(conditioned=True), inputs(previous=8)
    with pytest.raises(ValueError, match="needs the previous stage's volume"):
        second(*values[:3])
    with pytest.raises(ValueError, match="takes no previous volume"):
        first(*values)
    with pytest.raises(ValueError, match=r"previous volume has shape \(2, 8, 8, 8\)"):
        second(*values[:3], values[3][:, 0])
    with pytest.raises(ValueError, match=r"x_t has shape \(2, 1, 8, 8, 8\); expected \(B, 1, 16, 16, 16\)"):
        first(values[3], *values[1:3])
