"""Formulas of the scores; :mod:`xray2ct.evaluation.protocols` lists who scores by which.

    from xray2ct.metrics import psnr, ssim_3d
    psnr(prediction, target), ssim_3d(prediction, target)   # volumes (D, H, W) in [0, 1]

Volumes are single ``(D, H, W)`` torch tensors, computed in float64; NaN and unlike shapes raise ``ValueError``.
``psnr_tensor`` and ``ssim_3d_tensor`` are for training: in the volumes' own precision, without waiting for the device.
"""

from __future__ import annotations

import math

import torch

from losses import SSIM_TAPS, ssim_map, ssim_of_moments

PSNR_CAP = 100.0  # dB; what identical volumes score (X2CT-GAN's convention), so that scores stay finite
UNIFORM_TAPS = 7  # edge of scikit-image's default SSIM window
_SLAB = 16  # slices of SSIM computed at once: bounds the memory at 256^3


def check_pair(prediction: torch.Tensor, target: torch.Tensor) -> None:
    """Raise ``ValueError`` unless both are finite volumes ``(D, H, W)`` of the same shape: NaN never scores."""
    if prediction.ndim != 3 or prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)};"
            " expected two volumes (D, H, W) of the same shape"
        )
    if not (prediction.isfinite().all() and target.isfinite().all()):
        raise ValueError("NaN or infinity in a volume: it cannot be scored")


def _pair(prediction, target):
    check_pair(prediction, target)
    return prediction.double(), target.double()


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


def psnr_tensor(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """:func:`psnr` with peak 1 as a 0-d tensor on the volumes' device; not finite for a prediction that is not."""
    return (-10 * (prediction - target).square().mean().log10()).clamp_max(PSNR_CAP)


def psnr_slices(prediction: torch.Tensor, target: torch.Tensor, scale: float, peak: float) -> float:
    """PSNR in dB of integer slices, averaged over the slices of each axis and then over the three axes.

    Both volumes times ``scale`` are cut to integers (towards zero); each slice scores 20 log10(peak / RMSE), a slice
    without error 100 dB. As in X2CT-GAN's ``Peak_Signal_to_Noise_Rate`` (github.com/kylekma/X2CT,
    3DGAN/lib/utils/metrics_np.py); nothing is clipped here.
    """
    check_pair(prediction, target)
    # In the volumes' own dtype, as there: float32 rounding decides some truncations.
    integers = [(v * scale).to(torch.int32).double() for v in (prediction, target)]
    squared = (integers[0] - integers[1]).square()
    per_axis = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        mse = squared.mean(dim=axes)
        scores = 20 * math.log10(peak) - 10 * mse.clamp_min(1e-10).log10()
        per_axis.append(torch.where(mse == 0, torch.full_like(scores, PSNR_CAP), scores).mean())
    return torch.stack(per_axis).mean().item()


def ssim_3d(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Mean 3D SSIM: Gaussian window (sigma 1.5, 11 taps), data range 1, where the window fits; 1 at equality.

    :func:`losses.ssim_map`; equals scikit-image's ``structural_similarity(gaussian_weights=True,
    use_sample_covariance=False, data_range=1)``. Volumes below 11 voxels raise ``ValueError``.
    """
    return ssim_3d_tensor(*_pair(prediction, target)).item()


def ssim_3d_tensor(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """:func:`ssim_3d` as a 0-d tensor on the volumes' device, in their precision; NaN for a prediction with NaN."""
    total, count = torch.zeros((), dtype=target.dtype, device=target.device), 0
    margin = SSIM_TAPS - 1
    for start in range(0, max(1, len(target) - margin), _SLAB):
        stop = start + _SLAB + margin
        similarity = ssim_map(prediction[start:stop], target[start:stop])
        total, count = total + similarity.sum(), count + similarity.numel()
    return total / count


def ssim_uniform(
    prediction: torch.Tensor, target: torch.Tensor, slices: float | None = None, volume: float | None = None
) -> dict[str, float]:
    """Mean SSIM with a uniform window of 7 voxels per axis and sample covariance: scikit-image's defaults.

    slices: data range of the 2D one, 7 x 7 in each slice, averaged over the positions where the window fits, the slices
    and then the three axes -> ``"slices"``. volume: data range of the 3D one, 7 x 7 x 7 -> ``"volume"``. None leaves
    one out; together they share their window sums. Axes below 7 voxels raise ``ValueError``.
    """
    prediction, target = _pair(prediction, target)
    if min(target.shape) < UNIFORM_TAPS:
        raise ValueError(f"volume of {tuple(target.shape)} voxels; expected at least {UNIFORM_TAPS} per axis for SSIM")
    totals: dict[str, tuple[float, int]] = {}
    for start in range(0, len(target), _SLAB):
        stop = start + _SLAB + UNIFORM_TAPS - 1
        for name, sums in _window_sums(prediction[start:stop], target[start:stop], slices, volume):
            similarity = _similarity(sums, *((3, volume) if name == "volume" else (2, slices)))
            total, count = totals.get(name, (0.0, 0))
            totals[name] = (total + similarity.sum().item(), count + similarity.numel())
    means = {name: total / count for name, (total, count) in totals.items()}
    scores = {} if slices is None else {"slices": sum(means[axis] for axis in ("axial", "coronal", "sagittal")) / 3}
    return scores if volume is None else {**scores, "volume": means["volume"]}


def _window_sums(x, y, slices, volume):
    """Pairs (name, sums of x, y, x^2 + y^2 and xy over the windows) of one slab, whose last 6 slices are the next's."""
    moments = torch.stack([x, y, x * x + y * y, x * y])
    along_w = _sliding_sum(moments, 3)
    whole = moments.shape[1] >= UNIFORM_TAPS  # else too few slices are left for a window along D
    if slices is not None:
        yield "axial", _sliding_sum(along_w[:, :_SLAB], 2)
        if whole:
            yield "coronal", _sliding_sum(along_w, 1)
            yield "sagittal", _sliding_sum(_sliding_sum(moments, 2), 1)
    if volume is not None and whole:
        yield "volume", _sliding_sum(_sliding_sum(along_w, 2), 1)


def _sliding_sum(x, axis):
    """Sums of 7 neighbours along an axis, in four additions each."""
    length = x.shape[axis] - UNIFORM_TAPS + 1
    pairs = x.narrow(axis, 0, length + 5) + x.narrow(axis, 1, length + 5)
    total = pairs.narrow(axis, 0, length) + pairs.narrow(axis, 2, length)
    return total.add_(pairs.narrow(axis, 4, length)).add_(x.narrow(axis, 6, length))


def _similarity(sums, dimensions, data_range):
    """SSIM from window sums, with sample statistics."""
    size = UNIFORM_TAPS**dimensions
    mean_x, mean_y, mean_squares, mean_xy = sums / size
    scale = size / (size - 1)
    variances = scale * (mean_squares - (mean_x * mean_x + mean_y * mean_y))
    return ssim_of_moments(mean_x, mean_y, variances, scale * (mean_xy - mean_x * mean_y), data_range)


def error_statistics(error: torch.Tensor) -> dict[str, float | None]:
    """``{"mae": mean |e|, "rmse": sqrt(mean e^2), "bias": mean e}`` of errors of any shape, in their unit.

    All None for no errors at all: a tissue that a patient lacks has no score, neither 0 nor NaN.
    """
    if not error.numel():
        return dict.fromkeys(("mae", "rmse", "bias"))
    error = error.double()
    return {
        "mae": error.abs().mean().item(),
        "rmse": math.sqrt(error.square().mean().item()),
        "bias": error.mean().item(),
    }
