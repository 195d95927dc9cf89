"""A trained checkpoint -> weights to share: NAME.safetensors, NAME.json and a model card, NAME.md.

    python -m tools.export_weights RUN/best_model.pt chest64 --licences weights/patients.csv
    python evaluate.py --data DATA --weights chest64 --output evaluation
    python -m tools.export_weights RUN/best_model.pt chest64 --licences weights/patients.csv --scores evaluation
    python -m tools.export_weights RUN/best_model.pt chest64 --licences weights/patients.csv --huggingface upload

Weights are rounded to float16 (``--dtype float32`` keeps them). ``--licences`` is a CSV with the columns id,
collection, patient, licence and doi of every patient of the training, as ``sources.csv`` of get_data.py has them; the
weights are then under CC BY 4.0, which is refused where a licence does not allow it. Without it no licence is stated.
``--scores`` is the folder of an evaluation of these very weights on test patients. What training wrote beside the
checkpoint (run.json, log.jsonl) gives commit, machine and time. ``--huggingface`` writes the Hub's layout
(config.json, model.safetensors, README.md), ready for ``huggingface_hub``'s upload_folder.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import torch

from tools.model_card import model_card
from tools.plot_run import LOG, read_log
from xray2ct.checkpoints import load_checkpoint, weights_fingerprint
from xray2ct.command_line import Parser
from xray2ct.conventions import MANIFEST
from xray2ct.files import InputError, atomic_path, is_plain_name, read_csv, read_json, run_cli
from xray2ct.training.provenance import RUN_FILE
from xray2ct.weights_file import DTYPES, HUB_NAME, STATE_KEYS, SUFFIX, write_weights

LICENCE, LICENCE_FILE = "CC-BY-4.0", "LICENSE-CC-BY-4.0"
OURS = Path(__file__).resolve().parents[1] / "weights"
ALLOWED = re.compile(r"CC BY \d\.\d|CC0( 1\.0)?|public domain", re.IGNORECASE)  # what CC BY 4.0 weights may be made of
COLUMNS = ("id", "collection", "patient", "licence", "doi")


def attribution(path: str | os.PathLike, patients: list[str]) -> dict:
    """``patients`` with their source, in order, and how its collections ask to be cited (``citations.csv`` beside).

    Raises :class:`InputError` naming the patient that the table lacks, or whose licence CC BY 4.0 weights cannot meet.
    """
    table = {row["id"]: row for _, row in read_csv(path, COLUMNS)}
    for patient in patients:
        if patient not in table:
            raise InputError(f"{path}: has no row for {patient}, who was trained on; expected every patient's licence")
        if not ALLOWED.fullmatch(table[patient]["licence"]):
            licence = table[patient]["licence"] or "none"
            raise InputError(f"{path}: {patient} has the licence {licence}; weights under {LICENCE} need CC BY or CC0")
    rows, beside = [table[patient] for patient in patients], Path(path).with_name("citations.csv")
    citations = [row for _, row in read_csv(beside, ("doi", "citation"))] if beside.exists() else []
    used = {row["doi"] for row in rows}
    return {"patients": rows, "citations": {row["doi"]: row["citation"] for row in citations if row["doi"] in used}}


def run_facts(folder: Path) -> dict:
    """Commit, machine, versions and minutes of the training in ``folder``; empty where it left no ``run.json``."""
    if not (folder / RUN_FILE).exists():
        return {}
    runs = read_json(folder / RUN_FILE)["runs"]
    last = max((e["time"] for e in read_log(folder / LOG) if "time" in e), default=0) if (folder / LOG).exists() else 0
    seconds = 0.0
    for run in runs:
        began = datetime.fromisoformat(run["began"]).timestamp()
        seconds += max(0.0, (datetime.fromisoformat(run["ended"]).timestamp() if run["ended"] else last) - began)
    environment = runs[-1]["environment"]
    return {
        "date": runs[-1]["began"][:10],
        "minutes": round(seconds / 60, 1),
        "commit": environment["code"]["commit"],
        "dirty": environment["code"]["dirty"],
        "torch": environment["packages"]["torch"],
        "processes": runs[-1]["processes"],
        "device": runs[-1]["device"],
        "cpu": environment["cpu"],
        "threads": environment["threads"],
        "gpus": environment["gpus"],
    }


def read_scores(folder: str | os.PathLike, fingerprints: set[str]) -> dict:
    """Mean scores by method, and those of each patient, of an evaluation (``evaluate.py --output``) of these weights.

    Raises :class:`InputError` when it is one of other weights, or scored patients of the training.
    """
    origin, summary = Path(folder) / "summary.json", read_json(Path(folder) / "summary.json")
    found = [one["weights"] for one in summary["checkpoints"]]
    if found[-1] not in fingerprints:
        raise InputError(
            f"{origin}: is an evaluation of the weights {found[-1]}; expected {' or '.join(sorted(fingerprints))}"
        )
    if summary["split"] != "test" or summary["seen_in_training"]:
        raise InputError(
            f"{origin}: scored patients that the weights were trained on or chosen by; expected the test split"
        )
    with open(Path(folder) / "per_patient.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    first = next(iter(summary["methods"]))
    return {
        "patients": summary["patients"],
        "device": summary["device"],
        "protocols": summary["protocols"],
        "methods": summary["methods"],
        "per_patient": {row["id"]: float(row["psnr_strict"]) for row in rows if row["method"] == first},
    }


def read_film_scores(path: str | os.PathLike, fingerprints: set[str]) -> dict:
    """Mean scores by case of a film benchmark (``film_benchmark.json``) with these weights, and with those beside them.

    Raises :class:`InputError` when none of its networks has these weights, or when it scored validation patients.
    """
    found = read_json(path)
    names = [one["name"] for one in found["networks"]]
    own = [one["name"] for one in found["networks"] if fingerprints & set(one.get("measured", {}).get("weights", ()))]
    if not own or found["split"] != "test":
        raise InputError(
            f"{path}: is a film benchmark of {', '.join(names)} on {found['split']} patients; expected one with the"
            f" weights {' or '.join(sorted(fingerprints))} on test patients"
        )
    others = [name for name in names if name not in own]
    return {
        "networks": [*own, *others],
        "spacing": found["spacing"],
        "patients": sorted({row["patient"] for row in found["rows"]}),
        "cases": {entry.pop("case"): entry for entry in found["table"]},
    }


def without_folders(value):
    """The same nested value with absolute paths reduced to their last name: they say nothing elsewhere."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def split_of(checkpoint: dict) -> dict[str, list[str]]:
    """Validation and test patients of the data set trained on, where it still is at its place; else empty."""
    path = Path(checkpoint.get("config", {}).get("data", {}).get("dataset_path") or "") / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    same = manifest.get("split_hash") == checkpoint.get("split_hash")
    return {name: manifest["split"][name] for name in ("val", "test")} if manifest and same else {}


