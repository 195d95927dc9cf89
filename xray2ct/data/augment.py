"""3D augmentation on the device, with the X-rays of the augmented volume rendered in the same step.

Pairs stay physically consistent: the volume is warped first, then both X-rays are rendered from it.
With few patients most of what the network sees is augmented. Every random number comes from a generator seeded by the
sample's place in the training run, so resuming and the number of processes do not change it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from xray2ct.data.film_chain import FilmChain, FilmConfig
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.lifting import averaged_to
from xray2ct.settings import setting


@dataclass
class AugmentConfig:
    """Ranges of the random changes; 0 switches one off."""

    enabled: bool = True
    source_size: int = setting(256, minimum=16)  # resolution of the volume that is warped and rendered
    rotation_deg: float = setting(6.0, minimum=0.0)  # each axis, uniform in +-
    scale: float = setting(0.10, minimum=0.0, maximum=0.9)  # each axis, uniform in 1 +-
    translation_mm: float = setting(15.0, minimum=0.0)  # each axis, uniform in +-
    # Standard deviation of the control points' displacement along each axis; interpolation between them averages
    # that to about half within the cube (it is kept at the corners).
    elastic_mm: float = setting(8.0, minimum=0.0)
    elastic_points: int = setting(5, minimum=2)  # control points per axis
    hu_shift: float = setting(20.0, minimum=0.0)  # offset of everything but air, uniform in +- HU
    hu_scale: float = setting(0.03, minimum=0.0, maximum=1.0)  # stretch of HU + 1000 (density), uniform in 1 +-
    # Left-right: turns the anatomy into situs inversus, which the PA view shows.
    mirror_probability: float = setting(0.5, minimum=0.0, maximum=1.0)
    xray_noise: float = setting(0.003, minimum=0.0)  # standard deviation added to X-ray pixels
    # Exposure-like gain of each X-ray, uniform in 1 +- (breaks the absolute scale).
    xray_gain: float = setting(0.0, minimum=0.0, maximum=1.0)
    film: FilmConfig = field(default_factory=FilmConfig)  # a share of the pairs as radiographs


def random_affine(config: AugmentConfig, fov_mm: float, generator: torch.Generator) -> torch.Tensor:
    """Matrix ``(3, 4)`` for ``affine_grid`` (x, y, z = W, H, D; cube = [-1, 1]), output -> input."""

    def uniform(limit):
        return (2 * torch.rand(3, generator=generator) - 1) * limit

    angles = uniform(math.radians(config.rotation_deg)).tolist()
    rotation = torch.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        rotation = rotation @ turn
    scale = 1.0 + uniform(config.scale)
    if torch.rand((), generator=generator) < config.mirror_probability:
        scale[0] = -scale[0]
    shift = uniform(2 * config.translation_mm / fov_mm)
    return torch.cat([rotation * scale, shift[:, None]], dim=1)


def random_displacement(config: AugmentConfig, fov_mm: float, size: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth displacement field ``(1, size, size, size, 3)`` in the units of ``affine_grid``."""
    n = config.elastic_points
    control = torch.randn(1, 3, n, n, n, generator=generator) * (2 * config.elastic_mm / fov_mm)
    # Two linear upsamplings: the second one rounds the creases of the first.
    field_ = F.interpolate(control, size=2 * n, mode="trilinear", align_corners=True)
    field_ = F.interpolate(field_, size=size, mode="trilinear", align_corners=True)
    return field_.permute(0, 2, 3, 4, 1)


