"""Reconstruction from the command line: options, one pair of X-rays, a folder of pairs."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from xray2ct.data.patient_files import find_pairs
from xray2ct.files import InputError, check_writable, describe
from xray2ct.imaging.figures import save_panel
from xray2ct.imaging.read_films import FilmWarning
from xray2ct.imaging.write_volume import FORMATS, check_output, write_volume
from xray2ct.inference.consistency import add_consistency_argument, steps_of
from xray2ct.inference.film_arguments import add_film_arguments, exposures, film_options
from xray2ct.inference.reconstruction import Pipeline
from xray2ct.models.blocks import pixels_of
from xray2ct.progress import be_quiet, progress_bar


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every script that turns X-ray files into volumes."""
    parser.add_argument("--pa", help="frontal X-ray: PNG, JPEG, TIFF, .npy or DICOM")
    parser.add_argument("--lateral", help="lateral X-ray")
    parser.add_argument(
        "--folder", help="instead: all pairs ID_pa.png, ID_lat.png (and the like) in and below this folder"
    )
    parser.add_argument("--output", help="file to write (.nii.gz, .nii, .nrrd, .mha; a folder for DICOM)")
    parser.add_argument(
        "--format", choices=FORMATS, help="of the volumes (default: nifti with --folder, else by the name of --output)"
    )
    parser.add_argument(
        "--skip-existing", action="store_true", help="with --folder: leave out what has a volume already"
    )
    add_film_arguments(parser)
    add_consistency_argument(parser)
    parser.add_argument("--picture", help="also draw the X-rays and the volume (.png); a folder with --folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument(
        "--precision",
        default="checked",
        choices=("checked", "auto", "float32", "bfloat16", "float16"),
        help="checked: float32 on a CPU; on a GPU bfloat16 where its convolutions are found right (default checked)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def check_common_arguments(args) -> None:
    """Raise :class:`InputError`, before anything is loaded, for what cannot be read or written."""
    if args.quiet:
        be_quiet()
    if not args.output:
        raise InputError("--output is missing; expected the file to write, or a folder with --folder")
    exposures(args)
    film_options(args)
    steps_of(args.consistency)
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
    xrays, volume = _predict(pipeline, _read(pipeline, pa, lateral, args))
    return _write(pipeline, xrays, volume, output, picture, args)


def _read(pipeline: Pipeline, pa, lateral, args) -> tuple[torch.Tensor, bool, list[str]]:
    """X-rays at the model's resolution, whether they are no renderings, and what is to be said about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilmWarning)  # they are among the notes
        xrays = pipeline.read(pa, lateral, args.xray_normalization, exposure=exposures(args), films=film_options(args))
    return xrays, pipeline.measured, pipeline.notes


def _predict(pipeline: Pipeline, reading) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`_read` returned -> X-rays and volume; notes go to standard error."""
    xrays, measured, notes = reading
    _report(notes)
    volume = pipeline.predict(xrays, measured)
    _report(pipeline.consistency_notes)
    return xrays, volume


def _report(notes: list[str]) -> None:
    for note in notes:
        tqdm.write(f"note: {note}", file=sys.stderr)


def _write(pipeline: Pipeline, xrays, volume, output, picture, args) -> tuple[np.ndarray, np.ndarray]:
    hu, affine = pipeline.to_hu(volume)
    write_volume(output, hu, affine, args.format, pipeline.origin)
    if picture:
        shown = pixels_of(xrays[None])[0]
        shown = shown if len(shown) == 2 else torch.cat([shown, torch.zeros_like(shown)])
        save_panel(picture, shown, volume, None, pipeline.hu_window)
    return hu, affine


def reconstruct_folder(pipeline: Pipeline, args) -> int:
    """Every pair of ``--folder``, with a progress bar; returns the exit status.

    While the network computes one pair, the next is read and the one before is written, each in a thread of its own:
    memory does not grow with the number of pairs. Whatever goes wrong with one pair, the others are done; at the end
    those that failed and the X-rays that belong to no pair are named (status 1).
    """
    args.format, views = args.format or "nifti", pipeline.system.num_views
    pairs, unused = find_pairs(args.folder, (args.output, args.picture))
    pictures = {patient: Path(args.picture) / f"{patient}.png" for patient in pairs if args.picture}
    unused = [path for path in unused if path not in pictures.values()]
    if views == 1 and any(lateral for _, lateral in pairs.values()):
        why = f"{pipeline.system.name} was trained with the PA view alone"
        tqdm.write(f"note: lateral X-rays are not used: {why}", file=sys.stderr)
    outputs = {patient: Path(args.output) / f"{patient}{FORMATS[args.format]}" for patient in pairs}
    wanted = [patient for patient in pairs if not (args.skip_existing and outputs[patient].exists())]

    def read(patient):
        pair = pairs[patient][:views]
        if None in pair:
            raise InputError(f"the {'PA' if pair[0] is None else 'lateral'} X-ray is missing")
        check_output(outputs[patient], kind=args.format)
        if patient in pictures:
            _check_picture(pictures[patient], pair)
        return _read(pipeline, *(pair if views == 2 else (pair[0], None)), args)

    def write(patient, xrays_and_volume):
        _write(pipeline, *xrays_and_volume, outputs[patient], pictures.get(patient), args)

    bar = progress_bar(total=len(wanted), desc="Reconstructing", unit="pairs")
    with bar:
        failed = overlapped(wanted, read, partial(_predict, pipeline), write, bar.update)
    there = f", {len(pairs) - len(wanted)} already there" if len(wanted) < len(pairs) else ""
    print(f"{args.output}: {len(wanted) - len(failed)} of {len(pairs)} volumes written{there}")
    for patient, error in failed.items():
        print(f"failed: {patient}: {describe(error)}", file=sys.stderr)
    for path in unused:
        print(f"not used: {path}: expected an X-ray called like ID_pa.png or ID_lat.png", file=sys.stderr)
    return int(bool(failed or unused))


def overlapped(items: Sequence, read, compute, write, done: Callable[[], Any] = int) -> dict[Any, Exception]:
    """``write(item, compute(read(item)))`` for each, in order; the errors of those that failed, in the items' order.

    ``compute`` runs in this thread, one item after the other; meanwhile another thread reads the next item and a third
    writes the one before. At most one item waits for each of them. ``done`` is called after each item.
    """
    errors: dict[Any, Exception] = {}

    def settle(item, future) -> None:
        try:
            future.result()
        except Exception as error:  # noqa: BLE001 - of whatever kind: hours of other items must not be lost to it
            errors[item] = error
        done()

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        reading = reader.submit(read, items[0]) if items else None
        writing: tuple[Any, Future] | None = None
        for index, item in enumerate(items):
            ready, reading = reading, reader.submit(read, items[index + 1]) if index + 1 < len(items) else None
            step: Future = Future()
            try:
                result = compute(ready.result())
            except Exception as error:  # noqa: BLE001 - as above
                step.set_exception(error)
            else:
                step = writer.submit(write, item, result)
                del result
            if writing is not None:
                settle(*writing)
            writing = item, step
        if writing is not None:
            settle(*writing)
    return {item: errors[item] for item in items if item in errors}


def describe_volume(pipeline: Pipeline, output, hu: np.ndarray) -> str:
    """One line about a written volume."""
    spacing = pipeline.system.geometry.fov_mm / hu.shape[0]
    return f"{output}: {' x '.join(map(str, hu.shape))} voxels of {spacing:g} mm, {hu.min()} to {hu.max()} HU"
