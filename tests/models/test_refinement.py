"""RefinementNetwork: exact shuffles, plain upsampling at the start, tiles and patches that equal the whole volume."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model_enhanced import RefinementNetwork
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, render_xrays
from xray2ct.models.blocks import pixel_shuffle_3d, pixel_unshuffle_3d, upsample
from xray2ct.models.loading import load_refinement
from xray2ct.models.upsampling import upsample_spline
from xray2ct.models.window import Window

SMALL = {
    "channels": 8,
    "growth": 4,
    "rrdb_blocks": 1,
    "head_channels": (8, 6, 2),
    "guide_widths": (8, 8, 16, 16),
    "guide_channels": (2, 2, 2),
    "xray_size": 64,
    "stem_stride": 1,
}


def make(guided=False, alive=True, **changes) -> RefinementNetwork:
    """A small network in eval mode. alive: its zero-initialised layers are drawn too, so that they hide nothing."""
    torch.manual_seed(0)
    network = RefinementNetwork(guided=guided, **{**SMALL, **changes}).eval()
    if alive:
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return network


def coarse_volume(size=(16, 16, 16), batch=1):
    """Values well inside [0, 1], so that clamping hides no difference."""
    return 0.4 + 0.2 * torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(1))


def some_xrays(batch=1, size=64):
    return torch.rand(batch, 2, size, size, generator=torch.Generator().manual_seed(2))


class TestShuffle:
    def test_each_sub_voxel_has_its_channel(self):
        x = torch.arange(2 * 16 * 3 * 4 * 5).reshape(2, 16, 3, 4, 5)
        y = pixel_shuffle_3d(x)
        assert y.shape == (2, 2, 6, 8, 10)
        for c, z, h, w in ((0, 0, 0, 0), (1, 5, 6, 9), (1, 2, 7, 4), (0, 3, 0, 1)):
            i, j, k = z % 2, h % 2, w % 2
            assert y[1, c, z, h, w] == x[1, ((c * 2 + i) * 2 + j) * 2 + k, z // 2, h // 2, w // 2]

    def test_a_flat_volume_is_torch_s_own_shuffle(self):
        """One slice, factor 2 in-plane: torch's 2D PixelShuffle, twice (once per slice made)."""
        x = torch.rand(1, 8, 1, 5, 6)
        y = pixel_shuffle_3d(x)
        for i in range(2):
            assert torch.equal(y[:, :, i], F.pixel_shuffle(x[:, 4 * i : 4 * i + 4, 0], 2))

    @pytest.mark.parametrize("factor", [2, 3])
    def test_unshuffle_inverts_it(self, factor):
        x = torch.rand(2, 2 * factor**3, 2, 3, 4)
        assert torch.equal(pixel_unshuffle_3d(pixel_shuffle_3d(x, factor), factor), x)

    def test_wrong_channels_and_sizes_are_named(self):
        with pytest.raises(ValueError, match="12 channels"):
            pixel_shuffle_3d(torch.rand(1, 12, 2, 2, 2))
        with pytest.raises(ValueError, match=r"\(2, 3, 2\)"):
            pixel_unshuffle_3d(torch.rand(1, 1, 2, 3, 2))


