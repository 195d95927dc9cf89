"""Two X-rays of one chest: how wide the body is, whether the views are swapped or do not match."""

from __future__ import annotations

import os

import numpy as np

from xray2ct.files import InputError
from xray2ct.imaging.read_xray import XrayImage

# Body width in the lateral view over that in the PA view was 0.89 at most in those CTs; swapped, 1.12 at least.
SWAPPED_WIDTH_RATIO = 1.05


def body_width(pixels: np.ndarray) -> float:
    """Mean width of the body as a share of the picture's width: pixels above 0.15 of the 99th percentile."""
    return float((pixels > 0.15 * np.percentile(pixels, 99)).mean())


def check_spacings(views: dict[str | os.PathLike, XrayImage]) -> None:
    """Raise :class:`InputError` where the pixel spacing of one file is known and that of another is not.

    Only the one would be brought to the model's scale: the views would no longer show the patient at one scale.
    """
    known, unknown = ([path for path, xray in views.items() if xray.spacing_known is kind] for kind in (True, False))
    if known and unknown:
        raise InputError(
            f"{unknown[0]}: its pixel spacing is missing, that of {known[0]} is known; expected it of both views or of"
            " none (--pixel-spacing-mm gives it)"
        )


def check_views(pa: np.ndarray, lateral: np.ndarray, names=("the PA view", "the lateral view")) -> list[str]:
    """Look for mixed-up views; ``pa`` and ``lateral`` are (H, W) in [0, 1], ``names`` are for messages.

    A chest is wider than it is deep, so the lateral shadow is the narrower one: the other way round the
    views are swapped and :class:`InputError` is raised, as it is for one picture given twice. Where both
    shadows fill the picture this cannot be told. Returns warnings: row profiles that do not
    match (both views see the same height, so they should).
    """
    if pa.shape == lateral.shape and np.array_equal(pa, lateral):
        raise InputError(f"{names[0]} and {names[1]} are the same picture; expected a PA and a lateral view")
    widths = body_width(pa), body_width(lateral)
    if widths[1] > SWAPPED_WIDTH_RATIO * widths[0] and widths[0] < 0.95:
        raise InputError(
            f"{names[0]} (PA) and {names[1]} (lateral) look swapped: the body is {widths[0]:.0%} of the picture wide"
            f" in the first and {widths[1]:.0%} in the second, but a chest is wider than deep"
        )
    count = min(pa.shape[0], lateral.shape[0], 64)
    profiles = [np.array([chunk.mean() for chunk in np.array_split(view, count, axis=0)]) for view in (pa, lateral)]
    if min(p.std() for p in profiles) > 0:
        match = float(np.corrcoef(profiles)[0, 1])
        if match < 0.5:
            return [
                f"{names[0]} and {names[1]} hardly match row by row (correlation {match:.2f}):"
                " same patient, both upright?"
            ]
    return []
