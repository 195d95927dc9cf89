"""Two X-ray files -> a CT volume in Hounsfield units: NIfTI, NRRD, MetaImage or a DICOM series.

python reconstruct.py --example                                 # the X-rays and weights that come with the project
python reconstruct.py --pa PA.png --lateral LATERAL.png --output ct.nii.gz
python reconstruct.py --pa PA.png --lateral LATERAL.png --weights chest64+chest256 --output ct.nii.gz
python reconstruct.py --pa PA.png --lateral LATERAL.png --base best_model.pt --refinement best_refinement.pt \
        --output ct.nii.gz
python reconstruct.py --pa PA.dcm --lateral LAT.dcm --base best_model.pt --output ct.nii.gz \
        --xray-normalization percentile
python reconstruct.py --folder XRAYS --base best_model.pt --output VOLUMES      # every ID_pa.*, ID_lat.* below XRAYS

from reconstruct import load_pipeline
volume_hu, affine = load_pipeline("chest64")("PA.png", "LATERAL.png")
volume_hu, affine = load_pipeline("best_model.pt", "best_refinement.pt")("PA.png", "LATERAL.png")
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import argparse

from xray2ct.command_line import Parser
from xray2ct.files import InputError, run_cli
from xray2ct.inference.batch import (
    add_common_arguments,
    check_common_arguments,
    describe_volume,
    reconstruct_folder,
    reconstruct_one,
)
from xray2ct.inference.example import use_example
from xray2ct.inference.reconstruction import load_pipeline
from xray2ct.inference.system import add_tile_argument
from xray2ct.inference.weights_arguments import add_weights_argument, choose_weights, shows_films


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_weights_argument(parser)
    parser.add_argument("--base", help="stage-1 checkpoint")
    parser.add_argument("--refinement", help="stage-2 checkpoint: the volume has 256^3 voxels instead of 64^3")
    add_tile_argument(parser)
    parser.add_argument("--compile", action="store_true", help="stage 1 by torch.compile: pays for many pairs")
    parser.add_argument("--example", action="store_true", help="reconstruct the X-rays that come with the project")
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.example:
        use_example(args)
    check_common_arguments(args)
    if not args.folder and not args.lateral:
        raise InputError("--lateral is missing; expected the two X-rays, or --folder")
    choose_weights(args, film=not (args.weights or args.base) and shows_films(args))
    pipeline = load_pipeline(args.base, args.refinement, args.device, args.precision, args.tile, args.compile)
    if args.folder:
        return reconstruct_folder(pipeline, args)
    hu, _ = reconstruct_one(pipeline, args.pa, args.lateral, args.output, args.picture, args)
    print(describe_volume(pipeline, args.output, hu))
    if args.picture:
        print(f"{args.picture}: the X-rays and the volume")
    return 0


if __name__ == "__main__":
    run_cli(main)
