"""The two networks of the direct system: X-rays -> 64^3, then 64^3 -> 256^3.

from model_enhanced import EnhancedDirectModel, RefinementNetwork
model, refinement = EnhancedDirectModel(volume_size=(64, 64, 64)), RefinementNetwork(guided=True)
volume, aux = model(xrays)              # (B, 2, 512, 512) -> (B, 1, 64, 64, 64)
fine = refinement(volume, xrays)        # -> (B, 1, 256, 256, 256)
"""

from __future__ import annotations

import importlib
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoints import load_checkpoint
from files import InputError, whole_number, whole_numbers
from losses import EnhancedLoss
from projector import HU_WINDOW, XRAY_SCALE, Geometry, averaged_to, lift_pooled, render_xrays

__all__ = ["EnhancedDirectModel", "EnhancedLoss", "RefinementNetwork", "load_base_model", "load_refinement"]

KIND = "enhanced_direct"
REFINEMENT_KIND = "refinement"
# Stage-1 networks by the kind of their checkpoints: module and class. baselines.py imports this module: not before use.
BASE_MODELS = {
    KIND: ("model_enhanced", "EnhancedDirectModel"),
    "lifting_unet": ("baselines", "LiftingUNet"),
    "mean_volume": ("baselines", "MeanVolume"),
}


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


class Recomputing(nn.Module):
    """Base of the networks that can recompute parts of themselves in the backward pass, for less memory."""

    activation_checkpointing = False

    def _run(self, function, *inputs):
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
            layers = [ResidualBlock(width, 2) for _ in range(count)]
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

    def forward(self, features, geometry, volume_size, grid_mm=None):  # (2B, C, h, w)
        """``volume_size`` covers the whole cube; ``grid_mm`` (z, y, x in mm) picks the voxels of a part of it."""
        x = features.unflatten(0, (-1, 2))
        x = torch.stack([reduce(x[:, v]) for v, reduce in enumerate(self.reduce)], dim=1)
        pa, lateral = lift_pooled(x, geometry, volume_size, grid_mm).unbind(1)  # (B, c, D, H, W) each
        return self.fuse(torch.cat([pa, lateral, pa * lateral], dim=1))


def in_full_precision(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``layer(x)`` in the precision of its weights (float32), also under autocast: for layers that end in a volume.

    In bfloat16 a value of 0.5 to 1 is rounded to steps of 1/256, of 2,500 HU that is 10.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(next(layer.parameters()).dtype))


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
        return x, in_full_precision(self.head, F.silu(in_full_precision(self.norm, x)))


def prepare_xrays(xrays: torch.Tensor, size: int | None, views: int = 2) -> torch.Tensor:
    """``(B, V, H, W)`` or ``(B, V, 1, H, W)`` -> ``(B, V, size, size)``; ``size`` None leaves the resolution.

    Raises ``ValueError`` on another shape, another number of views, or a resolution that is not a multiple of 32.
    """
    if xrays.ndim == 5 and xrays.shape[2] == 1:
        xrays = xrays.squeeze(2)
    if xrays.ndim != 4 or xrays.shape[1] != views:
        wanted = "(B, 2, H, W): PA, then lateral" if views == 2 else "(B, 1, H, W): PA alone"
        raise ValueError(f"X-rays have shape {tuple(xrays.shape)}; expected {wanted}")
    if size is not None and tuple(xrays.shape[-2:]) != (size, size):
        if min(xrays.shape[-2:]) > size:
            xrays = averaged_to(xrays, (size, size))
        else:
            xrays = F.interpolate(xrays, size=(size, size), mode="bilinear")
    if xrays.shape[-2] % 32 or xrays.shape[-1] % 32:
        raise ValueError(f"X-rays have size {tuple(xrays.shape[-2:])}; expected multiples of 32")
    return xrays


# ------------------------------------------------------------------------------------------------
# Stage 1


