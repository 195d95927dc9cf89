"""Nothing runs from a file, leaves its folder, takes memory on a header's word, or carries a patient's name along."""

from __future__ import annotations

import ast
import gzip
import json
import pickle
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import prepare_data
from dataset import PatientDataset
from tests.helpers.ct_cases import grid_affine, save_nifti, thorax
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import make_dataset, make_hu
from xray2ct.checkpoints import load_checkpoint
from xray2ct.conventions import RECORD
from xray2ct.data.manifest import Manifest, find_patients
from xray2ct.data.prepare import finished_entry, patient_files, signature_of
from xray2ct.data.splits import check_split
from xray2ct.files import InputError, atomic_path, check_patient_id, is_plain_name, safe_name, sha256, write_json
from xray2ct.imaging.cube_files import read_array_cube
from xray2ct.imaging.find_cts import find_cts
from xray2ct.imaging.read_ct import read_ct
from xray2ct.imaging.read_xray import read_xray, write_png16

MODULES = sorted(p for p in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(p.relative_to(ROOT).parts))


# ------------------------------------------------------------------------------------------------
# No code from files


def called(node) -> str:
    """Dotted name of what a call calls, as far as it is written out."""
    parts, target = [], node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join([target.id if isinstance(target, ast.Name) else "", *reversed(parts)])


def calls_that_trust_a_file(source: str) -> list[str]:
    """What in a module could run code, or write anywhere, at the word of a file."""
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle", "numpy"):
            found += [
                f"from {node.module} import {a.name}" for a in node.names if a.name in ("load", "loads", "Unpickler")
            ]
        if not isinstance(node, ast.Call):
            continue
        name, options = called(node), {k.arg: k.value for k in node.keywords}
        constants = {k: v.value for k, v in options.items() if isinstance(v, ast.Constant)}
        if name == "torch.load" and constants.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and (
            "allow_pickle" in options and constants.get("allow_pickle") is not False
        ):
            found.append("np.load with allow_pickle")
        if name in (
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "os.system",
            "shutil.unpack_archive",
        ):
            found.append(name)
        if name.split(".")[-1] in ("extract", "extractall") or name in ("tarfile.open", "yaml.load", "joblib.load"):
            found.append(name)
        if constants.get("shell") is True or constants.get("weights_only") is False:
            found.append(f"{name} with shell=True or weights_only=False")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "pickle.load(stream)",
        "archive.extractall(folder)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert calls_that_trust_a_file(source)


def test_no_module_trusts_a_file_and_none_unpacks_archives():
    assert len(MODULES) > 30
    found = {str(p.relative_to(ROOT)): calls_that_trust_a_file(p.read_text(encoding="utf-8")) for p in MODULES}
    assert {name: calls for name, calls in found.items() if calls} == {}


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def crafted(tmp_path, how):
    path, payload = tmp_path / "crafted.npy", np.array([Payload(tmp_path / "ran")], dtype=object)
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload[0], 2))
    elif how == "array":
        np.save(path, payload, allow_pickle=True)
    else:
        with open(path, "wb") as stream:
            np.savez(stream, payload)
    return path


@pytest.mark.parametrize("how", ["pickle", "array", "archive"])
@pytest.mark.parametrize("read", [read_xray, read_array_cube])
def test_a_pickle_in_an_array_is_refused_in_a_sentence(tmp_path, how, read):
    path = crafted(tmp_path, how)
    with pytest.raises(InputError, match=r"crafted\.npy: not a readable \.npy array \(.+\)"):
        read(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["pickle", "array", "archive"])
def test_a_crafted_checkpoint_is_refused_in_a_sentence(tmp_path, how):
    with pytest.raises(InputError, match=r"crafted\.npy: .{20,}"):
        load_checkpoint(crafted(tmp_path, how))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------
# Paths and ids


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


@pytest.mark.parametrize("what", ["p0", "p0/p0.nii.gz", "p0/p0_pa_drr.png"])
def test_links_that_leave_a_data_set_are_refused_links_inside_and_a_linked_root_are_not(root, tmp_path, what):
    (root.parent / "link").symlink_to(root)
    assert len(PatientDataset(root.parent / "link", "all", 16, None)) == 3
    inside, outside = root / ".kept", tmp_path / "elsewhere"
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


MHD = """ObjectType = Image
NDims = 3
DimSize = 8 8 8
ElementSpacing = 5 5 5
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementType = MET_SHORT
ElementDataFile = {}
"""
NRRD = """NRRD0004
type: short
dimension: 3
space: left-posterior-superior
sizes: 8 8 8
space directions: (5,0,0) (0,5,0) (0,0,5)
space origin: (0,0,0)
encoding: raw
endian: little
data file: {}

"""


