"""Calibrated standard deviation of a generative model's samples: one factor, from its errors on other patients.

Of K samples a voxel has the mean m and the standard deviation s (n - 1). Where the truth spreads c times as widely as
the samples do, around the same mean,

    (truth - m) / (s sqrt(c^2 + 1 / K))    follows Student's t with K - 1 degrees of freedom:

1 / K is the error of m itself, and t stands for that of s. c, the ``spread_ratio``, does not depend on K: 1 for a
perfect model, more where the samples are too much alike. 68.27 % of the errors then lie within ``factor(K) s``,

    factor(K) = sqrt(c^2 + 1 / K) t,    t: the 84.13 % quantile of Student's t with K - 1 degrees of freedom

(1.14 for a perfect model of 8 samples). tools/calibrate.py measures the factor where 68.27 % of the errors lie within,
and c follows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from xray2ct.files import InputError, read_json
from xray2ct.inference.uncertainty import ONE_SD, TWO_SD

NAME = "std_calibration.json"  # in a cascade's checkpoint folder
FORMAT = 1


@dataclass
class SampleCalibration:
    """A factor on the standard deviation of samples, after which it covers 68.27 % of all errors.

    samples: K, of the calibration. factor: of K samples' standard deviation. factor95: multiple of the standard
    deviation, factor included, that covers 95.45 %. spread_ratio: c, see above. sampling: how samples are drawn (steps
    and the like). consistency: of their mean, as :func:`consistency.how_of` says it; None: as it is. weights:
    fingerprint of each stage. patients: whose errors were looked at.
    """

    samples: int
    factor: float
    factor95: float
    spread_ratio: float
    sampling: dict
    consistency: dict | None
    weights: dict[str, str]
    patients: list[str] = field(default_factory=list)

    def for_samples(self, samples: int) -> SampleCalibration:
        """The calibration of another number of samples: by c and Student's t."""
        if samples == self.samples:
            return self
        one, two = _student(samples)
        here, there = _student(self.samples)
        return replace(
            self,
            samples=samples,
            factor=math.sqrt(self.spread_ratio**2 + 1 / samples) * one,
            factor95=self.factor95 * (two / one) / (there / here),
        )

    def to_dict(self) -> dict:
        return {"format": FORMAT, **asdict(self)}


def _student(samples: int) -> tuple[float, float]:
    """Half-widths of Student's t with K - 1 degrees of freedom that hold 68.27 and 95.45 %."""
    one, two = (float(stdtrit(samples - 1, (1 + share) / 2)) for share in (ONE_SD, TWO_SD))
    return one, two


def fit(
    ratio: np.ndarray, samples: int, sampling: dict, consistency: dict | None, weights: dict[str, str]
) -> SampleCalibration:
    """The calibration from voxels of other patients.

    ratio: absolute error of the mean of K samples over their standard deviation, ``(N,)``; infinite where all samples
    are the same. Raises :class:`InputError` where that is so for too many voxels.
    """
    one, two = (float(np.quantile(ratio, share, method="higher")) for share in (ONE_SD, TWO_SD))
    if not 0 < one <= two < math.inf:
        alike = float(np.isinf(ratio).mean())
        raise InputError(f"{alike:.1%} of the body's voxels are the same in all {samples} samples: no factor fits")
    spread = (one / _student(samples)[0]) ** 2 - 1 / samples
    ratio_of = math.sqrt(max(spread, 0.0))
    return SampleCalibration(
        samples, round(one, 4), round(two / one, 4), round(ratio_of, 4), sampling, consistency, weights
    )


def read_sample_calibration(
    path: Path, weights: dict[str, str], samples: int, sampling: dict, consistency: dict | None
) -> tuple[SampleCalibration | None, str]:
    """The calibration in a file, for ``samples`` samples of a system, and why there is none otherwise.

    weights, sampling, consistency: of the system that it is used with. Without a file, or with one of other stages or
    of samples drawn otherwise, there is none. Raises :class:`InputError` naming the file when it is malformed or of
    other weights of the same stages.
    """
    if not path.exists():
        return None, f"there is no {path}; tools/calibrate.py --cascade makes one"
    found = read_json(path)
    try:
        entries = {key: found[key] for key in SampleCalibration.__dataclass_fields__}
        numbers = entries["factor"], entries["factor95"], 1 + entries["spread_ratio"]
        usable = found["format"] == FORMAT and all(0 < number < math.inf for number in numbers)
        usable &= isinstance(entries["weights"], dict) and isinstance(entries["sampling"], dict)
        usable &= (
            isinstance(entries["patients"], list) and isinstance(entries["samples"], int) and found["samples"] >= 2
        )
    except (KeyError, TypeError, ValueError):
        usable = False
    if not usable:
        raise InputError(f"{path}: is not what tools/calibrate.py --cascade writes; expected a factor, format 1")
    calibration = SampleCalibration(**entries)
    for stage in calibration.weights.keys() & weights.keys():
        if calibration.weights[stage] != weights[stage]:
            raise InputError(
                f"{path}: is of other weights of stage {stage} ({calibration.weights[stage]}, these are"
                f" {weights[stage]}); run tools/calibrate.py --cascade for them, or remove it"
            )
    wanted = {"stages": list(weights), **sampling, "consistency": consistency}
    made = {"stages": list(calibration.weights), **calibration.sampling, "consistency": calibration.consistency}
    for key in wanted.keys() | made.keys():
        if wanted.get(key) != made.get(key):
            return None, f"{path} is of samples with {key} {made.get(key)}, these are with {wanted.get(key)}"
    return calibration.for_samples(samples), ""
