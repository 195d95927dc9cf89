"""The forward projector on top of nanodrr, an optional second backend (pip install nanodrr; MIT licence).

    from xray2ct.geometry.nanodrr_backend import render_xrays_nanodrr
    xrays = render_xrays_nanodrr(volume, geometry)  # as projector.render_xrays

nanodrr marches along the rays with trilinear samples (a fused kernel on NVIDIA and Apple GPUs); the built-in
renderer uses Joseph's method. Both follow the conventions of projector.py; on a chest CT their line integrals
differ by less than 0.01 % on average (benchmarks/projector.py).

On a CPU the built-in renderer is faster; it stays the default. One AMD EPYC core, torch 2.13, nanodrr 0.1.7, one
sample per voxel, seconds of CPU time, both views:

    cube -> X-ray           batch  pass                built-in  nanodrr
    128^3 -> 128^2            2    forward               0.17      0.54
                                   forward + backward    0.30      1.16
    256^3 -> 512^2            1    forward               2.3       6.7
                                   forward + backward    5.1      20.6

No GPU was measured. nanodrr's fused kernel is not used for gradients under torch's deterministic algorithms.
"""

from __future__ import annotations

import torch

from xray2ct.files import InputError
from xray2ct.geometry.projector import HU_WINDOW, XRAY_SCALE, Geometry, image_size_of, unit_to_mu

SAMPLES_PER_VOXEL = 1.0  # along the cube's longest edge; 2 changes a chest X-ray by less than 0.1 %


def render_xrays_nanodrr(
    volume: torch.Tensor,
    geometry: Geometry,
    image_size=(512, 512),
    hu_window=HU_WINDOW,
    xray_scale: float = XRAY_SCALE,
) -> torch.Tensor:
    """:func:`projector.render_xrays` by nanodrr: same arguments, result and units, same gradients.

    volume: ``(B, 1, D, H, W)`` in [0, 1]. Returns ``(B, 2, *image_size)``: line integral / ``xray_scale``.
    Raises :class:`InputError` when nanodrr is not installed or for a scout, whose fan beams it does not know,
    ``ValueError`` on another shape of ``volume``.

    Differentiable with respect to ``volume``. Without a fused kernel every sample's position is kept for the
    backward pass: 0.8 GB per view and volume for 256^3 -> 512^2.
    """
    if volume.ndim != 5 or volume.shape[1] != 1:
        raise ValueError(f"volume has shape {tuple(volume.shape)}; expected (B, 1, D, H, W)")
    if geometry.kind == "scout":
        raise InputError(
            "geometry.kind is 'scout'; nanodrr renders 'cone' and 'parallel' (the built-in renderer all three)"
        )
    drr, make_k_inv, subject_class = _import_nanodrr()
    rows, columns = image_size_of(image_size)
    # A parallel beam needs some source and detector plane on either side of the cube; a cone's detector is
    # moved behind the cube, with its pixels scaled along, because nanodrr's rays end at the detector.
    parallel = geometry.kind == "parallel"
    source = 2 * geometry.fov_mm if parallel else geometry.sid_mm
    distance = source + geometry.fov_mm
    edge = geometry.detector_mm * (1.0 if parallel else distance / geometry.sdd_mm)
    k_inv = make_k_inv(distance, edge / columns, edge / rows, 0.0, 0.0, rows, columns, device=volume.device)
    camera = drr(k_inv, k_inv.new_tensor([distance]), rows, columns, orthographic=parallel)
    poses = _poses(source, volume.device)
    samples = round(SAMPLES_PER_VOXEL * max(volume.shape[2:]))
    with torch.autocast(device_type=volume.device.type, enabled=False):
        mu = unit_to_mu(volume.float(), hu_window)
        images = [camera(_subject(subject_class, cube[None], geometry.fov_mm), poses, samples)[:, 0] for cube in mu]
    return torch.stack(images) / xray_scale


def _import_nanodrr():
    try:
        from nanodrr.camera import make_k_inv
        from nanodrr.data import Subject
        from nanodrr.drr import DRR
    except ImportError as error:
        raise InputError(
            f"the nanodrr renderer needs the package nanodrr ({error}); run: pip install nanodrr"
        ) from None
    return DRR, make_k_inv, Subject


def _subject(subject_class, mu, fov_mm):
    """nanodrr's volume of attenuation ``(1, 1, D, H, W)``; its world is (x, y, z) in mm as in projector.py."""
    edges = mu.new_tensor(mu.shape[:1:-1])  # (W, H, D): nanodrr's voxel coordinates are (x, y, z)
    step = fov_mm / edges
    to_world = torch.diag(torch.cat([step, step.new_ones(1)]))
    to_world[:3, 3] = (step - fov_mm) / 2
    to_grid = torch.diag(torch.cat([2 / edges, step.new_ones(1)]))
    to_grid[:3, 3] = 1 / edges - 1
    label, centre = mu.new_zeros(1, 1, 1, 1, 1), mu.new_zeros(3)
    return subject_class(mu, label, to_world, to_world.inverse(), to_grid, centre, max_label=0, convert_to_mu=False)


def _poses(source_mm, device):
    """Camera (column, row, towards the detector) to world (x, y, z), ``(2, 4, 4)``: PA and lateral."""
    pa = [[1, 0, 0, 0], [0, 0, -1, source_mm], [0, 1, 0, 0], [0, 0, 0, 1]]
    lateral = [[0, 0, 1, -source_mm], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    return torch.tensor([pa, lateral], dtype=torch.float32, device=device)
