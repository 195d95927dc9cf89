"""Simulated films: each step does what its physics says, the reader's scale is the reader's, and seeds decide."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.tiny_data import make_hu
from xray2ct.data.augment import AugmentConfig, PairMaker
from xray2ct.data.film_chain import FilmChain, FilmConfig, as_read, blurred
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry, hu_to_unit
from xray2ct.imaging.xray_scale import normalise

SIZE = 64
# A chain that leaves the picture alone but for what a test switches on.
PLAIN = {
    "probability": 1.0,
    "source_distance_mm": [1800.0, 1800.0],
    "shift_mm": 0.0,
    "shift_rows_mm": 0.0,
    "scale": 0.0,
    "rotation_deg": 0.0,
    "collimation": 0.0,
    "hardening": [0.0, 0.0],
    "scatter": [1e-9, 1e-9],
    "photons_per_mm2": [1e12, 1e12],
    "blur_mm": [0.0, 0.0],
    "unsharp": [0.0, 0.0],
    "linear": 1.0,
    "clipped": 0.0,
    "marker": 0.0,
    "border": 0.0,
}


@pytest.fixture(scope="module")
def volumes():
    hu = np.stack([make_hu(seed, SIZE) for seed in range(2)]).astype("float32")
    return torch.from_numpy(hu_to_unit(hu))[:, None]


def chain(**changes):
    return FilmChain(FilmConfig(**{**PLAIN, **changes}), Acquisition())


def films(volumes, seeds=(3, 4), **changes):
    """Films of all pairs, what is shown, and the renderings."""
    maker, random = chain(**changes), SampleRandom(seeds)
    xrays = maker.render(volumes, (SIZE, SIZE), random)
    return *maker.films(xrays, volumes, random), xrays


def fitted(picture, xray, shown):
    """Correlation of a picture and a rendering where it is shown: 1 for any linear scale."""
    return float(torch.corrcoef(torch.stack([picture[shown], xray[shown]]))[0, 1])


def test_off_by_default_and_then_nothing_changes(volumes):
    maker, random = FilmChain(FilmConfig(), Acquisition()), SampleRandom([1, 2])
    xrays = maker.render(volumes, (SIZE, SIZE), random)
    assert torch.equal(xrays, Acquisition().render(volumes, (SIZE, SIZE)))
    assert maker(xrays, volumes, random) is xrays
    assert maker.without_couch(volumes, torch.zeros_like(volumes), random) is volumes
    assert AugmentConfig().film.probability == 0


def test_a_chain_of_nothing_is_the_rendering_on_the_readers_scale(volumes):
    pictures, shown, xrays = films(volumes)
    for b in range(2):
        for view in range(2):
            assert fitted(pictures[b, view], xrays[b, view], shown[b, view]) > 0.99999
            low, high = np.percentile(pictures[b, view][shown[b, view]], [1, 99])
            assert low == pytest.approx((0.01, 0.0)[view], abs=0.005)
            assert high == pytest.approx((0.53, 0.74)[view], abs=0.005)


def test_the_share_of_films_is_the_probability_and_clean_pairs_stay():
    maker = chain(probability=0.3)
    drawn = maker.is_film(SampleRandom(range(4000))).float().mean().item()
    assert drawn == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))


def test_each_pair_follows_from_its_seed_alone(volumes):
    maker = FilmChain(FilmConfig(probability=0.5), Acquisition())
    twelve, both = volumes[:1].expand(12, -1, -1, -1, -1), list(range(12))
    random = SampleRandom(both)
    whole = maker(maker.render(twelve, (SIZE, SIZE), random), twelve, random)
    kinds = maker.is_film(random).tolist()
    assert 0 < sum(kinds) < 12
    for index in (kinds.index(True), kinds.index(False), 11):
        alone = SampleRandom([both[index]])
        one = maker(maker.render(volumes[:1], (SIZE, SIZE), alone), volumes[:1], alone)
        assert torch.allclose(one[0], whole[index], atol=2e-4)
    assert not torch.equal(whole[kinds.index(True)], whole[len(kinds) - 1 - kinds[::-1].index(True)])


def test_source_distances_are_those_of_the_geometry(volumes):
    """At the end of the range a film is what the projector renders from there, of the same field at the isocentre."""
    maker, random = chain(source_distance_mm=[1400.0, 1400.0]), SampleRandom([1, 2])
    near = Acquisition(Geometry("cone", 360.0, 1400.0, 1200.0)).render(volumes, (SIZE, SIZE))
    assert torch.allclose(maker.render(volumes, (SIZE, SIZE), random), near, atol=1e-5)
    spread = chain(source_distance_mm=[1400.0, 2000.0]).distances
    assert [round(a.geometry.sdd_mm) for a in spread] == [1400, 1600, 1800, 2000]
    assert {round(a.geometry.detector_mm * a.geometry.sid_mm / a.geometry.sdd_mm) for a in spread} == {360}


def test_films_of_parallel_data_are_taken_from_a_source(volumes):
    """200 mm before the detector, as the default geometry has it; what is seen at the isocentre is the data's."""
    parallel = Acquisition(Geometry("parallel"))
    settings = FilmConfig(**{**PLAIN, "source_distance_mm": [1800.0, 1800.0]})
    rendered = FilmChain(settings, parallel).render(volumes, (SIZE, SIZE), SampleRandom([1, 2]))
    assert torch.allclose(rendered, Acquisition().render(volumes, (SIZE, SIZE)), atol=1e-5)


