"""Two X-rays (or one) -> a volume in Hounsfield units, with any loaded system: :class:`Pipeline`.

from reconstruct import load_pipeline
volume_hu, affine = load_pipeline("best_model.pt", "best_refinement.pt")("PA.png", "LATERAL.png")
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import numpy as np
import torch

from xray2ct.files import InputError
from xray2ct.geometry.projector import unit_to_hu
from xray2ct.imaging.cube import cube_affine
from xray2ct.imaging.film import check_views
from xray2ct.imaging.film_sides import FilmOptions
from xray2ct.imaging.read_films import FilmWarning, read_films
from xray2ct.imaging.stored_xray import Exposure
from xray2ct.imaging.xray_scale import OWN_LEVELS, REFERENCE_PERCENTILES
from xray2ct.inference.consistency import how_of, make_consistent, refuse_measured, steps_of
from xray2ct.inference.predictor import Predictor, check_view_count
from xray2ct.inference.sample_calibration import SampleCalibration
from xray2ct.inference.system import DirectSystem
from xray2ct.weights import DEFAULT, both_stages

XraySource = str | PathLike | np.ndarray | torch.Tensor  # a file, or an array (H, H) in [0, 1]
VIEW_ARGUMENTS = ("pa", "lateral")


@dataclass(frozen=True)
class _XraysRead:
    """What :func:`_read_xrays` found."""

    xrays: torch.Tensor  # (num_views, S, S), or with what is seen (num_views, 2, S, S)
    measured: bool  # scouts or films, no renderings of this project
    notes: list[str]  # all that was done to the pictures
    doubts: list[str]  # of these, what was decided by the pixels of films, or is uncertain


class Pipeline:
    """A loaded system that turns X-ray files or arrays into a volume; see :func:`load_pipeline`.

    consistency: of the volume with its X-rays (docs/consistency.md): auto (where validated), off, or a number of steps.

    :meth:`read` leaves ``notes`` (what was done to the pictures) and ``measured`` (whether they are scouts or films and
    no renderings of this project), :meth:`predict` ``consistency_notes``.
    """

    def __init__(self, system: Predictor, consistency: int | str = "auto"):
        self.system = system
        self.consistency_steps = steps_of(consistency, system.consistency_validated)
        self.hu_window = tuple(system.hu_window)
        self.notes: list[str] = []
        self.measured = False
        self.consistency_notes: list[str] = []

    @cached_property
    def origin(self) -> str:
        """The fingerprints of the weights, for :func:`xray2ct.imaging.write_volume.write_volume`."""
        prints = (one.weights for one in self.system.checkpoints())
        stages = [text for one in prints for text in (one.values() if isinstance(one, dict) else (one,))]
        return f"weights {'+'.join(text[:12] for text in stages)}"

    def read(
        self,
        pa: XraySource,
        lateral: XraySource | None = None,
        normalization: str = "auto",
        invert: bool = False,
        check: bool = True,
        exposure: Exposure | tuple[Exposure | None, Exposure | None] | None = None,
        films: FilmOptions | None = None,
    ) -> torch.Tensor:
        """X-ray files or arrays (H, W) in [0, 1] -> ``(num_views, S, S)`` float32 at the model's resolution.

        ``(num_views, 2, S, S)`` for a system with ``seen_channel``: of each view pixels, then what is seen (of an array
        all).
        lateral: None for a system of one view. normalization, exposure: see :func:`read_films`; an array shows what the
        model's detector sees. films: what the user decides about files, in place of ``invert`` and ``check`` (of
        swapped views). What was done to the pictures is left in ``notes``; what was decided by the pixels of films, or
        is uncertain, is warned of (:class:`FilmWarning`).
        Raises :class:`InputError` naming the file for anything unusable, for swapped views of X-rays that the project
        rendered, and for another number of views than the system's.
        """
        sources = (pa,) if lateral is None else (pa, lateral)
        check_view_count(self.system.name, self.system.num_views, len(sources))
        films = films or FilmOptions(invert=invert, check=check)
        found = _read_xrays(self.system, sources, normalization, exposure, films)
        self.notes, self.measured = [*self.system.notes, *found.notes], found.measured
        for doubt in found.doubts:
            warnings.warn(doubt, FilmWarning, stacklevel=2)
        return found.xrays

    def predict(self, xrays: torch.Tensor, measured: bool | None = None) -> torch.Tensor:
        """:meth:`read`'s X-rays -> volume ``(D, H, W)`` in [0, 1], float32 on the CPU; :class:`InputError` for NaN.

        measured: whether they are scouts or films and no renderings (None: as those read last). What projection
        consistency did is left in ``consistency_notes``.
        """
        measured = self.measured if measured is None else measured
        refuse_measured(self.system, measured)
        xrays = xrays.unsqueeze(0)
        volume = self.system.predict(xrays)
        volume, self.consistency_notes = make_consistent(self.system, volume, xrays, self.consistency_steps, measured)
        return volume[0, 0]

    def to_hu(self, volume: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """``(D, H, W)`` in [0, 1] -> HU ``(D, H, W)`` int16 and the 4 x 4 affine of the NIfTI file.

        X-rays do not say where the patient lay: the cube is centred at the world's origin, its axes
        are the patient's.
        """
        hu = np.rint(unit_to_hu(volume.numpy(), self.hu_window)).astype(np.int16)
        return hu, cube_affine((0.0, 0.0, 0.0), self.system.geometry.fov_mm, hu.shape[0])

    @cached_property
    def calibration(self) -> SampleCalibration | None:
        """Of the standard deviation of samples, where the checkpoint has one for volumes made like these."""
        return self.system.sample_calibration(how_of(self.consistency_steps))

    def std_hu(self) -> np.ndarray:
        """Standard deviation of the last prediction in HU, float32 (D, H, W), of a system that has one.

        Times the factor of ``calibration``, where there is one.
        """
        assert self.system.std is not None, "the last prediction has no standard deviation"
        low, high = self.hu_window
        factor = 1.0 if self.calibration is None else self.calibration.factor
        return (self.system.std[0, 0] * ((high - low) * factor)).numpy()

    def __call__(self, pa: XraySource, lateral: XraySource | None = None, **options) -> tuple[np.ndarray, np.ndarray]:
        """X-rays -> ``(HU int16 (D, H, W), affine)``; options as in :meth:`read`.

        :func:`xray2ct.imaging.write_volume.write_volume` writes them.
        """
        return self.to_hu(self.predict(self.read(pa, lateral, **options)))


def load_pipeline(
    base: str | PathLike = DEFAULT,
    refinement: str | PathLike | None = None,
    device: str = "auto",
    precision: str = "float32",
    tile: int | str = "auto",
    compiled: bool = False,
    consistency: int | str = "auto",
) -> Pipeline:
    """Load a stage-1 checkpoint, and a stage-2 one for 256^3: ``hu, affine = pipeline(pa, lateral)``.

    base, refinement: paths, or names of shipped weights (``"chest64"``; ``"chest64+chest256"`` for both); base also a
    baseline's. device: auto, cpu, cuda, ... precision, tile, compiled: see
    :class:`DirectSystem`. consistency: see :class:`Pipeline`. Raises :class:`InputError` naming the file when a
    checkpoint is missing, damaged, of another kind or unfit for the other.
    """
    if refinement is None:
        base, refinement = both_stages([base])
    return Pipeline(DirectSystem(base, refinement, device, precision, tile, compiled), consistency)


def _read_xrays(
    system: Predictor, sources: tuple[XraySource, ...], normalization: str, exposure, films: FilmOptions
) -> _XraysRead:
    """PA, or PA and lateral, as the system takes them; see :meth:`Pipeline.read`."""
    arrays = [isinstance(source, np.ndarray | torch.Tensor) for source in sources]
    pa, lateral = (*(None if array else source for source, array in zip(sources, arrays)), None)[:2]
    pair = read_films((pa, lateral), normalization, system.xray_size, system.geometry, exposure, films)
    notes, pixels, seen = list(pair.notes), [], []
    for view, (source, array) in enumerate(zip(sources, arrays)):
        if array:
            pixels.append(_array_view(source, view, system.xray_size))
            seen.append(np.ones_like(pixels[-1]))
            continue
        pixels.append(pair.views[view].pixels)
        seen.append(pair.views[view].seen)
        if normalization == "manifest":
            notes += [f"{source}: {note}" for note in _brightness_notes(pixels[-1], view)]
    if any(arrays) and films.check and len(sources) == 2:
        names = [name if array else str(source) for source, array, name in zip(sources, arrays, VIEW_ARGUMENTS)]
        notes += check_views(*pixels, names)
    xrays = torch.from_numpy(np.stack(pixels).astype(np.float32))
    if system.seen_channel:
        xrays = torch.stack([xrays, torch.from_numpy(np.stack(seen))], dim=1)
    stretched = normalization not in ("auto", "manifest") and not all(arrays)
    return _XraysRead(xrays, pair.films or stretched, notes, pair.doubts)


def _array_view(source, view: int, size: int) -> np.ndarray:
    array = np.asarray(source, dtype=np.float32)
    name = VIEW_ARGUMENTS[view]
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise InputError(f"{name}: array of shape {array.shape}; expected a square (H, H), padded and not stretched")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise InputError(f"{name}: array with values {array.min():g} to {array.max():g}; expected finite, in [0, 1]")
    if array.max() == array.min():
        raise InputError(f"{name}: the X-ray is constant ({array.max():g})")
    tensor = torch.from_numpy(array)[None, None]
    mode = "area" if min(array.shape) > size else "bilinear"
    return torch.nn.functional.interpolate(tensor, size=(size, size), mode=mode)[0, 0].numpy()


def _brightness_notes(pixels, view: int) -> list[str]:
    """A doubt where a picture read on the project's own scale is far darker or brighter than its X-rays.

    See :data:`xray_scale.OWN_LEVELS`.
    """
    level, usual = float(np.percentile(pixels, 99)), REFERENCE_PERCENTILES[view][1]
    if OWN_LEVELS[0] * usual < level < OWN_LEVELS[1] * usual:
        return []
    return [
        f"brightness {level:.2f} (99th percentile), {usual:.2f} is usual for X-rays rendered by this project;"
        " a picture from elsewhere needs the normalization 'auto' or 'percentile' (--xray-normalization)"
    ]
