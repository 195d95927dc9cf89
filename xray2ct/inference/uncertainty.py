"""Calibrated standard deviation of a regression's volume: how far off it was on other patients where it looked alike.

A network that predicts one volume has no spread. But its errors on patients that it was not trained on are known, and
they are largest where the prediction itself is uneven: at organs' surfaces, which lie a little off. So the half-width
of these errors is tabulated by predicted HU and by local contrast (both in bins of equal counts), scaled so that
68.27 % of all lie within it, and looked up for a new volume, without a further pass of the network
(``tools/calibrate.py``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy

from xray2ct.files import InputError, read_json
from xray2ct.weights import find

ONE_SD, TWO_SD = 0.6827, 0.9545  # what 1 and 2 standard deviations of a Gaussian cover
BINS = 10  # of predicted HU, and of contrast
WINDOW = 3  # voxels along each axis, in which the contrast is measured
FEWEST = 200  # voxels that a cell of the table needs; with fewer it takes the half-width of its whole range of HU
FORMAT = 1


@dataclass
class Calibration:
    """Half-widths in HU that cover 68.27 % of all errors, by predicted HU (rows) and local contrast (columns).

    value_edges, contrast_edges: inner edges of the bins, in HU. factor95: multiple of the half-width that covers
    95.45 %: 2 for Gaussian errors, more for errors with heavier tails. weights: fingerprints of the checkpoints.
    consistency: with which the volumes were made, as :func:`consistency.how_of` says it; None: plain predictions.
    """

    value_edges: list[float]
    contrast_edges: list[float]
    std_hu: list[list[float]]
    factor95: float
    weights: list[str]
    consistency: dict | None = None

    def std(self, hu: np.ndarray) -> np.ndarray:
        """Standard deviation in HU, float32, of a volume ``(D, H, W)`` in HU."""
        return self.look_up(hu, local_contrast(hu))

    def look_up(self, hu: np.ndarray, contrast: np.ndarray) -> np.ndarray:
        """Standard deviation in HU, float32, of voxels by their HU and :func:`local_contrast`, of any one shape."""
        return np.asarray(self.std_hu, dtype=np.float32)[_cells(hu, contrast, self.value_edges, self.contrast_edges)]

    def to_dict(self) -> dict:
        return {"format": FORMAT, **asdict(self)}


def local_contrast(hu: np.ndarray) -> np.ndarray:
    """Standard deviation over 3 x 3 x 3 voxels, float32, of a volume ``(D, H, W)``; its edge is continued outside."""
    values = hu.astype(np.float64)
    mean = scipy.ndimage.uniform_filter(values, WINDOW, mode="nearest")
    variance = scipy.ndimage.uniform_filter(values * values, WINDOW, mode="nearest") - mean * mean
    return np.sqrt(variance.clip(0)).astype(np.float32)


def _cells(hu, contrast, value_edges, contrast_edges) -> tuple[np.ndarray, np.ndarray]:
    return np.digitize(hu, value_edges), np.digitize(contrast, contrast_edges)


def fit(
    hu: np.ndarray, contrast: np.ndarray, error_hu: np.ndarray, weights: list[str], consistency: dict | None = None
) -> Calibration:
    """The table from voxels of calibration patients: HU, contrast and error of their volumes, ``(N,)`` each."""
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    edges = [np.quantile(values, inner).tolist() for values in (hu, contrast)]
    rows, columns = _cells(hu, contrast, *edges)
    error = np.abs(error_hu)
    table = np.zeros((BINS, BINS))
    for row in range(BINS):
        inside = rows == row
        whole = _width(error[inside] if inside.any() else error)
        for column in range(BINS):
            cell = error[inside & (columns == column)]
            table[row, column] = _width(cell) if len(cell) >= FEWEST else whole
    table = table.clip(1.0)  # HU: volumes are written as whole numbers
    table *= np.quantile(error / table[rows, columns], ONE_SD)
    factor = float(np.quantile(error / table[rows, columns], TWO_SD))
    return Calibration(*edges, table.round(2).tolist(), round(factor, 3), weights, consistency)


def _width(error: np.ndarray) -> float:
    """Half-width of absolute errors, as of a Gaussian: the mean of what 68.27 and 95.45 % of them say."""
    one, two = np.quantile(error, (ONE_SD, TWO_SD))
    return float(one + two / 2) / 2


def _volumes(consistency: dict | None) -> str:
    """How volumes are made, in words."""
    if not consistency:
        return "plain predictions"
    return f"volumes with projection consistency ({', '.join(f'{key} {value}' for key, value in consistency.items())})"


def calibration_path(checkpoint) -> Path:
    """Where the calibration of a system lies: beside the checkpoint of its last stage, ``NAME.std.json``.

    checkpoint: a path, or the name of shipped weights.
    """
    return find(checkpoint).with_suffix(".std.json")


def read_calibration(checkpoint, weights: list[str], consistency: dict | None = None) -> Calibration:
    """The calibration beside ``checkpoint`` for volumes of a system with these weights (fingerprints).

    consistency: how the volumes are made, as :func:`consistency.how_of` says it; a file without the key is of plain
    predictions. Raises :class:`InputError` naming the file when it is missing, malformed, of other weights, or of
    volumes that were made otherwise.
    """
    path = calibration_path(checkpoint)
    if not path.exists():
        raise InputError(
            f"{path}: no calibration beside the weights; run: python -m tools.calibrate (docs/uncertainty.md)"
        )
    found = read_json(path)
    try:
        entries = {key: found[key] for key in Calibration.__dataclass_fields__ if key != "consistency"}
        entries["consistency"] = found.get("consistency")
        shape = np.asarray(entries["std_hu"], dtype=np.float64).shape
        expected = tuple(len(entries[key]) + 1 for key in ("value_edges", "contrast_edges"))
        usable = found["format"] == FORMAT and shape == expected and float(entries["factor95"]) > 0
        usable &= entries["consistency"] is None or entries["consistency"]["steps"] > 0
    except (KeyError, TypeError, ValueError):
        usable = False
    if not usable:
        raise InputError(
            f"{path}: is not what tools/calibrate.py writes; expected a table of standard deviations, format 1"
        )
    if entries["weights"] != weights:
        raise InputError(
            f"{path}: is of the weights {'+'.join(map(str, entries['weights']))}, these are {'+'.join(weights)}; run"
            " tools/calibrate.py for them"
        )
    if entries["consistency"] != consistency:
        made, wanted = (one["steps"] if one else "off" for one in (entries["consistency"], consistency))
        hint = f"expected --consistency {made}, or run" if made != wanted else "run"
        raise InputError(
            f"{path}: is of {_volumes(entries['consistency'])}, not of {_volumes(consistency)};"
            f" {hint} tools/calibrate.py --consistency {wanted} for these"
        )
    return Calibration(**entries)
