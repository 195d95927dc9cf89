"""Command-line options of every script that reads X-rays from elsewhere (docs/films.md explains them)."""

from __future__ import annotations

import argparse

from xray2ct.files import InputError
from xray2ct.imaging.film_sides import TURNS, VIEW_SOURCES, FilmOptions
from xray2ct.imaging.stored_xray import Exposure
from xray2ct.imaging.xray_scale import NORMALIZATIONS


def add_film_arguments(parser: argparse.ArgumentParser) -> None:
    """Options about the values, the scale and the position of two films."""
    parser.add_argument(
        "--xray-normalization",
        default="auto",
        choices=NORMALIZATIONS,
        help="auto: the project's own X-rays by their scale, logarithms (by a DICOM header) by percentiles, all else by"
        " its histogram inside the body; manifest: the project's own scale; percentile: unknown linear scale;"
        " histogram: unknown increasing scale (default %(default)s)",
    )
    parser.add_argument(
        "--pixel-spacing-mm",
        type=float,
        nargs="+",
        metavar="MM",
        help="of the detector, for both files or one for each; default: as a DICOM file says",
    )
    parser.add_argument(
        "--thorax-width-mm",
        type=float,
        help="between the outer borders of the lungs: sets the scale of films without pixel spacing",
    )
    parser.add_argument("--sdd-mm", type=float, help="source to detector; default: as a DICOM file or the model says")
    parser.add_argument(
        "--sid-mm",
        type=float,
        help="source to the patient's middle; default: as far from the detector as the model has it",
    )
    parser.add_argument(
        "--view-from",
        choices=VIEW_SOURCES,
        default="pixels",
        help="what tells the views, turns and facing of films: the picture, or headers and the order of the files alone"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--rotate",
        type=int,
        nargs="+",
        choices=TURNS,
        default=[0],
        metavar="DEGREES",
        help="turn the files clockwise by 0, 90, 180 or 270: both, or PA and lateral",
    )
    parser.add_argument("--flip-lateral", action="store_true", help="mirror the lateral (it must face left)")
    parser.add_argument("--invert", action="store_true", help="bone is dark in the files")
    parser.add_argument("--no-polarity-check", action="store_true", help="do not invert films whose bone looks dark")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not refuse swapped or equal views, what looks like no chest, other body parts by a header",
    )


def film_options(args: argparse.Namespace) -> FilmOptions:
    """:class:`FilmOptions` of the options; :class:`InputError` for ones that cannot be."""
    return FilmOptions(
        view_from=args.view_from,
        rotate=_each(args.rotate, "--rotate"),
        flip_lateral=args.flip_lateral,
        invert=args.invert,
        polarity_check=not args.no_polarity_check,
        check=not args.no_check,
        thorax_width_mm=args.thorax_width_mm,
    )


def exposures(args: argparse.Namespace) -> tuple[Exposure, Exposure]:
    """How the two X-rays were taken, as far as the options say; :class:`InputError` for impossible lengths."""
    spacings = _each(args.pixel_spacing_mm or [None], "--pixel-spacing-mm")
    pa, lateral = (Exposure(spacing, args.sdd_mm, args.sid_mm) for spacing in spacings)
    return pa, lateral


def _each(values: list, option: str) -> tuple:
    if len(values) > 2:
        raise InputError(f"{option} has {len(values)} values; expected one for both files, or one for each")
    return values[0], values[-1]
