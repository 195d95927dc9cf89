"""X-ray features for stage 2, back-projected at 64^3, 128^3 and 256^3 wherever a window asks for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from xray2ct.geometry.projector import Geometry
from xray2ct.models.blocks import Lifting, XrayEncoder
from xray2ct.models.window import Window


class Guidance(nn.Module):
    """X-ray features at the resolutions of stage 2's volumes, lifted wherever a window asks for them.

    With each X-ray the encoder sees its difference from the one rendered from the coarse volume: this residual, as in
    iterative reconstruction, shows where the volume is too thin or too dense.

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
        lift, size = self.lift[str(scale)], tuple(n * scale for n in window.full)
        if window.is_whole:
            lifted = lift(features[scale], geometry, size).repeat_interleave(each, 0)
        else:
            lifted = lift(features[scale], geometry, size, window.boxes(scale))
        return lifted * gate.repeat_interleave(each).view(-1, 1, 1, 1, 1).to(lifted.dtype)
