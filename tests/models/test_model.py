"""Stage-1 model: shapes, size, geometry, gradients, checkpointing, input handling."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from losses import EnhancedLoss
from model_enhanced import DecoderStage, EnhancedDirectModel
from tests.helpers.tiny_data import TINY_MODEL, make_model
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, render_xrays
from xray2ct.models import loading, registry
from xray2ct.models.blocks import ResidualBlock, TransformerBlock, prepare_xrays
from xray2ct.training.precision import to_channels_last

SMALL = {"volume_size": (16, 16, 16), "base_channels": 16, "stem_stride": 1, "encoder_blocks": (1, 1, 1, 1)}


def small(**changes):
    """A small model whose zero-initialised layers are drawn too, so that every path is alive."""
    torch.manual_seed(0)
    model = EnhancedDirectModel(**{**SMALL, "decoder_blocks": (1, 1, 1), "transformer_blocks": 1, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def test_default_model_has_the_stated_size_shapes_and_scales():
    model = EnhancedDirectModel(volume_size=(64, 64, 64), base_channels=64)
    count = sum(p.numel() for p in model.parameters())
    assert 15e6 <= count <= 20e6
    widths = [stage.norm.num_channels for stage in model.decoder]
    assert widths == [128, 64, 32]
    with torch.no_grad():
        volume, aux = model.eval()(torch.rand(1, 2, 128, 128))
    assert volume.shape == (1, 1, 64, 64, 64)
    assert aux["volume_16"].shape == (1, 1, 16, 16, 16)
    assert aux["volume_32"].shape == (1, 1, 32, 32, 32)


def test_the_encoder_ends_at_32_for_512():
    model = EnhancedDirectModel(base_channels=16, encoder_blocks=(0, 0, 0, 0))
    sizes = [f.shape[-1] for f in model.encoder(torch.rand(1, 2, 512, 512))]
    assert sizes == [256, 128, 64, 32]


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (64, 128)])
def test_any_multiple_of_32_works_and_a_channel_axis_is_accepted(size):
    model = small().eval()
    xrays = torch.rand(2, 2, *size)
    volume, _ = model(xrays)
    assert volume.shape == (2, 1, 16, 16, 16)
    assert torch.equal(model(xrays.unsqueeze(2))[0], volume)


def test_other_shapes_are_named():
    model = small()
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\).*PA, then lateral"):
        model(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\(50, 50\).*multiples of 32"):
        model(torch.rand(1, 2, 50, 50))
    with pytest.raises(InputError, match=r"model\.volume_size.*\[16, 16, 20\]"):
        small(volume_size=(16, 16, 20))
    with pytest.raises(InputError, match=r"model\.base_channels is 24"):
        small(base_channels=24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume_size": 16}, "volume_size is 16; expected 3 multiples of 8, at least 16"),
        ({"volume_size": (16, 16)}, r"volume_size is \[16, 16\]; expected 3 multiples"),
        ({"base_channels": 0}, "base_channels is 0; expected a multiple of 16, at least 16"),
        ({"base_channels": 272}, "base_channels is 272; expected a multiple of 32"),
        ({"base_channels": "64"}, "base_channels is '64'; expected a multiple of 16"),
        ({"stem_stride": 3}, "stem_stride is 3; expected 1, 2 or 4"),
        ({"xray_size": 100}, "xray_size is 100; expected a multiple of 32, at least 32"),
        ({"xray_size": 0}, "xray_size is 0; expected a multiple of 32"),
        ({"encoder_blocks": (1, 1, 1)}, r"encoder_blocks is \[1, 1, 1\]; expected 4 whole numbers, at least 0"),
        ({"encoder_blocks": (1, 1, -1, 1)}, r"encoder_blocks is \[1, 1, -1, 1\]; expected 4"),
        ({"decoder_blocks": (1, 1)}, r"decoder_blocks is \[1, 1\]; expected 3 whole numbers"),
        ({"decoder_blocks": 3}, "decoder_blocks is 3; expected 3 whole numbers"),
        ({"transformer_blocks": -1}, "transformer_blocks is -1; expected a whole number, at least 0"),
        ({"transformer_blocks": True}, "transformer_blocks is True"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(InputError, match=rf"model\.{message}"):
        small(**changes)


@pytest.mark.parametrize("channels", [16, 48, 112, 128, 240, 256, 288])
def test_every_width_that_is_admitted_can_be_built(channels):
    with torch.device("meta"):  # GroupNorm and attention refuse other widths when they are built
        EnhancedDirectModel(**{**SMALL, "base_channels": channels}, decoder_blocks=(1, 1, 1), transformer_blocks=1)


def test_output_is_clamped_in_eval_mode_only():
    model = small()
    with torch.no_grad():
        model.decoder[0].head.bias.fill_(7.0)
        xrays = torch.rand(1, 2, 64, 64)
        assert model(xrays)[0].max() > 1
        assert model.eval()(xrays)[0].max() == 1


def test_every_parameter_gets_a_gradient():
    model = small()
    volume, aux = model(torch.rand(2, 2, 64, 64))
    (volume.square().mean() + sum(v.square().mean() for v in aux.values())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_residual_block_starts_as_the_identity():
    x = torch.randn(1, 16, 6, 6, 6)
    assert torch.equal(ResidualBlock(16, 3)(x), x)
    tokens = torch.randn(2, 6, 16)
    assert torch.equal(TransformerBlock(16, heads=2)(tokens), tokens)


def test_the_views_are_kept_apart():
    model = small().eval()
    xrays = torch.rand(1, 2, 64, 64)
    assert not torch.allclose(model(xrays)[0], model(xrays.flip(1))[0], atol=1e-4)


def test_samples_of_a_batch_do_not_mix():
    model, xrays = small().eval(), torch.rand(3, 2, 64, 64)
    together, alone = model(xrays)[0], torch.cat([model(xray[None])[0] for xray in xrays])
    assert torch.allclose(together, alone, atol=1e-5)


def coordinates(size):
    """Places ``(1, 3, size, size, size)`` of the voxels of a cube from -1 to 1."""
    axis = 2 * (torch.arange(size) + 0.5) / size - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))[None]


def test_coarse_volumes_and_features_keep_their_place_on_finer_grids():
    """Coordinates predicted at a quarter of the resolution are the voxels' own at full resolution."""
    model = small().eval()
    for index, stage in enumerate(model.decoder):
        nn.init.zeros_(stage.head.weight)
        nn.init.zeros_(stage.head.bias)
        if index == 0:
            stage.register_forward_hook(lambda _, inputs, output: (output[0], 0.5 + 0.4 * coordinates(4)[:, :1]))
    wanted = 0.5 + 0.4 * coordinates(16)[0, 0]
    inside = (slice(3, -3),) * 3  # beyond the outermost coarse centres, interpolation is constant
    assert torch.allclose(model(torch.rand(1, 2, 64, 64))[0][0, 0][inside], wanted[inside], atol=1e-5)

    stage = DecoderStage(3, 8, 8, 8, blocks=0)
    nn.init.zeros_(stage.lift.fuse.weight)
    nn.init.zeros_(stage.lift.fuse.bias)
    with torch.no_grad():
        stage.reduce.weight.copy_(torch.eye(8, 3).view(8, 3, 1, 1, 1))
        stage.reduce.bias.zero_()
        features, _ = stage(coordinates(8), torch.zeros(2, 8, 16, 16), Geometry(), (16, 16, 16))
    inside = (slice(1, -1),) * 3
    for axis in range(3):
        assert torch.allclose(features[0, axis][inside], coordinates(16)[0, axis][inside], atol=1e-5)


