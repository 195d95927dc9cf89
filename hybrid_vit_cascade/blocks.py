"""Blocks of the cascade's networks: modulated, ViT, depth prior, its back-projection layers, U-Net scales."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from xray2ct.autocast import without_autocast
from xray2ct.geometry.projector import Geometry, hat_weights
from xray2ct.models.blocks import ResidualBlock, attend, lift_views, mlp, split_heads, zero_init
from xray2ct.models.normalisation import norm_silu, normalise
from xray2ct.models.upsampling import upsample_trilinear
from xray2ct.models.working_weights import full_precision

BANDS = ("anterior", "mid", "posterior")  # of a view's depth axis; right, mid, left for the lateral view
PRIOR_BINS = 16  # depth bins of a prior, and pixels along each edge of its detector grid
TIME_FREQUENCIES = 128  # sines and as many cosines


# ------------------------------------------------------------------------------------------------
# Blocks


def sinusoidal_embedding(position: torch.Tensor) -> torch.Tensor:
    """Positions (B,) in [0, 1] -> sines and cosines (B, 2 * TIME_FREQUENCIES), wavelengths 2 pi / 1000 to 20 pi.

    Vaswani et al. (2017), section 3.5, on ``1000 * position``: the scale of a thousand diffusion steps.
    """
    rates = torch.arange(TIME_FREQUENCIES, device=position.device, dtype=torch.float32) / TIME_FREQUENCIES
    angles = 1000.0 * position.float()[:, None] * torch.exp(-math.log(1e4) * rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def embedding_mlp(inputs: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, channels), nn.SiLU(), nn.Linear(channels, channels))


def modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x (B, C, D, H, W) * (1 + scale) + shift with scale and shift (B, C), in the dtype of ``x``."""
    scale, shift = (v.to(x.dtype)[:, :, None, None, None] for v in (1.0 + scale, shift))
    return torch.addcmul(shift, x, scale)


class ModulatedBlock(ResidualBlock):
    """3D residual block whose first normalisation is scaled and shifted by the embedding (AdaGN).

    Dhariwal and Nichol (2021), section 3; modulation and second convolution start at zero: an identity.
    """

    def __init__(self, channels: int, embedding: int):
        super().__init__(channels, dims=3)
        self.modulation = zero_init(nn.Linear(embedding, 2 * channels))

    def forward(self, x, embedding):  # (B, C, D, H, W), (B, E)
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        y = self.conv1(F.silu(modulate(normalise(x, self.norm1), scale, shift)))
        return x + self.conv2(norm_silu(y, self.norm2))


class ViTBlock(nn.Module):
    """Self-attention, cross-attention to the X-ray tokens and an MLP, each under AdaLN-Zero.

    x + gate * f(norm(x) * (1 + scale) + shift), with scale, shift and gate linear in the embedding and zero at the
    start, so that the block starts as the identity (Peebles and Xie, DiT, 2023, section 3.2).
    """

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.heads = heads
        self.modulation = zero_init(nn.Linear(channels, 9 * channels))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.attention_out = nn.Linear(channels, channels)
        self.query = nn.Linear(channels, channels)
        self.context = nn.Linear(context_channels, 2 * channels)
        self.cross_out = nn.Linear(channels, channels)
        self.mlp = mlp(channels)

    def keys_values(self, context):
        """X-ray tokens (B, M, C) -> keys and values (2, B, heads, M, C / heads): the same at every sampling step."""
        return split_heads(self.context(context), 2, self.heads)

    def forward(self, x, embedding, keys_values):  # (B, N, C), (B, C), (2, B, heads, M, C / heads)
        modulation = self.modulation(embedding).unsqueeze(1).chunk(9, dim=-1)
        x = self._branch(x, modulation[0:3], self._self_attention)
        x = self._branch(x, modulation[3:6], lambda y: self._cross_attention(y, keys_values))
        return self._branch(x, modulation[6:9], self.mlp)

    def _branch(self, x, modulation, function):
        scale, shift, gate = modulation
        return x + gate * function(F.layer_norm(x, x.shape[-1:]) * (1.0 + scale) + shift)

    def _self_attention(self, x):
        return self.attention_out(attend(*split_heads(self.qkv(x), 3, self.heads)))

    def _cross_attention(self, x, keys_values):
        return self.cross_out(attend(*split_heads(self.query(x), 1, self.heads), *keys_values))


# ------------------------------------------------------------------------------------------------
# Depth prior and back-projection of X-ray features


