"""The projector against chords computed in 3D, finite differences, grid_sample and the package nanodrr."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import make_hu
from xray2ct.files import InputError
from xray2ct.geometry.lifting import lift_features
from xray2ct.geometry.projector import (
    HU_WINDOW,
    MU_WATER,
    Geometry,
    hu_to_mu,
    hu_to_unit,
    image_size_of,
    line_integrals,
    render_xrays,
    unit_to_hu,
    unit_to_mu,
    visible_fraction,
)
from xray2ct.imaging.cube import cube_affine
from xray2ct.imaging.cube_files import write_cube

CONE, PARALLEL = Geometry(), Geometry("parallel")
STEEP = Geometry(sdd_mm=700.0, sid_mm=500.0)  # rays of up to 19 degrees: errors of obliquity would show
SCOUT = Geometry("scout")
BEAMS = pytest.mark.parametrize("geometry", [CONE, PARALLEL, STEEP], ids=["cone", "parallel", "steep"])
ALL = pytest.mark.parametrize("geometry", [CONE, PARALLEL, STEEP, SCOUT], ids=["cone", "parallel", "steep", "scout"])


def unit_voxel(shape, *index):
    volume = torch.zeros(1, 1, *shape)
    volume[(0, 0, *index)] = 1.0
    return volume


def rays(geometry, view, size):
    """Source (or a point far behind) and pixel centres as (z, y, x) in mm, written out anew from the README's words.

    Returns two arrays ``(rows, columns, 3)``.
    """
    axis = ((np.arange(size) + 0.5) / size - 0.5) * geometry.detector_mm
    v, u = np.meshgrid(axis, axis, indexing="ij")
    cone, scout = geometry.kind == "cone", geometry.kind == "scout"
    source, detector = (geometry.sid_mm, geometry.sdd_mm - geometry.sid_mm) if cone or scout else (1000.0, 1000.0)
    far, zero = np.full_like(v, source), np.zeros_like(v)
    start_z, start_u = (zero if cone else v), (zero if cone or scout else u)
    end_u = u * geometry.sdd_mm / geometry.sid_mm if scout else u  # a scout's pixels are measured at the isocentre
    plane = np.full_like(v, detector)
    if view == 0:  # source behind the patient, detector in front
        return np.stack([start_z, far, start_u], -1), np.stack([v, -plane, end_u], -1)
    return np.stack([start_z, start_u, -far], -1), np.stack([v, end_u, plane], -1)  # from right to left


def sphere_chords(start, end, centre, radius):
    direction = (end - start) / np.linalg.norm(end - start, axis=-1, keepdims=True)
    offset = centre - start
    distance2 = (offset**2).sum(-1) - (offset * direction).sum(-1) ** 2
    return 2 * np.sqrt(np.clip(radius**2 - distance2, 0, None)), np.sqrt(distance2)


def box_chords(start, end, low, high):
    direction = end - start
    with np.errstate(divide="ignore"):
        first, second = (low - start) / direction, (high - start) / direction
    enter, leave = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
    return np.clip(leave - enter, 0, None) * np.linalg.norm(direction, axis=-1)


def occupancy(inside, size, fov_mm, fine=3):
    """Share of every voxel for which ``inside(z, y, x)`` holds, from ``fine``^3 points."""
    axis = ((np.arange(size * fine) + 0.5) / (size * fine) - 0.5) * fov_mm
    points = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    share = inside(*points).reshape(size, fine, size, fine, size, fine).mean((1, 3, 5))
    return torch.from_numpy(share).float()[None, None]


def centroid(image):
    """Row and column of the centre of mass as shares of the picture, -0.5 to 0.5."""
    axis = [(torch.arange(n) + 0.5) / n - 0.5 for n in image.shape]
    return (image.sum(1) @ axis[0] / image.sum()).item(), (image.sum(0) @ axis[1] / image.sum()).item()


# ------------------------------------------------------------------------------------------------
# Line integrals of known shapes


def test_unit_voxel_integrates_to_its_edge_under_parallel_rays():
    images = line_integrals(unit_voxel((6, 6, 6), 1, 4, 2), PARALLEL, (6, 6))[0]
    expected = torch.zeros(2, 6, 6)
    expected[0, 1, 2] = expected[1, 1, 4] = 60.0  # PA sees (d, w), lateral (d, h)
    assert torch.allclose(images, expected, atol=1e-4)


@pytest.mark.parametrize("geometry", [CONE, STEEP], ids=["cone", "steep"])
def test_central_cone_ray_crosses_exactly_one_voxel_edge_per_slice(geometry):
    for place in range(9):
        volume = unit_voxel((9, 9, 9), 4, place, 4) + unit_voxel((9, 9, 9), 4, 4, place)
        pa, lateral = line_integrals(volume, geometry, (15, 15))[0, :, 7, 7]
        assert pa.item() == pytest.approx(40.0 * volume[0, 0, 4, :, 4].sum().item(), rel=1e-6)
        assert lateral.item() == pytest.approx(40.0 * volume[0, 0, 4, 4].sum().item(), rel=1e-6)


@pytest.mark.parametrize(("h", "distance"), [(0, 660.0), (4, 500.0), (8, 340.0)])
def test_oblique_ray_through_a_voxel_centre_gets_its_true_chord(h, distance):
    # The source is at y = +500 and voxel (0, h, 0) at z = x = -160: the detector's edge is chosen so that the
    # ray of pixel (2, 2) of 21 passes through the voxel's centre. It leaves by the front and back face.
    at_detector = 160 * 700 / distance
    geometry = Geometry(sdd_mm=700, sid_mm=500, detector_mm=at_detector / (0.5 - 2.5 / 21))
    pixel = line_integrals(unit_voxel((9, 9, 9), 0, h, 0), geometry, (21, 21))[0, 0, 2, 2].item()
    assert pixel == pytest.approx(40 * math.sqrt(1 + 2 * (160 / distance) ** 2), rel=1e-5)


@ALL
def test_detector_sum_is_the_volume_times_the_magnification_of_both_axes(geometry):
    volume, size = unit_voxel((24, 24, 24), 10, 5, 15), 480
    images = line_integrals(volume, geometry, (size, size))[0]
    sums = images.sum((1, 2)) * (geometry.detector_mm / size) ** 2
    z, y, x = (-0.5 + 10.5 / 24) * 360, (-0.5 + 5.5 / 24) * 360, (-0.5 + 15.5 / 24) * 360
    for view, (towards, across) in enumerate([(-y, x), (x, y)]):
        area, secant = 1.0, 1.0
        if geometry.kind != "parallel":
            distance = geometry.sid_mm + towards
            scout = geometry.kind == "scout"
            area = geometry.sid_mm / distance if scout else (geometry.sdd_mm / distance) ** 2
            secant = math.sqrt(1 + (across**2 if scout else z**2 + across**2) / distance**2)
        assert sums[view].item() == pytest.approx(15**3 * area * secant, rel=0.005)


@ALL
def test_sphere_has_its_analytic_chords(geometry):
    centre, radius, size = np.array([20.0, -35.0, 30.0]), 80.0, 48
    volume = occupancy(
        lambda z, y, x: (z - 20.0) ** 2 + (y + 35.0) ** 2 + (x - 30.0) ** 2 < radius**2, size, geometry.fov_mm
    )
    images = line_integrals(volume, geometry, (61, 61))[0].numpy()
    for view in range(2):
        chords, distance = sphere_chords(*rays(geometry, view, 61), centre, radius)
        inner, outside = distance < 0.8 * radius, distance > radius + 20.0
        assert inner.sum() > 100
        assert np.abs(images[view] - chords)[inner].max() < 0.02 * 2 * radius
        assert images[view][outside].max() == 0
        assert np.abs(images[view] - chords).mean() < 0.04 * chords.mean()  # the rim is a voxel wide
        assert images[view].sum() == pytest.approx(chords.sum(), rel=0.005)


@ALL
def test_box_has_its_analytic_chords(geometry):
    low, high, size = np.array([-90.0, -45.0, -60.0]), np.array([60.0, 75.0, 120.0]), 48  # on voxel faces
    cells = [slice(int((a + 180) / 7.5), int((b + 180) / 7.5)) for a, b in zip(low, high)]
    volume = torch.zeros(1, 1, size, size, size)
    volume[(0, 0, *cells)] = 1.0
    images = line_integrals(volume, geometry, (61, 61))[0].numpy()
    for view, axis in enumerate((1, 2)):
        start, end = rays(geometry, view, 61)
        chords = box_chords(start, end, low, high)
        # Rays that enter by the front and leave by the back, a voxel away from the sides: exact.
        margin = np.full(3, 7.5)
        margin[axis] = 0.0
        inner = box_chords(start, end, low + margin, high - margin)
        through = np.isclose(inner, chords, rtol=1e-9) & (chords > 0)
        assert through.sum() > 50
        assert images[view][through] == pytest.approx(chords[through], rel=2e-5)
        assert np.abs(images[view] - chords).mean() < 0.06 * chords.mean()  # the sides fade over a voxel


# ------------------------------------------------------------------------------------------------
# Sides


def test_block_at_the_right_front_top_lands_top_left_in_both_views():
    volume = torch.zeros(1, 1, 36, 36, 36)
    volume[0, 0, 4:8, 4:8, 7:11] = 1.0  # centre: z = -120, y = -120, x = -90 mm
    pa, lateral = line_integrals(volume, CONE, (270, 270))[0]
    # In front is nearer to the detector of the PA view, right nearer to the source of the lateral view.
    pa_scale, lateral_scale = 1800 / (1600 + 120) / 405, 1800 / (1600 - 90) / 405
    assert centroid(pa) == pytest.approx((-120 * pa_scale, -90 * pa_scale), abs=1e-3)
    assert centroid(lateral) == pytest.approx((-120 * lateral_scale, -120 * lateral_scale), abs=1e-3)


@ALL
def test_block_nearer_to_the_source_is_magnified_more(geometry):
    def area(view, *index):
        volume = torch.zeros(1, 1, 18, 18, 18)
        volume[(0, 0, *index)] = 1.0
        return (line_integrals(volume, geometry, (400, 400))[0, view] > 10).sum().item()

    middle, first, last = slice(7, 11), slice(2, 5), slice(13, 16)
    ratios = [
        area(0, middle, last, middle) / area(0, middle, first, middle),  # back over front
        area(1, middle, middle, first) / area(1, middle, middle, last),  # right over left
    ]
    # Block centres at 110 mm on either side of the isocentre; along both axes, or across only.
    expected = {
        CONE: (1710 / 1490) ** 2,
        STEEP: (610 / 390) ** 2,
        SCOUT: (541 + 110) / (541 - 110),
        PARALLEL: 1.0,
    }
    assert ratios == pytest.approx([expected[geometry]] * 2, rel=0.03)


# ------------------------------------------------------------------------------------------------
# Derivatives


def random_pair(geometry, seed=0, shape=(7, 9, 11), image_size=(13, 10)):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 1, *shape, generator=generator), torch.rand(2, 2, *image_size, generator=generator)


@ALL
def test_gradient_equals_finite_differences(geometry):
    volume, target = random_pair(geometry)
    volume = 0.2 + 0.6 * volume

    def loss(v):  # quadratic: central differences are exact up to rounding
        return ((render_xrays(v, geometry, (13, 10)) - target).double() ** 2).sum()

    volume.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(volume), volume)
    for index in [(0, 0, 3, 4, 5), (1, 0, 0, 8, 2), (1, 0, 6, 0, 10), (0, 0, 2, 5, 0)]:
        step = torch.zeros_like(volume)
        step[index] = 0.1
        with torch.no_grad():
            expected = (loss(volume + step) - loss(volume - step)) / 0.2
        assert gradient[index].item() == pytest.approx(expected.item(), rel=2e-3, abs=1e-4)


@ALL
def test_backward_is_the_adjoint(geometry):
    volume, image = random_pair(geometry, 1)
    volume.requires_grad_()
    forward = line_integrals(volume, geometry, (13, 10))
    (backward,) = torch.autograd.grad((forward * image).sum(), volume)
    left = (forward.double() * image.double()).sum().item()
    assert left == pytest.approx((volume.double() * backward.double()).sum().item(), rel=1e-5)


@ALL
def test_line_integrals_are_linear(geometry):
    one, other = random_pair(geometry, 2)[0], random_pair(geometry, 3)[0]
    together = line_integrals(2 * one - 3 * other, geometry, (13, 10))
    apart = 2 * line_integrals(one, geometry, (13, 10)) - 3 * line_integrals(other, geometry, (13, 10))
    assert torch.allclose(together, apart, atol=1e-3)


def test_batch_entries_do_not_mix():
    volume = random_pair(CONE)[0]
    together = line_integrals(volume, CONE, (12, 12))
    assert torch.allclose(together[1:], line_integrals(volume[1:], CONE, (12, 12)), atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_chunks_do_not_change_the_result():
    """Every third pixel of a 1023^2 image is a pixel of a 341^2 one; only the large one is integrated in chunks."""
    volume = torch.rand(1, 1, 64, 200, 64, requires_grad=True)
    image, gradients = torch.rand(1, 2, 341, 341), []
    rendered = [line_integrals(volume, CONE, (n, n)) for n in (341, 1023)]
    rendered[1] = rendered[1][..., 1::3, 1::3]
    assert torch.allclose(*rendered, rtol=1e-5, atol=1e-3)
    for one in rendered:
        gradients += torch.autograd.grad((one * image).sum(), volume)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-3)


def test_autocast_keeps_line_integrals_in_float32():
    volume = random_pair(CONE)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = render_xrays(volume.bfloat16().float(), CONE, (12, 12))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, render_xrays(volume.bfloat16().float(), CONE, (12, 12)))


def test_shape_of_the_volume_is_checked():
    with pytest.raises(ValueError, match=r"\(1, 2, 8, 8, 8\); expected \(B, 1, D, H, W\)"):
        line_integrals(torch.zeros(1, 2, 8, 8, 8), CONE)


MEMORY = """
import torch
from xray2ct.geometry.projector import Geometry, render_xrays

