"""Weights to share: a ``.safetensors`` file and the JSON beside it that says what they are.

The tensors are those of a checkpoint's ``state_dict``, as float16 or float32 (format:
github.com/huggingface/safetensors); everything else of the checkpoint is in ``NAME.json``, or in ``config.json`` where
a folder has the layout of the Hugging Face Hub. Neither can hold code. ``tools/export_weights.py`` writes both.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from xray2ct.files import InputError, atomic_path, read_json, sha256, shown, write_json

SUFFIX = ".safetensors"
HUB_NAME, HUB_CONFIG = "model", "config.json"  # of the weights without suffix, and of the JSON, on the Hub
STATE_KEYS = ("model_state_dict", "refinement_state_dict")  # of stage 1 (and baselines), of stage 2
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def description_path(path: str | os.PathLike) -> Path:
    """The JSON of a ``.safetensors`` file: ``NAME.json`` beside it, else ``config.json``."""
    own, hub = Path(path).with_suffix(".json"), Path(path).with_name(HUB_CONFIG)
    return hub if hub.exists() and not own.exists() else own


def read_description(path: str | os.PathLike) -> dict:
    """The JSON of a ``.safetensors`` file.

    Raises :class:`InputError` naming file and key: no such file, a key missing or of another type, a licence file that
    is not beside the weights.
    """
    origin = description_path(path)
    if not origin.exists():
        raise InputError(
            f"{path}: {origin.name} is not beside it; expected the JSON that tools/export_weights.py writes"
        )
    found = read_json(origin)
    for key, kind in {"sha256": str, "state_key": str, "extra_state": dict, "checkpoint": dict}.items():
        if not isinstance(found, dict) or not isinstance(found.get(key), kind):
            raise InputError(
                f"{origin}: {key} is missing or not what tools/export_weights.py writes; fetch the file anew"
            )
    if found["state_key"] not in STATE_KEYS:
        raise InputError(f"{origin}: state_key is {shown(found['state_key'])}; expected {' or '.join(STATE_KEYS)}")
    licence = found.get("licence_file")
    if licence is not None and not origin.with_name(Path(str(licence)).name).is_file():
        raise InputError(
            f"{path}: its licence, {licence}, is not beside it; expected the file that came with the weights"
        )
    return found


def read_weights(path: str | os.PathLike) -> dict:
    """Read a ``.safetensors`` file and its JSON as the checkpoint that they were made from; weights as float32.

    ``source`` of the result says which weights they were before they were rounded (:func:`write_weights`).
    Raises :class:`InputError` as :func:`read_description`, and for a file whose SHA-256 is not the stated one.
    """
    description = read_description(path)
    digest = sha256(path)
    if digest != description["sha256"]:
        raise InputError(
            f"{path}: damaged or altered, its SHA-256 is {digest[:12]}...; {description_path(path).name} states"
            f" {shown(description['sha256'][:12])[1:-1]}...: fetch both files anew"
        )
    safetensors = _import_safetensors(path)
    try:
        weights = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: not a readable {SUFFIX} file ({str(error).splitlines()[0]})") from None
    weights = {name: value.float() if value.dtype == torch.float16 else value for name, value in weights.items()}
    state = {**weights, **description["extra_state"]}
    return {**description["checkpoint"], "source": description.get("source", {}), description["state_key"]: state}


def write_weights(path: str | os.PathLike, checkpoint: dict, dtype: str, description: dict) -> dict:
    """Write a checkpoint's weights to ``path``, and next to it their JSON; returns what that holds.

    checkpoint: as ``load_checkpoint`` gives one; its training state is left out. dtype: ``float16`` or ``float32``.
    description: further entries of the JSON, such as ``licence_file`` (which has to be there to read the weights).
    Both files are written under temporary names. Raises :class:`InputError` for weights beyond the range of ``dtype``.
    """
    path = Path(path)
    key = next((name for name in STATE_KEYS if name in checkpoint), None)
    if path.suffix != SUFFIX or key is None:
        raise InputError(f"{path}: expected a name ending in {SUFFIX}, and a checkpoint of stage 1 or 2")
    state = checkpoint[key]
    extra = {name: value for name, value in state.items() if not torch.is_tensor(value)}
    tensors = {name: _stored(path, name, value, DTYPES[dtype]) for name, value in state.items() if name not in extra}
    with atomic_path(path) as temporary:
        _import_safetensors(path).torch.save_file(tensors, temporary, metadata={"format": "pt"})
    written = {
        **description,
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "dtype": dtype,
        "state_key": key,
        "extra_state": extra,
        "checkpoint": {k: v for k, v in checkpoint.items() if k not in (key, "training_state", "source")},
    }
    write_json(path.with_name(HUB_CONFIG) if path.stem == HUB_NAME else path.with_suffix(".json"), written)
    return written


def _stored(path, name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not value.is_floating_point():
        return value.contiguous()
    stored = value.to(dtype).contiguous()
    if not stored.isfinite().all():
        raise InputError(
            f"{path}: {name} holds values that {dtype} cannot; expected finite weights, or --dtype float32"
        )
    return stored


def _import_safetensors(path):
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(f"{path}: needs safetensors; run: pip install safetensors") from None
    return safetensors
