"""Score one or both stages on a split, beside the mean-training-volume predictor.

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
import os
from pathlib import Path

import torch

from dataset import PatientDataset
from hybrid_vit_cascade.cascade import Cascade
from hybrid_vit_cascade.cascade import predictors as cascade_predictors
from xray2ct.checkpoints import check_compatible, weights_fingerprint
from xray2ct.data.splits import SPLITS
from xray2ct.evaluation.protocols import COLUMNS, PROTOCOLS
from xray2ct.evaluation.report import ReportCollector, choose_cases
from xray2ct.evaluation.scoring import (
    BASELINE,
    Observer,
    Subject,
    acquisition,
    check_patients,
    differences,
    load_direct_subject,
    mean_predictor,
    provenance,
    score_patients,
    summary_of,
)
from xray2ct.evaluation.statistics import expected_coverage, summarise
from xray2ct.evaluation.tables import note_other_truth, print_coverage, print_table, read_rows, write_rows
from xray2ct.files import InputError, check_writable, is_plain_name, read_json, replaced_together, run_cli, write_json
from xray2ct.inference.system import add_tile_argument, pick_device

FILES = ("per_patient.csv", "report.html", "summary.json")


# ------------------------------------------------------------------------------------------------
# What is evaluated


def load_cascade_subject(args) -> Subject:
    """The cascade of ``--cascade``: its one-step posterior mean, with ``--samples`` also a sample and the mean of K."""
    cascade = Cascade.load(args.cascade, pick_device(args.device), args.max_stages, args.precision)
    samples = args.samples or None
    header = cascade.header
    return Subject(
        cascade_predictors(cascade, args.steps, samples, args.seed),
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
        expected_coverage=expected_coverage(samples) if samples and samples > 1 else None,
    )


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
