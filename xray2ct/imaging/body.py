"""Segment the patient in a CT: body without couch, lungs, and the centre of the cube."""

from __future__ import annotations

import numpy as np
import scipy

from xray2ct.conventions import AIR_HU
from xray2ct.files import InputError
from xray2ct.geometry.projector import FOV_MM
from xray2ct.imaging.cube import area_average, resample
from xray2ct.imaging.read_ct import CtImage

COARSE_MM = 4.0  # grid on which the body and the lungs are located
MIN_BODY_LITRES = 0.5  # an infant's chest has about 1; far less means a wrong unit of length
MIN_LUNG_MM3 = 100e3  # below this, air inside the body is bowel gas
IN_PLANE = np.array([np.zeros((3, 3)), [[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.zeros((3, 3))])  # neighbours per slice


def locate_cube(ct: CtImage, fov_mm: float = FOV_MM) -> tuple[float, float, float]:
    """Centre (x, y, z RAS mm) of the cube for one CT.

    Along the axis of the body: the centre of the scan when its whole height fits into ``fov_mm``; else
    the middle of the lungs (large regions of -960 to -400 HU inside the body), moved no further than
    needed for the cube to stay within the scan; without lungs the centre of the scan.
    In-plane: the median over the slices of the cube of the centre of the trunk's bounding box; the trunk
    is the deep part of the body (:func:`body_mask`, without couch), which leaves out an arm at one side.
    Raises InputError when there is no body.
    """
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in ct.data.shape], indexing="ij")).reshape(3, -1)
    world = ct.affine[:3, :3] @ corners + ct.affine[:3, 3:]
    low, high = world.min(axis=1), world.max(axis=1)
    shape = tuple(int(n) for n in np.ceil((high - low) / COARSE_MM).astype(int)[::-1])
    to_world = np.zeros((4, 4))  # (d, h, w) runs from the superior, anterior, right corner
    to_world[[2, 1, 0], [0, 1, 2]] = -COARSE_MM
    to_world[:3, 3] = high - COARSE_MM / 2
    to_world[3, 3] = 1.0
    hu, _ = resample(ct, to_world, shape)
    body = body_mask(hu, COARSE_MM)
    litres = np.count_nonzero(body) * COARSE_MM**3 / 1e6
    if litres < MIN_BODY_LITRES:
        raise InputError(
            f"{ct.name}: no body found (largest region above -300 HU: {litres:.2f} litres; expected at least"
            f" {MIN_BODY_LITRES}); is the spacing in mm, are the values in HU?"
        )

    z = (low[2] + high[2]) / 2
    if high[2] - low[2] > fov_mm:
        lungs = _lung_rows(hu, body)
        if lungs is not None:
            middle = high[2] - COARSE_MM * (lungs[0] + lungs[1] + 1) / 2
            z = float(np.clip(middle, low[2] + fov_mm / 2, high[2] - fov_mm / 2))
    depth_mm = high[2] - COARSE_MM * (np.arange(shape[0]) + 0.5)
    near = body[np.abs(depth_mm - z) <= fov_mm / 2]
    trunk = _trunk(near if near.any() else body)
    y = high[1] - COARSE_MM * _middle(trunk.any(axis=2))
    x = high[0] - COARSE_MM * _middle(trunk.any(axis=1))
    return float(x), float(y), float(z)


def _trunk(body):
    """The deep part of the body in each slice: an arm at one side, thinner than the trunk, drops out."""
    trunk = np.zeros_like(body)
    for d, slab in enumerate(body):
        if slab.any():
            depth = scipy.ndimage.distance_transform_edt(np.pad(slab, 1))[1:-1, 1:-1]
            trunk[d] = depth > 0.6 * depth.max()
    return trunk


def _middle(profiles):
    """Middle of the occupied range of each row of ``(rows, n)`` bool, in voxels: the median over rows that hold any."""
    profiles = profiles[profiles.any(axis=1)]
    first = profiles.argmax(axis=1)
    last = profiles.shape[1] - 1 - profiles[:, ::-1].argmax(axis=1)
    return float(np.median((first + last + 1) / 2))


