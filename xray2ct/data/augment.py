"""3D augmentation on the device, with the X-rays of the augmented volume rendered in the same step.

Pairs stay physically consistent: the volume is warped first, then both X-rays are rendered from it.
With few patients most of what the network sees is augmented. Every random number is drawn on the batch's device and
follows from the sample's seed, its place in the training run: resuming, the number of processes and the other samples
of the batch do not change it. Nothing is computed on the host, and nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from xray2ct.data.anatomy import AnatomyConfig, load_deformations
from xray2ct.data.film_chain import FilmChain, FilmConfig
from xray2ct.data.sample_random import SampleRandom
from xray2ct.data.warp import DensityChange, SmoothWarp, unit_volumes
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
    anatomy: AnatomyConfig = field(default_factory=AnatomyConfig)  # deformations as between patients


def random_affine(config: AugmentConfig, fov_mm: float, random: SampleRandom) -> torch.Tensor:
    """Matrices ``(B, 3, 4)`` for ``affine_grid`` (x, y, z = W, H, D; cube = [-1, 1]), output -> input.

    Rotation Rx Ry Rz, scale, mirroring of x and shift, each drawn as :class:`AugmentConfig` says.
    """
    angles = random.uniform("rotation", (3,), -1.0, 1.0) * math.radians(config.rotation_deg)
    cosines, sines = angles.cos(), angles.sin()
    rotation = torch.eye(3, device=random.device).expand(len(random), 3, 3)
    for axis in range(3):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3, device=random.device).repeat(len(random), 1, 1)
        turn[:, i, i] = turn[:, j, j] = cosines[:, axis]
        turn[:, i, j], turn[:, j, i] = -sines[:, axis], sines[:, axis]
        rotation = rotation @ turn
    scale = 1.0 + random.uniform("scale", (3,), -config.scale, config.scale)
    mirrored = random.uniform("mirror") < config.mirror_probability
    scale[:, 0] *= 1.0 - 2.0 * mirrored
    limit = 2 * config.translation_mm / fov_mm
    shift = random.uniform("translation", (3,), -limit, limit)
    return torch.cat([rotation * scale[:, None], shift[..., None]], dim=2)


def random_displacement(config: AugmentConfig, fov_mm: float, random: SampleRandom) -> torch.Tensor | None:
    """Displacement ``(B, n, n, n, 3)`` of the control points in the units of ``affine_grid``; None where it is off."""
    n = config.elastic_points
    return random.normal("elastic", (n, n, n, 3), std=2 * config.elastic_mm / fov_mm) if config.elastic_mm > 0 else None


class PairMaker:
    """Source volumes -> training batches ``{"xrays", "ct_volume", "mask"}`` on their device.

    ``__call__(volumes (B, 1, S, S, S) in [0, 1] or uint16, masks, seeds, bodies)``: one seed per sample. Returns xrays
    ``(B, 2, xray_size, xray_size)``, ct_volume and mask ``(B, 1, *volume_size)``; no mask for masks None. bodies: of
    the volumes' shape, 1 in the patient; films, and some clean pairs, then show no couch. with_seen: also ``"seen"``,
    of the X-rays' shape: 1 where they show the patient, 0 where a film does not.
    Volumes coarser than ``volume_size`` raise :class:`InputError`.
    """

    def __init__(
        self, acquisition: Acquisition, volume_size, xray_size: int, config: AugmentConfig, with_seen: bool = False
    ):
        self.acquisition, self.config = acquisition, config
        self.volume_size, self.xray_size, self.with_seen = tuple(volume_size), xray_size, with_seen
        self.film = FilmChain(config.film if config.enabled else FilmConfig(), acquisition)
        wanted = config.enabled and config.anatomy.file is not None
        self.deformations = load_deformations(config.anatomy.file) if wanted else None

    @torch.no_grad()
    def __call__(self, volumes, masks, seeds, bodies=None) -> dict[str, torch.Tensor]:
        if any(have < want for have, want in zip(volumes.shape[2:], self.volume_size)):
            raise InputError(
                f"augment.source_size is {self.config.source_size}, the source volumes have {tuple(volumes.shape[2:])}"
                f" voxels; expected at least the {self.volume_size} that training wants"
            )
        random = SampleRandom(seeds, volumes.device)
        if bodies is not None:
            volumes = self.film.without_couch(volumes, bodies, random)
        masks = masks.float() if masks is not None else None
        with torch.autocast(volumes.device.type, enabled=False):
            if self.config.enabled:
                volumes, masks = self._warp(volumes, masks, random)
            else:
                volumes = unit_volumes(volumes)
            xrays = self.film.render(volumes, (self.render_size,) * 2, random)
            if self.render_size != self.xray_size:
                xrays = F.interpolate(xrays, size=(self.xray_size,) * 2, mode="bilinear")
            xrays, seen = self.film.with_seen(xrays, volumes, random)
            if self.config.enabled:
                xrays = self._degrade(xrays, random)
            target = self._pool(volumes)
        pair = {"xrays": xrays.clamp(0.0, 1.0), "ct_volume": target}
        if self.with_seen:
            pair["seen"] = seen
        return pair if masks is None else {**pair, "mask": (self._pool(masks) >= 0.5).float()}

    @property
    def render_size(self) -> int:
        """Rays finer than the source volume's voxels add nothing: render at most twice as fine."""
        return min(self.xray_size, 2 * self.config.source_size)

    def _pool(self, volumes):
        same = tuple(volumes.shape[2:]) == self.volume_size  # stage 2 trains at the source's own resolution
        return volumes if same else averaged_to(volumes, self.volume_size)

    def _warp(self, volumes, masks, random: SampleRandom):
        """Warped volumes with changed density; masks at the target's resolution, at the cells' centres."""
        fov = self.acquisition.geometry.fov_mm
        theta = random_affine(self.config, fov, random)
        anatomy = self.deformations.draw(random, self.config.anatomy) if self.deformations else None
        warp = SmoothWarp(theta, random_displacement(self.config, fov, random), volumes.shape[2:], anatomy)
        warped = warp.sample(volumes, self._density_change(random))
        return warped, None if masks is None else warp.sample_cells(masks, self.volume_size)

    def _density_change(self, random: SampleRandom) -> DensityChange:
        low, high = self.acquisition.hu_window
        stretch, offset = self.config.hu_scale, self.config.hu_shift / (high - low)
        one = (1, 1, 1, 1)
        return DensityChange(
            random.uniform("hu_scale", one, -stretch, stretch),
            random.uniform("hu_shift", one, -offset, offset),
            air=(-1000.0 - low) / (high - low),
        )

    def _degrade(self, xrays, random: SampleRandom):
        """What the detector does to rendered X-rays ``(B, 2, R, R)``: gain of each view, noise."""
        if self.config.xray_gain > 0:
            gain = self.config.xray_gain
            xrays = xrays * (1.0 + random.uniform("xray_gain", (2, 1, 1), -gain, gain))
        if self.config.xray_noise > 0:
            xrays = xrays + random.normal("xray_noise", xrays.shape[1:], std=self.config.xray_noise)
        return xrays
