"""Reading CTs, placing and resampling the cube: positions, orientations, masks and every refusal."""

import gzip
import sys

import nibabel as nib
import numpy as np
import pytest

from tests.helpers.ct_cases import grid_affine, reoriented, rotation, save_nifti, thorax, world
from xray2ct.files import InputError
from xray2ct.imaging import read_ct as read_ct_module
from xray2ct.imaging.body import body_mask, locate_cube, remove_couch
from xray2ct.imaging.cube import cube_affine, resample_cube
from xray2ct.imaging.cube_files import read_cube, write_cube
from xray2ct.imaging.find_cts import find_cts
from xray2ct.imaging.read_ct import CtImage, read_ct

SHEAR = np.array([[1, 0, 0], [0, 1, 0.25], [0, 0, 1]])  # a tilted gantry


def cube_world(centre, fov_mm, size):
    """x, y, z of the cube's voxels as (D, H, W), from the convention's words: d down, h back, w to the left."""
    steps = (np.arange(size) - (size - 1) / 2) * fov_mm / size
    z, y, x = np.meshgrid(centre[2] - steps, centre[1] - steps, centre[0] - steps, indexing="ij")
    return x, y, z


# ------------------------------------------------------------------------------------------------
# Resampling


@pytest.mark.parametrize(
    ("shape", "spacing", "turn"),
    [
        ((60, 50, 40), (5, 6, 7.5), np.eye(3)),
        ((60, 50, 40), (5, 6, 7.5), np.diag([-1, -1, 1])),
        ((40, 60, 50), (7.5, 5, 6), np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]])),
        ((90, 90, 60), (4, 4, 6), rotation(12, -8, 20)),
        ((120, 120, 60), (3, 3, 6), rotation(5, 0, 0) @ SHEAR),
        ((200, 60, 50), (1.5, 5, 6), np.eye(3)),
    ],
)
def test_a_linear_field_lands_on_its_world_positions_whatever_the_affine(shape, spacing, turn):
    # Linear interpolation and symmetric smoothing both keep a linear field, so it can be checked exactly.
    field = lambda x, y, z: 1.5 * x - 2.0 * y + 1.1 * z + 100  # noqa: E731
    centre, fov, size = (9.0, -14.0, 21.0), 130.0, 24
    affine = grid_affine(shape, spacing, centre, turn)
    ct = CtImage(field(*world(shape, affine)).astype(np.float32), affine, "linear")
    hu, mask = resample_cube(ct, centre, fov, size)
    assert hu.dtype == np.int16
    assert mask.all()
    assert np.abs(hu - field(*cube_world(centre, fov, size))).max() <= 0.51


def test_storage_order_does_not_change_the_cube(tmp_path):
    shape = (44, 40, 36)
    ct = thorax(shape, grid_affine(shape, (7, 8, 9), (30, -20, 400)), centre=(30, -20), lung_z=400)
    cubes = []
    for axes in ("RAS", "LPS", "PIR", "SAR"):
        loaded = read_ct(save_nifti(tmp_path / f"{axes}.nii.gz", reoriented(ct, axes)))
        centre = locate_cube(loaded, 320)
        cubes.append((centre, *resample_cube(loaded, centre, 320, 32)))
    first_centre, first_hu, first_mask = cubes[0]
    assert first_hu.std() > 300
    for centre, hu, mask in cubes[1:]:
        assert centre == pytest.approx(first_centre, abs=1e-3)
        assert np.abs(hu.astype(int) - first_hu).max() <= 1
        assert np.array_equal(mask, first_mask)


