"""The patient-folder data set: items, cache, splits, folders made by hand, bad input."""

import json
import os
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from dataset import PatientDataset, mean_volume
from tests.helpers.tiny_data import make_dataset, make_hu
from tests.helpers.xray_cases import write_dicom
from xray2ct.data.manifest import DEFAULTS
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, hu_to_unit, render_xrays
from xray2ct.imaging.cube import cube_affine
from xray2ct.imaging.cube_files import read_cube, write_cube
from xray2ct.imaging.read_films import read_films, read_pair
from xray2ct.imaging.read_xray import write_png16
from xray2ct.imaging.write_volume import write_volume


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset") / "data", cube_size=32, xray_size=64)


@pytest.fixture
def root(made, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(made, tmp_path / "data", ignore=shutil.ignore_patterns(".cache")))


def by_hand(root, patient="a", hu=None, xrays=True):
    """A patient folder as users make it: a CT cube, perhaps two 8-bit pictures, no manifest."""
    hu = make_hu(1, 64) if hu is None else hu
    write_cube(root / patient / f"{patient}.nii.gz", hu, cube_affine((0, 0, 0), 360.0, hu.shape[0]))
    if xrays:
        volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32)))[None, None]
        for name, image in zip(("pa", "lat"), render_xrays(volume, Geometry(), (128, 128))[0].numpy()):
            Image.fromarray((255 * image / image.max()).astype(np.uint8)).save(root / patient / f"{patient}_{name}.png")


