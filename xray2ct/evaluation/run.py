"""One evaluation of a loaded system: the patients that it may be scored on, their scores, the files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dataset import PatientDataset
from xray2ct.checkpoints import check_compatible
from xray2ct.conventions import MANIFEST
from xray2ct.data.patient_files import some
from xray2ct.evaluation.real_xrays import protocols_of
from xray2ct.evaluation.report import ReportCollector, choose_cases
from xray2ct.evaluation.scoring import BASELINE, Observer, differences, mean_method, score_patients, summary_of
from xray2ct.evaluation.tables import note_other_truth, read_rows, write_rows
from xray2ct.files import InputError, counted, is_plain_name, read_json, replaced_together, write_json
from xray2ct.inference.consistency import CONSISTENT, how_of, refuse_measured, steps_of, with_consistent
from xray2ct.inference.predictor import LoadedCheckpoint, Predictor
from xray2ct.inference.sample_calibration import SampleCalibration
from xray2ct.training.config import config_hash
from xray2ct.training.run_identity import VOLUMES

FILES = ("per_patient.csv", "report.html", "summary.json")


def evaluate(
    predictor: Predictor,
    root,
    output,
    split: str = "test",
    pictures: int = 6,
    compare=None,
    compare_method: str | None = None,
    report_cases: Sequence[str] | None = None,
    cache_dir: str | None = None,
    allow_seen: bool = False,
    xrays: str = "drr",
    consistency: int | str = "off",
) -> dict:
    """Score every method of ``predictor`` and the mean training volume on a split of the data set ``root``.

    Writes ``per_patient.csv``, ``summary.json``, ``pictures/ID.png`` and, with report_cases (see
    :func:`choose_cases`), ``report.html`` into the folder ``output``; returns the summary. Notes are printed. Options
    as those of ``evaluate.py``. Raises :class:`InputError` when a checkpoint does not fit the data, or was trained on a
    patient to score; what an earlier evaluation left in ``output`` is kept then.
    """
    output, steps = Path(output), steps_of(consistency, predictor.consistency_validated)
    calibration = predictor.sample_calibration(how_of(steps))
    for note in predictor.notes:
        print(f"note: {note}")
    data, training, seen, notes = open_data(predictor, root, split, cache_dir, allow_seen, xrays)
    measured = xrays != "drr" or not data.has_manifest
    refuse_measured(predictor, measured)
    notes += calibration_notes(calibration, data)
    methods = predictor.methods()
    own = predictor.own_methods(methods)
    if steps:
        methods = with_consistent(predictor, methods, steps, measured)
    first = next(iter(methods))
    plain = None if compare_method else first.removesuffix(CONSISTENT)  # all that earlier files have
    others = read_rows(compare, compare_method or first, data.ids, xrays, plain) if compare else None
    report = None
    if report_cases is not None:
        cases = choose_cases(report_cases, data.ids)
        report = ReportCollector(cases, first, data.acquisition)
    methods[BASELINE] = mean_method(training)
    with replaced_together(output, lambda: earlier_files(output)) as folder:
        observer = Observer(folder, data, methods, pictures, report, calibration)
        rows = score_patients(data, methods, observer)
        made = {"consistency": how_of(steps)}
        summary = {**describe_run(predictor, data, split, seen, rows[0]), **made, **summary_of(rows, own)}
        if compare and others:
            mine = [row for row in rows if row["method"] == first]
            summary[f"minus_{Path(compare).parent.name or 'other'}"] = {first: differences(mine, others)}
            note_other_truth(compare, summary)
        if observer.coverages:
            summary["coverage"] = observer.coverage_summary(predictor.expected_coverage)
        write_rows(folder / "per_patient.csv", rows)
        write_json(folder / "summary.json", summary)
        if report is not None:
            report.write(folder / "report.html", summary, rows, [*predictor.notes, *notes])
    return summary


def open_data(
    predictor: Predictor, root, split: str, cache_dir, allow_seen: bool, xrays: str = "drr"
) -> tuple[PatientDataset, PatientDataset, list[str], list[str]]:
    """The patients to score, those of the training split, which of the first were trained on, and notes (printed).

    Raises :class:`InputError` when a checkpoint does not fit the data, or was trained on a patient to score.
    """
    # X-rays of a data set without manifest are read as they were in training.
    common: dict[str, Any] = {"cache_dir": cache_dir, "xray_normalization": predictor.xray_normalization}
    size = predictor.volume_size[0]
    data = PatientDataset(root, split, size, predictor.xray_size, xrays=xrays, seen=predictor.seen_channel, **common)
    if data.without_xrays:
        print(f"note: {len(data.without_xrays)} patients have no {xrays} of both views: {some(data.without_xrays)}")
    seen: set[str] = set()
    notes: list[str] = []
    for loaded in predictor.checkpoints():
        check_compatible(loaded.path, loaded.header, **data.acquisition.to_dict())
        seen |= set(check_patients(data, loaded, split, allow_seen))
        notes += volume_notes(data, loaded)
    for note in notes:
        print(f"note: {note}")
    training = PatientDataset(root, "train", size, None, scanned=data, **common)
    return data, training, sorted(seen), notes


def check_patients(data: PatientDataset, loaded: LoadedCheckpoint, split: str, allow_seen: bool) -> list[str]:
    """Patients of ``data`` that the checkpoint was trained on; :class:`InputError` unless they are allowed.

    Another split than the checkpoint's is only a note: folders grow, and the patients themselves are compared.
    """
    path, checkpoint = loaded.path, loaded.header
    seen = sorted(set(data.ids) & set(checkpoint["train_patients"]))
    which = f"{', '.join(seen[:5])} ({len(seen)} of the {split} split's {len(data)} patients)"
    if seen and not allow_seen:
        raise InputError(
            f"{path} was trained on {which};"
            " scores on them mean nothing for new patients (--allow-seen scores them all the same)"
        )
    if seen:
        print(f"note: {path} was trained on {which}: these scores mean nothing for new patients")
    if checkpoint["split_hash"] != data.split_hash:
        print(
            f"note: {path} was trained with another split of its data; of the {counted(len(data), 'patient')} scored"
            f" here {len(seen)} were in its training set, but some may have chosen its best epoch"
        )
    return seen


def calibration_notes(calibration: SampleCalibration | None, data: PatientDataset) -> list[str]:
    """Which of the patients the standard deviation was calibrated on (printed)."""
    known = [patient for patient in data.ids if calibration is not None and patient in calibration.patients]
    text = f"the standard deviation was calibrated on {some(known)}: its coverage says nothing about other patients"
    if known:
        print(f"note: {text}")
    return [text] if known else []


def volume_notes(data: PatientDataset, loaded: LoadedCheckpoint) -> list[str]:
    """Where prepare_data.py made the volumes otherwise than those that the checkpoint was trained on.

    Training refuses to go on with such data; here the scores just mean something else, a couch that is missing, say.
    What the checkpoint or the manifest does not tell is not compared.
    """
    made = read_json(data.root / MANIFEST) if data.has_manifest else {}
    trained = loaded.header.get("volumes", {})
    return [
        f"{loaded.path} was trained on volumes of {key} {trained[key]}, these are of {key} {made[key]}:"
        " part of the error may come from that"
        for key in VOLUMES
        if key in trained and key in made and trained[key] != made[key]
    ]


def provenance(loaded: LoadedCheckpoint) -> dict:
    """The summary's entries of a checkpoint: file, hash of its training configuration, split, weights.

    The configuration's hash is None where the checkpoint holds no configuration; a cascade has its last stage's.
    """
    header, settings = loaded.header, loaded.header.get("config")
    return {
        "file": Path(loaded.path).resolve().name,
        "kind": header.get("kind"),
        "epoch": header["epoch"],
        "config_hash": header.get("config_hash") or (config_hash(settings) if settings else None),
        "split_hash": header["split_hash"],
        "weights": loaded.weights,
    }


def describe_run(predictor: Predictor, data: PatientDataset, split: str, seen: list[str], row: dict) -> dict:
    """The first part of ``summary.json``: what was evaluated, on what, by which protocols (those of a row)."""
    protocols = protocols_of(data.xrays, row)
    return {
        **predictor.summary(),
        "checkpoints": [provenance(loaded) for loaded in predictor.checkpoints()],
        "data": data.root.resolve().name,
        "split": split,
        "split_hash": data.split_hash,
        "xrays": data.xrays,
        "patients": data.ids,
        "seen_in_training": seen,
        "volume_size": list(predictor.volume_size),
        **data.acquisition.to_dict(),
        "protocols": {column: text for protocol in protocols.values() for column, text in protocol.columns.items()},
        "protocol_columns": {name: list(protocol.columns) for name, protocol in protocols.items()},
        "device": predictor.device.type,
        "precision": predictor.precision.name,
        "torch": torch.__version__,
    }


def earlier_files(output: Path) -> list[Path]:
    """Files that an earlier evaluation wrote into ``output``; of the pictures those of the patients it scored."""
    summary = output / "summary.json"
    try:
        scored = read_json(summary)["patients"] if summary.exists() else []
    except (InputError, KeyError, TypeError):  # not a summary of this program: its pictures are not, either
        scored = []
    pictures = [output / "pictures" / f"{patient}.png" for patient in scored if is_plain_name(patient)]
    return [path for path in (*(output / name for name in FILES), *pictures) if path.is_file()]