def test_an_oblique_scan_gives_the_same_cube():
    turn = rotation(6, -4, 9)
    straight = thorax((80, 80, 80), grid_affine((80,) * 3, 4.0))
    oblique = thorax((80, 80, 80), grid_affine((80,) * 3, 4.0, rotation=turn))
    centres = [locate_cube(ct, 240) for ct in (straight, oblique)]
    assert np.abs(np.subtract(*centres)).max() < 4.0
    hu, mask = resample_cube(straight, (0, 0, 0), 240, 40)
    hu_oblique, mask_oblique = resample_cube(oblique, (0, 0, 0), 240, 40)
    both = (mask & mask_oblique).astype(bool)
    assert both.mean() > 0.8
    assert np.abs(hu.astype(int) - hu_oblique)[both].mean() < 5
    assert np.abs(hu.astype(int) - hu_oblique[:, :, ::-1])[both].mean() > 30  # the measure does see a mirror image


def test_a_marker_keeps_its_world_position_on_disk_and_lies_in_the_right_octant(tmp_path):
    marker = np.array([44.0, 28.0, 92.0])  # right, anterior, superior of the cube's centre
    affine = grid_affine((40, 40, 40), 8.0, (100, -50, 700))
    ct = thorax((40, 40, 40), affine, centre=(100, -50), lung_z=700)
    index = np.linalg.solve(affine, [*(marker + [100, -50, 700]), 1])[:3]
    assert index == pytest.approx(np.rint(index), abs=1e-9)
    ct.data[tuple(np.rint(index).astype(int))] = 3000
    hu, _ = resample_cube(ct, (100, -50, 700), 320, 40)
    d, h, w = np.unravel_index(hu.argmax(), hu.shape)
    assert (d < 20, h < 20, w < 20) == (True, True, True)
    write_cube(tmp_path / "a.nii.gz", hu, cube_affine((100, -50, 700), 320, 40))
    image = nib.load(tmp_path / "a.nii.gz")
    stored = np.asarray(image.dataobj)
    found = image.affine @ [*np.unravel_index(stored.argmax(), stored.shape), 1]
    assert np.abs(found[:3] - marker - [100, -50, 700]).max() < 1e-3
    assert nib.aff2axcodes(image.affine) == ("L", "P", "I")
    assert stored.dtype == np.int16
    assert image.get_sform(coded=True)[1] == image.get_qform(coded=True)[1] == 1
    assert image.get_qform() == pytest.approx(image.get_sform(), abs=1e-3)


def test_downsampling_averages_instead_of_aliasing():
    noise = np.random.default_rng(0).normal(0, 100, (96, 96, 96)).astype(np.float32)
    hu, _ = resample_cube(CtImage(noise, grid_affine((96,) * 3, 1.0), "noise"), (0, 0, 0), 96, 24)
    assert hu.std() < 15  # a box of 4 x 4 x 4 leaves 12.5, a plain linear sample 35
    stripes = np.where(np.arange(96) % 2, 500, -500)[:, None, None] * np.ones((96, 96, 96))
    hu, _ = resample_cube(CtImage(stripes, grid_affine((96,) * 3, 1.0), "stripes"), (0.5, 0, 0), 96, 24)
    assert np.abs(hu[:, :, 3:-3]).max() < 25


def test_the_mask_ends_where_the_scan_ends_and_outside_is_air():
    ct = CtImage(np.full((20, 16, 10), 30, np.int16), grid_affine((20, 16, 10), (10, 10, 12)), "box")
    hu, mask = resample_cube(ct, (0, 0, 0), 240, 48)
    x, y, z = cube_world((0, 0, 0), 240, 48)
    inside = (np.abs(x) < 100) & (np.abs(y) < 80) & (np.abs(z) < 60)  # voxels reach half a step beyond their centres
    assert np.array_equal(mask, inside)
    assert (hu[inside] == 30).all()
    assert (hu[~inside] == -1024).all()
    far, none = resample_cube(ct, (900, 0, 0), 240, 48)
    assert (far == -1024).all()
    assert not none.any()


