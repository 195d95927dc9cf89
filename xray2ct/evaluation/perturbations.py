"""What goes wrong when X-rays are taken: each perturbation shows a system other X-rays of a patient than it expects.

from xray2ct.evaluation.perturbations import PERTURBATIONS, Exam
shown = PERTURBATIONS["view angle off by 2 degrees"].variants[0](Exam(volume, acquisition, 128))

Rendered from a volume finer than the networks', with everything else as the system was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F

from xray2ct.conventions import AIR_HU
from xray2ct.data.film_chain import FilmChain, FilmConfig
from xray2ct.data.sample_random import SampleRandom
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.lifting import averaged_to
from xray2ct.geometry.projector import MU_WATER, Geometry, hu_to_unit, unit_to_hu
from xray2ct.imaging.body import patient_mask
from xray2ct.imaging.xray_scale import AIR

# Two upper arms hanging down beside the trunk: half the distance between them, radius, radius of the humerus, in mm,
# and its attenuation over water's (HU + 1000) / 1000.
ARM_AT_MM, ARM_MM, HUMERUS_MM, HUMERUS = 200.0, 45.0, 11.0, 1.8
PAD_MM, PAD_GAP_MM, PAD_HALF_MM, PAD_HU = 15.0, 5.0, 170.0, -600.0  # a board behind the back: thickness, gap, width, HU
# One setting of the simulated detector that changes nothing; perturbations change one entry of it.
PERFECT = FilmConfig(
    hardening=[0.0, 0.0], scatter=[1e-9, 1e-9], photons_per_mm2=[1e12, 1e12], blur_mm=[0.0, 0.0], unsharp=[0.0, 0.0]
)


@dataclass(frozen=True)
class Shown:
    """What a system sees of an exam, ``(1, 2, S, S)`` in [0, 1] and what of it is seen, and the fine true volume."""

    xrays: torch.Tensor
    seen: torch.Tensor
    truth: torch.Tensor


@dataclass(frozen=True)
class Exam:
    """A patient's volume ``(1, 1, N, N, N)`` in [0, 1], how X-rays are made of it, their size; seed of the noise."""

    volume: torch.Tensor
    acquisition: Acquisition
    xray_size: int
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return self.acquisition.geometry

    @property
    def spacing_mm(self) -> float:
        return self.geometry.fov_mm / self.volume.shape[2]

    @property
    def air(self) -> float:
        return float(hu_to_unit(torch.tensor(float(AIR_HU)), self.acquisition.hu_window))

    @cached_property
    def patient(self) -> torch.Tensor:
        """The patient without couch, bool, of the volume's shape."""
        hu = unit_to_hu(self.volume[0, 0], self.acquisition.hu_window).numpy()
        return torch.from_numpy(patient_mask(hu, self.spacing_mm))[None, None]

    def render(self, volume: torch.Tensor, geometry: Geometry | None = None) -> torch.Tensor:
        """X-rays of a volume, rendered at half its voxels' size or finer and averaged; not clipped."""
        acquisition = replace(self.acquisition, geometry=geometry or self.geometry)
        fine = max(2 * volume.shape[2], self.xray_size)
        return averaged_to(acquisition.render(volume, (fine, fine)), (self.xray_size,) * 2)

    @cached_property
    def nominal(self) -> torch.Tensor:
        """The X-rays as they should be."""
        return self.render(self.volume)

    def show(self, xrays: torch.Tensor, truth: torch.Tensor | None = None, seen: torch.Tensor | None = None) -> Shown:
        seen = torch.ones_like(xrays) if seen is None else seen
        return Shown(xrays.clamp(0, 1), seen, self.volume if truth is None else truth)


# ------------------------------------------------------------------------------------------------
# The patient and the source


