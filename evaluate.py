r"""Score one or both stages on a split, beside the mean-training-volume predictor.

    python evaluate.py --data data --split test --base checkpoints_enhanced/best_model.pt --output evaluation
    python evaluate.py --data data --base checkpoints_enhanced/best_model.pt \
        --refinement checkpoints_refinement/best_refinement.pt --output evaluation_256
    python evaluate.py --data data --cascade hybrid_vit_cascade/checkpoints/quick_2stage --samples 8 --output evaluation

Writes ``per_patient.csv`` (one row per method and patient), ``summary.json`` (mean, sd, n, 95 % t interval, paired
differences to the baseline, protocols, hashes) and ``pictures/ID.png`` into the output folder. What an earlier
evaluation wrote there goes, its report and pictures too, when the new one has succeeded and not before.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from checkpoints import check_compatible, weights_fingerprint
from config import config_hash
from dataset import PatientDataset, mean_volume
from figures import save_panel
from files import (
    InputError,
    atomic_path,
    check_writable,
    is_plain_name,
    read_json,
    replaced_together,
    run_cli,
    write_json,
)
from metrics import FEW, paired_interval, summarise
from model_enhanced import RefinementNetwork, upsample
from pipeline import DirectSystem, add_tile_argument, pick_device
from protocols import COLUMNS, PROTOCOLS, Case, format_score, scanned_body, score
from report import ReportCollector, choose_cases
from splits import SPLITS

# A method turns a data set's item into a volume (D, H, W) in [0, 1].
Predictor = Callable[[dict], torch.Tensor]

BASELINE = "mean_volume"
TRILINEAR = "trilinear"
FILES = ("per_patient.csv", "report.html", "summary.json")
GAINS = ("psnr_strict", "ssim_3d", "mae_hu", "body_mae_hu", "psnr_x2ct", "projection_relative")  # printed by default


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
    """Rows ``{"method", "id", <scores of protocols.COLUMNS>, "seconds"}`` for every method and patient.

    A score that a patient cannot have (a tissue that is not there) is None. observe: called with ``(method, item,
    prediction, its scores)`` for each of them; ``item["body"]`` is the scanned part of the true body, bool (D, H, W).
    """
    rows = []
    common = {"geometry": data.geometry, "hu_window": data.hu_window, "xray_scale": data.xray_scale}
    for index in tqdm(range(len(data)), desc="Evaluating", unit="patient"):
        item = data[index]
        target, mask = item["ct_volume"][0], item["mask"][0]
        item["body"] = scanned_body(target, mask, data.hu_window, data.geometry.fov_mm)
        for method, predict in predictors.items():
            start = time.perf_counter()
            volume = predict(item)
            seconds = time.perf_counter() - start
            scores = score(Case(volume, target, mask, item["body"], item.get("xrays"), **common))
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
    """Paired statistics of every common score's difference between two methods on the same patients."""
    common = [column for column in COLUMNS if column in rows[0] and column in others[0]]
    return {column: paired_interval([r[column] for r in rows], [r[column] for r in others]) for column in common}


# ------------------------------------------------------------------------------------------------
# Another run


def read_rows(path, method: str, patients: list[str]) -> list[dict]:
    """Another run's rows of one method, in the order of ``patients``, from its ``per_patient.csv``.

    Columns that an earlier version did not write are said and left out; an empty cell is None.
    Raises :class:`InputError` naming the file when it is missing, of another kind, or lacks the method or a patient.
    """
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--compare {path}: cannot be read ({error}); expected a per_patient.csv") from None
    columns = [column for column in COLUMNS if rows and column in rows[0]]
    if not columns or not {"method", "id"} <= rows[0].keys():
        raise InputError(f"--compare {path}: not a per_patient.csv of evaluate.py (method, id, scores)")
    found = {row["id"]: row for row in rows if row["method"] == method}
    if not found:
        names = ", ".join(dict.fromkeys(row["method"] for row in rows))
        raise InputError(f"--compare {path}: has no method {method!r}, only {names} (choose by --compare-method)")
    if set(found) != set(patients):
        odd = sorted(set(found) ^ set(patients))
        raise InputError(f"--compare {path}: other patients than scored here ({', '.join(odd[:5])})")
    if len(columns) < len(COLUMNS):
        missing = ", ".join(column for column in COLUMNS if column not in columns)
        print(f"note: {path} is of an earlier version; not compared, since it does not have them: {missing}")
    return [{column: _cell(path, found[patient], column) for column in columns} for patient in patients]


