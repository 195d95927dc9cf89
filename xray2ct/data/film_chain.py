"""Simulated films for training: what source, patient, detector, display and reader make of rendered X-rays.

    chain = FilmChain(FilmConfig(probability=0.5), acquisition)
    random = SampleRandom(seeds, volumes.device)
    xrays = chain(chain.render(volumes, (128, 128), random), volumes, random)

Everything is drawn per sample (:class:`SampleRandom`) and computed for the whole batch on its device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from xray2ct.conventions import AIR_HU
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry, hu_to_unit
from xray2ct.imaging.xray_scale import (
    AIR,
    BODY_HISTOGRAMS,
    BODY_MARGIN,
    BODY_PERCENTILE,
    HISTOGRAM_PERCENTILES,
    REFERENCE_PERCENTILES,
)
from xray2ct.settings import setting, span

DISTANCES = 4  # source distances in the range: each is a forward projector of its own
BEHIND_MM = 200.0  # isocentre to detector, for data of parallel geometry, which does not say
BODY_RADIUS_MM = 120.0  # rays that leave the scan above or below within this distance of the axis are cut short
SCANNED = 0.3  # an axial slice belongs to the scan from this share of the fullest slice's tissue
LIKE_AIR = 0.1  # volumes in [0, 1] below this (-774 HU by the default window) are no tissue


@dataclass
class FilmConfig:
    """Ranges of simulated films, uniform in ``[low, high]`` unless stated; the two views are drawn independently.

    Sources: DeepDRR (Unberath et al., MICCAI 2018; spectrum, scatter, noise), SyntheX (Gao et al., Nat. Mach. Intell.
    2023: strong randomisation of the picture beats realism), xvr (Gopalakrishnan et al., 2025; pose), Niklason et al.
    (Radiology 141, 1981; scatter behind lung and mediastinum), and films of open collections looked at.
    """

    probability: float = setting(0.0, minimum=0.0, maximum=1.0)  # share of the pairs that become films; 0: off
    # Share of the clean pairs that lose the couch, too: else its absence alone would tell a film, and its grey scale.
    no_couch: float = setting(0.5, minimum=0.0, maximum=1.0)
    source_distance_mm: list[float] = span(1400.0, 2000.0)  # to the detector; bedside to upright stand
    shift_mm: float = setting(25.0, minimum=0.0)  # across, +- : the patient is not centred
    shift_rows_mm: float = setting(15.0, minimum=0.0)  # along the body, +-
    scale: float = setting(0.10, minimum=0.0, maximum=0.5)  # of each view, 1 +-: pixel spacing unknown or estimated
    rotation_deg: float = setting(4.0, minimum=0.0)  # in the picture's plane, +-
    collimation: float = setting(0.15, minimum=0.0, maximum=0.4)  # share cut, up to this, at half of the sides
    # Half the relative width of a two-line spectrum: 0.4 bends a line integral of 8 to 5.5 (60 to 120 kVp).
    hardening: list[float] = span(0.05, 0.4)
    # Scatter over primary behind lung; behind the mediastinum about twenty times as much. Log-uniform; without a grid
    # to a 12:1 grid.
    scatter: list[float] = span(0.005, 0.1)
    scatter_mm: list[float] = span(25.0, 60.0)  # standard deviation of its Gaussian kernel
    photons_per_mm2: list[float] = span(1e4, 1e6)  # detected behind air, log-uniform
    blur_mm: list[float] = span(0.0, 2.5)  # standard deviation: focal spot, scintillator, resampling
    unsharp: list[float] = span(0.0, 1.5)  # amount of unsharp masking: edge enhancement, dynamic range compression
    unsharp_mm: list[float] = span(5.0, 60.0)  # its kernel's standard deviation, log-uniform
    linear: float = setting(0.25, minimum=0.0, maximum=1.0)  # share without display curve (LOG values, raw detectors)
    clipped: float = setting(0.08, minimum=0.0, maximum=0.4)  # share of pixels that a window saturates at an end
    gamma: float = setting(2.0, minimum=1.0)  # exponent of a display, log-uniform from its inverse to it
    sigmoid: list[float] = span(2.0, 8.0)  # slope of a display curve (half the displays, the others have a gamma)
    marker: float = setting(0.2, minimum=0.0, maximum=1.0)  # probability that a burnt-in letter is left
    border: float = setting(0.15, minimum=0.0, maximum=1.0)  # probability that the reader leaves a frame in


class FilmChain:
    """Turns the share ``config.probability`` of a batch's pairs into films; the others pass unchanged.

    A pair is a film by its seed alone (:meth:`is_film`). Raises :class:`InputError` naming an impossible range.
    """

    def __init__(self, config: FilmConfig, acquisition: Acquisition):
        self.config, self.acquisition = config, acquisition
        for name, value in vars(config).items():
            if isinstance(value, list) and (len(value) != 2 or not 0 <= value[0] <= value[1] < math.inf):
                raise InputError(f"augment.film.{name} is {value}; expected [low, high], 0 <= low <= high")
        for name in ("scatter", "photons_per_mm2", "unsharp_mm", "scatter_mm", "source_distance_mm"):
            if getattr(config, name)[0] <= 0:
                raise InputError(f"augment.film.{name} is {getattr(config, name)}; expected a low end above 0")
        geometry = acquisition.geometry
        cone = geometry.kind == "cone"
        behind = geometry.sdd_mm - geometry.sid_mm if cone else BEHIND_MM
        # What the detector sees at the isocentre; films of all distances are brought to it, as the reader does.
        self.field_mm = geometry.detector_mm * (geometry.sid_mm / geometry.sdd_mm if cone else 1.0)
        if self.enabled:
            self.distances = self._distances(behind)

    def _distances(self, behind: float) -> list[Acquisition]:
        """The range of source distances in equal steps."""
        geometry, (low, high) = self.acquisition.geometry, self.config.source_distance_mm
        if geometry.kind not in ("cone", "parallel"):
            raise InputError(
                f"augment.film.probability is above 0, but the X-rays are of a {geometry.kind}: expected 0"
            )
        if low - behind <= geometry.fov_mm / 2:
            raise InputError(
                f"augment.film.source_distance_mm begins at {low:g}; expected more than {behind:g} mm (isocentre to"
                f" detector) and half the cube's {geometry.fov_mm:g} mm"
            )
        return [self._at(low + (high - low) * k / (DISTANCES - 1), behind) for k in range(DISTANCES)]

    def _at(self, sdd: float, behind: float) -> Acquisition:
        sid = sdd - behind
        geometry = Geometry("cone", self.acquisition.geometry.fov_mm, sdd, sid, self.field_mm * sdd / sid)
        return replace(self.acquisition, geometry=geometry)

    @property
    def enabled(self) -> bool:
        return self.config.probability > 0

    def is_film(self, random: SampleRandom) -> torch.Tensor:
        """``(B,)`` bool: which pairs become films."""
        return random.uniform("film/pair") < self.config.probability

    def without_couch(self, volumes: torch.Tensor, bodies: torch.Tensor, random: SampleRandom) -> torch.Tensor:
        """Set what is outside the patient to air: in films, which show no couch, and in a share of the clean pairs.

        volumes ``(B, 1, D, H, W)``, uint16 (65535 = 1) or float in [0, 1]; bodies: the same shape, 1 in the patient.
        """
        if not self.enabled:
            return volumes
        removed = self.is_film(random) | (random.uniform("film/no_couch") < self.config.no_couch)
        keep = (bodies > 0) | ~removed.view(-1, 1, 1, 1, 1)
        air = float(hu_to_unit(torch.tensor(float(AIR_HU)), self.acquisition.hu_window))
        if volumes.dtype == torch.uint16:  # which torch can store but hardly compute with
            air = (round(65535 * air) + 2**15) % 2**16 - 2**15  # the same bits as a signed number
            return torch.where(keep, volumes.view(torch.int16), air).view(torch.uint16)
        return torch.where(keep, volumes, air)

    def render(self, volumes: torch.Tensor, image_size, random: SampleRandom) -> torch.Tensor:
        """X-rays ``(B, 2, *image_size)`` of volumes in [0, 1]; those of films with a source distance of their own."""
        if not self.enabled:
            return self.acquisition.render(volumes, image_size)
        films, places = random.on_host("film/pair"), random.on_host("film/distance", 0, DISTANCES)
        chosen = [int(place) if film < self.config.probability else -1 for film, place in zip(films, places)]
        xrays: list = [None] * len(chosen)
        for key in sorted(set(chosen)):
            members = [i for i, one in enumerate(chosen) if one == key]
            acquisition = self.acquisition if key < 0 else self.distances[key]
            rendered = acquisition.render(torch.stack([volumes[i] for i in members]), image_size)
            for i, pair in zip(members, rendered):
                xrays[i] = pair
        return torch.stack(xrays)

    def __call__(self, xrays: torch.Tensor, volumes: torch.Tensor, random: SampleRandom) -> torch.Tensor:
        """What the network sees of each pair: ``(B, 2, S, S)``, from ``xrays`` of that shape (:meth:`render`)."""
        return self.with_seen(xrays, volumes, random)[0]

    def with_seen(self, xrays, volumes, random: SampleRandom) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and what of each picture shows the patient: float, 1 or 0, as the reader finds it.

        Renderings are seen everywhere, also where the CT ends: nothing in their files tells the reader.
        """
        if not self.enabled:
            return xrays, torch.ones_like(xrays)
        chosen = self.is_film(random).view(-1, 1, 1, 1)
        films, shown = self.films(xrays, volumes, random)
        return torch.where(chosen, films, xrays), (shown | ~chosen).to(xrays.dtype)

    def films(self, xrays, volumes, random: SampleRandom) -> tuple[torch.Tensor, torch.Tensor]:
        """Films of all pairs, as the reader gives them, and what of each picture shows the patient (bool)."""
        pixel_mm = self.field_mm / xrays.shape[-1]
        integrals, covered = self._placed(xrays * self.acquisition.xray_scale, volumes, random)
        box, depth = self._collimation(covered, random)
        shown = covered & box
        signal = self.detected(integrals, shown, pixel_mm, random)
        linear = random.uniform("film/linear", (2, 1, 1)) < self.config.linear
        picture = torch.where(linear, self._in_window(signal, shown, random)[0], self._displayed(signal, shown, random))
        picture = self._written_on(picture, box, depth, pixel_mm, random)
        left = random.uniform("film/border", (2, 1, 1)) < self.config.border
        picture = torch.where(box, picture, (random.uniform("film/border_value", (2, 1, 1)) < 0.5).float())
        shown = covered & (box | left)
        return as_read(picture, shown, linear), shown

    # -- where the patient stands ----------------------------------------------------------------

    def _placed(self, integrals, volumes, random):
        """Shifted, scaled and turned pictures, and which of their pixels the CT covers."""
        config, batch, size = self.config, integrals.shape[0], integrals.shape[-1]
        angle = random.uniform("film/angle", (2,), -config.rotation_deg, config.rotation_deg) * (math.pi / 180)
        scale = 1 + random.uniform("film/scale", (2,), -config.scale, config.scale)
        across = random.uniform("film/across", (2,), -config.shift_mm, config.shift_mm)
        along = random.uniform("film/along", (2,), -config.shift_rows_mm, config.shift_rows_mm)
        cos, sin = angle.cos() / scale, angle.sin() / scale
        shift = [2 * s / self.field_mm for s in (across, along)]
        theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=-1).view(-1, 2, 3)
        grid = F.affine_grid(theta, [2 * batch, 1, size, size], align_corners=False)
        placed = F.grid_sample(integrals.flatten(0, 1)[:, None], grid, align_corners=False).view_as(integrals)
        grid = grid.view(batch, 2, size, size, 2)
        top, bottom = self.scanned(volumes)
        z = grid[..., 1] * (self.field_mm / 2)
        covered = (grid.abs() <= 1).all(-1) & (z >= top.view(-1, 1, 1, 1)) & (z <= bottom.view(-1, 1, 1, 1))
        return placed, covered

    def scanned(self, volumes):
        """First and last height ``(B,)`` in mm at which rays cross the scan on their whole way through the body.

        Renderings are dark where the CT ends, films never are.
        """
        geometry = self.acquisition.geometry
        tissue = (volumes > LIKE_AIR).float().mean(dim=(1, 3, 4))  # (B, D)
        inside = tissue > SCANNED * tissue.amax(dim=1, keepdim=True)
        z = geometry.voxel_centres_mm(tissue.shape[1], device=volumes.device)
        half = geometry.fov_mm / tissue.shape[1] / 2
        top = torch.where(inside, z, math.inf).amin(dim=1) - half
        bottom = torch.where(inside, z, -math.inf).amax(dim=1) + half
        slant = 1 + BODY_RADIUS_MM / (self.config.source_distance_mm[0])
        return top / slant, bottom / slant

    def _collimation(self, covered, random):
        """``(B, 2, S, S)``: is a pixel within the collimated field; and its distance to that field's edge in pixels."""
        size, limit = covered.shape[-1], self.config.collimation
        cut = random.uniform("film/collimation", (2, 4), -limit, limit).clamp_min(0) * size
        at = torch.arange(size, device=covered.device) + 0.5
        left, right, top, bottom = (cut[..., k, None] for k in range(4))
        columns, rows = torch.minimum(at - left, size - right - at), torch.minimum(at - top, size - bottom - at)
        depth = torch.minimum(rows[..., :, None], columns[..., None, :])
        return depth > 0, depth

    # -- source and detector ---------------------------------------------------------------------

    def detected(self, integrals, shown, pixel_mm, random):
        """-log of the detected intensity: hardened, scattered, noisy, blurred, and sharpened by the console."""
        config = self.config
        width = random.uniform("film/hardening", (2, 1, 1), *config.hardening)
        primary = (torch.exp(-integrals * (1 - width)) + torch.exp(-integrals * (1 + width))) / 2
        # Photons scatter where there is matter and where they get to: intensity times thickness (Ohnesorge et al.,
        # Eur. Radiol. 9, 1999).
        share = _log_uniform(random, "film/scatter", config.scatter)
        reach = random.uniform("film/scatter_mm", (2, 1, 1), *config.scatter_mm) / pixel_mm
        intensity = primary + share * blurred(primary * integrals, reach, shown)
        photons = _log_uniform(random, "film/photons", config.photons_per_mm2) * pixel_mm**2
        noise = random.normal("film/noise", intensity.shape[1:])
        intensity = intensity + noise * (intensity / photons).sqrt()
        blur = random.uniform("film/blur", (2, 1, 1), *config.blur_mm) / pixel_mm
        signal = -blurred(intensity, blur, shown).clamp_min(1e-6).log()
        amount = random.uniform("film/unsharp", (2, 1, 1), *config.unsharp)
        kernel = _log_uniform(random, "film/unsharp_mm", config.unsharp_mm) / pixel_mm
        return signal + amount * (signal - blurred(signal, kernel, shown))

    # -- display ---------------------------------------------------------------------------------

    def _in_window(self, signal, shown, random):
        """The signal by a window that saturates some pixels at either end: linear, and clipped to [0, 1]."""
        values = torch.where(shown, signal, math.nan).flatten(2)
        clipped = self.config.clipped
        ends = _constant((0.0, clipped, 1 - clipped, 1.0), values.device)
        darkest, dark, bright, brightest = torch.nanquantile(values, ends, dim=-1)[..., None, None].unbind(0)
        low = torch.lerp(darkest, dark, random.uniform("film/low", (2, 1, 1)))
        high = torch.lerp(bright, brightest, random.uniform("film/high", (2, 1, 1)))
        linear = ((signal - low) / (high - low).clamp_min(1e-3)).nan_to_num(0.0)
        return linear, linear.clamp(0, 1)

    def _displayed(self, signal, shown, random):
        """By a display curve, in 8 bits: a gamma, or a sigmoid as of film (Hurter, Driffield) and DICOM's VOI LUT."""
        value = self._in_window(signal, shown, random)[1]
        exponent = math.log(self.config.gamma) * random.uniform("film/gamma", (2, 1, 1), -1, 1)
        slope = random.uniform("film/sigmoid", (2, 1, 1), *self.config.sigmoid)
        centre = random.uniform("film/centre", (2, 1, 1), 0.35, 0.65)
        curve, start, end = (torch.sigmoid(slope * (at - centre)) for at in (value, 0 * slope, 0 * slope + 1))
        is_sigmoid = random.uniform("film/curve", (2, 1, 1)) < 0.5
        value = torch.where(is_sigmoid, (curve - start) / (end - start).clamp_min(1e-3), value.pow(exponent.exp()))
        return (value * 255).round() / 255

    def _written_on(self, picture, box, depth, pixel_mm, random):
        """A bright or dark patch of a letter's size near the edge of the field, where the reader left one."""
        size = picture.shape[-1]
        at = (torch.arange(size, device=picture.device) + 0.5) * pixel_mm
        middle = random.uniform("film/marker_at", (2, 2), 0.05 * self.field_mm, 0.95 * self.field_mm)
        half = random.uniform("film/marker_mm", (2, 2), 2.0, 10.0)
        rows, columns = ((at - middle[..., k, None]).abs() < half[..., k, None] for k in range(2))
        patch = rows[..., :, None] & columns[..., None, :] & box & (depth * pixel_mm < 60)
        left = random.uniform("film/marker", (2, 1, 1)) < self.config.marker
        return torch.where(patch & left, random.uniform("film/marker_value", (2, 1, 1), -0.2, 1.2), picture)


