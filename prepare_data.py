"""Prepare a folder of CTs: one patient cube, scan mask and two X-rays each, and a manifest with the split.

    python prepare_data.py --input CTS --output data/prepared
    python prepare_data.py --input CTS --output data/prepared --split split.json --remove-couch --workers 8

CTS may hold NIfTI files, folders of DICOM files (with pydicom installed), .mhd/.mha and .nrrd (with SimpleITK). Every
patient folder gets ``ID.nii.gz`` (int16 HU), ``ID_mask.nii.gz``, ``ID_pa_drr.png``, ``ID_lat_drr.png`` and, last,
``prepared.json`` (settings and checksums): the same command run again skips what is done and goes on where it
was stopped. ``dataset.json`` is written at the end. A CT that cannot be used, or a file that may hold one but is not
read, is reported by name at the end, the others are done, and the exit status is 1. Nothing that names a person is
read from DICOM or NIfTI headers; the names of the input's files and folders become ids and are noted in the manifest
(``source``).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from xray2ct.data.prepare import MANIFEST, check_output, prepare_all, write_manifest
from xray2ct.data.splits import SPLITS, check_split, split_by_hash
from xray2ct.files import InputError, read_json, run_cli
from xray2ct.geometry.projector import FOV_MM, HU_WINDOW, MU_WATER, XRAY_SCALE, Geometry
from xray2ct.imaging.find_cts import search_cts
from xray2ct.imaging.read_xray import MAX_EDGE


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder of CTs, searched with its sub-folders")
    parser.add_argument("--output", type=Path, required=True, help="data set folder to make or complete")
    parser.add_argument("--geometry", choices=("cone", "parallel"), default="cone")
    parser.add_argument("--sdd-mm", type=float, help="source to detector, cone only (default 1800)")
    parser.add_argument("--sid-mm", type=float, help="source to isocentre, cone only (default 1600)")
    parser.add_argument("--fov-mm", type=float, default=FOV_MM, help="edge of the cube (default %(default)g)")
    parser.add_argument("--size", type=int, default=256, help="voxels per edge (default %(default)s)")
    parser.add_argument("--xray-size", type=int, default=512, help="pixels per edge (default %(default)s)")
    parser.add_argument("--remove-couch", action="store_true", help="set everything but the patient to air")
    parser.add_argument("--assume-ras", action="store_true", help="accept NIfTI files that state no orientation")
    parser.add_argument("--split", type=Path, help="JSON file with train, val and test lists of patient ids")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="without --split (default %(default)s)")
    parser.add_argument("--test-fraction", type=float, default=0.1, help="without --split (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split by hash (default %(default)s)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="default %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="do everything again, whatever is there")
    return parser.parse_args(argv)


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
    if args.geometry == "parallel" and (args.sdd_mm or args.sid_mm):
        raise InputError("--sdd-mm and --sid-mm belong to --geometry cone; parallel rays have no source distance")
    if not args.input.is_dir():
        raise InputError(f"--input {args.input}: no such folder")
    if args.output.resolve().is_relative_to(args.input.resolve()):
        raise InputError(f"--output {args.output} lies inside --input {args.input}; its cubes would be taken for CTs")
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; expected a folder")


def _check_apart(args, sources):
    for source in sources:  # a link may lead there
        if source.path.resolve().is_relative_to(args.output.resolve()):
            raise InputError(f"{source.path}: lies in --output {args.output}; its cubes would be taken for CTs")


def settings_of(args) -> dict:
    """The settings that decide what is written, as they appear in the manifest."""
    try:
        geometry = Geometry(args.geometry, args.fov_mm, args.sdd_mm, args.sid_mm)
    except ValueError as error:
        raise InputError(str(error)) from None
    return {
        "geometry": geometry.to_dict(),
        "hu_window": list(HU_WINDOW),
        "mu_water": MU_WATER,
        "xray_scale": XRAY_SCALE,
        "cube_size": args.size,
        "xray_size": args.xray_size,
        "couch_removed": args.remove_couch,
        "assume_ras": args.assume_ras,
    }


def main(argv=None) -> int:
    args = parse_args(argv)
    _check_args(args)
    settings = settings_of(args)
    sources, left_out = search_cts(args.input)
    for text in left_out:  # before hours of work, and again at the end
        print(f"left out: {text}")
    _check_apart(args, sources)
    ids = [source.patient_id for source in sources]
    given = check_split(read_json(args.split), ids, args.split) if args.split else None  # before hours of work
    check_output(args.output, sources, settings, args.overwrite)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        (args.output / MANIFEST).unlink(missing_ok=True)  # if this run is killed, it would describe a mixture

    entries, failures = prepare_all(sources, args.output, settings, args.workers, args.overwrite)
    for source in sources:
        if source.patient_id in entries:
            entries[source.patient_id]["source"] = source.path.relative_to(args.input).as_posix()
    if entries:
        if given:
            split = {name: [patient for patient in given[name] if patient in entries] for name in SPLITS}
        else:
            split = split_by_hash(entries, args.val_fraction, args.test_fraction, args.seed)
        write_manifest(args.output, settings, split, "file" if given else "hash", entries)
        counts = ", ".join(f"{len(split[name])} {name}" for name in SPLITS)
        print(f"{len(entries)} patients ({counts}) in {args.output}; settings and split in {args.output / MANIFEST}")
    if failures:
        print(f"{len(failures)} of {len(sources)} CTs could not be prepared:")
        for patient in sorted(failures):
            print(f"  {patient}: {failures[patient]}")
    if left_out:
        print(f"{len(left_out)} files or folders were left out:")
        for text in left_out:
            print(f"  {text}")
    return 1 if failures or left_out else 0


if __name__ == "__main__":
    run_cli(main)