@pytest.mark.parametrize(("suffix", "text"), [("mhd", MHD), ("nrrd", NRRD)])
def test_headers_that_name_data_in_another_folder_are_refused(tmp_path, suffix, text):
    pytest.importorskip("SimpleITK")
    folder = tmp_path / "in"
    folder.mkdir()
    data = np.repeat(np.int16([-1000, 40]), 256).tobytes()
    for place in (tmp_path / "secret.raw", folder / "good.raw"):
        place.write_bytes(data)
    (folder / "link.raw").symlink_to(tmp_path / "secret.raw")
    path = folder / f"ct.{suffix}"
    for name in (
        "../secret.raw",
        str(tmp_path / "secret.raw"),
        "link.raw",
        "x/../../secret.raw",
        "LIST\n../secret.raw",
    ):
        path.write_text(text.format(name))
        with pytest.raises(InputError, match="in another folder; expected them beside it"):
            read_ct(path)
    path.write_text(text.format("good.raw"))
    assert read_ct(path).data.shape == (8, 8, 8)


# ------------------------------------------------------------------------------------------------
# Memory on a header's word


def png_of(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def nifti_of(shape, kind=np.float64):
    header = nib.Nifti1Header()
    header.set_data_dtype(kind)
    header["dim"][:4] = 3, *shape
    header["bitpix"], header["vox_offset"], header["magic"] = 8 * np.dtype(kind).itemsize, 352, b"n+1"
    header["pixdim"][1:4], header["sform_code"] = 1, 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        header[name] = np.eye(4)[row]
    return header.binaryblock + bytes(4)


BOMBS = {
    "huge.png": lambda: png_of(60_000, 60_000),
    "wide.png": lambda: png_of(33, 9000),  # padded to a square it would be large
    "huge.npy": lambda: npy_claiming("(1000000, 1000000)"),
    "huge.nii": lambda: nifti_of((30_000,) * 3) + bytes(9999),
    "huge.nii.gz": lambda: gzip.compress(nifti_of((30_000,) * 3) + bytes(9999)),
    "much.nii.gz": lambda: gzip.compress(nifti_of((1000, 1000, 500)) + bytes(9999)),
    "long.nii.gz": lambda: gzip.compress(nifti_of((8, 8, 8), np.int16) + bytes(60_000_000), 1),
    "huge.mha": lambda: MHD.replace("8 8 8", "90000 90000 90000").format("LOCAL").encode() + bytes(999),
    "much.mha": lambda: MHD.replace("8 8 8", "1000 1000 1000").format("LOCAL").encode() + bytes(999),
}


def npy_claiming(shape) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(999)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_memory_is_taken(tmp_path, name):
    if name.endswith("mha"):
        pytest.importorskip("SimpleITK")
    path = tmp_path / name
    path.write_bytes(BOMBS[name]())
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=name):
            (read_xray if name.endswith(("png", "npy")) else read_ct)(path)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_a_scan_of_impossible_volume_is_refused_before_it_is_resampled(tmp_path):
    hu = np.where(np.arange(140**3) % 2, -1000, 40).astype(np.int16).reshape((140,) * 3)
    nib.save(nib.Nifti1Image(hu, np.diag([20.0, 20, 20, 1])), tmp_path / "wide.nii")
    with pytest.raises(InputError, match=r"wide\.nii: .* litres"):
        read_ct(tmp_path / "wide.nii")


# ------------------------------------------------------------------------------------------------
# Names of persons

MARKER, BIRTH = "QzMarkerXj", "19020304"
PERSONAL = {
    "PatientName": f"{MARKER}^Name",
    "PatientID": MARKER,
    "OtherPatientNames": MARKER,
    "PatientBirthDate": BIRTH,
    "PatientAddress": MARKER,
    "PatientMotherBirthName": MARKER,
    "PatientTelephoneNumbers": MARKER,
    "PatientComments": MARKER,
    "Occupation": MARKER,
    "EthnicGroup": MARKER,
    "AccessionNumber": MARKER,
    "InstitutionName": MARKER,
    "InstitutionAddress": MARKER,
    "InstitutionalDepartmentName": MARKER,
    "StationName": MARKER,
    "ReferringPhysicianName": MARKER,
    "PhysiciansOfRecord": MARKER,
    "PerformingPhysicianName": MARKER,
    "OperatorsName": MARKER,
    "RequestingPhysician": MARKER,
    "StudyID": MARKER,
    "StudyDescription": MARKER,
    "SeriesDescription": MARKER,
    "ProtocolName": MARKER,
    "ImageComments": MARKER,
    "DeviceSerialNumber": MARKER,
}


