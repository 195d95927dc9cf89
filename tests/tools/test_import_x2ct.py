"""X2CT-GAN's HDF5 files and the folder layouts that docs/datasets.md names, with tiny files of those layouts."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter

import nibabel as nib
import numpy as np
import pytest

import prepare_data
from tests.helpers.ct_cases import grid_affine, save_nifti, thorax
from tests.helpers.doc_commands import python_blocks
from tests.helpers.tiny_data import make_hu
from tools import import_x2ct
from tools.import_x2ct import axes_by_anatomy, check_axes, make_split, read_ct_cube, read_list
from xray2ct.data.checks.dataset_check import check_dataset
from xray2ct.data.checks.findings import FAILED, OK, SIDES
from xray2ct.data.splits import split_by_hash
from xray2ct.files import InputError, read_json
from xray2ct.imaging.find_cts import find_cts
from xray2ct.imaging.read_ct import CtImage, read_ct

h5py = pytest.importorskip("h5py")

SIZE, EDGE = 64, 320.0
SCANS = ("LIDC-IDRI-0001.20000101.3000566.1", "LIDC-IDRI-0002.20000101.3000522.1", "LIDC-IDRI-0003.20000101.3000611.1")
TINY = ("--size", "32", "--xray-size", "32", "--workers", "1")


def write_h5(root, scan, hu, flat=False, **changes):
    """One file in X2CT-GAN's layout: uint16 HU + 1024, axes to the feet, back and left, 0 where -1024."""
    path = root / (f"{scan}_ct_xray_data.h5" if flat else f"{scan}/ct_xray_data.h5")
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "ct": (hu.astype(np.int32) + 1024).clip(0, None).astype(np.uint16),
        "xray1": np.zeros((SIZE, SIZE), np.uint8),
        "xray2": np.zeros((SIZE, SIZE), np.uint8),
        "ori_size": np.int64(320),
        "spacing": np.array([1.0, 1.0, 0.9999996]),
    }
    with h5py.File(path, "w") as file:
        for name, value in {**fields, **changes}.items():
            if value is not None:
                file[name] = value
    return path


@pytest.fixture(scope="module")
def chests():
    return [make_hu(seed, SIZE, EDGE) for seed in range(3)]


@pytest.fixture(scope="module")
def released(tmp_path_factory, chests):
    """Three scans, the third in the other of the two layouts."""
    root = tmp_path_factory.mktemp("h5") / "LIDC-HDF5-256"
    for i, scan in enumerate(SCANS):
        write_h5(root, scan, chests[i], flat=i == 2)
    return root


def lists(folder, train, test):
    for name, scans in (("train", train), ("test", test)):
        (folder / f"{name}.txt").write_text("\n".join(scans) + "\n")
    return ["--train", str(folder / "train.txt"), "--test", str(folder / "test.txt")]


def test_the_files_become_a_data_set_that_lies_the_right_way_round(tmp_path, released, chests, capsys):
    arguments = ["--input", str(released), "--output", str(tmp_path / "cts"), "--val-fraction", "0.5"]
    assert import_x2ct.main(arguments + lists(tmp_path, SCANS[:2], SCANS[2:])) == 0
    printed = capsys.readouterr().out
    assert "head-feet: 3 right, 0 wrong, 0 cannot tell; front-back: 3 right" in printed
    assert "left-right: 3 right, 0 wrong" in printed
    ct = read_ct(tmp_path / f"cts/{SCANS[0]}.nii.gz")
    assert nib.affines.voxel_sizes(ct.affine) == pytest.approx(EDGE / SIZE)
    assert "".join(nib.aff2axcodes(ct.affine)) == "LPI"
    assert np.array_equal(ct.data.transpose(2, 1, 0), chests[0])

    split = read_json(tmp_path / "cts/split.json")
    assert split["test"] == [SCANS[2]]
    assert sorted(split["train"] + split["val"]) == sorted(SCANS[:2])
    data = tmp_path / "data"
    arguments = ["--input", str(tmp_path / "cts"), "--output", str(data), "--split", str(tmp_path / "cts/split.json")]
    size = ["--size", "64", "--xray-size", "64", "--workers", "1", "--fov-mm", "320"]
    assert prepare_data.main([*arguments, *size, "--sid-mm", "541", "--sdd-mm", "949"]) == 0
    found = check_dataset(data)
    assert {f.patient: f.status for f in found if f.check == "left-right"} == dict.fromkeys(SCANS, OK)
    assert not [f for f in found if f.status == FAILED]


