"""Checkpoints: written so that a crash loses nothing, read without running anybody's code."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import torch

from files import InputError, atomic_path

FORMAT = 1  # raised when the meaning of a key changes


def save_checkpoint(path: str | os.PathLike, checkpoint: dict) -> None:
    """Write a checkpoint under a temporary name and rename it; ``path`` is always whole.

    ``checkpoint`` holds tensors and plain Python types only, so that ``torch.load`` with
    ``weights_only=True`` reads it back; tensors are stored from the CPU. A format number is added.
    A failing write (disk full) raises ``OSError`` and leaves an existing file as it was.
    """
    try:
        with atomic_path(path) as temporary:
            torch.save(_on_cpu({"format": FORMAT, **checkpoint}), temporary)
    except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError
        raise OSError(f"{path}: could not be written ({error}); an existing file was left as it was") from error


def _on_cpu(value):
    """The same nested value with every tensor on the CPU: what a GPU wrote opens on any machine."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value


def load_checkpoint(path: str | os.PathLike, kind: str | None = None) -> dict:
    """Read a checkpoint onto the CPU.

    kind: the expected ``checkpoint["kind"]`` (``"enhanced_direct"``, ...), or None for any.
    Raises :class:`InputError` naming the file when it is missing, truncated, of another format or
    kind, or holds anything but tensors and plain types (a pickle could run code: refused).
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a checkpoint file such as {path / 'best_model.pt'}")
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; train first, or check the path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise InputError(
                f"{path}: refused, it holds Python objects that could run code; expected tensors and plain types"
            ) from None
        raise InputError(f"{path}: not a checkpoint of this project, or damaged") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        detail = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: truncated or not a checkpoint ({detail})") from None
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise InputError(f"{path}: not a checkpoint of this project (no format number)")
    if checkpoint["format"] != FORMAT:
        raise InputError(f"{path}: checkpoint format {checkpoint['format']}; this version reads format {FORMAT}")
    if kind is not None and checkpoint.get("kind") != kind:
        raise InputError(f"{path}: is a checkpoint of {checkpoint.get('kind')!r}; expected {kind!r}")
    return checkpoint


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
