"""The parser of every command: hyphens or underscores in options, defaults in ``--help``, ``--version``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from xray2ct import __version__

ROOT = Path(__file__).resolve().parents[1]


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; each option with its default, unless its text speaks of one.

    Paths in the repository are shown from there.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, [], (), "", argparse.SUPPRESS) or isinstance(default, bool) or "default" in text:
            return text
        values = default if isinstance(default, list | tuple) else [default]
        shown = " ".join(f"{v:g}" if isinstance(v, float) else str(v).removeprefix(f"{ROOT}{os.sep}") for v in values)
        return f"{text} (default {shown.replace('%', '%%')})".strip()


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` with ``--version``; ``--max_stages`` is taken for ``--max-stages``."""

    def __init__(self, description: str | None = None, **settings):
        super().__init__(description=description, formatter_class=Help, **settings)
        self.add_argument("--version", action="version", version=f"xray2ct {__version__}")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """As argparse does, after :func:`with_hyphens`."""
        return super().parse_known_args(with_hyphens(sys.argv[1:] if args is None else args), namespace)


def with_hyphens(words: Sequence[str]) -> list[str]:
    """The words of a command line, underscores in the names of long options made hyphens; values stay as they are."""
    found, options = [], True
    for word in map(str, words):
        options = options and word != "--"
        name, equals, value = word.partition("=")
        found.append(name.replace("_", "-") + equals + value if options and word.startswith("--") else word)
    return found
