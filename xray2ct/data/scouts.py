"""Scouts of a patient's CT session, placed in the patient cube and checked against the CT that they show.

A scout is a fan beam across the patient and parallel along z, around the scanner's isocentre. The data set's views are
centred on the patient cube instead. What lies in the plane of the cube's centre gets its exact place; what lies before
or behind it keeps the scanner's magnification, which differs where the two centres do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import scipy
import torch

from xray2ct.conventions import VIEW_LABELS
from xray2ct.data.checks.xray_comparison import CONTROL_DEGREES, CONTROL_MM, ncc
from xray2ct.files import InputError
from xray2ct.geometry.projector import SOURCE_SIDES, Geometry, hat_weights, hu_to_mu
from xray2ct.imaging.cube import area_average
from xray2ct.imaging.read_scout import Scout, read_scout

SID_MM, SDD_MM = 570.0, 1040.0  # where a header has none: the middle of common scanners (541 to 606, 949 to 1085)
MIN_NCC = 0.85  # a real scout (sharpened by its scanner) and its CT were seen at 0.95, the control at 0.86
MIN_ROWS_MM = 100.0  # of overlap between scout and CT
OPTIONS = {"behind": "--frontal pa", "in front": "--frontal ap"}  # of prepare_data.py
OPTIONS |= {"on the right": "--lateral left", "on the left": "--lateral right"}


class Cube(NamedTuple):
    """Attenuation ``mu`` (D, H, W) in 1/mm of the patient cube, where it was scanned, and its place.

    scanned: (D,) bool, axial planes that the scan covers. centre_lps: mm.
    """

    mu: torch.Tensor
    scanned: np.ndarray
    fov_mm: float
    centre_lps: tuple[float, float, float]

    @classmethod
    def of(cls, hu: np.ndarray, mask: np.ndarray, fov_mm: float, centre_ras) -> Cube:
        """From HU and scan mask ``(D, H, W)`` and the centre in RAS mm, as prepare_data.py has them; at most 128^3."""
        right, anterior, superior = centre_ras
        factor = hu.shape[0] // 128 if hu.shape[0] % 128 == 0 else 1
        hu, mask = area_average(hu, factor), area_average(mask, factor) >= 0.5
        scanned = mask.any(axis=(1, 2))
        return cls(torch.from_numpy(hu_to_mu(hu.astype(np.float32))), scanned, fov_mm, (-right, -anterior, superior))


@dataclass(frozen=True)
class Placed:
    """A scout that shows its CT. ncc, control: correlation with the CT rendered in the scout's geometry over the rows
    that the CT covers, and of a rendering shifted by 5 mm and turned by 5 degrees."""

    view: int
    pixels: np.ndarray  # (n, n), line integral / XRAY_SCALE, 0 to 1
    source: str  # where the tube stood
    sid_mm: float
    sdd_mm: float
    isocentre_mm: float  # depth of the isocentre against the cube's centre, towards the back or left
    ncc: float
    control: float

    def record(self) -> dict:
        """Its entry in the manifest."""
        entry = {key: value for key, value in asdict(self).items() if key not in ("pixels", "view")}
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()}


def place_scouts(
    paths: Sequence, cube: Cube, geometry: Geometry, xray_scale: float, size: int, frame: str = ""
) -> tuple[dict[int, Placed], list[str]]:
    """``({view: Placed}, sentences about those left out)`` of a patient's scout files.

    frame: Frame of Reference UID of the CT, "" when unknown: then the comparison alone decides. Of several that fit a
    view the one with the highest correlation is taken.
    """
    placed: dict[int, Placed] = {}
    notes = []
    for path in paths:
        try:
            scout = read_scout(path)
            found = place_scout(scout, cube, geometry, xray_scale, size, frame)
        except InputError as error:
            notes.append(f"{error}; left out")
            continue
        other = placed.get(found.view)
        if other is None or found.ncc > other.ncc:
            placed[found.view] = found
        if other is not None:
            notes.append(
                f"{path}: one of several {VIEW_LABELS[found.view]} scouts; the one that fits the CT best is used"
            )
    return placed, notes


def place_scout(scout: Scout, cube: Cube, geometry: Geometry, xray_scale: float, size: int, frame: str = "") -> Placed:
    """One scout as a view of the data set: ``size`` pixels per edge of the picture that ``geometry`` sees.

    geometry: of kind ``"scout"``. The scanner's pixel values have no stated unit: gain and offset are fitted to the CT,
    by least squares. Headers do not tell on which side the source stood, and not always where the isocentre lies: the
    CT does, by the magnification. Raises :class:`InputError` naming the file: another frame of reference, no overlap,
    no resemblance, a source on the other side than the data set's.
    """
    if frame and scout.frame and frame != scout.frame:
        raise InputError(
            f"{scout.path}: has another Frame of Reference UID than the CT; expected a scout of its session"
        )
    fit = _best_fit(scout, cube)
    if fit.ncc < MIN_NCC or fit.ncc <= fit.control:
        raise InputError(
            f"{scout.path}: does not show the CT: correlation {fit.ncc:.3f}, and {fit.control:.3f} when shifted by"
            f" {CONTROL_MM:g} mm and turned by {CONTROL_DEGREES:g} degrees; expected at least {MIN_NCC}, and more than"
            " that"
        )
    source, wanted = SOURCE_SIDES[scout.view][fit.side], geometry.source_sides[scout.view]
    if source != wanted:
        raise InputError(
            f"{scout.path}: its source stood {source}; expected {wanted}, as the data set's geometry says"
            f" (prepare_data.py {OPTIONS[source]})"
        )
    line_integrals = fit.gain * scout.pixels + fit.offset
    pixels = _resampled(line_integrals, scout, cube, geometry, fit, size)
    pixels = (pixels / xray_scale).clip(0.0, 1.0).astype(np.float32)
    sdd = scout.sdd_mm or SDD_MM
    return Placed(scout.view, pixels, source, fit.sid_mm, sdd, fit.isocentre_mm, fit.ncc, fit.control)


class Fit(NamedTuple):
    """The geometry that explains a scout best, the agreement there, and the line what pixel values mean."""

    side: int  # index into SOURCE_SIDES
    sid_mm: float
    isocentre_mm: float
    ncc: float
    control: float
    gain: float
    offset: float


def _best_fit(scout: Scout, cube: Cube) -> Fit:
    across, depth = (0, 1) if scout.view == 0 else (1, 0)
    centre, rows, sid = cube.centre_lps, _covered(scout, cube), scout.sid_mm or SID_MM
    # The columns that the cube covers: beyond them there is air that would flatter the correlation.
    columns = np.flatnonzero(np.abs(scout.across_mm - centre[across]) < cube.fov_mm / 2)
    if len(columns) < 2:
        raise InputError(f"{scout.path}: lies {'beside' if scout.view == 0 else 'before or behind'} the CT")
    measured = scout.pixels[rows][:, columns]
    best = None
    for side, plane in product((0, 1), sorted({0.0, scout.depth_mm})):
        isocentre = plane - centre[depth]
        if abs(isocentre) + cube.fov_mm / 2 >= sid:
            continue
        z_mm, u_mm = centre[2] - scout.z_mm[rows], scout.across_mm[columns]
        rendered = fan_beam(cube, scout.view, sid, isocentre, -centre[across], side, z_mm, u_mm).numpy()
        ncc = _ncc(measured, rendered)
        if best is None or abs(ncc) > abs(best[0]) + 1e-4:
            best = ncc, side, isocentre, rendered
    if best is None:
        raise InputError(f"{scout.path}: the source would stand inside the patient at {sid:g} mm from the isocentre")
    ncc, side, isocentre, rendered = best
    control = abs(_ncc(measured, _misplaced(rendered, scout)))
    return Fit(side, sid, isocentre, abs(ncc), control, *_line(measured, rendered))


def fan_beam(cube: Cube, view, sid_mm, isocentre_mm, across_mm, side, z_mm, u_mm) -> torch.Tensor:
    """Line integrals of a cube in a scout's own geometry, ``(rows, columns)``, by Joseph's method.

    isocentre_mm, across_mm: of the scanner's isocentre against the cube's centre, towards depth and across. side: index
    of the source's side in ``SOURCE_SIDES[view]``. z_mm: of the rows against the cube's centre, towards the feet.
    u_mm: of the columns against the isocentre, in its plane.
    """
    slabs = cube.mu.permute(1, 0, 2) if view == 0 else cube.mu.permute(2, 0, 1)  # depth, D, across
    count, depth, columns = slabs.shape
    planes = ((torch.arange(count) + 0.5) / count - 0.5) * cube.fov_mm - isocentre_mm
    # Towards the detector: forwards (-y) from behind, to the left (+x) from the right; else the other way.
    towards = planes if (view == 1) == (side == 0) else -planes
    u = torch.as_tensor(np.ascontiguousarray(u_mm), dtype=torch.float32)
    rows = hat_weights(torch.as_tensor(np.ascontiguousarray(z_mm), dtype=torch.float32), cube.fov_mm, depth)
    image = torch.zeros(depth, len(u))
    for slab, distance in zip(slabs, towards):
        at = u * (sid_mm + distance) / sid_mm + across_mm
        image += slab @ hat_weights(at, cube.fov_mm, columns).T
    length = cube.fov_mm / count * torch.sqrt(1.0 + (u / sid_mm) ** 2)
    return (rows @ image) * length


def _covered(scout: Scout, cube: Cube) -> np.ndarray:
    """Rows of the scout at heights that the CT covers."""
    planes = (np.arange(len(cube.scanned)) + 0.5) / len(cube.scanned) * cube.fov_mm - cube.fov_mm / 2
    z = cube.centre_lps[2] - planes[cube.scanned]
    rows = np.flatnonzero((scout.z_mm >= z.min()) & (scout.z_mm <= z.max()) & np.isfinite(scout.pixels).any(axis=1))
    height = abs(scout.z_mm[1] - scout.z_mm[0]) * len(rows)
    if height < MIN_ROWS_MM:
        raise InputError(
            f"{scout.path}: shows {height:.0f} mm of the CT's height; expected at least {MIN_ROWS_MM:g} (another table"
            " position, or another part of the patient)"
        )
    return rows


def _ncc(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation over pixels that both have, signed: a scout may have bone dark."""
    known = np.isfinite(one) & np.isfinite(other)
    return ncc(one[known], other[known])


