"""The two networks of the direct system: X-rays -> 64^3, then 64^3 -> 256^3.

from model_enhanced import EnhancedDirectModel, RefinementNetwork
model, refinement = EnhancedDirectModel(volume_size=(64, 64, 64)), RefinementNetwork(guided=True)
volume, aux = model(xrays)              # (B, 2, 512, 512) -> (B, 1, 64, 64, 64)
fine = refinement(volume, xrays)        # -> (B, 1, 256, 256, 256)
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from losses import EnhancedLoss
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import HU_WINDOW, XRAY_SCALE, Geometry
from xray2ct.models.blocks import (
    RRDB,
    ActivationCheckpointing,
    Lifting,
    ResidualBlock,
    TransformerBlock,
    XrayEncoder,
    check_xray_size,
    group_norm,
    in_full_precision,
    pixel_shuffle_3d,
    pixel_unshuffle_3d,
    pixels_of,
    prepare_xrays,
    shuffle_conv,
    upsample,
    zero_init,
)
from xray2ct.models.coarse import CoarseModel, check_choice, check_shape
from xray2ct.models.guidance import Guidance
from xray2ct.models.layout import SCALES, LayoutHead
from xray2ct.models.loading import load_base_model, load_refinement
from xray2ct.models.normalisation import norm_silu
from xray2ct.models.refinement_settings import checked_refinement
from xray2ct.models.registry import KIND, REFINEMENT_KIND, register
from xray2ct.models.second_pass import SecondPass, check_passes
from xray2ct.models.upsampling import upsample_spline, upsample_trilinear
from xray2ct.models.window import Window, patch_window
from xray2ct.models.working_weights import full_precision, with_cast_weights

__all__ = ["EnhancedDirectModel", "EnhancedLoss", "RefinementNetwork", "load_base_model", "load_refinement"]


# ------------------------------------------------------------------------------------------------
# Blocks


class DecoderStage(nn.Module):
    """Upsampled coarser volume + lifted X-ray features -> residual blocks -> a volume of its own scale."""

    def __init__(self, coarse_channels, image_channels, lift_channels, channels, blocks, upsampling="trilinear"):
        super().__init__()
        self.lift = Lifting(image_channels, lift_channels, channels)
        self.learned = upsampling == "learned"
        kind, size = (nn.ConvTranspose3d, 2) if self.learned else (nn.Conv3d, 1)
        self.reduce = kind(coarse_channels, channels, size, stride=size)
        self.blocks = nn.Sequential(*[ResidualBlock(channels, 3) for _ in range(blocks)])
        self.norm = group_norm(channels)
        self.head = full_precision(zero_init(nn.Conv3d(channels, 1, 1)))

    def forward(self, coarse, features, geometry, size):
        x = self.reduce(coarse)
        x = (x if self.learned else upsample_trilinear(x, size)) + self.lift(features, geometry, size)
        x = self.blocks(x)
        return x, in_full_precision(self.head, norm_silu(x, self.norm))


# ------------------------------------------------------------------------------------------------
# Stage 1


@register(KIND)
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
    seen_channel: also read what of each view the film shows: 1, or 0 behind a collimator and beyond the film's edge,
        where a pixel is air for want of anything better.
    passes: 2 adds a :class:`SecondPass`, which compares the volume with its X-rays and corrects it; 3 applies the same
        weights twice. It renders by ``acquisition``, which holds the data's HU window and X-ray scale as well.
    freeze_first_pass: train the second pass alone; the first one runs without gradients.
    layout_head: "half" or "full": in training also predict which region fills each voxel at that resolution (logits
        ``aux["layout"]``, see :mod:`xray2ct.models.layout`); inference does without.
    upsampling: of the decoder's features, "trilinear" or "learned" (transposed convolutions).

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
        seen_channel: bool = False,
        passes: int = 1,
        freeze_first_pass: bool = False,
        layout_head: str = "off",
        upsampling: str = "trilinear",
    ):
        super().__init__(volume_size, geometry, xray_size)
        check_shape(base_channels, stem_stride, encoder_blocks, decoder_blocks, transformer_blocks)
        check_passes(passes, freeze_first_pass)
        check_choice("upsampling", upsampling, ("trilinear", "learned"))
        self.passes, self.freeze_first_pass = passes, freeze_first_pass
        self.activation_checkpointing, self.seen_channel = activation_checkpointing, seen_channel
        c = base_channels
        widths = (c // 2, c, 2 * c, 4 * c)
        self.encoder = XrayEncoder(widths, encoder_blocks, stem_stride, in_channels=2 if seen_channel else 1)

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
                DecoderStage(4 * c, widths[3], c, 2 * c, decoder_blocks[0], upsampling),  # 1/4: 128 channels at 16^3
                DecoderStage(2 * c, widths[2], c // 2, c, decoder_blocks[1], upsampling),  # 1/2: 64 channels at 32^3
                DecoderStage(c, widths[1], c // 4, c // 2, decoder_blocks[2], upsampling),  # full: 32 channels at 64^3
            ]
        )
        # A volume of lungs and soft tissue averages about 0.2; air starts at 0.
        nn.init.constant_(self.decoder[0].head.bias, 0.2)
        self.requires_grad_(not freeze_first_pass)
        self.second_pass = SecondPass(c, activation_checkpointing) if passes > 1 else None

        check_choice("layout_head", layout_head, SCALES)
        if layout_head != "off" and freeze_first_pass:
            raise InputError(f"model.layout_head is {layout_head!r}, but the first pass is frozen: expected 'off'")
        self.layout_stage = SCALES[layout_head]
        if self.layout_stage is not None:  # last: the other initial weights are those of a network without it
            self.layout = LayoutHead(c // self.layout_stage)

    def forward(self, xrays):
        """xrays ``(B, 2, H, W)`` in [0, 1] -> ``(volume (B, 1, D, H, W), aux)``.

        With ``seen_channel`` also ``(B, 2, 2, H, W)``: of each view pixels, then what is seen in [0, 1]; without this
        channel everything is seen.
        aux: ``{"volume_16": ..., "volume_32": ...}``, named by their depth: the lower-resolution
        predictions for the multi-scale loss; with several passes also ``volume_pass_1``, what the first one predicted
        (``volume_pass_2`` of three); in training with ``layout_head`` also ``"layout"``. Raises ``ValueError`` on
        another shape.
        """
        xrays = prepare_xrays(xrays, self.xray_size, seen_channel=self.seen_channel)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_first_pass):
            (*coarser, volume), layout = self._first_pass(xrays)
        aux = {f"volume_{self.volume_size[0] // divisor}": coarse for divisor, coarse in zip((4, 2), coarser)} | layout
        if self.second_pass is not None:
            for number in range(1, self.passes):
                aux[f"volume_pass_{number}"] = volume
                volume = self.second_pass(volume, xrays, self.acquisition)
        if not self.training:
            volume = volume.clamp(0.0, 1.0)
        return volume, aux

    def _first_pass(self, xrays) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Volumes at a quarter, half and full resolution, each the sum of the predictions so far; ``layout``."""
        features = self._run(self.encoder, xrays)  # strides 2, 4, 8, 16

        x = self._run(self.bottleneck_lift, features[3], self.geometry, self.bottleneck_size)
        x = x + self.prior.to(x.dtype)
        tokens = x.flatten(2).transpose(1, 2)  # (B, 512, C)
        for block in self.transformer:
            tokens = self._run(block, tokens)
        x = tokens.transpose(1, 2).unflatten(2, self.bottleneck_size)  # (B, C, 8, 8, 8)
        x = self._run(self.bottleneck_block, x)

        volumes, layout = [], {}
        for stage, divisor, image in zip(self.decoder, (4, 2, 1), (features[3], features[2], features[1])):
            size = tuple(n // divisor for n in self.volume_size)
            x, detail = self._run(stage, x, image, self.geometry, size)  # (B, 128 | 64 | 32, *size)
            if volumes:
                detail = detail + upsample_trilinear(volumes[-1], size)
            volumes.append(detail)
            if self.training and len(volumes) - 1 == self.layout_stage:
                layout["layout"] = self._run(self.layout, x)
        return volumes, layout


# ------------------------------------------------------------------------------------------------
# Stage 2


@register(REFINEMENT_KIND)
class RefinementNetwork(ActivationCheckpointing):
    """Four times finer: a coarse volume ``(B, 1, 64, 64, 64)`` -> ``(B, 1, 256, 256, 256)``, in [0, 1].

    The coarse volume is folded to half its resolution (space-to-depth), where RRDBs work on wide
    features; 3D PixelShuffle brings them to 1x, 2x and 4x. The result is added to the upsampled coarse
    volume; the last layer starts at zero, so an untrained network is exactly that upsampling.

    guided: also read the X-rays, which show detail that the coarse volume has lost: their features are
        lifted at 1x, 2x and 4x through the geometry.
    channels, growth, rrdb_blocks: the trunk. head_channels: features at 1x, 2x and (per sub-voxel) 4x.
    guide_widths: channels of the X-ray encoder from fine to coarse; guide_channels: lifted ones at 1x, 2x, 4x.
    start: upsampling that details are added to: trilinear, or cubic (:func:`upsampling.upsample_spline`: area averages
        are the coarse volume).
    geometry, xray_size, stem_stride: as in :class:`EnhancedDirectModel`; hu_window, xray_scale: of the data.
    activation_checkpointing: recompute activations in the backward pass (less memory).

    All settings travel in the ``state_dict``: ``RefinementNetwork()`` takes the shape of the weights it
    loads. Any coarse size of multiples of 2 works; there is no normalisation over the volume, so that
    a result does not depend on how it is cut into tiles.
    """

    scale = 4  # output voxels per coarse voxel and axis
    stride = 2  # of the trunk: coarse sizes are multiples of it
    # Coarse voxels beyond a tile's border that its head sees: one convolution at 1x, four at 2x. The last two of them,
    # the widest ones, and the trilinear upsampling see the inner one alone; the cubic one sees the whole volume.
    halo, inner_halo = 3, 1
    # Factor on the added detail: features are of unit size, details a few hundredths; first steps do not overshoot.
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
        start: str = "trilinear",
    ):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        check_xray_size(xray_size)
        self.acquisition, self.xray_size = Acquisition(geometry or Geometry(), hu_window, xray_scale), xray_size
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
                "start": start,
            }
        )

    def _build(self, settings: dict) -> None:
        self.settings = settings = checked_refinement(settings)
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
        self.conv2b = zero_init(nn.Conv3d(c2, c2, 3, padding=1))
        # The features at 4x stay folded into channels at 2x, eight sub-voxels of c4 each: no convolution runs at 256^3.
        self.up4 = nn.Conv3d(c2 + cells * g4, cells * c4, 3, padding=1)
        self.out = zero_init(nn.Conv3d(cells * c4, cells, 3, padding=1))
        for conv in (self.inlet, self.trunk, self.conv2a, self.up4):
            nn.init.kaiming_normal_(conv.weight, a=0.2)  # without normalisation, initial scales last
            nn.init.zeros_(conv.bias)

    @property
    def geometry(self) -> Geometry:
        return self.acquisition.geometry

    def get_extra_state(self) -> dict:
        return {**self.acquisition.to_dict(), "xray_size": self.xray_size, "settings": self.settings}

    def set_extra_state(self, state: dict) -> None:
        self.acquisition = Acquisition(Geometry.from_dict(state["geometry"]), state["hu_window"], state["xray_scale"])
        self.xray_size = state["xray_size"]
        settings = checked_refinement(state["settings"])
        before, self.settings = self.settings, settings
        if {**before, "start": settings["start"]} != settings:  # start has no weights, which an optimiser may hold
            # Called before the children's weights are read: they find the network they belong to.
            parameter = self.inlet.weight
            self._build(settings)
            self.to(parameter.device, parameter.dtype)

    # -- parts -----------------------------------------------------------------------------------

    def encode(self, coarse, xrays):
        """X-rays -> features for :meth:`deep` and :meth:`head`; None without X-rays or guidance.

        Of X-rays with a channel of what is seen, only the pixels are used.
        """
        if self.guidance is None or xrays is None:
            return None
        xrays = prepare_xrays(pixels_of(xrays), self.xray_size)
        size = [min(n, 4 * max(coarse.shape[2:])) for n in xrays.shape[-2:]]  # finer shows nothing more
        rendered = self.acquisition.render(coarse, size)
        rendered = F.interpolate(rendered, size=xrays.shape[-2:], mode="bilinear", align_corners=False)
        parts = (self.guidance.encoder, self.guidance.top_down)
        return self._run(self.guidance.encode, xrays, rendered.to(xrays.dtype), modules=parts)

    def deep(self, coarse, features, window: Window):
        """Features at 1x of a window on multiples of 2: ``(windows, c1, D, H, W)``. Cheap: runs at half resolution."""
        x = 4.0 * window.crop(coarse)  # about unit variance inside a body; air and padding stay 0
        if self.guidance is not None:
            guide = self.settings["guide_channels"][0]
            if features is None:
                lifted = x.new_zeros(x.shape[0], guide, *x.shape[2:])
            else:
                lifted = self._run(
                    self.guidance, features, window, 1, self.geometry, modules=(self.guidance.lift["1"],)
                )
            x = torch.cat([x.to(lifted.dtype), lifted], dim=1)
        x = shallow = self._run(self.inlet, pixel_unshuffle_3d(x, self.stride))
        for block in self.blocks:
            x = self._run(block, x)
        return with_cast_weights(lambda x: self.up1(shallow + self.trunk(x)), self.trunk, self.up1)(x)

    def head(self, coarse, deep, deep_window: Window, features, window: Window):
        """The refined volume of a window from :meth:`deep`'s features around it: ``(windows, 1, 4D, 4H, 4W)``."""
        around, inner = window.grown(self.halo), window.grown(self.inner_halo)
        x = around.crop(deep, start=deep_window.origins)
        # The residual is added in float32, whatever precision the convolutions run in.
        detail = self._run(self._details, x, features, around, inner, modules=self._head_modules())
        return window.crop(self._start(coarse, inner) + self.gain * detail.float(), self.scale, inner.origins)

    def _start(self, coarse, window: Window):
        """The upsampled coarse volume of a window, float32: what the network adds its details to."""
        if self.settings["start"] == "cubic":
            return upsample_spline(coarse, self.scale, window)
        return upsample(window.crop(coarse))

    def _head_modules(self) -> list[nn.Module]:
        """Those that :meth:`_details` calls."""
        lifts = [] if self.guidance is None else [self.guide2, self.guidance.lift["2"], self.guidance.lift["4"]]
        return [self.up2, self.conv2a, self.conv2b, self.up4, self.out, *lifts]

    def _details(self, x, features, around: Window, inner: Window):
        x = self.up2(F.leaky_relu(x, 0.2))  # (windows, c2, 2D, 2H, 2W)
        if self.guidance is not None and features is not None:
            x = x + self.guide2(self.guidance(features, around, 2, self.geometry))
        x = x + self.conv2b(F.leaky_relu(self.conv2a(F.leaky_relu(x, 0.2)), 0.2))
        x = inner.crop(x, 2, around.origins)
        if self.guidance is not None:
            if features is not None:
                lifted = pixel_unshuffle_3d(self.guidance(features, inner, 4, self.geometry))
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
