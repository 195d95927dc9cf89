"""Phantoms: reproducible files, plausible Hounsfield units, anatomy on the right sides of the NIfTI world."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from functools import lru_cache

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from tests.helpers.paths import ROOT
from tools.make_phantoms import main
from xray2ct.data.phantoms import make_phantom
from xray2ct.files import InputError
from xray2ct.imaging.body import locate_cube
from xray2ct.imaging.read_ct import read_ct

COARSE_MM = 6.0
INDICES = (0, 1, 2, 3, 4)


@lru_cache(maxsize=len(INDICES))
def coarse(index: int):
    """HU ``(i, j, k)`` and the RAS world coordinates (x, y, z) of its voxels on open axes."""
    hu, affine = make_phantom(0, index, COARSE_MM)
    axes = [affine[a, a] * np.arange(n) + affine[a, 3] for a, n in enumerate(hu.shape)]
    return hu, np.meshgrid(*axes, indexing="ij", sparse=True)


def body_and_lungs(hu):
    """Masks of the body (with what it contains) and of the lungs, from thresholds alone."""
    parts, _ = ndimage.label(hu > -400)
    body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    body = np.stack([ndimage.binary_fill_holes(body[:, :, k]) for k in range(hu.shape[2])], axis=2)
    parts, _ = ndimage.label(body & (hu < -650) & (hu > -930))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return body, np.isin(parts, np.flatnonzero(sizes > 0.1 * sizes.max()))  # not the rim of the stomach's air


def mean_of(coordinate, mask):
    return float(np.broadcast_to(coordinate, mask.shape)[mask].mean())


def run(output, *options):
    return main(["--output", str(output), "--count", "2", "--spacing-mm", "9", *options])


def test_same_seed_gives_the_same_bytes_for_any_number_of_workers(tmp_path):
    run(tmp_path / "one", "--seed", "3")
    run(tmp_path / "two", "--seed", "3", "--workers", "2")
    names = ["phantom_0000.nii.gz", "phantom_0001.nii.gz"]
    for folder in ("one", "two"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    first, second = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in ("one", "two"))
    assert first == second
    assert first[0] != first[1]


def test_gzip_header_has_neither_time_nor_name(tmp_path):
    run(tmp_path)
    content = (tmp_path / "phantom_0000.nii.gz").read_bytes()
    assert content[:2] == b"\x1f\x8b"
    assert content[3] == 0  # flags (RFC 1952): no name, no comment, no extra field
    assert content[4:8] == bytes(4)  # modification time
    assert len(gzip.decompress(content)) > 352


def test_seed_and_index_change_the_phantom():
    reference, _ = make_phantom(0, 0, 9.0)
    for seed, index in ((0, 1), (1, 0)):
        other, _ = make_phantom(seed, index, 9.0)
        assert other.shape != reference.shape or np.abs(other.astype(int) - reference).mean() > 20


def test_anatomy_does_not_depend_on_spacing():
    volumes = []
    for spacing in (6.0, 9.0):
        hu, affine = make_phantom(0, 1, spacing)
        np.testing.assert_allclose(np.diag(affine), [spacing] * 3 + [1])
        volumes.append(body_and_lungs(hu)[0].sum() * spacing**3)
    assert volumes[0] == pytest.approx(volumes[1], rel=0.04)


def test_file_reads_back_as_canonical_nifti_with_ct_spacing(tmp_path):
    main(["--output", str(tmp_path), "--count", "1", "--seed", "5"])
    image = nib.load(tmp_path / "phantom_0000.nii.gz")
    shape, affine = image.shape, np.diag([*image.header.get_zooms(), 1.0])
    affine[:3, 3] = image.affine[:3, 3]
    np.testing.assert_allclose(np.abs(image.affine @ [*np.divide(shape, 2), 1])[:2], 0, atol=15)  # body at x = y = 0
    assert image.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.affine, affine, atol=1e-3)
    np.testing.assert_allclose(image.get_qform(), affine, atol=1e-3)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    spacing = np.array(image.header.get_zooms())
    assert (spacing[:2] >= 2.0).all()
    assert (spacing[:2] <= 2.6).all()
    assert 2.5 <= spacing[2] <= 5.0
    assert 300 <= spacing[2] * shape[2] <= 365
    assert image.header.get_xyzt_units()[0] == "mm"


def test_file_passes_the_checks_of_preparation(tmp_path):
    run(tmp_path, "--seed", "2")
    path = tmp_path / "phantom_0001.nii.gz"
    ct = read_ct(path)
    hu, affine = make_phantom(2, 1, 9.0)
    np.testing.assert_array_equal(ct.data, hu)
    np.testing.assert_allclose(ct.affine, affine, atol=1e-3)
    middle = affine @ [*(np.array(hu.shape) - 1) / 2, 1]
    np.testing.assert_allclose(locate_cube(ct), middle[:3], atol=25)  # the body is found, not the margin


@pytest.mark.parametrize("index", INDICES)
def test_hounsfield_units_are_those_of_a_chest(index):
    hu, _ = coarse(index)
    assert hu.dtype == np.int16
    assert hu.min() >= -1024
    assert 350 < hu.max() <= 3071
    body, lungs = body_and_lungs(hu)
    assert 0.35 < body.mean() < 0.85
    for axis in (0, 1):  # air all around, so that the body is not cut
        assert not body.take([0, -1], axis=axis).any()
    assert 0.07 < lungs.sum() / body.sum() < 0.40
    inside = hu[body]
    assert 0.10 < ((inside > -150) & (inside < -40)).mean() < 0.45  # fat
    assert 0.25 < ((inside > 0) & (inside < 100)).mean() < 0.70  # muscle, blood, organs
    assert 0.02 < (inside > 150).mean() < 0.12  # bone
    assert np.median(hu[lungs]) == pytest.approx(-850, abs=80)
    assert np.median(hu[~body]) == pytest.approx(-1000, abs=10)


@pytest.mark.parametrize("index", INDICES)
def test_sides_of_the_anatomy(index):
    """+x is the patient's right, +y anterior, +z superior."""
    hu, (x, y, z) = coarse(index)
    body, lungs = body_and_lungs(hu)
    middle_x, middle_y = mean_of(x, body), mean_of(y, body)
    soft = (hu > 0) & (hu < 120)

    # Heart: soft tissue between the lungs, in front of the spine, in the lower half of the chest.
    between = np.maximum.accumulate(lungs, axis=0) & np.maximum.accumulate(lungs[::-1], axis=0)[::-1]
    level = mean_of(z, lungs)
    heart = between & soft & (z < level) & (z > level - 60) & (y > middle_y - 20)
    assert mean_of(x, heart) < middle_x - 5

    # Liver: more solid tissue right than left, below the lungs; the stomach's air is on the left.
    rows = np.flatnonzero(lungs.sum(axis=(0, 1)) > 0.25 * lungs.sum(axis=(0, 1)).max())
    below = z < float(z.ravel()[rows[0]]) - 5
    right, left = (body & soft & below & (side * (x - middle_x) > 20) for side in (1, -1))
    assert right.sum() > 1.1 * left.sum()
    assert level > mean_of(z, right) + 40  # lungs above the liver

    # Spine: most bone of the midline lies at the back.
    bone = (hu > 150) & (np.abs(x - middle_x) < 25)
    assert (bone & (y < middle_y - 20)).sum() > 2 * (bone & (y > middle_y)).sum()

    # Airway: air beside the lungs in the midline of the upper third of the scan, none at its bottom.
    air = body & ~lungs & (hu < -500) & (np.abs(x - middle_x) < 20)
    assert air[:, :, -(hu.shape[2] // 3) :].any()
    assert not air[:, :, :3].any()


def test_right_lung_is_shorter_and_larger_on_average():
    """The liver lifts the right dome, the heart takes the left lung's room."""
    lift, ratio = [], []
    for index in INDICES:
        hu, (x, y, z) = coarse(index)
        body, lungs = body_and_lungs(hu)
        aside, back = x - mean_of(x, body), y < mean_of(y, body) - 20  # behind the heart
        bottoms = []
        for side in (1, -1):
            lowest = np.where(lungs & back & (side * aside > 45) & (side * aside < 90), z, np.inf).min(axis=2)
            bottoms.append(np.median(lowest[np.isfinite(lowest)]))
        lift.append(bottoms[0] - bottoms[1])
        ratio.append((lungs & (aside > 0)).sum() / (lungs & (aside < 0)).sum())
    assert np.mean(lift) > 4
    assert np.mean(ratio) > 1.05


def test_body_and_organs_vary_like_a_population():
    """Standard deviations in mm that a mean volume cannot follow; widths of adults with raised arms."""
    width, depth, lung_height, lung_litres = [], [], [], []
    for index in range(8):
        hu, _ = make_phantom(1, index, 8.0)
        body, lungs = body_and_lungs(hu)
        chest = body[:, :, lungs.any(axis=(0, 1))]
        width.append(8.0 * chest.any(axis=(1, 2)).sum())
        depth.append(8.0 * chest.any(axis=(0, 2)).sum())
        lung_height.append(8.0 * (lungs.sum(axis=(0, 1)) > 5).sum())
        lung_litres.append(lungs.sum() * 8.0**3 / 1e6)
    assert 280 < np.mean(width) < 390
    assert 190 < np.mean(depth) < 300
    for values in (width, depth, lung_height):
        assert 5 < np.std(values) < 50
    assert np.std(lung_litres) / np.mean(lung_litres) > 0.1


def test_existing_files(tmp_path, capsys):
    run(tmp_path)
    path = tmp_path / "phantom_0001.nii.gz"
    content = path.read_bytes()
    assert run(tmp_path) == 0  # the same content: nothing to complain about

    path.write_bytes(b"somebody's own scan")
    with pytest.raises(InputError, match=r"phantom_0001\.nii\.gz.*--overwrite"):
        run(tmp_path)
    assert path.read_bytes() == b"somebody's own scan"
    run(tmp_path, "--overwrite")
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 2  # no temporary files left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], r"--count is 0.*at least 1"),
        (["--count", "-3"], r"--count is -3"),
        (["--seed", "-1"], r"--seed is -1.*at least 0"),
        (["--workers", "0"], r"--workers is 0"),
        (["--spacing-mm", "0"], r"--spacing-mm is 0.*mm"),
        (["--spacing-mm", "nan"], r"--spacing-mm is nan"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, options, message):
    output = tmp_path / "phantoms"
    with pytest.raises(InputError, match=message):
        run(output, *options)
    assert not output.exists()


def test_output_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("kept")
    with pytest.raises(InputError, match=r"notes\.txt is a file"):
        run(path)
    with pytest.raises(InputError, match=r"--output .*cannot be written \(Not a directory\)"):
        run(path / "phantoms")
    assert path.read_text() == "kept"


@pytest.mark.skipif(os.name == "nt", reason="process groups of POSIX")
def test_workers_end_with_a_command_that_was_killed(tmp_path):
    words = ["--output", str(tmp_path), "--count", "60", "--spacing-mm", "8", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "tools.make_phantoms", *words], cwd=ROOT, start_new_session=True)
    while not list(tmp_path.glob("*.nii.gz")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    except ProcessLookupError:
        return
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("its workers were still there after a minute")
