"""What the pages' blocks hold: command lines, resolved to the programs that they start, and Python."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest
from torch.distributed.run import get_args_parser

from tests.helpers.paths import ROOT
from tools import launch

PAGES = sorted(path for pattern in ("*.md", "*/*.md") for path in ROOT.glob(pattern) if path.parent.name[:1] != ".")
LAUNCHERS = ("launch_4gpu.sh", "launch_4gpu.bat")
UNKNOWN = "--no-such-option"


@dataclass(frozen=True)
class Command:
    """One command line: its words, and the folder of the repository that the lines before it have changed to."""

    words: tuple[str, ...]
    folder: str

    @property
    def text(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    commands: tuple[Command, ...]


def commands_of(block: str) -> tuple[Command, ...]:
    """Commands of a shell block: continued lines are joined, ``&&`` divides, comments go, ``cd`` is followed."""
    found, folder = [], PurePosixPath(".")
    for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        if words[:1] == ["cd"]:
            folder = folder.parent if words[1] == ".." else folder / words[1]
        elif words:
            found.append(Command(tuple(words), str(folder)))
    return tuple(found)


@dataclass(frozen=True)
class PythonBlock:
    page: str
    line: int
    code: str

    @property
    def strings(self) -> list[str]:
        """Its string literals: among them the names of the files that it reads."""
        constants = (node.value for node in ast.walk(ast.parse(self.code)) if isinstance(node, ast.Constant))
        return [value for value in constants if isinstance(value, str)]

    def replaced(self, table: dict[str, str]) -> str:
        """Its code with every text of the table replaced."""
        code = self.code
        for text, other in table.items():
            code = code.replace(text, other)
        return code


def fenced(languages: str) -> Iterator[tuple[str, int, str]]:
    """``(page, line, text)`` of every fenced block of the pages in one of the ``languages``, ``|`` between them."""
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
        for match in re.finditer(rf"^( *)```(?:{languages})\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            yield name, text.count("\n", 0, match.start()) + 1, match[2]


def blocks() -> list[Block]:
    """Every shell block of the pages, in order."""
    return [Block(page, line, commands_of(text)) for page, line, text in fenced("bash|sh|shell|console")]


def python_blocks() -> list[PythonBlock]:
    """Every Python block of the pages, in order."""
    return [PythonBlock(page, line, textwrap.dedent(text)) for page, line, text in fenced("python|py")]


def programs(command: Command) -> list[tuple[str, list[str]]]:
    """``(path in the repository, arguments)`` of the programs of this project that a command line starts, in order.

    Empty for a program of others. What ``launch_4gpu.sh`` and ``torchrun`` start are the programs they would start on
    a machine without GPUs, in one process; both parse the line by themselves.
    """
    program, *words = command.words
    if program == "bash" and words[0] in LAUNCHERS:
        return launched(words[1:])
    if program == "torchrun":
        parsed = get_args_parser().parse_args(words)
        return programs(Command(("python", parsed.training_script, *parsed.training_script_args), command.folder))
    if program != "python":
        return []
    if words[0] == "-m":
        path = PurePosixPath(words[1].replace(".", "/"))
        path = path / "__main__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
        return [(str(path), words[2:])] if (ROOT / path).exists() else []
    path = PurePosixPath(command.folder, words[0])
    assert (ROOT / path).is_file(), f"{path}: no such program"
    return [(str(path), words[1:])]


def launched(options: list[str]) -> list[tuple[str, list[str]]]:
    """The jobs of ``launch_4gpu.sh OPTIONS``; none for the tests themselves."""
    word = launch.BOTH
    if options and not options[0].startswith("-"):
        word, *options = options
    if word == "test":
        return []
    preset, options = launch.split_preset(options)

    def job(python, stage, given, count_gpus=lambda _: 0):
        return launch.job_command(python, stage, given, count_gpus)

    words = launch.TRAINING if word == launch.BOTH else [word]
    lines = [launch.stage_command(Path("python"), stage, options, preset, job) for stage in words]
    return [(Path(line[1]).relative_to(ROOT).as_posix(), line[2:]) for line in lines]


def main_of(path: str):
    """The function ``main(argv)`` of a program."""
    return importlib.import_module(path.removesuffix(".py").replace("/", ".")).main


def assert_parses(path: str, arguments: list[str], capsys) -> None:
    """The program's own parser takes all arguments: an option that none has is all that it complains of."""
    with pytest.raises(SystemExit) as stop:
        main_of(path)([*arguments, UNKNOWN])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {UNKNOWN}\n")


def run_script(path: str, arguments: list[str], monkeypatch) -> None:
    """A script without ``main``, as ``python SCRIPT ARGUMENTS`` runs it."""
    import runpy

    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(str(ROOT / path), run_name="__main__")
