"""The renderer's backends against dense weights built here, in float64: forward and adjoint, all geometries."""

import numpy as np
import pytest
import torch

from tests.helpers.interpreter import check_in_interpreter
from xray2ct.geometry.projector import Geometry, line_integrals

GEOMETRIES = {
    "cone": Geometry(),
    "steep": Geometry(sdd_mm=700.0, sid_mm=500.0),
    "narrow": Geometry(detector_mm=200.0),  # voxels that no pixel reads
    "wide": Geometry("scout", detector_mm=600.0),  # pixels that read no voxel
    "scout": Geometry("scout"),
    "parallel": Geometry("parallel"),
}
EACH = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
# Sizes along every axis differ; pixels finer and coarser than voxels.
SIZES = pytest.mark.parametrize(
    ("shape", "size"), [((7, 9, 11), (13, 10)), ((12, 10, 9), (5, 40))], ids=["fine", "coarse"]
)


def matrix(geometry, size, shape):
    """Both views as one matrix ``(2 rows columns, D H W)``, each entry from its ray's place in its slice."""
    depth, height, width = shape
    v, u = (((np.arange(n) + 0.5) / n - 0.5) * geometry.detector_mm for n in size)
    centres = [((np.arange(n) + 0.5) / n - 0.5) * geometry.fov_mm for n in shape]
    full = np.zeros((2, *size, *shape))
    for view, (slices, across) in enumerate(((height, width), (width, height))):
        for k in range(slices):
            towards = -centres[1][k] if view == 0 else centres[2][k]
            z, x, slant = v, u, np.ones(size)
            if geometry.kind != "parallel":
                scale = (geometry.sid_mm + towards) / (geometry.sdd_mm if geometry.kind == "cone" else geometry.sid_mm)
                tangents = [z[:, None], x] if geometry.kind == "cone" else [0 * z[:, None], x]
                distance = geometry.sdd_mm if geometry.kind == "cone" else geometry.sid_mm
                slant = np.sqrt(1 + (tangents[0] ** 2 + tangents[1] ** 2) / distance**2)
                z, x = (z * scale if geometry.kind == "cone" else z), x * scale
            hats = []
            for place, n in ((z, depth), (x, across)):
                index = (place / geometry.fov_mm + 0.5) * n - 0.5
                hats.append(np.clip(1 - np.abs(index[:, None] - np.arange(n)), 0, None))
            weights = np.einsum("rd,qc->rqdc", *hats) * (slant * geometry.fov_mm / slices)[:, :, None, None]
            if view == 0:
                full[0, :, :, :, k, :] = weights
            else:
                full[1, :, :, :, :, k] = weights
    return torch.from_numpy(full).reshape(2 * size[0] * size[1], -1)


def check(backend, geometry, shape, size):
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(3, 1, *shape, generator=generator)[::2].requires_grad_()  # not contiguous
    weight = torch.rand(2, 2, *size, generator=generator)
    image = line_integrals(volume, geometry, size, backend)
    (gradient,) = torch.autograd.grad((image * weight).sum(), volume)
    system = matrix(geometry, size, shape)
    expected = volume.detach().double().flatten(1) @ system.T
    adjoint = weight.double().flatten(1) @ system
    assert image.shape == (2, 2, *size)
    assert torch.allclose(image.double().flatten(1), expected, rtol=1e-5, atol=1e-5 * expected.max().item())
    assert torch.allclose(gradient.double().flatten(1), adjoint, rtol=1e-5, atol=1e-5 * adjoint.max().item())


@EACH
@SIZES
@pytest.mark.parametrize("backend", ["dense", "banded"])
def test_backend_is_the_matrix_and_its_transpose(backend, geometry, shape, size):
    check(backend, geometry, shape, size)


TRITON = """
from tests.geometry.test_backends import GEOMETRIES, check
from xray2ct.geometry import joseph_triton
joseph_triton.TILE = (4, 8)  # several tiles along both axes of these small sizes
check("triton", GEOMETRIES["steep"], (5, 3, 4), (6, 9))
check("triton", GEOMETRIES["wide"], (3, 4, 3), (4, 5))
print("equal")
"""


def test_triton_kernels_are_the_matrix_and_its_transpose():
    check_in_interpreter(TRITON)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend is 'astra'; expected 'auto', 'dense', 'banded', 'triton'"):
        line_integrals(torch.zeros(1, 1, 4, 4, 4), Geometry(), (4, 4), "astra")
