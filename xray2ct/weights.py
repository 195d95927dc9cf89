"""Shipped weights by name: ``chest64`` is ``weights/chest64.safetensors``, wherever a checkpoint's path is taken.

from xray2ct.weights import resolve
checkpoint = resolve("chest64")     # as load_checkpoint gives one, its checksum verified
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError
from xray2ct.weights_file import SUFFIX

VARIABLE = "XRAY2CT_WEIGHTS"  # a folder to look in instead of the one that comes with the project
DEFAULT, DEFAULT_FILM = "chest64", "chest64-film"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # no dot, no slash: anything else is a path


def weights_folder() -> Path:
    """Where named weights lie: ``XRAY2CT_WEIGHTS``, or ``weights`` beside the package (clone and installation)."""
    return Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[1] / "weights")


def available(folder: str | os.PathLike | None = None) -> list[str]:
    """Names of the weights in ``folder`` (default: :func:`weights_folder`)."""
    return sorted(path.stem for path in Path(folder or weights_folder()).glob(f"*{SUFFIX}"))


def find(name: str | os.PathLike, folder: str | os.PathLike | None = None) -> Path:
    """The file of weights by name or path; a path, a ``Path`` and the name of an existing file stay what they are.

    Raises :class:`InputError` for a name that is not there, with the nearest ones and the list.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or os.path.isfile(name):
        return Path(name)
    folder = Path(folder or weights_folder())
    names = available(folder)
    if name in names:
        return folder / f"{name}{SUFFIX}"
    near = difflib.get_close_matches(name, names, 3, 0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    there = f"it has {', '.join(names)}" if names else "it has none"
    raise InputError(f"{name}: no such file, and no weights of this name in {folder}{hint} ({there})")


def resolve(name: str | os.PathLike, kind: str | None = None, folder: str | os.PathLike | None = None) -> dict:
    """The checkpoint of :func:`find`; ``kind`` and errors as in :func:`load_checkpoint`."""
    return load_checkpoint(find(name, folder), kind)


def both_stages(names: Iterable[str | os.PathLike]) -> tuple[str | os.PathLike, str | os.PathLike | None]:
    """``["chest64+chest256"]`` or ``["chest64", "chest256"]`` -> the weights of stage 1, and of stage 2 or None.

    A path is never divided. Raises :class:`InputError` for more than two.
    """
    found: list[str | os.PathLike] = []
    for name in names:
        parts = str(name).split("+")
        whole = not isinstance(name, str) or os.path.isfile(name) or not all(map(_NAME.fullmatch, parts))
        found += [name] if whole else parts
    if not 1 <= len(found) <= 2:
        raise InputError(
            f"--weights {' '.join(map(str, found))}: expected those of stage 1, or of stage 1 and of stage 2"
        )
    return found[0], found[1] if len(found) == 2 else None