def check_shape(base_channels, stem_stride, encoder_blocks, decoder_blocks, transformer_blocks=0) -> None:
    """Raise :class:`InputError` naming the setting that a stage-1 network cannot have."""
    whole_number("model.base_channels", base_channels, 16, multiple=16)
    if base_channels >= 256:  # the narrowest features, half of them, are normalised in groups of at least 16
        whole_number("model.base_channels", base_channels, 256, multiple=32)
    check_stem_stride(stem_stride)
    whole_numbers("model.encoder_blocks", encoder_blocks, 4, 0)
    whole_numbers("model.decoder_blocks", decoder_blocks, 3, 0)
    whole_number("model.transformer_blocks", transformer_blocks, 0)


def check_stem_stride(stem_stride) -> None:
    if whole_number("model.stem_stride", stem_stride, 1) not in (1, 2, 4):
        raise InputError(f"model.stem_stride is {stem_stride}; expected 1, 2 or 4")


def check_xray_size(xray_size) -> None:
    """Raise :class:`InputError` unless X-rays of this size, or of any (None), can be encoded."""
    if xray_size is not None:
        whole_number("model.xray_size", xray_size, 32, multiple=32)


class CoarseModel(Recomputing):
    """What loading and stage 2 want of a stage-1 network: sizes, and the geometry of its data in the ``state_dict``."""

    def __init__(self, volume_size, geometry: Geometry | None, xray_size: int | None):
        super().__init__()
        self.volume_size = tuple(whole_numbers("model.volume_size", volume_size, 3, 16, multiple=8))
        check_xray_size(xray_size)
        self.geometry, self.xray_size = geometry or Geometry(), xray_size

    def get_extra_state(self) -> dict:
        return {"geometry": self.geometry.to_dict(), "xray_size": self.xray_size}

    def set_extra_state(self, state: dict) -> None:
        self.geometry = Geometry.from_dict(state["geometry"])
        self.xray_size = state["xray_size"]


class EnhancedDirectModel(CoarseModel):
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
        super().__init__(volume_size, geometry, xray_size)
        check_shape(base_channels, stem_stride, encoder_blocks, decoder_blocks, transformer_blocks)
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

    def forward(self, xrays):
        """xrays ``(B, 2, H, W)`` in [0, 1] -> ``(volume (B, 1, D, H, W), aux)``.

        aux: ``{"volume_16": ..., "volume_32": ...}``, named by their depth: the lower-resolution
        predictions for the multi-scale loss. Raises ``ValueError`` on another shape.
        """
        features = self._run(self.encoder, prepare_xrays(xrays, self.xray_size))  # strides 2, 4, 8, 16

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


# ------------------------------------------------------------------------------------------------
# Stage 2


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
    return F.interpolate(coarse.float(), scale_factor=scale, mode="trilinear", align_corners=False)


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


