"""Stage 2's error in two parts: what its coarse input can hold, and the detail that it cannot; the share removed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from model_enhanced import RefinementNetwork
from xray2ct.evaluation.protocols import Case, Protocol
from xray2ct.inference.predictor import CUBIC
from xray2ct.models.upsampling import upsample_spline

PARTS = {"low": "what 64^3 can hold", "high": "what 64^3 cannot hold"}  # frequencies; 64^3: stage 1's resolution


def split_frequencies(volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(coarse, low, high)`` of a volume ``(B, 1, D, H, W)``: area averages over stage 1's voxels; their spline; rest.

    low: :func:`upsampling.upsample_spline` of coarse, of the volume's shape. high: what 64^3 cannot hold.
    """
    scale = RefinementNetwork.scale
    coarse = F.avg_pool3d(volume, scale)
    low = upsample_spline(coarse, scale)
    return coarse, low, volume - low


def rmse_of_parts(case: Case) -> dict[str, float | None]:
    """RMSE in HU of the error's low and high frequencies, over the whole cube: ``{"low_rmse_hu", "high_rmse_hu"}``.

    Low: the area average of the error over stage 1's voxels, upsampled by :func:`upsampling.upsample_spline`, which
    has that area average again: a projection. High: the rest, whose area average is 0. Of ``cubic_consistent``, but
    for its clamping, the low part is the error of stage 1 alone and the high part is that of ``perfect_64_cubic``
    alone. The two are not orthogonal: their squares add up to the square of ``rmse_hu`` but for a correlation.
    """
    _, *found = split_frequencies(case.error_hu.float()[None, None])
    parts = dict(zip(PARTS, found))
    return {f"{part}_rmse_hu": volume.double().square().mean().sqrt().item() for part, volume in parts.items()}


ERROR_SPLIT = Protocol(
    rmse_of_parts,
    {
        **{f"{part}_rmse_hu": f"HU; root mean squared error, {where}" for part, where in PARTS.items()},
        **{f"{part}_removed": f"share of {CUBIC}'s squared error removed, {where}" for part, where in PARTS.items()},
    },
    ("low_rmse_hu", "high_rmse_hu", "low_removed", "high_removed"),
)


def add_shares(rows: list[dict]) -> None:
    """Add to one patient's rows, of all methods, ``low_removed`` and ``high_removed``.

    1 - (RMSE of the part / that of ``cubic_consistent`` of the same stage 1)^2: 0 for that method itself, 1 where
    nothing is left, negative where a method adds error; None where there is no error that could be removed. Each
    patient's share compares two volumes of that patient: its mean's interval is one of paired differences.
    """
    reference = next(row for row in rows if row["method"] == CUBIC)
    for row in rows:
        for part in PARTS:
            mine, other = row[f"{part}_rmse_hu"], reference[f"{part}_rmse_hu"]
            row[f"{part}_removed"] = 1 - (mine / other) ** 2 if other else None
