"""What makes two starts the same run: settings, data set, earlier stages; all else is refused by name."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

from dataset import PatientDataset
from xray2ct.checkpoints import check_compatible
from xray2ct.conventions import MANIFEST
from xray2ct.data.manifest import find_patients
from xray2ct.files import InputError, read_json, runs_as_command
from xray2ct.training.config import config_dict

# Settings that may change between a run and its continuation: they do not change the result.
FREE_ON_RESUME = (
    "logging.",
    "training.micro_batch",
    "data.num_workers",
    "data.prefetch_factor",
    "data.device_cache",
    "data.cache_dir",
    "data.dataset_path",
    "augment.anatomy.file",  # its content is compared
    "training.channels_last",  # where a tensor's numbers lie; "auto" since it became the default
)
VOLUMES = ("cube_size", "couch_removed", "assume_ras")  # how prepare_data.py made the volumes, in the manifest
# Header entries that describe the data; a checkpoint of an earlier version lacks the later ones.
DATA_KEYS = ("geometry", "hu_window", "xray_scale", "volumes", "data_fingerprint")


def data_header(data: PatientDataset) -> dict:
    """Checkpoint entries that describe a data set: acquisition, split, how its volumes were made, their content."""
    manifest = read_json(data.root / MANIFEST) if data.has_manifest else {"cube_size": data.cube_size}
    return {
        **data.acquisition.to_dict(),
        "split_hash": data.split_hash,
        "volumes": {key: manifest[key] for key in VOLUMES if key in manifest},
        "data_fingerprint": _fingerprint(data, manifest),
    }


def _fingerprint(data: PatientDataset, manifest: dict) -> str:
    """Sixteen hexadecimal digits that change with any file of the training and validation patients.

    From the manifest's checksums; without them from the files' names and sizes, so that no volume has to be read.
    """
    content, folders = {}, None
    for patient in (*data.splits["train"], *data.splits["val"]):
        files = manifest.get("patients", {}).get(patient, {}).get("files")
        if not files:
            folders = folders or find_patients(data.root)
            folder = folders[patient]
            paths = (folder.volume, folder.mask, *folder.xrays)
            files = {path.name: path.stat().st_size for path in paths if path is not None}
        content[patient] = files
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def check_same_data(path, checkpoint: dict, header: dict, advice: str) -> None:
    """Raise :class:`InputError` naming file, key and both values when a checkpoint was trained on other data.

    header: of the data at hand (:func:`data_header`). advice: ends the message. Entries that one of them lacks are
    not compared.
    """
    if checkpoint["split_hash"] != header["split_hash"]:
        raise InputError(f"{path} was trained on another split of the data; {advice}")
    for key in DATA_KEYS:
        if key in checkpoint and key in header:
            try:
                check_compatible(path, checkpoint, **{key: header[key]})
            except InputError as error:
                what = " (files of training or validation patients changed)" if key == "data_fingerprint" else ""
                raise InputError(f"{error}{what}; {advice}") from None


def check_same_run(path, checkpoint: dict, header: dict, config) -> None:
    """Raise :class:`InputError` naming what differs, unless a run that left ``checkpoint`` may go on.

    header: of the task at hand; config: its settings' dataclass.
    """
    changed = changed_settings(_with_defaults(checkpoint["config"], config), config_dict(config))
    if changed:
        command = restoring_command(_with_defaults(checkpoint["config"], config), config_dict(config), sys.argv)
        raise InputError(
            f"{path} was trained with other settings ({'; '.join(changed)}); choose another --output, or restore these"
            f" settings to go on{f': {command}' if command and runs_as_command() else ''}"
        )
    if checkpoint.get("init") != header.get("init"):
        raise InputError(f"{path} began with other weights (--init); choose another --output, or give the same --init")
    if checkpoint.get("anatomies") != header.get("anatomies"):
        raise InputError(
            f"{path} mixed anatomies of another augment.anatomy.file; choose another --output, or that file"
        )
    root = Path(config.data.dataset_path)
    check_same_data(path, checkpoint, header, f"the data is {root}: choose another --output, or the data it began with")
    old, new = (entry.get("train_patients") for entry in (checkpoint, header))
    if None not in (old, new) and list(old) != list(new):
        only = [", ".join(sorted(set(a) - set(b))[:5]) or "none" for a, b in ((old, new), (new, old))]
        raise InputError(
            f"{path}: train_patients differ (only there: {only[0]}; only in {root}: {only[1]}); choose another --output"
        )
    if checkpoint.get("base_fingerprint") != header.get("base_fingerprint"):
        raise InputError(f"{path} was trained on a stage 1 with other weights; choose another --output")


def _with_defaults(settings: dict, config) -> dict:
    """``settings`` of an earlier version with the later ones at their defaults; config: a dataclass of this version."""
    known = dict(settings)
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name in known:
            if is_dataclass(value) and isinstance(known[entry.name], dict):
                known[entry.name] = _with_defaults(known[entry.name], value)
        elif entry.default is not MISSING:
            known[entry.name] = entry.default
        elif entry.default_factory is not MISSING:
            default = entry.default_factory()
            known[entry.name] = asdict(default) if is_dataclass(default) else default
    return known


def restoring_command(old: dict, new: dict, argv: list[str]) -> str | None:
    """The command ``argv`` with the settings of the run it would go on with, ``old`` for ``new``.

    None where no option restores them: settings that one of the two versions does not know, and a cascade's, whose
    settings belong to all of its stages.
    """
    if "earlier_stages" in new:
        return None
    words = ["python", *argv]
    for change in changed_settings(old, new):
        key = change.split(" ", 1)[0]
        value, known = old, new
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value or part not in known:
                return None
            value, known = value[part], known[part]
        text = value if isinstance(value, str) else json.dumps(value)
        words += ["--base", text] if key == "base_checkpoint" else ["--set", f"{key}={text}"]
    return shlex.join(words)


def changed_settings(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Settings that differ and matter for the result, as ``key old -> new``."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        if name.startswith(FREE_ON_RESUME):
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += changed_settings(a, b, f"{name}.")
        elif a != b:
            changed.append(f"{name} {a} -> {b}")
    return changed
