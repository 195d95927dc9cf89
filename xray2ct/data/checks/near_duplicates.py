"""Near-duplicates among patients: the same volume or X-ray twice, mirrored copies, exchanged X-rays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

import numpy as np

from xray2ct.conventions import VIEW_LABELS
from xray2ct.data.archive.sources import person_of, read_provenance
from xray2ct.data.checks.findings import Finding, one_per_problem
from xray2ct.data.checks.xray_comparison import SAME_XRAY_COARSE, ncc_distance

VIEW_CHECKS = ("PA X-ray", "lateral X-ray")
# Mean difference in HU at 22 mm: seen 0 for a copy, 60 at least between patients.
COPY_HU, NEAR_COPY_HU = 2.0, 15.0


def name_other_patients(findings, fingerprints, settings) -> list[Finding]:
    """Where an X-ray does not show the volume of its own folder, name the patient it does show, if there is one."""
    named = []
    for finding in findings:
        view = VIEW_CHECKS.index(finding.check) if finding.check in VIEW_CHECKS else None
        stored = fingerprints.unexplained.get((finding.patient, view))
        owner = None if stored is None else _owner(stored, finding.patient, fingerprints)
        if owner:
            patient, other = owner
            what = f"shows another patient: it is {patient}'s {VIEW_LABELS[other]} view ({settings.split_of(patient)})"
            finding = replace(finding, message=what)
        named.append(finding)
    return named


def _owner(stored, patient, fingerprints) -> tuple[str, int] | None:
    candidates = [
        (ncc_distance(stored, image), other, view)
        for other, images in fingerprints.renders.items()
        if other != patient
        for view, image in enumerate(images)
        if image.shape == stored.shape
    ]
    distance, other, view = min(candidates, default=(1.0, "", 0))
    return (other, view) if distance <= SAME_XRAY_COARSE else None


def check_duplicates(patients, fingerprints, settings) -> list[Finding]:
    problems = defaultdict(list)

    def pair(one, other, words):
        sides = settings.split_of(one), settings.split_of(other)
        leak = " (across splits: a leak)" if settings.present and sides[0] != sides[1] else ""
        problems[one].append(f"{words} {other}, {sides[0]} and {sides[1]}{leak}")
        problems[other].append(f"{words} {one}, {sides[1]} and {sides[0]}{leak}")

    for one, other, words in _volume_pairs(fingerprints.volumes):
        pair(one, other, words)
    for owners in fingerprints.pictures.values():
        for (one, view), (other, view_other) in combinations(owners, 2):
            if one == other:
                problems[one].append("the PA and the lateral X-ray are the same file")
            else:
                pair(one, other, f"its {VIEW_LABELS[view]} X-ray is the same file as the {VIEW_LABELS[view_other]} of")
    persons = defaultdict(list)
    sources = defaultdict(list)
    for patient, entry in settings.entries.items():
        if isinstance(entry.get("source"), str):
            sources[entry["source"]].append(patient)
        persons[person_of(read_provenance(entry), patient)].append(patient)
    for owners in persons.values():
        for one, other in combinations(owners, 2):
            pair(one, other, "the same person, by the archive's ids, as")
    for source, owners in sources.items():
        for one, other in combinations(owners, 2):
            pair(one, other, f"made from the same source {source!r} as")
    return [found for patient in patients for found in one_per_problem(patient, "duplicates", problems[patient])]


def _volume_pairs(volumes) -> Iterable[tuple[str, str, str]]:
    """(one, other, words) for volumes that are the same or nearly so, also mirrored left to right."""
    ids = list(volumes)
    if len(ids) < 2:
        return
    plain = np.stack([volumes[name].ravel() for name in ids])
    mirrored = np.stack([volumes[name][:, :, ::-1].ravel() for name in ids])
    for index, one in enumerate(ids[:-1]):
        for words, table in (("", plain), ("mirrored ", mirrored)):
            distances = np.abs(table[index + 1 :] - plain[index]).mean(axis=1)
            for step in np.flatnonzero(distances < NEAR_COPY_HU):
                near = "nearly " if distances[step] > COPY_HU else ""
                yield one, ids[index + 1 + step], f"{near}the same {words}volume as"
