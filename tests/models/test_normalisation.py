"""Norms in the dtype of the activations, and trilinear upsampling as matrix products, against torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xray2ct.models.normalisation import layer_norm, norm_silu
from xray2ct.models.upsampling import upsample_trilinear


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 5, 6, 7), (3, 16, 9, 8)])
def test_norm_and_silu_in_bfloat16_are_those_in_float32_but_for_rounding(shape, weights):
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias, 0.0, 0.3)
    x = (4.0 + torch.randn(shape)).bfloat16()
    expected_input = x.float().requires_grad_()
    expected = F.silu(norm(expected_input))
    expected.square().sum().backward()
    found_input = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm_silu(found_input, norm.to(weights))
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()
    scale = expected_input.grad.abs().max()
    assert (found_input.grad.float() - expected_input.grad).abs().max() < 0.03 * scale
    norm.float()
    assert torch.equal(norm_silu(expected_input.detach(), norm), F.silu(norm(expected_input.detach())))


def test_layer_norm_keeps_the_dtype_of_the_tokens():
    norm, x = nn.LayerNorm(8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer_norm(x.bfloat16(), norm)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), norm(x), atol=0.03)
    assert torch.equal(layer_norm(x, norm), norm(x))


@pytest.mark.parametrize(("shape", "size"), [((2, 1, 4, 5, 6), (8, 10, 12)), ((1, 1, 6, 4, 2), (24, 16, 9))])
def test_upsampling_by_matrices_is_torchs_and_so_is_its_gradient(shape, size):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    expected = F.interpolate(x, size=size, mode="trilinear", align_corners=False)
    found = upsample_trilinear(x, size)
    assert found.grad_fn.name() != expected.grad_fn.name()  # products here, not the same kernel
    assert torch.allclose(found, expected, atol=1e-6)
    gradient = torch.randn(found.shape)
    one, other = (torch.autograd.grad(y, x, gradient)[0] for y in (found, expected))
    assert torch.allclose(one, other, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(upsample_trilinear(x, size), found)  # a volume stays in float32


def test_upsampling_of_features_and_to_the_same_size():
    x = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    expected = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    assert torch.allclose(upsample_trilinear(x, (8, 10, 12)), expected, atol=1e-6)
    assert upsample_trilinear(x, (4, 5, 6)) is x
