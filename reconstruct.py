r"""Two X-ray files -> a CT volume in Hounsfield units: NIfTI, NRRD, MetaImage or a DICOM series.

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
import os
import sys
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ct_io import cube_affine
from figures import save_panel
from files import InputError, check_writable, describe, run_cli
from patient_files import find_pairs
from pipeline import DirectSystem, add_tile_argument
from projector import unit_to_hu
from volume_output import FORMATS, check_output, write_volume
from xray_dicom import Acquisition
from xray_io import NORMALIZATIONS, REFERENCE_PERCENTILES, check_spacings, check_views, read_xray

XraySource = str | PathLike | np.ndarray | torch.Tensor  # a file, or an array (H, H) in [0, 1]


class Pipeline:
    """A loaded system that turns two X-rays into a volume; see :func:`load_pipeline`.

    system: :class:`DirectSystem`, or another with its ``predict``, ``xray_size``, ``geometry``, ``hu_window`` and
        ``notes``.
    """

    def __init__(self, system: DirectSystem):
        self.system = system
        self.hu_window = tuple(system.hu_window)
        self.notes: list[str] = []

    def read(
        self,
        pa: XraySource,
        lateral: XraySource,
        normalization: str = "manifest",
        invert: bool = False,
        check: bool = True,
        acquisition: Acquisition | None = None,
    ) -> torch.Tensor:
        """Two X-ray files or arrays (H, W) in [0, 1] -> ``(2, S, S)`` float32 at the model's resolution.

        normalization, invert: see :func:`xray_io.read_xray`. acquisition: pixel spacing and distances of the files, in
        place of what a DICOM header says; an array shows what the model's detector sees. Raises :class:`InputError`
        naming the file for anything unusable, for a pixel spacing that is known of one file only, and for swapped views
        (``check``). What was done to the pictures is left in ``notes``.
        """
        size = self.system.xray_size
        self.notes, images, xrays = list(self.system.notes), [], {}
        for view, source in enumerate((pa, lateral)):
            if isinstance(source, np.ndarray | torch.Tensor):
                images.append(_array_view(source, view, size))
                continue
            xray = read_xray(
                source, normalization, size, view, invert, geometry=self.system.geometry, acquisition=acquisition
            )
            self.notes += [f"{source}: {note}" for note in xray.notes]
            images.append(xray.pixels)
            xrays[source] = xray
            if normalization == "manifest":
                self.notes += [f"{source}: {note}" for note in _brightness_notes(xray.pixels, view)]
        check_spacings(xrays)
        if check:
            names = [str(s) if isinstance(s, str | Path) else n for s, n in zip((pa, lateral), ("pa", "lateral"))]
            self.notes += check_views(images[0], images[1], names)
        return torch.from_numpy(np.stack(images).astype(np.float32))

    def predict(self, xrays: torch.Tensor) -> torch.Tensor:
        """``(2, S, S)`` -> volume ``(D, H, W)`` in [0, 1], float32 on the CPU; NaN is an :class:`InputError`."""
        return self.system.predict(xrays.unsqueeze(0))[0, 0]

    def to_hu(self, volume: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """``(D, H, W)`` in [0, 1] -> HU ``(D, H, W)`` int16 and the 4 x 4 affine of the NIfTI file.

        X-rays do not say where the patient lay: the cube is centred at the world's origin, its axes
        are the patient's.
        """
        hu = np.rint(unit_to_hu(volume.numpy(), self.hu_window)).astype(np.int16)
        return hu, cube_affine((0.0, 0.0, 0.0), self.system.geometry.fov_mm, hu.shape[0])

    def __call__(self, pa: XraySource, lateral: XraySource, **options) -> tuple[np.ndarray, np.ndarray]:
        """Two X-rays -> ``(HU int16 (D, H, W), affine)``; options as in :meth:`read`.

        ``volume_output.write_volume("ct.nii.gz", hu, affine)`` writes them.
        """
        return self.to_hu(self.predict(self.read(pa, lateral, **options)))


def load_pipeline(
    base: str | PathLike,
    refinement: str | PathLike | None = None,
    device: str = "auto",
    precision: str = "float32",
    tile: int | str = "auto",
) -> Pipeline:
    """Load a stage-1 checkpoint, and a stage-2 one for 256^3: ``hu, affine = pipeline(pa, lateral)``.

    base: also a baseline's. device: auto, cpu, cuda, ... precision: float32, bfloat16, float16 or auto. tile: see
    :class:`DirectSystem`. Raises :class:`InputError` naming the file when a checkpoint is missing, damaged, of another
    kind or unfit for the other.
    """
    return Pipeline(DirectSystem(base, refinement, device, precision, tile))


def _array_view(source, view: int, size: int) -> np.ndarray:
    array = np.asarray(source, dtype=np.float32)
    name = ("pa", "lateral")[view]
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise InputError(f"{name}: array of shape {array.shape}; expected a square (H, H), padded and not stretched")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
        raise InputError(f"{name}: array with values {array.min():g} to {array.max():g}; expected finite, in [0, 1]")
    if array.max() == array.min():
        raise InputError(f"{name}: the X-ray is constant ({array.max():g})")
    tensor = torch.from_numpy(array)[None, None]
    mode = "area" if min(array.shape) > size else "bilinear"
    return torch.nn.functional.interpolate(tensor, size=(size, size), mode=mode)[0, 0].numpy()


def _brightness_notes(pixels, view: int) -> list[str]:
    """A doubt where a picture read on the project's own scale is far darker or brighter than its X-rays.

    Their 99th percentiles lay between 0.76 and 1.23 times the mean on 25 public chest CTs.
    """
    level, usual = float(np.percentile(pixels, 99)), REFERENCE_PERCENTILES[view][1]
    if 0.65 * usual < level < 1.3 * usual:
        return []
    return [
        f"brightness {level:.2f} (99th percentile), {usual:.2f} is usual for X-rays rendered by this project;"
        " a picture from elsewhere needs the normalization 'percentile' (--xray-normalization)"
    ]


# ------------------------------------------------------------------------------------------------
# Command line, shared with the cascade's


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every script that turns X-ray files into volumes."""
    parser.add_argument("--pa", help="frontal X-ray: PNG, JPEG, TIFF, .npy or DICOM")
    parser.add_argument("--lateral", help="lateral X-ray, anterior on the left")
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
    parser.add_argument(
        "--xray-normalization",
        "--xray_normalization",
        default="manifest",
        choices=NORMALIZATIONS,
        help="manifest: the project's own X-rays; percentile: unknown linear scale; histogram: unknown increasing"
        " scale, such as pictures without the logarithm taken (default %(default)s)",
    )
    parser.add_argument("--pixel-spacing-mm", type=float, help="of the detector; default: as a DICOM file says")
    parser.add_argument("--sdd-mm", type=float, help="source to detector; default: as a DICOM file or the model says")
    parser.add_argument(
        "--sid-mm",
        type=float,
        help="source to the patient's middle; default: as far from the detector as the model has it",
    )
    parser.add_argument("--invert", action="store_true", help="bone is dark in the files")
    parser.add_argument("--no-check", action="store_true", help="do not look for swapped views")
    parser.add_argument("--picture", help="also draw the X-rays and the volume (.png); a folder with --folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16", "float16"))


