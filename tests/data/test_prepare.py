"""From a folder of CTs to a data set: contents, restarts, broken files, foreign files, wrong options."""

import hashlib
import json
import os

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from prepare_data import main, parse_args, settings_of
from tests.helpers.ct_cases import dying_worker, grid_affine, save_nifti, thorax
from xray2ct.data import prepare, prepare_folder
from xray2ct.data.prepare import prepare_patient
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, hu_to_unit, render_xrays
from xray2ct.imaging.find_cts import find_cts

FILES = ("{}.nii.gz", "{}_mask.nii.gz", "{}_pa_drr.png", "{}_lat_drr.png", "prepared.json")


@pytest.fixture
def cts(tmp_path):
    """Three CTs: a, b (in a sub-folder) and c (a short scan)."""
    save_nifti(tmp_path / "cts" / "a.nii.gz", thorax())
    save_nifti(tmp_path / "cts" / "sub" / "b.nii.gz", thorax(centre=(20, 10)))
    save_nifti(tmp_path / "cts" / "c.nii.gz", thorax((40, 40, 20), grid_affine((40, 40, 20), 8.0, (0, 0, 500))))
    return tmp_path / "cts"


def run(cts, *more, output="out", workers=1, size=32):
    output = cts.parent / output
    small = ["--size", str(size), "--xray-size", "48", "--workers", str(workers)]
    return main(["--input", str(cts), "--output", str(output), *small, *more]), output


def state(output, *patients):
    """Modification times of all files of some patients."""
    return {(p, f): (output / p / f.format(p)).stat().st_mtime_ns for p in patients for f in FILES}


def manifest_of(output):
    return json.loads((output / "dataset.json").read_text())