@pytest.mark.parametrize("padding", [-2000, -3024, -32768])
def test_padding_counts_as_outside_the_scan_and_metal_is_clipped(padding):
    affine = grid_affine((60, 60, 20), 5.0)
    x, y, _ = world((60, 60, 20), affine)
    data = np.where(np.hypot(x, y) < 120, 40, padding).astype(np.int16)
    data[28:32, 28:32] = 9000
    hu, mask = resample_cube(CtImage(data, affine, "circle"), (0, 0, 0), 100 * np.sqrt(8), 64)
    cx, cy, cz = cube_world((0, 0, 0), 100 * np.sqrt(8), 64)
    radius, height = np.hypot(cx, cy), np.abs(cz)
    assert mask[(radius < 114) & (height < 48)].all()
    assert not mask[radius > 126].any()
    assert set(np.unique(hu[mask == 0])) == {-1024}
    assert hu.min() >= -1024
    assert hu.max() == 3071
    assert (hu[(radius > 30) & (radius < 110) & (height < 48)] == 40).all()


# ------------------------------------------------------------------------------------------------
# Placing the cube


def test_a_scan_that_fits_is_centred_on_itself_and_on_the_body():
    affine = grid_affine((50, 50, 30), 8.0, (10, 5, 300))
    x, y, z = locate_cube(thorax((50, 50, 30), affine, centre=(50, -30), lung_z=340), 360)
    assert z == pytest.approx(300, abs=0.01)
    assert x == pytest.approx(50, abs=4)
    assert y == pytest.approx(-30, abs=4)


@pytest.mark.parametrize(
    ("lung_z", "lungs", "expected"),
    [(-80, True, -75), (250, True, 140), (-260, True, -140), (0, False, 0)],
)
def test_a_long_scan_is_centred_on_the_lungs_within_the_scan(lung_z, lungs, expected):
    shape = (40, 40, 80)  # 640 mm, field of view 360
    z = locate_cube(thorax(shape, grid_affine(shape, 8.0), lung_z=lung_z, lungs=lungs), 360)[2]
    assert z == pytest.approx(expected, abs=8 if expected == -75 else 0.01)


def couch_hu(x, y, z):
    """A thin shell 250 mm wide under the back, off centre, and a solid bar further below."""
    hu = np.full(x.shape, np.nan)
    hu[(np.abs(x + 60) < 125) & (y < -98) & (y > -102)] = 100
    hu[(np.abs(x + 60) < 60) & (y < -118) & (y > -140)] = 300
    return hu


def arm_hu(x, y, z):
    return np.where(np.hypot(x - 165, y) < 38, 40.0, np.nan)


@pytest.mark.parametrize("extra", [couch_hu, arm_hu])
def test_couch_and_a_single_arm_do_not_pull_the_centre(extra):
    shape, spacing = (110, 90, 16), (4.0, 4.0, 10.0)
    x, y, _ = locate_cube(thorax(shape, grid_affine(shape, spacing), extra=extra), 360)
    assert x == pytest.approx(0, abs=4)
    assert y == pytest.approx(0, abs=4)


def test_remove_couch_takes_the_couch_and_leaves_the_patient():
    fov, size = 320, 80
    grid = grid_affine((size,) * 3, fov / size)
    clean, _ = resample_cube(thorax((size,) * 3, grid), (0, 0, 0), fov, size)
    hu, _ = resample_cube(thorax((size,) * 3, grid, extra=couch_hu), (0, 0, 0), fov, size)
    removed = remove_couch(hu, fov / size)
    x, y, _ = cube_world((0, 0, 0), fov, size)
    body = (x / 126) ** 2 + (y / 86) ** 2 < 1
    couch = (hu != clean) & ~body
    assert couch.sum() > 1000
    assert (removed[couch & (y < -104)] == -1024).all()
    assert (removed[body] == hu[body]).all()  # lungs included
    assert removed.dtype == hu.dtype
    assert body_mask(hu, fov / size)[hu < -700].any()  # the lungs belong to the body


def test_a_body_in_centimetres_is_refused():
    ct = thorax((40, 40, 40))
    ct.affine[:3] /= 10
    with pytest.raises(InputError, match=r"no body found.*spacing in mm"):
        locate_cube(ct)