def _line(measured: np.ndarray, rendered: np.ndarray) -> tuple[float, float]:
    """Gain and offset that take measured values to line integrals."""
    known = np.isfinite(measured)
    gain, offset = np.polyfit(measured[known].astype(np.float64), rendered[known].astype(np.float64), 1)
    return float(gain), float(offset)


def _misplaced(image: np.ndarray, scout: Scout) -> np.ndarray:
    """The control: shifted by 5 mm along both axes and turned by 5 degrees about its middle; NaN outside."""
    steps = np.array([abs(scout.z_mm[1] - scout.z_mm[0]), abs(scout.across_mm[1] - scout.across_mm[0])])
    angle = np.deg2rad(CONTROL_DEGREES)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn * steps[None, :] / steps[:, None]  # turned in mm, not in pixels
    middle = (np.array(image.shape) - 1) / 2
    offset = middle - matrix @ middle + CONTROL_MM / steps
    return scipy.ndimage.affine_transform(image, matrix, offset, order=1, cval=np.nan)


def _resampled(values, scout: Scout, cube: Cube, geometry: Geometry, fit: Fit, size: int) -> np.ndarray:
    """The scout at the pixels of the data set's view; air beyond its edges."""
    across = 0 if scout.view == 0 else 1
    # The cube's centre, from the isocentre towards the detector.
    towards = -fit.isocentre_mm if (scout.view == 1) == (fit.side == 0) else fit.isocentre_mm
    places = ((np.arange(size) + 0.5) / size - 0.5) * geometry.detector_mm  # in the plane of the cube's centre
    u_mm = (places + cube.centre_lps[across]) * fit.sid_mm / (fit.sid_mm + towards)
    z_mm = cube.centre_lps[2] - places
    steps = scout.z_mm[1] - scout.z_mm[0], scout.across_mm[1] - scout.across_mm[0]
    row, column = (z_mm - scout.z_mm[0]) / steps[0], (u_mm - scout.across_mm[0]) / steps[1]
    values = np.where(np.isfinite(values), values, 0.0)
    # Averaged over a pixel of the result before it is sampled: scouts are finer than small X-rays.
    values = scipy.ndimage.uniform_filter(values, [max(1, round((places[1] - places[0]) / abs(s))) for s in steps])
    return scipy.ndimage.map_coordinates(values, np.meshgrid(row, column, indexing="ij"), order=1, cval=0.0)
