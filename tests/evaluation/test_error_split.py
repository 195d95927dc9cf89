"""The error of stage 2 in two parts: values worked out by hand, and what the parts of a clean error are."""

import pytest
import torch

from xray2ct.evaluation.error_split import ERROR_SPLIT, add_shares, rmse_of_parts
from xray2ct.evaluation.protocols import Case
from xray2ct.models.upsampling import upsample_spline


def test_an_offset_is_low_and_a_checkerboard_is_high():
    truth = torch.full((16, 16, 16), 0.5)
    board = (torch.arange(16)[:, None, None] + torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    scores = rmse_of_parts(Case(truth + 0.01 + 0.02 * board, truth))  # of a window of 2,500 HU
    assert scores["low_rmse_hu"] == pytest.approx(25.0, rel=1e-3)
    assert scores["high_rmse_hu"] == pytest.approx(50.0, rel=1e-3)


def test_the_parts_of_an_interpolated_volume_are_stage_1_s_error_and_what_interpolation_lacks():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(16, 16, 16, generator=generator)
    true_coarse = torch.nn.functional.avg_pool3d(truth[None, None], 4)
    coarse = true_coarse + 0.1 * torch.randn(true_coarse.shape, generator=generator)
    scores = rmse_of_parts(Case(upsample_spline(coarse)[0, 0], truth))
    low = upsample_spline(coarse - true_coarse).square().mean().sqrt().item()
    high = (truth - upsample_spline(true_coarse)[0, 0]).square().mean().sqrt().item()
    assert scores["low_rmse_hu"] == pytest.approx(2500 * low, rel=1e-4)
    assert scores["high_rmse_hu"] == pytest.approx(2500 * high, rel=1e-4)


def test_shares_removed_by_hand():
    rows = [
        {"method": method, "low_rmse_hu": low, "high_rmse_hu": high}
        for method, low, high in (("refined", 30.0, 44.0), ("cubic_consistent", 60.0, 40.0), ("perfect", 0.0, 40.0))
    ]
    add_shares(rows)
    assert [row["low_removed"] for row in rows] == [0.75, 0, 1]
    assert [row["high_removed"] for row in rows] == pytest.approx([-0.21, 0, 0])
    assert [set(ERROR_SPLIT.columns) <= set(row) for row in rows] == [True] * 3


def test_without_an_error_there_is_no_share():
    rows = [{"method": "cubic_consistent", "low_rmse_hu": 0.0, "high_rmse_hu": 1.0}]
    add_shares(rows)
    assert (rows[0]["low_removed"], rows[0]["high_removed"]) == (None, 0)