def rounded(weights: dict, dtype: str) -> dict:
    """A ``state_dict`` as it is read back from a file of ``dtype``."""
    floats = {name for name, value in weights.items() if torch.is_tensor(value) and value.is_floating_point()}
    return {name: value.to(DTYPES[dtype]).float() if name in floats else value for name, value in weights.items()}


def worst_case(scores: dict, evaluation: str | os.PathLike, target: Path) -> dict:
    """The patient with the lowest PSNR; the evaluation's picture of it, where it drew one, is copied to ``target``."""
    patient = min(scores["per_patient"], key=scores["per_patient"].__getitem__)
    picture = Path(evaluation) / "pictures" / f"{patient}.png"
    if picture.exists():
        with atomic_path(target) as temporary:
            shutil.copyfile(picture, temporary)
    return {"patient": patient, "picture": target.name if picture.exists() else None}


def export(args: argparse.Namespace) -> Path:
    """Write weights, JSON and card; returns the path of the weights."""
    checkpoint = load_checkpoint(args.checkpoint)
    key = next((name for name in STATE_KEYS if name in checkpoint), None)
    if key is None:
        raise InputError(f"{args.checkpoint}: is a checkpoint of {checkpoint['kind']!r}; expected stage 1 or stage 2")
    folder, stem = Path(args.huggingface or args.output), HUB_NAME if args.huggingface else args.name
    fingerprints = [weights_fingerprint(state) for state in (rounded(checkpoint[key], args.dtype), checkpoint[key])]
    description: dict = {"name": args.name, "fingerprint": fingerprints[0], "source": {"fingerprint": fingerprints[1]}}
    if args.licences:
        description |= {"licence": LICENCE, "licence_file": LICENCE_FILE}
        description |= attribution(args.licences, checkpoint["train_patients"])
    description |= {"split": split_of(checkpoint), "training": run_facts(Path(args.checkpoint).parent)}
    if args.scores:
        description["scores"] = read_scores(args.scores, set(fingerprints))
        description["worst"] = worst_case(description["scores"], args.scores, folder / f"{stem}_worst.png")
    if args.film_scores:
        description["film_scores"] = read_film_scores(args.film_scores, set(fingerprints))
    if args.licences and not (folder / LICENCE_FILE).exists():
        with atomic_path(folder / LICENCE_FILE) as temporary:
            shutil.copyfile(OURS / LICENCE_FILE, temporary)
    written = write_weights(folder / f"{stem}{SUFFIX}", without_folders(checkpoint), args.dtype, description)
    with atomic_path(folder / ("README.md" if args.huggingface else f"{args.name}.md")) as temporary:
        temporary.write_text(model_card(written), encoding="utf-8")
    return folder / f"{stem}{SUFFIX}"


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="best_model.pt or best_refinement.pt")
    parser.add_argument("name", help="of the weights, such as chest64")
    parser.add_argument("--licences", metavar="CSV", help="source and licence of every patient of the training")
    parser.add_argument("--scores", metavar="FOLDER", help="an evaluation of these weights, for JSON and card")
    parser.add_argument("--film-scores", metavar="FILE", help="film_benchmark.json with these weights, likewise")
    parser.add_argument("--dtype", default="float16", choices=tuple(DTYPES), help="of the file (default %(default)s)")
    parser.add_argument("--output", default="weights", help="folder to write into (default %(default)s)")
    parser.add_argument("--huggingface", metavar="FOLDER", help="instead: a folder in the layout of the Hub")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if not is_plain_name(args.name) or "." in args.name or args.name == HUB_NAME:
        raise InputError(f"{args.name}: expected a name of letters, digits, '_' and '-', such as chest64")
    path = export(args)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {args.dtype}; {', '.join(sorted(os.listdir(path.parent)))}")
    return 0


if __name__ == "__main__":
    run_cli(main)