# ------------------------------------------------------------------------------------------------
# Cubes on disk


def write_prepared(folder, size=32, fov=320.0, mask=None):
    ct = thorax()
    hu, scan = resample_cube(ct, (3, -4, 5), fov, size)
    write_cube(folder / "p.nii.gz", hu, cube_affine((3, -4, 5), fov, size))
    write_cube(folder / "p_mask.nii.gz", scan if mask is None else mask, cube_affine((3, -4, 5), fov, size))
    return hu, scan


def test_a_prepared_cube_comes_back_as_it_was(tmp_path):
    mask = np.ones((32, 32, 32), np.uint8)
    mask[:8] = 0
    hu, _ = write_prepared(tmp_path, mask=mask)
    found, scan, affine = read_cube(tmp_path / "p.nii.gz", 320, 32)
    assert found.dtype == np.float32
    assert np.array_equal(found, hu)
    assert np.array_equal(scan, mask)
    assert np.array_equal(affine, cube_affine((3, -4, 5), 320, 32))


def test_a_prepared_cube_is_averaged_down_in_place(tmp_path):
    mask = np.ones((32, 32, 32), np.uint8)
    mask[:3] = 0  # one and a half coarse rows: half covered counts as covered
    hu, _ = write_prepared(tmp_path, mask=mask)
    found, scan, affine = read_cube(tmp_path / "p.nii.gz", 320, 16)
    means = np.array(
        [[[hu[a : a + 2, b : b + 2, c : c + 2].mean() for c in (0, 14)] for b in (8, 20)] for a in (4, 30)]
    )
    assert found[np.ix_([2, 15], [4, 10], [0, 7])] == pytest.approx(means, abs=1e-3)
    assert (scan[0].any(), scan[1:].all()) == (False, True)
    assert np.array_equal(affine, cube_affine((3, -4, 5), 320, 16))
    odd, scan, affine = read_cube(tmp_path / "p.nii.gz", 320, 24)
    assert odd.mean() == pytest.approx(hu.mean(), abs=5)
    assert not scan[0].any()
    assert np.array_equal(affine, cube_affine((3, -4, 5), 320, 24))


def test_any_other_ct_is_placed_and_resampled(tmp_path):
    ct = reoriented(thorax(centre=(20, 10)), "LPS")
    found, _, affine = read_cube(save_nifti(tmp_path / "ct.nii.gz", ct), 240, 24)
    centre = locate_cube(ct, 240)
    assert centre[:2] == pytest.approx((20, 10), abs=4)
    assert np.array_equal(found, resample_cube(ct, centre, 240, 24)[0])
    assert affine == pytest.approx(cube_affine(centre, 240, 24))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIL"])
def test_the_scan_mask_of_any_other_ct_is_placed_with_it(tmp_path, axes):
    ct = thorax(centre=(20, 10))
    inside = CtImage((world(ct.data.shape, ct.affine)[2] < 30).astype(np.int16), ct.affine, "mask")
    save_nifti(tmp_path / "ct.nii.gz", reoriented(ct, axes))
    bare, scan, _ = read_cube(tmp_path / "ct.nii.gz", 240, 24)
    save_nifti(tmp_path / "ct_mask.nii.gz", reoriented(inside, axes))
    found, masked, affine = read_cube(tmp_path / "ct.nii.gz", 240, 24)
    assert np.array_equal(found, bare)
    z = affine[2, 2] * np.arange(24) + affine[2, 3]
    assert np.array_equal(masked[z < 20], scan[z < 20])
    assert not masked[z > 40].any()
    assert scan[z > 40].any()