def _cell(path, row: dict, column: str) -> float | None:
    """A score; None for an empty cell. A cell that a cut-off line lacks is an error."""
    text = row[column]
    if text == "":
        return None
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--compare {path}: {column} of {row['id']} is {text!r}, not a number")
    return value


def note_other_truth(path, summary: dict) -> None:
    """Say where the other run's ``summary.json`` (beside its CSV, if there) scored against other volumes than this."""
    beside = Path(path).with_name("summary.json")
    if not beside.exists():
        return
    other = read_json(beside)
    for key in ("volume_size", "hu_window", "geometry"):
        if key in other and other[key] != summary[key]:
            print(f"note: {path} was scored with {key} {other[key]}, this with {summary[key]}: not the same task")


# ------------------------------------------------------------------------------------------------
# Where the weights come from


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


def print_table(summary: dict, full: bool = False) -> None:
    """Mean +- sd per protocol and method, then the first method's paired gains with their intervals.

    full: every column, not only each protocol's main ones. n is given where some patients lack a score.
    """
    methods = summary["methods"]
    first = next(iter(methods))
    patients = methods[first]["psnr_strict"]["n"]
    print(f"{'':36}" + "".join(f"{name:>18}" for name in methods))
    for name, protocol in PROTOCOLS.items():
        for index, column in enumerate(protocol.columns if full else protocol.main):
            cells = "".join(_mean(column, s[column], patients).rjust(18) for s in methods.values())
            print(f"{name if index == 0 else '':15}{column:21}{cells}")
    for key, gains in summary.items():
        if key.startswith("minus_") and first in gains:
            print(f"{first} minus {key.removeprefix('minus_')} (paired, 95 % t interval):")
            for column in GAINS:
                if column in gains[first]:
                    print(f"  {column:20}{_gain(column, gains[first][column])}")
            if patients < FEW:
                print(f"  (below {FEW} patients an interval does not show a difference by itself)")


def _mean(column: str, statistics: dict, patients: int) -> str:
    spread = f" +- {format_score(column, statistics['sd'])}" if statistics["sd"] is not None else ""
    count = f" (n {statistics['n']})" if statistics["n"] != patients else ""
    return format_score(column, statistics["mean"]) + spread + count


def _gain(column: str, statistics: dict) -> str:
    mean, *interval = (
        format_score(column, value, signed=True) for value in (statistics["mean"], *(statistics["ci95"] or ()))
    )
    limits = f" ({' to '.join(interval)})" if interval else ""
    return f"{mean}{limits}, n = {statistics['n']}"


# ------------------------------------------------------------------------------------------------
# What is evaluated


