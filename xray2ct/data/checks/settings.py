"""Check of a data set's manifest: settings, split, folders."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from xray2ct.conventions import MANIFEST
from xray2ct.data.checks.findings import FAILED, UNKNOWN, Finding, one_per_problem
from xray2ct.data.manifest import DEFAULTS, edge_up_to, read_values
from xray2ct.data.patient_files import loose_files
from xray2ct.data.splits import SPLITS, split_hash
from xray2ct.files import InputError, is_file_name, read_json
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.read_xray import MAX_EDGE


@dataclass
class Settings:
    """What the manifest says, or stated defaults; None where the manifest's own value is unusable."""

    present: bool
    geometry: Geometry | None
    hu_window: tuple[float, float]
    xray_scale: float
    cube_size: int
    xray_size: int | None
    split: dict[str, list[str]]
    entries: dict[str, dict]
    raw: dict

    def split_of(self, patient: str) -> str:
        """Names of the splits that list a patient, or "no split"."""
        return " and ".join(name for name in SPLITS if patient in self.split.get(name, ())) or "no split"


def read_settings(root) -> tuple[Settings, list[Finding]]:
    path = root / MANIFEST
    default = Settings(present=False, **DEFAULTS, xray_size=None, split={}, entries={}, raw={})
    if not path.exists():
        text = f"no {MANIFEST}: defaults assumed; checksums, grid and brightness cannot be checked"
        return default, [Finding(None, "manifest", UNKNOWN, text)]
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("patients"), dict):
        raise InputError(f"{path}: expected an object with the patients' entries under 'patients'")
    values, problems = read_values(data, {"xray_size": edge_up_to(MAX_EDGE)})
    used = {key: values[key] for key in (*DEFAULTS, "xray_size") if key in values}
    if len(used) <= len(DEFAULTS):
        used["geometry"] = None  # without all of these no X-ray can be rendered
    settings = replace(default, present=True, raw=data, entries={}, **used)
    settings.split = _usable_split(data.get("split"))
    for patient, entry in data["patients"].items():
        if not is_file_name(patient):
            problems.append(f"patient id {patient!r} leaves its folder: not read")
        elif not isinstance(entry, dict) or not isinstance(entry.get("files"), dict):
            problems.append(f"the entry of {patient} lists no files")
            settings.entries[patient] = {"files": {}}
        else:
            settings.entries[patient] = entry
    return settings, one_per_problem(None, "manifest", problems)


def _usable_split(split) -> dict[str, list[str]]:
    split = split if isinstance(split, dict) else {}
    lists = {name: split.get(name) for name in SPLITS}
    return {name: [p for p in ids if isinstance(p, str)] for name, ids in lists.items() if isinstance(ids, list)}


def check_split_lists(settings) -> list[Finding]:
    if not settings.present:
        return [Finding(None, "split", UNKNOWN, "no manifest: patients are split by hash of their id")]
    split = settings.raw.get("split")
    if not isinstance(split, dict) or set(split) != set(SPLITS) or set(settings.split) != set(SPLITS):
        return [Finding(None, "split", FAILED, "expected lists of patient ids under exactly train, val and test")]
    listed, problems = Counter(p for name in SPLITS for p in settings.split[name]), []
    for patient in sorted(listed):
        inside = [name for name in SPLITS if patient in settings.split[name]]
        if len(inside) > 1:
            problems.append(f"{patient} is in {' and '.join(inside)}")
        elif listed[patient] > 1:
            problems.append(f"{patient} is listed {listed[patient]} times in {inside[0]}")
        if patient not in settings.entries:
            problems.append(f"{patient} ({inside[0]}) is not a patient of the data set")
    problems += [f"{patient} is in no split" for patient in sorted(set(settings.entries) - set(listed))]
    if not problems and settings.raw.get("split_hash", split_hash(split)) != split_hash(split):
        problems.append("split_hash is not that of the lists: they were changed after the preparation")
    return one_per_problem(None, "split", problems)


def check_folders(root, folders, patients, settings) -> list[Finding]:
    problems = []
    for folder in folders:
        if folder.id not in patients:
            what = [f"is not in {MANIFEST}"] if settings.present else folder.problems or ["holds no volume"]
            problems.append(f"extra folder {folder.id}: {what[0]}")
    problems += [f"{path.name} lies outside the patients' folders: not used" for path in loose_files(root)]
    spellings = defaultdict(list)
    for name in {*(folder.id for folder in folders), *patients}:
        spellings[name.lower()].append(name)
    for names in spellings.values():
        if len(names) > 1:
            problems.append(f"{' and '.join(sorted(names))} differ only in upper and lower case")
    return one_per_problem(None, "folders", problems)
