"""X2CT-GAN's generator, written anew from its published description: a baseline."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from xray2ct.files import InputError, whole_number
from xray2ct.geometry.projector import Geometry
from xray2ct.models.blocks import ActivationCheckpointing, in_full_precision, prepare_xrays
from xray2ct.models.coarse import CoarseModel
from xray2ct.models.registry import register
from xray2ct.models.working_weights import full_precision

X2CT = "x2ct_generator"  # kind of its checkpoints
BASE_CHANNELS = 64  # of the published network: its first features; dense layers add half as many
BOTTLENECK = 4  # 1x1 convolutions of a dense layer have so many times the channels that it adds
LAYERS = (6, 12, 24, 16, 6)  # of the encoder's dense blocks, at strides 2, 4, 8, 16 and 32
WIDTHS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.25)  # of the decoders in base channels, at strides 32, 16, 8, 4, 2 and 1
CONVOLUTIONS = (2, 2, 2, 2, 1)  # of a decoder's block at strides 16, 8, 4, 2 and 1


def _norm_conv(dims: int, channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Instance normalisation, ReLU, convolution."""
    norm, conv = (nn.InstanceNorm2d, nn.Conv2d) if dims == 2 else (nn.InstanceNorm3d, nn.Conv3d)
    convolution = conv(channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(norm(channels, affine=True), nn.ReLU(), convolution)


def _conv_norm(dims: int, channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, instance normalisation, ReLU."""
    norm, conv = (nn.InstanceNorm2d, nn.Conv2d) if dims == 2 else (nn.InstanceNorm3d, nn.Conv3d)
    convolution = conv(channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, norm(out_channels, affine=True), nn.ReLU())


class DenseLayer(nn.Module):
    """A layer of DenseNet-BC (Huang et al., CVPR 2017): its input, and ``growth`` channels more."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.reduce = _norm_conv(2, channels, BOTTLENECK * growth, 1)
        self.conv = _norm_conv(2, BOTTLENECK * growth, growth, 3)

    def forward(self, x):
        return torch.cat([x, self.conv(self.reduce(x))], dim=1)


class DenseEncoder(ActivationCheckpointing):
    """An X-ray ``(B, 1, n, n)`` -> feature maps at strides 1, 2, 4, 8, 16 and 32.

    Five times: a convolution of stride 2, a dense block, and a 1x1 convolution to half the channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        growth = channels // 2
        self.stem = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(1, channels, 7))
        self.widths = [channels]
        self.stages = nn.ModuleList()
        for count in LAYERS:
            dense = [DenseLayer(channels + i * growth, growth) for i in range(count)]
            down, channels = _norm_conv(2, channels, channels, 3, stride=2), channels + count * growth
            self.stages.append(nn.Sequential(down, *dense, _norm_conv(2, channels, channels // 2, 1)))
            channels //= 2
            self.widths.append(channels)

    def forward(self, xray):
        features = [self._run(self.stem, xray)]
        for stage in self.stages:
            features.append(self._run(stage, features[-1]))
        return features


class ConnectionA(nn.Module):
    """The encoder's end -> the decoder's beginning, ``(B, C, n, n)`` -> ``(B, c, n, n, n)``: fully connected in space.

    One matrix from all pixels to all cells, shared by the channels, after a 1x1 convolution.
    """

    def __init__(self, channels: int, out_channels: int, size: int):
        super().__init__()
        self.size, self.reduce = size, _conv_norm(2, channels, out_channels, 1)
        self.connect = nn.Linear(size**2, size**3)

    def forward(self, x):
        x = self.connect(self.reduce(x).flatten(2))
        return F.relu(x).unflatten(2, (self.size, self.size, self.size))


class ConnectionB(nn.Module):
    """A skip connection from 2D to 3D: convolution, copies along the rays, 3D convolution."""

    def __init__(self, channels: int, out_channels: int, view: int):
        super().__init__()
        self.axis = 3 if view == 0 else 4  # the PA view looks along H, the lateral one along W
        self.flat, self.deep = _conv_norm(2, channels, out_channels), _conv_norm(3, out_channels, out_channels)

    def forward(self, x):
        x = self.flat(x)
        shape = [-1] * 5
        shape[self.axis] = x.shape[-1]
        return self.deep(x.unsqueeze(self.axis).expand(shape))


class Decoder(ActivationCheckpointing):
    """3D features from coarse to fine; each scale takes another input of its own, concatenated.

    widths: from coarse to fine; convolutions: of the blocks at all but the coarsest scale.
    """

    def __init__(self, widths: Sequence[int], convolutions: Sequence[int]):
        super().__init__()
        self.up = nn.ModuleList(_conv_norm(3, coarse, fine) for coarse, fine in itertools.pairwise(widths))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(_conv_norm(3, 2 * width if i == 0 else width, width) for i in range(count)))
            for width, count in zip(widths[1:], convolutions)
        )

    def step(self, level: int, x, other):
        """From scale ``level`` to the next finer one; ``other`` has its size."""
        modules = (self.up[level], self.blocks[level])
        return self._run(self._step, level, x, other, modules=modules)

    def _step(self, level, x, other):
        x = self.up[level](F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.blocks[level](torch.cat([x, other], dim=1))


@register(X2CT)
class X2CTGenerator(CoarseModel):
    """The generator of X2CT-GAN (Ying et al., CVPR 2019, section 3.2), without its discriminator: "X2CT-CNN".

    One 2D encoder of dense blocks per X-ray, a 3D decoder each behind Connection-A at the coarsest scale and
    Connection-B at the others, and a third decoder that fuses theirs: at each scale the average of both, brought to
    the same axes (Connection-C). Widths and depths are the published ones (:data:`LAYERS`, :data:`WIDTHS`) where
    ``base_channels`` is 64: 40.0 M parameters.

    What differs from the publication, or is not in it: Connection-A's fully connected layer is shared by the channels
    (one of all channels would hold nearly a hundred million weights per view); dense blocks all end in half their
    channels; nearest-neighbour upsampling with a convolution; a linear output, clamped to [0, 1] in eval mode.
    ``volume_size`` may be coarser than the published 128^3 from 128^2: the decoders then stop there, at
    ``xray_size / 32 * 2^k`` voxels for k = 1 to 5.
    """

    def __init__(
        self,
        volume_size=(128, 128, 128),
        base_channels: int = BASE_CHANNELS,
        geometry: Geometry | None = None,
        xray_size: int = 128,
        activation_checkpointing: bool = False,
    ):
        super().__init__(volume_size, geometry, xray_size)
        whole_number("model.base_channels", base_channels, 16, multiple=16)
        coarsest = xray_size // 32
        sizes = [coarsest * 2**k for k in range(1, 6)]
        if xray_size < 64 or len(set(self.volume_size)) > 1 or self.volume_size[0] not in sizes:
            raise InputError(
                f"model.volume_size is {list(self.volume_size)} with model.xray_size {xray_size}; this network makes"
                f" cubes of xray_size / 32 * 2^k voxels ({', '.join(map(str, sizes))}) of X-rays of at least 64"
            )
        steps = sizes.index(self.volume_size[0]) + 1
        widths, convolutions = [int(w * base_channels) for w in WIDTHS[: steps + 1]], CONVOLUTIONS[:steps]
        self.encoders = nn.ModuleList(DenseEncoder(base_channels) for _ in range(2))
        image_widths = self.encoders[0].widths[::-1]
        self.starts = nn.ModuleList(ConnectionA(image_widths[0], widths[0], coarsest) for _ in range(2))
        self.skips = nn.ModuleList(
            nn.ModuleList(ConnectionB(c, width, view) for c, width in zip(image_widths[1:], widths[1:]))
            for view in range(2)
        )
        self.decoders = nn.ModuleList(Decoder(widths, convolutions) for _ in range(2))
        self.fusion = Decoder(widths, convolutions)
        self.head = full_precision(nn.Conv3d(widths[-1], 1, 3, padding=1))
        nn.init.constant_(self.head.bias, 0.2)  # a volume of lungs and soft tissue averages about that
        self.activation_checkpointing = activation_checkpointing
        for part in (*self.encoders, *self.decoders, self.fusion):
            part.activation_checkpointing = activation_checkpointing

    def forward(self, xrays):
        """xrays ``(B, 2, H, W)`` in [0, 1] -> ``(volume (B, 1, D, H, W), {})``; in eval mode clamped to [0, 1].

        Raises ``ValueError`` on another shape.
        """
        xrays = prepare_xrays(xrays, self.xray_size)
        maps = [encoder(xrays[:, v : v + 1])[::-1] for v, encoder in enumerate(self.encoders)]  # coarse to fine
        views = [self._run(start, x[0]) for start, x in zip(self.starts, maps)]
        fused = 0.5 * (views[0] + views[1])
        for level in range(len(self.fusion.up)):
            for view, decoder in enumerate(self.decoders):
                skip = self._run(self.skips[view][level], maps[view][level + 1])
                views[view] = decoder.step(level, views[view], skip)
            fused = self.fusion.step(level, fused, 0.5 * (views[0] + views[1]))
        volume = in_full_precision(self.head, fused)
        return (volume if self.training else volume.clamp(0.0, 1.0)), {}
