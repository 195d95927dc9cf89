"""Calibrate the standard deviation of a trained system, and check it on other patients.

    python -m tools.calibrate --base checkpoints_enhanced/best_model.pt --data data --check test
    python -m tools.calibrate --base best_model.pt --data data --splits val train --check test
    python -m tools.calibrate --cascade hybrid_vit_cascade/checkpoints/quick_2stage --samples 8 --data data --check test

The direct system gets a table (xray2ct/inference/uncertainty.py) for ``reconstruct.py --std``, ``NAME.std.json`` beside
the weights; the cascade one factor on the standard deviation of its samples (xray2ct/inference/sample_calibration.py),
``std_calibration.json`` in its folder. Both are fitted on the patients of ``--splits``, without those that the networks
were trained on, on volumes as reconstruction writes them (``--consistency``). ``--check`` says which share of the
body's voxels of patients of another split lies within 1 and 2 standard deviations.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from dataset import PatientDataset
from hybrid_vit_cascade.cascade import DEFAULT_STEPS
from hybrid_vit_cascade.system import SamplesMean, load_cascade_system
from xray2ct.checkpoints import check_compatible
from xray2ct.command_line import Parser
from xray2ct.data.splits import SPLITS
from xray2ct.evaluation.protocols import scanned_body
from xray2ct.evaluation.record import measured
from xray2ct.evaluation.statistics import expected_coverage, summarise
from xray2ct.files import InputError, check_writable, run_cli, write_json
from xray2ct.geometry.projector import unit_to_hu
from xray2ct.inference import sample_calibration, uncertainty
from xray2ct.inference.consistency import (
    add_consistency_argument,
    add_data_consistency_argument,
    how_of,
    make_consistent,
    refuse_measured,
    steps_of,
)
from xray2ct.inference.predictor import Predictor
from xray2ct.inference.sample_calibration import SampleCalibration
from xray2ct.inference.system import DirectSystem
from xray2ct.inference.uncertainty import Calibration, calibration_path, local_contrast
from xray2ct.progress import progress_bar

VOXELS = 100_000  # of a patient's body that are looked at, at most
FEWEST_PATIENTS = 2
SAMPLES = 8


class DirectCalibrator:
    """The direct system's calibration: a table by HU and contrast."""

    def __init__(self, args: argparse.Namespace):
        self.system = DirectSystem(args.base, args.refinement, args.device)
        self.output = calibration_path(args.refinement or args.base)
        self.predict = self.system.predict_item

    def features(self, hu: np.ndarray) -> tuple[np.ndarray, ...]:
        """What the standard deviation follows from, maps ``(D, H, W)`` of the last volume, which is ``hu``."""
        return hu, local_contrast(hu)

    def fit(self, values: np.ndarray, consistency: dict | None) -> Calibration:
        """The calibration from features and errors ``(3, N)``."""
        hu, contrast, error = values
        weights = [str(loaded.weights) for loaded in self.system.checkpoints()]
        return uncertainty.fit(hu, contrast, error, weights, consistency)

    def coverage(self, calibration: Calibration, values: np.ndarray) -> dict[str, float]:
        """:func:`coverage_of` features and errors ``(3, N)``."""
        hu, contrast, error = values
        return coverage_of(np.abs(error) / calibration.look_up(hu, contrast), calibration.factor95)


