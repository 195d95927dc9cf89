"""Prepare CTs: one patient cube, scan mask and two X-rays each, and a manifest with the split.

Restartable: a patient is done when ``prepared.json`` says so and every checksum holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from xray2ct.conventions import MANIFEST, MANIFEST_VERSION, RECORD, VIEW_LABELS
from xray2ct.data.splits import SPLITS, split_hash
from xray2ct.files import InputError, check_patient_id, read_json, sha256, shown, write_json
from xray2ct.geometry.projector import Geometry, hu_to_unit, render_xrays
from xray2ct.imaging.body import locate_cube, remove_couch
from xray2ct.imaging.cube import cube_affine, resample_cube
from xray2ct.imaging.cube_files import write_cube
from xray2ct.imaging.find_cts import CtSource, source_files
from xray2ct.imaging.read_ct import read_ct
from xray2ct.imaging.read_xray import write_png16

# ------------------------------------------------------------------------------------------------
# One patient


def prepare_patient(source: CtSource, folder, settings: dict) -> tuple[dict, list[str]]:
    """Write one patient's folder; ``settings`` as in the manifest. Returns the manifest entry and notes.

    Each file is replaced atomically, and the record that makes the patient count as done comes last. Computed on one
    thread, so that the bytes do not depend on how many a machine has.
    """
    with _one_thread():
        return _prepare(source, Path(folder), settings)


@contextlib.contextmanager
def _one_thread():
    """torch on one thread: sums over several come out different in their last bits, and so does a rounded pixel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(source, folder, settings):
    patient = check_patient_id(source.patient_id, source.path)
    geometry = Geometry.from_dict(settings["geometry"])
    fov_mm, size = geometry.fov_mm, settings["cube_size"]
    signature = signature_of(source)  # before reading: what changes meanwhile is noticed the next time
    ct = read_ct(source.path, source.kind, assume_ras=settings["assume_ras"])
    notes = list(ct.notes)
    centre = locate_cube(ct, fov_mm)
    hu, mask = resample_cube(ct, centre, fov_mm, size)
    del ct
    if settings["couch_removed"]:
        hu = remove_couch(hu, fov_mm / size)
    xrays = _render(hu, geometry, settings, notes)

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"complete": False, "settings": settings})  # marks the folder as ours
    for name in (patient, RECORD):
        for stale in folder.glob(f".{name}*.tmp*"):  # a run that was killed while writing
            stale.unlink()
    names = patient_files(patient)
    affine = cube_affine(centre, fov_mm, size)
    write_cube(folder / names[0], hu, affine)
    write_cube(folder / names[1], mask, affine)
    for name, image in zip(names[2:], xrays):
        write_png16(folder / name, image)
    entry = {
        "source": source.path.name,  # relative to --input in the manifest
        "centre_mm": [round(value, 3) for value in centre],
        "scan_fraction": round(float(mask.mean()), 4),
        "files": {name: sha256(folder / name) for name in names},
    }
    record = {"complete": True, "settings": settings, "signature": signature, "patient": entry}
    write_json(folder / RECORD, record)
    return entry, notes


def _render(hu, geometry, settings, notes):
    volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32), settings["hu_window"]))[None, None]
    size = settings["xray_size"]
    with torch.inference_mode():
        xrays = render_xrays(volume, geometry, (size, size), settings["hu_window"], settings["xray_scale"])[0].numpy()
    for view, image in zip(VIEW_LABELS, xrays):
        if image.max() > 1:
            notes.append(
                f"{view} X-ray: {np.mean(image > 1):.2%} of the pixels above 1 clipped (maximum {image.max():.2f})"
            )
    return xrays.clip(0, 1)


def patient_files(patient: str) -> tuple[str, str, str, str]:
    """Names of the four files of a patient: cube, scan mask, frontal and lateral X-ray."""
    return f"{patient}.nii.gz", f"{patient}_mask.nii.gz", f"{patient}_pa_drr.png", f"{patient}_lat_drr.png"


def signature_of(source: CtSource) -> dict[str, str]:
    """What tells a changed source from the one that was prepared, of all its files (the .raw of a .mhd, every slice).

    ``state``: names, sizes and times, quick to compare. ``content``: names and bytes, which decide where times differ.
    """
    content = hashlib.sha256()
    state = _state(source)
    for path in source_files(source):
        content.update(f"{path.name}\n{sha256(path)}\n".encode("utf-8", "surrogateescape"))
    return {"state": state, "content": content.hexdigest()}


def _state(source):
    digest = hashlib.sha256()
    for path in source_files(source):
        stat = path.stat()  # the time of the last change of status moves even when a copy keeps that of the content
        line = f"{path.name}\n{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _unchanged(source, signature) -> bool:
    if not isinstance(signature, dict):  # of an earlier version, which did not look at all files
        return False
    return signature.get("state") == _state(source) or signature.get("content") == signature_of(source)["content"]


# ------------------------------------------------------------------------------------------------
# All patients


def check_output(output: Path, sources, settings, overwrite: bool) -> None:
    """Refuse an output that other settings or someone else wrote; names what differs."""
    manifest = output / MANIFEST
    if manifest.exists():
        found = read_json(manifest)
        if not isinstance(found, dict) or found.get("format_version") != MANIFEST_VERSION:
            raise InputError(
                f"{manifest}: not a manifest of format version {MANIFEST_VERSION}; choose another --output"
            )
        if not overwrite:
            _check_settings(manifest, {k: found.get(k) for k in settings}, settings)
    for source in sources:
        folder = output / source.patient_id
        if folder.is_symlink():
            raise InputError(f"{folder}: is a link; expected a folder, or files would be written where it leads")
        if (folder / RECORD).exists():
            if not overwrite:
                _check_settings(folder / RECORD, _read_record(folder).get("settings"), settings)
        elif any((folder / name).exists() for name in patient_files(source.patient_id)):
            raise InputError(
                f"{folder}: holds files that this command did not write (no {RECORD}); choose another --output"
            )


