"""Score a checkpoint on a split, beside the mean-training-volume predictor.

    python evaluate.py --data data --split test --base checkpoints_enhanced/best_model.pt --output results

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
from tqdm import tqdm

from checkpoints import check_compatible
from dataset import PatientDataset, mean_volume
from engine import Precision, keep_freed_memory, to_channels_last
from figures import save_panel
from files import InputError, atomic_path, run_cli, write_json
from metrics import paired_interval, score_volume, summarise
from model_enhanced import EnhancedDirectModel, load_base_model
from splits import SPLITS

# A method turns a data set's item into a volume (D, H, W) in [0, 1].
Predictor = Callable[[dict], torch.Tensor]

BASELINE = "mean_volume"
PROTOCOLS = {
    "psnr_strict": "dB; whole volume, peak = width of the HU window",
    "psnr_strict_masked": "dB; inside the scan only, peak = width of the HU window",
    "psnr_x2ct": "dB; X2CT-GAN: integer HU, slice-wise over three axes, peak 4095 (reads 4.3 dB and more above strict)",
    "ssim_3d": "3D, Gaussian window of sigma 1.5, data range 1",
    "ssim_slices": "2D 7 x 7 uniform window, mean over slices of three axes, data range 1",
    "mae_hu": "HU; mean absolute error, whole volume",
    "rmse_hu": "HU; root mean squared error, whole volume",
}


def model_predictor(model: EnhancedDirectModel, device: torch.device, precision: Precision) -> Predictor:
    """The network's prediction from an item's X-rays."""

    def predict(item: dict) -> torch.Tensor:
        with torch.inference_mode(), precision.autocast():
            volume, _ = model(item["xrays"].unsqueeze(0).to(device))
        return volume[0, 0].float().cpu()

    return predict


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
    """Statistics per method, and of each method's paired difference to the baseline."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    per_method = {m: [r for r in rows if r["method"] == m] for m in methods}
    differences = {
        method: {
            metric: paired_interval([r[metric] for r in per_method[method]], [r[metric] for r in per_method[BASELINE]])
            for metric in PROTOCOLS
        }
        for method in methods
        if method != BASELINE
    }
    return {"methods": {m: summarise(r) for m, r in per_method.items()}, f"minus_{BASELINE}": differences}


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
    """Mean and standard deviation per method, and the gain over the baseline with its interval."""
    methods = summary["methods"]
    print(f"{'':20}" + "".join(f"{name:>18}" for name in methods) + f"{'gain (95 % interval)':>32}")
    gains = next(iter(summary[f"minus_{BASELINE}"].values()), {})
    for metric in PROTOCOLS:
        digits = 3 if metric.startswith("ssim") else 1 if metric.endswith("hu") else 2
        cells = ""
        for statistics in methods.values():
            sd = statistics[metric]["sd"]
            spread = f" +- {sd:.{digits}f}" if sd is not None else ""
            cells += f"{statistics[metric]['mean']:.{digits}f}{spread}".rjust(18)
        if metric in gains:
            interval = gains[metric]["ci95"]
            limits = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
            cells += f"{gains[metric]['mean']:+.{digits}f}{limits}".rjust(32)
        print(f"{metric:20}{cells}")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument("--split", default="test", choices=(*SPLITS, "all"))
    parser.add_argument("--base", required=True, help="stage-1 checkpoint")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--pictures", type=int, default=6, help="cases to draw (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    parser.add_argument("--allow-seen", action="store_true", help="also score patients the checkpoint was trained on")
    return parser.parse_args(argv)


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU; a device that is not there raises :class:`InputError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no GPU is visible to this installation of torch")
    return device


def main(argv=None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    precision = Precision(args.precision, device)
    model, checkpoint = load_base_model(args.base, device)
    if device.type == "cpu":
        keep_freed_memory()
        to_channels_last(model)
    output, size = Path(args.output), model.volume_size[0]
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; expected a folder")
    # X-rays of a data set without manifest are read as they were in training.
    common = {"cache_dir": args.cache_dir, "xray_normalization": checkpoint["config"]["data"]["xray_normalization"]}
    data = PatientDataset(args.data, args.split, size, checkpoint["xray_size"], **common)
    expected = {"geometry": data.geometry.to_dict(), "hu_window": list(data.hu_window), "xray_scale": data.xray_scale}
    check_compatible(args.base, checkpoint, **expected)
    seen = check_patients(data, checkpoint, args.base, args.split, args.allow_seen)
    training = PatientDataset(args.data, "train", size, None, **common)
    predictors = {"model": model_predictor(model, device, precision), BASELINE: mean_predictor(training)}

    def picture(item, volume, scores):
        if item["id"] in data.ids[: args.pictures]:
            title = f"{item['id']}    PSNR {scores['psnr_strict']:.1f} dB, SSIM {scores['ssim_3d']:.3f}"
            path = output / "pictures" / f"{item['id']}.png"
            save_panel(path, item["xrays"], volume, item["ct_volume"][0], data.hu_window, title)

    rows = score_patients(data, predictors, picture)
    summary = {
        "checkpoint": Path(args.base).name,
        "epoch": checkpoint["epoch"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": Path(args.data).resolve().name,
        "split": args.split,
        "split_hash": data.split_hash,
        "patients": data.ids,
        "seen_in_training": seen,
        "volume_size": list(model.volume_size),
        **expected,
        "protocols": PROTOCOLS,
        "device": device.type,
        "precision": precision.name,
        "torch": torch.__version__,
        **summary_of(rows),
    }
    write_rows(output / "per_patient.csv", rows)
    write_json(output / "summary.json", summary)
    print_table(summary)
    print(f"{len(data)} patients of the {args.split} split; per_patient.csv, summary.json and pictures in {output}")
    return 0


if __name__ == "__main__":
    run_cli(main)
