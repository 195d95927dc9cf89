"""X2CT-GAN's generator: the published layer table, the axes of its two branches, shapes and gradients."""

import pytest
import torch
from torch import nn

from xray2ct.files import InputError
from xray2ct.models.x2ct import ConnectionA, ConnectionB, DenseEncoder, X2CTGenerator


def small(**changes):
    torch.manual_seed(0)
    return X2CTGenerator(**{"volume_size": (16, 16, 16), "base_channels": 16, "xray_size": 64, **changes})


def test_the_encoder_has_the_published_features_and_as_many_weights_as_the_table_gives():
    """Counted by hand: what dense layers add to 64 channels, halved after each block."""
    encoder = DenseEncoder(64)
    with torch.no_grad():
        shapes = [tuple(x.shape[1:]) for x in encoder(torch.rand(1, 1, 128, 128))]
    # 64 + 6 * 32 = 256, 128 + 12 * 32 = 512, 256 + 24 * 32 = 1024, 512 + 16 * 32 = 1024, 512 + 6 * 32 = 704
    assert shapes == [(64, 128, 128), (128, 64, 64), (256, 32, 32), (512, 16, 16), (512, 8, 8), (352, 4, 4)]
    total, channels = 49 * 64 + 64, 64
    for layers in (6, 12, 24, 16, 6):
        total += 2 * channels + 9 * channels**2
        for _ in range(layers):
            total += 2 * channels + channels * 128 + 2 * 128 + 9 * 128 * 32
            channels += 32
        total += 2 * channels + channels * (channels // 2)
        channels //= 2
    assert sum(p.numel() for p in encoder.parameters()) == total


def test_the_published_size_and_a_coarser_one():
    with torch.device("meta"):
        whole, coarse = X2CTGenerator(), X2CTGenerator((64, 64, 64))
    with torch.no_grad():  # four steps from 2^3
        volume, aux = small(volume_size=(32, 32, 32))(torch.rand(1, 2, 64, 64))
    assert volume.shape == (1, 1, 32, 32, 32)
    assert aux == {}
    widths = [block[-1][0].out_channels for block in whole.fusion.blocks]
    assert widths == [128, 64, 32, 16, 16]
    counts = [sum(p.numel() for p in model.parameters()) for model in (whole, coarse)]
    assert counts == [40_028_881, 39_934_097]


def test_shapes_and_range():
    model = small()
    xrays = torch.rand(2, 2, 64, 64)
    volume, _ = model(xrays)
    assert volume.shape == (2, 1, 16, 16, 16)
    model.head.weight.data.mul_(50)
    trained, (clamped, _) = model(xrays)[0], model.eval()(xrays.unsqueeze(2))
    assert trained.min() < 0
    assert trained.max() > 1
    assert torch.equal(clamped, trained.clamp(0, 1))


def test_copies_run_along_each_views_rays():
    maps = torch.rand(1, 3, 6, 6)
    for view in range(2):
        connection = ConnectionB(3, 4, view)
        connection.deep = nn.Identity()
        volume, flat = connection(maps), connection.flat(maps)
        assert volume.shape == (1, 4, 6, 6, 6)
        for d, h, w in ((0, 5, 2), (4, 1, 3)):  # PA columns run along W, lateral ones along H
            assert torch.equal(volume[:, :, d, h, w], flat[:, :, d, w if view == 0 else h])


def test_every_cell_of_the_coarsest_volume_sees_every_pixel():
    connection, maps = ConnectionA(8, 4, 4), torch.rand(1, 8, 4, 4, requires_grad=True)
    connection.connect.weight.data.abs_()
    connection(maps)[0, :, 3, 0, 2].sum().backward()
    assert maps.grad[0].abs().amax(dim=0).min() > 0


def test_the_two_views_enter_by_their_own_branches():
    model, xrays = small().eval(), torch.rand(1, 2, 64, 64)
    with torch.no_grad():
        assert (model(xrays)[0] - model(xrays.flip(1))[0]).abs().max() > 1e-3


def test_every_parameter_takes_part_and_recomputing_changes_no_gradient():
    gradients, xrays = [], torch.rand(1, 2, 64, 64)
    for recompute in (False, True):
        model = small(activation_checkpointing=recompute)
        model(xrays)[0].square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        gradients.append(model.encoders[0].stem[1].weight.grad)
    assert torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"volume_size": (24, 24, 24)},
            r"volume_size is \[24, 24, 24\] .*xray_size / 32 \* 2\^k voxels \(4, 8, 16, 32, 64",
        ),
        ({"volume_size": (16, 16, 32)}, r"volume_size is \[16, 16, 32\]"),
        ({"xray_size": 32}, "X-rays of at least 64"),
        ({"base_channels": 24}, "base_channels is 24; expected a multiple of 16"),
    ],
)
def test_sizes_that_it_cannot_have_are_named(changes, words):
    with pytest.raises(InputError, match=f"model.{words}" if "X-rays" not in words else words):
        small(**changes)
