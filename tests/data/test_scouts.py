"""Scouts of generated scanners: placed in the cube by their DICOM geometry, compared with the CT, used as X-rays."""

import contextlib
import functools
import io
import json

import numpy as np
import pytest
import torch

from tests.helpers.ct_cases import thorax
from tests.helpers.tiny_data import make_dataset
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, hu_to_mu, line_integrals

pydicom = pytest.importorskip("pydicom")

from dataset import PatientDataset  # noqa: E402
from prepare_data import main  # noqa: E402
from tests.helpers.dicom_cases import base, set_pixels, texts, write_slices  # noqa: E402
from xray2ct.data.scouts import Cube, fan_beam, place_scout, place_scouts  # noqa: E402
from xray2ct.imaging.body import locate_cube  # noqa: E402
from xray2ct.imaging.cube import resample_cube  # noqa: E402
from xray2ct.imaging.read_scout import read_scout  # noqa: E402

FRAME = "1.2.826.0.1.3680043.2.1125.77"


@functools.cache
def patient_ct():
    """A thorax with a nodule-like marker at one side and height, off the isocentre by a few centimetres."""

    def extra(x, y, z):
        ball = (x - 60) ** 2 + (y + 40) ** 2 + (z + 30) ** 2 < 20**2
        return np.where(ball, 600.0, np.nan)

    affine = np.eye(4)
    affine[:3, :3] = np.diag([-8.0, -8.0, 8.0])
    affine[:3, 3] = np.array([10.0, -25.0, 40.0]) - affine[:3, :3] @ ((np.array([39, 35, 33]) - 1) / 2)
    return thorax((39, 35, 33), affine, centre=(10.0, -25.0), lung_z=40.0, extra=extra)


Z, U = np.arange(170.0, -110.0, -5.0), np.arange(-230.0, 231.0, 4.0)  # rows and columns of a scout, mm


@functools.cache
def integrals(view, side, sid):
    """Line integrals of the CT in LPS mm by brute force: bilinear samples along each ray, the isocentre at x = y = 0.

    Independent of the package's projectors: rays are cut into 4 mm steps and the CT is sampled by scipy.
    """
    from scipy import ndimage

    ct, z, u = patient_ct(), Z, U
    lps = np.diag([-1.0, -1, 1, 1]) @ ct.affine
    t = np.arange(-230, 230, 4.0)
    across = u[None, :] * (sid + t[:, None]) / sid  # (T, C), t grows towards the detector
    sign = {(0, 0): -1, (0, 1): 1, (1, 0): 1, (1, 1): -1}[view, side]  # of t along y (frontal) or x (lateral)
    depth = np.broadcast_to(sign * t[:, None], across.shape)
    x, y = (across, depth) if view == 0 else (depth, across)
    points = np.stack(np.broadcast_arrays(x[None], y[None], z[:, None, None]))  # (3, R, T, C)
    index = np.einsum("ij,jrtc->irtc", np.linalg.inv(lps)[:3, :3], points - lps[:3, 3, None, None, None])
    mu = hu_to_mu(ct.data.astype(np.float32))
    samples = ndimage.map_coordinates(mu, index, order=1, cval=0.0)
    return samples.sum(axis=1) * 4.0 * np.sqrt(1 + (u / sid) ** 2)