def dicom(path, pixels, sop_class, **tags):
    """One DICOM file whose every personal tag holds the marker."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.UID(sop_class)
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = pydicom.dataset.FileDataset(str(path), {}, b"\0" * 128, meta, is_implicit_VR=False)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = 16
    data.PixelData = pixels.astype("<i2" if pixels.min() < 0 else "<u2").tobytes()
    for name, value in {**PERSONAL, **tags}.items():
        setattr(data, name, value)
    data.private_block(0x0019, MARKER, create=True).add_new(1, "LO", MARKER)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path)
    assert MARKER.encode() in path.read_bytes()


def write_series(folder, ct, **tags):
    """A CT series of the volume's axial slices, in DICOM's axes (LPS)."""
    for k in range(ct.data.shape[2]):
        pixels = ct.data[::-1, ::-1, k].T  # columns to the left, rows to the back
        corner = ct.affine @ [ct.data.shape[0] - 1, ct.data.shape[1] - 1, k, 1]
        dicom(
            folder / f"im{k:02d}.dcm",
            pixels,
            "1.2.840.10008.5.1.4.1.1.2",
            **{
                "Modality": "CT",
                "SeriesInstanceUID": "1.2.3.4",
                "StudyInstanceUID": "1.2.3",
                "InstanceNumber": k,
                "BitsStored": 16,
                "HighBit": 15,
                "PixelRepresentation": 1,
                "RescaleSlope": "1",
                "RescaleIntercept": "0",
                "PixelSpacing": ["8", "8"],
                "ImagePositionPatient": [str(-corner[0]), str(-corner[1]), str(corner[2])],
                "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
                **tags,
            },
        )


def everything_below(folder) -> dict[str, bytes]:
    """Content of each file, unpacked; names too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            raw = path.read_bytes()
            found[str(path.relative_to(folder))] = gzip.decompress(raw) if path.name.endswith(".gz") else raw
    return found


def test_no_name_of_a_dicom_or_nifti_header_reaches_any_output(tmp_path, capfd):
    pytest.importorskip("SimpleITK")
    ct = thorax((40, 40, 20), grid_affine((40, 40, 20), 8.0))
    write_series(tmp_path / "in" / "case7", ct)
    write_series(tmp_path / "in" / "broken", ct, PixelSpacing=["0", "0"], SeriesInstanceUID="1.2.3.5")
    write_series(tmp_path / "in" / "other", ct, Modality="MR", SeriesInstanceUID="1.2.3.6")
    image = nib.Nifti1Image(ct.data, ct.affine)
    for key in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[key] = MARKER
    nib.save(image, tmp_path / "in" / "case8.nii.gz")
    words = ["--size", "32", "--xray-size", "32", "--workers", "1"]
    code = prepare_data.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *words])
    printed = capfd.readouterr()
    assert code == 1
    assert "broken" in printed.out
    files = everything_below(tmp_path / "out")
    assert {"case7/case7.nii.gz", "case8/case8_pa_drr.png", "dataset.json"} <= set(files)
    for name, content in {**files, "printed": (printed.out + printed.err).encode()}.items():
        assert MARKER.encode() not in content, name
        assert BIRTH.encode() not in content, name
    volumes = [nib.load(tmp_path / "out" / p / f"{p}.nii.gz") for p in ("case7", "case8")]
    assert np.abs(volumes[0].get_fdata() - volumes[1].get_fdata()).max() <= 1  # the names are gone, the CT is not
    for volume in volumes:
        assert all(not volume.header[key].item() for key in ("db_name", "aux_file", "intent_name", "descrip"))
    with Image.open(tmp_path / "out" / "case7" / "case7_pa_drr.png") as picture:
        picture.load()
        assert picture.text == {}


def test_no_name_of_a_dicom_xray_reaches_any_output(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr("xray2ct.data.manifest.CUBE_SIZE", 32)  # quick
    folder = tmp_path / "data" / "p7"
    hu = make_hu(0, 32)
    folder.mkdir(parents=True)
    np.save(folder / "p7.npy", hu)
    for view, axis in (("pa", 1), ("lat", 2)):
        pixels = np.clip(hu + 1000.0, 0, None).mean(axis=axis) * 2
        dicom(
            folder / f"p7_{view}.dcm",
            np.rint(pixels),
            "1.2.840.10008.5.1.4.1.1.1",
            BitsStored=12,
            HighBit=11,
            PixelRepresentation=0,
        )
    raw = (folder / "p7_pa.dcm").read_bytes()  # a wrong UID, which pydicom quotes in a warning and in its log
    (folder / "p7_pa.dcm").write_bytes(raw.replace(b"1.2.840.10", MARKER.encode(), 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = PatientDataset(tmp_path / "data", "all", 16, 32, cache_dir=tmp_path / "cache")
        item = data[0]
        notes = read_xray(folder / "p7_pa.dcm", "percentile", size=64).notes
    write_png16(tmp_path / "cache" / "again.png", item["xrays"][0].numpy())
    said = [str(warning.message) for warning in caught] + notes
    broken = folder / "p7_pa.dcm"
    broken.write_bytes(broken.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"p7_pa\.dcm") as error:
        read_xray(broken)
    printed = capfd.readouterr()
    texts = {
        **everything_below(tmp_path / "cache"),
        "said": " ".join([*said, str(error.value), *printed, caplog.text]).encode(),
    }
    assert len(texts) >= 5
    for name, content in texts.items():
        assert MARKER.encode() not in content, name
        assert BIRTH.encode() not in content, name
