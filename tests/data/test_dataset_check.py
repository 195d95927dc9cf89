"""Check of a data set: a good one passes; of one that is broken in many ways, each way is named."""

import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from dataset import main
from xray2ct.data.checks import dataset_check
from xray2ct.data.checks.anatomy import orientation
from xray2ct.data.checks.dataset_check import check_dataset
from xray2ct.data.checks.findings import FAILED, OK, UNKNOWN
from xray2ct.data.phantoms import make_phantom
from xray2ct.data.prepare import patient_files
from xray2ct.data.splits import split_hash
from xray2ct.files import InputError, read_json, sha256, write_json
from xray2ct.geometry.projector import HU_WINDOW, MU_WATER, XRAY_SCALE, Geometry, hu_to_unit, render_xrays
from xray2ct.imaging.body import locate_cube
from xray2ct.imaging.cube import cube_affine, resample_cube
from xray2ct.imaging.cube_files import write_cube
from xray2ct.imaging.read_ct import CtImage
from xray2ct.imaging.read_xray import write_png16

SIZE, FOV = 64, 360.0
IDS = ("p0", "p1", "p2", "p3")
AFFINE = cube_affine((0, 0, 0), FOV, SIZE)
VIEWS = ("PA X-ray", "lateral X-ray")


def render(hu, geometry=None):
    """(2, SIZE, SIZE) of an HU cube."""
    volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32)))[None, None]
    return render_xrays(volume, geometry or Geometry(), (SIZE, SIZE))[0].numpy()


def write_patient(root, patient, hu, mask=None, xrays=None):
    """Write all files of one patient and its manifest entry, as prepare_data.py would."""
    names, folder = patient_files(patient), root / patient
    mask = np.ones(hu.shape, np.uint8) if mask is None else mask
    write_cube(folder / names[0], hu, AFFINE)
    write_cube(folder / names[1], mask, AFFINE)
    for name, image in zip(names[2:], render(hu) if xrays is None else xrays):
        write_png16(folder / name, image)
    files = {name: sha256(folder / name) for name in names}
    return {"source": f"{patient}.nii.gz", "centre_mm": [0, 0, 0], "scan_fraction": float(mask.mean()), "files": files}


def edit(root, change):
    manifest = read_json(root / "dataset.json")
    change(manifest)
    write_json(root / "dataset.json", manifest)


def refresh(root, patient):
    """Bring the checksums up to date, so that a break has to be found by what it means."""

    def change(manifest):
        files = manifest["patients"][patient]["files"]
        for name in files:
            if (root / patient / name).exists():
                files[name] = sha256(root / patient / name)

    edit(root, change)


def picture(root, patient, view):
    path = root / patient / patient_files(patient)[2 + view]
    return path, np.asarray(Image.open(path)) / 65535.0