def test_a_mark_in_one_view_changes_the_voxels_on_its_rays_most():
    """Without the bottleneck's global context, the response to a PA mark is a beam at its row and column."""
    model = small(transformer_blocks=0).eval()
    xrays = torch.full((1, 2, 64, 64), 0.3)
    marked = xrays.clone()
    marked[0, 0, 8:12, 40:44] = 0.9  # a quarter from the top, right of the middle
    with torch.no_grad():
        change = model.decoder[2].lift(features(model, marked), model.geometry, (16, 16, 16))
        change = (change - model.decoder[2].lift(features(model, xrays), model.geometry, (16, 16, 16))).abs().sum(1)[0]
    z, _, x = (change == change.max()).nonzero()[0].tolist()
    assert abs(z - 2.5) <= 1.5
    assert abs(x - 10.5) <= 1.5
    far = change[:, :, :4].max()  # columns the PA mark's rays never meet; the lateral view is unchanged
    assert far < 0.2 * change.max()


def features(model, xrays):
    return model.encoder(xrays)[1]


def test_geometry_reaches_the_lifting_and_travels_with_the_weights():
    cone, parallel = small(), small(geometry=Geometry("parallel"))
    xrays = torch.rand(1, 2, 64, 64)
    assert not torch.allclose(cone.eval()(xrays)[0], parallel.eval()(xrays)[0], atol=1e-5)
    cone.load_state_dict(parallel.state_dict())
    assert cone.geometry == Geometry("parallel")
    assert torch.equal(cone(xrays)[0], parallel(xrays)[0])