class DepthPrior(nn.Module):
    """For each view, each pixel of a coarse detector grid and each band: a learned distribution over depth.

    X-rays do not show where along its ray a feature belongs; anatomy often decides it (chest wall and heart in front,
    spine at the back). Each band starts as a Gaussian around a sixth, a half or five sixths of the cube's depth, a
    sixth wide.
    """

    def __init__(self, num_views: int):
        super().__init__()
        depth = (torch.arange(PRIOR_BINS) + 0.5) / PRIOR_BINS
        centres = (torch.arange(len(BANDS)) + 0.5) / len(BANDS)
        logits = -0.5 * ((depth - centres[:, None]) * 2 * len(BANDS)).square()  # (bands, bins)
        grid = (PRIOR_BINS, PRIOR_BINS)
        self.depth_prior = nn.Parameter(logits[None, :, :, None, None].repeat(num_views, 1, 1, *grid))
        full_precision(self)

    def distribution(self) -> torch.Tensor:
        """Probabilities ``(views, bands, depth bins, rows, columns)``, summing to 1 over the depth bins."""
        return self.depth_prior.float().softmax(dim=2)

    def forward(self, geometry: Geometry, size: int) -> torch.Tensor:
        """Density ``(views, bands, D, H, W)`` at each voxel of a ``size``^3 grid: 1 where depth does not matter.

        The probability of the voxel's depth, relative to an even spread, on the ray through its centre.
        """
        with without_autocast(self.depth_prior.device):
            density = PRIOR_BINS * self.distribution()
            return torch.stack([self._view(density[v], geometry, v, size) for v in range(len(density))])

    def _view(self, density, geometry, view, size):
        axis = geometry.voxel_centres_mm(size, device=density.device)
        magnified = [m(view, axis)[:, None] * axis for m in (geometry.row_magnification, geometry.magnification)]
        rows, cols = (hat_weights(mm, geometry.detector_mm, PRIOR_BINS, constant=True) for mm in magnified)
        depths = hat_weights(axis, geometry.fov_mm, PRIOR_BINS, constant=True)  # (K, bins)
        # The prior at each depth of the grid, then at the rows, then at the columns; bands side by side in one product.
        slices = torch.einsum("kd,bdrc->krbc", depths, density).flatten(2)  # (K, row bins, bands * column bins)
        sampled = (rows @ slices).reshape(size, size * len(BANDS), PRIOR_BINS) @ cols.transpose(1, 2)
        sampled = sampled.view(size, size, len(BANDS), size)  # (K, D, bands, across)
        # Depth is y (H) for the PA view and x (W) for the lateral one.
        return sampled.permute(2, 1, 0, 3) if view == 0 else sampled.permute(2, 1, 3, 0)


class PriorLifting(nn.Module):
    """Back-projection of X-ray features to every voxel of a grid, weighted by the depth prior.

    A quarter of each view's channels belongs to each band of the prior; the last quarter is spread evenly over
    depth, and so are all of them when there is no prior. The views stay apart until the fusion, which also sees
    their product: where both agree.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, num_views: int):
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(in_channels, channels, 1) for _ in range(num_views))
        self.fuse = nn.Conv3d(channels * (3 if num_views == 2 else 1), out_channels, 1)

    def forward(self, features, prior, geometry, size):  # (B V, C, h, w), DepthPrior or None
        views = lift_views(self.reduce, features, geometry, (size,) * 3)  # V x (B, c, D, H, W)
        if prior is not None:
            views = [self._weigh(x, density) for x, density in zip(views, prior(geometry, size))]
        if len(views) == 2:
            views.append(views[0] * views[1])
        return self.fuse(torch.cat(views, dim=1))

    @staticmethod
    def _weigh(x, density):  # (B, c, D, H, W), (bands, D, H, W)
        weight = torch.cat([density, torch.ones_like(density[:1])]).to(x.dtype)
        return (x.unflatten(1, (len(weight), -1)) * weight[:, None]).flatten(1, 2)


class DetailLifting(nn.Module):
    """Back-projection of X-ray features for a folded stage: at full resolution, then folded to the working grid.

    Few channels: at 256^3 each costs 34 MB per sample in 16 bits. One strided convolution folds and fuses.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, num_views: int, fold: int):
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(in_channels, channels, 1) for _ in range(num_views))
        self.fuse = nn.Conv3d(num_views * channels, out_channels, fold, stride=fold)

    def forward(self, features, geometry, size):  # (B V, C, h, w)
        return self.fuse(torch.cat(lift_views(self.reduce, features, geometry, (size,) * 3), dim=1))


# ------------------------------------------------------------------------------------------------
# Scales of the U-Net


class DownScale(nn.Module):
    """Half the resolution, the lifted features of that scale, blocks."""

    def __init__(self, fine: int, coarse: int, embedding: int, blocks: int):
        super().__init__()
        self.reduce = nn.Conv3d(fine, coarse, 2, stride=2)
        self.blocks = nn.ModuleList(ModulatedBlock(coarse, embedding) for _ in range(blocks))

    def forward(self, x, lifted, embedding):
        x = self.reduce(x) + lifted
        for block in self.blocks:
            x = block(x, embedding)
        return x


class UpScale(nn.Module):
    """Twice the resolution, the skip connection (which carries the lifted features), blocks."""

    def __init__(self, coarse: int, fine: int, embedding: int, blocks: int):
        super().__init__()
        self.reduce = nn.Conv3d(coarse, fine, 1)
        self.blocks = nn.ModuleList(ModulatedBlock(fine, embedding) for _ in range(blocks))

    def forward(self, x, skip, embedding):
        x = upsample_trilinear(self.reduce(x), skip.shape[2:]) + skip
        for block in self.blocks:
            x = block(x, embedding)
        return x