def quiet(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PatientDataset(*arguments, **options)


# -- items ---------------------------------------------------------------------------------------


def test_items_hold_what_the_files_say(root):
    data = PatientDataset(root, "test", volume_size=16, xray_size=64)
    item = data[0]
    assert (item["id"], len(data)) == ("p4", 2)
    assert item["xrays"].shape == (2, 64, 64)
    assert item["ct_volume"].shape == item["mask"].shape == (1, 16, 16, 16)
    stored = nib.load(root / "p4" / "p4.nii.gz")
    hu = np.asarray(stored.dataobj).transpose(2, 1, 0).astype(np.float32)
    expected = hu_to_unit(hu).reshape(16, 2, 16, 2, 16, 2).mean((1, 3, 5))
    assert np.abs(item["ct_volume"][0].numpy() - expected).max() < 1e-4
    assert item["ct_volume"].dtype == item["xrays"].dtype == torch.float32
    picture = np.asarray(Image.open(root / "p4" / "p4_pa_drr.png")) / 65535.0
    assert np.abs(item["xrays"][0].numpy() - picture).max() < 1e-4
    # The affine maps the coarse voxels to the same place: the centre of the cube, twice the spacing.
    centre = item["affine"].numpy() @ [7.5, 7.5, 7.5, 1]
    assert np.allclose(centre, stored.affine @ [15.5, 15.5, 15.5, 1])
    assert np.allclose(np.diag(item["affine"])[:3], 2 * np.diag(stored.affine)[:3])


def test_the_scan_mask_is_read(root):
    data = PatientDataset(root, "all", volume_size=16, xray_size=None)
    masks = {data[i]["id"]: data[i]["mask"] for i in range(len(data))}
    assert masks["p0"].min() == 1
    assert masks["p1"][0, :2].max() == 0
    assert masks["p1"][0, 2:].min() == 1


def test_raw_items_are_the_same_numbers_in_fewer_bytes(root):
    plain, raw = (PatientDataset(root, "val", 16, None, raw=flag)[0] for flag in (False, True))
    assert raw["ct_volume"].dtype == torch.uint16
    assert torch.equal(raw["ct_volume"].float() / 65535.0, plain["ct_volume"])
    assert torch.equal(raw["mask"].float(), plain["mask"])


def test_mean_volume_is_the_mean(root):
    data = PatientDataset(root, "train", 16, None)
    expected = torch.stack([data[i]["ct_volume"] for i in range(3)]).mean(0)
    assert torch.allclose(mean_volume(data), expected, atol=1e-6)


# -- cache ---------------------------------------------------------------------------------------


def test_the_cache_is_built_once_and_read_from_then_on(root):
    data = PatientDataset(root, "train", 16, 64)
    data.build_cache()
    files = {p: p.stat().st_mtime_ns for p in (root / ".cache").rglob("*.npy")}
    assert len(files) == 3 * 4
    first = data[0]
    again = PatientDataset(root, "train", 16, 64)[0]
    assert torch.equal(first["ct_volume"], again["ct_volume"])
    assert {p: p.stat().st_mtime_ns for p in (root / ".cache").rglob("*.npy")} == files


def test_ranks_share_the_work_of_building_the_cache(root):
    PatientDataset(root, "all", 16, 64).build_cache(rank=1, world_size=2)
    assert {p.name for p in (root / ".cache").iterdir()} == {"p1", "p3", "p5"}


def test_a_changed_source_is_read_anew(root):
    before = PatientDataset(root, "val", 16, 64)[0]
    hu = make_hu(99, 32)
    write_cube(root / "p3" / "p3.nii.gz", hu, nib.load(root / "p3" / "p3.nii.gz").affine)
    after = PatientDataset(root, "val", 16, 64)[0]
    assert not torch.allclose(before["ct_volume"], after["ct_volume"], atol=0.05)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_cache_entry_is_made_again(root, damage):
    expected = PatientDataset(root, "val", 16, 64)[0]["ct_volume"]
    path = next((root / ".cache" / "p3").glob("volume16-*.npy"))
    if damage == "other":
        np.save(path, np.zeros((4, 4), np.uint16))
    else:
        path.write_bytes(path.read_bytes()[:200] if damage == "cut" else b"")
    assert torch.equal(PatientDataset(root, "val", 16, 64)[0]["ct_volume"], expected)


def test_the_cache_can_live_elsewhere(root, tmp_path):
    PatientDataset(root, "val", 16, 64, cache_dir=tmp_path / "cache").build_cache()
    assert (tmp_path / "cache" / "p3").is_dir()
    assert not (root / ".cache").exists()


# -- folders made by hand ------------------------------------------------------------------------


def test_splits_share_one_look_at_the_folders(root):
    val = PatientDataset(root, "val", 16, 64)
    shutil.rmtree(root / "p4")  # of the test split: a look at the folders would miss it
    train = PatientDataset(root, "train", 16, 64, scanned=val)
    with pytest.raises(InputError, match="p4"):
        PatientDataset(root, "train", 16, 64)
    assert (train.ids, val.ids) == (["p0", "p1", "p2"], ["p3"])
    assert train[0]["ct_volume"].std() > 0.05
    assert train.splits == val.splits


@pytest.fixture
def cubes_of_64(monkeypatch):
    """Volumes without manifest are sampled at 64^3 instead of 256^3, which takes a tenth of the time."""
    monkeypatch.setitem(DEFAULTS, "cube_size", 64)


def test_a_folder_without_manifest_works_with_stated_defaults(tmp_path):
    for name, seed in (("a", 0), ("c", 2)):
        by_hand(tmp_path, name, make_hu(seed, 64), xrays=name == "a")
    with pytest.warns(UserWarning, match=r"no dataset\.json: assuming cone.*HU window.*normalised by 'auto'"):
        data = PatientDataset(tmp_path, "all", volume_size=16, xray_size=64)
    assert not data.has_manifest
    assert data.cube_size == 256
    items = {item["id"]: item for item in (data[i] for i in range(2))}
    hu = torch.from_numpy(hu_to_unit(make_hu(2, 64).astype(np.float32)))[None, None]
    own = render_xrays(hu, Geometry(), (512, 512))
    expected = torch.nn.functional.interpolate(own, size=64, mode="area")[0].clip(0, 1)
    assert torch.allclose(items["c"]["xrays"], expected, atol=0.02)  # missing: rendered
    assert np.corrcoef(items["a"]["xrays"][0].ravel(), render_64(0)[0].ravel())[0, 1] > 0.8  # 8 bit: read as a film


@pytest.mark.usefixtures("cubes_of_64")
@pytest.mark.parametrize("size", [64, 96, 600])
def test_rendered_xrays_of_any_size_are_area_averages(tmp_path, size):
    by_hand(tmp_path, xrays=False)
    data = quiet(tmp_path, "all", 16, size)
    assert data.cube_size == 64
    xrays = data[0]["xrays"].numpy()
    volume = torch.from_numpy(hu_to_unit(read_cube(tmp_path / "a" / "a.nii.gz", 360.0, 64)[0]))[None, None]
    fine = max(512, size)
    image = render_xrays(volume, Geometry(), (fine, fine))[0].numpy()
    for axis in (1, 2):  # integrate the piecewise constant picture and difference it at the pixels' borders
        total = np.concatenate([np.zeros_like(image.take([0], axis)), image.cumsum(axis, dtype=np.float64)], axis)
        at = np.linspace(0, fine, size + 1)
        whole = np.apply_along_axis(lambda row, at=at: np.interp(at, np.arange(fine + 1), row), axis, total)
        image = np.diff(whole, axis=axis) * size / fine
    np.testing.assert_allclose(xrays, image.clip(0, 1), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("cubes_of_64")
def test_films_are_read_as_a_reconstruction_reads_them(tmp_path):
    """Of their own spacing, and the lateral mirrored; where one spacing is missing, neither is used."""
    by_hand(tmp_path, xrays=False)
    folder = Path(__file__).with_name("imaging") / "films"
    paths = [tmp_path / "a" / f"a_{view}.dcm" for view in ("pa", "lat")]
    for path, view in zip(paths, ("pa", "lat")):
        pixels = np.asarray(Image.open(folder / f"lidc_0001_{view}.png"), dtype=np.float64)[
            :, :: 1 if view == "pa" else -1
        ]
        write_dicom(path, np.rint(16 * pixels), ImagerPixelSpacing=[Geometry().detector_mm / pixels.shape[0]] * 2)
    for spacings in (2, 1):
        if spacings == 1:
            write_dicom(paths[1], np.rint(16 * pixels))
        with pytest.warns(UserWarning, match="faced right: mirrored") as caught:
            xrays = PatientDataset(tmp_path, "all", 16, 64)[0]["xrays"].numpy()
        told = " ".join(str(warning.message) for warning in caught)
        assert ("a_lat.dcm: its pixel spacing is missing" in told) == (spacings == 1)
        for xray, expected in zip(xrays, read_pair(*paths, size=64, geometry=Geometry()).views):
            assert xray == pytest.approx(expected.pixels, abs=1e-4)


@pytest.mark.usefixtures("cubes_of_64")
def test_items_say_what_their_xrays_show(made, tmp_path):
    """All of a rendered X-ray, also where it is rendered now; of a film what its file shows, from the cache too."""
    seen = PatientDataset(made, "test", 16, 64, seen=True)[0]["seen"]
    assert seen.shape == (2, 64, 64)
    assert (seen == 1).all()
    assert "seen" not in PatientDataset(made, "test", 16, 64)[0]
    by_hand(tmp_path, xrays=False)
    hidden = np.zeros((128, 96), bool)
    hidden[:32, :60] = True
    grey = (255 * np.clip(render_64(1)[0] / 0.7, 0, 1)).astype(np.uint8).repeat(2, 0).repeat(2, 1)[:, 16:112]
    picture = np.dstack([grey, np.where(hidden, 0, 255)]).astype(np.uint8)
    Image.fromarray(picture, "LA").save(tmp_path / "a" / "a_pa.png")
    data = quiet(tmp_path, "all", 16, 64, xray_normalization="histogram", seen=True)
    options = {"size": 64, "geometry": Geometry(), "normalization": "histogram"}
    expected = read_films((tmp_path / "a" / "a_pa.png", None), **options).pa
    assert expected.seen.mean() == pytest.approx((128 * 96 - 32 * 60) / 128**2, abs=1e-6)  # padded to a square
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            item = data[0]
        assert item["seen"][0].numpy() == pytest.approx(expected.seen, abs=1 / 500)
        assert (item["seen"][1] == 1).all()


def render_64(seed):
    volume = torch.from_numpy(hu_to_unit(make_hu(seed, 64).astype(np.float32)))[None, None]
    return render_xrays(volume, Geometry(), (64, 64))[0].numpy()


@pytest.mark.usefixtures("cubes_of_64")
def test_a_ct_of_any_orientation_gives_the_same_volume(tmp_path):
    hu = make_hu(4, 64)[:60]  # not a cube: located and resampled as any CT
    (tmp_path / "plain" / "a").mkdir(parents=True)
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), cube_affine((0, 0, 0), 360.0, 64))
    nib.save(image, tmp_path / "plain" / "a" / "a.nii.gz")
    turned = image.as_reoriented(nib.io_orientation(image.affine)[[2, 0, 1]])
    (tmp_path / "turned" / "a").mkdir(parents=True)
    nib.save(nib.as_closest_canonical(turned), tmp_path / "turned" / "a" / "a.nii.gz")
    one, two = (quiet(tmp_path / name, "all", 16, None)[0]["ct_volume"] for name in ("plain", "turned"))
    assert (one - two).abs().mean() < 0.005
    assert not torch.allclose(one, one.flip(-1), atol=0.1)