class CascadeCalibrator:
    """The cascade's calibration: a factor on the standard deviation of its samples."""

    def __init__(self, args: argparse.Namespace):
        options = {"max_stages": args.max_stages, "device": args.device, "data_consistency": args.data_consistency}
        self.system = load_cascade_system(args.cascade, args.samples, args.steps, args.seed, **options)
        self.system.progress = partial(progress_bar, desc="Sampling", unit="steps", leave=False)
        self.output = Path(args.cascade) / sample_calibration.NAME
        self.predict = SamplesMean(self.system, args.samples)

    def features(self, hu: np.ndarray) -> tuple[np.ndarray, ...]:
        assert self.predict.std is not None
        low, high = self.system.hu_window
        return (self.predict.std.numpy() * (high - low),)

    def fit(self, values: np.ndarray, consistency: dict | None) -> SampleCalibration:
        weights, samples = self.system.checkpoints()[0].weights, self.predict.samples
        assert isinstance(weights, dict)
        return sample_calibration.fit(self._ratio(values), samples, self.system.sampling(), consistency, weights)

    def coverage(self, calibration: SampleCalibration, values: np.ndarray) -> dict[str, float]:
        """As :meth:`DirectCalibrator.coverage`, and without the factor, which a perfect model would not need."""
        ratio = self._ratio(values)
        plain = {f"samples_within_{k}sd": float((ratio <= k).mean()) for k in (1, 2)}
        return {**plain, **coverage_of(ratio / calibration.factor, calibration.factor95)}

    def _ratio(self, values):
        std, error = values
        return np.divide(np.abs(error), std, out=np.full_like(error, np.inf), where=std > 0)


def open_split(system: Predictor, root, split: str, cache_dir=None) -> PatientDataset:
    """The patients of a split that the system was not trained on, which are named."""
    size, common = system.volume_size[0], {"cache_dir": cache_dir, "xray_normalization": system.xray_normalization}
    data = PatientDataset(root, split, size, system.xray_size, seen=system.seen_channel, **common)
    trained: set[str] = set()
    for loaded in system.checkpoints():
        check_compatible(loaded.path, loaded.header, **data.acquisition.to_dict())
        trained |= set(loaded.header["train_patients"])
    kept = [patient for patient in data.ids if patient not in trained]
    if len(kept) < len(data.ids):
        print(f"note: {len(data.ids) - len(kept)} of {len(data.ids)} patients of {split} were trained on: left out")
    data.ids = kept
    return data


def body_voxels(
    calibrator: DirectCalibrator | CascadeCalibrator, data: PatientDataset, index: int, steps: int
) -> np.ndarray:
    """Features and error in HU, ``(features + 1, N)``, of voxels in a patient's body, drawn by the patient's id.

    steps: of projection consistency, as reconstruction takes them.
    """
    item, system = data[index], calibrator.system
    body = scanned_body(item["ct_volume"][0], item["mask"][0], data.hu_window, data.geometry.fov_mm).numpy()
    volume, xrays = calibrator.predict(item)[None, None], system.item_xrays(item)
    volume, _ = make_consistent(system, volume, xrays, steps, not data.has_manifest)
    hu = unit_to_hu(volume[0, 0], data.hu_window).numpy()
    error = hu - unit_to_hu(item["ct_volume"][0], data.hu_window).numpy()
    values = np.stack([array[body] for array in (*calibrator.features(hu), error)])
    return values[:, np.random.default_rng(zlib.crc32(item["id"].encode())).permutation(values.shape[1])[:VOXELS]]


def coverage_of(ratio: np.ndarray, factor95: float) -> dict[str, float]:
    """Shares of errors within 1 sd, within 2 sd as calibrated (``factor95``), and within twice the sd.

    ratio: absolute errors over the calibrated standard deviation.
    """
    limits = {"within_1sd": 1.0, "within_2sd": factor95, "within_twice_the_sd": 2.0}
    return {name: float((ratio <= limit).mean()) for name, limit in limits.items()}


def voxels_of(calibrator, split: str, steps: int, args: argparse.Namespace, title: str) -> dict[str, np.ndarray]:
    """:func:`body_voxels` of each patient of a split, by id."""
    data = open_split(calibrator.system, args.data, split, args.cache_dir)
    refuse_measured(calibrator.system, not data.has_manifest)
    bar = progress_bar(range(len(data)), desc=f"{title} on {split}", unit="patients")
    return {data.ids[index]: body_voxels(calibrator, data, index, steps) for index in bar}