def test_beam_hardening_is_that_of_two_lines():
    """Through 5 attenuation lengths, lines at 0.7 and 1.3 of the mean: -log((e^-3.5 + e^-6.5) / 2) = 4.1446."""
    maker = chain(hardening=[0.3, 0.3])
    integrals, shown = torch.full((1, 2, 16, 16), 5.0), torch.ones(1, 2, 16, 16, dtype=torch.bool)
    signal = maker.detected(integrals, shown, 5.0, SampleRandom([0]))
    assert signal.mean().item() == pytest.approx(4.1446, abs=1e-3)


def test_scatter_of_a_uniform_slab_adds_thickness_times_share():
    """I = e^-3; scatter 0.05 x 3 I: -log(1.15 e^-3) = 2.8602, whatever the kernel."""
    maker = chain(scatter=[0.05, 0.05])
    integrals, shown = torch.full((1, 2, 16, 16), 3.0), torch.ones(1, 2, 16, 16, dtype=torch.bool)
    signal = maker.detected(integrals, shown, 5.0, SampleRandom([0]))
    assert signal.mean().item() == pytest.approx(2.8602, abs=1e-3)


def test_noise_is_poissons_by_the_photons_of_a_pixel():
    """1e4 / mm^2, pixels of 4 mm^2, a tenth passes: 4,000 photons, so the logarithm varies by 1 / sqrt(4000)."""
    maker = chain(photons_per_mm2=[1e4, 1e4])
    integrals, shown = torch.full((1, 2, 96, 96), math.log(10)), torch.ones(1, 2, 96, 96, dtype=torch.bool)
    signal = maker.detected(integrals, shown, 2.0, SampleRandom([0]))
    assert signal.std().item() == pytest.approx(1 / math.sqrt(4000), rel=0.03)


def test_blur_is_a_gaussian_of_its_own_width_per_picture():
    """Against scipy, away from the border; and a uniform picture stays uniform up to the border and around holes."""
    torch.manual_seed(0)
    images, everywhere = torch.rand(1, 2, 48, 48), torch.ones(1, 2, 48, 48, dtype=torch.bool)
    sigma = torch.tensor([1.5, 3.0]).view(1, 2, 1, 1)
    got = blurred(images, sigma, everywhere)[0, :, 16:-16, 16:-16]
    for view in range(2):
        want = ndimage.gaussian_filter(images[0, view].double().numpy(), float(sigma[0, view]), truncate=6)
        assert np.abs(got[view].numpy() - want[16:-16, 16:-16]).max() < 2e-3
    holes = everywhere.clone()
    holes[..., 10:20, 10:20] = False
    uniform = torch.where(holes, 0.7, 100.0)
    assert torch.allclose(blurred(uniform, sigma, holes)[holes], torch.tensor(0.7), atol=1e-5)


def test_unsharp_masking_raises_local_contrast_and_keeps_a_uniform_field(volumes):
    maker = chain(unsharp=[1.0, 1.0], unsharp_mm=[20.0, 20.0])
    shown = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    step = torch.full((1, 2, 32, 32), 2.0)
    step[..., 16:] = 3.0
    signal = maker.detected(step, shown, 5.0, SampleRandom([0]))
    assert signal[..., 16].mean() - signal[..., 15].mean() > 1.5
    assert torch.allclose(maker.detected(torch.full_like(step, 2.0), shown, 5.0, SampleRandom([0])), torch.tensor(2.0))