def moved(exam: Exam, shift_mm=(0.0, 0.0, 0.0), degrees: float = 0.0, axis: str = "z") -> torch.Tensor:
    """The patient moved in the cube: turned by ``degrees`` about an axis through its centre, then shifted (z, y, x).

    axis: z turns, x leans forwards, y leans to the side. What comes from outside the cube is air.
    """
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = {
        "z": [[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]],
        "y": [[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]],
        "x": [[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]],
    }[axis]  # of (x, y, z), as affine_grid orders them
    back = torch.tensor(turn).T
    shift = torch.tensor(shift_mm[::-1]) * (2 / exam.geometry.fov_mm)
    theta = torch.cat([back, -(back @ shift)[:, None]], dim=1)[None]
    grid = F.affine_grid(theta, list(exam.volume.shape), align_corners=False)
    return F.grid_sample(exam.volume - exam.air, grid, align_corners=False) + exam.air


def patient_moved(exam: Exam, **movement) -> Shown:
    """The patient stands elsewhere; the truth moves along."""
    volume = moved(exam, **movement)
    return exam.show(exam.render(volume), volume)


def view_angle(exam: Exam, degrees: float) -> Shown:
    """The lateral view is taken ``degrees`` off the right angle: the patient turned on between the two exposures."""
    xrays = exam.nominal.clone()
    xrays[:, 1] = exam.render(moved(exam, degrees=degrees))[:, 1]
    return exam.show(xrays)


def source_distance(exam: Exam, factor: float) -> Shown:
    """The source is ``factor`` times as far from the detector; detector and patient stay, and nobody noted it."""
    geometry = exam.geometry
    assert geometry.sdd_mm is not None
    assert geometry.sid_mm is not None
    distances = {"sdd_mm": factor * geometry.sdd_mm, "sid_mm": geometry.sid_mm + (factor - 1) * geometry.sdd_mm}
    return exam.show(exam.render(exam.volume, replace(geometry, **distances)))


# ------------------------------------------------------------------------------------------------
# The detector


def exposure(exam: Exam, factor: float) -> Shown:
    """``factor`` times the photons that the scale was set for: -log(intensity) is lower by log(factor)."""
    return exam.show(exam.nominal - math.log(factor) / exam.acquisition.xray_scale)


def detector(exam: Exam, **changes) -> Shown:
    """The simulated detector (:meth:`FilmChain.detected`) with one of its settings not perfect."""
    chain = FilmChain(replace(PERFECT, **changes), exam.acquisition)
    integrals = exam.nominal * exam.acquisition.xray_scale
    everywhere = torch.ones_like(integrals, dtype=torch.bool)
    pixel_mm = chain.field_mm / exam.xray_size
    signal = chain.detected(integrals, everywhere, pixel_mm, SampleRandom([exam.seed], integrals.device))
    return exam.show(signal / exam.acquisition.xray_scale)


def cut_off(exam: Exam, rows: tuple[float, float] = (0.0, 0.0)) -> Shown:
    """Shares of both pictures that are missing above and below; a system that knows what is seen is told."""
    size = exam.xray_size
    seen = torch.ones_like(exam.nominal)
    seen[..., : round(rows[0] * size), :] = 0
    seen[..., size - round(rows[1] * size) :, :] = 0
    return exam.show(torch.where(seen > 0, exam.nominal, AIR), seen=seen)


# ------------------------------------------------------------------------------------------------
# What else is in the beam


def couch_removed(exam: Exam) -> Shown:
    """All but the patient is air, in the X-rays and in the truth."""
    volume = torch.where(exam.patient, exam.volume, exam.air)
    return exam.show(exam.render(volume), volume)


def board(exam: Exam) -> Shown:
    """A foam board behind the back, over the whole height, in the X-rays and in the truth."""
    rows = exam.patient[0, 0].any(dim=0).any(dim=1).nonzero()
    back = int(rows.max()) + 1 if len(rows) else exam.volume.shape[3]
    start, end = (back + round(depth / exam.spacing_mm) for depth in (PAD_GAP_MM, PAD_GAP_MM + PAD_MM))
    half, middle = round(PAD_HALF_MM / exam.spacing_mm), exam.volume.shape[4] // 2
    value = float(hu_to_unit(torch.tensor(PAD_HU), exam.acquisition.hu_window))
    volume = exam.volume.clone()
    part = volume[:, :, :, start:end, max(0, middle - half) : middle + half]
    part.clamp_(min=value)
    return exam.show(exam.render(volume), volume)