@dataclass
class Subject:
    """What is evaluated: its methods, what it was trained on, and what the summary says about it."""

    predictors: dict[str, Predictor]
    checkpoints: dict[str, dict]  # path -> header
    weights: dict[str, str | dict[str, str]]  # path -> fingerprint, or of each stage
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
    weights = {args.base: weights_fingerprint(system.checkpoint["model_state_dict"])}
    entries = {
        "checkpoint": Path(args.base).name,
        "epoch": system.checkpoint["epoch"],
        "parameters": sum(p.numel() for p in system.model.parameters()),
    }
    if system.refinement is not None:
        checkpoints[args.refinement] = system.refinement_checkpoint
        weights[args.refinement] = weights_fingerprint(system.refinement_checkpoint["refinement_state_dict"])
        entries |= {
            "refinement": Path(args.refinement).name,
            "refinement_epoch": system.refinement_checkpoint["epoch"],
            "refinement_parameters": sum(p.numel() for p in system.refinement.parameters()),
            "guided": system.refinement.guidance is not None,
        }
    return Subject(
        system_predictors(system),
        checkpoints,
        weights,
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
        {args.cascade: {stage.name: weights_fingerprint(stage.model.state_dict()) for stage in cascade.stages}},
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


def provenance(subject: Subject) -> list[dict]:
    """What the summary says of each checkpoint: file, hash of its training configuration, split, weights.

    The configuration's hash is None where the checkpoint holds no configuration; a cascade has its last stage's.
    """
    entries = []
    for path, header in subject.checkpoints.items():
        settings = header.get("config")
        entries.append(
            {
                "file": Path(path).resolve().name,
                "kind": header.get("kind"),
                "epoch": header["epoch"],
                "config_hash": header.get("config_hash") or (config_hash(settings) if settings else None),
                "split_hash": header["split_hash"],
                "weights": subject.weights[path],
            }
        )
    return entries


# ------------------------------------------------------------------------------------------------
# What is seen while scoring


class Observer:
    """Pictures of the first method's volumes, and coverage of methods with a standard deviation, as they are scored.

    It is the ``observe`` of :func:`score_patients`; output: folder for ``pictures``. ``coverages`` holds a row per
    method and patient. A report collects from it, too.
    """

    def __init__(
        self,
        output: Path,
        data: PatientDataset,
        predictors: dict[str, Predictor],
        pictures: int,
        report: ReportCollector | None = None,
    ):
        self.output, self.data, self.predictors, self.report = output, data, predictors, report
        self.first, self.drawn = next(iter(predictors)), set(data.ids[:pictures])
        self.coverages: list[dict] = []

    def __call__(self, method: str, item: dict, volume: torch.Tensor, scores: dict) -> None:
        if method == self.first and item["id"] in self.drawn:
            self._draw(item, volume, scores)
        if self.report is not None:
            self.report.observe(method, item, volume, scores)
        std = getattr(self.predictors[method], "std", None)
        if std is not None:
            self.coverages.append({"method": method, "id": item["id"], **body_coverage(item, volume, std)})

    def _draw(self, item, volume, scores):
        title = f"{item['id']}    PSNR {scores['psnr_strict']:.1f} dB, SSIM {scores['ssim_3d']:.3f}"
        path = self.output / "pictures" / f"{item['id']}.png"
        save_panel(path, item["xrays"], volume, item["ct_volume"][0], self.data.hu_window, title)


def body_coverage(item: dict, volume, std) -> dict[str, float]:
    """:func:`hybrid_vit_cascade.cascade.coverage` inside the scanned part of the true body.

    In the air around it every sample is right, which would flatter the standard deviation.
    """
    from hybrid_vit_cascade.cascade import coverage

    return coverage(volume, std, item["ct_volume"][0], item["body"])


def print_coverage(statistics: dict) -> None:
    """Share of the body's voxels whose error lies within 1 and 2 standard deviations of the samples."""
    for key, expected in statistics["expected"].items():
        print(f"{key:20}{statistics[key]['mean']:.3f} in the body; {expected:.3f} for a perfect model")


# ------------------------------------------------------------------------------------------------
# Command line


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
    parser.add_argument("--compare-method", help="the other run's method to compare with (default: of the same name)")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--pictures", type=int, default=6, help="cases to draw (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="also write report.html: tables and a viewer of patients")
    parser.add_argument(
        "--report-cases", nargs="+", metavar="ID", help="patients in the report's viewer: ids, or how many (default 5)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    parser.add_argument(
        "--allow-seen", "--allow_seen", action="store_true", help="also score patients the checkpoint was trained on"
    )
    parser.add_argument("--full-table", action="store_true", help="print every score; files always hold all of them")
    parser.add_argument("--steps", type=int, default=25, help="cascade: steps per stage and sample (%(default)s)")
    parser.add_argument("--samples", type=int, default=0, help="cascade: also one sample, and the mean of this many")
    parser.add_argument("--seed", type=int, default=0, help="cascade: of the samples' noise (default %(default)s)")
    parser.add_argument("--max-stages", type=int, help="cascade: stop after this many stages")
    args = parser.parse_args(argv)
    if args.refinement and args.cascade:
        parser.error("--refinement belongs to --base, not to --cascade")
    if args.samples < 0 or args.steps < 1:
        parser.error(f"--samples is {args.samples}, --steps {args.steps}; expected at least 0 and 1")
    if args.compare_method and not args.compare:
        parser.error("--compare-method belongs to --compare")
    if args.report_cases and not args.report:
        parser.error("--report-cases belongs to --report")
    return args


def open_data(args, subject: Subject) -> tuple[PatientDataset, PatientDataset, list[str]]:
    """The patients to score, those of the training split, and which of the first the checkpoints were trained on.

    Raises :class:`InputError` when a checkpoint does not fit the data, or was trained on a patient to score.
    """
    # X-rays of a data set without manifest are read as they were in training.
    common = {"cache_dir": args.cache_dir, "xray_normalization": subject.xray_normalization}
    size = subject.volume_size[0]
    data = PatientDataset(args.data, args.split, size, subject.xray_size, **common)
    seen = set()
    for path, checkpoint in subject.checkpoints.items():
        check_compatible(path, checkpoint, **acquisition(data))
        seen |= set(check_patients(data, checkpoint, path, args.split, args.allow_seen))
    return data, PatientDataset(args.data, "train", size, None, **common), sorted(seen)


def acquisition(data: PatientDataset) -> dict:
    """How the data were made: what a checkpoint has to share, and the summary says."""
    return {"geometry": data.geometry.to_dict(), "hu_window": list(data.hu_window), "xray_scale": data.xray_scale}


def summarise_run(args, subject: Subject, data: PatientDataset, seen: list[str], rows: list[dict]) -> dict:
    """Content of ``summary.json``: what was evaluated on what, and the statistics of its scores."""
    return {
        **subject.entries,
        "checkpoints": provenance(subject),
        "data": Path(args.data).resolve().name,
        "split": args.split,
        "split_hash": data.split_hash,
        "patients": data.ids,
        "seen_in_training": seen,
        "volume_size": list(subject.volume_size),
        **acquisition(data),
        "protocols": COLUMNS,
        "protocol_columns": {name: list(protocol.columns) for name, protocol in PROTOCOLS.items()},
        "device": subject.device.type,
        "precision": subject.precision,
        "torch": torch.__version__,
        **summary_of(rows),
    }


def earlier_files(output: Path) -> list[Path]:
    """Files that an earlier evaluation wrote into ``output``; of the pictures those of the patients it scored."""
    summary = output / "summary.json"
    try:
        scored = read_json(summary)["patients"] if summary.exists() else []
    except (InputError, KeyError, TypeError):  # not a summary of this program: its pictures are not, either
        scored = []
    pictures = [output / "pictures" / f"{patient}.png" for patient in scored if is_plain_name(patient)]
    return [path for path in (*(output / name for name in FILES), *pictures) if path.is_file()]


def check_arguments(args) -> None:
    """Refuse, before anything is loaded, an output that cannot be written."""
    output = Path(args.output)
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"--output {output} is a file; expected a folder")
    check_writable(output / FILES[0], "--output")


