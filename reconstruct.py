"""Two X-ray files -> a CT volume in Hounsfield units: NIfTI, NRRD, MetaImage or a DICOM series.

python reconstruct.py --example                                 # the X-rays and weights that come with the project
python reconstruct.py --pa PA.png --lateral LATERAL.png --output ct.nii.gz
python reconstruct.py --pa PA.png --lateral LATERAL.png --weights chest64+chest256 --output ct.nii.gz
python reconstruct.py --pa PA.png --lateral LATERAL.png --base best_model.pt --refinement best_refinement.pt \\
        --output ct.nii.gz
python reconstruct.py --pa PA.dcm --lateral LAT.dcm --base best_model.pt --output ct.nii.gz \\
        --xray-normalization percentile
python reconstruct.py --pa PA.png --lateral LATERAL.png --base best_model.pt --output ct.nii.gz --std std.nii.gz
python reconstruct.py --folder XRAYS --base best_model.pt --output VOLUMES      # every ID_pa.*, ID_lat.* below XRAYS

from reconstruct import load_pipeline
volume_hu, affine = load_pipeline("chest64")("PA.png", "LATERAL.png")
volume_hu, affine = load_pipeline("best_model.pt", "best_refinement.pt")("PA.png", "LATERAL.png")
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import argparse
import sys
from pathlib import Path

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
from xray2ct.inference.consistency import how_of
from xray2ct.inference.example import add_example_argument, use_example
from xray2ct.inference.reconstruction import load_pipeline
from xray2ct.inference.system import add_tile_argument
from xray2ct.inference.uncertainty import read_calibration
from xray2ct.inference.weights_arguments import add_weights_argument, choose_weights, shows_films


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_weights_argument(parser)
    parser.add_argument("--base", help="stage-1 checkpoint, or a name as for --weights")
    parser.add_argument("--refinement", help="stage-2 checkpoint: the volume has 256^3 voxels instead of 64^3")
    add_tile_argument(parser)
    parser.add_argument("--compile", action="store_true", help="compile stage 1 (torch.compile): for many pairs")
    add_example_argument(parser)
    parser.add_argument("--std", metavar="FILE", help="also write the calibrated standard deviation in HU, NIfTI")
    add_common_arguments(parser)
    return parser.parse_args(argv)


def check_std(args) -> None:
    """Refuse, before anything is loaded, a ``--std`` that cannot be written."""
    if args.folder:
        raise InputError("--std is for one pair of X-rays; expected --pa and --lateral instead of --folder")
    check_output(args.std, "--std", series=False)
    if Path(args.std).resolve() == Path(args.output).resolve():
        raise InputError(f"--std {args.std} is --output too; expected another name")


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.example:
        use_example(args)
    check_common_arguments(args)
    if not args.folder and not args.lateral:
        raise InputError("--lateral is missing; expected the two X-rays, or --folder")
    choose_weights(args, film=not (args.weights or args.base) and shows_films(args))
    if args.std:
        check_std(args)
    pipeline = load_pipeline(
        args.base, args.refinement, args.device, args.precision, args.tile, args.compile, args.consistency
    )
    if args.folder:
        return reconstruct_folder(pipeline, args)
    weights = [str(loaded.weights) for loaded in pipeline.system.checkpoints()] if args.std else []
    made = how_of(pipeline.consistency_steps)
    calibration = read_calibration(args.refinement or args.base, weights, made) if args.std else None
    hu, affine = reconstruct_one(pipeline, args.pa, args.lateral, args.output, args.picture, args)
    print(describe_volume(pipeline, args.output, hu))
    if args.picture:
        print(f"{args.picture}: the X-rays and the volume")
    if calibration is not None:
        std = calibration.std(hu)
        write_volume(args.std, std, affine, origin=pipeline.origin)
        wide = f"95 % of errors lie within {calibration.factor95:.2f} of them"
        print(f"{args.std}: standard deviation, {std.mean():.1f} HU on average; {wide}")
        if pipeline.measured:
            print(f"note: {args.std} does not hold what films and scouts add to the errors", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_cli(main)