def _lung_rows(hu, body):
    """First and last row (coarse voxels) of the lungs, or None."""
    air = scipy.ndimage.binary_opening((hu > -960) & (hu < -400) & body)
    labels, count = scipy.ndimage.label(air)
    sizes = np.bincount(labels.ravel())[1:]
    if not count or sizes.max() * COARSE_MM**3 < MIN_LUNG_MM3:
        return None
    lungs = np.isin(labels, 1 + np.flatnonzero(sizes >= 0.2 * sizes.max()))
    cumulative = np.cumsum(lungs.sum(axis=(1, 2))) / lungs.sum()
    return int(np.searchsorted(cumulative, 0.005)), int(np.searchsorted(cumulative, 0.995))


def body_mask(hu: np.ndarray, spacing_mm: float) -> np.ndarray:
    """The patient without couch, ``(D, H, W)`` bool, from HU ``(D, H, W)`` with cubic voxels.

    Tissue (above -300 HU) is opened by 4 mm per axial slice (thin couch shells vanish) and its largest 3D
    component taken; lungs and what else it encloses are added, with the chest wall the opening cost; per
    slice closed by 10 mm, holes filled, opened by 10 mm (cuts what barely touches the body); of this the
    largest 3D component again.
    """
    thin, thick = 4 / spacing_mm, 10 / spacing_mm
    tissue = hu > -300
    body = _largest(_dilate(_erode(tissue, thin), thin))
    cavities = _cavities(tissue, _dilate(body, thin))
    body |= cavities | (tissue & _dilate(cavities, thin + thick))
    body = _fill_holes(_erode(_dilate(body, thick), thick))
    return _largest(_dilate(_erode(body, thick), thick))


def _cavities(tissue, body):
    """Holes of the tissue of a slice with at least 60 % of their rim in the body: lungs, not a hollow couch."""
    labels, count = scipy.ndimage.label(_fill_holes(tissue) & ~tissue, structure=IN_PLANE)
    grown = scipy.ndimage.grey_dilation(labels, size=(1, 3, 3))
    rim = (grown > 0) & (labels == 0)
    length = np.bincount(grown[rim], minlength=count + 1)
    shared = np.bincount(grown[rim], weights=body[rim], minlength=count + 1)
    accepted = shared >= 0.6 * length
    accepted[0] = False
    return accepted[labels]


def _largest(mask):
    """The largest 3D component of ``mask``; empty when that is."""
    labels, count = scipy.ndimage.label(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else mask


def _disc(radius):
    reach = int(radius)
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    return (y * y + x * x <= radius * radius)[None]


def _erode(mask, radius):
    return scipy.ndimage.binary_erosion(mask, _disc(radius), border_value=1)  # a body cut by the border ends there


def _dilate(mask, radius):
    return scipy.ndimage.binary_dilation(mask, _disc(radius))


def _fill_holes(mask):
    return scipy.ndimage.binary_fill_holes(mask, structure=IN_PLANE)


def remove_couch(hu: np.ndarray, spacing_mm: float | None = None) -> np.ndarray:
    """Set everything but the patient (:func:`patient_mask`) to air (-1024). HU ``(D, H, W)``, same dtype out."""
    return np.where(patient_mask(hu, spacing_mm), hu, np.asarray(AIR_HU, dtype=hu.dtype))


def patient_mask(hu: np.ndarray, spacing_mm: float | None = None) -> np.ndarray:
    """The patient without couch, blankets and tubes, ``(D, H, W)`` bool, from HU of that shape.

    spacing_mm: edge of the cubic voxels (default: those of a cube of the standard field of view). The
    body is :func:`body_mask` at about 2.8 mm, grown by 3 mm to keep the skin; arms stay while connected.
    """
    spacing_mm = FOV_MM / hu.shape[0] if spacing_mm is None else spacing_mm
    factor = max(1, round(2.8 / spacing_mm))
    if any(n % factor for n in hu.shape):
        factor = 1
    body = body_mask(area_average(hu, factor), spacing_mm * factor)
    body = _dilate(body, 3 / (spacing_mm * factor))
    for axis in range(3):
        body = body.repeat(factor, axis=axis)
    return body