class TestNetwork:
    @pytest.mark.parametrize("guided", [False, True])
    def test_default_has_five_to_eight_million_parameters(self, guided):
        assert 5e6 <= sum(p.numel() for p in RefinementNetwork(guided=guided).parameters()) <= 8e6

    @pytest.mark.parametrize("guided", [False, True])
    def test_untrained_it_is_trilinear_interpolation(self, guided):
        network = make(guided, alive=False)
        coarse = torch.rand(2, 1, 16, 16, 16)
        expected = F.interpolate(coarse, scale_factor=4, mode="trilinear", align_corners=False)
        assert torch.allclose(network(coarse, some_xrays(2)), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("guided", [False, True])
    def test_with_a_cubic_start_it_is_untrained_the_consistent_spline(self, guided):
        network, coarse = make(guided, alive=False, start="cubic"), coarse_volume(batch=2)
        volume = network(coarse, some_xrays(2))
        assert torch.equal(volume, upsample_spline(coarse).clamp(0, 1))
        assert torch.allclose(F.avg_pool3d(volume, 4), coarse, atol=1e-6)  # nothing is clamped here

    @pytest.mark.parametrize("size", [(2, 2, 2), (6, 4, 10), (16, 8, 12)])
    def test_any_multiple_of_two(self, size):
        assert make()(coarse_volume(size)).shape == (1, 1, *(4 * n for n in size))

    def test_the_default_size(self):
        assert make()(coarse_volume((64, 64, 64))).shape == (1, 1, 256, 256, 256)

    def test_it_is_residual(self):
        network, coarse = make(), coarse_volume()
        shifted = (network(coarse) - upsample(coarse)).abs()
        assert 1e-4 < shifted.mean() < 0.5

    def test_x_rays_matter_where_they_project(self):
        """A bright PA pixel row changes the slices it projects to, not those far above and below."""
        network = make(guided=True, geometry=Geometry(kind="parallel"))
        for block in network.guidance.encoder.stages[1:]:  # only the finest, local features
            for parameter in block.parameters():
                torch.nn.init.zeros_(parameter)
        for layer in network.guidance.encoder.stages[0].modules():
            if isinstance(layer, torch.nn.GroupNorm):  # its statistics reach over the whole image
                torch.nn.init.zeros_(layer.weight)
        coarse, xrays = coarse_volume(), torch.full((1, 2, 64, 64), 0.3)
        changed = xrays.clone()
        changed[:, 0, 10] = 0.9
        # The trunk sees far; the head alone (4x guidance) is what must be local.
        difference = _head(network, coarse, changed, xrays) - _head(network, coarse, xrays, xrays)
        rows = difference[0, 0].abs().amax(dim=(1, 2))
        assert rows[10] > 1e-4
        assert rows[:3].max() == 0
        assert rows[24:].max() == 0

    def test_guidance_sees_what_the_xrays_have_over_the_coarse_volumes_own(self):
        """Nothing where they agree, what is missing where the volume is too thin: more than a rescaled X-ray."""
        network, coarse = make(guided=True, geometry=Geometry("parallel")), coarse_volume()
        own = render_xrays(coarse, network.geometry, (64, 64))
        denser = coarse.clone()
        denser[..., 4:8, 4:8, 4:8] += 0.2
        missing = render_xrays(denser, network.geometry, (64, 64)) - own
        seen = []
        network.guidance.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for xrays in (own, own + missing):
            network(coarse, xrays)
            assert torch.allclose(seen[-1][:, :, 0], xrays)
        assert missing.max() > 0.02
        assert seen[0][:, :, 1].abs().max() < 1e-5
        residual = seen[1][:, :, 1]
        assert torch.allclose(residual, residual.max() / missing.max() * missing, atol=1e-4)
        assert residual.max() > 0.2  # of a size that a network can learn from

    def test_the_views_are_not_interchangeable(self):
        network, coarse, xrays = make(guided=True), coarse_volume(), some_xrays()
        assert (network(coarse, xrays) - network(coarse, xrays.flip(1))).abs().max() > 1e-3

    def test_without_x_rays_a_guided_network_still_works(self):
        network, coarse = make(guided=True), coarse_volume()
        assert (network(coarse) - network(coarse, some_xrays())).abs().max() > 1e-3

    def test_dropped_guidance_is_the_same_as_none(self):
        """Training drops whole samples' X-rays: what the network then sees is what a call without X-rays sees."""
        network, coarse, xrays = make(guided=True), coarse_volume(batch=2), some_xrays(2)
        volume = network(coarse, xrays, gate=torch.tensor([0.0, 1.0]))
        assert torch.allclose(volume[0], network(coarse)[0], atol=1e-6)
        assert torch.allclose(volume[1], network(coarse, xrays)[1], atol=1e-6)

    def test_every_parameter_gets_a_gradient_even_when_guidance_is_dropped(self):
        """DDP would wait for ever for a parameter without one."""
        network = make(guided=True).train()
        network(coarse_volume(), some_xrays(), gate=torch.zeros(1)).sum().backward()
        assert [n for n, p in network.named_parameters() if p.grad is None] == []

    def test_every_parameter_learns(self):
        network = make(guided=True).train()
        network(coarse_volume(), some_xrays()).square().sum().backward()
        assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_activation_checkpointing_gives_the_same_gradients(self):
        gradients = []
        for checkpointing in (False, True):
            network = make(guided=True, activation_checkpointing=checkpointing).train()
            network(coarse_volume(batch=2), some_xrays(2)).square().sum().backward()
            gradients.append([p.grad for p in network.parameters()])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients))

    def test_bfloat16_autocast_stays_near_float32(self):
        network, coarse, xrays = make(guided=True), coarse_volume(), some_xrays()
        exact = network(coarse, xrays)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = network(coarse, xrays)
        assert rounded.dtype == torch.float32
        assert (exact - upsample(coarse)).abs().max() > 10 * (exact - rounded).abs().max()


