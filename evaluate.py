r"""Score one or both stages on a split, beside the mean-training-volume predictor.

    python evaluate.py --data data --split test --base checkpoints_enhanced/best_model.pt --output results
    python evaluate.py --data data --base checkpoints_enhanced/best_model.pt \
        --refinement checkpoints_refinement/best_refinement.pt --output results_256

Writes ``per_patient.csv`` (one row per method and patient), ``summary.json`` (mean, sd, n, 95 % bootstrap interval,
paired differences to the baseline, protocols, hashes) and ``pictures/ID.png`` into the output folder.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoints import check_compatible
from dataset import PatientDataset, mean_volume
from engine import keep_freed_memory
from figures import save_panel
from files import InputError, atomic_path, run_cli, write_json
from metrics import paired_interval, score_volume, summarise
from model_enhanced import RefinementNetwork, upsample
from pipeline import DirectSystem, add_tile_argument
from splits import SPLITS

# A method turns a data set's item into a volume (D, H, W) in [0, 1].
Predictor = Callable[[dict], torch.Tensor]

BASELINE = "mean_volume"
TRILINEAR = "trilinear"
PROTOCOLS = {
    "psnr_strict": "dB; whole volume, peak = width of the HU window",
    "psnr_strict_masked": "dB; inside the scan only, peak = width of the HU window",
    "psnr_x2ct": "dB; X2CT-GAN: integer HU, slice-wise over three axes, peak 4095 (reads 4.3 dB and more above strict)",
    "ssim_3d": "3D, Gaussian window of sigma 1.5, data range 1",
    "ssim_slices": "2D 7 x 7 uniform window, mean over slices of three axes, data range 1",
    "mae_hu": "HU; mean absolute error, whole volume",
    "rmse_hu": "HU; root mean squared error, whole volume",
}


def system_predictors(system: DirectSystem) -> dict[str, Predictor]:
    """The trained system's methods: stage 1 alone, or stage 2 beside plain upsampling and its ceiling.

    ``trilinear`` upsamples the same stage-1 volume; ``perfect_64`` the true volume at stage 1's resolution: what
    interpolation alone would reach after a perfect stage 1.
    """

    def predict(item: dict) -> torch.Tensor:
        return system.predict(item["xrays"].unsqueeze(0))[0, 0].float().cpu()

    def trilinear(item: dict) -> torch.Tensor:
        return upsample(system.coarse(item["xrays"].unsqueeze(0)))[0, 0].cpu()

    def perfect(item: dict) -> torch.Tensor:
        return upsample(F.avg_pool3d(item["ct_volume"].unsqueeze(0), RefinementNetwork.scale))[0, 0]

    if system.refinement is None:
        return {"model": predict}
    return {"refined": predict, TRILINEAR: trilinear, f"perfect_{system.model.volume_size[0]}": perfect}


def mean_predictor(data: PatientDataset) -> Predictor:
    """The mean of the training split's volumes, whatever the X-rays show."""
    data.build_cache(progress=partial(tqdm, desc="Training volumes", unit="patient", leave=False))
    volume = mean_volume(data)[0]
    return lambda item: volume


def score_patients(data: PatientDataset, predictors: dict[str, Predictor], picture=None) -> list[dict]:
    """Rows ``{"method", "id", <scores>, "seconds"}`` for every method and patient.

    picture: called with ``(item, prediction of the first method, its scores)`` for each patient.
    """
    rows = []
    for index in tqdm(range(len(data)), desc="Evaluating", unit="patient"):
        item = data[index]
        target, mask = item["ct_volume"][0], item["mask"][0]
        for position, (method, predict) in enumerate(predictors.items()):
            start = time.perf_counter()
            volume = predict(item)
            seconds = time.perf_counter() - start
            scores = score_volume(volume, target, mask, data.hu_window)
            rows.append({"method": method, "id": item["id"], **scores, "seconds": seconds})
            if picture is not None and position == 0:
                picture(item, volume, scores)
    return rows


