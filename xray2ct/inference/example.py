"""``--example``: the X-rays that come with the project, so that a first reconstruction needs no files."""

from __future__ import annotations

import argparse
from pathlib import Path

from xray2ct.files import InputError

FOLDER = Path(__file__).resolve().parents[2] / "examples"  # beside the package, in a clone as in an installation
RENDERED, FILM = "rendered", "film"
VIEWS = {  # examples/README.md says whose they are
    RENDERED: ("lidc_0001_pa.png", "lidc_0001_lat.png"),
    FILM: ("lidc_0001_film_pa.png", "lidc_0001_film_lat.png"),
}


def add_example_argument(parser: argparse.ArgumentParser) -> None:
    """``--example [rendered|film]``."""
    parser.add_argument(
        "--example",
        nargs="?",
        const=RENDERED,
        choices=tuple(VIEWS),
        help="reconstruct X-rays that come with the project: rendered from a CT (default), or the same patient as on"
        " simulated films",
    )


def use_example(args: argparse.Namespace, folder: Path = FOLDER) -> None:
    """Set ``args.pa``, ``args.lateral`` and, where they are not given, ``args.output`` and ``args.picture``.

    Raises :class:`InputError` when X-rays are given, too, or the example's are not there.
    """
    given = next((name for name in ("pa", "lateral", "folder") if getattr(args, name)), None)
    if given:
        raise InputError(f"--example brings its own X-rays; expected it without --{given}")
    here = Path.cwd()
    folder = folder.relative_to(here) if folder.is_relative_to(here) else folder  # short in what is printed
    args.pa, args.lateral = (folder / name for name in VIEWS[args.example])
    missing = next((path for path in (args.pa, args.lateral) if not path.is_file()), None)
    if missing:
        raise InputError(f"{missing}: the example X-ray is not there; expected the folder that comes with the project")
    # Into the current folder unless options say otherwise.
    stem = "example_film" if args.example == FILM else "example"
    args.output, args.picture = args.output or f"{stem}_ct.nii.gz", args.picture or f"{stem}_ct.png"
