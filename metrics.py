"""Scores of reconstructed volumes, each with formula, peak and source, and their statistics.

    from metrics import score_volume, summarise
    row = score_volume(prediction, target, mask, hu_window=(-1024, 1476))   # volumes (D, H, W) in [0, 1]
    table = summarise([row, ...])                                           # mean, sd, n, 95 % interval

"PSNR" means several things in this field, up to 20 dB apart for one and the same volume: a number
without its protocol says nothing. Here ``psnr_strict`` is the plain definition (peak = window width)
and ``psnr_x2ct`` the protocol of the X2CT-GAN literature, only for comparison with its tables.
Volumes are single ``(D, H, W)`` torch tensors in [0, 1], computed in float64; NaN raises ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from losses import SSIM_TAPS, ssim_map
from projector import HU_WINDOW

PSNR_CAP = 100.0  # dB; what identical volumes score (X2CT-GAN's convention), so that scores stay finite
X2CT_PEAK = 4095.0  # peak of X2CT-GAN's PSNR, on data that span 2,500 HU
_SLAB = 16  # slices of SSIM computed at once: bounds the memory at 256^3


# ------------------------------------------------------------------------------------------------
# One volume


def _pair(prediction, target):
    if prediction.ndim != 3 or prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)};"
            " expected two volumes (D, H, W) of the same shape"
        )
    prediction, target = prediction.double(), target.double()
    if not (prediction.isfinite().all() and target.isfinite().all()):
        raise ValueError("NaN or infinity in a volume: it cannot be scored")
    return prediction, target


def _selected(values, mask):
    if mask is None:
        return values
    if mask.shape != values.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {tuple(values.shape)}")
    values = values[mask > 0]
    if not values.numel():
        raise ValueError("the mask is empty: there is nothing to score")
    return values


def psnr(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB: 20 log10(peak) - 10 log10(mean squared error), at most 100.

    With volumes in [0, 1] and peak 1 the peak is the width of the HU window ("strict").
    mask: only voxels above 0 count. Different shapes or an empty mask raise ``ValueError``.
    """
    prediction, target = _pair(prediction, target)
    mse = _selected((prediction - target).square(), mask).mean().item()
    return min(PSNR_CAP, 20 * math.log10(peak) - 10 * math.log10(mse)) if mse > 0 else PSNR_CAP


def psnr_x2ct(prediction: torch.Tensor, target: torch.Tensor, window_width_hu: float = 2500.0) -> float:
    """PSNR in dB by the protocol of X2CT-GAN.

    Source: Ying et al., CVPR 2019; github.com/kylekma/X2CT, 3DGAN/test.py and lib/utils/metrics_np.py.
    Both volumes clipped to [0, 1], times 2,500, cut to integers; PSNR of each slice with peak 4095,
    a slice without error scoring 100 dB; mean over the slices of each axis, then over the three axes.
    Reads 20 log10(4095 / 2500) = 4.3 dB above the strict definition, and more by the mean over
    slices. A window of another width keeps HU units: times ``window_width_hu``.
    """
    _pair(prediction, target)
    # In the volumes' own dtype, as there: float32 rounding decides some truncations.
    integers = [(v.clamp(0, 1) * window_width_hu).to(torch.int32).double() for v in (prediction, target)]
    squared = (integers[0] - integers[1]).square()
    per_axis = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        mse = squared.mean(dim=axes)
        scores = 20 * math.log10(X2CT_PEAK) - 10 * mse.clamp_min(1e-10).log10()
        per_axis.append(torch.where(mse == 0, torch.full_like(scores, PSNR_CAP), scores).mean())
    return torch.stack(per_axis).mean().item()