def _head(network, coarse, fine_xrays, trunk_xrays):
    """The volume with the trunk's guidance from one pair of X-rays and the head's from another."""
    window = Window.whole(coarse.shape[2:])
    with torch.no_grad():
        deep = network.deep(coarse, network.encode(coarse, trunk_xrays), window)
        return network.head(coarse, deep, window, network.encode(coarse, fine_xrays), window)


class TestTiles:
    @pytest.mark.parametrize(("guided", "start"), [(False, "trilinear"), (True, "trilinear"), (True, "cubic")])
    def test_tiled_equals_untiled(self, guided, start):
        """Tiles of one voxel, of a size that divides nothing, and of nearly the whole: borders of all kinds."""
        network, coarse, xrays = make(guided, start=start), coarse_volume((6, 8, 10), batch=2), some_xrays(2, 32)
        network.xray_size = 32
        whole = network.refine(coarse, xrays)
        assert (whole - upsample(coarse)).abs().mean() > 1e-3
        for tile in (1, 3, 9):
            if tile > 1 or not guided:  # 480 tiles; guidance depends on the window's place, not on its size
                assert torch.allclose(network.refine(coarse, xrays, tile=tile), whole, atol=2e-6), tile

    def test_a_smaller_overlap_would_show(self):
        """The halo is the head's receptive field: neither too small nor a guess."""
        network, coarse = make(), coarse_volume()
        whole = network.refine(coarse)
        network.halo = RefinementNetwork.halo - 1
        assert not torch.allclose(network.refine(coarse, tile=4), whole, atol=2e-6)

    def test_a_tile_must_be_positive(self):
        with pytest.raises(ValueError, match="tile is 0"):
            make().refine(coarse_volume(), tile=0)


class TestPatches:
    @pytest.mark.parametrize("start", ["trilinear", "cubic"])
    def test_a_patch_with_all_the_context_is_a_crop_of_the_whole(self, start):
        network, coarse, xrays = make(guided=True, start=start), coarse_volume(batch=2), some_xrays(2)
        whole = network(coarse, xrays)
        origins = [[(0, 0, 0), (3, 8, 11)], [(12, 5, 0), (7, 7, 7)]]
        patches = network(coarse, xrays, origins, patch=4, context=16)
        assert patches.shape == (4, 1, 16, 16, 16)
        for index, (sample, corner) in enumerate([(0, origins[0][0]), (0, origins[0][1]), (1, origins[1][0])]):
            z, y, x = (4 * n for n in corner)
            expected = whole[sample, 0, z : z + 16, y : y + 16, x : x + 16]
            assert torch.allclose(patches[index, 0], expected, atol=2e-6), index

    def test_the_trunk_sees_as_much_context_as_it_is_given(self):
        network, coarse = make(), coarse_volume((24, 24, 24))
        whole = network(coarse)[:, :, 40:56, 40:56, 40:56]
        errors = [
            (network(coarse, None, [[(10, 10, 10)]], patch=4, context=context) - whole).abs().mean().item()
            for context in (3, 6, 16)
        ]
        assert errors[0] > errors[1] > 1e-4
        assert errors[2] < 2e-6

    @pytest.mark.parametrize(("origin", "patch"), [((0, 0, 13), 4), ((-1, 0, 0), 4), ((0, 0, 0), 17), ((0, 0, 0), 0)])
    def test_a_patch_outside_the_volume_is_named(self, origin, patch):
        with pytest.raises(ValueError, match="patch"):
            make()(coarse_volume(), None, [[origin]], patch=patch)

    @pytest.mark.parametrize("origin", [(0, 0, 0), (5, 6, 7), (12, 12, 12)])
    @pytest.mark.parametrize("margin", [0, 3, 8, 20])
    def test_a_grown_window_contains_the_old_one_and_stays_inside(self, origin, margin):
        window = Window([origin], (4, 4, 4), (16, 16, 16))
        grown = window.grown(margin, 2)
        for o, n, g, s in zip(origin, window.size, grown.origins[0], grown.size):
            assert g >= 0
            assert g + s <= 16
            assert g % 2 == s % 2 == 0
            assert g <= max(0, o - margin)
            assert g + s >= min(16, o + n + margin)


