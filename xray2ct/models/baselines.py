"""Baseline networks: a plain lifting U-Net, and the mean training volume."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from xray2ct.geometry.lifting import pooled_to
from xray2ct.geometry.projector import Geometry
from xray2ct.models.blocks import ResidualBlock, XrayEncoder, group_norm, in_full_precision, prepare_xrays
from xray2ct.models.coarse import CoarseModel, check_shape
from xray2ct.models.normalisation import norm_silu
from xray2ct.models.registry import register
from xray2ct.models.upsampling import upsample_trilinear
from xray2ct.models.working_weights import full_precision

KINDS = UNET, MEAN = "lifting_unet", "mean_volume"  # of their checkpoints


def replicate(pa: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
    """Repeat each view's features along its rays, bring both to the volume's axes, and average them.

    pa ``(B, C, D, W)``: constant along H (anterior-posterior); lateral ``(B, C, D, H)``: constant along W
    (right-left). Returns ``(B, C, D, H, W)``. X2CT-GAN's connections B (duplicate along the third axis) and C
    (permute, average; Ying et al., CVPR 2019, section 3.2): rays count as parallel, and detector as cube.
    """
    return 0.5 * (pa.unsqueeze(3) + lateral.unsqueeze(4))


def to_grid(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Feature maps ``(B, C, h, w)`` at the resolution of a volume's face: finer pixels are averaged."""
    features = pooled_to(features, size)
    if tuple(features.shape[-2:]) == size:
        return features
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


class DecoderScale(nn.Module):
    """Upsampled coarser volume (if any) + replicated features of both views -> residual blocks.

    Adding after 1x1 convolutions is a U-Net's concatenation followed by one; cheaper, as those of the views are 2D.
    """

    def __init__(self, coarse_channels: int, image_channels: int, channels: int, blocks: int):
        super().__init__()
        self.skips = nn.ModuleList(nn.Conv2d(image_channels, channels, 1) for _ in range(2))
        self.reduce = nn.Conv3d(coarse_channels, channels, 1) if coarse_channels else None
        self.blocks = nn.Sequential(*[ResidualBlock(channels, 3) for _ in range(blocks)])

    def forward(self, coarse, pa, lateral, size):
        depth, height, width = size
        pa, lateral = self.skips[0](pa), self.skips[1](lateral)
        x = replicate(to_grid(pa, (depth, width)), to_grid(lateral, (depth, height)))
        if self.reduce is not None:
            x = x + upsample_trilinear(self.reduce(coarse), size)
        return self.blocks(x)


@register(UNET)
class LiftingUNet(CoarseModel):
    """The shape that published two-view methods share (X2CT-GAN's generator and what followed), and nothing more.

    One 2D encoder per view, features repeated along the rays and averaged at each scale (:func:`replicate`), a 3D
    U-Net decoder. No acquisition geometry, depth prior, attention, intermediate supervision or discriminator. The
    blocks, widths and depths are :class:`EnhancedDirectModel`'s, so that lifting, prior, attention and supervision are
    what separates the two scores. Settings as there; 4.22 M parameters with ``configs/cpu.json`` (the direct model:
    4.38 M), 15.8 M by default (16.3 M).
    """

    def __init__(
        self,
        volume_size=(64, 64, 64),
        base_channels: int = 64,
        geometry: Geometry | None = None,
        xray_size: int | None = None,
        stem_stride: int = 2,
        encoder_blocks=(1, 1, 2, 3),
        decoder_blocks=(3, 2, 1),
        activation_checkpointing: bool = False,
    ):
        super().__init__(volume_size, geometry, xray_size)
        check_shape(base_channels, stem_stride, encoder_blocks, decoder_blocks)
        self.activation_checkpointing = activation_checkpointing
        c = base_channels
        widths = (c // 2, c, 2 * c, 4 * c)
        self.encoders = nn.ModuleList(XrayEncoder(widths, encoder_blocks, stem_stride, views=1) for _ in range(2))
        # coarser channels, image channels, channels, blocks; at 1/8, 1/4, 1/2 and full resolution
        self.decoder = nn.ModuleList(
            [
                DecoderScale(0, widths[3], 4 * c, 1),
                DecoderScale(4 * c, widths[3], 2 * c, decoder_blocks[0]),
                DecoderScale(2 * c, widths[2], c, decoder_blocks[1]),
                DecoderScale(c, widths[1], c // 2, decoder_blocks[2]),
            ]
        )
        self.norm = group_norm(c // 2)
        self.head = full_precision(nn.Conv3d(c // 2, 1, 1))
        nn.init.constant_(self.head.bias, 0.2)  # a volume of lungs and soft tissue averages about that

    def forward(self, xrays):
        """xrays ``(B, 2, H, W)`` in [0, 1] -> ``(volume (B, 1, D, H, W), {})``; in eval mode clamped to [0, 1].

        Raises ``ValueError`` on another shape.
        """
        xrays = prepare_xrays(xrays, self.xray_size)
        pa, lateral = (self._run(encoder, xrays[:, v : v + 1]) for v, encoder in enumerate(self.encoders))
        x = None
        for scale, divisor, level in zip(self.decoder, (8, 4, 2, 1), (3, 3, 2, 1)):
            size = tuple(n // divisor for n in self.volume_size)
            x = self._run(scale, x, pa[level], lateral[level], size)
        volume = in_full_precision(self.head, norm_silu(x, self.norm))
        return (volume if self.training else volume.clamp(0.0, 1.0)), {}


@register(MEAN)
class MeanVolume(CoarseModel):
    """The same volume whatever the X-rays show; its parameters are the voxels, in [0, 1]."""

    def __init__(self, volume_size=(64, 64, 64), geometry: Geometry | None = None, xray_size: int | None = None):
        super().__init__(volume_size, geometry, xray_size)
        self.volume = nn.Parameter(torch.zeros(1, 1, *self.volume_size))

    def forward(self, xrays):
        """xrays ``(B, 2, H, W)`` -> ``(volume (B, 1, D, H, W), {})``."""
        return self.volume.repeat(xrays.shape[0], 1, 1, 1, 1), {}