def summary_of(rows: list[dict]) -> dict:
    """Statistics per method, and of each method's paired differences to the baselines."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    per_method = {m: [r for r in rows if r["method"] == m] for m in methods}
    summary = {"methods": {m: summarise(r) for m, r in per_method.items()}}
    for reference in (BASELINE, TRILINEAR):
        if reference in methods:
            summary[f"minus_{reference}"] = {
                method: differences(per_method[method], per_method[reference])
                for method in methods
                if method != reference
            }
    return summary


def differences(rows: list[dict], others: list[dict]) -> dict:
    """Paired statistics of every score's difference between two methods on the same patients."""
    return {metric: paired_interval([r[metric] for r in rows], [r[metric] for r in others]) for metric in PROTOCOLS}


def read_rows(path, method: str, patients: list[str]) -> list[dict]:
    """Another run's rows of one method, in the order of ``patients``, from its ``per_patient.csv``.

    Raises :class:`InputError` naming the file when it is missing, of another kind, or lacks the method or a patient.
    """
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--compare {path}: cannot be read ({error}); expected a per_patient.csv") from None
    if not rows or not {"method", "id", *PROTOCOLS} <= rows[0].keys():
        raise InputError(f"--compare {path}: not a per_patient.csv of evaluate.py (method, id, scores)")
    found = {row["id"]: row for row in rows if row["method"] == method}
    if not found:
        names = ", ".join(dict.fromkeys(row["method"] for row in rows))
        raise InputError(f"--compare {path}: has no method {method!r}, only {names}")
    if set(found) != set(patients):
        odd = sorted(set(found) ^ set(patients))
        raise InputError(f"--compare {path}: other patients than scored here ({', '.join(odd[:5])})")
    try:
        return [{metric: float(found[patient][metric]) for metric in PROTOCOLS} for patient in patients]
    except (TypeError, ValueError):
        raise InputError(f"--compare {path}: a score is not a number") from None


def check_patients(data: PatientDataset, checkpoint: dict, path, split: str, allow_seen: bool) -> list[str]:
    """Patients of ``data`` that the checkpoint was trained on; :class:`InputError` unless they are allowed.

    Another split than the checkpoint's is only said: folders grow, and the patients themselves are compared.
    """
    seen = sorted(set(data.ids) & set(checkpoint["train_patients"]))
    which = f"{', '.join(seen[:5])} ({len(seen)} of the {split} split's {len(data)} patients)"
    if seen and not allow_seen:
        raise InputError(
            f"{path} was trained on {which};"
            " scores on them mean nothing for new patients (--allow-seen scores them all the same)"
        )
    if seen:
        print(f"note: {path} was trained on {which}: these scores mean nothing for new patients")
    if checkpoint["split_hash"] != data.split_hash:
        print(
            f"note: {path} was trained with another split of its data; of the {len(data)} patients scored here"
            f" {len(seen)} were in its training set, but some may have chosen its best epoch"
        )
    return seen


def write_rows(path, rows: list[dict]) -> None:
    """Write rows as CSV, atomically; numbers with six significant digits."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def print_table(summary: dict) -> None:
    """Mean and standard deviation per method, then the first method's paired gains with their intervals."""
    methods = summary["methods"]
    first = next(iter(methods))
    print(f"{'':20}" + "".join(f"{name:>18}" for name in methods))
    for metric in PROTOCOLS:
        digits = _digits(metric)
        cells = ""
        for statistics in methods.values():
            sd = statistics[metric]["sd"]
            spread = f" +- {sd:.{digits}f}" if sd is not None else ""
            cells += f"{statistics[metric]['mean']:.{digits}f}{spread}".rjust(18)
        print(f"{metric:20}{cells}")
    for key, gains in summary.items():
        if key.startswith("minus_") and first in gains:
            print(f"{first} minus {key.removeprefix('minus_')} (paired, 95 % bootstrap interval):")
            for metric in ("psnr_strict", "ssim_3d", "mae_hu"):
                print(f"  {metric:18}{_gain(gains[first][metric], _digits(metric))}")


def _digits(metric: str) -> int:
    return 3 if metric.startswith("ssim") else 1 if metric.endswith("hu") else 2


