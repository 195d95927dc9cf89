"""Lifting inside the networks against physics: where features land in mm, what is averaged, where both views agree."""

import pytest
import torch
from torch import nn

from hybrid_vit_cascade.blocks import PriorLifting
from xray2ct.geometry.lifting import averaged_to, lift_features, lift_view
from xray2ct.geometry.projector import Geometry
from xray2ct.models.baselines import to_grid
from xray2ct.models.blocks import Lifting, lift_views

ADMITTED = [24, 40, 48, 80, 64]  # volume sizes; the networks also work at a half, a quarter and an eighth of them
MAPS = [32, 64, 128]  # of X-ray features


def detector_mm(geometry, size):
    """Maps ``(1, 2, 2, *size)`` of their own pixels' places on the detector: rows, then columns, in mm."""
    rows, columns = (((torch.arange(n) + 0.5) / n - 0.5) * geometry.detector_mm for n in size)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([rows, columns])[None, None].expand(1, 2, -1, -1, -1).contiguous()


def places_mm(geometry, view, size):
    """Where each voxel of a grid projects: ``(2, D, H, W)``, rows and columns in mm."""
    z, y, x = torch.meshgrid(*(geometry.voxel_centres_mm(n) for n in size), indexing="ij")
    return torch.stack([place.expand(size) for place in geometry.project(view, z, y, x)])


def lift_direct(maps, geometry, size):
    """The direct model's and the refiner's lifting, its layers set to pass both views through."""
    layer = Lifting(2, 2, 4)
    with torch.no_grad():
        for reduce in layer.reduce:
            pass_through(reduce)
        layer.fuse.weight.copy_(torch.eye(4, 6).view(4, 6, 1, 1, 1))
        layer.fuse.bias.zero_()
        return layer(maps.flatten(0, 1), geometry, size).unflatten(1, (2, 2))


def pass_through(layer):
    layer.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
    layer.bias.zero_()


def lift_cascade(maps, geometry, size):
    reduce = nn.ModuleList(nn.Identity() for _ in range(2))
    return torch.stack(lift_views(reduce, maps.flatten(0, 1), geometry, size), dim=1)


def allowed_mm(geometry, pixels, cells):
    """Rounding where nothing or whole pixels are averaged; else what a pixel cut in two costs, a box of one value."""
    if pixels < 2 * cells or pixels % cells == 0:
        return 0.01
    return 0.125 * (geometry.detector_mm / pixels) ** 2 / (geometry.detector_mm / cells) + 0.01


LIFTINGS = pytest.mark.parametrize("lift", [lift_direct, lift_cascade])
GEOMETRIES = pytest.mark.parametrize(
    "geometry",
    [Geometry(), Geometry("parallel"), Geometry(sdd_mm=1200.0, sid_mm=700.0), Geometry("scout")],
    ids=["cone", "parallel", "near", "scout"],
)


