"""What a DICOM header says not to show: collimator (PS3.3, C.8.7.3) and display shutters (C.7.6.11, C.7.6.15)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

MIN_OPEN = 0.05  # share of the picture; a header that leaves less is a leftover, of a thumbnail for instance


def hidden_pixels(data, shape: tuple[int, int], notes: list[str]) -> np.ndarray | None:
    """``shape`` (rows, columns) bool, True behind a shutter or the collimator; None where nothing is.

    Rectangles, circles, polygons and bitmaps (an overlay of the file, 1 hides) of a pydicom dataset; where there are
    several, a pixel shows if all let it. Shapes that are incomplete or leave less than a twentieth of the picture count
    as left over from another picture: they are not used, which ``notes`` says.
    """
    shown = np.ones(shape, dtype=bool)
    names = []
    for name in ("Shutter", "Collimator"):
        kinds = data.get(f"{name}Shape") or ()
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            mask = _open(data, name, str(kind).upper(), shape)
            if mask is None or (shown & mask).mean() < MIN_OPEN:
                notes.append(f"the {name.lower()} of its header leaves next to nothing of the picture: not used")
            elif not mask.all():
                shown &= mask
                names.append(name.lower())
    if not names:
        return None
    notes.append(
        f"{1 - shown.mean():.0%} of the picture are outside the {' and '.join(dict.fromkeys(names))}: not used"
    )
    return ~shown


def _open(data, name: str, kind: str, shape) -> np.ndarray | None:
    """Where one shape lets pixels through, ``shape`` bool; None for one that is incomplete. Its pixels count from 1."""
    rows, columns = shape
    edges = [data.get(f"{name}{edge}") for edge in _EDGES]
    if kind == "RECTANGULAR" and all(edge not in (None, "") for edge in edges):
        left, right, upper, lower = (int(edge) for edge in edges)
        mask = np.zeros(shape, dtype=bool)
        mask[max(0, upper - 1) : max(0, lower), max(0, left - 1) : max(0, right)] = True
        return mask
    centre, radius = data.get(f"CenterOfCircular{name}"), data.get(f"RadiusOfCircular{name}")
    if kind == "CIRCULAR" and centre and radius:
        down, across = np.ogrid[1 : rows + 1, 1 : columns + 1]
        return (down - int(centre[0])) ** 2 + (across - int(centre[1])) ** 2 <= int(radius) ** 2
    vertices = data.get(f"VerticesOfThePolygonal{name}")
    if kind == "POLYGONAL" and vertices and len(vertices) >= 6:
        picture = Image.new("1", (columns, rows))
        points = [(int(column) - 1, int(row) - 1) for row, column in zip(vertices[::2], vertices[1::2])]
        ImageDraw.Draw(picture).polygon(points, fill=1)
        return np.array(picture)
    group = data.get("ShutterOverlayGroup")
    if kind == "BITMAP" and group and (int(group), 0x3000) in data:
        overlay = data.overlay_array(int(group))
        return overlay == 0 if overlay.shape == shape else None
    return None


_EDGES = ("LeftVerticalEdge", "RightVerticalEdge", "UpperHorizontalEdge", "LowerHorizontalEdge")