@pytest.mark.parametrize("axes", ["SPL", "IAL", "IPR", "SAL", "LPI", "PLS"])
def test_other_axes_are_turned_and_wrong_ones_named(tmp_path, chests, axes):
    turn = nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(c) for c in ("IPL", axes)))
    path = write_h5(tmp_path, SCANS[0], nib.orientations.apply_orientation(chests[0], turn))
    assert np.array_equal(read_ct_cube(path, axes), chests[0])
    answers = axes_by_anatomy(read_ct_cube(path), EDGE)
    assert FAILED in answers.values()
    with pytest.raises(InputError, match="is wrong by the anatomy of most CTs") as error:
        check_axes({side: Counter([answers[side]]) for side in SIDES}, "IPL")
    if axes[2] in "LR":  # mirrored only, not turned by 90 degrees
        assert f"try --axes {axes} " in str(error.value)


def test_wrong_axes_stop_the_command_before_it_writes(tmp_path, released):
    with pytest.raises(InputError, match=r"head-feet, front-back is wrong .* try --axes IPL"):
        import_x2ct.main(["--input", str(released), "--output", str(tmp_path / "cts"), "--axes", "SAL"])
    assert not (tmp_path / "cts").exists()


def test_the_leak_of_the_published_lists_is_removed_and_named(tmp_path):
    train = ["A-0442.2000.5472.1", "A-1.2000.1.1", "A-1.2000.2.1", *(f"A-{i}.2000.1.1" for i in range(2, 40))]
    test = ["A-0442.2000.5405.1", "A-50.2000.1.1", "A-51.2000.1.1"]
    there = [*train, *test[:2], "B-1.2000.1.1"]
    split, notes = make_split(there, train, test, val_fraction=0.3)
    assert split["test"] == test[:2]  # as published, as far as it is there
    patients = [{scan.split(".")[0] for scan in split[name]} for name in ("train", "val", "test")]
    assert not (patients[0] & patients[1])
    assert not (patients[0] & patients[2])
    assert not (patients[1] & patients[2])
    assert sorted(split["train"] + split["val"]) == sorted(train[1:])
    assert 4 < len(split["val"]) < 20
    text = "\n".join(notes)
    assert "A-0442 stands in both lists: left out of training (A-0442.2000.5472.1)" in text
    assert "listed but not there: 1 scans (A-51.2000.1.1)" in text
    assert "not taken: 2 scans (A-0442.2000.5472.1, B-1.2000.1.1)" in text
    assert "several scans" in text

    (tmp_path / "list.txt").write_text("\ufeffa.1\n\nb.2\r\na.1\n", encoding="utf-8")
    assert read_list(tmp_path / "list.txt") == ["a.1", "b.2"]
    same, notes = make_split(["a.1", "b.1", "c.1"], ["a.1", "b.1"], ["a.1"], val_fraction=0.0)
    assert same == {"train": ["b.1"], "val": [], "test": ["a.1"]}
    assert "a stands in both lists" in notes[0]


