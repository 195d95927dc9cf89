"""Checkpoints: written so that a crash loses nothing, read without running anybody's code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Generator
from pathlib import Path

import torch

from xray2ct.files import InputError, atomic_path
from xray2ct.weights_file import SUFFIX, read_weights

if os.name != "nt":
    import fcntl

FORMAT = 1  # raised when the meaning of a key changes
LAST = "last.pt"  # the state a run goes on from
PREVIOUS = "last_previous.pt"  # the one before it: what a run goes on from when LAST is damaged


# What zipfile and torch.load raise on damaged files, besides UnpicklingError.
UNREADABLE = (RuntimeError, EOFError, ValueError, OSError, LookupError, AttributeError, TypeError, zipfile.BadZipFile)


class DamagedCheckpoint(InputError):
    """A checkpoint file that is cut short, changed or not a checkpoint at all; its message names it."""


class WriteError(InputError, OSError):
    """A file of a run could not be written: full disk, quota, no permission. What was there before is kept."""


# ------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(path: str | os.PathLike, checkpoint: dict, keep: str | os.PathLike | None = None) -> None:
    """Write a checkpoint under a temporary name and rename it; ``path`` is always whole.

    ``checkpoint`` holds tensors and plain Python types only, so that ``torch.load`` with
    ``weights_only=True`` reads it back; tensors are stored from the CPU. A format number is added.
    keep: another path at which the file that is replaced stays available.
    A failing write (disk full) raises :class:`WriteError` and leaves an existing file as it was.
    """
    path = Path(path)
    try:
        with atomic_path(path) as temporary, _marked_as_unfinished(temporary):
            torch.save(_on_cpu({"format": FORMAT, **checkpoint}), temporary)
            if keep is not None and path.exists():
                _keep(path, Path(keep))
    except (RuntimeError, OSError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        detail = str(error).splitlines()[0]
        raise WriteError(
            f"{path}: could not be written ({detail}); a file that was there before is kept as it was."
            " With room on the disk the same command goes on from it"
        ) from error


def _keep(path: Path, keep: Path) -> None:
    """Make ``keep`` a second name of the file ``path``, so that replacing ``path`` leaves it there."""
    link = path.with_name(f".{keep.name}.link.tmp{keep.suffix}")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
        os.replace(link, keep)
    except OSError:  # a file system without hard links: until the new file has its name only ``keep`` is there
        os.replace(path, keep)
    finally:
        link.unlink(missing_ok=True)  # renaming between two names of one file does nothing, by POSIX


def remove_leftovers(folder: str | os.PathLike) -> int:
    """Delete the unfinished checkpoint files of processes that were killed while writing; returns how many.

    Those that a process is still writing stay.
    """
    leftovers = [path for path in Path(folder).glob(".*.pt.*.tmp.pt") if path.is_file()]
    return sum(map(_removed, leftovers))


@contextlib.contextmanager
def _marked_as_unfinished(path: Path) -> Generator[None]:
    """Hold a lock on a file while it is written; it ends with the process. None on Windows: open files stay there."""
    with open(path, "rb") as stream:
        if os.name != "nt":
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _removed(path: Path) -> bool:
    """Delete an unfinished file unless a process holds it (see :func:`_marked_as_unfinished`)."""
    try:
        with open(path, "r+b") as stream:
            if os.name != "nt":
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks
        pass
    try:
        path.unlink(missing_ok=True)
    except PermissionError:  # open in another process, on Windows
        return False
    return True


def _on_cpu(value):
    """The same nested value with every tensor on the CPU: what a GPU wrote opens on any machine."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value


# ------------------------------------------------------------------------------------------------
# Reading


