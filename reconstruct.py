"""Two X-ray files -> a CT volume in Hounsfield units: NIfTI, NRRD, MetaImage or a DICOM series.

python reconstruct.py --pa PA.png --lateral LATERAL.png --base best_model.pt --output ct.nii.gz
python reconstruct.py --pa PA.png --lateral LATERAL.png --base best_model.pt --refinement best_refinement.pt \
        --output ct.nii.gz
python reconstruct.py --pa PA.dcm --lateral LAT.dcm --base best_model.pt --output ct.nii.gz \
        --xray-normalization percentile
python reconstruct.py --folder XRAYS --base best_model.pt --output VOLUMES      # every ID_pa.*, ID_lat.* below XRAYS

from reconstruct import load_pipeline
volume_hu, affine = load_pipeline("best_model.pt", "best_refinement.pt")("PA.png", "LATERAL.png")
"""

from __future__ import annotations

import argparse

from xray2ct.files import InputError, run_cli
from xray2ct.inference.batch import (
    add_common_arguments,
    check_common_arguments,
    describe_volume,
    reconstruct_folder,
    reconstruct_one,
)
from xray2ct.inference.reconstruction import load_pipeline
from xray2ct.inference.system import add_tile_argument


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="stage-1 checkpoint")
    parser.add_argument("--refinement", help="stage-2 checkpoint: the volume has 256^3 voxels instead of 64^3")
    add_tile_argument(parser)
    parser.add_argument("--compile", action="store_true", help="stage 1 by torch.compile: pays for many pairs")
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    check_common_arguments(args)
    if not args.folder and not args.lateral:
        raise InputError("--lateral is missing; expected the two X-rays, or --folder")
    pipeline = load_pipeline(
        args.base, args.refinement, args.device, args.precision, args.tile, args.compile, args.consistency
    )
    if args.folder:
        return reconstruct_folder(pipeline, args)
    hu, _ = reconstruct_one(pipeline, args.pa, args.lateral, args.output, args.picture, args)
    print(describe_volume(pipeline, args.output, hu))
    return 0


if __name__ == "__main__":
    run_cli(main)
