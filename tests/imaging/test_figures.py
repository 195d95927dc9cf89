"""Pictures: radiological display, content follows the input, files are whole."""

import numpy as np
import torch
from PIL import Image

from tests.helpers.tiny_data import make_hu
from xray2ct.geometry.projector import hu_to_unit
from xray2ct.imaging.figures import panel, planes, save_panel


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
    changed = np.abs(np.asarray(panel(xrays, truth * 0.8, truth, title="case"), dtype=int) - with_truth)
    left = with_truth.shape[1] - 3 * 262  # three columns of slices at the right
    assert changed[:, :left].max() == 0  # the X-rays are the same
    prediction, target, difference = np.split(changed[28:, left:], 3)
    assert prediction.mean() > 10
    assert target.max() == 0
    assert difference.mean() > 10
    # Without a difference its tiles are black but for captions and letters.
    assert (with_truth[28:, left:][2 * 284 : 2 * 284 + 256, :256] > 16).mean() < 0.02
    save_panel(tmp_path / "case.png", torch.from_numpy(xrays), torch.from_numpy(truth))
    with Image.open(tmp_path / "case.png") as picture:
        picture.load()
        assert picture.size == (5 * 262 + 6, 6 + 284)  # two X-rays and three slices in one row
    assert [p.name for p in tmp_path.iterdir()] == ["case.png"]


def test_a_panel_may_show_several_predictions_and_the_difference_of_the_last():
    volumes = {"first": np.full((4, 4, 4), 0.5), "last": np.full((4, 4, 4), 0.1)}
    xrays, target = np.full((2, 8, 8), 0.5), np.full((4, 4, 4), 0.1)
    picture = np.asarray(panel(xrays, volumes, target))
    alone = np.asarray(panel(xrays, volumes["last"], target))
    rows = (picture.shape[0] - alone.shape[0], 284)
    assert rows[0] == rows[1]  # a row of tiles more
    middle = picture[40:-1:284, -100]  # in the last column's tiles
    assert len(middle) == 4
    assert middle[0] > middle[1] == middle[2] > middle[3]  # first, last, truth; no difference is black
    assert middle[3] == 0


def test_the_display_window_is_in_hounsfield_units():
    xrays = np.zeros((2, 32, 32))
    for hu, grey in ((-1000, 0), (-300, 128), (400, 255), (1000, 255)):
        for window in ((-1024.0, 1476.0), (-1000.0, 1000.0)):  # the same HU, whatever the network's window
            volume = np.full((16, 16, 16), hu_to_unit(np.float32(hu), window))
            tile = np.asarray(panel(xrays, volume, hu_window=window))[134, 6 + 2 * 262 + 128]
            assert abs(int(tile) - grey) <= 1
