"""Errors meant for users, crash-safe file writing, careful reading and the exit path every command shares."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import reprlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from numbers import Integral
from pathlib import Path

import numpy as np

# A name that is one folder or file name on every system, and harmless in a table, a page or a command line.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._ -]*[A-Za-z0-9_-])?")
RESERVED_NAMES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)  # devices of Windows
MAX_NAME = 200  # characters: file systems take 255, of which suffixes and temporary names need up to 33


class InputError(ValueError):
    """Something the user gave is wrong; the message names file, key or value and what was expected."""


def describe(error: BaseException) -> str:
    """One sentence about an error: what it says, and the file that the system could not read or write."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror or type(error).__name__}"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Generator[None]:
    """Let a system error of writing ``path`` name it: a full disk names no file, a temporary name tells nobody much."""
    try:
        yield
    except OSError as error:
        if error.filename is None or ".tmp" in os.fsdecode(error.filename):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Generator[Path]:
    """Yield a temporary path in the folder of ``path``; it replaces ``path`` only when the block succeeds.

    The temporary name keeps the suffixes (``.nii.gz``), in lower case, because writers choose the format by them.
    A crash, a full disk or an exception leaves an existing ``path`` untouched; an ``OSError`` names ``path``.
    """
    path = Path(path)
    name = path.name.lower()
    suffix = "".join(Path(name).suffixes[-2:]) if name.endswith(".gz") else Path(name).suffix
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "r+b") as stream:  # on disk before the rename, or a power cut leaves an empty file
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_together(folder: str | os.PathLike, earlier: Callable[[], Iterable[Path]]) -> Generator[Path]:
    """Yield a new folder whose files go into ``folder`` together when the block succeeds; else nothing changes.

    earlier: called then, gives the files of an earlier run in ``folder`` that have to go: none stays.
    """
    folder = Path(folder)
    with naming(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".new.", suffix=".tmp", dir=folder))
        try:
            yield staging
            made = []
            for path in earlier():
                path.unlink(missing_ok=True)
                if path.parent != folder:
                    with contextlib.suppress(OSError):  # not empty
                        path.parent.rmdir()
            for path in sorted(p for p in staging.rglob("*") if p.is_file()):
                target = folder / path.relative_to(staging)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def check_writable(path: str | os.PathLike, option: str = "") -> None:
    """Raise :class:`InputError` where :func:`atomic_path` could not write ``path``; nothing is left behind.

    For use before a long computation. Tried, not guessed: an empty file for each part of the path that is not there
    yet tells of missing permission, a file in a folder's place, a name too long. option: names it in the message.
    """
    path = Path(path)
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        for name in path.relative_to(folder).parts:
            handle, trial = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
            os.close(handle)
            os.unlink(trial)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror})".strip()) from None


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def write_json(path: str | os.PathLike, data) -> None:
    """Write ``data`` as indented JSON, atomically; NaN and infinity are refused (not JSON)."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike):
    """Read a JSON file; a missing or malformed one raises :class:`InputError` naming file and line.

    Stricter than Python's reader, see :func:`parse_json`.
    """
    path = Path(path)
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def parse_json(text: str):
    """JSON text -> plain Python values.

    Raises ``json.JSONDecodeError`` for what is not JSON, and ``ValueError`` for what Python's reader would take
    or crash on: a key given twice in one object, NaN and infinity (also as 1e999), numbers of thousands of
    digits, thousands of nested lists.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite_float, parse_constant=_finite_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique_keys(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {shown(next(key for key in keys if keys.count(key) > 1))} is given twice")
    return result


def _finite_float(text):
    value = float(text)
    if not abs(value) < float("inf"):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def shown(value) -> str:
    """``repr(value)`` for an error message: on one line and short, however long or nested the value is."""
    return _SHORT.repr(value)


def shown_name(name: str) -> str:
    """A key or name for an error message: as it is, or by :func:`shown` when it is long or not printable."""
    return name if name.isprintable() and len(name) <= 80 else shown(name)


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number of things: ``1 patient``, ``2 patients``; nouns: the plural where it is not ``noun`` with an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {nouns or f'{noun}s'}"


def whole_number(name: str, value, least: int, multiple: int = 1) -> int:
    """A setting as an int: a whole ``multiple``, not below ``least``; else :class:`InputError` naming it."""
    if not _is_whole(value, least, multiple):
        kind = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
        raise InputError(f"{name} is {shown(value)}; expected {kind}, at least {least}")
    return int(value)


def whole_numbers(name: str, values, count: int, least: int, multiple: int = 1) -> list[int]:
    """A setting as ``count`` ints, each as :func:`whole_number` takes it; else :class:`InputError` naming it."""
    values = list(values) if isinstance(values, tuple) else values
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(_is_whole(value, least, multiple) for value in values):
        kind = "whole numbers" if multiple == 1 else f"multiples of {multiple}"
        raise InputError(f"{name} is {shown(values)}; expected {count} {kind}, at least {least}")
    return [int(value) for value in values]


def _is_whole(value, least: int, multiple: int) -> bool:
    number = isinstance(value, Integral) and not isinstance(value, bool)
    return number and value >= least and value % multiple == 0


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """Read the array of a ``.npy`` file.

    Raises :class:`InputError` naming the file: missing, truncated, damaged, claiming more values than it holds
    (before memory is taken for them), an archive of arrays, or Python objects (a pickle, which could run code).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files written by Python 2 are fine
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapping compares the size with the header's
    except Exception as error:  # damaged headers make the parser raise whatever it stumbles on
        raise InputError(f"{path}: not a readable .npy array ({shown_name(str(error))})") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{path}: not a readable .npy array (an archive of arrays, .npz); expected one array")
    return np.array(array)


def is_plain_name(name) -> bool:
    """True for a folder name that every system takes: :data:`PLAIN_NAME`, not too long, no device of Windows."""
    fits = isinstance(name, str) and len(name) <= MAX_NAME and PLAIN_NAME.fullmatch(name) is not None
    return fits and not RESERVED_NAMES.fullmatch(name)


def is_file_name(name: str) -> bool:
    """True for the name of a file or folder within its folder: no path, on any system."""
    return name not in ("", ".", "..") and set(name).isdisjoint("/\\:\0")


def check_patient_id(patient, origin) -> str:
    """Return ``patient``, or raise :class:`InputError` naming ``origin`` when it cannot be a folder's name.

    Ids become folder, file and cache names and stand in tables and reports, so that only plain ASCII names are
    taken: nothing that leaves its folder, no markup, no control characters, no letters that look alike.
    """
    if not is_plain_name(patient):
        raise InputError(
            f"{origin}: patient id {shown(patient)}; expected a folder name of at most {MAX_NAME} letters (a-z, A-Z),"
            " digits, '.', '_', '-' and spaces that begins with a letter, a digit or '_': rename it"
        )
    return patient


def safe_name(text: str, default: str = "ct") -> str:
    """Make any text a plain name: other characters become ``_``, long ones end in a hash of the whole."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-") or default
    if RESERVED_NAMES.fullmatch(name):
        name = f"{default}_{name}"
    if len(name) > MAX_NAME:
        digest = hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
        name = f"{name[: MAX_NAME - 17]}_{digest}"
    return name


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def stays_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """True when ``path``, with every link in it followed, lies below ``folder``."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


_as_command = False  # see runs_as_command()


def runs_as_command() -> bool:
    """True in a process that is one of this project's commands: there what concerns the whole process may be set."""
    return _as_command


def read_csv(path: str | os.PathLike, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line number and texts of ``columns`` of each row of a CSV file in UTF-8 whose first line names them; "" for none.

    Raises :class:`InputError` naming the file and a column that it lacks, and for what is no such file.
    """
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path}: column {missing[0]!r} is missing; expected {', '.join(columns)}")
            return [(reader.line_num, {name: row[name] or "" for name in columns}) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8 ({error}); expected {', '.join(columns)}") from None


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit.

    An :class:`InputError`, and an ``OSError`` that names a file, print one line and exit with 2.
    """
    global _as_command
    _as_command = True
    try:
        sys.exit(main() or 0)
    except (InputError, OSError) as error:
        if not isinstance(error, InputError) and error.filename is None:
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
