"""Score a trained system on a split, with the mean training volume as the baseline.

    python evaluate.py --data data --weights chest64 --output evaluation
    python evaluate.py --data data --split test --base checkpoints_enhanced/best_model.pt --output evaluation
    python evaluate.py --data data --base checkpoints_enhanced/best_model.pt \\
        --refinement checkpoints_refinement/best_refinement.pt --output evaluation_256
    python evaluate.py --data data/scouts --xrays scout --base checkpoints_scout/best_model.pt --output scouts
    python evaluate.py --data data --cascade hybrid_vit_cascade/checkpoints/quick_2stage --samples 8 --output evaluation

Writes ``per_patient.csv`` (one row per method and patient), ``summary.json`` (mean, sd, n, 95 % t interval, paired
differences to the baseline, protocols, hashes) and ``pictures/ID.png`` into the output folder. What an earlier
evaluation wrote there is removed, its report and pictures too, once the new one has succeeded and not before.
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import argparse
import os
from functools import partial
from pathlib import Path

from hybrid_vit_cascade.system import load_cascade_system
from xray2ct.command_line import Parser
from xray2ct.conventions import REAL_XRAYS
from xray2ct.data.splits import SPLITS
from xray2ct.evaluation.run import FILES, evaluate
from xray2ct.evaluation.tables import print_coverage, print_table
from xray2ct.files import InputError, check_writable, counted, run_cli
from xray2ct.inference.consistency import add_consistency_argument, add_data_consistency_argument, steps_of
from xray2ct.inference.predictor import Predictor
from xray2ct.inference.system import DirectSystem, add_tile_argument
from xray2ct.inference.weights_arguments import add_weights_argument, choose_weights
from xray2ct.progress import be_quiet, progress_bar


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument(
        "--xrays",
        default="drr",
        choices=("drr", *REAL_XRAYS),
        help="drr: rendered; scout: of the CT's session; film: no voxels are scored (default %(default)s)",
    )
    parser.add_argument("--split", default="test", choices=(*SPLITS, "all"), help="patients to score")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--base", help="stage-1 checkpoint of the direct system")
    what.add_argument("--cascade", metavar="DIR", help="checkpoint folder of hybrid_vit_cascade")
    add_weights_argument(parser)
    parser.add_argument("--refinement", help="stage-2 checkpoint: scores its 256^3 volumes and plain upsampling")
    add_tile_argument(parser)
    add_consistency_argument(parser)
    parser.add_argument("--compare", metavar="CSV", help="another run's per_patient.csv: paired differences to it")
    parser.add_argument("--compare-method", help="the other run's method to compare with (default: of the same name)")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--pictures", type=int, default=6, help="cases to draw (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="also write report.html: tables and a viewer of patients")
    parser.add_argument(
        "--report-cases",
        nargs="+",
        metavar="ID",
        help="patients in the report's viewer: ids, or a number of them (default 5)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument(
        "--precision", default="float32", choices=("auto", "float32", "bfloat16", "float16"), help="of the networks"
    )
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    parser.add_argument("--allow-seen", action="store_true", help="also score patients the checkpoint was trained on")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--full-table", action="store_true", help="print every score; files always hold all of them")
    parser.add_argument("--steps", type=int, default=25, help="cascade: of each stage and sample")
    parser.add_argument("--samples", type=int, default=0, help="cascade: also one sample, and the mean of this many")
    parser.add_argument("--seed", type=int, default=0, help="cascade: of the samples' noise (default %(default)s)")
    parser.add_argument("--max-stages", type=int, help="cascade: stop after this many stages")
    add_data_consistency_argument(parser)
    args = parser.parse_args(argv)
    if args.refinement and args.cascade:
        parser.error("--refinement belongs to --base, not to --cascade")
    if args.data_consistency and not args.cascade:
        parser.error("--data-consistency belongs to --cascade")
    if args.samples < 0 or args.steps < 1:
        parser.error(f"--samples is {args.samples}, --steps {args.steps}; expected at least 0 and 1")
    if args.compare_method and not args.compare:
        parser.error("--compare-method belongs to --compare")
    if args.report and args.xrays == "film":
        parser.error("--report compares voxels with the CT; films were taken at another time and have none to compare")
    if args.report_cases and not args.report:
        parser.error("--report-cases belongs to --report")
    return args


def check_arguments(args) -> None:
    """Refuse, before anything is loaded, an output that cannot be written."""
    output = Path(args.output)
    if os.path.exists(output) and not os.path.isdir(output):
        raise InputError(f"--output {output} is a file; expected a folder")
    check_writable(output / FILES[0], "--output")
    steps_of(args.consistency)


def load_predictor(args) -> Predictor:
    """The direct system of ``--base`` and ``--refinement``, or the cascade of ``--cascade``."""
    if args.base:
        return DirectSystem(args.base, args.refinement, args.device, args.precision, args.tile)
    settings = (args.samples or None, args.steps, args.seed, args.max_stages, args.device, args.precision)
    system = load_cascade_system(args.cascade, *settings, args.data_consistency)
    system.progress = partial(progress_bar, desc="Sampling", unit="steps", leave=False)
    return system


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.quiet:
        be_quiet()
    check_arguments(args)
    choose_weights(args, film=args.xrays == "film")
    summary = evaluate(
        load_predictor(args),
        args.data,
        args.output,
        split=args.split,
        pictures=args.pictures,
        compare=args.compare,
        compare_method=args.compare_method,
        report_cases=(args.report_cases or ["5"]) if args.report else None,
        cache_dir=args.cache_dir,
        allow_seen=args.allow_seen,
        xrays=args.xrays,
        consistency=args.consistency,
    )
    print_table(summary, args.full_table)
    if "coverage" in summary:
        print_coverage(summary["coverage"])
    files = f"{'report.html, ' if args.report else ''}per_patient.csv, summary.json and pictures"
    print(f"{counted(len(summary['patients']), 'patient')} of the {args.split} split; {files} in {Path(args.output)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
