"""Ids, names and links: nothing is read or written outside the folder it belongs to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import prepare_data
from dataset import PatientDataset
from tests.helpers.ct_cases import save_nifti, thorax
from tests.helpers.tiny_data import make_dataset
from xray2ct.conventions import RECORD
from xray2ct.data.manifest import Manifest, find_patients
from xray2ct.data.prepare import finished_entry, patient_files, signature_of
from xray2ct.data.splits import check_split
from xray2ct.files import InputError, atomic_path, check_patient_id, is_plain_name, safe_name, sha256, write_json
from xray2ct.imaging.find_cts import find_cts

BAD_IDS = [
    "",
    ".",
    "..",
    "../p0",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "C:\\x",
    "p0\0",
    "p0\n",
    "p0\u202e",
    "\u0440" + "0",  # Cyrillic er looks like p
    "\uff50" + "0",  # fullwidth p
    "<script>alert(1)</script>",
    "a&b",
    'a"b',
    "=1+1",
    "-rf",
    "p0 ",
    "p0.",
    ".hidden",
    "con",
    "NUL.v2",
    "Lpt1",
    "a" * 201,
    "\ud800",
    7,
    None,
]


@pytest.mark.parametrize("patient", BAD_IDS)
def test_bad_ids_are_refused_and_made_safe(patient):
    with pytest.raises(InputError, match=r"here: patient id .*expected a folder name"):
        check_patient_id(patient, "here")
    if isinstance(patient, str):
        assert is_plain_name(safe_name(patient))


@pytest.mark.parametrize("patient", ["p0", "LIDC-IDRI-0001", "1.3.6.1.4.1", "_x", "Patient 7", "a" * 200, "console"])
def test_ordinary_ids_are_taken(patient):
    assert check_patient_id(patient, "here") == patient


def test_names_that_differ_only_at_their_far_end_stay_apart():
    long = [safe_name("a" * 250 + end) for end in "xy"]
    assert long[0] != long[1]
    assert all(len(name) == 200 for name in long)


def test_odd_file_names_become_plain_ids_whose_files_can_be_written(tmp_path):
    names = ["line\nbreak", "con", "\u0440\u0440", "<b>x<b>", "b" * 240, "- rf", "x..", "a;rm"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.nii.gz").write_bytes(b"")
    ids = [source.patient_id for source in find_cts(tmp_path / "in")]
    assert len(set(ids)) == len(names)
    for patient in ids:
        check_patient_id(patient, "id")
        for name in (*patient_files(patient), RECORD):
            with atomic_path(tmp_path / "out" / patient / name) as temporary:
                temporary.write_bytes(b"x")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("made") / "data", patients=3, cube_size=16, xray_size=32)


@pytest.fixture
def root(made, tmp_path):
    import shutil

    return Path(shutil.copytree(made, tmp_path / "data"))


def edited(root, change):
    data = json.loads((root / "dataset.json").read_text())
    change(data)
    (root / "dataset.json").write_text(json.dumps(data))
    return root


@pytest.mark.parametrize("patient", ["../p0", "/etc", "a\\b", "p0\0", "\u04400"])
def test_manifest_ids_and_split_ids_that_leave_their_folder_are_refused(root, patient):
    with pytest.raises(InputError, match="patient id"):
        check_split({"train": [patient], "val": [], "test": []}, [patient], "split.json")
    edited(root, lambda data: data["patients"].update({patient: data["patients"].pop("p0")}))
    with pytest.raises(InputError, match=r"dataset\.json: patients: patient id"):
        Manifest(root, find_patients(root))


@pytest.mark.parametrize("name", ["../p1/p1.nii.gz", "/etc/passwd", "..", "a\\b.png", "C:x"])
def test_manifest_files_that_leave_their_folder_are_refused(root, name):
    edited(root, lambda data: data["patients"]["p0"]["files"].update({name: "00"}))
    with pytest.raises(InputError, match=r"dataset\.json: patients: p0 names the file .* leaves its folder"):
        Manifest(root, find_patients(root))


@pytest.mark.parametrize("what", ["p0", "p0/p0.nii.gz", "p0/p0_pa_drr.png", "p0/p0_lat_film.png"])
def test_links_that_leave_a_data_set_are_refused_links_inside_and_a_linked_root_are_not(root, tmp_path, what):
    (root.parent / "link").symlink_to(root)
    assert len(PatientDataset(root.parent / "link", "all", 16, None)) == 3
    inside, outside = root / ".kept", tmp_path / "elsewhere"
    if not (root / what).exists():
        shutil.copy(root / "p0" / "p0_lat_drr.png", root / what)
    (root / what).rename(inside)
    (root / what).symlink_to(inside)
    assert len(PatientDataset(root, "all", 16, None)) == 3
    inside.rename(outside)
    (root / what).unlink()
    (root / what).symlink_to(outside)
    with pytest.raises(InputError, match="is a link that leaves the data set"):
        PatientDataset(root, "all", 16, None)


def test_preparation_never_writes_through_a_link_and_reads_no_foreign_file(tmp_path):
    save_nifti(tmp_path / "in" / "a.nii.gz", thorax())
    (source,) = find_cts(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        prepare_data.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--workers", "1"])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    secret = tmp_path / "secret"
    secret.write_text("x")
    entry = {"files": {"../../secret": sha256(secret)}}
    record = {"complete": True, "signature": signature_of(source), "patient": entry}
    write_json(tmp_path / "b" / RECORD, record)
    assert finished_entry(source, tmp_path / "b") is None