class TestBadInput:
    @pytest.mark.parametrize(
        ("shape", "word"),
        [((16, 16, 16), "shape"), ((1, 2, 16, 16, 16), "shape"), ((1, 1, 16, 15, 16), "multiples of 2")],
    )
    def test_wrong_shape(self, shape, word):
        with pytest.raises(ValueError, match=word):
            make()(torch.full(shape, 0.5))

    def test_hounsfield_units_are_refused(self):
        with pytest.raises(ValueError, match=r"-1000 to 400; expected \[0, 1\].*hu_to_unit"):
            make()(torch.tensor([-1000.0, 400.0]).repeat(4).reshape(1, 1, 2, 2, 2))

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="nan"):
            make()(torch.full((1, 1, 4, 4, 4), float("nan")))

    def test_wrong_x_rays(self):
        with pytest.raises(ValueError, match=r"expected \(B, 2, H, W\)"):
            make(guided=True)(coarse_volume(), torch.rand(1, 1, 64, 64))

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"channels": 0}, "channels is 0; expected a whole number, at least 1"),
            ({"growth": 2.5}, "growth is 2.5"),
            ({"rrdb_blocks": -1}, "rrdb_blocks is -1"),
            ({"stem_stride": 3}, "stem_stride is 3; expected 1, 2 or 4"),
            ({"xray_size": 80}, "xray_size is 80; expected a multiple of 32"),
            ({"guide_widths": (8, 8)}, r"guide_widths is \[8, 8\]; expected 4 whole numbers"),
            ({"guide_widths": 28}, "guide_widths is 28; expected 4"),
            ({"guide_widths": (24, 28, 64, 96)}, r"guide_widths\[1\] is 28; expected a multiple of 8"),
            ({"guide_widths": (24, 48, 64, 136)}, r"guide_widths\[3\] is 136; expected a multiple of 16"),
            ({"guide_channels": (2, 2)}, r"guide_channels is \[2, 2\]; expected 3"),
            ({"guide_channels": (2, 0, 2)}, r"guide_channels is \[2, 0, 2\]; expected 3 whole numbers, at least 1"),
            ({"head_channels": (8, 6)}, r"head_channels is \[8, 6\]; expected 3"),
            ({"head_channels": (8, 6, 0)}, "head_channels"),
            ({"start": "linear"}, "start is 'linear'; expected trilinear or cubic"),
        ],
    )
    def test_wrong_settings_are_named(self, changes, key):
        with pytest.raises(InputError, match=rf"model\.{key}"):
            make(guided=True, **changes)


class TestWeights:
    def test_settings_geometry_and_resolution_travel_with_the_weights(self):
        """The README's snippet: ``RefinementNetwork()`` takes any checkpoint's shape."""
        geometry = Geometry(kind="parallel", fov_mm=300)
        network, coarse, xrays = make(True, geometry=geometry, start="cubic"), coarse_volume(), some_xrays()
        fresh = RefinementNetwork()
        fresh.load_state_dict(network.state_dict())
        assert fresh.geometry == geometry
        assert fresh.xray_size == 64
        assert torch.equal(fresh.eval()(coarse, xrays), network(coarse, xrays))

    def test_weights_that_name_no_start_are_trilinear(self):
        """Those of earlier versions, also where a network with a cubic start loads them."""
        network, coarse = make(), coarse_volume()
        state = copy.deepcopy(network.state_dict())
        del state["_extra_state"]["settings"]["start"]
        fresh = make(start="cubic")
        before = list(fresh.parameters())
        fresh.load_state_dict(state)
        assert all(one is other for one, other in zip(before, fresh.parameters(), strict=True))  # an optimiser's
        assert torch.equal(fresh(coarse), network(coarse))

    def test_weights_of_another_network_are_refused(self):
        state = make().state_dict()
        del state["out.weight"]
        with pytest.raises(RuntimeError, match=r"out\.weight"):
            RefinementNetwork().load_state_dict(state)

    def test_a_stage_1_checkpoint_is_not_one_of_stage_2(self, tmp_path):
        from tests.helpers.tiny_data import make_checkpoint, make_dataset

        base = make_checkpoint(tmp_path / "base.pt", make_dataset(tmp_path / "data"))
        with pytest.raises(InputError, match=r"base\.pt.*'enhanced_direct'; expected 'refinement'"):
            load_refinement(base)
        with pytest.raises(InputError, match="no such checkpoint"):
            load_refinement(tmp_path / "nothing.pt")