@LIFTINGS
@GEOMETRIES
@pytest.mark.parametrize("edge", ADMITTED)
def test_each_voxel_reads_the_place_where_it_projects(lift, geometry, edge):
    """From a map of coordinates a voxel reads the place it looks at: what differs from where it projects is a shift."""
    for pixels in MAPS:
        maps = detector_mm(geometry, (pixels, pixels))
        for divisor in (8, 4, 2) if edge > 40 else (8, 4, 2, 1):
            size = (edge // divisor,) * 3
            lifted = lift(maps, geometry, size)[0]
            margin = geometry.detector_mm / min(pixels, size[0]) / 2
            for view in (0, 1):
                wanted = places_mm(geometry, view, size)
                seen = wanted.abs().amax(dim=0) <= geometry.detector_mm / 2 - margin
                error = (lifted[view] - wanted).abs().amax(dim=0)[seen]
                assert error.max() < allowed_mm(geometry, pixels, size[0]), (pixels, size, view)


@pytest.mark.parametrize("size", [(24, 40, 64), (48, 16, 80), (16, 24, 16), (10, 4, 8)])
def test_other_boxes_than_cubes_and_maps_than_squares(size):
    geometry = Geometry()
    for pixels in ((32, 32), (64, 128), (96, 32)):
        lifted = lift_direct(detector_mm(geometry, pixels), geometry, size)[0]
        for view, across in ((0, size[2]), (1, size[1])):
            wanted = places_mm(geometry, view, size)
            seen = torch.ones(size, dtype=torch.bool)
            for place, have, cells in zip(wanted, pixels, (size[0], across)):
                seen &= place.abs() <= geometry.detector_mm * (0.5 - 0.5 / min(have, cells))
            for axis, (have, cells) in enumerate(zip(pixels, (size[0], across))):
                error = (lifted[view, axis] - wanted[axis]).abs()[seen]
                assert error.max() < allowed_mm(geometry, have, cells), (pixels, view, axis)


@GEOMETRIES
def test_boxes_of_the_cube_read_what_the_whole_reads(geometry):
    maps, size = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), (6, 4, 5)
    origins = [(3, 20, 8), (0, 0, 0), (18, 20, 19), (9, 10, 11)]  # two for each map, at the borders and within
    for view in (0, 1):
        whole = lift_view(maps, view, geometry, (24, 24, 24))
        cut = [whole[:, :, z : z + 6, y : y + 4, x : x + 5] for z, y, x in origins]
        parts = lift_view(maps, view, geometry, (24, 24, 24), (origins, size))
        assert torch.allclose(parts, torch.stack([c[i // 2] for i, c in enumerate(cut)]), atol=1e-4)
        both = lift_view(maps, view, geometry, (24, 24, 24), (origins[:1], size))  # one for all maps
        assert torch.allclose(both, cut[0], atol=1e-4)


@pytest.mark.parametrize("size", [(10, 10), (24, 12), (32, 40), (48, 80)])
def test_the_baseline_keeps_the_extent_too(size):
    maps = detector_mm(Geometry("parallel"), (32, 32))[:, 0]
    found, wanted = to_grid(maps, size)[0], detector_mm(Geometry("parallel"), size)[0, 0]
    for axis, cells in enumerate(size):
        error = (found[axis] - wanted[axis]).abs()[1:-1, 1:-1]  # beyond the outermost pixels' centres: constant
        assert error.max() < allowed_mm(Geometry("parallel"), 32, cells), axis


@pytest.mark.parametrize("offset", range(4))
def test_stripes_finer_than_voxels_average_out(offset):
    """Sampled without averaging, stripes of two pixels would become flat areas of full strength, or none (aliasing)."""
    geometry = Geometry("parallel")
    stripes = (((torch.arange(64) + offset) // 2) % 2).float()
    for maps in (stripes.expand(64, 64), stripes[:, None].expand(64, 64)):
        maps = maps.expand(1, 2, 2, -1, -1).contiguous()
        for size in (16, 8):
            for lift in (lift_direct, lift_cascade):
                lifted = lift(maps, geometry, (size,) * 3)
                assert (lifted - 0.5).abs().max() < 1e-5, (lift, size)
            assert (to_grid(maps[:, 0], (size, size)) - 0.5).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [Lifting, PriorLifting])
def test_where_both_views_agree_is_more_than_the_sum(layer):
    """Seen by both views, a feature means a place; by one, only a ray: what they add jointly lies where these meet."""
    torch.manual_seed(0)
    geometry, grid = Geometry(), 16
    lift = Lifting(4, 4, 6) if layer is Lifting else PriorLifting(4, 4, 6, num_views=2)
    for reduce in lift.reduce:
        nn.init.zeros_(reduce.bias)
    marks = torch.zeros(2, 4, grid, grid)
    marks[0, :, 5, 9] = 1.0
    marks[1, :, 5, 4] = 1.0

    def response(pa, lateral):
        maps = marks * torch.tensor([pa, lateral]).view(2, 1, 1, 1)
        with torch.no_grad():
            return lift(maps, geometry, (grid,) * 3) if layer is Lifting else lift(maps, None, geometry, grid)

    joint = (response(1.0, 1.0) - response(1.0, 0.0) - response(0.0, 1.0) + response(0.0, 0.0)).abs().amax(dim=(0, 1))
    rays = lift_features(marks[None, :, :1], geometry, (grid,) * 3)[0, :, 0] > 0
    both = rays[0] & rays[1]
    assert 0 < both.sum() < 30
    assert joint[both].min() > 0
    assert joint.max() > 0.05
    assert joint[~both].max() < 1e-5
    z, y, x = (joint == joint.max()).nonzero()[0].tolist()
    assert (z, abs(y - 4) <= 1, abs(x - 9) <= 1) == (5, True, True)


# ------------------------------------------------------------------------------------------------
# Averages by area


def test_area_average_by_hand():
    three = torch.tensor([0.0, 3.0, 6.0]).expand(1, 1, 3, 3)
    halves = [(0.0 + 1.5) / 1.5, (1.5 + 6.0) / 1.5]  # the middle pixel lies half in each
    assert averaged_to(three, (3, 2))[0, 0, 0].tolist() == pytest.approx(halves)
    assert averaged_to(three, (1, 1)).item() == pytest.approx(3.0)
    assert torch.equal(averaged_to(three, (3, 3)), three)
    with pytest.raises(ValueError, match=r"\(3, 3\) pixels cannot be averaged to \(4, 3\)"):
        averaged_to(three, (4, 3))


@pytest.mark.parametrize(("have", "want"), [((32, 20), (10, 7)), ((12, 9, 10), (5, 9, 4)), ((12, 9, 10), (4, 3, 5))])
def test_averages_keep_sums_and_extents(have, want):
    values = torch.rand(2, 3, *have, generator=torch.Generator().manual_seed(0))
    averaged = averaged_to(values, want)
    assert averaged.shape == (2, 3, *want)
    assert torch.allclose(averaged.flatten(2).mean(-1), values.flatten(2).mean(-1), atol=1e-6)
    fine = values
    for axis, (n, m) in enumerate(zip(have, want), start=2):  # a grid that both divide: plain block means
        fine = fine.repeat_interleave(m, dim=axis)
        fine = fine.unflatten(axis, (m, n)).mean(dim=axis + 1)
    assert torch.allclose(averaged, fine, atol=1e-6)


def test_averages_stay_in_float32_under_autocast():
    values = 0.7 + 0.001 * torch.rand(1, 1, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = averaged_to(values, (10, 10))
    assert torch.equal(mixed, averaged_to(values, (10, 10)))