@pytest.mark.usefixtures("cubes_of_64")
def test_an_array_volume_needs_no_affine(tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "a.npy", make_hu(5, 64))
    volume = quiet(tmp_path, "all", 16, None)[0]["ct_volume"][0].numpy()
    expected = hu_to_unit(make_hu(5, 64).astype(np.float32)).reshape(16, 4, 16, 4, 16, 4).mean((1, 3, 5))
    assert np.abs(volume - expected).mean() < 0.01
    np.save(tmp_path / "a" / "a.npy", make_hu(5, 64)[:32])
    with pytest.raises(InputError, match=r"a\.npy.*\(32, 64, 64\)"):
        quiet(tmp_path, "all", 16, None)[0]


def two_pictures(folder, names):
    """X-rays with a mark that no rendering has."""
    for view, name in enumerate(names):
        pixels = (60000 * render_64(1)[view].clip(0, 1)).astype(np.uint16)
        pixels[20:28, 20:28] = 65535
        if name.lower().endswith("bmp"):
            pixels = (pixels // 257).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)


VIEWS = (("a_pa.PNG", "a_Lat.png"), ("A_PA.TIF", "a_LATERAL.png"), ("frontal.bmp", "lat.BMP"))


@pytest.mark.usefixtures("cubes_of_64")
@pytest.mark.parametrize("names", VIEWS)
def test_xrays_of_a_folder_made_by_hand_are_used_whatever_they_are_called(tmp_path, names):
    by_hand(tmp_path, "a", xrays=False)
    two_pictures(tmp_path / "a", names)
    xrays = quiet(tmp_path, "all", 16, 64, xray_normalization="manifest")[0]["xrays"]
    assert xrays[:, 22:26, 22:26].min() > 0.99


@pytest.mark.usefixtures("cubes_of_64")
@pytest.mark.parametrize("name", ["ct.nii.gz", "a.NII.GZ", "a.mha", "x.mhd", "a.nrrd", "series"])
def test_volumes_of_a_folder_made_by_hand_are_used_in_every_format_that_is_read(tmp_path, name):
    hu, affine = make_hu(1, 32), cube_affine((0, 0, 0), 360.0, 32)
    (tmp_path / "data" / "a").mkdir(parents=True)
    write_volume(tmp_path / ("ct.mha" if name == "x.mhd" else name), hu, affine)
    if name == "x.mhd":
        sitk.WriteImage(sitk.ReadImage(tmp_path / "ct.mha"), tmp_path / "data" / "a" / name)
    else:
        (tmp_path / name).rename(tmp_path / "data" / "a" / name)
    by_hand(tmp_path / "plain", "a", hu, xrays=False)
    expected = quiet(tmp_path / "plain", "all", 16, None, cache_dir=tmp_path / "cache")[0]["ct_volume"]
    found = quiet(tmp_path / "data", "all", 16, None)[0]["ct_volume"]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98  # located and resampled, where it is no such cube
    changed = max((tmp_path / "data" / "a").rglob("*.*"), key=lambda path: path.stat().st_size)
    stamp = changed.stat().st_mtime_ns + 10**9
    os.utime(changed, ns=(stamp, stamp))  # the voxels' file, next to a header or in a series
    before = len(list((tmp_path / "data" / ".cache").rglob("volume*")))
    assert torch.equal(quiet(tmp_path / "data", "all", 16, None)[0]["ct_volume"], found)
    assert len(list((tmp_path / "data" / ".cache").rglob("volume*"))) == before + 1  # read anew


def test_nothing_of_a_folder_made_by_hand_is_left_out_without_a_word(tmp_path):
    for name in "ab":
        by_hand(tmp_path, name, make_hu(1, 16), xrays=False)
    two_pictures(tmp_path / "a", ("a_pa.png", "a_lat.png"))
    shutil.copy(tmp_path / "a" / "a.nii.gz", tmp_path / "a" / "lesions.nii.gz")
    shutil.copy(tmp_path / "a" / "a.nii.gz", tmp_path / "flat.nii.gz")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "a.nii.gz", tmp_path / "empty" / "deep")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = PatientDataset(tmp_path, "all", 16, None)
    warned = "\n".join(str(w.message) for w in caught)
    assert data.ids == ["a", "b"]
    named = ("no volume in empty", "flat.nii.gz: outside", "not used: a/lesions.nii.gz", "missing ones rendered (b)")
    for words in named:
        assert words in warned
    (tmp_path / "a" / "a_PA.png").touch()
    with pytest.raises(InputError, match="more than one PA X-ray"):
        quiet(tmp_path, "all", 16, None)