def test_a_stopped_import_goes_on_and_does_not_mix_settings(tmp_path, released, chests):
    output, released = tmp_path / "cts", shutil.copytree(released, tmp_path / "h5")
    arguments = ["--input", str(released), "--output", str(output)]
    assert import_x2ct.main(arguments) == 0
    stamps = {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    (output / f"{SCANS[1]}.nii.gz").unlink()
    assert import_x2ct.main(arguments) == 0
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    assert len(kept) == 3
    assert sum(kept[path] == stamps[path] for path in stamps) == 2
    write_h5(released, SCANS[0], np.roll(chests[0], 1, axis=2))  # a corrected release
    assert import_x2ct.main(arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in output.glob("*.nii.gz")}
    assert [path for path in kept if kept[path] != again[path]] == [output / f"{SCANS[0]}.nii.gz"]
    with pytest.raises(InputError, match=r"import_settings.json: CTs there were read with .*1024"):
        import_x2ct.main([*arguments, "--offset", "1000"])
    with pytest.raises(InputError, match=r"not of this command \(LIDC-IDRI-0003"):
        import_x2ct.main(arguments + lists(tmp_path, SCANS[:1], SCANS[1:2]))


def test_an_unusable_file_is_named_and_the_others_are_done(tmp_path, chests, capsys):
    write_h5(tmp_path / "h5", SCANS[0], chests[0])
    (write_h5(tmp_path / "h5", SCANS[1], chests[1])).write_bytes(b"no HDF5")
    (tmp_path / "h5" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "h5" / "deep" / "er" / "ct_xray_data.h5").write_bytes(b"elsewhere")
    assert import_x2ct.main(["--input", str(tmp_path / "h5"), "--output", str(tmp_path / "cts")]) == 1
    printed = capsys.readouterr().out
    assert f"failed: {SCANS[1]}" in printed
    assert "not a readable HDF5 file" in printed
    assert "left out: " in printed
    assert "er/ct_xray_data.h5: expected SCAN/ct_xray_data.h5" in printed
    split = read_json(tmp_path / "cts/split.json")
    assert split["train"] + split["val"] + split["test"] == [SCANS[0]]


BAD = {
    "no dataset 'ct'; found": {"ct": None},
    r"expected numbers \(N, N, N\)": {"ct": np.zeros((SIZE, SIZE, SIZE - 1), np.uint16)},
    "NaN or infinity": {"ct": np.full((SIZE,) * 3, np.nan, np.float32)},
    "with air and soft tissue": {"ct": np.zeros((SIZE,) * 3, np.uint16)},
    r"ori_size x spacing is 256 x 256 x 256 mm; expected 320": {"ori_size": np.int64(256), "spacing": np.ones(3)},
}


@pytest.mark.parametrize("message", BAD)
def test_what_the_file_cannot_mean_is_refused(tmp_path, chests, message):
    with pytest.raises(InputError, match=rf"ct_xray_data\.h5: .*{message}"):
        read_ct_cube(write_h5(tmp_path, SCANS[0], chests[0], **BAD[message]))


def test_hu_without_offset_and_links_to_other_files_are_refused(tmp_path, chests):
    path = write_h5(tmp_path, SCANS[0], chests[0], ct=chests[0])
    with pytest.raises(InputError, match=r"HU already\? --offset 0"):
        read_ct_cube(path)
    other = write_h5(tmp_path, SCANS[1], chests[0])
    link = write_h5(tmp_path, SCANS[2], chests[0], ct=h5py.ExternalLink(other, "ct"))
    with pytest.raises(InputError, match="not a dataset of its own"):
        read_ct_cube(link)


def test_options_that_mean_nothing_are_refused(tmp_path, released, monkeypatch):
    arguments = ["--input", str(released), "--output", str(tmp_path / "cts")]
    for more, message in (
        (["--axes", "IPP"], "--axes is 'IPP'"),
        (["--axes", "ipl"], "--axes is 'ipl'"),
        (["--axes", "IPLX"], "--axes is 'IPLX'"),
        (["--train", "x"], "give both lists or none"),
        (["--val-fraction", "1"], "below 1"),
        (["--edge-mm", "0"], "--edge-mm is 0"),
        (["--train", "missing", "--test", "missing"], "missing: not a readable list"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            import_x2ct.main(arguments + more)
    with pytest.raises(InputError, match="none of its 3 scans"):
        import_x2ct.main(arguments + lists(tmp_path, ["x.1"], ["y.1"]))
    with pytest.raises(InputError, match=r"no SCAN/ct_xray_data\.h5"):
        import_x2ct.main(["--input", str(tmp_path), "--output", str(tmp_path / "cts")])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="needs h5py: pip install h5py"):
        import_x2ct.main(arguments)
    assert not (tmp_path / "cts").exists()


# ------------------------------------------------------------------------------------------------
# docs/datasets.md


@pytest.fixture(scope="module")
def page():
    (code,) = (b.code for b in python_blocks() if b.page == "docs/datasets.md" and "def patient_split" in b.code)
    names: dict = {}
    exec(code.split("\npatient_split(")[0], names)  # without its calls, whose folders are made by each test
    return names


def small_ct(seed):
    ct = thorax((20, 20, 20), grid_affine((20, 20, 20), 16.0), centre=(3 * seed, 0, 0))
    return CtImage(ct.data, ct.affine, ct.name)


def write_image(sitk, path, seed):
    """A CT by SimpleITK: MetaImage, or a DICOM series where ``path`` has no suffix."""
    ct = small_ct(seed)
    image = sitk.GetImageFromArray(np.ascontiguousarray(ct.data.T))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ct.affine
    image.SetSpacing((16.0, 16.0, 16.0))
    image.SetDirection((affine[:3, :3] / 16.0).ravel())
    image.SetOrigin(affine[:3, 3])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mhd":
        sitk.WriteImage(image, str(path))
        return
    path.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.GetDepth()):
        part, uid = image[:, :, k], f"1.2.826.0.1.3680043.2.1125.{seed + 1}"
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        tags = {"0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"{uid}.{k + 1}", "0008|0060": "CT"}
        tags |= {"0020|000e": uid, "0020|0032": "\\".join(f"{v:.6f}" for v in position)}
        tags["0020|0037"] = "\\".join(f"{v:.8f}" for v in affine[:3, :2].T.ravel() / 16.0)
        for key, value in tags.items():
            part.SetMetaData(key, value)
        writer.SetFileName(str(path / f"1-{k + 1:02d}.dcm"))
        writer.Execute(part)


def prepare(folder, tmp_path):
    arguments = ["--input", str(folder), "--output", str(tmp_path / "data"), "--split", str(tmp_path / "split.json")]
    assert prepare_data.main([*arguments, *TINY]) == 0
    return read_json(tmp_path / "data/dataset.json")["split"]


def sides(split, patient_of):
    """``{patient: names of the splits that hold one of its CTs}``."""
    found: dict = {}
    for name, scans in split.items():
        for scan in scans:
            found.setdefault(patient_of(scan), set()).add(name)
    return found


def test_lidc_folders_are_split_by_patient(tmp_path, page):
    sitk = pytest.importorskip("SimpleITK")
    patients = ["LIDC-IDRI-0132", "LIDC-IDRI-0132", "LIDC-IDRI-0442", "LIDC-IDRI-0442", "LIDC-IDRI-0001"]
    for i, patient in enumerate(patients):
        write_image(sitk, tmp_path / f"LIDC/{patient}/1.3.6.{i}/1.3.6.1.4.1.14519.{i}", i)
        (tmp_path / f"LIDC/{patient}/1.3.6.{i}/1.3.6.1.4.1.14519.{i}/069.xml").write_text("<annotation/>")
    page["patient_split"](tmp_path / "LIDC", page["lidc"], tmp_path / "split.json", val=0.3, test=0.3)
    split = prepare(tmp_path / "LIDC", tmp_path)
    found = sides(split, lambda scan: patients[int(scan.rsplit(".", 1)[1])])
    assert len(found) == 3
    assert all(len(names) == 1 for names in found.values())
    assert sum(map(len, split.values())) == 5


def test_luna16_files_are_split_by_the_patients_of_the_index(tmp_path, page):
    sitk = pytest.importorskip("SimpleITK")
    patients = {f"1.3.6.1.4.1.14519.5.2.1.{i}": f"LIDC-IDRI-{i // 2:04d}" for i in range(6)}
    for i, uid in enumerate(patients):
        write_image(sitk, tmp_path / f"LUNA16/subset{i}/{uid}.mhd", i)
    page["patient_split"](
        tmp_path / "LUNA16", lambda source: patients[source.path.stem], tmp_path / "split.json", val=0.3, test=0.3
    )
    split = prepare(tmp_path / "LUNA16", tmp_path)
    found = sides(split, patients.get)
    assert len(found) == 3
    assert all(len(names) == 1 for names in found.values())
    assert all(split.values())


def test_ct_rate_reconstructions_of_a_patient_stay_together(tmp_path, page):
    root = tmp_path / "CT-RATE/dataset"
    names = ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_11_a_1", "valid_2_a_1", "train_1_a_1"]
    for i, name in enumerate(names):
        split_name, number, scan, _ = name.split("_")
        folder = root / f"{split_name}_fixed/{split_name}_{number}/{split_name}_{number}_{scan}"
        save_nifti(folder / f"{name}.nii.gz", small_ct(i))
    assert sorted(source.patient_id for source in find_cts(root)) == sorted(names)
    page["patient_split"](root, page["ctrate"], tmp_path / "split.json", val=0.25, test=0.25)
    found = sides(prepare(root, tmp_path), lambda scan: "_".join(scan.split("_")[:2]))
    assert sorted(found) == ["train_1", "valid_1", "valid_11", "valid_2"]
    assert all(len(v) == 1 for v in found.values())

    # the first release: no rescaling and a blank header
    raw = root / "valid/valid_3/valid_3_a/valid_3_a_1.nii.gz"
    save_nifti(raw, CtImage((small_ct(0).data + 1024).astype(np.float32), np.eye(4), "raw"))
    with pytest.raises(InputError, match="all values are positive"):
        read_ct(raw)


def test_without_a_split_file_two_scans_of_a_patient_can_part(tmp_path):
    # what the page warns of: ids are CTs, so that a hash of them knows no patient
    for i in range(30):
        save_nifti(tmp_path / f"cts/P{i // 2}_{'ab'[i % 2]}.nii.gz", small_ct(0))
    ids = [source.patient_id for source in find_cts(tmp_path / "cts")]
    found = sides(split_by_hash(ids, 0.3, 0.3), lambda scan: scan.split("_")[0])
    assert any(len(names) > 1 for names in found.values())
