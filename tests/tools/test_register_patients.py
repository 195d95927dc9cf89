"""Registration of patients: a known deformation is found, scans' ends exert no force, components by hand."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from tools import register_patients as tool
from xray2ct.files import InputError


def body(size=32, shift=(0.0, 0.0, 0.0), scale=1.0):
    """A soft ellipsoid with a smaller, darker one inside, ``(D, H, W)`` float32."""
    z, y, x = np.meshgrid(*[np.arange(size) - (size - 1) / 2 - s for s in shift], indexing="ij")
    whole = ((z / 13) ** 2 + (y / 8) ** 2 + (x / 11) ** 2 < scale**2).astype(np.float32)
    whole -= 0.8 * (((z - 2) / 6) ** 2 + (y / 4) ** 2 + ((x - 4) / 4) ** 2 < scale**2)
    return gaussian_filter(whole, 0.7).astype(np.float32)


def test_a_known_shift_is_found_in_its_components_also_beyond_the_scans_end():
    sitk = pytest.importorskip("SimpleITK", reason="registration needs SimpleITK")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    moving, fixed, mask = body(), body(shift=(1.0, -2.0, 3.0)), np.ones((32,) * 3, np.float32)
    mask[26:] = 0.0
    cut = fixed * mask
    field = tool.register(sitk, cut, mask, moving)
    inside = (fixed > 0.5) & (mask > 0)
    assert field[inside].mean(0) == pytest.approx([-3.0, 2.0, -1.0], abs=0.5)  # (x, y, z)
    before, after = ((tool.warp(moving, f) - fixed)[mask > 0] for f in (np.zeros_like(field), field))
    assert (after**2).mean() < 0.1 * (before**2).mean()
    beyond = (tool.warp(moving, field) - fixed)[26:29]
    assert (beyond**2).mean() < (fixed[26:29] ** 2).mean() / 4


def test_components_are_those_of_the_fields_and_shifts_are_no_anatomy():
    random = np.random.default_rng(0)
    modes = random.normal(size=(2, 3, 4, 4, 4))
    modes -= modes.mean((2, 3, 4), keepdims=True)
    fields = np.einsum("nk,kcdhw->ncdhw", random.normal(size=(6, 2)) * [3.0, 1.0], modes) + 0.5
    fields += random.normal(size=(6, 3, 1, 1, 1))
    mean, components, shares = tool.principal_components(tool.without_shift(fields))
    assert len(components) == 5
    assert shares[:2].sum() == pytest.approx(1.0)
    flat = tool.without_shift(fields).reshape(6, -1)
    found = components.reshape(5, -1)
    assert np.allclose(found.T @ found, np.cov(flat.T))  # each times its standard deviation
    assert np.allclose(mean.ravel(), flat.mean(0))
    assert tool.explained_when_left_out(tool.without_shift(fields)) == pytest.approx(1.0)


def test_stored_points_keep_linear_fields_in_voxels():
    axis = np.arange(32) - 15.5
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    field = np.stack([0.1 * x, 0.2 * z, -0.1 * y], axis=-1)
    back = tool.from_lattice(tool.to_lattice(field, 16), 32)
    assert np.abs(back - field)[4:-4, 4:-4, 4:-4].max() < 0.1


def test_options_are_checked(tmp_path):
    with pytest.raises(InputError, match="--points is 2; expected 4 to 64"):
        tool.parse_args(["--data", str(tmp_path), "--output", str(tmp_path / "a.npz"), "--points", "2"])
    with pytest.raises(InputError, match="--size is 20; expected a multiple of 8"):
        tool.parse_args(["--data", str(tmp_path), "--output", str(tmp_path / "a.npz"), "--size", "20"])
