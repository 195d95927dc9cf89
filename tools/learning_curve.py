"""What more patients would give: trainings on nested subsets at equal steps, and the slope of scores per doubling.

    python -m tools.learning_curve --data data --config configs/cpu.json --patients 8 17 32 --output curve
    python -m tools.learning_curve --data data --runs curve/p8_s0 curve/p17_s0 runs/other --output curve

Subsets of one seed are nested (``data.subset_seed``), and every run sees as many samples. ``--runs`` trains nothing and
takes the ``best_model.pt`` of runs that are there. Writes ``learning_curve.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

import train_enhanced_4gpu
from dataset import PatientDataset
from xray2ct.checkpoints import load_checkpoint
from xray2ct.command_line import Parser
from xray2ct.data.splits import SPLITS
from xray2ct.evaluation.protocols import format_score
from xray2ct.evaluation.record import described, markdown_table, measured, with_interval, write_result
from xray2ct.evaluation.run import evaluate
from xray2ct.evaluation.statistics import summarise
from xray2ct.evaluation.tables import read_rows
from xray2ct.files import InputError, atomic_path, check_writable, run_cli
from xray2ct.inference.system import DirectSystem
from xray2ct.training.config import EnhancedConfig, load_config, resolve_config_path
from xray2ct.training.direct_task import EnhancedTask

COLUMNS = {
    "psnr_strict": "PSNR strict, dB",
    "psnr_pm1024": "PSNR, window [-1024, 1024] HU, dB",
    "ssim_3d": "SSIM 3D",
    "projection_relative": "projection error, relative",
}
# Training patients and psnr_pm1024 at 128^3 as LiftXR's authors published them (their table 1): LIDC-IDRI and CT-RATE.
# Other test patients, field of view and resolution than here: a place on the axis, not a comparison.
PUBLISHED = {
    "X2CT-GAN, LIDC": (818, 25.06),
    "LiftXR, LIDC": (818, 26.03),
    "X2CT-GAN, CT-RATE": (2000, 25.96),
    "LiftXR, CT-RATE": (2000, 26.45),
}
TOLERANCE = 0.02  # of the numbers of steps, which repeats of whole patients can make equal only nearly


def equal_repeats(patients: Sequence[int], repeats: int) -> list[int]:
    """``data.repeats`` for each number of patients, so that all draw as many samples as the most with ``repeats``.

    Raises :class:`InputError` where whole repeats differ by more than 2 %.
    """
    wanted = max(patients) * repeats
    found = [max(1, round(wanted / count)) for count in patients]
    for count, times in zip(patients, found):
        if abs(count * times / wanted - 1) > TOLERANCE:
            raise InputError(
                f"--patients {count}: {times} repeats are {count * times} samples an epoch, {max(patients)} patients"
                f" have {wanted}; expected the same within 2 %: raise data.repeats"
            )
    return found


def train(args: argparse.Namespace) -> list[Path]:
    """Train every subset that is not trained yet, one after the other; an interrupted run goes on."""
    config = load_config(EnhancedConfig, resolve_config_path(args.config, "config_enhanced.json"), args.set)
    there = len(PatientDataset(args.data, "train", config.model.volume_size[0], None, cache_dir=args.cache_dir))
    if max(args.patients) > there:
        raise InputError(f"--patients {max(args.patients)}: {args.data} has {there} patients to train on")
    runs = []
    for count, repeats in zip(args.patients, equal_repeats(args.patients, config.data.repeats)):
        for seed in args.seeds:
            runs.append(args.output / f"p{count}_s{seed}")
            options = [f"data.max_patients={count}", f"data.subset_seed={seed}", f"data.repeats={repeats}"]
            options = [*args.set, *options, f"training.seed={seed}"]
            words = ["--data", str(args.data), "--output", str(runs[-1])]
            words += [] if args.config is None else ["--config", args.config]
            status = train_enhanced_4gpu.main([*words, *(word for one in options for word in ("--set", one))])
            if status:
                raise InputError(f"{runs[-1]}: the training stopped (status {status}); the same command goes on")
    return runs


def score_runs(runs: Sequence[Path], args: argparse.Namespace, argv: Sequence[str]) -> list[dict]:
    """Evaluate every run on the same patients: ``{"run", "patients", "steps", "rows", "summary", "measured"}``."""
    found = []
    for run in runs:
        path = run / EnhancedTask.best_name if run.is_dir() else run
        header = load_checkpoint(path)
        system, folder = DirectSystem(path, device=args.device), args.output / "evaluation" / run.name
        summary = evaluate(system, args.data, folder, args.split, pictures=0, cache_dir=args.cache_dir)
        rows = read_rows(folder / "per_patient.csv", "model", summary["patients"])
        entry = {"run": run.name, "patients": sorted(header["train_patients"]), "steps": header["step"]}
        entry["rows"] = [
            {"id": patient, **{column: row[column] for column in COLUMNS}}
            for patient, row in zip(summary["patients"], rows)
        ]
        found.append(entry | {"measured": measured("tools.learning_curve", argv, system)})
    return sorted(found, key=lambda entry: len(entry["patients"]))


def slopes(entries: Sequence[dict]) -> dict[str, dict]:
    """Statistics over test patients of each one's slope per doubling of the training patients, by least squares.

    A patient's scores in all runs are fitted by a + b log2(n): b is the gain per doubling. Paired like this, the spread
    between patients does not hide it; the spread between trainings is in it. None for one number of patients.
    """
    doublings = np.log2([len(entry["patients"]) for entry in entries])
    if np.ptp(doublings) == 0:
        raise InputError("all runs were trained on as many patients; expected at least two numbers of them")
    rows = []
    for index in range(len(entries[0]["rows"])):
        scores = {column: [entry["rows"][index][column] for entry in entries] for column in COLUMNS}
        rows.append({column: float(np.polyfit(doublings, values, 1)[0]) for column, values in scores.items()})
    return summarise(rows)


def not_nested(entries: Sequence[dict]) -> list[str]:
    """Notes on runs whose patients are not all among those of the next larger ones, and on other numbers of steps."""
    notes, steps = [], [entry["steps"] for entry in entries]
    for small, large in pairwise(entries):
        if len(small["patients"]) < len(large["patients"]) and not set(small["patients"]) <= set(large["patients"]):
            notes.append(f"the patients of {small['run']} are not all among those of {large['run']}")
    if max(steps) > (1 + TOLERANCE) * min(steps):
        notes.append(f"best checkpoints after {min(steps)} to {max(steps)} steps")
    return notes


def summary_of(entries: list[dict]) -> dict:
    """What ``learning_curve.json`` holds: runs with their mean scores, slopes, notes."""
    for entry in entries:
        entry["summary"] = summarise([{c: row[c] for c in COLUMNS} for row in entry["rows"]])
    return {"runs": entries, "slope_per_doubling": slopes(entries), "notes": not_nested(entries)}


def table(result: dict) -> str:
    """The result as Markdown: a row per run, the slopes with their 95 % t intervals, where the figures come from."""
    rows = [
        [str(len(run["patients"])), run["run"], *(format_score(c, run["summary"][c]["mean"]) for c in COLUMNS)]
        for run in result["runs"]
    ]
    gains = ["per doubling", "", *(with_interval(c, result["slope_per_doubling"][c]) for c in COLUMNS)]
    tested = f"Scores of {len(result['runs'][0]['rows'])} test patients."
    notes = "".join(f" Note: {note}." for note in result["notes"])
    head = ["training patients", "run", *COLUMNS.values()]
    sources = "\n".join(f"- {run['run']}: {described(run['measured'])}" for run in result["runs"])
    return f"{markdown_table(head, [*rows, gains])}\n\n{tested}{notes}\n\n{sources}\n"


def draw(result: dict):
    """A matplotlib figure: each score's mean by training patients (logarithmic), with its sd / sqrt(n), and the fit."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing the curve needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    counts = np.array([len(run["patients"]) for run in result["runs"]])
    for axes, (column, words) in zip(figure.subplots(2, len(COLUMNS) // 2).flat, COLUMNS.items()):
        statistics = [run["summary"][column] for run in result["runs"]]
        means = np.array([one["mean"] for one in statistics])
        errors = [0.0 if one["sd"] is None else one["sd"] / math.sqrt(one["n"]) for one in statistics]
        axes.errorbar(counts, means, errors, fmt="o", capsize=3)
        slope = result["slope_per_doubling"][column]["mean"]
        offset = float(np.mean(means - slope * np.log2(counts)))
        published = PUBLISHED if column == "psnr_pm1024" else {}
        line = np.array([counts.min(), max([4 * counts.max(), *(patients for patients, _ in published.values())])])
        axes.plot(line, offset + slope * np.log2(line), "--", label=f"{slope:+.3g} per doubling")
        for name, (patients, value) in published.items():
            axes.plot(patients, value, "x", color="0.4")
            axes.annotate(name, (patients, value), (-4, 4), textcoords="offset points", fontsize=7, ha="right")
        axes.set_xscale("log", base=2)
        axes.set(title=words, xlabel="training patients")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument("--patients", nargs="+", type=int, default=[8, 17, 32], help="sizes of the subsets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of subsets and trainings (default 0)")
    parser.add_argument("--config", help="of the trainings; its data.repeats are those of the largest subset")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--runs", "--evaluate-only", nargs="+", type=Path, metavar="RUN", help="train nothing: these")
    parser.add_argument("--split", default="test", choices=SPLITS, help="patients to score")
    parser.add_argument("--output", required=True, type=Path, help="folder for runs and results")
    parser.add_argument("--device", default="auto", help="of the evaluations (default auto)")
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    args = parser.parse_args(argv)
    if min(args.patients) < 1 or min(args.seeds) < 0:
        parser.error(f"--patients {args.patients}, --seeds {args.seeds}: expected at least 1 and 0")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    check_writable(args.output / "learning_curve.json", "--output")
    runs = args.runs or train(args)
    entries = score_runs(runs, args, sys.argv[1:] if argv is None else argv)
    result = summary_of(entries)
    figure = draw(result)
    with atomic_path(args.output / "learning_curve.png") as temporary:
        figure.savefig(temporary, dpi=130)
    write_result(args.output, "learning_curve", result, table(result))
    return 0


if __name__ == "__main__":
    run_cli(main)