def _read_record(folder) -> dict:
    record = read_json(folder / RECORD)
    if not isinstance(record, dict):
        raise InputError(f"{folder / RECORD}: not a record of prepare_data.py; remove it, or choose another --output")
    return record


def _check_settings(path, found, settings):
    found = found if isinstance(found, dict) else {}
    wanted = json.loads(json.dumps(settings))
    different = [f"{k} ({shown(found.get(k))} there, {wanted[k]} now)" for k in wanted if found.get(k) != wanted[k]]
    if different:
        raise InputError(
            f"{path}: prepared with other settings: {'; '.join(different)}."
            " Use the same ones, another --output, or --overwrite to do everything again"
        )


def finished_entry(source: CtSource, folder: Path) -> dict | None:
    """The manifest entry of a patient that is done: source unchanged, all files there with their checksums."""
    if not (folder / RECORD).exists():
        return None
    record = _read_record(folder)
    try:
        if not record.get("complete") or not _unchanged(source, record.get("signature")):
            return None
    except (InputError, OSError):  # reading it says what is wrong
        return None
    entry = record.get("patient")
    files = entry.get("files") if isinstance(entry, dict) else None
    if not isinstance(files, dict) or set(files) != set(patient_files(source.patient_id)):
        return None
    for name, checksum in files.items():
        if not (folder / name).exists() or sha256(folder / name) != checksum:
            return None
    return entry


def prepare_all(sources, output: Path, settings: dict, workers: int, overwrite: bool = False):
    """Prepare all patients. Returns ``(entries, failures)``: ``{id: manifest entry}``, ``{id: message}``."""
    entries, failures, todo = {}, {}, []
    for source in tqdm(sources, desc="checking", unit="CT", leave=False):
        entry = None if overwrite else finished_entry(source, output / source.patient_id)
        if entry is None:
            todo.append(source)
        else:
            entries[source.patient_id] = entry
    if entries:
        print(f"{len(entries)} of {len(sources)} CTs are done already")

    with tqdm(total=len(todo), desc="preparing", unit="CT") as bar:
        for source, entry, problem, notes in _run(todo, output, settings, workers):
            for note in notes:
                bar.write(f"note: {source.patient_id}: {note}")
            if problem:
                failures[source.patient_id] = problem
                bar.write(f"failed: {problem}")
            else:
                entries[source.patient_id] = entry
            bar.update()
    return entries, failures


def _run(todo, output, settings, workers):
    """Yield ``(source, entry, problem, notes)`` as CTs finish; survives worker processes that die."""
    if workers == 1:
        for source in todo:
            yield source, *_try_patient(source, output / source.patient_id, settings)
        return
    workers = min(workers, len(todo))
    while todo:
        finished = []
        for source, result in _pool(todo, output, settings, workers):
            finished.append(source)
            yield source, *result
        todo = [source for source in todo if source not in finished]
        if todo and workers == 1:  # one process takes the CTs in their order, so the first one left killed it
            yield todo[0], None, f"{todo[0].path}: its worker process died (out of memory?)", []
            todo = todo[1:]
        workers = 1


def _pool(todo, output, settings, workers):
    """Yield ``(source, result)`` of the CTs that are done; all, unless a worker process dies."""
    # spawn: forking a process in which torch has started threads can deadlock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {}
        with contextlib.suppress(BrokenProcessPool):
            for source in todo:
                futures[pool.submit(_try_patient, source, output / source.patient_id, settings)] = source
        try:
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the command stops handing out CTs, this one is finished
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()  # killed: without this the worker would wait for work for ever
    os._exit(1)


def _try_patient(source, folder, settings):
    """``(entry, problem, notes)``: what is wrong with one CT must not stop the others."""
    try:
        entry, notes = prepare_patient(source, folder, settings)
    except (InputError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: torch out of memory
        message = str(error) or type(error).__name__
        return None, message if str(source.path) in message else f"{source.path}: {message}", []
    return entry, None, notes


def write_manifest(output: Path, settings: dict, split: dict, method: str, entries: dict) -> None:
    """Write ``dataset.json``; says which patients changed sides or are gone against an existing one."""
    path = output / MANIFEST
    if path.exists():
        before = _split_of(read_json(path))
        for name in SPLITS:
            moved = [p for p in split[name] if before.get(p, name) != name]
            if moved:
                print(f"note: now in {name}, before elsewhere (old checkpoints know them): {', '.join(moved)}")
        gone = sorted(set(before) - set(entries))
        if gone:
            print(f"note: no longer in the data set (their folders stay): {', '.join(gone)}")
    manifest = {"format_version": MANIFEST_VERSION, **settings, "split": split, "split_method": method}
    manifest["split_hash"] = split_hash(split)
    manifest["patients"] = {patient: entries[patient] for patient in sorted(entries)}
    write_json(path, manifest)


def _split_of(manifest) -> dict[str, str]:
    """``{id: split}`` of an earlier manifest; empty when it is something else."""
    split = manifest.get("split") if isinstance(manifest, dict) else None
    lists = {name: split.get(name) for name in SPLITS} if isinstance(split, dict) else {}
    return {p: name for name, ids in lists.items() if isinstance(ids, list) for p in ids if isinstance(p, str)}