def stored_hu(root, patient):
    return np.asarray(nib.load(root / patient / f"{patient}.nii.gz").dataobj).transpose(2, 1, 0)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Four phantoms in patient cubes of 64^3."""
    root = tmp_path_factory.mktemp("check") / "data"
    entries = {}
    for index, patient in enumerate(IDS):
        ct = CtImage(*make_phantom(0, index, FOV / SIZE), patient)
        hu, mask = resample_cube(ct, locate_cube(ct, FOV), FOV, SIZE)
        entries[patient] = write_patient(root, patient, hu, mask)
    split = {"train": ["p0", "p1"], "val": ["p2"], "test": ["p3"]}
    manifest = {
        "format_version": 1,
        "geometry": Geometry().to_dict(),
        "hu_window": list(HU_WINDOW),
        "mu_water": MU_WATER,
        "xray_scale": XRAY_SCALE,
        "cube_size": SIZE,
        "xray_size": SIZE,
        "split": split,
        "split_hash": split_hash(split),
        "patients": entries,
    }
    write_json(root / "dataset.json", manifest)
    return root


# -- ways of breaking ------------------------------------------------------------------------------


def xray(change, *views):
    """Change stored pictures: ``change`` maps (n, n) in [0, 1] to the same."""

    def apply(root, patient):
        for view in views or (0,):
            path, image = picture(root, patient, view)
            write_png16(path, change(image))
        refresh(root, patient)

    return apply


def volume(change, rerender=True):
    """Change the stored volume (and its X-rays, if they are to follow)."""

    def apply(root, patient):
        hu = np.ascontiguousarray(change(stored_hu(root, patient)))
        xrays = None if rerender else [picture(root, patient, view)[1] for view in (0, 1)]
        entry = write_patient(root, patient, hu, xrays=xrays)
        edit(root, lambda manifest: manifest["patients"].update({patient: entry}))

    return apply


def affine(change):
    def apply(root, patient):
        path = root / patient / f"{patient}.nii.gz"
        image = nib.load(path)
        data, matrix = np.asarray(image.dataobj), change(image.affine.copy())
        image = nib.Nifti1Image(data, matrix)
        image.set_qform(matrix, 1)
        nib.save(image, path)
        (root / patient / f"{patient}_mask.nii.gz").unlink()
        edit(root, lambda manifest: manifest["patients"][patient]["files"].pop(f"{patient}_mask.nii.gz"))
        refresh(root, patient)

    return apply


def swap_views(root, patient):
    images = [picture(root, patient, view) for view in (0, 1)]
    write_png16(images[0][0], images[1][1])
    write_png16(images[1][0], images[0][1])
    refresh(root, patient)


def other_geometry(geometry):
    def apply(root, patient):
        for view, image in enumerate(render(stored_hu(root, patient), geometry)):
            write_png16(root / patient / patient_files(patient)[2 + view], image)
        refresh(root, patient)

    return apply


def other_patients_picture(root, patient):
    hu = np.roll(stored_hu(root, IDS[0]), 5, axis=0)  # a fifth patient, whose volume is not in the set
    write_png16(root / patient / f"{patient}_lat_drr.png", render(hu)[1])
    write_png16(root / patient / f"{patient}_pa_drr.png", 0.9999 * render(stored_hu(root, neighbour(patient)))[0])
    refresh(root, patient)


def neighbour(patient):
    return IDS[IDS.index(patient) - 1]


def remove(name):
    return lambda root, patient: (root / patient / name.format(patient)).unlink()


def resave(change):
    """Store other values or another grid as NIfTI."""

    def apply(root, patient):
        data = change(stored_hu(root, patient))
        write_cube(root / patient / f"{patient}.nii.gz", data, cube_affine((0, 0, 0), FOV, data.shape[0]))
        refresh(root, patient)

    return apply


def with_nan(hu):
    hu = hu.astype(np.float32)
    hu[3, 4, 5] = np.nan
    return hu


def add_byte(root, patient):
    with open(root / patient / f"{patient}_pa_drr.png", "ab") as stream:
        stream.write(b"\0")


def truncate(root, patient):
    path = root / patient / f"{patient}.nii.gz"
    path.write_bytes(path.read_bytes()[:5000])
    refresh(root, patient)


def second_volume(root, patient):
    np.save(root / patient / f"{patient}.npy", stored_hu(root, patient))


def interrupted(root, patient):
    write_json(root / patient / "prepared.json", {"complete": False, "settings": {}})


def leave_folder(root, patient):
    edit(root, lambda manifest: manifest["patients"][patient]["files"].update({"../p0/p0.nii.gz": "0"}))


def black(root, patient):
    write_png16(root / patient / f"{patient}_pa_drr.png", np.zeros((SIZE, SIZE)))
    refresh(root, patient)


BREAKS = {
    "PA mirrored": (xray(np.fliplr), {"PA X-ray": "^mirrored left-right$"}),
    "lateral mirrored": (xray(np.fliplr, 1), {"lateral X-ray": "^mirrored left-right$"}),
    "lateral upside down": (xray(np.flipud, 1), {"lateral X-ray": "upside down"}),
    "PA rotated by 90": (xray(np.rot90), {"PA X-ray": "rotated by 90 degrees anticlockwise"}),
    "PA rotated by 270": (xray(lambda i: np.rot90(i, 3)), {"PA X-ray": "rotated by 90 degrees clockwise"}),
    "both rotated by 180": (xray(lambda i: np.rot90(i, 2), 0, 1), dict.fromkeys(VIEWS, "rotated by 180 degrees")),
    "views swapped": (swap_views, dict.fromkeys(VIEWS, "views swapped")),
    "gain": (xray(lambda i: 0.8 * i), {"PA X-ray": r"rescaled by a gain of 0\.800"}),
    "offset": (xray(lambda i: 0.7 * i + 0.1), {"PA X-ray": r"gain 0\.700, offset \+0\.100"}),
    "inverted": (xray(lambda i: 1 - i), {"PA X-ray": "inverted"}),
    "min-max": (
        xray(lambda i: (i - i.min()) / np.ptp(i)),
        {"PA X-ray": "stretched to its own minimum and maximum"},
    ),
    "gamma": (xray(lambda i: i**0.5), {"PA X-ray": "non-linearly"}),
    "clipped": (xray(lambda i: (2.5 * i - 0.2).clip(0, 1)), {"PA X-ray": "clipped"}),
    "gain and mirrored": (xray(lambda i: 0.8 * np.fliplr(i)), {"PA X-ray": r"mirrored left-right; .*gain of 0\.8"}),
    "black": (black, {"PA X-ray": "all black"}),
    "parallel": (other_geometry(Geometry("parallel")), dict.fromkeys(VIEWS, "another geometry.*fits parallel rays")),
    "nearer source": (other_geometry(Geometry("cone", FOV, 1200, 1000)), dict.fromkeys(VIEWS, "another geometry")),
    "smaller detector": (
        other_geometry(Geometry(detector_mm=364.5)),
        dict.fromkeys(VIEWS, "another geometry.*(near|fits) a detector of 360 mm instead of 405"),
    ),
    "pictures of others": (
        other_patients_picture,
        {"PA X-ray": "shows another patient: it is p[0-3]'s PA view", "lateral X-ray": "does not (show|match)"},
    ),
    "NaN": (resave(with_nan), {"values": "NaN"}),
    "HU + 1024": (resave(lambda hu: (hu.astype(int) + 1024).astype(np.int16)), {"values": "HU . 1024"}),
    "unit scale": (resave(lambda hu: hu_to_unit(hu.astype(np.float32))), {"values": "scaled to"}),
    "constant": (resave(lambda hu: np.full_like(hu, 40)), {"values": "constant"}),
    "air only": (resave(lambda hu: (-1000 + hu % 20).astype(np.int16)), {"values": "air only"}),
    "HU shifted": (volume(lambda hu: (hu + 200).astype(np.int16)), {"values": "shifted or scaled"}),
    "out of range": (volume(lambda hu: np.where(hu == hu.max(), 9000, hu).astype(np.int16)), {"values": "9000"}),
    "volume mirrored": (volume(lambda hu: hu[:, :, ::-1]), {"left-right": "mirrored left-right"}),
    "volume upside down": (volume(lambda hu: hu[::-1]), {"head-feet": "upside down"}),
    "volume front to back": (volume(lambda hu: hu[:, ::-1]), {"front-back": "mirrored front to back"}),
    "volume turned": (
        volume(lambda hu: hu[::-1, :, ::-1]),
        dict.fromkeys(("head-feet", "left-right"), "turned by 180 degrees about the front-back axis"),
    ),
    "volume on its side": (volume(lambda hu: np.rot90(hu, 1, (1, 2))), {"front-back": "turned by 90 degrees"}),
    "volume not its X-rays'": (
        volume(lambda hu: hu[:, :, ::-1], False),
        dict.fromkeys((*VIEWS, "left-right"), ""),
    ),
    "affine mirrored": (affine(lambda a: a @ np.diag([-1, 1, 1, 1])), {"grid": "axes point to RPI, not LPI"}),
    "spacing": (affine(lambda a: a @ np.diag([2, 2, 2, 1])), {"grid": "spacing is 11.25"}),
    "cube elsewhere": (affine(lambda a: a + [[0, 0, 0, 50], [0] * 4, [0] * 4, [0] * 4]), {"grid": r"50\.0 mm"}),
    "shape": (resave(lambda hu: hu[::2, ::2, ::2]), {"grid": r"\(32, 32, 32\)"}),
    "X-ray size": (
        xray(lambda i: i.repeat(2, 0).repeat(2, 1)),
        {"grid": "128 x 128 pixels"},
    ),
    "lateral missing": (remove("{}_lat_drr.png"), {"files": "_lat_drr.png is missing"}),
    "volume missing": (remove("{}.nii.gz"), {"files": r"\.nii\.gz is missing"}),
    "folder missing": (lambda root, patient: shutil.rmtree(root / patient), {"files": "folder is missing"}),
    "byte added": (add_byte, {"checksums": "_pa_drr.png was changed"}),
    "truncated": (truncate, {"values": "cannot be read, or is truncated"}),
    "two volumes": (second_volume, {"files": "more than one volume"}),
    "interrupted": (interrupted, {"files": "interrupted"}),
    "path leaves": (leave_folder, {"files": "leaves the patient's folder"}),
}
# What else may follow from a break: a volume that lies wrong by its affine no longer matches its X-rays.
FOLLOWS = {
    "affine mirrored": {*VIEWS, "left-right"},
    "spacing": {*VIEWS, "values", "head-feet", "left-right"},
    "volume on its side": {"head-feet", "left-right"},
    "X-ray size": {"PA X-ray"},
    **{name: {"grid"} for name in ("constant", "HU + 1024", "unit scale", "air only")},  # no air outside the scan
}


def once(function):
    """The slow measures, made once per volume: most breaks leave the volumes as they are."""
    known = {}

    def call(hu, *arguments):
        key = (hu.tobytes(), function.__name__)
        if key not in known:
            known[key] = function(hu, *arguments)
        return known[key]

    return call


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        for function in (dataset_check.body_mask, dataset_check.orientation):
            patch.setattr(dataset_check, function.__name__, once(function))
        yield


@pytest.fixture(scope="module")
def found(good, tmp_path_factory):
    """Findings per break. Every patient of a data set is broken in another way: fewer data sets to check."""
    names, results = list(BREAKS), {}
    for start in range(0, len(names), len(IDS)):
        batch = dict(zip(IDS, names[start : start + len(IDS)]))
        root = Path(shutil.copytree(good, tmp_path_factory.mktemp("broken") / "data"))
        for patient, name in batch.items():
            BREAKS[name][0](root, patient)
        findings = check_dataset(root)
        for patient, name in batch.items():
            results[name] = [finding for finding in findings if finding.patient == patient]
    return results


@pytest.mark.parametrize("name", BREAKS)
def test_every_way_of_breaking_is_named(found, name):
    failed = {}
    for finding in found[name]:
        if finding.status == FAILED:
            failed.setdefault(finding.check, []).append(finding.message)
    expected = BREAKS[name][1]
    for check, words in expected.items():
        assert re.search(words, " | ".join(failed.get(check, ["(passed)"]))), failed
    assert set(expected) <= set(failed) <= set(expected) | FOLLOWS.get(name, set()), failed


def test_a_good_data_set_passes(good, tmp_path, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in good.rglob("*"))
    assert main(["--check", str(good), "--json", str(tmp_path / "report.json")]) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in good.rglob("*")) == before  # nothing is written there
    report = read_json(tmp_path / "report.json")
    assert report["ok"]
    assert report["patients"] == 4
    assert {finding["status"] for finding in report["findings"]} == {OK}
    assert report["summary"]["head-feet"] == {OK: 4, FAILED: 0, UNKNOWN: 0}
    assert "4 patients: all is well" in capsys.readouterr().out


# -- the data set as a whole -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaking(good, tmp_path_factory):
    """One data set with everything wrong that concerns more than one patient, p1 apart; its findings by check."""
    root = Path(shutil.copytree(good, tmp_path_factory.mktemp("leaking") / "data"))
    volume(lambda hu: stored_hu(root, "p0"))(root, "p3")  # p0 trains, p3 tests
    (root / "notes").mkdir()
    (root / ".cache").mkdir()

    def change(manifest):
        manifest["split"] = {"train": ["p0", "p1", "ghost"], "val": ["p1"], "test": ["p3"]}
        manifest["patients"]["../outside"] = manifest["patients"]["p0"]
        manifest["patients"]["p3"]["source"] = "p0.nii.gz"
        manifest["mu_water"] = 0.03

    edit(root, change)
    path, _ = picture(root, "p2", 0)
    shutil.copy(path, root / "p2" / "p2_lat_drr.png")
    findings = {}
    for finding in check_dataset(root):
        if finding.status == FAILED:
            findings.setdefault(finding.check, []).append((finding.patient, finding.message))
    return findings


@pytest.mark.parametrize(
    ("check", "patient", "words"),
    [
        ("manifest", None, r"mu_water: 0\.03; this version renders with 0\.02"),
        ("manifest", None, r"'\.\./outside' leaves its folder"),
        ("split", None, "p1 is in train and val"),
        ("split", None, r"ghost \(train\) is not a patient"),
        ("split", None, "p2 is in no split"),
        ("folders", None, "extra folder notes"),
        ("duplicates", "p0", r"^the same volume as p3, train and test \(across splits: a leak\)"),
        ("duplicates", "p3", r"^the same volume as p0, test and train \(across splits: a leak\)"),
        ("duplicates", "p0", "PA X-ray is the same file as the PA of p3"),
        ("duplicates", "p0", "made from the same source 'p0.nii.gz' as p3"),
        ("duplicates", "p2", "PA and the lateral X-ray are the same file"),
        ("lateral X-ray", "p2", "views swapped: this is the PA view"),
    ],
)
def test_what_concerns_the_data_set_is_named(leaking, check, patient, words):
    assert any(who == patient and re.search(words, text) for who, text in leaking[check]), leaking[check]


def test_the_manifests_own_faults(good, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(good / "p0", root / "p0")
    manifest = read_json(good / "dataset.json")
    manifest |= {"patients": {"p0": manifest["patients"]["p0"]}, "geometry": {"kind": "fan"}}
    manifest["split"] = {"train": ["p0"], "val": [], "test": []}
    write_json(root / "dataset.json", manifest)
    findings = {finding.check: finding for finding in check_dataset(root)}
    assert "geometry" in findings["manifest"].message
    assert (findings["PA X-ray"].status, findings["head-feet"].status) == (UNKNOWN, OK)
    assert "split_hash" in findings["split"].message


def test_folders_made_by_hand(good, tmp_path):
    """No manifest: brightness is free, but turned and swapped views are still named."""
    for patient in ("p0", "p1"):
        shutil.copytree(good / patient, tmp_path / patient)
        for view in (0, 1):
            path, image = picture(tmp_path, patient, view)
            Image.fromarray((255 * (image / image.max())).astype(np.uint8)).save(path)
    path, image = picture(tmp_path, "p1", 0)
    Image.fromarray((255 * np.fliplr(image) / image.max()).astype(np.uint8)).save(path)
    (tmp_path / "p1" / "p1_lat_drr.png").unlink()
    failed = [(f.patient, f.check, f.message) for f in check_dataset(tmp_path) if f.status == FAILED]
    assert failed == [("p1", "PA X-ray", "mirrored left-right")]


def test_films_of_a_folder_made_by_hand_are_read_as_the_data_set_reads_them(good, tmp_path):
    """Both together: one film given twice is refused in the reader's words, a page around a film is cut off."""
    shutil.copytree(good / "p0", tmp_path / "p0")
    pages = []
    for view in (0, 1):
        path, image = picture(tmp_path, "p0", view)
        path.unlink()
        pages.append(np.pad((255 * image / image.max()).astype(np.uint8), 20, constant_values=255))

    def check(pa, lateral):
        Image.fromarray(pa).save(tmp_path / "p0" / "p0_pa.png")
        Image.fromarray(lateral).save(tmp_path / "p0" / "p0_lat.png")
        found = {f.check: f for f in check_dataset(tmp_path)}
        return [found[view] for view in VIEWS]

    for finding in check(pages[0], np.fliplr(pages[0])):
        assert finding.status == FAILED
        assert "are the same picture" in finding.message
    assert check(*pages)[0].status == OK


