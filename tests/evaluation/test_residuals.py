"""Projection residuals: correlations by hand, the misplaced control."""

import numpy as np
import pytest
import torch

from xray2ct.data.checks.xray_comparison import ncc
from xray2ct.evaluation.residuals import gradient_ncc, misplaced


def test_ncc_by_hand():
    picture = np.array([[0.0, 1.0], [2.0, 5.0]])
    assert ncc(picture, 3 * picture + 1) == pytest.approx(1)
    assert ncc(picture, -picture) == pytest.approx(-1)
    # (-1, 1) x 2 against (-1, -1, 1, 1): orthogonal
    assert ncc([[0, 2], [0, 2]], [[0, 0], [2, 2]]) == 0
    assert ncc(picture, np.ones((2, 2))) == 0
    ramp = np.arange(9.0).reshape(3, 3) ** 2
    assert gradient_ncc(ramp, 2 * ramp + 7) == pytest.approx(1)


def test_the_control_is_five_millimetres_lower_and_turned():
    volume = torch.zeros(72, 72, 72)  # voxels of 5 mm
    volume[30:40, 30:42, 30:42] = 1  # a block in the middle
    volume[30:40, 35:37, 50:60] = 1  # an arm towards the left
    moved = misplaced(volume, 360.0)
    centres = [np.array(np.nonzero(v.numpy() > 0.5)).mean(axis=1) for v in (volume, moved)]
    assert centres[1][0] - centres[0][0] == pytest.approx(1, abs=0.05)
    arms = [np.nonzero(v[34].numpy()[:, 50:60] > 0.5)[0].mean() - 35.5 for v in (volume, moved)]
    # 5 degrees at 19 voxels from the axis: 1.7 voxels.
    assert abs(arms[1] - arms[0]) == pytest.approx(19 * np.tan(np.deg2rad(5)), abs=0.5)
