"""Which patients train, validate and test: by a stable hash or by a file, always by person, always checked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping

from xray2ct.files import InputError, check_patient_id

SPLITS = ("train", "val", "test")


def split_by_hash(
    ids,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    persons: Mapping[str, str] | None = None,
    kept: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Split by a stable hash, in exact fractions: a list of ids for each of train, val and test, sorted.

    People are ranked by the SHA-256 of ``seed:person``. The first ``test_fraction`` of them (rounded, at least one
    where the fraction is above 0) are test patients, the next ``val_fraction`` validation patients, the others train.
    One or two people all train.

    persons: who each id is, where that is not the id itself; one person is never on two sides.
    kept: the side on which an earlier split has an id. It stays there; new people fill validation and test up to
    their fractions first, in the order of their ranks, and train otherwise.
    """
    persons, kept = persons or {}, kept or {}
    members: dict[str, list[str]] = {}
    for patient in sorted(ids):
        members.setdefault(persons.get(patient, patient), []).append(patient)
    sides = {p: next((kept[i] for i in found if i in kept), None) for p, found in members.items()}
    places = dict(zip(("test", "val"), _places(len(members), val_fraction, test_fraction)))
    for side in places:
        places[side] -= sum(found == side for found in sides.values())
    for new in sorted((p for p in members if sides[p] is None), key=lambda p: (_hash_number(p, seed), p)):
        sides[new] = next((side for side, left in places.items() if left > 0), "train")
        if sides[new] in places:
            places[sides[new]] -= 1
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for one, found in members.items():
        for patient in found:
            parts[kept.get(patient, sides[one])].append(patient)
    return {name: sorted(patients) for name, patients in parts.items()}


def _places(count: int, val_fraction: float, test_fraction: float) -> tuple[int, int]:
    """How many of ``count`` people test and validate; someone always trains."""
    if count < 3:
        return 0, 0
    test = max(round(count * test_fraction), int(test_fraction > 0))
    val = max(round(count * val_fraction), int(val_fraction > 0))
    test = min(test, count - 1 - int(val_fraction > 0))
    return test, min(val, count - 1 - test)


def _hash_number(patient, seed):
    return int(hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()[:16], 16) / 16**16


def check_split(split, ids, origin) -> dict[str, list[str]]:
    """Check ``{"train": [...], "val": [...], "test": [...]}`` against the patients there are.

    Raises :class:`InputError` naming ``origin`` and the patients: ids that are no folder names, listed twice,
    listed but not there, there but not listed. Returns the split with sorted ids.
    """
    if not isinstance(split, dict) or set(split) != set(SPLITS):
        raise InputError(f"{origin}: expected an object with exactly the keys train, val and test")
    for name in SPLITS:
        if not isinstance(split[name], list) or not all(isinstance(patient, str) for patient in split[name]):
            raise InputError(f"{origin}: {name} must be a list of patient ids")
    listed = Counter(check_patient_id(patient, f"{origin}: {name}") for name in SPLITS for patient in split[name])
    problems = {
        "listed more than once": {patient for patient, count in listed.items() if count > 1},
        "listed but not found": set(listed) - set(ids),
        "found but not listed": set(ids) - set(listed),
    }
    texts = [f"{what}: {', '.join(sorted(who))}" for what, who in problems.items() if who]
    if texts:
        raise InputError(f"{origin}: {'; '.join(texts)}")
    return {name: sorted(split[name]) for name in SPLITS}


def split_hash(split: dict) -> str:
    """SHA-256 of a split as canonical JSON: two results compare only where it is the same."""
    return hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()
