"""Bounds on the detail that can be known: the split, the rays' share where it is known, a fit, the command."""

import pytest
import torch

from tests.helpers.tiny_data import make_checkpoint, make_dataset
from tools import fine_detail
from xray2ct.evaluation.error_split import split_frequencies
from xray2ct.files import InputError, read_json
from xray2ct.geometry.projector import Geometry


def test_detail_has_no_area_averages():
    torch.manual_seed(0)
    coarse, _, detail = split_frequencies(torch.rand(1, 1, 16, 16, 16))
    assert coarse.shape == (1, 1, 4, 4, 4)
    assert torch.nn.functional.avg_pool3d(detail, 4).abs().max() < 1e-5


def test_the_rays_hold_what_is_constant_along_them_and_little_of_noise():
    # Parallel rays: a pattern that only changes across the PA view's rays is one of its back projections.
    geometry, size = Geometry(kind="parallel"), 16
    pattern = torch.sin(torch.arange(size) * 2 * torch.pi * 6 / size)[None, None, None, None, :]
    along = pattern.expand(1, 1, size, size, size).contiguous()
    assert fine_detail.share_in_rays(split_frequencies(along)[2], geometry, size, 40) > 0.9
    noise = torch.randn(1, 1, size, size, size, generator=torch.Generator().manual_seed(0))
    detail = split_frequencies(noise)[2]
    few, many = (fine_detail.share_in_rays(detail, geometry, size, steps) for steps in (4, 40))
    assert 0 < few <= many < 2 * size**2 / size**3 + 0.05  # 2 size^2 measurements of size^3 voxels


def test_a_network_learns_detail_that_follows_from_the_coarse_volume_and_none_that_does_not():
    torch.manual_seed(0)
    cases = []
    for _ in range(3):
        smooth = torch.nn.functional.interpolate(torch.rand(1, 1, 6, 6, 6), size=(32, 32, 32), mode="trilinear")
        coarse, _, detail = split_frequencies((8 * (smooth - 0.5)).sigmoid())
        cases.append((torch.rand_like(coarse), coarse, detail))
    from_truth, from_noise = (
        fine_detail.share_predicted(fine_detail.fit_detail(cases[:2], given, 60), cases[2], given)
        for given in ("true", "predicted")
    )
    assert from_truth > 0.3
    assert from_noise < 0.15


def test_the_command_measures_patients_that_were_not_trained_on(tmp_path, capsys):
    root = make_dataset(tmp_path / "data")
    base = make_checkpoint(tmp_path / "base.pt", root)
    words = ["--base", str(base), "--data", str(root), "--steps", "2", "--ray-steps", "2", "--xray-size", "32"]
    assert fine_detail.main([*words, "--output", str(tmp_path / "out")]) == 0
    result = read_json(tmp_path / "out" / "fine_detail.json")
    assert {given: len(shares) for given, shares in result["removed"].items()} == {"predicted": 2, "true": 2}
    assert all(0 <= share < 1 for share in result["in_the_rays"])
    page = (tmp_path / "out" / "fine_detail.md").read_text()
    assert "| the true 64^3 volume | " in page
    assert result["patients"]
    assert not set(result["patients"]) & set(result["fitted_on"])
    with pytest.raises(InputError, match="--steps is 0; expected at least 1"):
        fine_detail.main([*words, "--steps", "0"])