def peak():  # of this process alone; getrusage would inherit the parent's
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20

torch.ones(64, 64) @ torch.ones(64, 64)
volume = torch.full((1, 1, 256, 256, 256), 0.4, requires_grad=True)
before = peak()
render_xrays(volume, Geometry(), (512, 512)).mean().backward()
print(peak() - before, float(volume.grad.sum()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for the peak memory")
def test_full_resolution_fits_in_memory():
    result = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=1200,
        check=True,
    )
    added_gib, gradient = map(float, result.stdout.split())
    assert added_gib < 1.5
    assert gradient > 0


# ------------------------------------------------------------------------------------------------
# Lifting


def grid_sample_lift(features, geometry, z, y, x):
    """Lifting by grid_sample, ``(B, 2, C, D, H, W)``."""
    batch, _, channels = features.shape[:3]
    zz, yy, xx = torch.meshgrid(z, y, x, indexing="ij")
    lifted = []
    for view in range(2):
        v, u = geometry.project(view, zz, yy, xx)
        grid = torch.stack([u, v], -1).reshape(1, 1, -1, 2) / (geometry.detector_mm / 2)
        sampled = F.grid_sample(
            features[:, view], grid.expand(batch, -1, -1, -1), align_corners=False, padding_mode="zeros"
        )
        lifted.append(sampled.reshape(batch, channels, *zz.shape))
    return torch.stack(lifted, 1)


@ALL
def test_lifting_equals_grid_sample(geometry):
    features = torch.randn(2, 2, 3, 14, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    axes = [geometry.voxel_centres_mm(n) for n in (8, 9, 10)]
    lifted, expected = lift_features(features, geometry, (8, 9, 10)), grid_sample_lift(features, geometry, *axes)
    assert lifted.shape == (2, 2, 3, 8, 9, 10)
    assert torch.allclose(lifted, expected, atol=2e-5)
    weight = torch.randn(lifted.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((result * weight).sum(), features)[0] for result in (lifted, expected)]
    assert torch.allclose(*gradients, atol=2e-4)


def test_projection_by_hand():
    v, u = CONE.project(0, torch.tensor(-50.0), torch.tensor(100.0), torch.tensor(30.0))
    assert (v.item(), u.item()) == pytest.approx((-50 * 1.2, 30 * 1.2))  # 1800 / (1600 - 100)
    v, u = CONE.project(1, torch.tensor(-50.0), torch.tensor(100.0), torch.tensor(200.0))
    assert (v.item(), u.item()) == pytest.approx((-50.0, 100.0))  # x = 200 lies on the detector
    assert [c.item() for c in PARALLEL.project(1, *torch.tensor([1.0, 2.0, 3.0]))] == [1.0, 2.0]
    v, u = SCOUT.project(0, torch.tensor(-50.0), torch.tensor(100.0), torch.tensor(30.0))
    assert (v.item(), u.item()) == pytest.approx((-50.0, 30 * 541 / 441))


@ALL
def test_lifting_the_xrays_of_a_point_peaks_at_the_point(geometry):
    for place in [(5, 10, 3), (8, 4, 12), (10, 10, 10)]:
        images = line_integrals(unit_voxel((16, 16, 16), *place), geometry, (128, 128))
        lifted = lift_features(images.unsqueeze(2), geometry, (16, 16, 16))[0, :, 0]
        product = lifted[0] * lifted[1]
        assert np.unravel_index(product.argmax().item(), product.shape) == place
        product[place] = 0
        assert product.max() < 0.1 * (lifted[0] * lifted[1]).max() or product.max() < 0.1 * 22.5**2


@ALL
def test_crop_is_a_slice_of_the_whole(geometry):
    features = torch.randn(1, 2, 4, 20, 20, generator=torch.Generator().manual_seed(2))
    axis = geometry.voxel_centres_mm(32)
    whole = lift_features(features, geometry, (32, 32, 32))
    crop = lift_features(features, geometry, grid_mm=(axis[3:9], axis[20:32], axis[8:13]))
    assert crop.shape == (1, 2, 4, 6, 12, 5)
    assert torch.allclose(crop, whole[..., 3:9, 20:32, 8:13], atol=1e-5)


def test_voxels_beside_the_detector_get_zeros_and_leave_no_trace():
    narrow = Geometry(detector_mm=200.0)
    lifted = lift_features(torch.ones(1, 2, 1, 16, 16), narrow, (16, 16, 16))[0, :, 0]
    axis = narrow.voxel_centres_mm(16)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    for view in range(2):
        v, u = narrow.project(view, z, y, x)
        farthest = torch.maximum(v.abs(), u.abs())
        assert (lifted[view][farthest > 100 + 12.5] == 0).all()  # half a pixel fades out
        assert torch.allclose(lifted[view][farthest < 100 - 6.25], torch.tensor(1.0))
    assert line_integrals(unit_voxel((16, 16, 16), 0, 15, 0), narrow, (16, 16)).abs().max() == 0
    # The default cone, too, misses corners of the cube on the source's side: 177 mm * 1800 / 1423 > 405 mm / 2.
    corner = line_integrals(unit_voxel((64, 64, 64), 0, 63, 0), CONE, (64, 64))[0]
    assert (corner[0].max().item(), corner[1].max().item()) == (0, 0)


def test_lifting_keeps_the_dtype_and_checks_the_shape():
    features = torch.ones(1, 2, 2, 8, 8, dtype=torch.bfloat16)
    assert lift_features(features, CONE, (4, 4, 4)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 8, 8\); expected \(B, 2, C, h, w\)"):
        lift_features(torch.ones(1, 3, 2, 8, 8), CONE, (4, 4, 4))


def test_caches_filled_in_inference_mode_serve_training():
    geometry = Geometry(fov_mm=351.7)  # of no other test: nothing is cached for it
    features, volume = torch.rand(1, 2, 2, 8, 8), torch.rand(1, 1, 6, 6, 6)
    with torch.inference_mode():
        before = lift_features(features, geometry, (6, 6, 6)), render_xrays(volume, geometry, (8, 8))
    features.requires_grad_()
    volume.requires_grad_()
    after = lift_features(features, geometry, (6, 6, 6)), render_xrays(volume, geometry, (8, 8))
    sum(result.square().sum() for result in after).backward()
    assert features.grad.abs().sum() > 0
    assert volume.grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after))


