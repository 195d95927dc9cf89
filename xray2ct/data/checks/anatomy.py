"""Orientation of a chest CT, determined from its lungs, spine, heart and liver alone.

Thresholds were set on 25 public chest CTs of eleven collections (supine, with couch, with and without contrast agent,
masses and effusions) and on phantoms; the comments give the ranges seen there. Anatomy may be odd: where a measure is
not clear the answer is "cannot tell".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy

from xray2ct.data.checks.findings import FAILED, OK, SIDES, UNKNOWN
from xray2ct.imaging.body import body_mask


@dataclass
class Organs:
    """What the measures need, arrays (D, H, W).

    depth_mm: how deep a voxel lies in soft tissue (20 to 200 HU): large in the liver, the spleen and the heart,
    small in muscles. first, last: rows of the lungs. mm: edge of a voxel.
    """

    hu: np.ndarray
    body: np.ndarray
    lungs: np.ndarray
    depth_mm: np.ndarray
    first: int
    last: int
    mm: float


def orientation(hu: np.ndarray, spacing_mm: float, body: np.ndarray | None = None) -> dict[str, tuple[str, str]]:
    """Orientation of a chest from its anatomy alone: ``{"head-feet": (status, message), "front-back": ..., ...}``.

    hu: (D, H, W) with cubic voxels of ``spacing_mm`` (about 5). body: :func:`body.body_mask` of it. Several
    measures vote per direction; where none is clear or they contradict each other the status is "cannot tell".
    """
    organs = _find_organs(hu, spacing_mm, body_mask(hu, spacing_mm) if body is None else body)
    if organs is None:
        return dict.fromkeys(SIDES, (UNKNOWN, "no lungs found"))
    axis = _spine_axis(organs)
    if axis:
        text = f"turned by 90 degrees: the spine runs along {axis}, not from head to feet"
        return {"head-feet": (FAILED, text), **dict.fromkeys(SIDES[1:], (UNKNOWN, "turned by 90 degrees"))}
    answers = {"head-feet": _verdict(_apex_vote(organs), _liver_below_vote(organs))}
    if answers["head-feet"][0] == FAILED:
        organs = _turned_upright(organs)  # so that the other two are measured on upright organs
    spine = _spine(organs)
    answers["front-back"] = _verdict(_spine_vote(organs, spine))
    # A mass, a collapsed lung or an effusion can push the heart to the other side: alone it is no proof.
    heart, liver = _heart_vote(organs, spine), _liver_side_vote(organs, spine)
    answers["left-right"] = _verdict(liver, heart if heart[0] > 0 or liver[0] < 0 else (0, heart[1]))
    return _name_combination(answers)


def _verdict(*votes) -> tuple[str, str]:
    """votes: (1 right way, -1 wrong way, 0 unclear; words)."""
    signs, text = {sign for sign, _ in votes} - {0}, "; ".join(words for _, words in votes)
    if signs == {1}:
        return OK, text
    return (FAILED if signs == {-1} else UNKNOWN), text


def _name_combination(answers):
    wrong = tuple(side for side in SIDES if answers[side][0] == FAILED)
    names: dict[tuple[str, ...], str] = {
        ("head-feet",): "upside down (mirrored head to feet)",
        ("front-back",): "mirrored front to back",
        ("left-right",): "mirrored left-right (or situs inversus)",
        ("head-feet", "front-back"): "upside down: turned by 180 degrees about the left-right axis",
        ("head-feet", "left-right"): "upside down: turned by 180 degrees about the front-back axis",
        ("front-back", "left-right"): "turned by 180 degrees about the head-feet axis",
        SIDES: "mirrored along all three axes",
    }
    return {
        side: (status, f"{names[wrong]}: {text}" if status == FAILED else text)
        for side, (status, text) in answers.items()
    }


def _find_organs(hu, mm, body) -> Organs | None:
    air = scipy.ndimage.binary_opening((hu > -970) & (hu < -400) & body)
    labels, count = scipy.ndimage.label(air)
    if not count:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    lungs = np.isin(labels, 1 + np.flatnonzero(sizes >= 0.2 * sizes.max()))
    cumulative = np.cumsum(lungs.sum(axis=(1, 2))) / lungs.sum()
    first, last = (int(np.searchsorted(cumulative, share)) for share in (0.005, 0.995))
    if lungs.sum() * mm**3 < 0.4e6 or (last - first) * mm < 60:  # 0.4 litres; seen: 2.1 at least
        return None
    # Tissue goes on above and below the scan.
    tissue = np.pad((hu > 20) & (hu < 200) & body, ((1, 1), (0, 0), (0, 0)), mode="edge")
    return Organs(hu, body, lungs, scipy.ndimage.distance_transform_edt(tissue)[1:-1] * mm, first, last, mm)


def _turned_upright(organs) -> Organs:
    rows = organs.hu.shape[0]
    turned = (a[::-1].copy() for a in (organs.hu, organs.body, organs.lungs, organs.depth_mm))
    return Organs(*turned, rows - 1 - organs.last, rows - 1 - organs.first, organs.mm)


def _bone_columns(organs, axis) -> np.ndarray:
    """How bony each line along ``axis`` is nearly everywhere: 20th percentile, in-plane mean over 40 mm.

    A spine runs through the whole scan (40 mm allow for its curves); sternum, contrast-filled heart and arms do not.
    """
    bone = np.moveaxis(np.clip((organs.hu - 120) / 180, 0, 1) * organs.body, axis, 0)
    bone = bone[np.moveaxis(organs.body, axis, 0).any(axis=(1, 2))]
    reach = max(1, round(40 / organs.mm))
    return np.percentile(scipy.ndimage.uniform_filter(bone, (1, reach, reach)), 20, axis=0)


def _spine_axis(organs) -> str | None:
    down, across = _bone_columns(organs, 0).max(), [_bone_columns(organs, axis).max() for axis in (1, 2)]
    if max(across) < max(0.15, 3 * down):  # seen: 1.7 times at most, 0.12 at most
        return None
    return ("the front-back axis", "the left-right axis")[int(np.argmax(across))]


def _spine(organs) -> tuple[int, int] | None:
    """(h, w) of the spine, looked for around the lungs; None where nothing is bony enough."""
    columns, footprint = _bone_columns(organs, 0), organs.lungs.any(axis=0)
    reach = round(40 / organs.mm)
    near = np.zeros_like(footprint)
    h, w = (np.flatnonzero(footprint.any(axis=axis)) for axis in (1, 0))
    near[max(0, h[0] - reach) : h[-1] + reach + 1, max(0, w[0] - reach) : w[-1] + reach + 1] = True
    columns = columns * near
    if columns.max() < 0.02:  # seen: 0.031 at least
        return None
    h, w = np.unravel_index(columns.argmax(), columns.shape)
    return int(h), int(w)


def _spine_vote(organs, spine):
    """Behind the centre of the lungs (seen: 19 to 73 mm, 14 mm to a side at most)."""
    if spine is None:
        return 0, "no spine found"
    footprint = organs.lungs.sum(axis=0)
    h, w = scipy.ndimage.center_of_mass(footprint)
    back, side = (spine[0] - h) * organs.mm, (spine[1] - w) * organs.mm
    if abs(side) > max(30, 1.5 * abs(back)):
        return -1, f"spine {abs(side):.0f} mm at the {'left' if side > 0 else 'right'}: turned by 90 degrees"
    if abs(back) < 12:
        return 0, "spine neither in front of nor behind the lungs' centre"
    return (1 if back > 0 else -1), f"spine {abs(back):.0f} mm {'behind' if back > 0 else 'in front of'} the lungs"


def _apex_vote(organs):
    """Lungs end in a dome above and in a hollow below (the diaphragm).

    The rim of the upper face lies below its middle (seen: 39 to 89 mm), that of the lower face hardly above it
    (2 to 31 mm). Lungs cut off by the scan have flat faces and decide nothing.
    """
    footprint = organs.lungs.any(axis=0)
    depth = scipy.ndimage.distance_transform_edt(footprint) * organs.mm
    inner, rim = depth > 25, footprint & (depth < 12)
    if not inner.any() or not rim.any():
        return 0, "lungs too thin to see their apex"
    top = organs.lungs.argmax(axis=0)
    bottom = organs.lungs.shape[0] - 1 - organs.lungs[::-1].argmax(axis=0)
    above = (top[rim].mean() - top[inner].mean()) * organs.mm
    below = (bottom[inner].mean() - bottom[rim].mean()) * organs.mm
    text = f"lungs taper by {above:.0f} mm upwards and {below:.0f} mm downwards"
    if above > 30 and above > 1.5 * below:
        return 1, text
    return (-1 if below > 30 and below > 1.5 * above else 0), text


def _liver_below_vote(organs):
    """The largest solid region is the liver, 0.32 to 0.68 of the lungs' height below their middle where seen."""
    labels, count = scipy.ndimage.label(organs.depth_mm > 22)
    sizes = np.bincount(labels.ravel())[1:] * organs.mm**3 / 1e3
    if not count or sizes.max() < 40:  # cm3
        return 0, "no liver in the scan"
    rows = np.nonzero(labels == 1 + sizes.argmax())[0]
    place = (rows.mean() - (organs.first + organs.last) / 2) / (organs.last - organs.first + 1)
    if abs(place) < 0.25:
        return 0, "largest solid region between the lungs"
    return (1 if place > 0 else -1), f"liver {'below' if place > 0 else 'above'} the lungs' middle"