def load_checkpoint(path: str | os.PathLike, kind: str | None = None) -> dict:
    """Read a checkpoint onto the CPU: a ``.pt`` file, or ``.safetensors`` with its JSON (:mod:`xray2ct.weights_file`).

    kind: the expected ``checkpoint["kind"]`` (``"enhanced_direct"``, ...), or None for any.
    Raises :class:`InputError` naming the file when it is missing, of another format or kind, or holds anything
    but tensors and plain types (a pickle could run code: refused); :class:`DamagedCheckpoint` when it is cut short
    or a bit of it changed (the archive's CRC-32 of every tensor is compared, which torch itself leaves out).
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a checkpoint file such as {path / 'best_model.pt'}")
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; train first, or check the path")
    checkpoint = read_weights(path) if path.suffix == SUFFIX else _read_pt(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(f"{path}: not a checkpoint of this project (no format number)")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: checkpoint format {checkpoint['format']}; this version reads format {FORMAT}")
    if kind is not None and checkpoint.get("kind") != kind:
        raise InputError(f"{path}: is a checkpoint of {checkpoint.get('kind')!r}; expected {kind!r}")
    return checkpoint


def _read_pt(path: Path):
    """What ``torch.save`` wrote; see :func:`load_checkpoint`."""
    try:
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if damaged is not None:
            raise DamagedCheckpoint(f"{path}: damaged, {damaged} in it is not what was written (CRC-32)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedCheckpoint:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise InputError(
                f"{path}: refused, it holds Python objects that could run code; expected tensors and plain types"
            ) from None
        raise DamagedCheckpoint(f"{path}: not a checkpoint of this project, or damaged") from None
    except UNREADABLE as error:
        detail = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedCheckpoint(f"{path}: truncated or not a checkpoint ({detail})") from None


def find_state(folder: str | os.PathLike, kind: str | None = None) -> tuple[Path, dict, list[str]] | None:
    """The checkpoint a run in ``folder`` goes on from, its path, and notes on files that were skipped.

    That is ``last.pt``; where it is damaged or missing ``last_previous.pt``, then the newest ``epoch_N.pt`` that can
    be read. None for a folder with neither of the first two: nothing was trained there. Changes nothing on disk.
    Raises :class:`InputError` when none of them can be read, or one is of another format or ``kind``.
    """
    folder = Path(folder)
    if not (folder / LAST).exists() and not (folder / PREVIOUS).exists():
        return None
    notes = []
    for path in (folder / LAST, folder / PREVIOUS, *_epoch_files(folder)):
        if not path.exists():
            notes.append(f"{path}: is missing")
            continue
        try:
            return path, load_checkpoint(path, kind), notes
        except DamagedCheckpoint as error:
            notes.append(str(error))
    raise InputError(f"{'; '.join(notes)}. No earlier state of this run can be read; start anew in another folder")


def _epoch_files(folder: Path) -> list[Path]:
    """``epoch_N.pt`` of a run, the newest first."""
    numbers = [re.fullmatch(r"epoch_(\d+)\.pt", path.name) for path in folder.glob("epoch_*.pt")]
    return [folder / match[0] for match in sorted((m for m in numbers if m), key=lambda m: -int(m[1]))]


def check_compatible(path, checkpoint: dict, **expected) -> None:
    """Raise :class:`InputError` naming both sides when the checkpoint and the data differ.

    expected: checkpoint keys with the values the data has (``geometry=...``, ``hu_window=...``).
    """
    for key, wanted in expected.items():
        found = checkpoint.get(key)
        if isinstance(found, dict) and isinstance(wanted, dict):
            differing = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            same = not differing
            detail = ", ".join(f"{k} {found.get(k)} against {wanted.get(k)}" for k in differing)
        else:
            same = (
                list(found) == list(wanted)
                if isinstance(wanted, list | tuple) and found is not None
                else found == wanted
            )
            detail = f"{found} against {wanted}"
        if not same:
            raise InputError(f"{path}: the checkpoint's {key} is not the data's: {detail}")


def weights_fingerprint(weights: dict) -> str:
    """Sixteen hexadecimal digits that change with any weight of a ``state_dict``: what a later stage was trained on."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        if torch.is_tensor(weights[name]):
            digest.update(name.encode() + weights[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
