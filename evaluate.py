r"""Score one or both stages on a split, beside the mean-training-volume predictor.

    python evaluate.py --data data --split test --base checkpoints_enhanced/best_model.pt --output results
    python evaluate.py --data data --base checkpoints_enhanced/best_model.pt \
        --refinement checkpoints_refinement/best_refinement.pt --output results_256
    python evaluate.py --data data --cascade hybrid_vit_cascade/checkpoints/quick_2stage --samples 8 --output results

Writes ``per_patient.csv`` (one row per method and patient), ``summary.json`` (mean, sd, n, 95 % bootstrap interval,
paired differences to the baseline, protocols, hashes) and ``pictures/ID.png`` into the output folder.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoints import check_compatible
from ct_io import body_mask
from dataset import PatientDataset, mean_volume
from engine import keep_freed_memory
from figures import save_panel
from files import InputError, atomic_path, run_cli, write_json
from metrics import paired_interval, score_volume, summarise
from model_enhanced import RefinementNetwork, upsample
from pipeline import DirectSystem, add_tile_argument, pick_device
from projector import unit_to_hu
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


def score_patients(data: PatientDataset, predictors: dict[str, Predictor], observe=None) -> list[dict]:
    """Rows ``{"method", "id", <scores>, "seconds"}`` for every method and patient.

    observe: called with ``(method, item, prediction, its scores)`` for each of them.
    """
    rows = []
    for index in tqdm(range(len(data)), desc="Evaluating", unit="patient"):
        item = data[index]
        target, mask = item["ct_volume"][0], item["mask"][0]
        for method, predict in predictors.items():
            start = time.perf_counter()
            volume = predict(item)
            seconds = time.perf_counter() - start
            scores = score_volume(volume, target, mask, data.hu_window)
            rows.append({"method": method, "id": item["id"], **scores, "seconds": seconds})
            if observe is not None:
                observe(method, item, volume, scores)
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


@dataclass
class Subject:
    """What is evaluated: its methods, what it was trained on, and what the summary says about it."""

    predictors: dict[str, Predictor]
    checkpoints: dict[str, dict]  # path -> header
    volume_size: tuple[int, int, int]
    xray_size: int
    xray_normalization: str
    device: torch.device
    precision: str
    entries: dict
    notes: list[str] = field(default_factory=list)
    expected_coverage: dict | None = None


def load_direct_subject(args) -> Subject:
    """The direct system of ``--base`` and ``--refinement``."""
    system = DirectSystem(args.base, args.refinement, args.device, args.precision, args.tile)
    checkpoints = {args.base: system.checkpoint}
    entries = {
        "checkpoint": Path(args.base).name,
        "epoch": system.checkpoint["epoch"],
        "parameters": sum(p.numel() for p in system.model.parameters()),
    }
    if system.refinement is not None:
        checkpoints[args.refinement] = system.refinement_checkpoint
        entries |= {
            "refinement": Path(args.refinement).name,
            "refinement_epoch": system.refinement_checkpoint["epoch"],
            "refinement_parameters": sum(p.numel() for p in system.refinement.parameters()),
            "guided": system.refinement.guidance is not None,
        }
    return Subject(
        system_predictors(system),
        checkpoints,
        system.volume_size,
        system.xray_size,
        system.checkpoint["config"]["data"]["xray_normalization"],
        system.device,
        system.precision.name,
        entries,
        system.notes,
    )


def load_cascade_subject(args) -> Subject:
    """The cascade of ``--cascade``: its one-step posterior mean, with ``--samples`` also a sample and the mean of K."""
    from hybrid_vit_cascade import cascade as module

    cascade = module.Cascade.load(args.cascade, pick_device(args.device), args.max_stages, args.precision)
    samples = args.samples or None
    header = cascade.header
    return Subject(
        module.predictors(cascade, args.steps, samples, args.seed),
        {args.cascade: header},
        cascade.volume_size,
        cascade.xray_size,
        header["cascade_config"].get("data", {}).get("xray_normalization", "percentile"),
        cascade.device,
        cascade.precision.name,
        {
            "cascade": Path(args.cascade).resolve().name,
            "stages": cascade.stage_names,
            "epoch": header["epoch"],
            "parameters": sum(p.numel() for p in cascade.parameters()),
            "steps": args.steps,
            "samples": args.samples,
            "seed": args.seed,
        },
        expected_coverage=module.expected_coverage(samples) if samples and samples > 1 else None,
    )


def body_coverage(item: dict, volume, std, data: PatientDataset) -> dict[str, float]:
    """:func:`hybrid_vit_cascade.cascade.coverage` inside the scanned part of the true body.

    In the air around it every sample is right, which would flatter the standard deviation.
    """
    from hybrid_vit_cascade.cascade import coverage

    target = item["ct_volume"][0]
    hu = unit_to_hu(target, data.hu_window).numpy()
    body = torch.from_numpy(body_mask(hu, data.geometry.fov_mm / len(target)))
    return coverage(volume, std, target, body & (item["mask"][0] > 0))


def print_coverage(statistics: dict) -> None:
    """Share of the body's voxels whose error lies within 1 and 2 standard deviations of the samples."""
    for key, expected in statistics["expected"].items():
        print(f"{key:20}{statistics[key]['mean']:.3f} in the body; {expected:.3f} for a perfect model")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument("--split", default="test", choices=(*SPLITS, "all"))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--base", help="stage-1 checkpoint of the direct system")
    what.add_argument("--cascade", metavar="DIR", help="checkpoint folder of hybrid_vit_cascade")
    parser.add_argument("--refinement", help="stage-2 checkpoint: scores its 256^3 volumes beside plain upsampling")
    add_tile_argument(parser)
    parser.add_argument("--compare", metavar="CSV", help="another run's per_patient.csv: paired differences to it")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--pictures", type=int, default=6, help="cases to draw (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    parser.add_argument("--allow-seen", action="store_true", help="also score patients the checkpoint was trained on")
    parser.add_argument("--steps", type=int, default=25, help="cascade: steps per stage and sample (%(default)s)")
    parser.add_argument("--samples", type=int, default=0, help="cascade: also one sample, and the mean of this many")
    parser.add_argument("--seed", type=int, default=0, help="cascade: of the samples' noise (default %(default)s)")
    parser.add_argument("--max-stages", type=int, help="cascade: stop after this many stages")
    args = parser.parse_args(argv)
    if args.refinement and args.cascade:
        parser.error("--refinement belongs to --base, not to --cascade")
    if args.samples < 0 or args.steps < 1:
        parser.error(f"--samples is {args.samples}, --steps {args.steps}; expected at least 0 and 1")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    subject = load_cascade_subject(args) if args.cascade else load_direct_subject(args)
    if subject.device.type == "cpu":
        keep_freed_memory()
    for note in subject.notes:
        print(f"note: {note}")
    output, size = Path(args.output), subject.volume_size[0]
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; expected a folder")
    # X-rays of a data set without manifest are read as they were in training.
    common = {"cache_dir": args.cache_dir, "xray_normalization": subject.xray_normalization}
    data = PatientDataset(args.data, args.split, size, subject.xray_size, **common)
    expected = {"geometry": data.geometry.to_dict(), "hu_window": list(data.hu_window), "xray_scale": data.xray_scale}
    seen = set()
    for path, checkpoint in subject.checkpoints.items():
        check_compatible(path, checkpoint, **expected)
        seen |= set(check_patients(data, checkpoint, path, args.split, args.allow_seen))
    training = PatientDataset(args.data, "train", size, None, **common)
    predictors = {**subject.predictors, BASELINE: mean_predictor(training)}
    first = next(iter(predictors))
    others = read_rows(args.compare, first, data.ids) if args.compare else None

    def draw(item, volume, scores):
        if item["id"] in data.ids[: args.pictures]:
            title = f"{item['id']}    PSNR {scores['psnr_strict']:.1f} dB, SSIM {scores['ssim_3d']:.3f}"
            path = output / "pictures" / f"{item['id']}.png"
            save_panel(path, item["xrays"], volume, item["ct_volume"][0], data.hu_window, title)

    coverages = []

    def observe(method, item, volume, scores):
        if method == first:
            draw(item, volume, scores)
        std = getattr(predictors[method], "std", None)
        if std is not None:
            coverages.append({"method": method, "id": item["id"], **body_coverage(item, volume, std, data)})

    rows = score_patients(data, predictors, observe)
    summary = {
        **subject.entries,
        "data": Path(args.data).resolve().name,
        "split": args.split,
        "split_hash": data.split_hash,
        "patients": data.ids,
        "seen_in_training": sorted(seen),
        "volume_size": list(subject.volume_size),
        **expected,
        "protocols": PROTOCOLS,
        "device": subject.device.type,
        "precision": subject.precision,
        "torch": torch.__version__,
        **summary_of(rows),
    }
    if others:
        mine = [row for row in rows if row["method"] == first]
        summary[f"minus_{Path(args.compare).parent.name or 'other'}"] = {first: differences(mine, others)}
    if coverages:
        summary["coverage"] = {"in": "body", **summarise(coverages), "expected": subject.expected_coverage}
    write_rows(output / "per_patient.csv", rows)
    write_json(output / "summary.json", summary)
    print_table(summary)
    if coverages:
        print_coverage(summary["coverage"])
    print(f"{len(data)} patients of the {args.split} split; per_patient.csv, summary.json and pictures in {output}")
    return 0


if __name__ == "__main__":
    run_cli(main)