def test_the_picture_moves_by_millimetres_and_scale(volumes):
    """A film shifted by at most 25 mm and scaled by at most 10 %: the body's centre and width follow the draws."""
    changes = {"shift_mm": 25.0, "scale": 0.1}
    maker, random = chain(**changes), SampleRandom([5, 6])
    xrays = maker.render(volumes, (SIZE, SIZE), random)
    placed, _ = maker._placed(xrays, volumes, random)
    scale = 1 + random.uniform("film/scale", (2,), -0.1, 0.1)
    across = random.uniform("film/across", (2,), -25.0, 25.0)
    at = (torch.arange(SIZE) + 0.5) / SIZE * 360 - 180
    for b in range(2):
        before, after = (x[b, 0, SIZE // 2].clamp_min(0) for x in (xrays, placed))
        centres = [float((row * at).sum() / row.sum()) for row in (before, after)]
        # The output pixel at u shows the input at u / scale + shift.
        assert centres[1] == pytest.approx(float((centres[0] - across[b, 0]) * scale[b, 0]), abs=3.0)
        assert float(after.sum() / before.sum()) == pytest.approx(float(scale[b, 0]), rel=0.05)


def test_films_end_where_the_ct_ends_and_renderings_fade_there(volumes):
    """The scan covers the middle 180 mm: rows beyond are not shown, and no shown row is cut short by the scan's end."""
    short = volumes.clone()
    short[:, :, :16] = short[:, :, 48:] = 0.0
    pictures, shown, _ = films(short)
    rows = shown.any(-1)
    assert not rows[..., :16].any()
    assert not rows[..., 48:].any()
    assert rows[..., 20:44].all()
    assert (pictures[~shown] == 0).all()
    full = Acquisition().render(volumes, (SIZE, SIZE))
    ratio = Acquisition().render(short, (SIZE, SIZE))[shown].sum() / full[shown].sum()
    assert ratio > 0.995


def test_collimation_cuts_up_to_its_share_at_half_of_the_sides(volumes):
    maker = chain(collimation=0.15)
    covered = torch.ones(300, 2, 100, 100, dtype=torch.bool)
    box, _ = maker._collimation(covered, SampleRandom(range(300)))
    cut = 1 - box[:, :, 50].float().mean(-1)  # of the columns, by both sides together
    assert cut.max() <= 0.31
    assert cut.mean().item() == pytest.approx(2 * 0.5 * 0.075, abs=0.01)
    pictures, shown, _ = films(volumes, collimation=0.15)
    assert (pictures[~shown] == 0).all()


def test_display_curves_keep_the_order_of_the_values(volumes):
    """Without local processing a displayed film is an increasing function of the rendering, in 8 bits."""
    maker, random = chain(linear=0.0), SampleRandom(range(2))
    signal = torch.rand(2, 2, 40, 40).sort(-1).values
    shown = torch.ones_like(signal, dtype=torch.bool)
    displayed = maker._displayed(signal, shown, random)
    assert (displayed.diff(dim=-1) >= 0).all()
    assert torch.allclose(displayed * 255, (displayed * 255).round(), atol=1e-4)
    assert displayed.min() == 0
    assert displayed.max() == 1


def test_the_scale_is_the_readers():
    """As numpy's :func:`xray_scale.normalise`: percentiles for linear pictures, the body's histogram for others."""
    generator = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 2, 8, 8, generator=generator), size=60, mode="bilinear")
    pictures = (smooth * 255).round() / 255
    pictures[..., :10] = 0.0  # air at one side
    shown = torch.ones_like(pictures, dtype=torch.bool)
    for linear, name in ((True, "percentile"), (False, "body")):
        got = as_read(pictures, shown, torch.full((1, 2, 1, 1), linear))
        for view in range(2):
            want = normalise("film.png", pictures[0, view].double().numpy(), 1.0, name, view)
            assert np.abs(got[0, view].numpy() - want).max() < 2e-3


def test_padding_has_no_part_in_the_scale():
    generator = torch.Generator().manual_seed(2)
    inner = torch.nn.functional.interpolate(torch.rand(1, 2, 8, 8, generator=generator), size=40, mode="bilinear")
    padded, shown = torch.full((1, 2, 60, 60), 9.0), torch.zeros(1, 2, 60, 60, dtype=torch.bool)
    padded[..., 10:50, 10:50], shown[..., 10:50, 10:50] = inner, True
    for linear in (True, False):
        flags = torch.full((1, 2, 1, 1), linear)
        alone = as_read(inner, torch.ones_like(inner, dtype=torch.bool), flags)
        got = as_read(padded, shown, flags)
        assert torch.allclose(got[..., 10:50, 10:50], alone, atol=1e-5)
        assert (got[~shown] == 0).all()


def test_the_couch_is_cut_off_films_only(volumes):
    maker, random = chain(probability=0.5, no_couch=0.0), SampleRandom(range(8))
    bodies = torch.zeros(8, 1, SIZE, SIZE, SIZE, dtype=torch.uint8)
    bodies[..., :40, :] = 1
    stored = (volumes[:1] * 65535).round().to(torch.uint16).expand(8, -1, -1, -1, -1)
    got = maker.without_couch(stored, bodies, random)
    below = FilmChain(FilmConfig(probability=1.0), Acquisition(hu_window=(-4024.0, 976.0)))
    assert below.without_couch(stored, 0 * bodies, random).int().unique().tolist() == [round(65535 * 0.6)]
    for film, volume in zip(maker.is_film(random).tolist(), got):
        kept = stored[0].int() if not film else stored[0].int() * bodies[0]
        assert torch.equal(volume.int(), kept)


