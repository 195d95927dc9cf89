"""Pictures: radiological display, content follows the input, files are whole."""

import numpy as np
from PIL import Image
from tiny_data import make_hu

from figures import panel, planes, save_panel
from projector import hu_to_unit


def test_planes_are_displayed_as_a_radiologist_sees_them():
    volume = np.zeros((8, 8, 8))
    volume[4, 0, 0] = 1  # middle height, anterior, patient right
    axial, _, _ = planes(volume)
    assert axial[0, 0] == 1  # top left
    volume[:] = 0
    volume[0, 4, 7] = 1  # head end, patient left
    assert planes(volume)[1][0, 7] == 1  # coronal: top right
    volume[:] = 0
    volume[7, 0, 4] = 1  # foot end, anterior
    assert planes(volume)[2][7, 0] == 1  # sagittal: bottom left


def test_the_panel_shows_what_it_is_given(tmp_path):
    truth = hu_to_unit(make_hu(0, 32).astype(np.float32))
    xrays = np.stack([truth.sum(1), truth.sum(2)]) / 20
    with_truth = np.asarray(panel(xrays, truth, truth, title="case"), dtype=int)
    other = np.asarray(panel(xrays, truth * 0.8, truth, title="case"), dtype=int)
    assert with_truth.shape == other.shape
    width = with_truth.shape[1] // 4
    assert np.abs(with_truth[:, :width] - other[:, :width]).max() == 0  # the X-rays are the same
    assert np.abs(with_truth[:, width + 10 :] - other[:, width + 10 :]).mean() > 2
    save_panel(tmp_path / "case.png", xrays, truth)
    with Image.open(tmp_path / "case.png") as picture:
        picture.load()
        assert picture.size[0] == with_truth.shape[1]
        assert picture.size[1] < with_truth.shape[0]
    assert [p.name for p in tmp_path.iterdir()] == ["case.png"]