def ssim_3d(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Mean 3D SSIM: Gaussian window (sigma 1.5, 11 taps), data range 1, where the window fits; 1 at equality.

    :func:`losses.ssim_map`; equals scikit-image's ``structural_similarity(gaussian_weights=True,
    use_sample_covariance=False, data_range=1)``. Volumes below 11 voxels raise ``ValueError``.
    """
    prediction, target = _pair(prediction, target)
    total, count = 0.0, 0
    margin = SSIM_TAPS - 1
    for start in range(0, max(1, len(target) - margin), _SLAB):
        stop = start + _SLAB + margin
        similarity = ssim_map(prediction[start:stop], target[start:stop])
        total, count = total + similarity.sum().item(), count + similarity.numel()
    return total / count


def ssim_slices(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Slice-wise SSIM of X2CT-GAN: 2D, 7 x 7 uniform window, sample covariance, data range 1.

    Mean over positions where the window fits and over slices, then over the three axes
    (3DGAN/lib/utils/metrics_np.py there: scikit-image's defaults). Volumes are clipped to [0, 1];
    axes below 7 raise ``ValueError``.
    """
    prediction, target = _pair(prediction.clamp(0, 1), target.clamp(0, 1))
    window = (1 / 7,) * 7
    per_axis = []
    for axis in range(3):
        total, count = 0.0, 0
        slabs = zip(prediction.movedim(axis, 0).split(_SLAB), target.movedim(axis, 0).split(_SLAB))
        for x, y in slabs:
            similarity = ssim_map(x, y, window, axes=(-2, -1), covariance_scale=49 / 48)
            total, count = total + similarity.sum().item(), count + similarity.numel()
        per_axis.append(total / count)
    return sum(per_axis) / 3


def mae_hu(prediction, target, hu_window=HU_WINDOW, mask=None) -> float:
    """Mean absolute error in Hounsfield units: mean |prediction - target| x window width."""
    prediction, target = _pair(prediction, target)
    return _selected((prediction - target).abs(), mask).mean().item() * (hu_window[1] - hu_window[0])


def rmse_hu(prediction, target, hu_window=HU_WINDOW, mask=None) -> float:
    """Root mean squared error in Hounsfield units: sqrt(mean (prediction - target)^2) x window width."""
    prediction, target = _pair(prediction, target)
    mse = _selected((prediction - target).square(), mask).mean().item()
    return math.sqrt(mse) * (hu_window[1] - hu_window[0])


def score_volume(prediction, target, mask=None, hu_window=HU_WINDOW) -> dict[str, float]:
    """Every score of one volume.

    prediction, target: ``(D, H, W)`` in [0, 1]. mask: same shape, 1 inside the scan; it only enters
    ``psnr_strict_masked`` (without it equal to ``psnr_strict``). All values are finite.
    """
    return {
        "psnr_strict": psnr(prediction, target),
        "psnr_strict_masked": psnr(prediction, target, mask),
        "psnr_x2ct": psnr_x2ct(prediction, target, hu_window[1] - hu_window[0]),
        "ssim_3d": ssim_3d(prediction, target),
        "ssim_slices": ssim_slices(prediction, target),
        "mae_hu": mae_hu(prediction, target, hu_window),
        "rmse_hu": rmse_hu(prediction, target, hu_window),
    }


# ------------------------------------------------------------------------------------------------
# Statistics over patients


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, samples: int = 10000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13), resampling patients.

    Returns ``(low, high)``, the same for the same seed, or None for fewer than two values: one
    patient says nothing about spread. Values that are not finite raise ``ValueError``.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"expected a list of finite numbers, got {values.tolist()}")
    if len(values) < 2:
        return None
    chosen = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[chosen].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _statistics(values: Sequence[float]) -> dict:
    interval = bootstrap_interval(values)
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "n": len(values),
        "ci95": list(interval) if interval else None,
    }


def paired_interval(a: Sequence[float], b: Sequence[float]) -> dict:
    """Statistics of the patient-wise differences a - b, as in :func:`summarise`.

    Two methods on the same patients differ when the interval leaves out 0; their separate
    intervals, wide from patient to patient, say less. Different lengths raise ``ValueError``.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} values against {len(b)}; expected one of each per patient")
    return _statistics([x - y for x, y in zip(a, b)])


def summarise(rows: Sequence[Mapping]) -> dict[str, dict]:
    """Per-patient rows -> ``{metric: {"mean", "sd", "n", "ci95": [low, high]}}``.

    rows: as from :func:`score_volume`; keys whose value is text (ids) are left out. sd is the sample
    standard deviation, ci95 a bootstrap interval of the mean; both None for one patient (JSON's null).
    Rows with different keys raise ``ValueError``.
    """
    if not rows:
        raise ValueError("no rows to summarise")
    keys = [key for key, value in rows[0].items() if not isinstance(value, str)]
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(f"rows differ in their columns: {sorted(row.keys() ^ rows[0].keys())}")
    return {key: _statistics([float(row[key]) for row in rows]) for key in keys}