def test_a_mask_of_another_grid_is_refused(tmp_path):
    write_prepared(tmp_path, mask=np.ones((16, 16, 16), np.uint8))
    with pytest.raises(InputError, match=r"p_mask\.nii\.gz.*grid"):
        read_cube(tmp_path / "p.nii.gz", 320, 32)
    save_nifti(tmp_path / "p.nii.gz", thorax())
    with pytest.raises(InputError, match=r"p_mask\.nii\.gz: the scan mask does not lie on the grid of .*p\.nii\.gz"):
        read_cube(tmp_path / "p.nii.gz", 240, 24)


def test_same_cube_same_bytes(tmp_path):
    hu, _ = write_prepared(tmp_path)
    write_cube(tmp_path / "again.nii.gz", hu, cube_affine((3, -4, 5), 320, 32))
    assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "p.nii.gz").read_bytes()


# ------------------------------------------------------------------------------------------------
# Bad input


SMALL = grid_affine((12,) * 3, 27.0)


def with_header(path, change):
    """Save a good CT, then change its raw header (nibabel repairs what it writes)."""
    save_nifti(path, thorax((12, 12, 12), grid_affine((12,) * 3, 27.0)))
    raw = bytearray(path.read_bytes())
    header = nib.Nifti1Header.from_fileobj(__import__("io").BytesIO(bytes(raw[:348])), check=False)
    change(header)
    raw[:348] = header.binaryblock
    path.write_bytes(raw)
    return path


def set_pixdim(value):
    def change(header):
        header["pixdim"][2] = value

    return change


def set_affine(affine):
    def change(header):
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            header[name] = affine[row]

    return change


def set_qform(b, c, d, shift=0.0):
    """A qform beside the sform of SMALL: its quaternion (0, 0, 1 turns left and right) and a shift."""

    def change(header):
        header["qform_code"] = 1
        for name, value in zip("bcd", (b, c, d)):
            header[f"quatern_{name}"] = value
        for row, name in enumerate("xyz"):
            header[f"qoffset_{name}"] = SMALL[row, 3] + shift * (row == 0)

    return change


def drop_codes(header):
    header["sform_code"] = header["qform_code"] = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_pixdim(0), r"spacing \(pixdim\) is \[27\.0, 0\.0, 27\.0\]"),
        (set_pixdim(-3), r"spacing \(pixdim\)"),
        (set_pixdim(np.nan), r"spacing \(pixdim\)"),
        (set_affine(SMALL @ np.diag([1, 0, 1, 1])), r"spacing is \[27\.0, 0\.0, 27\.0\] mm; expected 0\.05 to 20"),
        (set_affine(SMALL @ np.diag([1e-3, 1e-3, 1e-3, 1])), "expected 0.05 to 20"),
        (set_affine(SMALL @ np.diag([np.nan, 1, 1, 1])), "NaN"),
        (set_affine(np.array([[3.0, 3, 0, 0], [3, 3, 0, 0], [0, 0, 3, 0]])), "singular"),
        (
            set_affine(np.diag([9.0, 9, 18, 1])),
            "spacing is 9 x 9 x 18 mm by its sform, 27 x 27 x 27 by pixdim",
        ),
        (set_qform(0, 0, 1), r"sform and qform place its voxels up to [0-9.]+ mm apart; expected one position"),
        (set_qform(0, 0, 0, 10), "sform and qform place its voxels up to 10 mm apart"),
        (drop_codes, r"states no orientation.*--assume-ras"),
    ],
)
def test_a_useless_position_is_refused(tmp_path, change, words):
    path = with_header(tmp_path / "ct.nii", change)
    with pytest.raises(InputError, match=rf"ct\.nii: .*{words}"):
        read_ct(path)


def test_an_equal_qform_and_pixdim_along_a_sheared_axis_are_no_contradiction(tmp_path):
    path = with_header(tmp_path / "ct.nii", set_qform(0, 0, 0, 0.5))
    with pytest.raises(InputError, match=r"expected 0\.05 to 20"):  # 27 mm, what comes next
        read_ct(path)
    tilted = np.diag([9.0, 9, 9, 1])
    tilted[1, 2] = 3  # 9.5 mm along the axis, 9 mm between slices
    path = with_header(
        tmp_path / "tilt.nii", lambda h: (set_affine(tilted)(h), h["pixdim"].__setitem__(slice(1, 4), 9))
    )
    assert np.array_equal(read_ct(path).affine, tilted)