def _liver_side_vote(organs, spine):
    """Solid tissue at the lungs' base and below lies mostly right of the spine (seen: 68 % at least)."""
    if spine is None:
        return 0, "no midline"
    start = organs.first + round(0.8 * (organs.last - organs.first + 1))
    solid, gap = organs.depth_mm[start:] > 17, round(25 / organs.mm)  # muscles next to the spine do not count
    right = solid[:, :, : max(0, spine[1] - gap)].sum() * organs.mm**3 / 1e3
    left = solid[:, :, spine[1] + gap + 1 :].sum() * organs.mm**3 / 1e3
    if right + left < 80:  # cm3
        return 0, "no liver in the scan"
    share = right / (right + left)
    text = f"{share:.0%} of the solid abdomen lies right of the spine"
    return (1 if share > 0.62 else -1 if share < 0.38 else 0), text


def _heart_vote(organs, spine):
    """Soft tissue between the lungs in the heart's rows lies left of the midline (seen: 2 to 31 mm, twice right).

    Two midlines have to agree: spine and middle between the lungs' outer borders.
    """
    if spine is None:
        return 0, "no midline"
    lungs, height = organs.lungs, organs.last - organs.first + 1
    columns = np.flatnonzero(lungs.sum(axis=(0, 1)) > 0.05 * lungs.sum(axis=(0, 1)).max())
    between = np.logical_or.accumulate(lungs, axis=2) & np.logical_or.accumulate(lungs[:, :, ::-1], axis=2)[:, :, ::-1]
    between &= (organs.hu > -50) & organs.body
    between[:, max(0, spine[0] - round(30 / organs.mm)) :] = False
    rows = slice(organs.first + round(0.4 * height), organs.first + round(0.75 * height))
    across = between[rows].sum(axis=(0, 1))
    if across.sum() * organs.mm**3 < 100e3:
        return 0, "no heart between the lungs"
    centre = (across * np.arange(across.size)).sum() / across.sum()
    left = [(centre - middle) * organs.mm for middle in (spine[1], (columns[0] + columns[-1]) / 2)]
    text = f"heart {abs(left[0]):.0f} mm {'left' if left[0] > 0 else 'right'} of the spine"
    return (1 if min(left) > 4 else -1 if max(left) < -4 else 0), text
