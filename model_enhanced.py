"""Stage 1: two X-rays -> a 64^3 volume, by a 2D encoder, geometric lifting and a 3D decoder.

from model_enhanced import EnhancedDirectModel
model = EnhancedDirectModel(volume_size=(64, 64, 64))
volume, aux = model(xrays)   # (B, 2, 512, 512) -> (B, 1, 64, 64, 64)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoints import load_checkpoint
from files import InputError
from losses import EnhancedLoss
from projector import Geometry, lift_features

__all__ = ["EnhancedDirectModel", "EnhancedLoss", "load_base_model"]

KIND = "enhanced_direct"


# ------------------------------------------------------------------------------------------------
# Blocks


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm, because batches are small; groups of at least 8 channels keep its statistics steady."""
    return nn.GroupNorm(max(1, min(16, channels // 8)), channels)


class ResidualBlock(nn.Module):
    """Pre-activation residual block (He et al., 2016), 2D or 3D; the second convolution starts at zero."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.norm1 = group_norm(channels)
        self.conv1 = conv(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = conv(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return x + y


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP over the coarsest volume's cells: the global 3D context."""

    def __init__(self, channels: int, heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, mlp_ratio * channels), nn.GELU(), nn.Linear(mlp_ratio * channels, channels)
        )
        for last in (self.out, self.mlp[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x):  # (B, N, C)
        batch, tokens, channels = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv)  # (B, heads, N, C / heads)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, channels))
        return x + self.mlp(self.norm2(x))


class XrayEncoder(nn.Module):
    """Four stages shared by both views, told apart by a learned view embedding.

    Stage s has stride ``stem_stride * 2^s``: 512^2 -> 256^2, 128^2, 64^2, 32^2 with the default
    stem. The stem folds pixels into channels, so that no convolution runs at full resolution.
    """

    def __init__(self, widths, blocks, stem_stride: int):
        super().__init__()
        self.stem_stride = stem_stride
        folded = stem_stride**2
        self.stem = nn.Conv2d(folded, widths[0], 5 if stem_stride == 1 else 3, padding=2 if stem_stride == 1 else 1)
        self.view_embedding = nn.Parameter(0.02 * torch.randn(2, widths[0]))
        self.stages = nn.ModuleList()
        for stage, (width, count) in enumerate(zip(widths, blocks)):
            layers = [ResidualBlock(width, 2) for _ in range(count)]
            if stage > 0:
                layers.insert(0, nn.Conv2d(widths[stage - 1], width, 2, stride=2))
            self.stages.append(nn.Sequential(*layers))

    def forward(self, xrays):  # (B, 2, H, W)
        batch = xrays.shape[0]
        x = xrays.flatten(0, 1).unsqueeze(1)  # (2B, 1, H, W)
        x = self.stem(F.pixel_unshuffle(x, self.stem_stride))
        x = x + self.view_embedding.repeat(batch, 1)[:, :, None, None].to(x.dtype)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features  # 4 x (2B, C_s, H / stride_s, W / stride_s)


class Lifting(nn.Module):
    """X-ray features -> one volume of features, by geometry; the views are kept apart until the end.

    Each view's features go to every voxel that projects there. The sum of the two view-specific
    projections says what either view saw, their product where both agree; the fusion weighs them
    with a per-voxel depth prior coming from the coarser scale.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int):
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(in_channels, channels, 1) for _ in range(2))
        self.fuse = nn.Conv3d(3 * channels, out_channels, 1)

    def forward(self, features, geometry, volume_size):  # (2B, C, h, w)
        x = features.unflatten(0, (-1, 2))
        x = torch.stack([reduce(x[:, v]) for v, reduce in enumerate(self.reduce)], dim=1)
        # Finer pixels than voxels would alias: average them first.
        target = [max(volume_size[0], 1), max(volume_size[1:])]
        if x.shape[-2] >= 2 * target[0] and x.shape[-1] >= 2 * target[1]:
            x = F.avg_pool2d(x.flatten(0, 1), (x.shape[-2] // target[0], x.shape[-1] // target[1])).unflatten(
                0, (-1, 2)
            )
        pa, lateral = lift_features(x, geometry, volume_size).unbind(1)  # (B, c, D, H, W) each
        return self.fuse(torch.cat([pa, lateral, pa * lateral], dim=1))


class DecoderStage(nn.Module):
    """Upsampled coarser volume + lifted X-ray features -> residual blocks -> a volume of its own scale."""

    def __init__(self, coarse_channels, image_channels, lift_channels, channels, blocks):
        super().__init__()
        self.lift = Lifting(image_channels, lift_channels, channels)
        self.reduce = nn.Conv3d(coarse_channels, channels, 1)
        self.blocks = nn.Sequential(*[ResidualBlock(channels, 3) for _ in range(blocks)])
        self.norm = group_norm(channels)
        self.head = nn.Conv3d(channels, 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, coarse, features, geometry, size):
        x = F.interpolate(self.reduce(coarse), size=size, mode="trilinear", align_corners=False)
        x = x + self.lift(features, geometry, size)
        x = self.blocks(x)
        return x, self.head(F.silu(self.norm(x)))


# ------------------------------------------------------------------------------------------------
# Model


class EnhancedDirectModel(nn.Module):
    """Direct regression of a volume in [0, 1] (``hu_window``) from a PA and a lateral X-ray.

    volume_size: ``(D, H, W)``, each a multiple of 8.
    base_channels: width of the decoder at half resolution; the decoder has 2x, 1x and 1/2x of it
        at a quarter, half and full resolution (128, 64, 32 by default), the bottleneck 4x.
    geometry: how the X-rays were made (default :class:`Geometry`). It travels in the
        ``state_dict``, so that loading weights also loads the geometry they were trained with.
    xray_size: resolution the weights are trained at; other inputs are resampled to it. None takes
        X-rays as they come (any multiple of ``32``).
    stem_stride: 2 for 512^2 X-rays; 1 reads 128^2 X-rays at full resolution.
    activation_checkpointing: recompute activations of the blocks in the backward pass (less memory).

    The output is the sum of the upsampled predictions of the three decoder scales, each of which is
    supervised (multi-scale loss); in eval mode it is clamped to [0, 1].
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
        transformer_blocks: int = 6,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.volume_size = tuple(int(n) for n in volume_size)
        if len(self.volume_size) != 3 or any(n < 16 or n % 8 for n in self.volume_size):
            raise InputError(f"model.volume_size is {list(volume_size)}; expected three multiples of 8, at least 16")
        if base_channels < 16 or base_channels % 16:
            raise InputError(f"model.base_channels is {base_channels}; expected a multiple of 16")
        if stem_stride not in (1, 2, 4):
            raise InputError(f"model.stem_stride is {stem_stride}; expected 1, 2 or 4")
        self.geometry = geometry or Geometry()
        self.xray_size = xray_size
        self.activation_checkpointing = activation_checkpointing
        c = base_channels
        widths = (c // 2, c, 2 * c, 4 * c)
        self.encoder = XrayEncoder(widths, encoder_blocks, stem_stride)

        # Bottleneck at 1/8: global context over all cells, with a learned anatomical prior per cell.
        self.bottleneck_size = tuple(n // 8 for n in self.volume_size)
        self.bottleneck_lift = Lifting(widths[3], 2 * c, 4 * c)
        self.prior = nn.Parameter(0.02 * torch.randn(1, 4 * c, *self.bottleneck_size))
        self.transformer = nn.ModuleList(
            TransformerBlock(4 * c, heads=max(1, c // 8)) for _ in range(transformer_blocks)
        )
        self.bottleneck_block = ResidualBlock(4 * c, 3)

        # coarse channels, image channels, lifted channels per view, channels, blocks
        self.decoder = nn.ModuleList(
            [
                DecoderStage(4 * c, widths[3], c, 2 * c, decoder_blocks[0]),  # 1/4: 128 channels at 16^3
                DecoderStage(2 * c, widths[2], c // 2, c, decoder_blocks[1]),  # 1/2: 64 channels at 32^3
                DecoderStage(c, widths[1], c // 4, c // 2, decoder_blocks[2]),  # full: 32 channels at 64^3
            ]
        )
        # A volume of lungs and soft tissue averages about 0.2; air starts at 0.
        nn.init.constant_(self.decoder[0].head.bias, 0.2)

    def get_extra_state(self) -> dict:
        return {"geometry": self.geometry.to_dict(), "xray_size": self.xray_size}

    def set_extra_state(self, state: dict) -> None:
        self.geometry = Geometry.from_dict(state["geometry"])
        self.xray_size = state["xray_size"]

    def _run(self, module, *inputs):
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def _prepare(self, xrays):
        """(B, 2, H, W) or (B, 2, 1, H, W) in [0, 1] -> (B, 2, h, w) at the trained resolution."""
        if xrays.ndim == 5 and xrays.shape[2] == 1:
            xrays = xrays.squeeze(2)
        if xrays.ndim != 4 or xrays.shape[1] != 2:
            raise ValueError(f"X-rays have shape {tuple(xrays.shape)}; expected (B, 2, H, W): PA, then lateral")
        if self.xray_size is not None and tuple(xrays.shape[-2:]) != (self.xray_size, self.xray_size):
            mode = "area" if min(xrays.shape[-2:]) > self.xray_size else "bilinear"
            xrays = F.interpolate(xrays, size=(self.xray_size, self.xray_size), mode=mode)
        if xrays.shape[-2] % 32 or xrays.shape[-1] % 32:
            raise ValueError(f"X-rays have size {tuple(xrays.shape[-2:])}; expected multiples of 32")
        return xrays

    def forward(self, xrays):
        """xrays ``(B, 2, H, W)`` in [0, 1] -> ``(volume (B, 1, D, H, W), aux)``.

        aux: ``{"volume_16": ..., "volume_32": ...}``, named by their depth: the lower-resolution
        predictions for the multi-scale loss. Raises ``ValueError`` on another shape.
        """
        features = self._run(self.encoder, self._prepare(xrays))  # strides 2, 4, 8, 16

        x = self.bottleneck_lift(features[3], self.geometry, self.bottleneck_size) + self.prior
        tokens = x.flatten(2).transpose(1, 2)  # (B, 512, C)
        for block in self.transformer:
            tokens = self._run(block, tokens)
        x = tokens.transpose(1, 2).unflatten(2, self.bottleneck_size)  # (B, C, 8, 8, 8)
        x = self._run(self.bottleneck_block, x)

        volume, aux = None, {}
        for stage, divisor, image in zip(self.decoder, (4, 2, 1), (features[3], features[2], features[1])):
            size = tuple(n // divisor for n in self.volume_size)
            x, detail = self._run(stage, x, image, self.geometry, size)  # (B, 128 | 64 | 32, *size)
            if volume is not None:
                detail = detail + F.interpolate(volume, size=size, mode="trilinear", align_corners=False)
            volume = detail
            if divisor > 1:
                aux[f"volume_{size[0]}"] = volume
        if not self.training:
            volume = volume.clamp(0.0, 1.0)
        return volume, aux


def load_base_model(path, device="cpu") -> tuple[EnhancedDirectModel, dict]:
    """Build the stage-1 model that a checkpoint describes, in eval mode, with its weights.

    Returns ``(model, checkpoint dict)``. Raises :class:`InputError` naming the file when it is
    missing, damaged, or not a stage-1 checkpoint.
    """
    data = load_checkpoint(path, kind=KIND)
    model = EnhancedDirectModel(**data["model_config"])
    try:
        model.load_state_dict(data["model_state_dict"])
    except RuntimeError as error:
        raise InputError(
            f"{path}: its weights do not fit its own model_config ({str(error).splitlines()[0]})"
        ) from None
    return model.to(device).eval(), data