def test_files_of_a_folder_made_by_hand_are_checked_or_named(good, tmp_path):
    folder = tmp_path / "p0"
    shutil.copytree(good / "p0", folder)
    sitk.WriteImage(sitk.ReadImage(folder / "p0.nii.gz"), folder / "ct.mha")
    for name in ("p0.nii.gz", "p0_mask.nii.gz"):
        (folder / name).unlink()
    (folder / "p0_pa_drr.png").rename(folder / "P0_PA.PNG")
    assert [f for f in check_dataset(tmp_path) if f.status == FAILED] == []
    (folder / "p0_frontal.gif").touch()
    (folder / "lesions_mask.nii").touch()
    (tmp_path / "flat.nrrd").touch()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "half_pa.png").touch()
    findings = [f for f in check_dataset(tmp_path) if f.status == FAILED]
    failed = [(f.patient, f.check, f.message.replace(str(tmp_path), "")) for f in findings]
    assert [(patient, check) for patient, check, _ in failed] == [(None, "folders")] * 2 + [("p0", "files")] * 2
    named = (
        "half: /half: holds no volume",
        "flat.nrrd lies outside",
        "p0_frontal.gif: no format",
        "lesions_mask.nii is",
    )
    assert all(words in text for words, (_, _, text) in zip(named, failed))