# ------------------------------------------------------------------------------------------------
# Blur, and the reader's normalisation


def blurred(images: torch.Tensor, sigma, weights: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of ``(B, V, S, S)`` by ``sigma`` pixels ``(B, V, 1, 1)``, mean over ``weights`` (bool, the shape).

    Two matrix products: any width costs the same, and each picture has its own. Far from any weight a pixel is 0.
    """
    at = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * ((at[:, None] - at) / sigma.clamp_min(0.05)) ** 2)
    weights = weights.to(images.dtype)
    total = kernel @ weights @ kernel
    return (kernel @ (images * weights) @ kernel) / total.clamp_min(1e-12)


def as_read(pictures: torch.Tensor, shown: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """What the reader makes of pictures ``(B, 2, S, S)`` of unknown scale (:func:`xray_scale.normalise`), as one batch.

    shown: bool; the rest is padding, and becomes air. linear ``(B, 2, 1, 1)``: scaled by percentiles, as logarithmic
    values are; the others, as displayed, by their histogram inside the body.
    """
    values = torch.where(shown, pictures, math.nan)
    ends = torch.nanquantile(values.flatten(2), _constant((0.0, 0.01, 0.99), values.device), dim=-1)
    lowest, low, high = ends[..., None, None].unbind(0)
    to_low, to_high = _constant(REFERENCE_PERCENTILES, values.device).T[..., None, None]
    by_percentile = (pictures - low) / (high - low).clamp_min(1e-6) * (to_high - to_low) + to_low

    middle = torch.where(_middle(shown), pictures, math.nan).flatten(2)
    level = torch.nanquantile(middle, BODY_PERCENTILE / 100, dim=-1)[..., None, None]
    body = torch.where(values >= level, values, math.nan).flatten(2)
    levels = torch.nanquantile(body, _constant(HISTOGRAM_PERCENTILES, values.device) / 100, dim=-1).permute(1, 2, 0)
    by_histogram = _interpolated(pictures, lowest, levels, _constant(BODY_HISTOGRAMS, values.device))
    read = torch.where(linear, by_percentile, by_histogram).clamp(0, 1)
    return torch.where(shown, read, AIR).nan_to_num(AIR)


def _middle(shown: torch.Tensor) -> torch.Tensor:
    """The middle rows and columns of the part of each picture that is shown (:func:`xray_scale.body_level`)."""
    middle = shown
    for axis in (-1, -2):
        at = torch.arange(shown.shape[axis], device=shown.device, dtype=torch.float32) + 0.5
        used = shown.any(dim=-3 - axis)  # over the other axis of the picture
        start = torch.where(used, at, math.inf).amin(dim=-1, keepdim=True)
        end = torch.where(used, at, -math.inf).amax(dim=-1, keepdim=True)
        margin = BODY_MARGIN * (end - start)
        within = (at >= start + margin) & (at <= end - margin)
        middle = middle & within.unsqueeze(-3 - axis)
    return middle


def _interpolated(pictures, lowest, levels, targets):
    """Piecewise linear from :data:`AIR` at ``lowest`` over ``levels`` (B, 2, P) to ``targets`` (2, P), increasing.

    Equal levels share the mean of their targets.
    """
    same = (levels[..., :, None] == levels[..., None, :]).to(targets.dtype)
    targets = (same @ targets[:, :, None]).squeeze(-1) / same.sum(-1).clamp_min(1)
    levels = torch.cat([lowest.squeeze(-1), levels], dim=-1)
    below = levels[..., 0] < levels[..., 1]
    targets = torch.cat([torch.where(below, AIR, targets[..., 0])[..., None], targets], dim=-1)
    result = targets[..., 0, None, None].expand_as(pictures).clone()
    for k in range(levels.shape[-1] - 1):
        low, high = levels[..., k, None, None], levels[..., k + 1, None, None]
        step = (targets[..., k + 1] - targets[..., k])[..., None, None]
        result += step * ((pictures - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return result


@lru_cache(maxsize=32)
def _constant(values: tuple, device: torch.device) -> torch.Tensor:
    """Numbers as a float32 tensor on a device, copied there once: a copy from the host waits."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _log_uniform(random: SampleRandom, name: str, bounds) -> torch.Tensor:
    low, high = (math.log(bound) for bound in bounds)
    return random.uniform(name, (2, 1, 1), low, high).exp()