class PairMaker:
    """Source volumes -> training batches ``{"xrays", "ct_volume", "mask"}`` on their device.

    ``__call__(volumes (B, 1, S, S, S) in [0, 1] or uint16, masks, seeds)``: one seed per sample. Returns xrays
    ``(B, 2, xray_size, xray_size)``, ct_volume and mask ``(B, 1, *volume_size)``; no mask for masks None.
    Volumes coarser than ``volume_size`` raise :class:`InputError`.
    """

    def __init__(self, acquisition: Acquisition, volume_size, xray_size: int, config: AugmentConfig):
        self.acquisition, self.config = acquisition, config
        self.volume_size, self.xray_size = tuple(volume_size), xray_size
        self.film = FilmChain(config.film if config.enabled else FilmConfig(), acquisition)

    @torch.no_grad()
    def __call__(self, volumes, masks, seeds) -> dict[str, torch.Tensor]:
        if any(have < want for have, want in zip(volumes.shape[2:], self.volume_size)):
            raise InputError(
                f"augment.source_size is {self.config.source_size}, the source volumes have {tuple(volumes.shape[2:])}"
                f" voxels; expected at least the {self.volume_size} that training wants"
            )
        volumes = volumes.float() / 65535.0 if volumes.dtype == torch.uint16 else volumes.float()
        masks = masks.float() if masks is not None else None
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        if self.config.enabled:
            volumes, masks = self._warp(volumes, masks, generators)
            volumes = self._change_density(volumes, generators)
        random = SampleRandom(seeds, volumes.device)
        xrays = self.film.render(volumes, (self.render_size,) * 2, random)
        if self.render_size != self.xray_size:
            xrays = F.interpolate(xrays, size=(self.xray_size,) * 2, mode="bilinear")
        xrays = self.film(xrays, volumes, random)
        if self.config.enabled:
            xrays = self._degrade(xrays, generators)
        target = self._pool(volumes)
        pair = {"xrays": xrays.clamp(0.0, 1.0), "ct_volume": target}
        return pair if masks is None else {**pair, "mask": (self._pool(masks) >= 0.5).float()}

    @property
    def render_size(self) -> int:
        """Rays finer than the source volume's voxels add nothing: render at most twice as fine."""
        return min(self.xray_size, 2 * self.config.source_size)

    def _pool(self, volumes):
        same = tuple(volumes.shape[2:]) == self.volume_size  # stage 2 trains at the source's own resolution
        return volumes if same else averaged_to(volumes, self.volume_size)

    def _warp(self, volumes, masks, generators):
        size, fov = volumes.shape[-1], self.acquisition.geometry.fov_mm
        theta = torch.stack([random_affine(self.config, fov, g) for g in generators]).to(volumes.device)
        grid = F.affine_grid(theta, volumes.shape, align_corners=False)
        if self.config.elastic_mm > 0:
            fields = [random_displacement(self.config, fov, size, g) for g in generators]
            grid += torch.cat(fields).to(grid.device)
        warped = F.grid_sample(volumes, grid, align_corners=False)
        if masks is None:
            return warped, None
        # The mask is only needed at the target's resolution: sampled there, at the cells' centres.
        coarse = self._pool(grid.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return warped, F.grid_sample(masks, coarse, align_corners=False)

    def _change_density(self, volumes, generators):
        """Scale and shift density (HU + 1000) of everything that is not air, as scanners and contrast do."""
        draws = torch.stack([2 * torch.rand(2, generator=g) - 1 for g in generators]).to(volumes.device)
        low, high = self.acquisition.hu_window
        air = (-1000.0 - low) / (high - low)
        gain = 1.0 + self.config.hu_scale * draws[:, 0].view(-1, 1, 1, 1, 1)
        shift = self.config.hu_shift / (high - low) * draws[:, 1].view(-1, 1, 1, 1, 1)
        density = (volumes - air).clamp_min(0.0)
        tissue = (density / 0.2).clamp_max(1.0)  # the offset fades out below -500 HU: air stays air
        changed = torch.where(volumes > air, air + density * gain + shift * tissue, volumes)
        return changed.clamp(0.0, 1.0)

    def _degrade(self, xrays, generators):
        for sample, generator in zip(xrays, generators):
            if self.config.xray_gain > 0:
                gain = 1.0 + self.config.xray_gain * (2 * torch.rand(2, 1, 1, generator=generator) - 1)
                sample *= gain.to(sample.device)
            if self.config.xray_noise > 0:
                noise = torch.randn(sample.shape, generator=generator) * self.config.xray_noise
                sample += noise.to(sample.device)
        return xrays