def test_a_folder_with_xrays_alone_and_ids_that_differ_by_case_are_refused(tmp_path):
    for name in "ab":
        by_hand(tmp_path, name, make_hu(1, 16), xrays=False)
    (tmp_path / "b" / "b.nii.gz").rename(tmp_path / "b" / "b_pa.png")
    with pytest.raises(InputError, match=r"b: holds no volume, only b_pa\.png"):
        quiet(tmp_path, "all", 16, None)
    shutil.rmtree(tmp_path / "b")
    by_hand(tmp_path, "A", make_hu(1, 16), xrays=False)
    with pytest.raises(InputError, match="A and a differ only in upper and lower case"):
        quiet(tmp_path, "all", 16, None)
    (tmp_path / "A").rename(tmp_path / "\u00e4")
    with pytest.raises(InputError, match="patient id"):
        quiet(tmp_path, "all", 16, None)


def test_hounsfield_units_are_windowed_before_they_are_averaged(tmp_path):
    """A coarse voxel half of air and half of metal is half full, however far beyond the window metal lies."""
    root = make_dataset(tmp_path, patients=3, cube_size=32, xray_size=32)
    hu = np.zeros((32, 32, 32), dtype=np.int16)
    hu[::2, :16], hu[1::2, :16] = -1024, 3071
    write_cube(root / "p0" / "p0.nii.gz", hu, cube_affine((0.0, -20.0, 30.0), 360.0, 32))
    volume = PatientDataset(root, "all", 16, None)[0]["ct_volume"][0]
    assert torch.allclose(volume[:, :8], torch.tensor(0.5), atol=1e-4)
    assert torch.allclose(volume[:, 8:], torch.tensor(1024 / 2500), atol=1e-4)


