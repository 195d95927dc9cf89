"""A second pass of the direct network: it looks at what its first volume fails to explain, and corrects it."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from xray2ct.files import InputError, whole_number
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.lifting import lift_view
from xray2ct.models.blocks import ActivationCheckpointing, ResidualBlock, group_norm, in_full_precision, zero_init
from xray2ct.models.consistent_step import XrayResidual, consistent_change
from xray2ct.models.normalisation import norm_silu
from xray2ct.models.upsampling import upsample_trilinear
from xray2ct.models.working_weights import full_precision

# Factors that bring the inputs to about unit size: residuals are a twentieth of the X-rays, those of a consistent
# volume a hundredth.
RESIDUAL_GAIN, CONSISTENT_GAIN, VOLUME_GAIN = 20.0, 100.0, 4.0


def check_passes(passes, freeze_first_pass: bool) -> None:
    """Raise :class:`InputError` naming the setting for numbers of passes that do not exist."""
    if whole_number("model.passes", passes, 1) > 3:
        raise InputError(f"model.passes is {passes}; expected 1, 2 or 3")
    if freeze_first_pass and passes == 1:
        raise InputError("model.freeze_first_pass is true with model.passes 1: nothing would be trained; expected 2")


class SecondPass(ActivationCheckpointing):
    """Volume and X-rays -> a volume that explains the X-rays better; an unrolled iteration of reconstruction.

    The volume is made consistent with its X-rays (:func:`consistent_change`); a 3D U-Net sees both volumes and, back-
    projected, the X-rays and the residuals of both, and corrects the consistent one. Its last layer starts at zero: an
    untrained second pass is exactly the consistent volume. Learned iterations with the forward projector and its
    adjoint inside: Adler and Oktem, Learned primal-dual reconstruction (IEEE Trans. Med. Imaging 37, 1322, 2018).

    base_channels: as of :class:`EnhancedDirectModel`, whose decoder has the same widths: half of it at full
    resolution, 1x, 2x and 4x below; 2.6 M parameters with 32.
    """

    def __init__(self, base_channels: int, activation_checkpointing: bool = False):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        widths = [base_channels // 2, base_channels, 2 * base_channels, 4 * base_channels]
        self.inlet = nn.Conv3d(8, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv3d(fine, coarse, 2, stride=2), *(ResidualBlock(coarse, 3) for _ in range(blocks)))
            for fine, coarse, blocks in zip(widths[:-1], widths[1:], (1, 2, 2))
        )
        self.reduce = nn.ModuleList(nn.Conv3d(coarse, fine, 1) for fine, coarse in itertools.pairwise(widths))
        self.up = nn.ModuleList(ResidualBlock(width, 3) for width in widths[:-1])
        self.norm = group_norm(widths[0])
        self.head = full_precision(zero_init(nn.Conv3d(widths[0], 1, 1)))

    def forward(self, volume: torch.Tensor, xrays: torch.Tensor, acquisition: Acquisition) -> torch.Tensor:
        """volume ``(B, 1, D, H, W)`` about [0, 1], xrays ``(B, 2, h, w)`` -> corrected volume, float32, not clamped.

        xrays ``(B, 2, 2, h, w)``: of each view pixels, then what is seen; the rest of a view then has no say.
        """
        pixels, seen = xrays.unbind(2) if xrays.ndim == 5 else (xrays, None)
        residual = XrayResidual(pixels, acquisition, volume.shape[2:], seen)
        first = residual.of(volume)
        change = consistent_change(first, residual)
        consistent = volume.float() + change
        images = [residual.xrays, RESIDUAL_GAIN * first, CONSISTENT_GAIN * residual.of(consistent)]
        maps = torch.stack(images, dim=2)  # (B, 2, 3, size, size)
        lifted = [lift_view(maps[:, view], view, acquisition.geometry, volume.shape[2:]) for view in range(2)]
        volumes = [VOLUME_GAIN * consistent, RESIDUAL_GAIN * change]
        return consistent + self.correction(torch.cat([*volumes, *(x.float() for x in lifted)], dim=1))

    def correction(self, x: torch.Tensor) -> torch.Tensor:
        """The U-Net: ``(B, 8, D, H, W)`` -> ``(B, 1, D, H, W)``, float32."""
        x = self._run(self.inlet, x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = self._run(down, x)
        for level in reversed(range(len(skips))):
            x = self._run(self._finer, x, skips[level], level, modules=(self.reduce[level], self.up[level]))
        return in_full_precision(self.head, norm_silu(x, self.norm))

    def _finer(self, x, skip, level: int):
        return self.up[level](upsample_trilinear(self.reduce[level](x), skip.shape[2:]) + skip)
