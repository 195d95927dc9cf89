"""Which patients train, validate and test: by a stable hash or by a file, always by patient, always checked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from xray2ct.files import InputError, check_patient_id

SPLITS = ("train", "val", "test")


def split_by_hash(ids, val_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0) -> dict:
    """Split patients by a stable hash: ``{"train": [...], "val": [...], "test": [...]}``, each sorted.

    A patient's number in [0, 1) is the SHA-256 of ``seed:id``; below ``test_fraction`` it is a test patient,
    below ``test_fraction + val_fraction`` a validation patient, else a training patient: independent of the
    other patients. Only where a split with a fraction above 0 would be empty (three or more patients), the
    patients with the nearest numbers fill it. One or two patients are all training patients.
    """
    order = sorted(ids, key=lambda patient: (_hash_number(patient, seed), patient))
    count = len(order)
    test_end = sum(_hash_number(patient, seed) < test_fraction for patient in order)
    val_end = sum(_hash_number(patient, seed) < test_fraction + val_fraction for patient in order)
    if count < 3:
        test_end = val_end = 0
    else:
        least_test, least_val = int(test_fraction > 0), int(val_fraction > 0)
        test_end = min(max(test_end, least_test), count - 1 - least_val)
        val_end = min(max(val_end, test_end + least_val), count - 1)
    parts = {"train": order[val_end:], "val": order[test_end:val_end], "test": order[:test_end]}
    return {name: sorted(patients) for name, patients in parts.items()}


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
