"""What is not patient in a film's picture: uniform frames, burnt-in markers, the slanted edges of a photographed one.

All functions take pixels (H, W) of any size and scale, NaN where there is padding, and look at a decimated copy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy

WORKING_EDGE = 512  # pixels; the copy that is looked at has an edge of 512 to 1,023
FRAME_OUTLIERS = 0.03  # share of a frame's row that a caption or dust may cover
# A frame ends on one straight line: for this share of its edge, to the pixel. Backs of patients in front of air: 0.61.
STRAIGHT_SHARE = 0.7
STRAIGHT_DEGREES = 1.25  # a scanned film's frame is tilted by up to 1 degree
MARKER_SHARE = 0.01  # of the picture; a letter is smaller
SLANT_DEGREES = 2.0  # between opposite edges: a tilted film on a scanner keeps them parallel
LINE_ERROR = 0.002  # of the picture's edge, mean; edges of photographed films: 0.0008, outlines of bodies from 0.003 on


class Box(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` (the ends excluded) of a picture."""

    top: int
    bottom: int
    left: int
    right: int

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """The part of ``pixels`` (H, W) within the box: a view."""
        return pixels[self.top : self.bottom, self.left : self.right]


def decimated(pixels: np.ndarray, edge: int = WORKING_EDGE) -> tuple[np.ndarray, int]:
    """Every n-th pixel as float32, and n: the longer edge stays at ``edge`` pixels or above, below twice it."""
    step = max(1, max(pixels.shape) // edge)
    return np.array(pixels[::step, ::step], np.float32), step


# ------------------------------------------------------------------------------------------------
# Frames


def trim(pixels: np.ndarray) -> tuple[Box, list[str]]:
    """Find the picture inside uniform frames: a white page, a black page, borders, several of them nested.

    A frame's rows hold one value (3 % of their pixels may be a caption), and it ends on a straight line. Air beside a
    body is uniform too, but the body's outline is curved: it stays, since without it the patient would be neither in
    place nor at scale. What a tilted line leaves within the box stays as well; wholly padded rows (NaN) go. Returns the
    :class:`Box` that is left, and a note on what was cut, none where nothing was. Where less than a quarter of an edge
    would be left, nothing is cut.
    """
    small, step = decimated(pixels)
    rows, columns = small.shape
    span = _span(small)
    if not span:
        return Box(0, pixels.shape[0], 0, pixels.shape[1]), []
    top, bottom, left, right = 0, rows, 0, columns
    cut: dict[str, int] = {}
    while True:
        found = _frame_widths(small[top:bottom, left:right], span)
        if not any(found.values()):
            break
        top, bottom = top + found["top"], bottom - found["bottom"]
        left, right = left + found["left"], right - found["right"]
        if bottom - top < rows / 4 or right - left < columns / 4:
            return Box(0, pixels.shape[0], 0, pixels.shape[1]), []
        cut = {side: cut.get(side, 0) + width for side, width in found.items()}
    box = Box(
        min(top * step, pixels.shape[0]),
        pixels.shape[0] if bottom == rows else bottom * step,
        left * step,
        pixels.shape[1] if right == columns else right * step,
    )
    shares = {"top": rows, "bottom": rows, "left": columns, "right": columns}
    words = [f"{cut[side] / length:.0%} {side}" for side, length in shares.items() if cut.get(side, 0) >= length / 200]
    return box, [f"uniform frame cut off: {', '.join(words)}"] if words else []


def _span(small) -> float:
    """Range of the grey values without the outermost half per cent; 0 for a uniform picture."""
    values = small[np.isfinite(small)]
    return float(np.subtract(*np.percentile(values, [99.5, 0.5]))) if values.size else 0.0


def _frame_widths(picture, span) -> dict[str, int]:
    """Rows and columns of ``picture`` that are frame, by side."""
    padded = ~np.isfinite(picture)
    turned = {"top": picture, "bottom": picture[::-1], "left": picture.T, "right": picture.T[::-1]}
    if padded.all(axis=0).any() or padded.all(axis=1).any():
        return {side: _leading(~np.isfinite(way).any(axis=1)) for side, way in turned.items()}
    away = {side: ~(np.abs(way - np.median(way[0])) <= 0.02 * span) for side, way in turned.items()}  # NaN is away
    uniform = {side: _leading(way.mean(axis=1) <= FRAME_OUTLIERS) for side, way in away.items()}
    widths = {}
    for side, way in away.items():
        before, after = ("left", "right") if side in ("top", "bottom") else ("top", "bottom")
        # Corners belong to the frames at both sides.
        between = way[:, uniform[before] : way.shape[1] - uniform[after]]
        widths[side] = _straight_edge(between) if uniform[side] and between.size else 0
    return widths


def _leading(rows) -> int:
    """How many of ``rows`` (bool) are true from the first on; 0 where all are."""
    return int(np.argmin(rows))


def _straight_edge(away) -> int:
    """Rows before the straight line on which most columns of ``away`` (bool) become true first; 0 without one."""
    first = np.where(away.any(axis=0), away.argmax(axis=0), len(away))
    across = np.arange(len(first)) - len(first) / 2
    best, width = 0, 0
    for slope in np.tan(np.deg2rad(np.linspace(-STRAIGHT_DEGREES, STRAIGHT_DEGREES, 11))):
        offsets = np.sort(first - slope * across)
        within = np.searchsorted(offsets, offsets + 2, "right") - np.arange(len(offsets))
        if within.max() > best:
            best, start = int(within.max()), offsets[within.argmax()]
            on_line = np.abs(first - slope * across - start - 1) <= 1
            width = int(first[on_line].min())
    return width if best >= STRAIGHT_SHARE * len(first) else 0


# ------------------------------------------------------------------------------------------------
# Markers


def mask_markers(pixels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Find burnt-in letters and markers: ``(H, W)`` bool, true where one lies, and a note on them.

    They are small, brighter than all else near them (or darker, on a bright page) and end sharply: components of
    the morphological top-hat (an opening by 1/16 of the edge) within the upper tenth of the grey scale, no larger than
    1 % of the picture, with a rim as sharp as print; in the outer third of the picture, since metal inside the chest
    (clips, a pacemaker) belongs to the patient. :func:`fill` replaces them.
    """
    small, step = decimated(pixels)
    valid = np.isfinite(small)
    if not valid.any():
        return np.zeros(pixels.shape, bool), []
    low, high = np.percentile(small[valid], [0.5, 99.9])
    picture = np.where(valid, small, low)
    span = max(float(high - low), 1e-12)
    found = np.zeros(small.shape, bool)
    for sign in (1, -1):
        found |= _marks(sign * picture / span, valid)
    if not found.any():
        return np.zeros(pixels.shape, bool), []
    found = scipy.ndimage.binary_dilation(found, iterations=2)
    number = scipy.ndimage.label(scipy.ndimage.binary_dilation(found, iterations=max(2, max(small.shape) // 64)))[1]
    full = found.repeat(step, axis=0).repeat(step, axis=1)[: pixels.shape[0], : pixels.shape[1]]
    note = f"{number} burnt-in marker{'s' if number > 1 else ''} replaced by the surroundings ({found.mean():.1%})"
    return full, [note]


def _marks(picture, valid):
    """Marks brighter than their surroundings."""
    reach = max(5, max(picture.shape) // 16) | 1
    lifted = picture - scipy.ndimage.grey_opening(picture, size=(reach, reach))
    edges = scipy.ndimage.gaussian_gradient_magnitude(picture, 0.7)
    bright = lifted > 0.3
    labels, count = scipy.ndimage.label(bright, structure=np.ones((3, 3)))
    marks = np.zeros(picture.shape, bool)
    if not count:
        return marks
    top = np.percentile(picture[valid], 99.5)
    rows, columns = picture.shape
    for index, where in enumerate(scipy.ndimage.find_objects(labels), start=1):
        own = labels[where] == index
        height, width = own.shape
        middle = [(part.start + part.stop) / 2 / length for part, length in zip(where, picture.shape)]
        central = max(abs(place - 0.5) for place in middle) < 0.3
        small = 6 <= own.sum() <= MARKER_SHARE * rows * columns and max(height / rows, width / columns) < 0.15
        if central or not small:
            continue
        rim = own & ~scipy.ndimage.binary_erosion(own)
        flat = np.ptp(np.percentile(picture[where][own], [25, 90])) < 0.25
        sharp = np.percentile(edges[where][rim], 50) > 0.09
        if sharp and flat and picture[where][own].max() >= top - 0.1:
            marks[where] |= own
    return marks


def fill(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of ``pixels`` with the masked ones replaced by the mean of what is around them, weighted by nearness.

    Each connected region of ``mask`` is filled by itself: normalised convolution with a Gaussian of half its size.
    NaN takes no part.
    """
    out = np.array(pixels)
    labels, _ = scipy.ndimage.label(mask)
    for where in scipy.ndimage.find_objects(labels):
        size = max(part.stop - part.start for part in where)
        around = tuple(slice(max(0, part.start - size), part.stop + size) for part in where)
        known = ~mask[around] & np.isfinite(out[around])
        sigma = max(1.0, size / 2)
        weight = scipy.ndimage.gaussian_filter(known.astype(np.float32), sigma, truncate=3)
        value = scipy.ndimage.gaussian_filter(np.where(known, out[around], 0).astype(np.float32), sigma, truncate=3)
        fillable = mask[around] & (weight > 1e-6)
        out[around][fillable] = (value[fillable] / weight[fillable]).astype(out.dtype)
    return out


# ------------------------------------------------------------------------------------------------
# Photographs


def perspective(pixels: np.ndarray) -> str | None:
    """Say why a picture looks like a photograph of a film or screen taken at an angle; None where it does not.

    Its four edges are straight lines within the picture, and opposite ones are not parallel (by 2 degrees at least).
    Both a bright quadrilateral on a dark ground and a dark one on a bright ground are looked for. The sentence is meant
    for an error message: "... crop and straighten it".
    """
    small, _ = decimated(pixels, 256)
    valid = np.isfinite(small)
    if not valid.any():
        return None
    picture = scipy.ndimage.gaussian_filter(np.where(valid, small, np.nanmin(small)), 1.0)
    low, high = np.percentile(picture, [2, 98])
    if high <= low:
        return None
    for sign in (1, -1):
        lines = _quadrilateral(sign * (picture - low) / (high - low) + (sign < 0))
        if lines is None:
            continue
        slants = [abs(lines[a] - lines[b]) for a, b in (("left", "right"), ("top", "bottom"))]
        if max(slants) >= SLANT_DEGREES:
            return (
                f"a photograph taken at an angle: opposite edges of the film are {max(slants):.1f} degrees from"
                " parallel; crop and straighten it (perspective correction) first"
            )
    return None


def _quadrilateral(picture) -> dict[str, float] | None:
    """Angles (degrees) of the four straight edges of the brighter region, or None."""
    region = scipy.ndimage.binary_opening(picture > _otsu(picture), iterations=2)
    labels, count = scipy.ndimage.label(region)
    if not count:
        return None
    region = scipy.ndimage.binary_fill_holes(labels == 1 + np.bincount(labels.ravel())[1:].argmax())
    rows, columns = region.shape
    if not 0.15 < region.mean() < 0.95:
        return None
    angles = {}
    for side, turned in (
        ("left", region),
        ("right", region[:, ::-1]),
        ("top", region.T),
        ("bottom", region.T[:, ::-1]),
    ):
        occupied = np.flatnonzero(turned.any(axis=1))
        first = turned[occupied].argmax(axis=1).astype(float)
        middle = slice(int(0.15 * len(occupied)), int(0.85 * len(occupied)) or 1)
        where, edge = occupied[middle], first[middle]
        if len(where) < 20 or (edge <= 1).mean() > 0.1:  # reaches the picture's border: cropped, not an edge
            return None
        slope, offset = np.polyfit(where, edge, 1)
        if np.abs(edge - slope * where - offset).mean() > LINE_ERROR * max(rows, columns):
            return None
        mirrored = side in ("right", "bottom")
        angles[side] = float(np.degrees(np.arctan(-slope if mirrored else slope)))
    return angles


def _otsu(picture) -> float:
    """Otsu's threshold (IEEE Trans. SMC 9, 1979) of values about [0, 1]."""
    counts, edges = np.histogram(picture, bins=128, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)
    mean = np.cumsum(counts * centres)
    total, whole = weight[-1], mean[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (whole * weight / total - mean) ** 2 / (weight * (total - weight))
    return float(centres[np.nanargmax(between)])
