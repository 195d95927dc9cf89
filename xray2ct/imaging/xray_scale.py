"""From the values of a picture to the scale that the networks know: the named normalisations."""

from __future__ import annotations

import numpy as np

from xray2ct.files import InputError

NORMALIZATIONS = ("auto", "manifest", "percentile", "histogram")
# 1st and 99th percentile of the project's own X-rays (PA, lateral): means over 25 public chest CTs rendered with
# the default geometry and scale; an X-ray of unknown scale is stretched onto them.
REFERENCE_PERCENTILES = ((0.01, 0.53), (0.0, 0.74))
# The whole distribution, for pictures whose values are any increasing function of attenuation: percentiles, and
# the values there (PA, lateral), means over the same X-rays.
HISTOGRAM_PERCENTILES = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
REFERENCE_HISTOGRAMS = (
    (0.005, 0.008, 0.029, 0.056, 0.138, 0.202, 0.248, 0.287, 0.321, 0.354, 0.394, 0.449, 0.486, 0.528, 0.562),
    (0.0, 0.0, 0.0, 0.001, 0.012, 0.057, 0.130, 0.241, 0.358, 0.442, 0.506, 0.591, 0.648, 0.736, 0.806),
)
# The same inside the body (see body_level), in the rows that the CT covers: means over 20 public chest CTs.
BODY_HISTOGRAMS = (
    (0.195, 0.199, 0.211, 0.224, 0.249, 0.276, 0.306, 0.336, 0.365, 0.397, 0.439, 0.485, 0.509, 0.541, 0.579),
    (0.274, 0.281, 0.304, 0.326, 0.361, 0.388, 0.413, 0.442, 0.475, 0.515, 0.564, 0.621, 0.656, 0.716, 0.771),
)
BODY_PERCENTILE, BODY_MARGIN = 2.0, 0.3
# 99th percentiles of rendered X-rays lay between 0.76 and 1.23 times the mean on 25 public chest CTs.
OWN_LEVELS = (0.65, 1.3)
AIR = 0.0  # what no body stands before, on the networks' scale


def normalise(path, raw: np.ndarray, full_scale: float, normalization: str, view: int) -> np.ndarray:
    """``raw`` (H, W), NaN where nothing is shown, on the networks' scale [0, 1], NaN kept.

    normalization: ``manifest`` divides by ``full_scale``; ``percentile``, ``histogram`` and ``body`` map the values
    onto those of rendered X-rays of ``view`` (0 PA, 1 lateral): linearly, by the distribution of the whole picture, or
    by that inside the body. Raises :class:`InputError` naming ``path`` for values that do not allow it.
    """
    if normalization == "percentile":
        low, high = np.nanpercentile(raw, [1, 99])
        if high <= low:
            raise InputError(f"{path}: 98 % of the pixels have the same value; expected an X-ray")
        to_low, to_high = REFERENCE_PERCENTILES[view]
        return ((raw - low) / (high - low) * (to_high - to_low) + to_low).clip(0.0, 1.0)
    if normalization == "histogram":
        return _match(path, raw, raw, REFERENCE_HISTOGRAMS[view])
    if normalization == "body":
        return _match(path, raw, raw[raw >= body_level(raw)], BODY_HISTOGRAMS[view])
    low, high = float(np.nanmin(raw)), float(np.nanmax(raw))
    if low < -1e-6 * full_scale or high > (1 + 1e-6) * full_scale or high - low < full_scale / 16:
        raise InputError(
            f"{path}: values {low:g} to {high:g}; expected 0 to {full_scale:g}"
            " (an X-ray of unknown scale, such as 12 bits in a file of 16, needs the normalization 'percentile')"
        )
    return (raw / full_scale).clip(0.0, 1.0)


def body_level(raw: np.ndarray) -> float:
    """The value that divides body from air: the 2nd percentile of the middle 40 % of the rows and columns.

    The middle of a chest film shows lung, heart and spine, no air beside the patient; what is darker than the lungs
    there is air. Any increasing curve of the values leaves the division as it is.
    """
    rows, columns = raw.shape
    down, across = int(BODY_MARGIN * rows), int(BODY_MARGIN * columns)
    middle = raw[down : rows - down, across : columns - across]
    return float(np.nanpercentile(middle if np.isfinite(middle).any() else raw, BODY_PERCENTILE))


def _match(path, raw, sample, reference) -> np.ndarray:
    """Give ``sample`` of ``raw`` the ``reference`` distribution: piecewise linear between its percentiles.

    Increasing, so that order is kept. Values below the sample (air, where the sample is the body) run down to 0.
    """
    percentiles = np.nanpercentile(sample, HISTOGRAM_PERCENTILES)
    levels, where = np.unique(percentiles, return_inverse=True)
    if len(levels) < 4:
        raise InputError(f"{path}: most pixels have the same value; expected an X-ray")
    # A value that many pixels share (air, a burnt-in frame) spans percentiles: it gets their mean.
    targets = np.bincount(where, weights=np.asarray(reference)) / np.bincount(where)
    lowest = float(np.nanmin(raw))
    if lowest < levels[0]:
        levels, targets = np.insert(levels, 0, lowest), np.insert(targets, 0, AIR)
    return np.interp(raw, levels, targets).astype(raw.dtype, copy=False)


def has_own_scale(pixels: np.ndarray) -> bool:
    """True where ``pixels``, finite, are as bright as the project's own X-rays of either view."""
    if pixels.ndim != 2 or not pixels.size or pixels.min() < 0 or pixels.max() >= 1:
        return False
    low, level = np.percentile(pixels, [1, 99])
    usual = REFERENCE_PERCENTILES[0][1], REFERENCE_PERCENTILES[1][1]
    return bool(low < 0.2 and OWN_LEVELS[0] * usual[0] < level < OWN_LEVELS[1] * usual[1])
