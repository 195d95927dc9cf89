"""Scale of two films without pixel spacing: from how large the lungs are on them, and how large lungs are.

The lungs' box is found on a thumbnail of each view by a small network (``film_scale.npz``, from `python -m
tools.film_templates`). Lung height, width and depth of adults are jointly log-normal; with one patient, one height,
both views' scales are the generalised least-squares solution, and its covariance their uncertainty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from torch.nn import functional

from xray2ct.imaging.film_frame import Box, decimated, trim
from xray2ct.imaging.film_view import rank_thumbnail

WEIGHTS = "film_scale.npz"
LEFT_OUT = 0.06  # of an edge, in the parts of a film
# What is measured, rows, from (height, width, depth) of the lungs, columns; which view's scale it carries.
MEASURED = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]])
CARRIES = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])


@dataclass(frozen=True)
class ScaleEstimate:
    """Millimetres in the patient (not on the detector) per pixel of the PA and the lateral view as given.

    relative_sd: standard deviation of both, as a share (0.1: 10 %). ratio_sd: that of their ratio, smaller since both
    views see one height. lung_height_mm, lung_width_mm, lung_depth_mm: the lungs at this scale, in the supine, held
    inspiration of a CT: an upright film's are some per cent taller.
    """

    pa_mm: float
    lateral_mm: float
    relative_sd: tuple[float, float]
    ratio_sd: float
    lung_height_mm: float
    lung_width_mm: float
    lung_depth_mm: float

    def note(self) -> str:
        """One sentence for the notes of a reader."""
        return (
            f"scale estimated from the size of the lungs: {self.pa_mm:.3f} (PA) and {self.lateral_mm:.3f} mm per pixel"
            f" (lateral), +-{max(self.relative_sd):.0%}"
        )


def estimate(pa: np.ndarray, lateral: np.ndarray) -> ScaleEstimate:
    """Estimate the scale of two upright views, bone bright, the lateral facing left (:meth:`FilmFinding.upright`).

    pa, lateral: (H, W) of any size and grey scale, NaN where there is padding. Raises ``ValueError`` where a picture
    has one value. The estimate is that of an adult; a child's lungs are smaller than the statistics know.
    """
    (pa_height, pa_width), (lateral_height, lateral_depth) = lung_size(pa, 0), lung_size(lateral, 1)
    return solve(np.array([pa_height, pa_width, lateral_height, lateral_depth]), _stored())


def solve(lungs_px: np.ndarray, statistics: dict[str, np.ndarray]) -> ScaleEstimate:
    """Scale of both views by generalised least squares on logarithms.

    lungs_px: height and width of the lungs in the PA, height and depth in the lateral view, pixels. statistics:
    ``log_size`` (3) and ``size_covariance`` (3, 3) of height, width and depth in mm, ``error_covariance`` (4, 4) of the
    logarithms of ``lungs_px``.
    """
    covariance = MEASURED @ statistics["size_covariance"] @ MEASURED.T + statistics["error_covariance"]
    precision = np.linalg.inv(covariance)
    spread = np.linalg.inv(CARRIES.T @ precision @ CARRIES)
    excess = MEASURED @ statistics["log_size"] - np.log(lungs_px)
    pa_mm, lateral_mm = (float(mm) for mm in np.exp(spread @ CARRIES.T @ precision @ excess))
    pa_height, pa_width, lateral_height, lateral_depth = (float(px) for px in lungs_px)
    return ScaleEstimate(
        pa_mm,
        lateral_mm,
        (float(spread[0, 0] ** 0.5), float(spread[1, 1] ** 0.5)),
        float((spread[0, 0] + spread[1, 1] - 2 * spread[0, 1]) ** 0.5),
        (pa_height * pa_mm + lateral_height * lateral_mm) / 2,
        pa_width * pa_mm,
        lateral_depth * lateral_mm,
    )


def lung_size(pixels: np.ndarray, view: int) -> tuple[float, float]:
    """Height and width (PA, view 0) or depth (lateral, view 1) of the lungs in pixels, of an upright picture."""
    top, bottom, left, right = lung_box(pixels, view)
    return max(bottom - top, 1e-3), max(right - left, 1e-3)


def lung_box(pixels: np.ndarray, view: int) -> tuple[float, float, float, float]:
    """Top, bottom, left and right of the lungs in pixels; beyond the picture where it cuts them off.

    Rows and columns that hold the middle 98 % of the volume of both lungs together: the mean of what the network finds
    on the film and on four parts of it that lack 6 % at one side.
    """
    small, step = decimated(pixels, 256)
    top, bottom, left, right = trim(small)[0]
    rows, columns = int(LEFT_OUT * (bottom - top)), int(LEFT_OUT * (right - left))
    cuts = ((0, 0, 0, 0), (rows, 0, 0, 0), (0, rows, 0, 0), (0, 0, columns, 0), (0, 0, 0, columns))
    parts = [Box(top + a, bottom - b, left + c, right - d) for a, b, c, d in cuts]
    thumbs = torch.from_numpy(np.stack([rank_thumbnail(part.cut(small)) for part in parts]))
    with torch.no_grad():
        shares = lung_shares(_weights(), thumbs)[:, view].double().numpy()
    starts = np.array([[part.top, part.top, part.left, part.left] for part in parts])
    lengths = np.array([2 * [part.bottom - part.top] + 2 * [part.right - part.left] for part in parts])
    return tuple(float(place) for place in step * (starts + shares * lengths).mean(axis=0))


def lung_shares(weights: dict[str, torch.Tensor], thumbnails: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """``(B, 32, 32)`` -> ``(B, 2, 4)``: top, bottom, left, right as shares of the edges, if it is a PA, a lateral."""
    x = thumbnails[:, None]
    for layer in range(3):
        x = functional.relu(functional.conv2d(x, weights[f"w{layer}"], weights[f"b{layer}"], stride=2, padding=1))
    x = functional.dropout(x.flatten(1), dropout, training=dropout > 0)
    return functional.linear(x, weights["w3"], weights["b3"]).reshape(-1, 2, 4)


@lru_cache(maxsize=1)
def _stored() -> dict[str, np.ndarray]:
    with files(__package__).joinpath(WEIGHTS).open("rb") as stream, np.load(stream) as stored:
        return {name: stored[name].astype(np.float64) for name in stored.files}


def _weights() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value).float() for name, value in _stored().items() if name[0] in "wb"}