def main(argv=None) -> int:
    args = parse_args(argv)
    check_arguments(args)
    subject = load_cascade_subject(args) if args.cascade else load_direct_subject(args)
    for note in subject.notes:
        print(f"note: {note}")
    data, training, seen = open_data(args, subject)
    first = next(iter(subject.predictors))
    others = read_rows(args.compare, args.compare_method or first, data.ids) if args.compare else None
    report = None
    if args.report:
        cases = choose_cases(args.report_cases or ["5"], data.ids)
        report = ReportCollector(cases, first, data.geometry, data.hu_window, data.xray_scale)

    predictors = {**subject.predictors, BASELINE: mean_predictor(training)}
    output = Path(args.output)
    with replaced_together(output, lambda: earlier_files(output)) as folder:
        observer = Observer(folder, data, predictors, args.pictures, report)
        rows = score_patients(data, predictors, observer)
        summary = summarise_run(args, subject, data, seen, rows)
        if others:
            mine = [row for row in rows if row["method"] == first]
            summary[f"minus_{Path(args.compare).parent.name or 'other'}"] = {first: differences(mine, others)}
            note_other_truth(args.compare, summary)
        if observer.coverages:
            expected = subject.expected_coverage
            summary["coverage"] = {"in": "body", **summarise(observer.coverages), "expected": expected}
        write_rows(folder / "per_patient.csv", rows)
        write_json(folder / "summary.json", summary)
        if report is not None:
            report.write(folder / "report.html", summary, rows, subject.notes)
    print_table(summary, args.full_table)
    if observer.coverages:
        print_coverage(summary["coverage"])
    files = f"{'report.html, ' if args.report else ''}per_patient.csv, summary.json and pictures"
    print(f"{len(data)} patients of the {args.split} split; {files} in {output}")
    return 0


if __name__ == "__main__":
    run_cli(main)
