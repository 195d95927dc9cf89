r"""Two X-ray files -> a CT volume by the cascade, as NIfTI in Hounsfield units. INFERENCE.md explains the three ways.

python inference.py --pa PA.png --lateral LAT.png --checkpoint checkpoints/quick_2stage --output ct.nii.gz
python inference.py --pa PA.png --lateral LAT.png --checkpoint checkpoints/quick_2stage --output ct.nii.gz \
        --steps 25 --samples 8 --save-std std.nii.gz
python inference.py ... --output draw.nii.gz --steps 50 --samples 1 --seed 3

Without --samples: the posterior mean, one network step per stage. --samples K: the mean of K samples of --steps steps
each, with K = 1 a single sample. From the repository's root: python -m hybrid_vit_cascade.inference ...
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # started by path: the package lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
from hybrid_vit_cascade.cascade import DEFAULT_STEPS
from hybrid_vit_cascade.system import load_cascade_system

# isort: split
from xray2ct.command_line import Parser
from xray2ct.files import InputError, run_cli
from xray2ct.imaging.write_volume import check_output, write_volume
from xray2ct.inference.batch import (
    add_common_arguments,
    check_common_arguments,
    describe_volume,
    reconstruct_folder,
    reconstruct_one,
)
from xray2ct.inference.consistency import add_data_consistency_argument
from xray2ct.inference.reconstruction import Pipeline
from xray2ct.inference.sample_calibration import SampleCalibration
from xray2ct.progress import progress_bar


def load_cascade_pipeline(checkpoint, *args, consistency: int | str = "auto", **options) -> Pipeline:
    """Load a cascade's checkpoint folder for reconstruction: ``volume_hu, affine = pipeline("PA.png", "LAT.png")``.

    PA alone for a cascade of one view. Options: ``samples``, ``steps``, ``seed``, ``max_stages``, ``device``,
    ``precision``, ``data_consistency``, as :func:`system.load_cascade_system`; ``consistency`` as :class:`Pipeline`.
    With ``samples`` of 2 or more ``pipeline.std_hu()`` is the standard deviation, calibrated where
    ``pipeline.calibration`` is there.
    """
    return Pipeline(load_cascade_system(checkpoint, *args, **options), consistency)


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder of train_progressive.py")
    add_common_arguments(parser)
    parser.add_argument("--steps", type=int, help=f"network steps per stage and sample (default {DEFAULT_STEPS})")
    parser.add_argument("--samples", type=int, help="mean of K samples, 1: a single one (default: one-step mean)")
    parser.add_argument(
        "--save-std",
        metavar="FILE",
        help="voxel-wise standard deviation in HU, NIfTI; calibrated where the checkpoint has that",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples' noise (default %(default)s)")
    parser.add_argument("--max-stages", type=int, help="stop after this many stages")
    add_data_consistency_argument(parser)
    return parser.parse_args(argv)


def check_args(args) -> None:
    """Refuse, before anything is loaded, what cannot be written or would be ignored."""
    check_common_arguments(args)
    if args.save_std:
        if args.folder:
            raise InputError("--save-std is for one pair of X-rays; expected --pa and --lateral instead of --folder")
        check_output(args.save_std, "--save-std", series=False)
        if Path(args.save_std).resolve() == Path(args.output).resolve():
            raise InputError(f"--save-std {args.save_std} is --output too; expected another name")
    if args.samples is not None and args.samples < 1:
        raise InputError(f"--samples {args.samples}: expected at least 1; without it the posterior mean is one step")
    if args.save_std and (args.samples or 0) < 2:
        raise InputError("--save-std needs at least two samples: add --samples 8")
    if args.steps is not None and args.steps != 1 and args.samples is None:
        raise InputError(
            f"--steps {args.steps} without --samples: the posterior mean takes one step;"
            " add --samples 1 for a single sample, or --samples 8 for the mean of eight"
        )


def _calibrated(calibration: SampleCalibration | None) -> str:
    if calibration is None:
        return " (as the samples have it)"
    return (
        f" ({calibration.factor:.2f} times that of the samples, as calibrated);"
        f" 95 % of errors lie within {calibration.factor95:.2f} of them"
    )


def main(argv=None) -> int:
    args = parse_args(argv)
    check_args(args)
    steps = DEFAULT_STEPS if args.steps is None else args.steps
    system = load_cascade_system(
        args.checkpoint,
        args.samples,
        steps,
        args.seed,
        args.max_stages,
        args.device,
        args.precision,
        args.data_consistency,
    )
    system.progress = partial(progress_bar, desc="Sampling", unit="steps", leave=False)
    pipeline = Pipeline(system, args.consistency)
    if args.folder:
        return reconstruct_folder(pipeline, args)
    calibration = pipeline.calibration if args.save_std else None  # of other weights: refused before sampling
    hu, affine = reconstruct_one(pipeline, args.pa, args.lateral, args.output, args.picture, args)
    print(f"{describe_volume(pipeline, args.output, hu)}; {system}")
    if args.save_std:
        std = pipeline.std_hu()
        write_volume(args.save_std, std, affine, origin=pipeline.origin)
        print(f"{args.save_std}: standard deviation, {std.mean():.1f} HU on average{_calibrated(calibration)}")
        if pipeline.measured:
            print(f"note: {args.save_std} does not hold what films and scouts add to the errors", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_cli(main)
