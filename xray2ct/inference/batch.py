"""Reconstruction from the command line: options, one pair of X-rays, a folder of pairs."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from xray2ct.data.patient_files import find_pairs
from xray2ct.files import InputError, check_writable, describe
from xray2ct.imaging.figures import save_panel
from xray2ct.imaging.read_films import FilmWarning
from xray2ct.imaging.write_volume import FORMATS, check_output, write_volume
from xray2ct.inference.film_arguments import add_film_arguments, exposures, film_options
from xray2ct.inference.reconstruction import Pipeline


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every script that turns X-ray files into volumes."""
    parser.add_argument("--pa", help="frontal X-ray: PNG, JPEG, TIFF, .npy or DICOM")
    parser.add_argument("--lateral", help="lateral X-ray")
    parser.add_argument(
        "--folder", help="instead: all pairs ID_pa.png, ID_lat.png (and the like) in and below this folder"
    )
    parser.add_argument(
        "--output", required=True, help="file to write (.nii.gz, .nii, .nrrd, .mha; a folder for DICOM)"
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="of the volumes (default: nifti with --folder, else by the name of --output)"
    )
    parser.add_argument(
        "--skip-existing", action="store_true", help="with --folder: leave out what has a volume already"
    )
    add_film_arguments(parser)
    parser.add_argument("--picture", help="also draw the X-rays and the volume (.png); a folder with --folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16", "float16"))


def check_common_arguments(args) -> None:
    """Raise :class:`InputError`, before anything is loaded, for what cannot be read or written."""
    exposures(args)
    film_options(args)
    if args.folder:
        if args.pa or args.lateral:
            raise InputError("--folder stands for --pa and --lateral; expected one or the other")
        for option in ("output", "picture"):
            path = getattr(args, option)
            if path and os.path.exists(path) and not os.path.isdir(path):
                raise InputError(f"--{option} {path}: is a file; expected a folder for the volumes of --folder")
            if path:
                check_writable(Path(path) / "volume", f"--{option}")
        return
    if not args.pa:
        raise InputError("--pa is missing; expected the two X-rays, or --folder")
    if args.skip_existing:
        raise InputError("--skip-existing belongs to --folder")
    check_output(args.output, "--output", kind=args.format)
    if args.picture:
        _check_picture(args.picture, (args.pa, args.lateral))


def _check_picture(path, xrays) -> None:
    if not str(path).endswith(".png") or os.path.isdir(path):
        raise InputError(f"--picture {path}: expected a file's name ending in .png")
    if Path(path).resolve() in {Path(p).resolve() for p in xrays if p}:
        raise InputError(f"--picture {path} is one of the X-rays; expected another name")
    check_writable(path, "--picture")


def reconstruct_one(pipeline: Pipeline, pa, lateral, output, picture, args) -> tuple[np.ndarray, np.ndarray]:
    """One pair of files -> the volume's file, and a picture when wanted; returns ``(HU, affine)``.

    Notes about the X-rays go to standard error. Nothing is written unless all can be: :func:`check_common_arguments`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilmWarning)  # they are among the notes
        xrays = pipeline.read(pa, lateral, args.xray_normalization, exposure=exposures(args), films=film_options(args))
    for note in pipeline.notes:
        tqdm.write(f"note: {note}", file=sys.stderr)
    volume = pipeline.predict(xrays)
    hu, affine = pipeline.to_hu(volume)
    write_volume(output, hu, affine, args.format)
    if picture:
        shown = xrays if len(xrays) == 2 else torch.cat([xrays, torch.zeros_like(xrays)])
        save_panel(picture, shown, volume, None, pipeline.hu_window)
    return hu, affine


def reconstruct_folder(pipeline: Pipeline, args) -> int:
    """Every pair of ``--folder``, with a progress bar; returns the exit status.

    Memory does not grow with the number of pairs. Whatever goes wrong with one pair, the others are done; at the end
    those that failed and the X-rays that belong to no pair are named (status 1).
    """
    args.format, views = args.format or "nifti", pipeline.system.num_views
    pairs, unused = find_pairs(args.folder, (args.output, args.picture))
    pictures = {patient: Path(args.picture) / f"{patient}.png" for patient in pairs if args.picture}
    unused = [path for path in unused if path not in pictures.values()]
    if views == 1 and any(lateral for _, lateral in pairs.values()):
        why = f"{pipeline.system.name} was trained with the PA view alone"
        tqdm.write(f"note: lateral X-rays are not used: {why}", file=sys.stderr)
    failed, done, skipped = {}, 0, 0
    for patient, pair in tqdm(pairs.items(), desc="Reconstructing", unit="pair", disable=None):
        output = Path(args.output) / f"{patient}{FORMATS[args.format]}"
        if args.skip_existing and output.exists():
            skipped += 1
            continue
        try:
            if None in pair[:views]:
                raise InputError(f"the {'PA' if pair[0] is None else 'lateral'} X-ray is missing")
            check_output(output, kind=args.format)
            if patient in pictures:
                _check_picture(pictures[patient], pair)
            reconstruct_one(pipeline, *(pair if views == 2 else (pair[0], None)), output, pictures.get(patient), args)
            done += 1
        except Exception as error:  # noqa: BLE001 - of whatever kind: hours of other pairs must not be lost to it
            failed[patient] = describe(error)
    there = f", {skipped} already there" if skipped else ""
    print(f"{args.output}: {done} of {len(pairs)} volumes written{there}")
    for patient, message in failed.items():
        print(f"failed: {patient}: {message}", file=sys.stderr)
    for path in unused:
        print(f"not used: {path}: expected an X-ray called like ID_pa.png or ID_lat.png", file=sys.stderr)
    return int(bool(failed or unused))


def describe_volume(pipeline: Pipeline, output, hu: np.ndarray) -> str:
    """One line about a written volume."""
    spacing = pipeline.system.geometry.fov_mm / hu.shape[0]
    return f"{output}: {' x '.join(map(str, hu.shape))} voxels of {spacing:g} mm, {hu.min()} to {hu.max()} HU"