class Window:
    """A box of a volume's voxels: origins ``[(z, y, x), ...]`` of one common size.

    One origin serves all samples of a batch; several are dealt to the samples in turn.
    """

    def __init__(self, origins, size, full):
        self.origins, self.size, self.full = origins, tuple(size), tuple(full)

    @classmethod
    def whole(cls, full) -> Window:
        """The whole volume."""
        return cls([(0, 0, 0)], full, full)

    @property
    def is_whole(self) -> bool:
        return self.size == self.full

    def grown(self, margin: int, step: int = 1) -> Window:
        """At least ``margin`` voxels more on each side, kept inside the volume, on multiples of ``step``.

        A window at the border is shifted instead of cut, so that all samples keep one size and what
        lies outside the volume is zero padding there, as in the whole volume.
        """
        size = tuple(min(n, -(-(s + 2 * margin + step - 1) // step) * step) for s, n in zip(self.size, self.full))
        origins = [
            tuple(min(max(0, (o - margin) // step * step), n - s) for o, s, n in zip(origin, size, self.full))
            for origin in self.origins
        ]
        return Window(origins, size, self.full)

    def crop(self, volumes: torch.Tensor, scale: int = 1, start=None) -> torch.Tensor:
        """Cut this window out of ``(B, C, ...)`` volumes -> ``(windows, C, ...)``, or all B for one origin.

        scale: voxels of ``volumes`` per voxel of the window. start: where voxel (0, 0, 0) of the volumes lies,
        one per origin (default: the cube's corner).
        """
        boxes = []
        for index, origin in enumerate(self.origins):
            offset = start[index] if start is not None else (0, 0, 0)
            boxes.append([slice((o - a) * scale, (o - a + n) * scale) for o, a, n in zip(origin, offset, self.size)])
        if len(boxes) == 1:
            return volumes[:, :, boxes[0][0], boxes[0][1], boxes[0][2]]
        each = len(boxes) // volumes.shape[0]
        return torch.stack([volumes[i // each, :, box[0], box[1], box[2]] for i, box in enumerate(boxes)])

    def grid_mm(self, geometry: Geometry, index: int, scale: int, device) -> tuple[torch.Tensor, ...]:
        """Centres (z, y, x) in mm of one window's voxels, ``scale`` times finer."""
        origin = self.origins[index]
        return tuple(
            geometry.voxel_centres_mm(n * scale, device=device)[o * scale : (o + s) * scale]
            for o, s, n in zip(origin, self.size, self.full)
        )


class Guidance(nn.Module):
    """X-ray features at the resolutions of stage 2's volumes, lifted wherever a window asks for them.

    Beside each X-ray the encoder sees what it has over the one that the coarse volume would give: the
    projector's residual, as iterative reconstruction uses it, says where the volume is too thin or too dense.

    The encoder's strides 1x, 2x, 4x of its stem serve 256^3, 128^3 and 64^3: with the default stem
    of 2 on 512^2 X-rays, a feature pixel is about one voxel of the volume it is lifted to.
    """

    def __init__(self, widths, stem_stride: int, channels: dict[int, int]):
        super().__init__()
        self.encoder = XrayEncoder(widths, (1, 1, 2, 2), stem_stride, in_channels=2)
        # The coarsest features flow back to the finer ones: a pixel then knows which organ it shows.
        self.top_down = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for coarse, fine in zip(widths[1:], widths[:-1]))
        self.lift = nn.ModuleDict(
            {str(scale): Lifting(widths[(4, 2, 1).index(scale)], n, n) for scale, n in channels.items()}
        )

    def encode(self, xrays, rendered):
        """Two ``(B, 2, S, S)`` -> feature maps by scale, ``{1 | 2 | 4: (2B, C, h, w)}``, and open gates."""
        # Residuals are about a twentieth of the X-rays themselves.
        *fine, x = self.encoder(torch.stack([xrays, 20.0 * (xrays - rendered)], dim=2))
        features = []
        for skip, reduce in zip(reversed(fine), reversed(self.top_down)):
            x = skip + F.interpolate(reduce(x), size=skip.shape[-2:], mode="bilinear", align_corners=False)
            features.append(x)
        return {**dict(zip((1, 2, 4), features)), "gate": xrays.new_ones(xrays.shape[0])}

    def forward(self, features, window: Window, scale: int, geometry: Geometry):
        """Features of every voxel of a window at ``scale``, ``(windows, C, D, H, W)``; 0 where the gate is 0."""
        gate = features["gate"]
        each = len(window.origins) // gate.shape[0] if len(window.origins) > 1 else 1
        lifted = self._lift(features[scale], window, scale, each, geometry)
        return lifted * gate.repeat_interleave(each).view(-1, 1, 1, 1, 1).to(lifted.dtype)

    def _lift(self, maps, window: Window, scale: int, each: int, geometry: Geometry):
        lift, size = self.lift[str(scale)], tuple(n * scale for n in window.full)
        if window.is_whole:
            return lift(maps, geometry, size).repeat_interleave(each, 0)
        grids = [window.grid_mm(geometry, i, scale, maps.device) for i in range(len(window.origins))]
        if len(grids) == 1:
            return lift(maps, geometry, size, grids[0])
        samples = maps.unflatten(0, (-1, 2))
        return torch.cat([lift(samples[i // each], geometry, size, grid) for i, grid in enumerate(grids)])


class RefinementNetwork(Recomputing):
    """Four times finer: a coarse volume ``(B, 1, 64, 64, 64)`` -> ``(B, 1, 256, 256, 256)``, in [0, 1].

    The coarse volume is folded to half its resolution (space-to-depth), where RRDBs work on wide
    features; 3D PixelShuffle brings them to 1x, 2x and 4x. The result is added to the trilinear
    upsampling; the last layer starts at zero, so an untrained network is exactly trilinear.

    guided: also read the X-rays, which show detail that the coarse volume has lost: their features are
        lifted at 1x, 2x and 4x through the geometry.
    channels, growth, rrdb_blocks: the trunk. head_channels: features at 1x, 2x and (per sub-voxel) 4x.
    guide_widths: channels of the X-ray encoder from fine to coarse; guide_channels: lifted ones at 1x, 2x, 4x.
    geometry, xray_size, stem_stride: as in :class:`EnhancedDirectModel`; hu_window, xray_scale: of the data.
    activation_checkpointing: recompute activations in the backward pass (less memory).

    All settings travel in the ``state_dict``: ``RefinementNetwork()`` takes the shape of the weights it
    loads. Any coarse size of multiples of 2 works; there is no normalisation over the volume, so that
    a result does not depend on how it is cut into tiles.
    """

    scale = 4  # output voxels per coarse voxel and axis
    stride = 2  # of the trunk: coarse sizes are multiples of it
    # Coarse voxels beyond a tile's border that its head sees: one convolution at 1x, four at 2x, and
    # one voxel for the trilinear upsampling within them.
    halo = 3
    # Of the added detail: features are of unit size, details a few hundredths; first steps do not overshoot.
    gain = 0.1

    def __init__(
        self,
        guided: bool = False,
        channels: int = 64,
        growth: int = 32,
        rrdb_blocks: int = 2,
        head_channels=(48, 24, 4),
        guide_widths=(24, 48, 64, 96),
        guide_channels=(8, 8, 4),
        geometry: Geometry | None = None,
        xray_size: int | None = None,
        stem_stride: int = 2,
        activation_checkpointing: bool = False,
        hu_window=HU_WINDOW,
        xray_scale: float = XRAY_SCALE,
    ):
        super().__init__()
        self.hu_window, self.xray_scale = tuple(hu_window), xray_scale
        self.activation_checkpointing = activation_checkpointing
        check_xray_size(xray_size)
        self.geometry, self.xray_size = geometry or Geometry(), xray_size
        self._build(
            {
                "guided": guided,
                "channels": channels,
                "growth": growth,
                "rrdb_blocks": rrdb_blocks,
                "head_channels": head_channels,
                "guide_widths": guide_widths,
                "guide_channels": guide_channels,
                "stem_stride": stem_stride,
            }
        )

    def _build(self, settings: dict) -> None:
        self.settings = settings = _checked_refinement(settings)
        channels, (c1, c2, c4) = settings["channels"], settings["head_channels"]
        g1, g2, g4 = settings["guide_channels"] if settings["guided"] else (0, 0, 0)
        self.guidance = None
        if settings["guided"]:
            self.guidance = Guidance(settings["guide_widths"], settings["stem_stride"], {1: g1, 2: g2, 4: g4})
        cells = self.stride**3
        self.inlet = nn.Conv3d((1 + g1) * cells, channels, 3, padding=1)
        self.blocks = nn.ModuleList(RRDB(channels, settings["growth"]) for _ in range(settings["rrdb_blocks"]))
        self.trunk = nn.Conv3d(channels, channels, 3, padding=1)
        self.up1 = shuffle_conv(channels, c1)
        self.up2 = shuffle_conv(c1, c2)
        self.guide2 = nn.Conv3d(g2, c2, 1, bias=False) if g2 else None  # no X-rays: nothing is added
        self.conv2a = nn.Conv3d(c2, c2, 3, padding=1)
        self.conv2b = nn.Conv3d(c2, c2, 3, padding=1)
        # 4x lives folded at 2x: eight sub-voxels of c4 features each, so that no convolution runs at 256^3.
        self.up4 = nn.Conv3d(c2 + cells * g4, cells * c4, 3, padding=1)
        self.out = nn.Conv3d(cells * c4, cells, 3, padding=1)
        for conv in (self.inlet, self.trunk, self.conv2a, self.up4):
            nn.init.kaiming_normal_(conv.weight, a=0.2)  # without normalisation, initial scales last
            nn.init.zeros_(conv.bias)
        for conv in (self.conv2b, self.out):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def get_extra_state(self) -> dict:
        state = {"geometry": self.geometry.to_dict(), "hu_window": list(self.hu_window), "xray_scale": self.xray_scale}
        return {**state, "xray_size": self.xray_size, "settings": self.settings}

    def set_extra_state(self, state: dict) -> None:
        self.geometry = Geometry.from_dict(state["geometry"])
        self.hu_window, self.xray_scale = tuple(state["hu_window"]), state["xray_scale"]
        self.xray_size = state["xray_size"]
        if state["settings"] != self.settings:
            # Called before the children's weights are read: they find the network they belong to.
            parameter = self.inlet.weight
            self._build(state["settings"])
            self.to(parameter.device, parameter.dtype)

    # -- parts -----------------------------------------------------------------------------------

    def encode(self, coarse, xrays):
        """X-rays -> features for :meth:`deep` and :meth:`head`; None without X-rays or guidance."""
        if self.guidance is None or xrays is None:
            return None
        xrays = prepare_xrays(xrays, self.xray_size)
        size = [min(n, 4 * max(coarse.shape[2:])) for n in xrays.shape[-2:]]  # finer shows nothing more
        rendered = render_xrays(coarse, self.geometry, size, self.hu_window, self.xray_scale)
        rendered = F.interpolate(rendered, size=xrays.shape[-2:], mode="bilinear", align_corners=False)
        return self._run(self.guidance.encode, xrays, rendered.to(xrays.dtype))

    def deep(self, coarse, features, window: Window):
        """Features at 1x of a window on multiples of 2: ``(windows, c1, D, H, W)``. Cheap: runs at half resolution."""
        x = 4.0 * window.crop(coarse)  # about unit variance inside a body; air and padding stay 0
        if self.guidance is not None:
            guide = self.settings["guide_channels"][0]
            if features is None:
                lifted = x.new_zeros(x.shape[0], guide, *x.shape[2:])
            else:
                lifted = self._run(self.guidance, features, window, 1, self.geometry)
            x = torch.cat([x.to(lifted.dtype), lifted], dim=1)
        x = shallow = self.inlet(pixel_unshuffle_3d(x, self.stride))
        for block in self.blocks:
            x = self._run(block, x)
        return self.up1(shallow + self.trunk(x))

    def head(self, coarse, deep, deep_window: Window, features, window: Window):
        """The refined volume of a window from :meth:`deep`'s features around it: ``(windows, 1, 4D, 4H, 4W)``."""
        around = window.grown(self.halo)
        x = around.crop(deep, start=deep_window.origins)
        # Wanted from here on: every sum of the residual in float32, whatever the convolutions run in.
        detail = self._run(self._details, x, features, around)
        return window.crop(upsample(around.crop(coarse)) + self.gain * detail.float(), self.scale, around.origins)

    def _details(self, x, features, window: Window):
        x = self.up2(F.leaky_relu(x, 0.2))  # (windows, c2, 2D, 2H, 2W)
        if self.guidance is not None and features is not None:
            x = x + self.guide2(self.guidance(features, window, 2, self.geometry))
        x = x + self.conv2b(F.leaky_relu(self.conv2a(F.leaky_relu(x, 0.2)), 0.2))
        if self.guidance is not None:
            if features is not None:
                lifted = pixel_unshuffle_3d(self.guidance(features, window, 4, self.geometry))
            else:
                lifted = x.new_zeros(x.shape[0], 8 * self.settings["guide_channels"][2], *x.shape[2:])
            x = torch.cat([x, lifted.to(x.dtype)], dim=1)
        x = self.out(F.leaky_relu(self.up4(F.leaky_relu(x, 0.2)), 0.2))
        return pixel_shuffle_3d(x)

    def check(self, coarse) -> None:
        """Raise ``ValueError`` unless ``coarse`` is ``(B, 1, D, H, W)`` of multiples of 2, in [0, 1]."""
        shape = tuple(coarse.shape)
        if coarse.ndim != 5 or shape[1] != 1:
            raise ValueError(f"coarse volume has shape {shape}; expected (B, 1, D, H, W)")
        if any(n < self.stride or n % self.stride for n in shape[2:]):
            raise ValueError(f"coarse volume has size {shape[2:]}; expected multiples of {self.stride}")
        if self.training or torch.compiler.is_compiling():
            return  # training feeds stage 1's own output; looking at values would stall the GPU
        low, high = (float(v) for v in coarse.detach().aminmax())
        if not (low >= -0.01 and high <= 1.01):
            raise ValueError(
                f"coarse volume has values from {low:g} to {high:g}; expected [0, 1]"
                " (Hounsfield units: map them with projector.hu_to_unit)"
            )

    def forward(self, coarse, xrays=None, origins=None, patch=None, context: int = 8, gate=None):
        """coarse ``(B, 1, D, H, W)`` in [0, 1], xrays ``(B, 2, S, S)`` -> ``(B, 1, 4D, 4H, 4W)``.

        origins, patch: refine only boxes of ``patch`` coarse voxels (one number or three) that start at
            ``origins`` (B, P, 3): ``(B P, 1, 4 patch, ...)``. The trunk then sees ``context`` voxels around each.
        gate: ``(B,)``, 0 for samples that go without X-rays: as if there were none, but every parameter takes
            part in the step (DDP needs it).
        In eval mode the result is clamped to [0, 1]. Raises ``ValueError`` on another shape or range.
        """
        self.check(coarse)
        full = coarse.shape[2:]
        if origins is None:
            window = deep_window = Window.whole(full)
        else:
            window = patch_window(origins, patch, full)
            deep_window = window.grown(max(context, self.halo), self.stride)
        features = self.encode(coarse, xrays)
        if features is not None and gate is not None:
            features["gate"] = gate
        deep = self.deep(coarse, features, deep_window)
        volume = self.head(coarse, deep, deep_window, features, window)
        return volume if self.training else volume.clamp(0.0, 1.0)

    @torch.no_grad()
    def refine(self, coarse, xrays=None, tile: int | None = None, device=None) -> torch.Tensor:
        """As :meth:`forward` in eval mode, in tiles of ``tile`` coarse voxels: the same values, less memory.

        The trunk, at an eighth of the coarse volume's cells, runs once on the whole volume; only the
        head is tiled, each tile with the ``halo`` that its convolutions see. Tiles are collected on
        ``device`` (default: where ``coarse`` is), float32.
        """
        self.check(coarse)
        full, device = tuple(coarse.shape[2:]), device or coarse.device
        if tile is None or tile >= max(full):
            return self(coarse, xrays).float().to(device)
        if tile < 1:
            raise ValueError(f"tile is {tile}; expected at least 1")
        features, whole = self.encode(coarse, xrays), Window.whole(full)
        deep = self.deep(coarse, features, whole)
        volume = torch.empty(coarse.shape[0], 1, *(self.scale * n for n in full), device=device)
        for origin in itertools.product(*(range(0, n, tile) for n in full)):
            size = tuple(min(tile, n - o) for o, n in zip(origin, full))
            window = Window([origin], size, full)
            part = self.head(coarse, deep, whole, features, window).clamp(0.0, 1.0)
            box = [slice(self.scale * o, self.scale * (o + s)) for o, s in zip(origin, size)]
            volume[:, :, box[0], box[1], box[2]] = part.to(device)
        return volume


def _checked_refinement(settings: dict) -> dict:
    """Stage 2's settings with lists for tuples; :class:`InputError` naming the one that it cannot have."""
    for name in ("channels", "growth", "rrdb_blocks"):
        whole_number(f"model.{name}", settings[name], 1)
    check_stem_stride(settings["stem_stride"])
    lists = {name: whole_numbers(f"model.{name}", settings[name], 3, 1) for name in ("head_channels", "guide_channels")}
    widths = whole_numbers("model.guide_widths", settings["guide_widths"], 4, 1)
    for index, width in enumerate(widths):
        checked_width(f"model.guide_widths[{index}]", width)
    return {**settings, **lists, "guide_widths": widths}


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


def patch_window(origins, patch, full) -> Window:
    """Window of training patches; raises ``ValueError`` naming a patch that does not lie in the volume."""
    size = (patch,) * 3 if isinstance(patch, int) else tuple(patch)
    full = tuple(full)
    if any(s < 1 or s > n for s, n in zip(size, full)):
        raise ValueError(f"patch {size} does not fit into the coarse volume {full}")
    flat = [tuple(int(v) for v in origin) for sample in origins for origin in sample]
    for origin in flat:
        if any(o < 0 or o + s > n for o, s, n in zip(origin, size, full)):
            raise ValueError(f"patch {size} at {origin} leaves the coarse volume {full}")
    return Window(flat, size, full)


# ------------------------------------------------------------------------------------------------
# Checkpoints


def load_base_model(path, device="cpu") -> tuple[nn.Module, dict]:
    """Build the stage-1 model that a checkpoint describes (also a baseline's), in eval mode, with its weights.

    Returns ``(model, checkpoint dict)``. Raises :class:`InputError` naming the file when it is
    missing, damaged, or not a stage-1 checkpoint.
    """
    data = load_checkpoint(path)
    kind = data.get("kind")
    if kind not in tuple(BASE_MODELS):
        baselines = " or ".join(repr(name) for name in BASE_MODELS if name != KIND)
        raise InputError(f"{path}: is a checkpoint of {kind!r}; expected {KIND!r}, or a baseline's ({baselines})")
    module, name = BASE_MODELS[kind]
    model = getattr(importlib.import_module(module), name)(**data["model_config"])
    return _with_weights(model, data["model_state_dict"], path).to(device).eval(), data


def load_refinement(path, device="cpu") -> tuple[RefinementNetwork, dict]:
    """Build the stage-2 network that a checkpoint describes, in eval mode, with its weights.

    Returns ``(network, checkpoint dict)``. Raises :class:`InputError` naming the file when it is
    missing, damaged, or not a stage-2 checkpoint.
    """
    data = load_checkpoint(path, kind=REFINEMENT_KIND)
    network = RefinementNetwork(**data["refinement_config"])
    return _with_weights(network, data["refinement_state_dict"], path).to(device).eval(), data


def _with_weights(model: nn.Module, weights: dict, path) -> nn.Module:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path}: its weights do not fit its own configuration ({str(error).splitlines()[0]})"
        ) from None
    return model
