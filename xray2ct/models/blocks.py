"""Blocks of the networks: residual, transformer, dense, X-ray encoder, back-projection of features, 3D PixelShuffle."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from xray2ct.autocast import without_autocast
from xray2ct.files import InputError, whole_number
from xray2ct.geometry.lifting import averaged_to, lift_view
from xray2ct.geometry.projector import Geometry
from xray2ct.models.normalisation import layer_norm, norm_silu
from xray2ct.models.upsampling import upsample_trilinear
from xray2ct.models.working_weights import with_cast_weights

Layer = TypeVar("Layer", bound=nn.Module)

# ------------------------------------------------------------------------------------------------
# Blocks


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm, because batches are small; groups of at least 8 channels keep its statistics steady."""
    return nn.GroupNorm(_groups(channels), channels)


def _groups(channels: int) -> int:
    return max(1, min(16, channels // 8))


def checked_width(name: str, channels) -> int:
    """A number of channels that :func:`group_norm` can divide; else :class:`InputError` naming the setting."""
    width = whole_number(name, channels, 1)
    if width % _groups(width):
        raise InputError(f"{name} is {width}; expected a multiple of {8 if width < 128 else 16}")
    return width


def whole_groups(channels: int) -> int:
    """The next lower number of channels that :func:`group_norm` can divide; at least 8."""
    return max(8, channels // 8 * 8 if channels < 128 else channels // 16 * 16)


def zero_init(layer: Layer) -> Layer:
    """The same layer with weights and bias at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """Pre-activation residual block (He et al., 2016), 2D or 3D; the second convolution starts at zero."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.norm1 = group_norm(channels)
        self.conv1 = conv(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = zero_init(conv(channels, channels, 3, padding=1))

    def forward(self, x):
        y = self.conv1(norm_silu(x, self.norm1))
        return x + self.conv2(norm_silu(y, self.norm2))


def mlp(channels: int, ratio: int = 4) -> nn.Sequential:
    """The two-layer perceptron of a transformer block."""
    return nn.Sequential(nn.Linear(channels, ratio * channels), nn.GELU(), nn.Linear(ratio * channels, channels))


def split_heads(x: torch.Tensor, parts: int, heads: int) -> torch.Tensor:
    """Queries, keys, values in one: (B, N, parts * C) -> (parts, B, heads, N, C / heads)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Multi-head attention of (B, heads, N, C / heads) to (B, heads, M, C / heads) -> (B, N, C)."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP over the coarsest volume's cells: the global 3D context."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = mlp(channels)
        for last in (self.out, self.mlp[-1]):
            zero_init(last)

    def forward(self, x):  # (B, N, C)
        x = x + self.out(attend(*split_heads(self.qkv(layer_norm(x, self.norm1)), 3, self.heads)))
        return x + self.mlp(layer_norm(x, self.norm2))


class ActivationCheckpointing(nn.Module):
    """Base of the networks that can recompute activations in the backward pass instead of keeping them."""

    activation_checkpointing = False

    def _run(self, function, *inputs, modules=()):
        """``function(*inputs)``, recomputed in the backward pass where that is wanted.

        modules: those that ``function`` calls, by default itself; see :func:`working_weights.with_cast_weights`.
        """
        function = with_cast_weights(function, *modules or (function,))
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


class XrayEncoder(nn.Module):
    """Four stages shared by all views, told apart by a learned view embedding.

    Stage s has stride ``stem_stride * 2^s``: 512^2 -> 256^2, 128^2, 64^2, 32^2 with the default
    stem. The stem folds pixels into channels, so that no convolution runs at full resolution.
    """

    def __init__(self, widths, blocks, stem_stride: int, in_channels: int = 1, views: int = 2):
        super().__init__()
        self.stem_stride, self.in_channels = stem_stride, in_channels
        folded = in_channels * stem_stride**2
        self.stem = nn.Conv2d(folded, widths[0], 5 if stem_stride == 1 else 3, padding=2 if stem_stride == 1 else 1)
        self.view_embedding = nn.Parameter(0.02 * torch.randn(views, widths[0]))
        self.stages = nn.ModuleList()
        for stage, (width, count) in enumerate(zip(widths, blocks)):
            layers: list[nn.Module] = [ResidualBlock(width, 2) for _ in range(count)]
            if stage > 0:
                layers.insert(0, nn.Conv2d(widths[stage - 1], width, 2, stride=2))
            self.stages.append(nn.Sequential(*layers))

    def forward(self, xrays):  # (B, V, H, W), or (B, V, C, H, W) with C channels per view
        batch = xrays.shape[0]
        x = xrays.reshape(-1, self.in_channels, *xrays.shape[-2:])
        x = self.stem(F.pixel_unshuffle(x, self.stem_stride))
        x = x + self.view_embedding.repeat(batch, 1)[:, :, None, None].to(x.dtype)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features  # 4 x (B V, C_s, H / stride_s, W / stride_s)


def lift_views(reduce: nn.ModuleList, features, geometry: Geometry, volume_size, boxes=None) -> list[torch.Tensor]:
    """Reduce each view's features by its own layer and back-project them: (B V, C, h, w) -> V x (B, c, D, H, W).

    One layer per view, V = 2, or 1 (PA). volume_size, boxes: see :func:`lift_view`.
    """
    views = features.unflatten(0, (-1, len(reduce))).unbind(1)
    return [lift_view(layer(x), v, geometry, volume_size, boxes) for v, (layer, x) in enumerate(zip(reduce, views))]


class Lifting(nn.Module):
    """Back-projection of X-ray features to one volume of features; the views are kept apart until the end.

    Each view's features go to every voxel that projects there. The fusion sees both views and their
    product, which is large where both agree; the coarser scale, added by the caller, is the depth prior.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int):
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(in_channels, channels, 1) for _ in range(2))
        self.fuse = nn.Conv3d(3 * channels, out_channels, 1)

    def forward(self, features, geometry, volume_size, boxes=None):  # (2B, C, h, w)
        """``volume_size`` covers the whole cube; ``boxes`` are parts of it, see :func:`lift_view`."""
        pa, lateral = lift_views(self.reduce, features, geometry, volume_size, boxes)  # (B, c, D, H, W) each
        return self.fuse(torch.cat([pa, lateral, pa * lateral], dim=1))


def in_full_precision(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)`` in the precision of its weights (float32), also under autocast: for layers that end in a volume.

    In bfloat16 a value of 0.5 to 1 is rounded to steps of 1/256, of 2,500 HU that is 10.
    """
    with without_autocast(x.device):
        x = x.to(next(layer.parameters()).dtype)
        if isinstance(layer, nn.Conv3d) and layer.kernel_size == (1, 1, 1) and _is_linear_faster(x):
            y = F.linear(x.movedim(1, -1), layer.weight.flatten(1), layer.bias)
            return y.movedim(-1, 1)
        return layer(x)


def _is_linear_faster(x: torch.Tensor) -> bool:
    """Whether a pointwise convolution is better computed as a matrix product: channels-last features on one thread.

    torch then leaves oneDNN and copies them to contiguous ones, there and back: 80 and 129 ms, forward and backward,
    of 32 channels at 64^3, and 2 and 19 ms as a product.
    """
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return x.device.type == "cpu" and last and not torch.compiler.is_compiling() and torch.get_num_threads() == 1


def prepare_xrays(xrays: torch.Tensor, size: int | None, views: int = 2, seen_channel: bool = False) -> torch.Tensor:
    """``(B, V, H, W)`` or ``(B, V, 1, H, W)`` -> ``(B, V, size, size)``; ``size`` None leaves the resolution.

    seen_channel: take ``(B, V, 2, H, W)``, too, each view's pixels and how much of each the film shows, in [0, 1];
    returns ``(B, V, 2, size, size)``, where X-rays without that channel are seen everywhere.
    Raises ``ValueError`` on another shape, another number of views, or a resolution that is not a multiple of 32.
    """
    if seen_channel and xrays.ndim == 5 and xrays.shape[2] == 2:
        return torch.stack([prepare_xrays(channel, size, views) for channel in xrays.unbind(2)], dim=2)
    given = xrays
    if xrays.ndim == 5 and xrays.shape[2] == 1:
        xrays = xrays.squeeze(2)
    if xrays.ndim != 4 or xrays.shape[1] != views:
        wanted = "(B, 2, H, W): PA, then lateral" if views == 2 else "(B, 1, H, W): PA alone"
        wanted += f"; or (B, {views}, 2, H, W): of each view pixels, then what is seen" if seen_channel else ""
        raise ValueError(f"X-rays have shape {tuple(given.shape)}; expected {wanted}")
    if size is not None and tuple(xrays.shape[-2:]) != (size, size):
        if min(xrays.shape[-2:]) > size:
            xrays = averaged_to(xrays, (size, size))
        else:
            xrays = F.interpolate(xrays, size=(size, size), mode="bilinear")
    if xrays.shape[-2] % 32 or xrays.shape[-1] % 32:
        raise ValueError(f"X-rays have size {tuple(xrays.shape[-2:])}; expected multiples of 32")
    return torch.stack([xrays, torch.ones_like(xrays)], dim=2) if seen_channel else xrays


def pixels_of(xrays: torch.Tensor) -> torch.Tensor:
    """X-rays ``(B, V, H, W)`` without the channel of what is seen, ``(B, V, 2, H, W)``, where they have it."""
    return xrays[:, :, 0] if xrays.ndim == 5 and xrays.shape[2] == 2 else xrays


def check_stem_stride(stem_stride) -> None:
    if whole_number("model.stem_stride", stem_stride, 1) not in (1, 2, 4):
        raise InputError(f"model.stem_stride is {stem_stride}; expected 1, 2 or 4")


def check_xray_size(xray_size) -> None:
    """Raise :class:`InputError` unless X-rays of this size, or of any (None), can be encoded."""
    if xray_size is not None:
        whole_number("model.xray_size", xray_size, 32, multiple=32)


# ------------------------------------------------------------------------------------------------
# Super-resolution


def pixel_shuffle_3d(x: torch.Tensor, factor: int = 2) -> torch.Tensor:
    """``(B, C f^3, D, H, W)`` -> ``(B, C, f D, f H, f W)``: channels become sub-voxels (torch's is 2D only).

    Channel ``((c f + i) f + j) f + k`` goes to sub-voxel ``(i, j, k)``; after Shi et al. (CVPR 2016, eq. 4).
    """
    batch, channels, depth, height, width = x.shape
    f = factor
    if channels % f**3:
        raise ValueError(f"input has {channels} channels; expected a multiple of {f}^3 = {f**3}")
    x = x.reshape(batch, channels // f**3, f, f, f, depth, height, width)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, channels // f**3, depth * f, height * f, width * f)


def pixel_unshuffle_3d(x: torch.Tensor, factor: int = 2) -> torch.Tensor:
    """Inverse of :func:`pixel_shuffle_3d` (space-to-depth); sizes must be multiples of ``factor``."""
    batch, channels, depth, height, width = x.shape
    f = factor
    if depth % f or height % f or width % f:
        raise ValueError(f"input has size {(depth, height, width)}; expected multiples of {f}")
    x = x.reshape(batch, channels, depth // f, f, height // f, f, width // f, f)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(batch, channels * f**3, depth // f, height // f, width // f)


def upsample(coarse: torch.Tensor, scale: int = 4) -> torch.Tensor:
    """Trilinear upsampling ``(B, 1, D, H, W)`` -> ``(B, 1, 4D, 4H, 4W)``, float32: what stage 2 must beat."""
    return upsample_trilinear(coarse.float(), [scale * n for n in coarse.shape[2:]])


class DenseBlock(nn.Module):
    """Five convolutions, each seeing all earlier outputs; scaled residual (Wang et al., ESRGAN, 2018)."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        outputs = (growth, growth, growth, growth, channels)
        self.convs = nn.ModuleList(
            nn.Conv3d(channels + i * growth, width, 3, padding=1) for i, width in enumerate(outputs)
        )
        for conv in self.convs:
            # ESRGAN's 0.1 of He's initialisation: a deep stack of residuals starts near the identity.
            nn.init.kaiming_normal_(conv.weight, a=0.2)
            conv.weight.data *= 0.1
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        features = [x]
        for conv in self.convs[:-1]:
            features.append(F.leaky_relu(conv(torch.cat(features, dim=1)), 0.2))
        return x + 0.2 * self.convs[-1](torch.cat(features, dim=1))


class RRDB(nn.Module):
    """Residual in residual dense block: three dense blocks and a scaled residual around them (ESRGAN)."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.blocks = nn.Sequential(*[DenseBlock(channels, growth) for _ in range(3)])

    def forward(self, x):
        return x + 0.2 * self.blocks(x)


def shuffle_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Convolution and 3D PixelShuffle to twice the resolution; all eight sub-voxels start alike.

    Equal filters for the sub-voxels of a cell start without checkerboard (ICNR, Aitken et al., 2017).
    """
    conv = nn.Conv3d(in_channels, 8 * out_channels, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, a=0.2)
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        conv.weight.copy_(conv.weight[::8].repeat_interleave(8, dim=0))
    return nn.Sequential(conv, PixelShuffle3d())


class PixelShuffle3d(nn.Module):
    """:func:`pixel_shuffle_3d` by two as a layer."""

    def forward(self, x):
        return pixel_shuffle_3d(x, 2)
