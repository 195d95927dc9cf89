"""``--weights`` of the commands: which checkpoints a command line means, by name, by path or by default."""

from __future__ import annotations

import argparse
import contextlib
import sys

from xray2ct.data.patient_files import find_pairs
from xray2ct.files import InputError
from xray2ct.imaging.read_xray import decode
from xray2ct.weights import DEFAULT, DEFAULT_FILM, available, both_stages, weights_folder

OPTIONS = ("base", "refinement", "cascade")  # that --weights stands for; not every command has all


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """``--weights NAME|PATH``, once for each stage."""
    parser.add_argument(
        "--weights",
        action="append",
        metavar="NAME|PATH",
        help="shipped weights or files, instead of --base and --refinement: chest64, chest64+chest256, or the option"
        f" once for each stage (default: {DEFAULT}, where no checkpoint is given)",
    )


def choose_weights(args: argparse.Namespace, film: bool = False) -> None:
    """Set ``args.base`` and ``args.refinement`` from ``--weights`` or, where no checkpoint is given, by default.

    film: the X-rays are films, for which :data:`DEFAULT_FILM` is taken where it is there. What was chosen by default is
    reported on standard error. Raises :class:`InputError` for contradicting options, and where there is no default.
    """
    given = [name for name in OPTIONS if getattr(args, name, None)]
    if args.weights:
        if given:
            raise InputError(f"--weights stands for --base and --refinement; expected it without --{given[0]}")
        args.base, args.refinement = both_stages(args.weights)
        return
    if given == ["refinement"]:
        raise InputError(
            f"--refinement {args.refinement}: needs the stage 1 that it was trained on; expected --base, too"
        )
    if given:
        return
    names = available()
    if DEFAULT not in names:
        raise InputError(
            f"--base is missing; expected a checkpoint, or --weights ({weights_folder()} has no {DEFAULT})"
        )
    args.base = DEFAULT_FILM if film and DEFAULT_FILM in names else DEFAULT
    trained = "films" if args.base == DEFAULT_FILM else "renderings and not on films" if film else "renderings"
    print(f"note: weights {args.base}, trained on {trained}; --weights or --base choose others", file=sys.stderr)


def shows_films(args: argparse.Namespace) -> bool:
    """Whether the X-rays of a command line (``--pa``, or the first of ``--folder``) were not rendered by the project.

    Raises :class:`InputError` for a ``--pa`` that cannot be read, and a folder without X-rays.
    """
    if args.xray_normalization == "manifest":
        return False
    if not args.folder:
        return not decode(args.pa, 512).own
    pairs, _ = find_pairs(args.folder, (args.output, args.picture))
    with contextlib.suppress(InputError):  # of one pair of many: reported when its turn comes
        return not decode(next(path for path in next(iter(pairs.values())) if path), 512).own
    return False