def _gain(statistics: dict, digits: int) -> str:
    interval = statistics["ci95"]
    limits = f" ({interval[0]:+.{digits}f} to {interval[1]:+.{digits}f})" if interval else ""
    return f"{statistics['mean']:+.{digits}f}{limits}, n = {statistics['n']}"


def refinement_entries(system: DirectSystem, path) -> dict:
    """What the summary says about stage 2."""
    if system.refinement is None:
        return {}
    return {
        "refinement": Path(path).name,
        "refinement_epoch": system.refinement_checkpoint["epoch"],
        "refinement_parameters": sum(p.numel() for p in system.refinement.parameters()),
        "guided": system.refinement.guidance is not None,
    }


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument("--split", default="test", choices=(*SPLITS, "all"))
    parser.add_argument("--base", required=True, help="stage-1 checkpoint")
    parser.add_argument("--refinement", help="stage-2 checkpoint: scores its 256^3 volumes beside plain upsampling")
    add_tile_argument(parser)
    parser.add_argument("--compare", metavar="CSV", help="another run's per_patient.csv: paired differences to it")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--pictures", type=int, default=6, help="cases to draw (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    parser.add_argument("--allow-seen", action="store_true", help="also score patients the checkpoint was trained on")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    system = DirectSystem(args.base, args.refinement, args.device, args.precision, args.tile)
    checkpoint = system.checkpoint
    if system.device.type == "cpu":
        keep_freed_memory()
    for note in system.notes:
        print(f"note: {note}")
    output, size = Path(args.output), system.volume_size[0]
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; expected a folder")
    # X-rays of a data set without manifest are read as they were in training.
    common = {"cache_dir": args.cache_dir, "xray_normalization": checkpoint["config"]["data"]["xray_normalization"]}
    data = PatientDataset(args.data, args.split, size, system.xray_size, **common)
    expected = {"geometry": data.geometry.to_dict(), "hu_window": list(data.hu_window), "xray_scale": data.xray_scale}
    check_compatible(args.base, checkpoint, **expected)
    seen = check_patients(data, checkpoint, args.base, args.split, args.allow_seen)
    if args.refinement:
        check_patients(data, system.refinement_checkpoint, args.refinement, args.split, args.allow_seen)
    training = PatientDataset(args.data, "train", size, None, **common)
    predictors = {**system_predictors(system), BASELINE: mean_predictor(training)}
    first = next(iter(predictors))
    others = read_rows(args.compare, first, data.ids) if args.compare else None

    def picture(item, volume, scores):
        if item["id"] in data.ids[: args.pictures]:
            title = f"{item['id']}    PSNR {scores['psnr_strict']:.1f} dB, SSIM {scores['ssim_3d']:.3f}"
            path = output / "pictures" / f"{item['id']}.png"
            save_panel(path, item["xrays"], volume, item["ct_volume"][0], data.hu_window, title)

    rows = score_patients(data, predictors, picture)
    summary = {
        "checkpoint": Path(args.base).name,
        "epoch": checkpoint["epoch"],
        "parameters": sum(p.numel() for p in system.model.parameters()),
        **refinement_entries(system, args.refinement),
        "data": Path(args.data).resolve().name,
        "split": args.split,
        "split_hash": data.split_hash,
        "patients": data.ids,
        "seen_in_training": seen,
        "volume_size": list(system.volume_size),
        **expected,
        "protocols": PROTOCOLS,
        "device": system.device.type,
        "precision": system.precision.name,
        "torch": torch.__version__,
        **summary_of(rows),
    }
    if others:
        mine = [row for row in rows if row["method"] == first]
        summary[f"minus_{Path(args.compare).parent.name or 'other'}"] = {first: differences(mine, others)}
    write_rows(output / "per_patient.csv", rows)
    write_json(output / "summary.json", summary)
    print_table(summary)
    print(f"{len(data)} patients of the {args.split} split; per_patient.csv, summary.json and pictures in {output}")
    return 0


if __name__ == "__main__":
    run_cli(main)
