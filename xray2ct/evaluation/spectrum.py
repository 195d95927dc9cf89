"""Sharpness and texture as power spectra of axial slices: how much detail a volume has, right or wrong."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from xray2ct.files import InputError

BANDS = 8  # rings of equal width between 0 and half a cycle per voxel
FINE = 0.25  # cycles per voxel: detail of less than four voxels is fine


@lru_cache(maxsize=4)
def _rings(shape: tuple[int, int]) -> torch.Tensor:
    """The ring of every coefficient of ``rfft2``: int64; those beyond half a cycle per voxel are in ring ``BANDS``."""
    rows, columns = torch.fft.fftfreq(shape[0]), torch.fft.rfftfreq(shape[1])
    radius = torch.hypot(*torch.meshgrid(rows, columns, indexing="ij"))
    return (radius * 2 * BANDS).long().clamp(max=BANDS)


def power_spectrum(volume: torch.Tensor) -> torch.Tensor:
    """Mean power per frequency of a volume's axial slices: ``(D, H, W)`` -> ``(BANDS,)`` float64.

    Slices lose their mean and are tapered by a Hann window, so that the field of view's edges are no detail; their
    squared Fourier coefficients are averaged over each ring of spatial frequency, and over the slices.
    Raises :class:`InputError` for slices with fewer than 2 x ``BANDS`` voxels along an axis, which leave rings empty.
    """
    shape = (volume.shape[1], volume.shape[2])
    if min(shape) < 2 * BANDS:
        raise InputError(f"slices of {shape[0]} x {shape[1]} voxels: expected at least {2 * BANDS} along each axis")
    taper = torch.outer(*(torch.hann_window(size, dtype=torch.float32, device=volume.device) for size in shape))
    slices = volume.float()
    power = torch.fft.rfft2((slices - slices.mean((1, 2), keepdim=True)) * taper).abs().square().mean(0).double()
    rings = _rings(shape).to(volume.device).flatten()
    # Columns between the first and the last stand for their mirror images, too.
    weights = torch.full((power.shape[1],), 2.0, dtype=torch.float64, device=volume.device)
    weights[0] = 1.0
    if shape[1] % 2 == 0:
        weights[-1] = 1.0
    weights = weights.expand_as(power).flatten()
    sums = torch.zeros(2, BANDS + 1, dtype=torch.float64, device=volume.device)
    sums[0].index_add_(0, rings, power.flatten() * weights)
    sums[1].index_add_(0, rings, weights)
    return (sums[0] / sums[1])[:BANDS]


def compare_spectra(prediction: torch.Tensor, target: torch.Tensor) -> dict[str, float | None]:
    """``fine_power_db`` and ``lsd_db`` of a prediction ``(D, H, W)`` against the truth, in the same units.

    fine_power_db: 10 log10 of the prediction's mean power in the rings above ``FINE`` over the truth's: 0 dB is as
    sharp as a CT, -20 dB holds a hundredth of its fine detail, more than 0 is noisier. lsd_db: log-spectral distance
    (Gray and Markel, IEEE Trans. Acoust. Speech Signal Process. 24, 380, 1976), the root mean square over the rings of
    the same ratio in dB. Neither says that detail is where it belongs; None where the truth has no such power, and
    for slices that are too small.
    """
    if min(target.shape[1:]) < 2 * BANDS:
        return {"fine_power_db": None, "lsd_db": None}
    predicted, true = power_spectrum(prediction), power_spectrum(target)
    first = math.ceil(FINE * 2 * BANDS)
    floor = 1e-12 * float(true.sum())  # a perfectly smooth prediction has no logarithm
    if float(true.min()) <= floor:
        return {"fine_power_db": None, "lsd_db": None}
    ratio = 10 * torch.log10(predicted.clamp_min(floor) / true)
    fine = 10 * torch.log10(predicted[first:].sum().clamp_min(floor) / true[first:].sum())
    return {"fine_power_db": float(fine), "lsd_db": float(ratio.square().mean().sqrt())}
