"""Training the networks that read films: poses and boxes by hand, films cut as they say, patients."""

import nibabel as nib
import numpy as np
import pytest

from tests.helpers.tiny_data import make_dataset
from tools import film_templates
from xray2ct.files import InputError
from xray2ct.imaging.cube_files import mask_path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = make_dataset(tmp_path_factory.mktemp("film_templates") / "data")
    for path in sorted(root.glob("p?/p?.nii.gz")):
        volume = nib.load(path)
        nib.save(nib.Nifti1Image(np.ones(volume.shape, np.uint8), volume.affine), mask_path(path))
    return root


def test_extents_hold_98_per_cent_of_the_volume():
    lungs = np.zeros((100, 100, 100))
    lungs[20:70, 10:60, 40:90] = 1
    extents = film_templates._extents(lungs)
    # 1 % of 50 rows at each end: half a row.
    np.testing.assert_allclose(extents, [[0.205, 0.695], [0.105, 0.595], [0.405, 0.895]], atol=1e-9)


@pytest.fixture(scope="module")
def ct(root):
    return film_templates.render_poses(root / "p0" / "p0.nii.gz", np.random.default_rng(0), poses=2)


def test_boxes_lie_where_the_lungs_are_dark(ct):
    assert ct.xrays.shape == (2, 2, 96, 96)
    assert ct.rows == (0, 1)
    assert film_templates.whole(ct)
    for pose in range(2):
        top, bottom, left, right = ct.boxes[pose, 0]
        assert bottom - top == pytest.approx(ct.sizes_mm[pose, 0] * 96 / 360)
        assert right - left == pytest.approx(ct.sizes_mm[pose, 1] * 96 / 360)
    # ORGANS of the helper: 250 mm high at most, 245 mm wide, 150 deep, all 0.9 to 1.05 times.
    assert 190 < ct.sizes_mm[0, 0] < 265
    assert 190 < ct.sizes_mm[0, 1] < 260
    assert 110 < ct.sizes_mm[0, 2] < 160
    top, bottom, left, right = ct.boxes[0, 0].round().astype(int)
    inside = ct.xrays[0, 0, (top + bottom) // 2, left + 12]  # in the right lung
    assert inside < 0.7 * ct.xrays[0, 0, (top + bottom) // 2, (left + right) // 2]  # heart and spine


def test_a_films_window_says_where_it_was_cut(root):
    v, u = np.meshgrid(np.arange(96.0), np.arange(96.0), indexing="ij")
    for seed in range(6):
        rows, window = film_templates._cropped(v, (0.1, 0.9), np.random.default_rng(seed), 0)
        columns, same = film_templates._cropped(v * 0 + u, (0.1, 0.9), np.random.default_rng(seed), 0)
        assert window[0] >= 0
        assert rows[32, 32] == pytest.approx((window[0] + window[1]) / 2, abs=1)
        middle = (same[2] + same[3]) / 2
        assert columns[32, 32] == pytest.approx(middle, abs=1.5) or not 0 < middle < 95


def test_patients_that_are_not_there_are_named(root, tmp_path):
    (tmp_path / "ids.txt").write_text("p0 nobody", encoding="utf-8")
    with pytest.raises(InputError, match="nobody"):
        film_templates.find_patients(root, tmp_path / "ids.txt")
    assert [path.name for path in film_templates.find_patients(root, None)] == ["p0.nii.gz", "p1.nii.gz", "p2.nii.gz"]
