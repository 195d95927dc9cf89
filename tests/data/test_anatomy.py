"""Anatomy mixing: composed warps against torch's, limits worked out by hand, statistics, files and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.data.test_warp import FOV, SAME, field_by_torch
from tests.helpers.runs import build
from tests.helpers.tiny_data import make_dataset
from xray2ct.data.anatomy import (
    SMALLEST,
    AnatomyConfig,
    DeformationModel,
    load_deformations,
    save_deformations,
    unfolded_share,
)
from xray2ct.data.augment import AugmentConfig, PairMaker, random_affine, random_displacement
from xray2ct.data.sample_random import SampleRandom
from xray2ct.data.warp import SmoothWarp
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.training.config import config_dict
from xray2ct.training.run_identity import check_same_run


def linear(matrix, points=5, batch=1):
    """Displacements ``(B, 3, n, n, n)`` = matrix (x, y, z)."""
    axis = torch.linspace(-1.0, 1.0, points)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.einsum("ij,jdhw->idhw", torch.tensor(matrix), torch.stack([x, y, z])).expand(batch, -1, -1, -1, -1)


def smooth_components(count=3, points=9, size=0.3):
    coarse = SampleRandom(range(count)).normal("components", (3, 4, 4, 4), std=size)
    return F.interpolate(coarse, size=(points,) * 3, mode="trilinear", align_corners=True)


def model(components, patients=("p0", "p1"), fov_mm=360.0):
    return DeformationModel(components, list(patients), fov_mm, "0123")


def entries(**changes):
    values = {"components": smooth_components(size=0.05).numpy(), "patients": np.array(["p0", "p1"]), "fov_mm": 360.0}
    return {**values, **changes}


# ------------------------------------------------------------------------------------------------
# Warps


def test_the_anatomy_is_deformed_first_and_sampled_once():
    """A linear displacement is exact at any place: x, y and z components, read behind a mirrored, elastic warp."""
    random, config = SampleRandom([3, 4]), AugmentConfig(elastic_mm=6.0, scale=0.0, translation_mm=5.0)
    shape = (16, 20, 18)
    theta, elastic = random_affine(config, FOV, random) * 0.7, random_displacement(config, FOV, random)
    matrix = [[0.1, 0.2, 0.0], [0.0, -0.1, 0.05], [0.3, 0.0, 0.1]]
    volumes = random.uniform("volume", (1, *shape))
    places = F.affine_grid(theta, volumes.shape, align_corners=False) + field_by_torch(elastic, shape)
    assert places.abs().max() < 1
    expected = F.grid_sample(volumes, places + places @ torch.tensor(matrix).T, align_corners=False)
    warp = SmoothWarp(theta, elastic, shape, linear(matrix, 9, 2))
    # Elastic displacements bend between the anatomy's control points: not exact there.
    plain = SmoothWarp(theta, None, shape, linear(matrix, 9, 2)).sample(volumes, SAME)
    straight = F.affine_grid(theta, volumes.shape, align_corners=False)
    exact = F.grid_sample(volumes, straight + straight @ torch.tensor(matrix).T, align_corners=False)
    assert torch.allclose(plain, exact, atol=5e-5)
    assert (warp.sample(volumes, SAME) - expected).abs().mean() < 0.02
    assert (warp.sample(volumes, SAME) - SmoothWarp(theta, elastic, shape).sample(volumes, SAME)).abs().mean() > 0.1


def test_masks_move_with_the_anatomy():
    theta, matrix = torch.eye(3, 4)[None], [[-0.2, 0.1, 0.0], [0.0, -0.3, 0.1], [-0.1, 0.0, -0.2]]
    masks = SampleRandom([2]).uniform("mask", (1, 16, 16, 16))
    found = SmoothWarp(theta, None, masks.shape[2:], linear(matrix, 9)).sample_cells(masks, (8, 8, 8))
    centres = F.affine_grid(theta, (1, 1, 8, 8, 8), align_corners=False)
    expected = F.grid_sample(masks, centres + centres @ torch.tensor(matrix).T, align_corners=False)
    assert torch.allclose(found, expected, atol=3e-5)


# ------------------------------------------------------------------------------------------------
# Draws


@pytest.mark.parametrize(
    ("matrix", "share"),
    [
        ([[-0.5, 0, 0], [0, -0.5, 0], [0, 0, -0.5]], 0.80),  # (1 - t / 2)^3 >= 0.2 up to t = 0.830
        ([[-0.9, 0, 0], [0, 0, 0], [0, 0, 0]], 0.85),  # 1 - 0.9 t >= 0.2 up to t = 0.889
        ([[0, 0, 0], [0, -0.9, 0], [0, 0, 0]], 0.85),
        ([[0, 0, 0], [0, 0, 0], [0, 0, -0.9]], 0.85),
        ([[0, 3.0, 0], [0, 0, 0], [0, 0, 0]], 1.0),  # a shear keeps volumes
        ([[0, 2.0, 0], [2.0, 0, 0], [0, 0, 0]], 0.40),  # 1 - 4 t^2 >= 0.2 up to t = 0.447
        ([[0, -2.0, 0], [2.0, 0, 0], [0, 0, 0]], 1.0),  # 1 + 4 t^2
        ([[0, 1.0, 0], [0, 0, 1.0], [-1.0, 0, 0]], 0.90),  # 1 - t^3 >= 0.2 up to t = 0.928
        ([[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], 1.0),
    ],
)
def test_displacements_are_limited_before_they_fold(matrix, share):
    both = torch.cat([linear(matrix), torch.zeros(1, 3, 5, 5, 5)]).float()
    assert unfolded_share(both).tolist() == pytest.approx([share, 1.0])


def determinants(grid):
    """Jacobian determinants of sampling grids ``(B, D, H, W, 3)`` between their voxels, 1 for the identity."""
    n = grid.shape[1]
    slopes = [grid.diff(dim=axis)[:, : n - 1, : n - 1, : n - 1] * n / 2 for axis in (3, 2, 1)]
    return torch.linalg.det(torch.stack(slopes, dim=-1))


def test_no_drawn_anatomy_folds_the_body():
    components, size = smooth_components(), 24
    random, config = SampleRandom(range(16)), AnatomyConfig("file", probability=1.0, strength=2.0)
    free = torch.einsum("bk,kcdhw->bcdhw", random.normal("free", (3,), std=2.0), components)
    smallest = []
    for moved in (free, model(components).draw(random, config)):
        warp = SmoothWarp(torch.eye(3, 4).expand(16, 3, 4), None, (size,) * 3, moved)
        rows, columns = warp.expanded()
        grid = (rows.unflatten(-1, (-1, 3)).transpose(-1, -2) @ columns).transpose(-1, -2)
        smallest.append(determinants(grid).min().item())
    assert smallest[0] < 0 < SMALLEST / 2 < smallest[1]


def test_draws_have_the_components_deviation_and_follow_from_the_seed():
    """Normal coefficients cut at two standard deviations have one of 0.9594 (by quadrature)."""
    components = smooth_components(2, points=4, size=0.01)
    random = SampleRandom(range(1000))
    moved = model(components).draw(random, AnatomyConfig("file", probability=1.0, strength=1.5))
    expected = 1.5 * 0.9594 * components.square().sum(0).sqrt()
    assert torch.allclose(moved.std(0), expected, rtol=0.12, atol=1e-5)
    assert moved.mean(0).abs().max() < 0.15 * expected.max()
    alone = model(components).draw(SampleRandom([17]), AnatomyConfig("file", probability=1.0, strength=1.5))
    assert torch.equal(alone[0], moved[17])


def test_a_share_of_the_samples_is_drawn():
    components = smooth_components(2, points=4, size=0.01)
    moved = model(components).draw(SampleRandom(range(1000)), AnatomyConfig("file", probability=0.3, strength=1.0))
    assert (moved.flatten(1).abs().amax(1) > 0).float().mean().item() == pytest.approx(0.3, abs=0.05)


# ------------------------------------------------------------------------------------------------
# Files and training


def test_what_is_saved_is_read(tmp_path):
    path = tmp_path / "anatomy.npz"
    save_deformations(path, **entries())
    found = load_deformations(path)
    assert np.array_equal(found.components.numpy(), entries()["components"])
    assert (found.patients, found.fov_mm) == (["p0", "p1"], 360.0)
    save_deformations(path, **entries(fov_mm=300.0))
    assert load_deformations(path).fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": np.zeros((2, 3, 4, 4, 5), np.float32)}, r"components are float32 \(2, 3, 4, 4, 5\)"),
        ({"components": np.zeros((2, 3, 4, 4, 4))}, "components are float64"),
        ({"components": np.full((2, 3, 4, 4, 4), np.nan, np.float32)}, "are not finite"),
        ({"patients": np.array([1, 2])}, "patients are no texts"),
        ({"patients": np.array([{}], dtype=object)}, "or damaged"),
    ],
)
def test_other_entries_are_named(tmp_path, changes, message):
    path = tmp_path / "anatomy.npz"
    save_deformations(path, **entries(**changes))
    with pytest.raises(InputError, match=message):
        load_deformations(path)


def test_files_that_are_none_are_named(tmp_path):
    path = tmp_path / "anatomy.npz"
    with pytest.raises(InputError, match="no such file; make it with"):
        load_deformations(path)
    save_deformations(path, **entries())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="or damaged"):
        load_deformations(path)


def test_pairs_hold_the_mixed_anatomy_in_volume_and_xrays(tmp_path):
    path = tmp_path / "anatomy.npz"
    save_deformations(path, **entries(components=smooth_components(size=0.1).numpy()))
    off = {"rotation_deg": 0, "scale": 0, "translation_mm": 0, "elastic_mm": 0, "hu_shift": 0, "hu_scale": 0}
    off |= {"mirror_probability": 0, "xray_noise": 0, "source_size": 32}
    volumes = F.interpolate(torch.rand(1, 1, 5, 5, 5), size=(32,) * 3, mode="trilinear")
    pairs = {}
    for name, file in (("plain", None), ("mixed", str(path))):
        config = AugmentConfig(**off, anatomy=AnatomyConfig(file, probability=1.0, strength=1.0))
        pairs[name] = PairMaker(Acquisition(), (32,) * 3, 32, config)(volumes, None, [5])
    mixed = pairs["mixed"]
    assert (mixed["ct_volume"] - pairs["plain"]["ct_volume"]).abs().mean() > 0.02
    assert torch.allclose(mixed["xrays"], Acquisition().render(mixed["ct_volume"], (32, 32)).clip(0, 1), atol=1e-5)


def test_training_names_its_anatomies_and_refuses_those_of_patients_it_is_scored_on(tmp_path):
    root, path = make_dataset(tmp_path / "data"), tmp_path / "anatomy.npz"
    setting = f"augment.anatomy.file={path}"
    for changes, message in (
        ({"patients": np.array(["p0", "p3", "p4"])}, r"holds the anatomy of p3, p4, which validate or test here"),
        ({"fov_mm": 300.0}, r"its cube has 300 mm; expected the data set's 360"),
    ):
        save_deformations(path, **entries(**changes))
        with pytest.raises(InputError, match=message):
            build(root, setting)
    save_deformations(path, **entries(patients=np.array(["p0", "elsewhere"])))
    config, task, _ = build(root, setting)
    header = task.header()
    assert header["train_patients"] == ["p0", "p1", "p2", "elsewhere"]
    earlier = {**header, "config": config_dict(config)}
    check_same_run("last.pt", earlier, header, config)
    save_deformations(path, **entries(patients=np.array(["p0", "elsewhere"]), fov_mm=360.0, mean=np.zeros(3)))
    with pytest.raises(InputError, match="mixed anatomies of another augment"):
        check_same_run("last.pt", earlier, build(root, setting)[1].header(), config)
    with pytest.raises(InputError, match="X-rays are read from files: expected null"):
        build(root, setting, "data.xray_source=files")