def test_assume_ras_takes_the_axes_as_right_anterior_superior(tmp_path):
    path = with_header(tmp_path / "ct.nii", lambda header: (drop_codes(header), set_pixdim(13)(header)))
    with pytest.raises(InputError, match=r"expected 0\.05 to 20"):  # the other two axes have 27 mm
        read_ct(path, assume_ras=True)
    path = with_header(tmp_path / "ct.nii", lambda h: (drop_codes(h), h["pixdim"].__setitem__(slice(1, 4), [9, 8, 7])))
    ct = read_ct(path, assume_ras=True)
    assert nib.aff2axcodes(ct.affine) == ("R", "A", "S")
    assert np.diag(ct.affine) == pytest.approx([9, 8, 7, 1])


def test_a_scan_longer_than_any_patient_is_refused(tmp_path):
    ct = CtImage(np.tile(np.int16([-1000, 0]), (200, 4, 2)), np.diag([18.0, 18, 18, 1]), "long")
    with pytest.raises(InputError, match=r"long\.nii: .*more than 3000 mm"):
        read_ct(save_nifti(tmp_path / "long.nii", ct))


HALF = np.repeat(np.int16([-1000, 40]), 256).reshape(8, 8, 8)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (HALF + np.int16(1024), r"all values are positive \(24 to 1064\).*HU \+ 1024"),
        ((HALF > 0).astype(np.uint8), "all values are positive"),
        (np.maximum(HALF, -300), r"no air \(values -300 to 40"),
        (np.where(HALF > 0, 1064, -2000).astype(np.int16), "no air"),  # HU + 1024 with padding
        (HALF / np.float32(1000), "no air"),
        (np.minimum(HALF, -600), "no soft tissue"),
        (HALF[0], r"shape is \(8, 8\); expected a 3D volume"),
        (np.stack([HALF, HALF], -1), r"shape is \(8, 8, 8, 2\); expected a 3D volume"),
        (np.where(HALF > 0, np.nan, HALF).astype(np.float32), "NaN or infinite"),
        (np.where(HALF > 0, np.inf, HALF).astype(np.float32), "NaN or infinite"),
        (HALF.astype(np.complex64), "voxel type is complex64"),
        (np.zeros((8, 8, 8), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), "voxel type"),
    ],
)
def test_what_is_not_a_ct_in_hu_is_refused(tmp_path, data, words):
    nib.save(nib.Nifti1Image(data, np.diag([5.0, 5, 5, 1])), tmp_path / "x.nii.gz")
    with pytest.raises(InputError, match=rf"x\.nii\.gz: .*{words}"):
        read_ct(tmp_path / "x.nii.gz")