def arms_down(exam: Exam) -> Shown:
    """Both upper arms hang in the lateral beam, beside the cube: vertical cylinders with a humerus, ray by ray."""
    geometry, size = exam.geometry, exam.xray_size
    u = ((torch.arange(size) + 0.5) / size - 0.5) * geometry.detector_mm
    path = torch.zeros(size)
    for x in (-ARM_AT_MM, ARM_AT_MM):
        across = u / geometry.magnification(1, x)
        for radius, attenuation in ((ARM_MM, 1.0), (HUMERUS_MM, HUMERUS - 1.0)):
            path += attenuation * 2 * (radius**2 - across**2).clamp_min(0).sqrt()
    xrays = exam.nominal.clone()
    xrays[:, 1] += MU_WATER * path / exam.acquisition.xray_scale
    return exam.show(xrays)


# ------------------------------------------------------------------------------------------------
# The list


@dataclass(frozen=True)
class Perturbation:
    """Variants that count as one: a patient's score is their mean. needs: of a geometry, ``"distance"`` or nothing."""

    variants: tuple[Callable[[Exam], Shown], ...]
    needs: str = ""

    def possible(self, geometry: Geometry) -> bool:
        return self.needs != "distance" or geometry.kind == "cone"


def _list() -> dict[str, Perturbation]:
    both = (-1, 1)
    found = {}
    for d in (1, 2, 5):
        found[f"view angle off by {d} degrees"] = Perturbation(tuple(partial(view_angle, degrees=s * d) for s in both))
    for mm in (5.0, 10.0, 20.0):
        shifts = [(mm, 0.0, 0.0), (-mm, 0.0, 0.0), (0.0, mm, 0.0), (0.0, 0.0, mm)]
        found[f"patient shifted by {mm:g} mm"] = Perturbation(tuple(partial(patient_moved, shift_mm=s) for s in shifts))
    for d in (2.0, 5.0, 10.0):
        turns = tuple(partial(patient_moved, degrees=d, axis=axis) for axis in "zyx")
        found[f"patient rotated by {d:g} degrees"] = Perturbation(turns)
    distances = tuple(partial(source_distance, factor=f) for f in (0.9, 1.1))
    found["source distance off by 10 %"] = Perturbation(distances, "distance")
    for f in (1.1, 1.5, 2.0):
        exposures = tuple(partial(exposure, factor=k) for k in (1 / f, f))
        found[f"exposure off by a factor of {f:g}"] = Perturbation(exposures)
    for photons in (1e5, 1e4, 1e3):
        noise = partial(detector, photons_per_mm2=[photons, photons])
        found[f"noise: {photons:g} photons per mm^2 behind air"] = Perturbation((noise,))
    for share in (0.01, 0.05):
        scatter = partial(detector, scatter=[share, share], scatter_mm=[40.0, 40.0])
        found[f"scatter over primary behind lung {share:g}"] = Perturbation((scatter,))
    found["beam hardening 0.2"] = Perturbation((partial(detector, hardening=[0.2, 0.2]),))
    found["without couch"] = Perturbation((couch_removed,))
    found["board behind the back"] = Perturbation((board,))
    for percent in (10, 20):
        found[f"upper {percent} % cut off"] = Perturbation((partial(cut_off, rows=(percent / 100, 0.0)),))
        found[f"lower {percent} % cut off"] = Perturbation((partial(cut_off, rows=(0.0, percent / 100)),))
    found["arms in the lateral beam"] = Perturbation((arms_down,), "distance")
    return found


PERTURBATIONS = _list()