def test_other_resolutions_are_resampled_to_the_trained_one():
    model = small(xray_size=64).eval()
    phantom = torch.zeros(1, 1, 32, 32, 32)
    phantom[..., 8:20, 8:24, 10:30] = 0.5
    fine = render_xrays(phantom, Geometry(), (128, 128))
    coarse = torch.nn.functional.interpolate(fine, size=64, mode="area")
    assert torch.allclose(model(fine)[0], model(coarse)[0], atol=1e-6)
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    assert fresh.xray_size == 64


def test_activation_checkpointing_changes_memory_not_gradients():
    plain, saving = small(), small(activation_checkpointing=True)
    xrays = torch.rand(1, 2, 64, 64)
    for model in (plain, saving):
        volume, aux = model.train()(xrays)
        (volume.mean() + aux["volume_8"].mean()).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_channels_last_agrees():
    model = small().eval()
    xrays = torch.rand(1, 2, 64, 64)
    with torch.no_grad():
        reference = model(xrays)[0]
        assert torch.allclose(to_channels_last(model)(xrays)[0], reference, atol=1e-5)


def in_bfloat16(model, *inputs):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return model(*inputs)


@pytest.mark.parametrize("training", [False, True])
def test_volumes_are_summed_in_float32_whatever_the_convolutions_run_in(training):
    """Without features each scale predicts its bias: tissue of 61 HU and 4 HU apart stay so, to 0.01 HU.

    In bfloat16, values around 0.4 are 5 HU apart.
    """
    model = EnhancedDirectModel(**{**SMALL, "decoder_blocks": (1, 1, 1), "transformer_blocks": 1}).train(training)
    shares = torch.tensor([0.2512, 0.1613, 0.0215])
    for stage, share in zip(model.decoder, shares):
        nn.init.constant_(stage.head.bias, share.item())
    volume, aux = in_bfloat16(model, torch.rand(1, 2, 64, 64))
    for found, expected in zip((aux["volume_4"], aux["volume_8"], volume), shares.cumsum(0)):
        assert found.dtype == torch.float32
        assert 2500 * (found - expected).abs().max() < 0.01
    fine = in_bfloat16(small(), torch.rand(1, 2, 64, 64))[0]
    assert fine.unique().numel() > 0.9 * fine.numel()  # no steps: 65,536 voxels would share 1,900 bfloat16 numbers