def test_the_couch_tells_no_film_from_a_clean_pair():
    """Of the clean pairs a share has none either."""
    maker, random = chain(probability=0.5, no_couch=0.4), SampleRandom(range(2000))
    volumes = torch.ones(2000, 1, 1, 1, 1)
    kept = maker.without_couch(volumes, torch.zeros_like(volumes), random).flatten() > 0
    films = maker.is_film(random)
    assert not kept[films].any()
    assert kept[~films].float().mean().item() == pytest.approx(0.6, abs=0.06)


def test_films_through_the_pair_maker_are_finite_and_in_range(volumes):
    config = AugmentConfig(source_size=SIZE, film=FilmConfig(probability=1.0))
    maker = PairMaker(Acquisition(), (32, 32, 32), SIZE, config)
    pair = maker(volumes, None, [1, 2])
    clean = PairMaker(Acquisition(), (32, 32, 32), SIZE, AugmentConfig(source_size=SIZE))(volumes, None, [1, 2])
    assert torch.isfinite(pair["xrays"]).all()
    assert pair["xrays"].min() >= 0
    assert pair["xrays"].max() <= 1
    assert torch.equal(pair["ct_volume"], clean["ct_volume"])
    assert (pair["xrays"] - clean["xrays"]).abs().mean() > 0.02
    off = AugmentConfig(source_size=SIZE, enabled=False, film=FilmConfig(probability=1.0))
    assert not PairMaker(Acquisition(), (32, 32, 32), SIZE, off).film.enabled


def test_an_empty_volume_gives_numbers():
    pictures, _, _ = films(torch.zeros(1, 1, SIZE, SIZE, SIZE), seeds=(1,))
    assert torch.isfinite(pictures).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scatter_mm": [60.0, 25.0]}, r"augment.film.scatter_mm is \[60.0, 25.0\]; expected \[low, high\]"),
        ({"unsharp": [0.5]}, r"augment.film.unsharp is \[0.5\]; expected \[low, high\]"),
        ({"scatter": [0.0, 0.1]}, r"augment.film.scatter is \[0.0, 0.1\]; expected a low end above 0"),
        ({"source_distance_mm": [300.0, 900.0]}, "augment.film.source_distance_mm begins at 300; expected more than"),
    ],
)
def test_impossible_ranges_are_refused_by_name(changes, words):
    with pytest.raises(InputError, match=words):
        chain(**changes)


class Operations(TorchDispatchMode):
    """Names of the operations within the block."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    """Tensors of the meta device have no values: whatever asks for one on the host raises. Nor are any sent again."""
    maker, random = FilmChain(FilmConfig(probability=0.5), Acquisition()), SampleRandom(range(3), "meta")
    volumes, xrays = torch.empty(3, 1, 16, 16, 16, device="meta"), torch.empty(3, 2, 32, 32, device="meta")
    bodies = torch.empty(3, 1, 16, 16, 16, dtype=torch.uint8, device="meta")
    assert maker(xrays, maker.without_couch(volumes, bodies, random), random).shape == (3, 2, 32, 32)
    with Operations() as operations:
        pictures = maker(xrays, volumes, random)
        maker.is_film(random)
    assert pictures.device.type == "meta"
    assert "aten::sort" in operations.names
    assert "aten::lift_fresh" not in operations.names  # what torch.tensor(numbers) does
    with pytest.raises(RuntimeError):
        pictures.mean().item()


def test_what_a_film_does_not_show_is_not_seen(volumes):
    """Films by their mask, whose hidden pixels are air; renderings are seen everywhere."""
    half = FilmConfig(**{**PLAIN, "probability": 0.5, "collimation": 0.4})
    config, seeds = AugmentConfig(source_size=SIZE, xray_noise=0.0, film=half), range(12)
    maker = PairMaker(Acquisition(), (32, 32, 32), SIZE, config, with_seen=True)
    pair = maker(volumes[:1].expand(12, -1, -1, -1, -1), None, seeds)
    is_film = maker.film.is_film(SampleRandom(seeds))
    assert 0 < is_film.sum() < 12
    assert pair["seen"].shape == pair["xrays"].shape
    assert pair["seen"].unique().tolist() == [0.0, 1.0]
    assert (pair["seen"][~is_film] == 1).all()
    films_seen = pair["seen"][is_film]
    assert 0.2 < films_seen.mean() < 0.95
    assert (pair["xrays"][is_film][films_seen == 0] == 0).all()
    assert (pair["xrays"][is_film][films_seen == 1] > 0).float().mean() > 0.5
    plain = PairMaker(Acquisition(), (32, 32, 32), SIZE, config)(volumes, None, [1, 2])
    assert plain.keys() == {"xrays", "ct_volume"}