# -- bad input -----------------------------------------------------------------------------------


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        PatientDataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no patient folder found"):
        PatientDataset(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other.mgz").touch()
    with pytest.raises(InputError, match=r"no patient folder found.*a: holds no volume, only other\.mgz"):
        PatientDataset(tmp_path)


def test_a_missing_view_is_named(root):
    (root / "p3" / "p3_lat_drr.png").rename(root / "p3" / "lat.png")
    with pytest.raises(InputError, match=r"p3_lat_drr\.png.*missing"):
        PatientDataset(root, "val", 16, 64)


def test_a_missing_volume_is_named(root):
    (root / "p3" / "p3.nii.gz").rename(root / "p3" / "ct.nii.gz")
    with pytest.raises(InputError, match=r"no volume for patient p3"):
        PatientDataset(root, "val", 16, 64)


def break_xray(root, how):
    path = root / "p3" / "p3_pa_drr.png"
    if how == "black":
        write_png16(path, np.zeros((64, 64)))
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif how == "swapped":
        lateral = path.with_name("p3_lat_drr.png")
        path.rename(root / "keep.png")
        lateral.rename(path)
        (root / "keep.png").rename(lateral)
    return path


@pytest.mark.parametrize(
    ("how", "words"), [("black", "all black"), ("truncated", "truncated"), ("swapped", "look swapped")]
)
def test_unusable_xrays_are_named(root, how, words):
    path = break_xray(root, how)
    with pytest.raises(InputError, match=words) as error:
        PatientDataset(root, "val", 16, 64)[0]
    assert str(path) in str(error.value)


def test_a_broken_volume_is_named(root):
    path = root / "p3" / "p3.nii.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"p3\.nii\.gz"):
        PatientDataset(root, "val", 16, 64)[0]


def edit(root, **changes):
    data = json.loads((root / "dataset.json").read_text())
    data.update(changes)
    (root / "dataset.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 99}, "format_version: 99; this version reads 1"),
        ({"geometry": {"kind": "fan"}}, "fan"),
        ({"geometry": {"sid": 5}}, "sid"),
        ({"geometry": None}, "geometry"),
        ({"mu_water": 0.03}, "mu_water: 0.03"),
        ({"hu_window": "wide"}, "hu_window: 'wide'; expected two HU, the lower first"),
        ({"cube_size": 32.5}, "cube_size: 32.5; expected a whole number from 1 to 1024"),
        ({"split": {"train": ["p0", "p1"], "val": ["p1"], "test": []}}, "listed more than once: p1"),
    ],
)
def test_a_bad_manifest_is_named(root, changes, words):
    edit(root, **changes)
    with pytest.raises(InputError, match=words) as error:
        PatientDataset(root, "train", 16, 64)
    assert "dataset.json" in str(error.value)


def test_unlisted_folders_are_left_out_and_reported(root):
    by_hand(root, "stranger", xrays=False)
    shutil.copy(root / "stranger" / "stranger.nii.gz", root / "stranger" / "stranger.nii")  # two: no matter there
    (root / "nothing").mkdir()
    with pytest.warns(UserWarning, match="stranger is not in"), pytest.warns(UserWarning, match="no volume in nothing"):
        data = PatientDataset(root, "all", 16, None)
    assert "stranger" not in data.ids


def test_sizes_that_do_not_fit_and_empty_splits(root):
    with pytest.raises(InputError, match="24 does not divide"):
        PatientDataset(root, "train", 24, None)
    with pytest.raises(InputError, match="one of train, val, test, all"):
        PatientDataset(root, "dev", 16, None)
    data = json.loads((root / "dataset.json").read_text())["split"]
    edit(root, split={"train": data["train"] + data["val"], "val": [], "test": data["test"]})
    with pytest.raises(InputError, match="val split is empty"):
        PatientDataset(root, "val", 16, None)
