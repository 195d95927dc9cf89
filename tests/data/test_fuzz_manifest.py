"""Fuzzing of manifests, split files, preparation records and patient ids."""

from __future__ import annotations

import json
import math

import pytest

from tests.helpers.tiny_data import make_dataset

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from dataset import PatientDataset
from tests.helpers.fuzzing import TEXT_DAMAGE, VALUES, changed, json_bytes, outcome
from xray2ct.conventions import RECORD
from xray2ct.data.manifest import Manifest, find_patients
from xray2ct.data.prepare import finished_entry, patient_files
from xray2ct.data.prepare_folder import check_output
from xray2ct.data.splits import SPLITS, check_split
from xray2ct.files import is_plain_name, read_json, safe_name

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "root", patients=3, cube_size=16, xray_size=32)


MANIFEST_PATHS = [(k,) for k in ("format_version", "geometry", "hu_window", "mu_water", "xray_scale", "cube_size")]
MANIFEST_PATHS += [("geometry", k) for k in ("kind", "fov_mm", "sdd_mm", "sid_mm", "detector_mm", "x")]
MANIFEST_PATHS += [("split",), ("patients",), ("hu_window", 0), ("hu_window", 1), *[("split", name) for name in SPLITS]]
MANIFEST_PATHS += [("patients", name) for name in ("p0", "p9", "../p0", "p0/", "\u0440" + "0")] + [
    ("patients", "p1", "files")
]
IDS = st.sampled_from(["p0", "p1", "p2", "p9", "../p0", "/etc", "p0\0", "p0\n", "con", "a" * 300, "\u04400", ""])
LISTS = st.lists(IDS, max_size=4)


@given(
    st.dictionaries(st.sampled_from(MANIFEST_PATHS), VALUES | LISTS, max_size=2),
    st.lists(st.sampled_from(MANIFEST_PATHS), max_size=1),
    TEXT_DAMAGE,
)
def test_manifests(root, changes, dropped, damage):
    path = root / "dataset.json"
    good = path.read_bytes()
    data = changed(json.loads(good), changes)
    for place in dropped:
        if len(place) == 1:
            data.pop(place[0], None)
    try:
        path.write_bytes(json_bytes(data, damage))
        patients = find_patients(root)
        manifest = outcome(Manifest, root, patients, names=root, allowed="left out")
        made = outcome(PatientDataset, root, "all", 16, None, names=root, allowed="left out")
    finally:
        path.write_bytes(good)
    if manifest is None:
        assert made is None
        return
    assert damage in ("none", "bom")
    assert sorted(p for name in SPLITS for p in manifest.split[name]) == sorted(patients)
    assert set(patients) <= {"p0", "p1", "p2"}
    assert all(math.isfinite(v) for v in (*manifest.hu_window, manifest.xray_scale, manifest.geometry.fov_mm))
    assert manifest.hu_window[0] < manifest.hu_window[1]
    assert manifest.xray_scale > 0
    assert 1 <= manifest.cube_size <= 1024


@given(st.fixed_dictionaries(dict.fromkeys(SPLITS, LISTS | VALUES)) | VALUES | st.just(None), TEXT_DAMAGE)
def test_split_files(folder, data, damage):
    data = {"train": ["p0"], "val": ["p1"], "test": ["p2"]} if data is None else data
    path = folder / "split.json"
    path.write_bytes(json_bytes(data, damage))
    split = outcome(lambda: check_split(read_json(path), ["p0", "p1", "p2"], path), names=path)
    if split is not None:
        assert sorted(p for name in SPLITS for p in split[name]) == ["p0", "p1", "p2"]


RECORD_PATHS = [
    ("complete",),
    ("signature",),
    ("settings",),
    ("patient",),
    ("patient", "files"),
    ("patient", "files", "../x"),
]


@given(st.dictionaries(st.sampled_from(RECORD_PATHS), VALUES, max_size=2), TEXT_DAMAGE)
def test_records_of_prepared_patients(folder, changes, damage):
    from xray2ct.imaging.find_cts import CtSource

    source = CtSource("p0", folder / "p0.nii", "nifti")
    source.path.write_bytes(b"x")
    record = {"complete": True, "settings": {"size": 16}, "signature": [1, 1, 0], "patient": {"files": {}}}
    path = folder / "out" / "p0" / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_bytes(changed(record, changes), damage))
    outcome(check_output, folder / "out", [source], {"size": 16}, False, names=path)
    entry = outcome(finished_entry, source, path.parent, names=path)
    assert entry is None or set(entry["files"]) == set(patient_files("p0"))


@given(st.one_of(st.text(max_size=40), st.text(st.characters(), min_size=190, max_size=260), IDS))
def test_any_text_becomes_a_name_that_every_system_takes(text):
    name = safe_name(text)
    assert is_plain_name(name)
    assert safe_name(name) == name