def test_the_command_line(good, tmp_path, capsys):
    with pytest.raises(InputError, match="no such folder"):
        main(["--check", str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="no patient folder found"):
        main(["--check", str(tmp_path)])
    with pytest.raises(InputError, match="existing folder"):
        main(["--check", str(good), "--json", str(tmp_path / "no" / "report.json")])
    with pytest.raises(InputError, match=r"--json .*: cannot be written \(File name too long\)"):
        main(["--check", str(good), "--json", str(tmp_path / ("x" * 256))])
    root = tmp_path / "data"
    shutil.copytree(good / "p0", root / "p0")
    (root / "p0" / "p0.nii.gz").unlink()
    shutil.copy(good / "dataset.json", root)
    assert main(["--check", str(root), "--json", str(tmp_path / "report.json")]) == 1
    assert "p0          files          p0.nii.gz is missing" in capsys.readouterr().out
    assert not read_json(tmp_path / "report.json")["ok"]
    (root / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        main(["--check", str(root)])


# -- odd anatomy -----------------------------------------------------------------------------------


def odd(hu, how):
    """A chest on which a measure cannot work."""
    hu = hu.copy()
    if how == "no lungs":
        hu[(hu < -400) & (hu > -990)] = 40
    elif how == "only the middle":
        hu[:24], hu[40:] = -1024, -1024
    elif how == "no bone":
        hu[hu > 100] = 50
    elif how == "heart on the right":
        middle = hu[20:44]
        hu[20:44] = middle[:, :, ::-1]
    return hu


@pytest.mark.parametrize(
    ("how", "unclear"),
    [
        ("no lungs", ("head-feet", "front-back", "left-right")),
        ("only the middle", ("head-feet",)),
        ("no bone", ("front-back", "left-right")),
    ],
)
def test_odd_chests_are_no_failure(good, how, unclear):
    answers = orientation(odd(stored_hu(good, "p1").astype(np.float32), how), FOV / SIZE)
    assert FAILED not in {status for status, _ in answers.values()}, answers
    assert {answers[side][0] for side in unclear} == {UNKNOWN}, answers


def test_a_heart_on_the_right_alone_is_no_mirrored_volume(good):
    answers = orientation(odd(stored_hu(good, "p0").astype(np.float32), "heart on the right"), FOV / SIZE)
    assert answers["left-right"][0] != FAILED, answers