def check_common_arguments(args) -> None:
    """Raise :class:`InputError`, before anything is loaded, for what cannot be read or written."""
    Acquisition(args.pixel_spacing_mm, args.sdd_mm, args.sid_mm)
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
    xrays = pipeline.read(
        pa,
        lateral,
        args.xray_normalization,
        args.invert,
        check=not args.no_check,
        acquisition=Acquisition(args.pixel_spacing_mm, args.sdd_mm, args.sid_mm),
    )
    for note in pipeline.notes:
        tqdm.write(f"note: {note}", file=sys.stderr)
    volume = pipeline.predict(xrays)
    hu, affine = pipeline.to_hu(volume)
    write_volume(output, hu, affine, args.format)
    if picture:
        shown = xrays if len(xrays) == 2 else torch.cat([xrays, torch.zeros_like(xrays)])
        save_panel(picture, shown, volume, None, pipeline.hu_window)
    return hu, affine


def reconstruct_folder(pipeline: Pipeline, args, views: int = 2) -> int:
    """Every pair of ``--folder``, with a progress bar; returns the exit status.

    Memory does not grow with the number of pairs. Whatever goes wrong with one pair, the others are done; at the end
    those that failed and the X-rays that belong to no pair are named (status 1).
    """
    args.format = args.format or "nifti"
    pairs, unused = find_pairs(args.folder, (args.output, args.picture))
    pictures = {patient: Path(args.picture) / f"{patient}.png" for patient in pairs if args.picture}
    unused = [path for path in unused if path not in pictures.values()]
    if views == 1 and any(lateral for _, lateral in pairs.values()):
        tqdm.write("note: lateral X-rays are not used: the cascade was trained with the PA view alone", file=sys.stderr)
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


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="stage-1 checkpoint")
    parser.add_argument("--refinement", help="stage-2 checkpoint: the volume has 256^3 voxels instead of 64^3")
    add_tile_argument(parser)
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    check_common_arguments(args)
    if not args.folder and not args.lateral:
        raise InputError("--lateral is missing; expected the two X-rays, or --folder")
    pipeline = load_pipeline(args.base, args.refinement, args.device, args.precision, args.tile)
    if args.folder:
        return reconstruct_folder(pipeline, args)
    hu, _ = reconstruct_one(pipeline, args.pa, args.lateral, args.output, args.picture, args)
    print(describe_volume(pipeline, args.output, hu))
    return 0


if __name__ == "__main__":
    run_cli(main)