# ------------------------------------------------------------------------------------------------
# Geometry and units


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "fan"}, "kind"),
        ({"fov_mm": 0}, "fov_mm"),
        ({"fov_mm": float("nan")}, "fov_mm"),
        ({"sid_mm": 180.0}, "sid_mm"),
        ({"sdd_mm": 1500.0}, "sdd_mm"),
        ({"detector_mm": -1.0}, "detector_mm"),
        ({"kind": "parallel", "detector_mm": 0.0}, "detector_mm"),
        ({"fov_mm": float("inf")}, "fov_mm"),
        ({"sdd_mm": float("inf")}, "sdd_mm"),
        ({"kind": "scout", "sid_mm": 150.0}, "sid_mm"),
        ({"kind": "scout", "sdd_mm": 540.0}, "sdd_mm"),
        ({"fov_mm": "360"}, "fov_mm"),
    ],
)
def test_impossible_geometry_names_the_field(settings, field):
    with pytest.raises(ValueError, match=rf"geometry\.{field} is "):
        Geometry(**settings)


def test_geometry_defaults_and_round_trip():
    assert CONE.detector_mm == pytest.approx(405.0)
    assert (PARALLEL.sdd_mm, PARALLEL.detector_mm) == (None, 360.0)
    assert Geometry("parallel", sdd_mm=1000.0) == PARALLEL
    assert (SCOUT.sdd_mm, SCOUT.sid_mm, SCOUT.detector_mm) == (949.0, 541.0, 360.0)
    for geometry in (CONE, PARALLEL, SCOUT, Geometry("cone", 320, 1500, 1300, 400), Geometry("scout", 320, 1085, 595)):
        again = Geometry.from_dict(geometry.to_dict())
        assert again == geometry
        assert hash(again) == hash(geometry)
    assert "1800" in str(CONE)
    assert str(PARALLEL).startswith("parallel")
    assert (
        str(SCOUT)
        == "scout, source-detector 949 mm, source-isocentre 541 mm, cube 360 mm, picture 360 mm at the isocentre"
    )
    with pytest.raises(ValueError, match=r"unknown keys \['sad_mm'\].*sid_mm"):
        Geometry.from_dict({"kind": "cone", "sad_mm": 1600})