def test_it_learns_one_pair():
    torch.manual_seed(0)
    model = EnhancedDirectModel(**{**SMALL, "decoder_blocks": (1, 1, 1), "transformer_blocks": 1})
    target = torch.zeros(1, 1, 16, 16, 16)
    target[..., 4:12, 5:11, 3:9] = 0.6
    xrays = render_xrays(target, model.geometry, (64, 64))
    criterion = EnhancedLoss(perceptual_weight=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        volume, aux = model(xrays)
        total, _ = criterion(volume, target, aux=aux)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.25 * losses[0]
    # Trained, features in bfloat16 cost less than a tenth of a CT's noise (10 HU and more) and shift nothing.
    with torch.no_grad():
        error = 2500 * (in_bfloat16(model, xrays)[0] - model(xrays)[0])
    assert error.abs().mean() < 2.0
    assert error.mean().abs() < 1.0


def test_load_base_model_names_a_file_whose_weights_do_not_fit(tmp_path):
    from xray2ct.checkpoints import save_checkpoint

    config = {**SMALL, "decoder_blocks": (1, 1, 1), "transformer_blocks": 1}
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    state = small().state_dict()
    path = tmp_path / "base.pt"
    save_checkpoint(path, {"kind": registry.KIND, "model_config": config, "model_state_dict": state})
    model, data = loading.load_base_model(path)
    assert not model.training
    assert data["model_config"] == config
    del state["prior"]
    save_checkpoint(path, {"kind": registry.KIND, "model_config": config, "model_state_dict": state})
    with pytest.raises(InputError, match=r"base\.pt.*do not fit"):
        loading.load_base_model(path)


# -- what is seen --------------------------------------------------------------------------------


def test_a_network_with_the_seen_channel_reads_it():
    model, xrays = make_model(seen_channel=True), torch.rand(2, 2, 64, 64)
    whole, seen = model(xrays)[0], torch.ones_like(xrays)
    assert torch.equal(model(xrays.unsqueeze(2))[0], whole)
    assert torch.equal(model(torch.stack([xrays, seen], dim=2))[0], whole)  # no channel: all is seen
    seen[1, 1, :, 40:] = 0
    partly = model(torch.stack([xrays, seen], dim=2))[0]
    assert torch.equal(partly[0], whole[0])
    assert (partly[1] - whole[1]).abs().max() > 1e-3


def test_the_seen_channel_is_resampled_with_the_pixels():
    xrays, seen = torch.rand(1, 2, 128, 128), torch.ones(1, 2, 128, 128)
    seen[..., :3] = 0  # the first pixel and half of the second
    prepared = prepare_xrays(torch.stack([xrays, seen], dim=2), 64, seen_channel=True)
    assert prepared.shape == (1, 2, 2, 64, 64)
    assert torch.equal(prepared[:, :, 0], prepare_xrays(xrays, 64))
    assert prepared[0, :, 1, 5, :3].tolist() == [[0.0, 0.5, 1.0]] * 2


def test_without_the_seen_channel_weights_and_shapes_stay():
    plain, other = EnhancedDirectModel(**TINY_MODEL), EnhancedDirectModel(**TINY_MODEL, seen_channel=True)
    assert plain.encoder.stem.weight.shape == (8, 1, 5, 5)
    assert other.encoder.stem.weight.shape == (8, 2, 5, 5)
    assert plain.state_dict().keys() == other.state_dict().keys()
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 64, 64\); expected \(B, 2, H, W\): PA, then lateral$"):
        plain(torch.rand(1, 2, 2, 64, 64))
    for shape in ((1, 2, 3, 64, 64), (1, 3, 64, 64), (2, 64, 64)):
        with pytest.raises(ValueError, match=r"expected \(B, 2, H, W\).*or \(B, 2, 2, H, W\): of each view pixels"):
            other(torch.rand(shape))


def test_learned_upsampling_is_a_network_of_its_own():
    torch.manual_seed(0)
    fixed, learned = (EnhancedDirectModel(**TINY_MODEL, upsampling=name) for name in ("trilinear", "learned"))
    xrays = torch.rand(1, 2, 64, 64)
    volume, aux = learned(xrays)
    assert volume.shape == fixed(xrays)[0].shape
    assert [tuple(v.shape) for v in aux.values()] == [tuple(v.shape) for v in fixed(xrays)[1].values()]
    coarse = torch.randn(1, learned.decoder[0].reduce.in_channels, 2, 2, 2)
    moved = learned.decoder[0].reduce(F.pad(coarse, (1, 0) * 3))[..., 2:, 2:, 2:]  # a coarse cell further: two cells
    assert torch.allclose(moved, learned.decoder[0].reduce(coarse), atol=1e-5)
    volume.sum().backward()
    assert all(stage.reduce.weight.grad is not None for stage in learned.decoder)
    with pytest.raises(InputError, match=r"model\.upsampling is 'cubic'; expected one of trilinear, learned"):
        EnhancedDirectModel(**TINY_MODEL, upsampling="cubic")
