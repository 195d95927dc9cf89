"""Augmentation: pairs stay consistent, seeds decide, ranges hold, sides are kept in mind."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.tiny_data import make_hu
from xray2ct.data.augment import AugmentConfig, PairMaker, random_affine
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry, hu_to_unit, render_xrays

OFF = {
    "rotation_deg": 0.0,
    "scale": 0.0,
    "translation_mm": 0.0,
    "elastic_mm": 0.0,
    "hu_shift": 0.0,
    "hu_scale": 0.0,
    "mirror_probability": 0.0,
    "xray_noise": 0.0,
}


@pytest.fixture(scope="module")
def volume():
    return torch.from_numpy(hu_to_unit(make_hu(0, 64).astype("float32")))[None, None]


def make(volume, seeds=(1,), masks=None, **changes):
    maker = PairMaker(Acquisition(), (32, 32, 32), 64, AugmentConfig(source_size=64, **{**OFF, **changes}))
    volume = volume.expand(len(seeds), -1, -1, -1, -1)
    return maker(volume, torch.ones_like(volume) if masks is None else masks, list(seeds))


def centroid_mm(volume, low=0.0):
    """Centre of mass (z, y, x) in mm of what lies above ``low``."""
    weight = (volume[0, 0] - low).clamp_min(0)
    axes = [Geometry().voxel_centres_mm(n) for n in weight.shape]
    total = weight.sum()
    return [float((weight.sum([d for d in range(3) if d != i]) * a).sum() / total) for i, a in enumerate(axes)]


def test_without_changes_the_pair_is_the_volume_and_its_rendering(volume):
    pair = make(volume)
    assert torch.allclose(pair["ct_volume"], torch.nn.functional.avg_pool3d(volume, 2), atol=1e-5)
    assert torch.allclose(pair["xrays"], render_xrays(volume, Geometry(), (64, 64)), atol=1e-4)
    assert pair["mask"].min() == 1


def test_uint16_volumes_mean_the_same(volume):
    coded = (volume * 65535).round().to(torch.uint16)
    masks = torch.ones_like(volume, dtype=torch.uint8)
    assert torch.allclose(make(coded, masks=masks)["ct_volume"], make(volume)["ct_volume"], atol=2e-5)


def test_xrays_belong_to_the_augmented_volume(volume):
    """Rendering the (coarser) target again gives the X-rays of the pair, not those of the original."""
    pair = make(volume, rotation_deg=10.0, scale=0.15, translation_mm=30.0, elastic_mm=8.0, mirror_probability=1.0)
    again = render_xrays(pair["ct_volume"], Geometry(), (64, 64))
    original = render_xrays(volume, Geometry(), (64, 64))
    own, other = (again - pair["xrays"]).abs().mean(), (again - original).abs().mean()
    assert own < 0.02
    assert own < 0.3 * other


EVERYTHING = {"rotation_deg": 10.0, "scale": 0.1, "translation_mm": 15.0, "elastic_mm": 8.0, "mirror_probability": 0.5}
EVERYTHING |= {"hu_shift": 20.0, "hu_scale": 0.03, "xray_gain": 0.1, "xray_noise": 0.01}


def test_a_sample_is_the_same_bit_for_bit_in_any_batch(volume):
    masks = torch.ones_like(volume)
    masks[:, :, :20] = 0
    state = torch.get_rng_state()
    batch = make(volume, (5, 6, 7, 2**62 + 9), masks=masks.expand(4, -1, -1, -1, -1), **EVERYTHING)
    assert torch.equal(state, torch.get_rng_state())
    for seeds in ((7, 5), (6,), (2**62 + 9, 6, 5)):
        part = make(volume, seeds, masks=masks.expand(len(seeds), -1, -1, -1, -1), **EVERYTHING)
        places = [(5, 6, 7, 2**62 + 9).index(seed) for seed in seeds]
        for key, values in part.items():
            if key == "xrays":  # the renderer may add up in the order that suits the batch
                assert torch.allclose(values, batch[key][places], rtol=0, atol=1e-6)
            else:
                assert torch.equal(values, batch[key][places]), key
    for key in ("xrays", "ct_volume"):
        assert not torch.allclose(batch[key][0], batch[key][1], atol=1e-2)


@pytest.mark.parametrize("masked", [True, False])
def test_nothing_is_made_on_the_host_and_nothing_waits_for_the_device(masked, monkeypatch):
    """On the meta device in a GPU's place: but for the seeds all is made there, and no value is asked for."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    pairs = PairMaker(Acquisition(), (16, 16, 16), 48, AugmentConfig(source_size=32, xray_gain=0.1))
    on_host, seen = [], set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            seen.add(name)
            made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
            if name in ("_local_scalar_dense", "nonzero", "equal") or any(t.numel() > 2 for t in made):
                on_host.append(f"{name} {[tuple(t.shape) for t in made]}")
            return result

    volumes = torch.empty(2, 1, 32, 32, 32, dtype=torch.uint16, device="meta")
    masks = torch.empty(2, 1, 32, 32, 32, dtype=torch.uint8, device="meta") if masked else None
    with Watch():
        pair = pairs(volumes, masks, [1, 2])
    assert {value.device.type for value in pair.values()} == {"meta"}
    assert pair["xrays"].shape == (2, 2, 48, 48)
    assert on_host == []
    assert not {"rand", "randn", "normal_", "uniform_", "random_", "bernoulli_"} & seen
    assert {"grid_sampler_3d", "log_", "cos"} <= seen  # it was watched, and it warped and drew noise


