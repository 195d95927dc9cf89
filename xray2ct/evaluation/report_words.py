"""What the report says in words: names of scores and methods, the best of several, one sentence about the result."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xray2ct.evaluation.protocols import format_score
from xray2ct.inference.predictor import TRILINEAR

BASELINE = "mean_volume"  # the method's name, as in the tables
CEILING = "perfect_"  # begins the name of methods that are given the true volume

LABELS = {
    "psnr_strict": "PSNR (strict)",
    "psnr_strict_masked": "PSNR inside the scan",
    "psnr_x2ct": "PSNR as in X2CT-GAN",
    "psnr_perx2ct": "PSNR as in PerX2CT",
    "psnr_pm1024": "PSNR, window of \u00b11024 HU",
    "ssim_3d": "SSIM (3D)",
    "ssim_slices": "SSIM, slice by slice",
    "ssim_perx2ct": "SSIM as in PerX2CT",
    "ssim_pm1024": "SSIM, window of \u00b11024 HU",
    "mae_hu": "Mean absolute error",
    "rmse_hu": "Root mean squared error",
    "body_mae_hu": "Mean absolute error in the body",
    "body_bias_hu": "Mean error in the body",
    "projection_relative": "X-rays of the volume against the input",
    "fine_power_db": "Power of fine detail against the truth's",
    "lsd_db": "Log-spectral distance",
    "seconds": "Seconds per patient",
}
METHODS = {
    BASELINE: "the mean of the training volumes, whatever the X-rays show (the baseline)",
    TRILINEAR: "the coarser volume, only interpolated",
    CEILING: "the true volume at the coarser resolution, interpolated (a ceiling, not ranked)",
}


def label(column: str) -> str:
    """A score's name in words; the column's own where there is none."""
    return LABELS.get(column, column)


def explain_methods(names) -> str:
    """What the baselines among the methods are, as one sentence; "" where there is none."""
    told = [f"{name}: {text}" for name in names for key, text in METHODS.items() if name.startswith(key)]
    return f"{'; '.join(told)}." if told else ""


def merit(column: str, value: float) -> float | None:
    """A score as what is better when larger; a bias counts by its size, None is no matter of better or worse."""
    if column.startswith(("psnr", "ssim")) or column.endswith("_ncc"):
        return value
    if column.endswith(("mae_hu", "rmse_hu", "absolute_error", "seconds")) or column.startswith("projection"):
        return -value
    return -abs(value) if column.endswith(("bias_hu", "_db")) else None


def best(column: str, values: Mapping[str, object]) -> set[str]:
    """The methods with the best value of a score; none where only one can be ranked, or all are equal.

    values: ``{method: value}``; what is no finite number, and methods that know the truth, are left out.
    """
    merits = {
        method: amount
        for method, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value) and not method.startswith(CEILING)
        if (amount := merit(column, value)) is not None
    }
    if len(set(merits.values())) < 2:
        return set()
    top = max(merits.values())
    return {method for method, amount in merits.items() if amount == top}


def sentence(summary: dict, method: str) -> str:
    """One sentence: what ``method`` reaches on average and how that compares with the baseline; "" without PSNR."""
    column = "psnr_strict"
    ours, theirs = (summary.get("methods", {}).get(name, {}).get(column) for name in (method, BASELINE))
    if not ours or ours.get("mean") is None:
        return ""
    count = f"{ours['n']} patient{'s'[: ours['n'] != 1]}"
    text = f"Over {count}, {method} reaches a PSNR (strict) of {format_score(column, ours['mean'])} dB"
    if method == BASELINE or not theirs or theirs.get("mean") is None:
        return f"{text}."
    gain = ours["mean"] - theirs["mean"]
    comparison = "better" if gain >= 0 else "worse"
    return (
        f"{text}, {format_score(column, abs(gain))} dB {comparison} than the mean training volume"
        f" ({format_score(column, theirs['mean'])} dB), which ignores the X-rays."
    )