def test_visible_fraction_and_image_size():
    assert visible_fraction(PARALLEL) == 1.0
    assert 0.8 < visible_fraction(CONE) < 1.0
    assert visible_fraction(Geometry("parallel", detector_mm=180.0)) == pytest.approx(1 / 8)
    assert image_size_of(512) == image_size_of([512, 512]) == (512, 512)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
def test_units(convert):
    hu = convert([-3000.0, -1024.0, -1000.0, 0.0, 226.0, 1476.0, 3000.0])
    unit = hu_to_unit(hu)
    assert unit.tolist() == pytest.approx([0, 0, 24 / 2500, 1024 / 2500, 0.5, 1, 1])
    assert unit_to_hu(unit)[1:6].tolist() == pytest.approx(hu[1:6].tolist(), abs=1e-3)
    assert hu_to_mu(hu).tolist() == pytest.approx([0, 0, 0, MU_WATER, 0.02452, 0.04952, 0.08], abs=1e-8)
    assert hu_to_unit(hu, (-200.0, 200.0)).tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_rendered_water_has_the_stated_grey_value():
    water = torch.full((1, 1, 8, 8, 8), -HU_WINDOW[0] / (HU_WINDOW[1] - HU_WINDOW[0]))
    assert unit_to_mu(water).unique().item() == pytest.approx(0.02)
    centre = render_xrays(water, PARALLEL, (9, 9))[0, :, 4, 4]
    assert centre.tolist() == pytest.approx([360 * 0.02 / 10] * 2, rel=1e-5)
    assert render_xrays(water, PARALLEL, (9, 9), xray_scale=5.0)[0, 0, 4, 4].item() == pytest.approx(1.44, rel=1e-5)