def test_mirroring_swaps_the_sides_in_the_frontal_view_only(volume):
    plain, mirrored = make(volume), make(volume, mirror_probability=1.0)
    assert torch.allclose(mirrored["ct_volume"], plain["ct_volume"].flip(-1), atol=1e-4)
    assert torch.allclose(mirrored["xrays"][:, 0], plain["xrays"][:, 0].flip(-1), atol=1e-3)
    parallel = PairMaker(
        Acquisition(Geometry("parallel")),
        (32,) * 3,
        64,
        AugmentConfig(source_size=64, **{**OFF, "mirror_probability": 1.0}),
    )
    pair = parallel(volume, torch.ones_like(volume), [1])
    lateral = render_xrays(volume, Geometry("parallel"), (64, 64))[:, 1]
    assert torch.allclose(pair["xrays"][:, 1], lateral, atol=1e-3)  # parallel rays: the lateral view cannot tell


@pytest.mark.parametrize("seed", range(4))
def test_translation_stays_in_its_range(seed):
    ball = torch.zeros(1, 1, 64, 64, 64)
    ball[..., 28:36, 28:36, 28:36] = 1.0
    moved = centroid_mm(make(ball, (seed,), translation_mm=40.0)["ct_volume"])
    assert all(abs(m) <= 40.5 for m in moved)
    assert any(abs(m) > 2 for m in moved)


def draws(function, count=400, **changes):
    """Random changes of one kind from ``count`` seeds, stacked."""
    return function(AugmentConfig(**{**OFF, **changes}), Geometry().fov_mm, SampleRandom(range(count)))


def assert_uniform(values, limit):
    """Values ``(N, 3)`` fill +-limit evenly along each axis: nothing beyond, and a uniform distribution's deviation."""
    assert values.abs().max() <= limit * 1.0001
    assert (values.std(dim=0) / (limit / 3**0.5) - 1).abs().max() < 0.1
    assert values.amax(dim=0).min() > 0.95 * limit
    assert values.amin(dim=0).max() < -0.95 * limit
    correlation = torch.corrcoef(values.T) - torch.eye(3)
    assert correlation.abs().max() < 0.2  # each axis is drawn on its own


def test_rotations_fill_their_range_about_each_axis():
    matrix = draws(random_affine, rotation_deg=6.0)[:, :, :3].double()
    assert torch.allclose(matrix @ matrix.mT, torch.eye(3, dtype=torch.float64).expand_as(matrix), atol=1e-6)
    # R = Rx(a) Ry(b) Rz(c): b, then a and c, from three of its entries (Euler angles).
    b = matrix[:, 0, 2].asin()
    a, c = torch.atan2(-matrix[:, 1, 2], matrix[:, 2, 2]), torch.atan2(-matrix[:, 0, 1], matrix[:, 0, 0])
    assert_uniform(torch.stack([a, b, c], dim=1).rad2deg(), 6.0)


def test_scales_and_shifts_fill_their_ranges():
    theta = draws(random_affine, scale=0.1)
    assert_uniform(theta.diagonal(dim1=1, dim2=2) - 1.0, 0.1)
    half_cube_mm = Geometry().fov_mm / 2  # what 1 is to affine_grid
    assert_uniform(draws(random_affine, translation_mm=15.0)[:, :, 3] * half_cube_mm, 15.0)


def test_mirroring_follows_its_probability():
    sides = draws(random_affine, mirror_probability=0.3).diagonal(dim1=1, dim2=2)
    assert 0.23 < (sides[:, 0] < 0).float().mean() < 0.37
    assert (sides[:, 1:] > 0).all()


