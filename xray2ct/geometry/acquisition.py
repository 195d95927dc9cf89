"""Acquisition: all that turns a volume in [0, 1] into its X-rays."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from xray2ct.geometry.projector import HU_WINDOW, XRAY_SCALE, Geometry, render_xrays


@dataclass(frozen=True)
class Acquisition:
    """How the X-rays of a data set were made; what forward projector, losses and headers are given.

    geometry: source, detector and cube. hu_window: HU mapped to [0, 1] in volumes. xray_scale: line integral that
    becomes pixel value 1.
    """

    geometry: Geometry = field(default_factory=Geometry)
    hu_window: tuple[float, float] = HU_WINDOW
    xray_scale: float = XRAY_SCALE

    def __post_init__(self):
        object.__setattr__(self, "hu_window", tuple(self.hu_window))

    def to_dict(self) -> dict:
        """Plain values for manifests and checkpoints, under the keys ``geometry``, ``hu_window``, ``xray_scale``."""
        return {
            "geometry": self.geometry.to_dict(),
            "hu_window": list(self.hu_window),
            "xray_scale": self.xray_scale,
        }

    def render(self, volume: torch.Tensor, image_size=(512, 512)) -> torch.Tensor:
        """X-rays ``(B, 2, *image_size)`` of a volume ``(B, 1, D, H, W)`` in [0, 1]; see :func:`render_xrays`."""
        return render_xrays(volume, self.geometry, image_size, self.hu_window, self.xray_scale)