def break_file(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# ------------------------------------------------------------------------------------------------
# What is written


def test_a_folder_becomes_a_data_set(cts):
    status, output = run(cts)
    assert status == 0
    manifest = manifest_of(output)
    assert manifest["format_version"] == 1
    assert Geometry.from_dict(manifest["geometry"]) == Geometry()
    assert (manifest["hu_window"], manifest["xray_scale"]) == ([-1024, 1476], 10.0)
    assert (manifest["cube_size"], manifest["xray_size"], manifest["couch_removed"]) == (32, 48, False)
    assert (
        sorted(p for part in manifest["split"].values() for p in part)
        == sorted(manifest["patients"])
        == ["a", "b", "c"]
    )
    assert manifest["split_method"] == "hash"
    assert [manifest["patients"][p]["source"] for p in "abc"] == ["a.nii.gz", "sub/b.nii.gz", "c.nii.gz"]
    assert manifest["patients"]["c"]["centre_mm"][2] == pytest.approx(500, abs=0.01)
    assert manifest["patients"]["a"]["scan_fraction"] == pytest.approx((320 / 360) ** 3, abs=0.08)
    for patient, entry in manifest["patients"].items():
        assert sorted(path.name for path in (output / patient).iterdir()) == sorted(f.format(patient) for f in FILES)
        assert sorted(entry["files"]) == sorted(f.format(patient) for f in FILES[:4])
        for name, checksum in entry["files"].items():
            assert hashlib.sha256((output / patient / name).read_bytes()).hexdigest() == checksum


def test_the_xrays_are_those_of_the_cube(cts):
    _, output = run(cts, "--geometry", "parallel", "--fov-mm", "300")
    geometry = Geometry.from_dict(manifest_of(output)["geometry"])
    assert geometry == Geometry("parallel", 300.0)
    image = nib.load(output / "b" / "b.nii.gz")
    assert np.diag(image.affine)[:3] == pytest.approx([-300 / 32] * 3)
    cube = torch.from_numpy(np.asarray(image.dataobj).transpose(2, 1, 0).astype(np.float32).copy())
    expected = render_xrays(hu_to_unit(cube)[None, None], geometry, (48, 48))[0].numpy()
    for view, name in enumerate(("b_pa_drr.png", "b_lat_drr.png")):
        with Image.open(output / "b" / name) as picture:
            assert picture.mode.startswith("I;16")
            assert np.abs(np.asarray(picture) / 65535 - expected[view]).max() < 1e-5
        assert 0.3 < expected[view].max() < 1


def test_threads_do_not_change_the_bytes_and_are_as_before_afterwards(cts):
    before, checksums = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            _, output = run(cts, "--remove-couch", output=f"threads{threads}", size=64)
            assert torch.get_num_threads() == threads
            checksums.append(manifest_of(output)["patients"])
    finally:
        torch.set_num_threads(before)
    assert checksums[0] == checksums[1] == checksums[2]


def test_each_patient_is_prepared_on_one_thread(cts):
    seen = []

    class Settings(dict):
        def __getitem__(self, key):
            seen.append((key, torch.get_num_threads()))
            return super().__getitem__(key)

    settings = Settings(settings_of(parse_args(["--input", str(cts), "--output", "out", "--size", "32"])))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        prepare_patient(find_cts(cts)[0], cts.parent / "out" / "a", settings)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert ("xray_scale", 1) in seen  # as the X-rays are rendered
    assert {threads for _, threads in seen} == {1}


def test_several_workers_write_the_same_bytes_and_survive_one_that_dies(cts, monkeypatch, capsys):
    _, alone = run(cts, output="alone")
    save_nifti(cts / "killer.nii.gz", thorax())
    monkeypatch.setattr(prepare_folder, "try_patient", dying_worker)
    status, together = run(cts, output="together", workers=2)
    assert status == 1
    assert "killer: " in capsys.readouterr().out.split("could not be prepared:")[1]
    assert manifest_of(together)["patients"] == manifest_of(alone)["patients"]


def test_the_couch_goes_on_request_only(cts):
    def slab(x, y, z):
        return np.where((y < -105) & (y > -125), 300.0, np.nan)

    save_nifti(cts / "a.nii.gz", thorax(extra=slab))
    (_, kept), (_, removed) = run(cts, output="kept"), run(cts, "--remove-couch", output="removed")
    assert manifest_of(removed)["couch_removed"] is True
    below = [np.asarray(nib.load(root / "a" / "a.nii.gz").dataobj)[:, 26:] for root in (kept, removed)]
    assert below[0].max() > 0
    assert below[1].max() < -900


def test_xrays_that_leave_their_range_are_clipped_and_reported(cts, capsys):
    save_nifti(cts / "a.nii.gz", thorax(extra=lambda x, y, z: np.where(np.abs(y) < 80, 1400.0, np.nan)))
    _, output = run(cts, "--fov-mm", "240")
    assert "note: a: lateral X-ray" in capsys.readouterr().out
    with Image.open(output / "a" / "a_lat_drr.png") as picture:
        assert np.asarray(picture).max() == 65535


# ------------------------------------------------------------------------------------------------
# Restarting


def test_the_same_command_again_touches_nothing(cts, capsys):
    _, output = run(cts)
    before, manifest = state(output, "a", "b", "c"), (output / "dataset.json").read_text()
    assert run(cts)[0] == 0
    assert state(output, "a", "b", "c") == before
    assert (output / "dataset.json").read_text() == manifest
    assert "3 of 3 CTs are done already" in capsys.readouterr().out


def test_what_is_damaged_missing_or_changed_is_done_again(cts):
    _, output = run(cts)
    checksums = manifest_of(output)["patients"]["a"]["files"]
    before = state(output, "a", "b", "c")
    break_file(output / "a" / "a.nii.gz")
    (output / "b" / "b_pa_drr.png").unlink()
    assert run(cts)[0] == 0
    after = state(output, "a", "b", "c")
    assert {p for (p, f) in before if before[p, f] != after[p, f]} == {"a", "b"}
    assert manifest_of(output)["patients"]["a"]["files"] == checksums
    save_nifti(cts / "a.nii.gz", thorax(centre=(-10, 0)))
    run(cts)
    assert manifest_of(output)["patients"]["a"]["files"] != checksums
    assert state(output, "b", "c") == {key: time for key, time in after.items() if key[0] != "a"}


def test_every_file_of_a_ct_decides_whether_it_is_done(cts, capsys):
    sitk = pytest.importorskip("SimpleITK")
    pytest.importorskip("pydicom")
    from tests.helpers.dicom_cases import lps_ct, write_slices

    ct = lps_ct((24, 20, 16))
    for path in cts.rglob("*.nii.gz"):
        path.unlink()
    image = sitk.GetImageFromArray(np.ascontiguousarray(ct.data.T))
    image.SetSpacing((12.0, 14.0, 15.0))
    for name in ("m.mhd", "n.nhdr"):
        sitk.WriteImage(image, str(cts / name))
    write_slices(cts / "d", ct)

    def redone():
        capsys.readouterr()
        assert run(cts)[0] == 0
        printed = capsys.readouterr().out
        return (
            3 - int(printed.split(" of 3 CTs are done already")[0].rsplit("\n", 1)[-1]) if "already" in printed else 3
        )

    assert redone() == 3
    assert redone() == 0
    for name in ("m.raw", "n.raw"):
        times = (cts / name).stat()
        raw = np.fromfile(cts / name, "<i2")
        raw[raw == 50] = -900
        raw.tofile(cts / name)
        os.utime(cts / name, ns=(times.st_atime_ns, times.st_mtime_ns))  # equal size and time
    assert redone() == 2
    (cts / "d" / "im000.dcm").unlink()
    assert redone() == 1
    write_slices(cts / "d", ct, only=[0])
    assert redone() == 1
    for path in cts.rglob("*.*"):
        os.utime(path)  # as after copying: other times, same content
    assert redone() == 0


def test_what_is_left_out_is_named_and_the_status_tells(cts, capsys):
    (cts / "sub" / "scan.mgz").write_bytes(b"x")
    (cts / "link").symlink_to(cts.parent / "out")
    save_nifti(cts.parent / "elsewhere" / "x.nii.gz", thorax())
    (cts / "more").symlink_to(cts.parent / "elsewhere")
    (cts.parent / "out").mkdir()
    status, output = run(cts)
    assert status == 1
    assert sorted(manifest_of(output)["patients"]) == ["a", "b", "c", "x"]
    assert manifest_of(output)["patients"]["x"]["source"] == "more/x.nii.gz"
    printed = capsys.readouterr().out
    assert printed.count("scan.mgz: may hold a CT") == 2  # at once, and at the end
    assert "1 files or folders were left out" in printed
    with pytest.raises(InputError, match=r"link/a/a.*\.nii\.gz: lies in --output"):
        run(cts)


def test_nothing_but_files_that_are_not_read(tmp_path, capsys):
    (tmp_path / "cts").mkdir()
    (tmp_path / "cts" / "a.img").write_bytes(b"x")
    status, output = run(tmp_path / "cts")
    assert status == 1
    assert "a.img: half of a pair" in capsys.readouterr().out
    assert list(output.iterdir()) == []


def test_a_killed_run_goes_on_where_it_stopped(cts, monkeypatch):
    written, write = [], prepare.write_png16

    def killed_at_the_third_xray(path, image):
        if len(written) == 3:
            (path.parent / f".{path.name}.x1.tmp.png").write_bytes(b"half")  # what a SIGKILL leaves behind
            raise KeyboardInterrupt
        written.append(path)
        write(path, image)

    monkeypatch.setattr(prepare, "write_png16", killed_at_the_third_xray)
    with pytest.raises(KeyboardInterrupt):
        run(cts)
    output = cts.parent / "out"
    assert not (output / "dataset.json").exists()
    assert (output / "b" / "b.nii.gz").exists()
    assert not (output / "b" / "b_lat_drr.png").exists()
    before = state(output, "a")
    monkeypatch.undo()
    assert run(cts)[0] == 0
    assert state(output, "a") == before
    assert sorted(path.name for path in (output / "b").iterdir()) == sorted(f.format("b") for f in FILES)
    _, fresh = run(cts, output="fresh")
    assert manifest_of(output) == manifest_of(fresh)


def test_other_settings_are_refused_unless_overwriting(cts):
    _, output = run(cts)
    before = state(output, "a", "b", "c")
    with pytest.raises(InputError, match=r"dataset\.json: .*geometry .*; cube_size \(32 there, 48 now\).*--overwrite"):
        run(cts, "--geometry", "parallel", size=48)
    (output / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"prepared\.json: .*couch_removed \(False there, True now\)"):
        run(cts, "--remove-couch")
    assert state(output, "a", "b", "c") == before
    assert run(cts, "--overwrite", size=48)[0] == 0
    assert manifest_of(output)["cube_size"] == 48
    assert nib.load(output / "a" / "a.nii.gz").shape == (48, 48, 48)


def test_patients_that_left_or_changed_sides_are_reported(cts, capsys):
    split = {"train": ["a", "b"], "val": [], "test": ["c"]}
    (cts.parent / "split.json").write_text(json.dumps(split))
    _, output = run(cts, "--split", str(cts.parent / "split.json"))
    (cts / "c.nii.gz").unlink()
    (cts.parent / "split.json").write_text(json.dumps({"train": ["b"], "val": ["a"], "test": []}))
    assert run(cts, "--split", str(cts.parent / "split.json"))[0] == 0
    printed = capsys.readouterr().out
    assert "now in val, before elsewhere (old checkpoints know them): a" in printed
    assert "no longer in the data set (their folders stay): c" in printed
    assert sorted(manifest_of(output)["patients"]) == ["a", "b"]
    assert (output / "c" / "c.nii.gz").exists()


# ------------------------------------------------------------------------------------------------
# Broken CTs, foreign files, wrong options


def test_a_broken_ct_is_named_at_the_end_and_the_others_are_done(cts, capsys):
    split = {"train": ["a"], "val": ["b"], "test": ["c"]}
    (cts.parent / "split.json").write_text(json.dumps(split))
    break_file(cts / "a.nii.gz")
    status, output = run(cts, "--split", str(cts.parent / "split.json"))
    assert status == 1
    last = capsys.readouterr().out.split("1 of 3 CTs could not be prepared:")[1]
    assert "a.nii.gz: truncated or damaged gzip" in last
    assert sorted(manifest_of(output)["patients"]) == ["b", "c"]
    assert manifest_of(output)["split"] == {"train": [], "val": ["b"], "test": ["c"]}
    assert manifest_of(output)["split_method"] == "file"
    assert not (output / "a").exists()
    save_nifti(cts / "a.nii.gz", thorax())
    assert run(cts, "--split", str(cts.parent / "split.json"))[0] == 0
    assert manifest_of(output)["split"] == split


def test_nothing_but_broken_cts_leaves_no_manifest(cts, capsys):
    for path in cts.rglob("*.nii.gz"):
        break_file(path)
    status, output = run(cts)
    assert status == 1
    assert "3 of 3 CTs could not be prepared" in capsys.readouterr().out
    assert not (output / "dataset.json").exists()


def test_a_full_disk_leaves_what_was_there(cts, monkeypatch, capsys):
    _, output = run(cts)
    cube = (output / "a" / "a.nii.gz").read_bytes()
    save_nifti(cts / "a.nii.gz", thorax(centre=(-10, 0)))

    def full(path, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_cube", full)
    assert run(cts)[0] == 1
    assert "a.nii.gz: [Errno 28] No space left" in capsys.readouterr().out
    assert (output / "a" / "a.nii.gz").read_bytes() == cube
    monkeypatch.undo()
    assert run(cts)[0] == 0
    assert (output / "a" / "a.nii.gz").read_bytes() != cube


def test_files_of_others_are_never_overwritten(cts):
    theirs = cts.parent / "out" / "b" / "b.nii.gz"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    for more in ([], ["--overwrite"]):
        with pytest.raises(InputError, match=r"out.b: holds files that this command did not write"):
            run(cts, *more)
    assert theirs.read_bytes() == b"precious"
    assert not (cts.parent / "out" / "a").exists()
    (cts.parent / "out2").mkdir()
    (cts.parent / "out2" / "dataset.json").write_text('{"name": "something else"}')
    with pytest.raises(InputError, match=r"dataset\.json: not a manifest of format version 1"):
        run(cts, "--overwrite", output="out2")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--input", "{}/nowhere"], "--input .*nowhere: no such folder"),
        (["--input", "{}/empty"], "empty: no CT found"),
        (["--output", "{}/cts/prepared"], "--output .* lies inside --input"),
        (["--output", "{}/cts"], "--output .* lies inside --input"),
        (["--output", "{}/cts/a.nii.gz"], "(lies inside|is a file)"),
        (["--output", "{}/split.json"], "split.json is a file"),
        (["--size", "8"], "--size is 8; expected at least 16"),
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--fov-mm", "0"], r"geometry\.fov_mm is 0"),
        (["--sid-mm", "100"], r"geometry\.sid_mm is 100"),
        (["--geometry", "parallel", "--sdd-mm", "1800"], "belong to --geometry cone or scout"),
        (["--test-fraction", "1.5"], "--test-fraction is 1.5"),
        (["--test-fraction", "0.5", "--val-fraction", "0.5"], "nothing to train on"),
        (["--split", "{}/split.json"], r"split\.json: listed but not found: z; found but not listed: c"),
        (["--split", "{}/missing.json"], r"missing\.json: no such file"),
    ],
)
def test_wrong_options_are_named_before_any_work(cts, more, words):
    (cts.parent / "empty").mkdir()
    (cts.parent / "split.json").write_text('{"train": ["a", "z"], "val": ["b"], "test": []}')
    before = sorted(cts.parent.rglob("*"))
    with pytest.raises(InputError, match=words):
        run(cts, *[text.format(cts.parent) for text in more])
    assert sorted(cts.parent.rglob("*")) == before