def test_a_ball_moves_by_the_millimetres_drawn():
    ball = torch.zeros(1, 1, 64, 64, 64)
    ball[..., 28:36, 28:36, 28:36] = 1.0
    for seed in range(3):
        shift = draws(random_affine, count=seed + 1, translation_mm=40.0)[seed, :, 3] * 180.0  # x, y, z
        moved = centroid_mm(make(ball, (seed,), translation_mm=40.0)["ct_volume"])
        assert moved == pytest.approx((-shift.flip(0)).tolist(), abs=0.3)  # the grid says where to read


def test_sources_coarser_than_the_target_are_named(volume):
    with pytest.raises(InputError, match=r"augment\.source_size is 64.*\(64, 64, 64\).*at least the \(80, 80, 80\)"):
        PairMaker(Acquisition(), (80, 80, 80), 64, AugmentConfig(source_size=64))(volume, None, [1])


def test_any_target_size_shows_the_same_place(volume):
    """Sizes that do not divide the source's: no shift, no stretch."""
    expected = centroid_mm(volume)
    for size in (24, 40, 48):
        maker = PairMaker(Acquisition(), (size,) * 3, 64, AugmentConfig(enabled=False, source_size=64))
        assert centroid_mm(maker(volume, None, [1])["ct_volume"]) == pytest.approx(expected, abs=0.02)


def test_density_changes_leave_air_alone_and_stay_small(volume):
    pair = make(volume, hu_shift=40.0, hu_scale=0.05)
    difference = (pair["ct_volume"] - torch.nn.functional.avg_pool3d(volume, 2)).abs()
    limit = (40.0 + 0.05 * 1440.0) / 2500.0
    assert 1e-3 < difference.max() <= limit + 1e-5
    air = torch.full((1, 1, 64, 64, 64), hu_to_unit(-1000.0 * torch.ones(())).item())
    assert torch.allclose(make(air, hu_shift=40.0, hu_scale=0.05)["ct_volume"], air[..., :32, :32, :32], atol=1e-5)


def many_pairs(value, count=300, **changes):
    """Pairs of a small uniform volume from ``count`` seeds."""
    config = AugmentConfig(source_size=8, **{**OFF, **changes})
    maker = PairMaker(Acquisition(Geometry("parallel")), (8, 8, 8), 16, config)
    return maker(torch.full((count, 1, 8, 8, 8), value), None, range(count))


WATER = 1024 / 2500


def test_density_changes_fill_their_ranges_in_hounsfield_units():
    plain = many_pairs(WATER, 1)["ct_volume"].mean()
    for changes in ({"hu_shift": 20.0}, {"hu_scale": 0.02}):  # 2 % of water's density is 20 HU, too
        change = 2500 * (many_pairs(WATER, **changes)["ct_volume"].flatten(1)[:, 292] - plain)  # one inner voxel
        assert change.abs().max() <= 20.01
        assert change.std().item() == pytest.approx(20 / 3**0.5, rel=0.1)
        assert change.mean().abs() < 2


def test_noise_and_gain_of_the_x_rays_are_as_strong_as_stated():
    plain = many_pairs(WATER / 2, 1)["xrays"]
    noise = many_pairs(WATER / 2, xray_noise=0.003)["xrays"] - plain
    assert noise.std().item() == pytest.approx(0.003, rel=0.03)
    gain = (many_pairs(WATER / 2, xray_gain=0.2)["xrays"] / plain).mean((-2, -1)) - 1.0  # (samples, views)
    assert gain.abs().max() <= 0.2001
    assert gain.std(dim=0).tolist() == pytest.approx([0.2 / 3**0.5] * 2, rel=0.1)
    assert torch.corrcoef(gain.T)[0, 1].abs() < 0.2  # two exposures, two gains


def test_x_rays_stay_in_their_range():
    assert many_pairs(1.0, 1, xray_noise=0.01)["xrays"].max() == 1.0  # 360 mm of bone
    assert many_pairs(0.0, 1, xray_noise=0.01)["xrays"].min() == 0.0


def test_the_mask_moves_with_the_volume(volume):
    masks = torch.ones_like(volume)
    masks[:, :, :20] = 0
    pair = make(volume * masks, masks=masks, translation_mm=40.0, mirror_probability=1.0)
    inside = pair["mask"][0, 0].mean((1, 2)) > 0.5
    body = pair["ct_volume"][0, 0].amax((1, 2)) > 0.3
    assert 5 < inside.sum() < 32
    assert (inside != body).sum() <= 1


def test_disabled_augmentation_ignores_the_seed(volume):
    maker = PairMaker(Acquisition(), (32, 32, 32), 64, AugmentConfig(enabled=False, source_size=64))
    one, two = (maker(volume, torch.ones_like(volume), [seed]) for seed in (1, 2))
    assert torch.equal(one["xrays"], two["xrays"])
    assert torch.equal(one["ct_volume"], two["ct_volume"])
