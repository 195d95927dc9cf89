"""Calibrate the standard deviation of a trained direct system, for ``reconstruct.py --std``, and check it on others.

    python -m tools.calibrate --base checkpoints_enhanced/best_model.pt --data data --check test
    python -m tools.calibrate --base best_model.pt --data data --splits val train --check test

The table (xray2ct/inference/uncertainty.py) is fitted on the patients of ``--splits``, without those that the network
was trained on, and written beside the weights as ``NAME.std.json``. ``--check`` says which share of the body's voxels
of patients of another split lies within 1 and 2 standard deviations.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path

import numpy as np

from dataset import PatientDataset
from xray2ct.checkpoints import check_compatible
from xray2ct.command_line import Parser
from xray2ct.data.splits import SPLITS
from xray2ct.evaluation.protocols import scanned_body
from xray2ct.evaluation.record import measured
from xray2ct.evaluation.statistics import summarise
from xray2ct.files import InputError, check_writable, run_cli, write_json
from xray2ct.geometry.projector import unit_to_hu
from xray2ct.inference.system import DirectSystem
from xray2ct.inference.uncertainty import Calibration, calibration_path, fit, local_contrast
from xray2ct.progress import progress_bar

VOXELS = 100_000  # of a patient's body that are looked at, at most
FEWEST_PATIENTS = 2


def open_split(system: DirectSystem, root, split: str, cache_dir=None) -> PatientDataset:
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


def body_voxels(system: DirectSystem, data: PatientDataset, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted HU, contrast and error ``(N,)`` of voxels in a patient's body, drawn by the patient's id."""
    item = data[index]
    body = scanned_body(item["ct_volume"][0], item["mask"][0], data.hu_window, data.geometry.fov_mm).numpy()
    hu = unit_to_hu(system.predict_item(item), data.hu_window).numpy()
    error = hu - unit_to_hu(item["ct_volume"][0], data.hu_window).numpy()
    values = np.stack([array[body] for array in (hu, local_contrast(hu), error)])
    chosen = np.random.default_rng(zlib.crc32(item["id"].encode())).permutation(values.shape[1])[:VOXELS]
    hu, contrast, error = values[:, chosen]
    return hu, contrast, error


def coverage_of(calibration: Calibration, hu, contrast, error) -> dict[str, float]:
    """Shares of errors within 1 sd, within 2 sd as calibrated (``factor95``), and within twice the sd."""
    table = np.asarray(calibration.std_hu)
    std = table[np.digitize(hu, calibration.value_edges), np.digitize(contrast, calibration.contrast_edges)]
    ratio = np.abs(error) / std
    limits = {"within_1sd": 1.0, "within_2sd": calibration.factor95, "within_twice_the_sd": 2.0}
    return {name: float((ratio <= limit).mean()) for name, limit in limits.items()}


def calibrate(system: DirectSystem, args: argparse.Namespace) -> tuple[Calibration, list[str]]:
    """The calibration from all splits of ``--splits``, and its patients."""
    parts, patients = [], []
    for split in args.splits:
        data = open_split(system, args.data, split, args.cache_dir)
        bar = progress_bar(range(len(data)), desc=f"Calibrating on {split}", unit="patients")
        parts += [body_voxels(system, data, index) for index in bar]
        patients += data.ids
    if len(patients) < FEWEST_PATIENTS:
        raise InputError(
            f"--splits {' '.join(args.splits)}: {len(patients)} patients of {args.data} that were not trained on;"
            f" expected at least {FEWEST_PATIENTS}, better 20"
        )
    weights = [loaded.weights for loaded in system.checkpoints()]
    hu, contrast, error = (np.concatenate(values) for values in zip(*parts))
    return fit(hu, contrast, error, [str(one) for one in weights]), patients


def check(system: DirectSystem, calibration: Calibration, args: argparse.Namespace) -> list[dict]:
    """Coverage of each patient of ``--check``."""
    data = open_split(system, args.data, args.check, args.cache_dir)
    bar = progress_bar(range(len(data)), desc=f"Checking on {args.check}", unit="patients")
    return [{"id": data.ids[i], **coverage_of(calibration, *body_voxels(system, data, i))} for i in bar]


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--base", required=True, help="stage-1 checkpoint")
    parser.add_argument("--refinement", help="stage-2 checkpoint: its volumes are calibrated, and the file is its own")
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument("--splits", nargs="+", default=["val"], choices=SPLITS, help="to calibrate on (default val)")
    parser.add_argument("--check", choices=SPLITS, help="split to check on, which is none of --splits")
    parser.add_argument("--output", type=Path, help="default: beside the weights, NAME.std.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    args = parser.parse_args(argv)
    if args.check in args.splits:
        parser.error(f"--check {args.check}: is one of --splits; expected patients that are not calibrated on")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    output = args.output or calibration_path(args.refinement or args.base)
    check_writable(output, "--output")
    system = DirectSystem(args.base, args.refinement, args.device)
    calibration, patients = calibrate(system, args)
    result = {**calibration.to_dict(), "patients": patients}
    print(f"{len(patients)} patients: 95.45 % of the errors lie within {calibration.factor95:.2f} standard deviations")
    if args.check:
        rows = check(system, calibration, args)
        result["checked"] = {"split": args.check, "rows": rows, "summary": summarise([dict(row) for row in rows])}
        for name, statistics in result["checked"]["summary"].items():
            print(f"{name:22}{statistics['mean']:.3f} of the body's voxels, {statistics['n']} patients of {args.check}")
    write_json(
        output, result | {"measured": measured("tools.calibrate", sys.argv[1:] if argv is None else argv, system)}
    )
    print(f"{output}: written")
    return 0


if __name__ == "__main__":
    run_cli(main)