# ------------------------------------------------------------------------------------------------
# nanodrr


def relative_error(images, reference):
    """Mean absolute difference over the reference's mean, per view."""
    return ((images - reference).abs().mean((-2, -1)) / reference.mean((-2, -1))).flatten().tolist()


def test_line_integrals_agree_with_nanodrr_reading_the_file(tmp_path):
    # Nothing shared: nanodrr reads the NIfTI, converts HU and places its cameras in patient coordinates.
    drr = pytest.importorskip("nanodrr.drr")
    from nanodrr.camera import make_rt_inv
    from nanodrr.data import Subject

    hu = make_hu(0, 64)
    write_cube(tmp_path / "p.nii.gz", hu, cube_affine((10.0, -20.0, 30.0), 360.0, 64))
    subject = Subject.from_filepath(tmp_path / "p.nii.gz", max_label=0, mu_water=0.02, mu_bone=0.04, hu_bone=1000.0)
    camera = drr.DRR.from_carm_intrinsics(1800.0, 405 / 96, 405 / 96, 0.0, 0.0, 96, 96)
    turn = torch.tensor([[0.0, 0.0, 0.0], [90.0, 0.0, 0.0]])  # about the patient's long axis
    behind = torch.tensor([[0.0, -1600.0, 0.0]]).expand(2, -1)
    poses = make_rt_inv(turn, behind, "PA", subject.isocenter)
    reference = camera(subject, poses, n_samples=128)[:, 0]
    ours = line_integrals(hu_to_mu(torch.from_numpy(hu).float())[None, None], CONE, (96, 96))[0]
    assert max(relative_error(ours, reference)) < 0.01
    assert min(relative_error(ours.flip(-1), reference)) > 0.05  # the bound would notice a mirrored view


