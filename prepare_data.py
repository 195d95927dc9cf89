"""Prepare a folder of CTs: one patient cube, scan mask and two X-rays each, and a manifest with the split.

    python prepare_data.py --input CTS --output data/prepared
    python prepare_data.py --input CTS --output data/prepared --split split.json --remove-couch --workers 8

    python prepare_data.py --input CTS --output data/prepared --shard 3/8      # job 3 of 8, on any machine
    python prepare_data.py --output data/prepared --merge                      # when all eight are done

    python prepare_data.py --input CTS --output data/scouts --geometry scout --frontal ap --with-scouts
    python prepare_data.py --input CTS --output data/films --with-films

CTS may hold NIfTI files, folders of DICOM files (with pydicom installed), .mhd/.mha and .nrrd (with SimpleITK). Every
patient folder gets ``ID.nii.gz`` (int16 HU), ``ID_mask.nii.gz``, ``ID_pa_drr.png``, ``ID_lat_drr.png`` and, last,
``prepared.json`` (settings and checksums): the same command run again skips what is done and goes on where it
was stopped. ``dataset.json`` is written at the end. A CT that cannot be used, or a file that may hold one but is not
read, is reported by name at the end, the others are done, and the exit status is 1. ``--geometry scout`` renders
X-rays as the localizer of a CT scanner takes them, for networks that read real scouts. ``--with-scouts`` and
``--with-films`` add real X-rays of the patients (``ID_pa_scout.png``, ``ID_lat_film.png``), from ``ID/scouts`` and
``ID/films`` next to ``ID/ct``, or ``ID_scouts`` and ``ID_films`` next to ``ID.nii.gz`` (docs/real_xrays.md). Nothing
that names a person is read from DICOM or NIfTI headers; the names of the input's files and folders become ids and are
noted in the manifest (``source``).
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import os
from pathlib import Path

from xray2ct.command_line import Parser
from xray2ct.conventions import MANIFEST
from xray2ct.data.prepare_folder import Prepared, Splitter, merge_shards, prepare_folder
from xray2ct.data.shards import Shard
from xray2ct.data.splits import SPLITS
from xray2ct.files import InputError, run_cli
from xray2ct.geometry.projector import FOV_MM, HU_WINDOW, KINDS, MU_WATER, XRAY_SCALE, Geometry
from xray2ct.imaging.read_xray import MAX_EDGE

OPPOSITE = {"left": "right", "right": "left"}
SPLIT_OPTIONS = {"split", "val_fraction", "test_fraction", "seed"}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--input", type=Path, help="folder of CTs, searched with its sub-folders")
    parser.add_argument("--output", type=Path, required=True, help="data set folder to make or complete")
    parser.add_argument("--geometry", choices=KINDS, default="cone", help="of the X-rays that are rendered")
    parser.add_argument("--sdd-mm", type=float, help="source to detector (default 1800; scout: 949)")
    parser.add_argument("--sid-mm", type=float, help="source to isocentre (default 1600; scout: 541)")
    parser.add_argument("--frontal", choices=("pa", "ap"), default="pa", help="source behind or in front (default pa)")
    parser.add_argument(
        "--lateral",
        choices=("left", "right"),
        default="left",
        help="side at the detector, source opposite (default left)",
    )
    parser.add_argument("--fov-mm", type=float, default=FOV_MM, help="edge of the cube (default %(default)g)")
    parser.add_argument("--size", type=int, default=256, help="voxels per edge (default %(default)s)")
    parser.add_argument("--xray-size", type=int, default=512, help="pixels per edge (default %(default)s)")
    parser.add_argument("--with-scouts", action="store_true", help="also place the scouts of each CT's session")
    parser.add_argument("--with-films", action="store_true", help="also read the DICOM films of each patient")
    parser.add_argument("--remove-couch", action="store_true", help="set everything but the patient to air")
    parser.add_argument("--assume-ras", action="store_true", help="accept NIfTI files that state no orientation")
    parser.add_argument("--split", type=Path, help="JSON file with train, val and test lists of patient ids")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="without --split (default %(default)s)")
    parser.add_argument("--test-fraction", type=float, default=0.1, help="without --split (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split by hash (default %(default)s)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    parser.add_argument("--overwrite", action="store_true", help="do everything again, whatever is there")
    parser.add_argument("--rescan", action="store_true", help="search for CTs again, whatever an earlier run found")
    parser.add_argument("--shard", metavar="I/N", help="prepare every N-th CT only, as job I of N; then --merge")
    parser.add_argument(
        "--merge", action="store_true", help="write the manifest of all shards; takes --split and the like"
    )
    args = parser.parse_args(argv)
    used = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.merge:
        _refuse(used - {"output", "merge", *SPLIT_OPTIONS}, "--merge: the shards were prepared with them")
    elif args.input is None:
        parser.error("the following arguments are required: --input")
    if args.shard:
        _refuse(used & SPLIT_OPTIONS, "--shard: give it to --merge")
    return args


def _refuse(names: set[str], reason: str) -> None:
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise InputError(f"{options}: cannot go with {reason}")


def _check_args(args):
    for name, low, high in (("size", 16, 1024), ("xray_size", 32, MAX_EDGE), ("workers", 1, 1024)):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value < low:
            raise InputError(f"{option} is {value}; expected at least {low}")
        if value > high:
            raise InputError(f"{option} is {value}; expected at most {high}")
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 0 up to below 1")
    if args.val_fraction + args.test_fraction >= 1:
        raise InputError("--val-fraction and --test-fraction leave nothing to train on; expected a sum below 1")
    if args.with_scouts and args.geometry != "scout":
        raise InputError(f"--with-scouts goes with --geometry scout: scouts are fan beams, not {args.geometry} ones")
    if args.with_films and args.geometry != "cone":
        raise InputError(f"--with-films goes with --geometry cone: films are cone beams, not {args.geometry} ones")
    if args.geometry == "parallel" and (args.frontal, args.lateral) != ("pa", "left"):
        raise InputError("--frontal and --lateral belong to --geometry cone or scout; parallel rays have no source")
    if args.geometry == "parallel" and (args.sdd_mm or args.sid_mm):
        raise InputError(
            "--sdd-mm and --sid-mm belong to --geometry cone or scout; parallel rays have no source distance"
        )
    if args.merge:
        if not args.output.is_dir():
            raise InputError(f"--output {args.output}: no such folder")
        return
    if not args.input.is_dir():
        raise InputError(f"--input {args.input}: no such folder")
    if args.output.resolve().is_relative_to(args.input.resolve()):
        raise InputError(f"--output {args.output} lies inside --input {args.input}; its cubes would be taken for CTs")
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; expected a folder")


def settings_of(args) -> dict:
    """The settings that decide what is written, as they appear in the manifest."""
    try:
        sides = ("in front" if args.frontal == "ap" else "behind", f"on the {OPPOSITE[args.lateral]}")
        geometry = Geometry(args.geometry, args.fov_mm, args.sdd_mm, args.sid_mm, source_sides=sides)
    except ValueError as error:
        raise InputError(str(error)) from None
    settings = {
        "geometry": geometry.to_dict(),
        "hu_window": list(HU_WINDOW),
        "mu_water": MU_WATER,
        "xray_scale": XRAY_SCALE,
        "cube_size": args.size,
        "xray_size": args.xray_size,
        "couch_removed": args.remove_couch,
        "assume_ras": args.assume_ras,
    }
    wanted = {"scouts": args.with_scouts, "films": args.with_films}
    return settings | {kind: True for kind, given in wanted.items() if given}


def _prepared(args) -> Prepared:
    splitter = Splitter(args.split, args.val_fraction, args.test_fraction, args.seed)
    if args.merge:
        return merge_shards(args.output, splitter)
    shard = Shard.parse(args.shard) if args.shard else None
    settings = settings_of(args)
    return prepare_folder(args.input, args.output, settings, splitter, args.workers, args.overwrite, shard, args.rescan)


def main(argv=None) -> int:
    args = parse_args(argv)
    _check_args(args)
    done = _prepared(args)
    if args.shard:
        print(f"shard {args.shard}: {len(done.entries)} of its {done.found} CTs are in {args.output}")
    elif done.entries:
        counts = ", ".join(f"{len(done.split[name])} {name}" for name in SPLITS)
        place = f"{args.output}; settings and split in {args.output / MANIFEST}"
        print(f"{len(done.entries)} patients ({counts}) in {place}")
    if done.failures:
        print(f"{len(done.failures)} of {done.found} CTs could not be prepared:")
        for patient in sorted(done.failures):
            print(f"  {patient}: {done.failures[patient]}")
    if done.left_out:
        print(f"{len(done.left_out)} files or folders were left out:")
        for text in done.left_out:
            print(f"  {text}")
    return 1 if done.failures or done.left_out else 0


if __name__ == "__main__":
    run_cli(main)