def write_scout(path, view=0, side=1, sid=541.0, change=None, transposed=False, flipped=False, gain=400.0):
    """A scout file; rows from the head down and columns to the left or back, unless ``transposed`` or ``flipped``."""
    z, u = Z, U
    stored = gain * integrals(view, side, sid) - 120.0
    axis, down = np.eye(3)[view], np.array([0.0, 0, -1])
    position = axis * u[0] + np.array([0, 0, z[0]])
    rows, columns, spacing = axis, down, (5.0, 4.0)
    if flipped:  # from the feet up, and from the left
        stored, position = stored[::-1, ::-1], axis * u[-1] + np.array([0, 0, z[-1]])
        rows, columns = -rows, -columns
    if transposed:
        stored, rows, columns, spacing = stored.T, columns, rows, spacing[::-1]
    data = base("1.2.840.10008.5.1.4.1.1.2", f"9{view}", 5)
    data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    data.ImagePositionPatient, data.ImageOrientationPatient = texts(position), texts([*rows, *columns])
    data.PixelSpacing, data.FrameOfReferenceUID = texts(spacing), FRAME
    data.DistanceSourceToPatient, data.DistanceSourceToDetector = f"{sid}", "949"
    data.RescaleSlope, data.RescaleIntercept = "1", "-1024"
    set_pixels(data, stored)
    if change:
        change(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def cube():
    ct = patient_ct()
    centre = locate_cube(ct, 360.0)
    return Cube.of(*resample_cube(ct, centre, 360.0, 64), 360.0, centre)


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("side", [0, 1])
def test_the_fan_beam_is_that_of_the_data_sets_geometry_at_the_cubes_centre(view, side):
    """With the isocentre in the cube's centre a scout is the view that the projector renders."""
    volume = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    sides = [("behind", "in front")[side if view == 0 else 0], ("on the right", "on the left")[side if view else 0]]
    expected = line_integrals(volume * 0.02, Geometry("scout", 200.0, 949, 541, source_sides=tuple(sides)), (16, 16))
    centres = (np.arange(16) + 0.5) / 16 * 200.0 - 100.0
    whole = Cube(volume[0, 0] * 0.02, np.ones(16, bool), 200.0, (0.0, 0.0, 0.0))
    image = fan_beam(whole, view, 541.0, 0.0, 0.0, side, centres, centres)
    assert torch.allclose(image, expected[0, view], atol=1e-5)


def test_a_source_in_front_sees_the_volume_turned_about():
    volume = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(1))
    front = Geometry("cone", 300.0, source_sides=("in front", "on the left"))
    other, usual = (
        line_integrals(volume, front, (24, 24)),
        line_integrals(volume.flip(3).flip(4), Geometry("cone", 300.0), (24, 24)),
    )
    assert torch.allclose(other[:, 0], usual[:, 0].flip(-1), atol=1e-4)  # mirrored back and front, right and left
    assert torch.allclose(other[:, 1], usual[:, 1].flip(-1), atol=1e-4)
    assert Geometry.from_dict(json.loads(json.dumps(front.to_dict()))) == front
    assert "source_sides" not in Geometry().to_dict()
    with pytest.raises(ValueError, match=r"geometry\.source_sides is \('above', 'on the left'\)"):
        Geometry(source_sides=("above", "on the left"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_scout_is_read_upright_however_its_file_is_turned(tmp_path, transposed, flipped):
    plain = read_scout(write_scout(tmp_path / "a.dcm"))
    turned = read_scout(write_scout(tmp_path / "b.dcm", transposed=transposed, flipped=flipped))
    assert (turned.view, turned.sid_mm, turned.sdd_mm, turned.frame) == (0, 541.0, 949.0, FRAME)
    assert np.allclose(turned.pixels, plain.pixels, atol=1.0)
    assert np.allclose(turned.z_mm, plain.z_mm)
    assert np.allclose(turned.across_mm, plain.across_mm)


@pytest.mark.parametrize(("view", "side"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_scouts_of_both_views_and_sides_are_placed(tmp_path, cube, view, side):
    """The placed picture is the one that the data set's geometry renders, but for the distance of the two centres."""
    scout = read_scout(write_scout(tmp_path / "s.dcm", view, side))
    sides = (("behind", "in front")[side if view == 0 else 0], ("on the right", "on the left")[side if view else 0])
    data_set = Geometry("scout", 360.0, 949, 541, source_sides=sides)
    placed = place_scout(scout, cube, data_set, 10.0, 64)
    assert (placed.view, placed.source) == (view, sides[view])
    assert placed.ncc > 0.995
    assert placed.ncc > placed.control + 0.01
    rendered = (line_integrals(cube.mu[None, None], data_set, (64, 64)) / 10.0)[0, view].numpy()
    rows = np.flatnonzero(cube.scanned)[2:-2]
    assert np.corrcoef(placed.pixels[rows].ravel(), rendered[rows].ravel())[0, 1] > 0.99
    assert np.abs(placed.pixels - rendered)[rows].mean() < 0.012  # of a scale of 1: gain and offset are right, too


def test_dark_bone_is_turned_bright(tmp_path, cube):
    scout = read_scout(write_scout(tmp_path / "s.dcm", gain=-60.0))
    data_set = Geometry("scout", source_sides=("in front", "on the right"))
    placed = place_scout(scout, cube, data_set, 10.0, 64)
    assert placed.ncc > 0.995
    spine, lung = placed.pixels[32, 28:36].max(), placed.pixels[32, 14:20].min()
    assert spine > lung


def test_the_other_side_of_the_source_is_refused_with_the_option(tmp_path, cube):
    scout = read_scout(write_scout(tmp_path / "s.dcm"))
    with pytest.raises(InputError, match=r"source stood in front; expected behind.*--frontal ap"):
        place_scout(scout, cube, Geometry("scout"), 10.0, 64)


def shift(data):
    x, y, z = data.ImagePositionPatient
    data.ImagePositionPatient = texts([float(x) + 60, float(y), float(z) - 40])


def tilt(data):
    data.ImageOrientationPatient = texts([np.cos(0.2), np.sin(0.2), 0, 0, 0, -1])


def away(data):
    data.ImagePositionPatient = texts([-230, 0, 900])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: setattr(data, "FrameOfReferenceUID", FRAME + "1"), "another Frame of Reference UID"),
        (lambda data: data.__delattr__("ImagePositionPatient"), "ImagePositionPatient is missing"),
        (lambda data: setattr(data, "PixelSpacing", ["0", "1"]), "PixelSpacing is missing or no 2 numbers"),
        (lambda data: setattr(data, "ImageType", ["ORIGINAL", "PRIMARY", "AXIAL"]), "no scout"),
        (lambda data: setattr(data, "PixelData", data.PixelData[:1000]), "truncated"),
        (tilt, "lies obliquely"),
        (shift, "does not show the CT"),
        (away, "0 mm of the CT's height"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, cube, change, words):
    path = write_scout(tmp_path / "s.dcm", change=change)
    with pytest.raises(InputError, match=words) as error:
        place_scout(read_scout(path), cube, Geometry("scout"), 10.0, 64, FRAME)
    assert str(path) in str(error.value)


def header(kind=(), depth=0.0, distances=None, **tags):
    """What a scanner writes: further values of Image Type, depth of Image Position, no distances where ``{}``."""

    def change(data):
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER", *kind]
        x, _, z = data.ImagePositionPatient
        data.ImagePositionPatient = texts([float(x), depth, float(z)])
        if distances == {}:
            del data.DistanceSourceToPatient, data.DistanceSourceToDetector
        for name, value in tags.items():
            setattr(data, name, value)

    return change


VENDORS = {
    "rows from the head, tube above": (541.0, header(SeriesDescription="SCOUT AP"), {}),
    "depth is not the isocentre's": (
        595.0,
        header(("CT_SOM5 TOP",), depth=-160.0, SeriesDescription="TOPOGRAM 0.6 T20f"),
        {"flipped": True},
    ),
    "no distances": (570.0, header(distances={}, SeriesDescription="SURVIEW"), {}),
    "head to feet along the rows": (600.0, header(SeriesDescription="SCANOGRAM"), {"transposed": True}),
}


@pytest.mark.parametrize("vendor", VENDORS)
def test_what_scanners_write_leads_to_the_same_picture(tmp_path, cube, vendor):
    sid, change, layout = VENDORS[vendor]
    scout = read_scout(write_scout(tmp_path / "s.dcm", sid=sid, change=change, **layout))
    data_set = Geometry("scout", 360.0, 949, sid, source_sides=("in front", "on the right"))
    placed = place_scout(scout, cube, data_set, 10.0, 64)
    assert placed.ncc > 0.995
    assert placed.isocentre_mm == pytest.approx(-cube.centre_lps[1])  # at y = 0, whatever the header's depth
    assert placed.sid_mm == pytest.approx(sid)
    rendered = (line_integrals(cube.mu[None, None], data_set, (64, 64)) / 10.0)[0, 0].numpy()
    rows = np.flatnonzero(cube.scanned)[2:-2]
    assert np.abs(placed.pixels - rendered)[rows].mean() < 0.012


def test_of_two_scouts_of_one_view_the_one_that_fits_is_used(tmp_path, cube):
    paths = [
        write_scout(tmp_path / "b.dcm"),
        write_scout(tmp_path / "a.dcm", change=lambda data: nudge(data, 3.0)),  # the patient has moved by 3 mm
    ]
    data_set = Geometry("scout", source_sides=("in front", "on the right"))
    for order in (paths, paths[::-1]):
        placed, notes = place_scouts(order, cube, data_set, 10.0, 64)
        assert list(placed) == [0]
        assert placed[0].ncc > 0.995
        assert any("one of several PA scouts" in note for note in notes)


def nudge(data, mm):
    x, y, z = data.ImagePositionPatient
    data.ImagePositionPatient = texts([float(x), float(y), float(z) + mm])


# ------------------------------------------------------------------------------------------------
# In a data set


@pytest.fixture(scope="module")
def cts(tmp_path_factory):
    """Two patients: one as get_data.py leaves it, one with scouts among the slices of the CT."""

    def same_frame(data, k):
        data.FrameOfReferenceUID = FRAME

    root = tmp_path_factory.mktemp("scouts") / "cts"
    write_slices(root / "P1" / "ct", patient_ct(), change=same_frame, series=1)
    write_slices(root / "P2", patient_ct(), change=same_frame, series=2)
    for scouts in (root / "P1" / "scouts", root / "P2"):
        write_scout(scouts / "frontal.dcm")
    write_scout(root / "P1" / "scouts" / "lateral.dcm", view=1, side=0)
    write_scout(root / "P2" / "other.dcm", view=1, change=away)
    return root


def prepare(cts):
    small = ("--size", "32", "--xray-size", "64", "--workers", "1", "--geometry", "scout", "--frontal", "ap")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["--input", str(cts), "--output", str(cts.parent / "data"), *small, "--with-scouts"]) == 0
    return text.getvalue()


@pytest.fixture(scope="module")
def prepared(cts):
    """The data set and what its preparation said."""
    said = prepare(cts)
    return cts.parent / "data", said


def test_scouts_of_the_session_and_among_the_slices_are_prepared(prepared, cts):
    root, said = prepared
    assert "P2: " in said  # the scout of another table position is named
    manifest = json.loads((root / "dataset.json").read_text())
    first, second = manifest["patients"]["P1"], manifest["patients"]["P2"]
    assert sorted(first["scouts"]) == ["P1_lat_scout.png", "P1_pa_scout.png"]
    assert first["scouts"]["P1_pa_scout.png"]["ncc"] > 0.99
    assert set(first["scouts"]) < set(first["files"])
    assert sorted(second["scouts"]) == ["P2_pa_scout.png"]
    assert "2 of 2 CTs are done already" in prepare(cts)


def test_prepared_scouts_show_what_the_data_set_renders(prepared):
    root, _ = prepared
    data = PatientDataset(root, "all", 32, 64, xrays="scout")
    assert (data.ids, data.without_xrays) == (["P1"], ["P2"])
    rendered = PatientDataset(root, "all", 32, 64)
    assert rendered.ids == ["P1", "P2"]
    real, drawn = data[0]["xrays"], rendered[0]["xrays"]
    assert not torch.equal(real, drawn)
    for view in range(2):
        rows = slice(16, 48)
        assert np.corrcoef(real[view, rows].ravel(), drawn[view, rows].ravel())[0, 1] > 0.97


def test_a_data_set_without_scouts_says_so(tmp_path):
    root = make_dataset(tmp_path / "data", patients=3, cube_size=16, xray_size=32)
    with pytest.raises(InputError, match=r"none of 3 patients has ID_pa_scout.png and ID_lat_scout.png"):
        PatientDataset(root, "all", 16, 32, xrays="scout")


def test_scouts_want_a_scout_geometry(cts):
    with pytest.raises(InputError, match="--with-scouts goes with --geometry scout"):
        main(["--input", str(cts), "--output", str(cts.parent / "other"), "--with-scouts"])
