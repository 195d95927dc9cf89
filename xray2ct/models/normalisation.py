"""Group and layer normalisation in the dtype of the activations, with statistics in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from xray2ct.autocast import without_autocast


def normalise(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """Group normalisation in the dtype of ``x``; its kernel takes the statistics in float32 whatever that is.

    Autocast on a GPU would widen the input to float32, keep the wide result for the backward pass and cast it back
    for the next convolution: twice the memory, and four more passes over the features.
    """
    with without_autocast(x.device):
        return F.group_norm(x, norm.num_groups, *_affine(norm, x), norm.eps)


def norm_silu(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """SiLU of :func:`normalise`: what stands before each convolution. torch.compile makes one kernel of it."""
    return F.silu(normalise(x, norm))


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Layer normalisation of tokens ``(B, N, C)`` in their dtype, as :func:`normalise`."""
    with without_autocast(x.device):
        return F.layer_norm(x, norm.normalized_shape, *_affine(norm, x), norm.eps)


def _affine(norm, x) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift in the dtype that the kernel takes: a CPU's takes float32 ones beside reduced features."""
    if x.device.type == "cpu" and norm.weight.dtype == torch.float32:
        return norm.weight, norm.bias
    return norm.weight.to(x.dtype), norm.bias.to(x.dtype)