@BEAMS
def test_nanodrr_backend_equals_the_built_in_renderer(geometry):
    pytest.importorskip("nanodrr")
    from xray2ct.geometry.nanodrr_backend import render_xrays_nanodrr

    hu = np.stack([make_hu(seed, 40) for seed in range(2)])
    volumes = [torch.from_numpy(hu_to_unit(hu.astype(np.float32)))[:, None].requires_grad_() for _ in range(2)]
    images = [
        render(volume, geometry, (48, 32), xray_scale=5.0)
        for render, volume in zip((render_xrays, render_xrays_nanodrr), volumes)
    ]
    assert images[0].shape == images[1].shape == (2, 2, 48, 32)
    assert max(relative_error(*(image.detach() for image in images))) < 0.01
    weight = torch.linspace(0, 1, 48)[:, None] * torch.linspace(1, 0, 32)
    smooth = [
        F.avg_pool3d(torch.autograd.grad((image * weight).sum(), volume)[0], 5)  # ray sampling averages out
        for image, volume in zip(images, volumes)
    ]
    assert torch.allclose(*smooth, rtol=0.05, atol=0.02 * smooth[0].max().item())


def test_nanodrr_backend_checks_its_input(monkeypatch):
    from xray2ct.geometry.nanodrr_backend import render_xrays_nanodrr

    with pytest.raises(ValueError, match="expected"):
        render_xrays_nanodrr(torch.zeros(8, 8, 8), CONE)
    with pytest.raises(InputError, match=r"geometry\.kind is 'scout'"):
        render_xrays_nanodrr(torch.zeros(1, 1, 8, 8, 8), SCOUT)
    monkeypatch.setitem(sys.modules, "nanodrr.camera", None)
    with pytest.raises(InputError, match="pip install nanodrr"):
        render_xrays_nanodrr(torch.zeros(1, 1, 8, 8, 8), CONE)