def coverages(calibrator, calibration, patients: dict[str, np.ndarray]) -> dict:
    """Coverage of each patient, and its statistics."""
    rows = [{"id": patient, **calibrator.coverage(calibration, values)} for patient, values in patients.items()]
    return {"rows": rows, "summary": summarise([dict(row) for row in rows])}


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--base", help="stage-1 checkpoint")
    which.add_argument("--cascade", metavar="DIR", help="checkpoint folder of hybrid_vit_cascade")
    parser.add_argument("--refinement", help="stage-2 checkpoint: its volumes are calibrated, and the file is its own")
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument("--splits", nargs="+", default=["val"], choices=SPLITS, help="to calibrate on (default val)")
    parser.add_argument("--check", choices=SPLITS, help="split to check on, which is none of --splits")
    add_consistency_argument(parser)
    parser.add_argument("--output", type=Path, help="default: beside the weights, where it is looked for")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="cascade: of each patient (default %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="cascade: of each stage and sample (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="cascade: of the samples' noise (default %(default)s)")
    parser.add_argument("--max-stages", type=int, help="cascade: stop after this many stages")
    add_data_consistency_argument(parser)
    args = parser.parse_args(argv)
    if args.check in args.splits:
        parser.error(f"--check {args.check}: is one of --splits; expected patients that are not calibrated on")
    if args.refinement and args.cascade:
        parser.error("--refinement belongs to --base, not to --cascade")
    if args.samples < 2:
        parser.error(f"--samples {args.samples}: one sample has no standard deviation; expected at least 2")
    if args.data_consistency and not args.cascade:
        parser.error("--data-consistency belongs to --cascade")
    return args


def print_coverage(rows: dict, where: str, expected: dict[str, float]) -> None:
    """The mean shares of voxels, and those of the patients with the lowest and the highest."""
    for name, statistics in rows["summary"].items():
        shares = [row[name] for row in rows["rows"]]
        perfect = f"; {expected[name]:.3f} for a perfect model" if name in expected else ""
        limits = f"{min(shares):.3f} to {max(shares):.3f}, {len(shares)} patients of {where}"
        print(f"{name:22}{statistics['mean']:.3f} of the body's voxels ({limits}){perfect}")


def main(argv=None) -> int:
    args = parse_args(argv)
    steps_of(args.consistency)
    calibrator = CascadeCalibrator(args) if args.cascade else DirectCalibrator(args)
    output = args.output or calibrator.output
    check_writable(output, "--output")
    steps = steps_of(args.consistency, calibrator.system.consistency_validated)
    fitted: dict[str, np.ndarray] = {}
    for split in args.splits:
        fitted |= voxels_of(calibrator, split, steps, args, "Calibrating")
    if len(fitted) < FEWEST_PATIENTS:
        raise InputError(
            f"--splits {' '.join(args.splits)}: {len(fitted)} patients of {args.data} that were not trained on;"
            f" expected at least {FEWEST_PATIENTS}, better 20"
        )
    calibration = calibrator.fit(np.concatenate(list(fitted.values()), axis=1), how_of(steps))
    result = {**calibration.to_dict(), "patients": list(fitted)}
    factor = f"standard deviation of the samples x {calibration.factor:.3f}; " if args.cascade else ""
    print(f"{len(fitted)} patients: {factor}95.45 % of the errors lie within {calibration.factor95:.2f} of them")
    perfect = {f"samples_within_{k}sd": expected_coverage(args.samples)[f"coverage_{k}sd"] for k in (1, 2)}
    result["coverage"] = coverages(calibrator, calibration, fitted)
    if args.check:
        checked = voxels_of(calibrator, args.check, steps, args, "Checking")
        result["checked"] = {"split": args.check, **coverages(calibrator, calibration, checked)}
    if args.cascade:
        result["expected"] = perfect
    for where, key in ((" and ".join(args.splits), "coverage"), (args.check, "checked")):
        if key in result:
            print_coverage(result[key], where, perfect)
    made = measured("tools.calibrate", sys.argv[1:] if argv is None else argv, calibrator.system)
    write_json(output, result | {"measured": made})
    print(f"{output}: written")
    return 0


if __name__ == "__main__":
    run_cli(main)
