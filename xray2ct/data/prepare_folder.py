"""Prepare a folder of CTs on several processes: a data set with its manifest and split."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from xray2ct.conventions import MANIFEST, MANIFEST_VERSION, RECORD
from xray2ct.data.archive.sources import person_of, provenance
from xray2ct.data.prepare import finished_entry, patient_files, prepare_patient, read_record
from xray2ct.data.shards import Shard, read_shards, write_shard
from xray2ct.data.splits import SPLITS, check_split, split_by_hash, split_hash
from xray2ct.data.work_list import find_work, fingerprint, save_work
from xray2ct.file_lock import locked
from xray2ct.files import InputError, read_json, shown, write_json
from xray2ct.imaging.find_cts import CtSource
from xray2ct.progress import progress_bar


class Splitter(NamedTuple):
    """How patients are split: by the lists of ``file``, or without one by a hash (see :mod:`splits`)."""

    file: Path | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0


@dataclass
class Prepared:
    """What became of a folder. entries: of the manifest, by patient; failures: messages by patient.

    found: number of CTs; left_out: sentences about files that may hold a CT but are not read. split: empty for a shard.
    """

    entries: dict[str, dict]
    split: dict[str, list[str]]
    failures: dict[str, str]
    found: int
    left_out: list[str]


def prepare_folder(
    folder: Path,
    output: Path,
    settings: dict,
    splitter: Splitter,
    workers: int,
    overwrite: bool = False,
    shard: Shard | None = None,
    rescan: bool = False,
) -> Prepared:
    """Prepare every CT below ``folder`` that is not done yet, and write the manifest.

    settings: as in the manifest. A CT that cannot be used is in ``failures``; the others are done. shard: this share
    of the CTs only, and no manifest: :func:`merge_shards` writes it. rescan: search for CTs even where an earlier
    list holds. Raises :class:`InputError` before any work: no CT, a split that does not fit, an output of other
    settings or origin, an output or a shard that another process works on.
    """
    sources, left_out = find_work(folder, output, rescan, shared=shard is not None)
    for text in left_out:  # before hours of work, and again at the end
        print(f"left out: {text}")
    _check_apart(output, sources)
    ids = [source.patient_id for source in sources]
    origins = provenance(folder)
    given = check_split(read_json(splitter.file), ids, splitter.file) if splitter.file and not shard else None
    job, everything = shard or Shard(), sources
    sources = job.share(sources)
    check_output(output, sources, settings, overwrite)
    what = f"another process prepares shard {shard} here" if shard else "another process prepares CTs here"
    with locked(job.file(output, "lock"), what):
        save_work(folder, output, everything, left_out)
        if overwrite:
            (output / MANIFEST).unlink(missing_ok=True)  # if this run is killed, it would describe a mixture
        job.file(output, "json").unlink(missing_ok=True)  # the merge must not take it for finished
        entries, failures = prepare_all(sources, output, settings, workers, overwrite)
        for source in sources:
            if source.patient_id in entries:
                entries[source.patient_id]["source"] = source.path.relative_to(folder).as_posix()
                if source.patient_id in origins:
                    entries[source.patient_id]["provenance"] = origins[source.patient_id]
        if shard:
            counted = {"found": len(sources), "left_out": left_out}
            done = {"list": fingerprint(everything), "entries": entries, "failures": failures, **counted}
            write_shard(output, shard, {"settings": settings, **done})
            return Prepared(entries, {}, failures, len(sources), left_out)
        return _finished(output, settings, splitter, given, Prepared(entries, {}, failures, len(sources), left_out))


def merge_shards(output: Path, splitter: Splitter) -> Prepared:
    """Write the manifest of an output whose shards are all done; raises as :func:`shards.read_shards` does."""
    results = read_shards(output)
    entries = {patient: entry for result in results for patient, entry in result["entries"].items()}
    failures = {patient: text for result in results for patient, text in result["failures"].items()}
    given = None
    if splitter.file:
        given = check_split(read_json(splitter.file), [*entries, *failures], splitter.file)
    found = sum(result["found"] for result in results)
    done = Prepared(entries, {}, failures, found, results[0]["left_out"])
    with locked(Shard().file(output, "lock"), "another process prepares CTs here"):
        return _finished(output, results[0]["settings"], splitter, given, done)


def _finished(output, settings, splitter: Splitter, given: dict | None, done: Prepared) -> Prepared:
    """Split the patients that are done and write their manifest. given: the lists of ``splitter.file``."""
    if given:
        done.split = {name: [patient for patient in given[name] if patient in done.entries] for name in SPLITS}
    else:
        done.split = _split(output, done.entries, splitter)
    if done.entries:
        write_manifest(output, settings, done.split, "file" if given else "hash", done.entries)
    return done


def _split(output: Path, entries: dict, splitter: Splitter) -> dict[str, list[str]]:
    """Split by hash; patients of an earlier manifest stay on their sides, so that old checkpoints can be compared."""
    kept = _split_of(read_json(output / MANIFEST)) if (output / MANIFEST).exists() else {}
    persons = {patient: person_of(entry.get("provenance"), patient) for patient, entry in entries.items()}
    fractions = splitter.val_fraction, splitter.test_fraction, splitter.seed
    split = split_by_hash(entries, *fractions, persons, kept)
    if kept and split != split_by_hash(entries, *fractions, persons):
        print(f"note: patients of the earlier {MANIFEST} keep their split; remove that file to split all of them anew")
    return split


def _check_apart(output: Path, sources: list[CtSource]) -> None:
    for source in sources:  # a link may lead there
        if source.path.resolve().is_relative_to(output.resolve()):
            raise InputError(f"{source.path}: lies in --output {output}; its cubes would be taken for CTs")


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
                _check_settings(folder / RECORD, read_record(folder).get("settings"), settings)
        elif any((folder / name).exists() for name in patient_files(source.patient_id)):
            raise InputError(
                f"{folder}: holds files that this command did not write (no {RECORD}); choose another --output"
            )


def _check_settings(path, found, settings):
    found = found if isinstance(found, dict) else {}
    wanted = json.loads(json.dumps(settings))
    different = [f"{k} ({shown(found.get(k))} there, {wanted[k]} now)" for k in wanted if found.get(k) != wanted[k]]
    if different:
        raise InputError(
            f"{path}: prepared with other settings: {'; '.join(different)}."
            " Use the same ones, another --output, or --overwrite to do everything again"
        )


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


# ------------------------------------------------------------------------------------------------
# On several processes


def prepare_all(sources, output: Path, settings: dict, workers: int, overwrite: bool = False):
    """Prepare all patients. Returns ``(entries, failures)``: ``{id: manifest entry}``, ``{id: message}``."""
    entries, failures, todo = {}, {}, []
    for source in progress_bar(sources, desc="checking", unit="CTs", leave=False):
        entry = None if overwrite else finished_entry(source, output / source.patient_id)
        if entry is None:
            todo.append(source)
        else:
            entries[source.patient_id] = entry
    if entries:
        print(f"{len(entries)} of {len(sources)} CTs are done already")

    with progress_bar(total=len(todo), desc="preparing", unit="CTs") as bar:
        for source, entry, problem, notes in _run(todo, output, settings, workers):
            for note in notes:
                tqdm.write(f"note: {source.patient_id}: {note}")
            if problem:
                failures[source.patient_id] = problem
                tqdm.write(f"failed: {problem}")
            else:
                entries[source.patient_id] = entry
            bar.update()
    return entries, failures


def _run(todo, output, settings, workers):
    """Yield ``(source, entry, problem, notes)`` as CTs finish; survives worker processes that die."""
    if workers == 1:
        for source in todo:
            yield source, *try_patient(source, output / source.patient_id, settings)
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
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        futures = {}
        with contextlib.suppress(BrokenProcessPool):
            for source in todo:
                futures[pool.submit(try_patient, source, output / source.patient_id, settings)] = source
        try:
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker():
    """Initializer of a pool's process: it ignores Ctrl-C, and ends when the command does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the command stops handing out CTs, this one is finished
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    parent.join()  # killed: without this the worker would wait for work for ever
    os._exit(1)


def try_patient(source, folder, settings):
    """``(entry, problem, notes)``: what is wrong with one CT must not stop the others."""
    try:
        entry, notes = prepare_patient(source, folder, settings)
    except (InputError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: torch out of memory
        message = str(error) or type(error).__name__
        return None, message if str(source.path) in message else f"{source.path}: {message}", []
    return entry, None, notes
