"""Projection residuals: how well the X-rays rendered from a volume fit the X-rays that it was made from."""

from __future__ import annotations

import numpy as np
import torch

from xray2ct.data.checks.xray_comparison import CONTROL_DEGREES, CONTROL_MM, ncc
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import VIEWS


def gradient_ncc(one, other) -> float:
    """Mean :func:`ncc` of the two derivatives (Penney et al., IEEE TMI 17, 1998, gradient correlation)."""
    return float(np.mean([ncc(np.diff(one, axis=axis), np.diff(other, axis=axis)) for axis in (0, 1)]))


def misplaced(volume: torch.Tensor, fov_mm: float) -> torch.Tensor:
    """``(D, H, W)`` shifted by 5 mm downwards and turned by 5 degrees about the head-feet axis; air comes in."""
    angle = np.deg2rad(CONTROL_DEGREES)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    shift = 2 * CONTROL_MM / fov_mm  # the cube's edge is 2 in these coordinates, which run (W, H, D)
    matrix = torch.tensor([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, -shift]], dtype=volume.dtype)
    grid = torch.nn.functional.affine_grid(matrix[None], [1, 1, *volume.shape], align_corners=False)
    return torch.nn.functional.grid_sample(volume[None, None], grid, align_corners=False)[0, 0]


def residuals(
    acquisition: Acquisition, xrays: torch.Tensor, volume: torch.Tensor, rows: np.ndarray | None = None
) -> tuple[dict, np.ndarray]:
    """``({view: scores}, rendered)``: NCC and gradient NCC of both X-rays with those rendered from a volume.

    xrays: ``(2, S, S)``; volume: ``(D, H, W)`` in [0, 1]; rows: indices of the X-rays' rows to compare, default all.
    Scores are ``ncc`` and ``gradient_ncc``, and ``control_ncc`` and ``control_gradient_ncc`` of the volume misplaced
    (:func:`misplaced`): where they are as high, a high correlation says little. rendered: ``(2, S, S)``.
    """
    size = tuple(xrays.shape[-2:])
    rows = np.arange(size[0]) if rows is None else rows
    with torch.no_grad():
        rendered = {
            "": acquisition.render(volume[None, None], size)[0].numpy(),
            "control_": acquisition.render(misplaced(volume, acquisition.geometry.fov_mm)[None, None], size)[0].numpy(),
        }
    scores = {
        name: {
            f"{which}{score.__name__}": score(xrays[view].numpy()[rows], pictures[view][rows])
            for which, pictures in rendered.items()
            for score in (ncc, gradient_ncc)
        }
        for view, name in enumerate(VIEWS)
    }
    return scores, rendered[""]
