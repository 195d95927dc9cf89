"""Which voxels a pixel reads along one axis of a view, and which pixels read a voxel, in every slice."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Band(NamedTuple):
    """One axis of a view: linear interpolation of ``voxels`` at ``pixels`` places, centred on each other.

    In slice k of ``slices`` neighbouring pixels lie ``step + slope * k`` voxels apart (above 0), linear in depth as
    rays that diverge from a point are. slope 0: all slices are read alike. Beyond the outermost voxel centres weights
    fade to zero.
    """

    step: float
    slope: float
    slices: int
    pixels: int
    voxels: int

    @property
    def alike(self) -> bool:
        return self.slope == 0

    def part(self, start: int, stop: int) -> Band:
        """The same for slices ``start:stop`` only."""
        return self._replace(step=self.step + self.slope * start, slices=stop - start)

    def matrices(self, device) -> torch.Tensor:
        """Interpolation as matrices, ``(slices, pixels, voxels)``; two entries a row are not zero."""
        position = self._position(torch.arange(self.pixels, device=device)[None])
        voxel = torch.arange(self.voxels, device=device)
        return (1.0 - (position.unsqueeze(-1) - voxel).abs()).clamp_min(0.0)

    def taps(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Voxels that each pixel reads, and their weights: ``(slices, pixels, 2)`` each."""
        position = self._position(torch.arange(self.pixels, device=device)[None]).unsqueeze(-1)
        voxel = position.floor().long() + torch.arange(2, device=device)
        return _weighted(voxel, position - voxel, self.voxels)

    def adjoint_taps(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels that read each voxel, and the weights they do it with: ``(slices, voxels, n)`` each."""
        voxel = torch.arange(self.voxels, device=device)[:, None]
        step = self._steps(device)[:, None, None]
        first = ((voxel - 1 - self._start(step)) / step).floor().long()
        pixel = first + torch.arange(self.most_pixels, device=device)
        return _weighted(pixel, self._position(pixel) - voxel, self.pixels)

    @property
    def most_pixels(self) -> int:
        """At most so many neighbouring pixels read one voxel, with one to spare on either side for rounding."""
        return math.ceil(2 / min(self.step, self.step + self.slope * (self.slices - 1))) + 2

    def _steps(self, device):
        return self.step + self.slope * torch.arange(self.slices, device=device, dtype=torch.float32)

    def _start(self, step):
        return (self.voxels - 1) / 2 - step * ((self.pixels - 1) / 2)

    def _position(self, pixel):
        """Where pixels ``(1 or slices, ...)`` read, in voxels."""
        step = self._steps(pixel.device).view((-1,) + (1,) * (pixel.ndim - 1))
        return self._start(step) + step * pixel


def _weighted(index, distance, size):
    """``index``, clamped to ``size`` entries, with the hat's weights; 0 for entries outside."""
    weight = (1.0 - distance.abs()).clamp_min(0.0)
    return index.clamp(0, size - 1), weight.masked_fill((index < 0) | (index >= size), 0.0)