def test_a_fourth_axis_of_length_one_and_scaled_integers_are_fine(tmp_path):
    nib.save(nib.Nifti1Image(HALF[..., None], np.diag([5.0, 5, 5, 1])), tmp_path / "x.nii.gz")
    assert np.array_equal(read_ct(tmp_path / "x.nii.gz").data, HALF)
    image = nib.Nifti1Image((HALF // 10 + 200).astype(np.uint8), np.diag([5.0, 5, 5, 1]))
    image.header.set_slope_inter(10, -2000)
    nib.save(image, tmp_path / "y.nii.gz")
    assert np.array_equal(read_ct(tmp_path / "y.nii.gz").data, HALF)


def test_truncated_missing_and_foreign_files_are_named(tmp_path):
    good = save_nifti(tmp_path / "good.nii.gz", thorax())
    raw = good.read_bytes()
    (tmp_path / "half.nii.gz").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "head.nii.gz").write_bytes(raw[:20])
    (tmp_path / "text.nii.gz").write_text("not a CT")
    (tmp_path / "short.nii").write_bytes(gzip.decompress(raw)[:5000])
    (tmp_path / "noise.nii").write_bytes(b"\x07" * 5000)
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    for name, words in (
        ("half.nii.gz", "truncated or damaged gzip"),
        ("head.nii.gz", "(truncated|not a readable)"),
        ("text.nii.gz", "(damaged gzip|not a readable)"),
        ("short.nii", "not a readable NIfTI"),
        ("noise.nii", "not a readable NIfTI"),
        ("empty.nii.gz", "(truncated|not a readable)"),
        ("gone.nii.gz", "no such file"),
    ):
        with pytest.raises(InputError, match=rf"{name}: {words}"):
            read_ct(tmp_path / name)
    (tmp_path / "ct.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"ct\.jpg: unknown format; expected \.nii\.gz"):
        read_ct(tmp_path / "ct.jpg")


# ------------------------------------------------------------------------------------------------
# Finding


def touch(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_ids_come_from_names_and_collisions_from_the_folders(tmp_path):
    for name in ("plain.nii.gz", "a b(1).nii", "x/ct.nii.gz", "y/ct.mha", ".hidden.nii", ".cache/z.nii", "notes.txt"):
        touch(tmp_path / name)
    touch(tmp_path / "series" / "IM0001", b"\0" * 128 + b"DICM")
    touch(tmp_path / "series" / "DICOMDIR", b"\0" * 128 + b"DICM")
    found = {source.patient_id: source for source in find_cts(tmp_path)}
    assert list(found) == sorted(["plain", "a_b_1", "x_ct", "y_ct", "series"])
    assert found["series"].path == tmp_path / "series"
    kinds = {patient: source.kind for patient, source in found.items()}
    assert kinds == {"plain": "nifti", "a_b_1": "nifti", "x_ct": "nifti", "y_ct": "image", "series": "dicom"}


def test_ids_that_still_collide_and_folders_without_cts_are_errors(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        find_cts(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no CT found"):
        find_cts(tmp_path)
    touch(tmp_path / "case 1.nii")
    touch(tmp_path / "Case_1.nii.gz")
    with pytest.raises(InputError, match=r"(?i)case.1\.nii.* and .*case.1\.nii.* would both become patient"):
        find_cts(tmp_path)


# ------------------------------------------------------------------------------------------------
# SimpleITK formats. SimpleITK writes the NIfTI too, so positions are compared with its own conversion.


def sitk_image(sitk, turn=None):
    data = thorax((20, 18, 16), grid_affine((20, 18, 16), (12, 14, 15))).data
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    image.SetSpacing((1.5, 1.75, 3.0))
    image.SetOrigin((-20.0, 31.0, 444.0))
    image.SetDirection((np.eye(3) if turn is None else turn).ravel())
    return image


def write_series(sitk, folder, image, drop=(), modality="CT", uid="1.2.826.0.1.3680043.2.1125.1"):
    """Write one axial DICOM file per slice, in an order that is not that of the positions."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    turn = np.reshape(image.GetDirection(), (3, 3))
    for k in range(image.GetDepth()):
        if k in drop:
            continue
        part = image[:, :, k]
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{k + 1}",
            "0008|0060": modality,
            "0010|0010": "Nobody^Special",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.9",
            "0020|000e": uid,
            "0020|0013": str(k),
            "0020|0032": "\\".join(f"{v:.6f}" for v in position),
            "0020|0037": "\\".join(f"{v:.8f}" for v in (*turn[:, 0], *turn[:, 1])),
        }
        for key, value in tags.items():
            part.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"im{(k * 7) % 16:02d}.dcm"))
        writer.Execute(part)
    return folder


@pytest.fixture(scope="module")
def sitk():
    return pytest.importorskip("SimpleITK")


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_metaimage_and_nrrd_equal_the_nifti(tmp_path, sitk, suffix):
    image = sitk_image(sitk, rotation(10, 20, -30))
    sitk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / f"ct{suffix}"))
    expected, found = read_ct(tmp_path / "ct.nii.gz"), read_ct(tmp_path / f"ct{suffix}")
    assert np.array_equal(found.data, expected.data)
    assert found.affine == pytest.approx(expected.affine, abs=1e-3)


@pytest.mark.parametrize("turn", [np.eye(3), rotation(10, 20, -30), rotation(z=180)])
def test_a_dicom_series_equals_the_nifti(tmp_path, sitk, turn):
    image = sitk_image(sitk, turn)
    sitk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    (source,) = find_cts(write_series(sitk, tmp_path / "case7", image))
    assert (source.patient_id, source.kind) == ("case7", "dicom")
    expected, found = read_ct(tmp_path / "ct.nii.gz"), read_ct(source.path, source.kind)
    assert np.array_equal(found.data, expected.data)
    assert found.affine == pytest.approx(expected.affine, abs=1e-3)


def test_a_tilted_gantry_keeps_its_shear(tmp_path, sitk):
    # Slices stay axial while their positions drift: an oblique step that SimpleITK's own geometry drops.
    image = sitk_image(sitk)
    folder = write_series(sitk, tmp_path / "tilt", image)
    reader, writer = sitk.ImageFileReader(), sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for path in folder.iterdir():
        reader.SetFileName(str(path))
        part = reader.Execute()
        x, y, z = (float(v) for v in part.GetMetaData("0020|0032").split("\\"))
        part = part[:, :, 0]
        for key in reader.GetMetaDataKeys():
            part.SetMetaData(key, reader.GetMetaData(key))
        part.SetMetaData("0020|0032", f"{x}\\{y + 0.25 * (z - 444)}\\{z}")
        writer.SetFileName(str(path))
        writer.Execute(part)
    assert read_ct(folder).affine[:3, 2] == pytest.approx([0, -0.75, 3.0], abs=1e-4)


def test_gaps_wrong_modality_and_mixed_series_are_refused(tmp_path, sitk):
    image = sitk_image(sitk)
    gap = write_series(sitk, tmp_path / "gap", image, drop=(5,))
    with pytest.raises(InputError, match=r"gap: slice spacing is not uniform \(mostly 3 mm, but 6 mm"):
        read_ct(gap)
    with pytest.raises(InputError, match="modality is MR; expected CT"):
        read_ct(write_series(sitk, tmp_path / "mr", image, modality="MR"))
    both = write_series(sitk, tmp_path / "both", image)
    for path in both.iterdir():
        path.rename(path.with_suffix(".one"))
    write_series(sitk, both, image, uid="1.2.826.0.1.3680043.2.1125.2")
    with pytest.raises(InputError, match=r"both: 2 DICOM series.*each CT into its own folder"):
        read_ct(both)


def test_truncated_and_colour_images_are_refused(tmp_path, sitk):
    image = sitk_image(sitk)
    sitk.WriteImage(image, str(tmp_path / "ct.mhd"))
    raw = tmp_path / "ct.raw"
    raw.write_bytes(raw.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"ct\.mhd: SimpleITK cannot read it"):
        read_ct(tmp_path / "ct.mhd")
    sitk.WriteImage(sitk.Compose(image, image, image), str(tmp_path / "rgb.mha"))
    with pytest.raises(InputError, match=r"rgb\.mha: 3 values per voxel"):
        read_ct(tmp_path / "rgb.mha")
    sitk.WriteImage(image[:, :, 3], str(tmp_path / "flat.mha"))
    with pytest.raises(InputError, match=r"flat\.mha: shape is \(20, 18\)"):
        read_ct(tmp_path / "flat.mha")


def test_without_simpleitk_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    (tmp_path / "ct.mha").write_bytes(b"x")
    with pytest.raises(InputError, match=r"ct\.mha: .*pip install SimpleITK"):
        read_ct_module.read_ct(tmp_path / "ct.mha")
