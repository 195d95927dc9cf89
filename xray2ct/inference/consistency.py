"""Projection consistency: a predicted volume is moved as little as possible until its X-rays are the given ones.

    x = argmin  1/n^2 sum_p w_p ((A x - y)_p)^2  +  weight / N sum_v (x_v - x0_v)^2      over volumes from air to 1

x0 is the prediction, y the X-rays (n^2 pixels p of either view, of weight w_p from 0 to 1), N the number of voxels v. A
renders X-rays. It is linear in volumes from air upwards; below air all volumes have the same X-rays, so the prediction
is kept there. Voxels of air that would have to become thinner still are left out; the others are found by conjugate
gradients on the normal equations (Hestenes & Stiefel, J. Res. NBS 49, 409, 1952), with the projector's exact adjoint,
and clamped. For diffusion models it is the data-consistency step of DiffusionMBIR (Chung et al., CVPR 2023) and of
decomposed diffusion sampling (Chung et al., ICLR 2024), here after the last step only. docs/consistency.md: figures.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from xray2ct.conventions import VIEW_LABELS
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.lifting import averaged_to
from xray2ct.geometry.projector import MU_WATER, back_project, line_integrals
from xray2ct.inference.predictor import Method, Predictor
from xray2ct.models.consistent_step import conjugate_gradients

STEPS, WEIGHT = 4, 0.2  # chosen on validation patients
FIT_NCC = 0.98  # of a measured X-ray with the prediction's: below, it is not used
WHOLLY_SEEN = 0.999  # share of a cell's area


class Projection:
    """Forward projector at the resolution that a volume can hold, and its adjoint.

    Compared as by :class:`losses.ProjectionLoss`: rendered at twice the volume's resolution, averaged to ``size``^2.
    """

    def __init__(self, acquisition: Acquisition, shape, finest: int, views: int = 2):
        low, high = acquisition.hu_window
        self.geometry, self.shape, self.views = acquisition.geometry, tuple(shape), views
        self.size = min(max(self.shape[2:]), finest)
        self.gain = MU_WATER * (high - low) / 1000.0 / acquisition.xray_scale
        self.vacuum = (-1000.0 - low) / (high - low)  # attenuation 0, in [0, 1] of the window; below 0 for a higher one
        self.air = max(0.0, self.vacuum)

    def __call__(self, volume: torch.Tensor) -> torch.Tensor:
        """Attenuation ``(B, 1, D, H, W)``, in units of the window's width -> ``(B, V, size, size)``, X-ray units."""
        images = line_integrals(volume, self.geometry, (2 * self.size, 2 * self.size))
        return self.gain * F.avg_pool2d(images, 2)[:, : self.views]

    def adjoint(self, images: torch.Tensor) -> torch.Tensor:
        """``(B, V, size, size)`` -> ``(B, 1, D, H, W)``."""
        both = F.pad(images, (0, 0, 0, 0, 0, 2 - self.views))  # of PA alone: a lateral image without a residual
        fine = F.interpolate(0.25 * self.gain * both, scale_factor=2, mode="nearest")
        return back_project(fine, self.geometry, self.shape[2:])

    def render(self, volume: torch.Tensor) -> torch.Tensor:
        """X-rays ``(B, V, size, size)`` of a volume in [0, 1]."""
        return self(volume.clamp_min(self.air) - self.vacuum)


def consistent(
    volume: torch.Tensor,
    xrays: torch.Tensor,
    acquisition: Acquisition,
    steps: int = STEPS,
    weight: float = WEIGHT,
    pixel_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The volume near ``volume`` whose X-rays are ``xrays``, by ``steps`` conjugate-gradient steps.

    volume: ``(B, 1, D, H, W)`` in [0, 1]. xrays: ``(B, V, S, S)`` in X-ray units on the same device, V = 2, or 1 (PA
    alone). weight: of the distance to ``volume``, at any resolution. pixel_weights: of the X-rays, in [0, 1], of
    their shape (None: 1). Returns float32 in [0, 1], of the volume's shape. Samples do not depend on each other.
    """
    volume, xrays = volume.float(), xrays.float()
    project = Projection(acquisition, volume.shape, min(xrays.shape[-2:]), xrays.shape[1])
    size = (project.size, project.size)
    target = averaged_to(xrays, size)
    share = torch.ones_like(target)
    if pixel_weights is not None:
        share = averaged_to(pixel_weights.float(), size)
    damping = weight * project.size**2 / volume[0].numel()
    with torch.no_grad(), torch.autocast(volume.device.type, enabled=False):
        start = volume.clamp(project.air, 1.0)
        descent = project.adjoint(share * (target - project.render(start)))
        free = ~((start <= project.air) & (descent < 0) | (start >= 1.0) & (descent > 0))

        def normal(x):
            return free * (project.adjoint(share * project(x)) + damping * x)

        moved = start + conjugate_gradients(normal, free * descent, steps)
    moved = moved.clamp(project.air, 1.0)
    # Thinner than air has no X-ray: what was predicted there stays.
    return torch.where(moved > project.air, moved, volume.clamp(0.0, 1.0).clamp_max(project.air))


# ------------------------------------------------------------------------------------------------
# X-rays that were measured


def fit_of_views(rendered: torch.Tensor, xrays: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(ncc, matched)``: each view's correlation over seen pixels, ``(B, V)``, and X-rays at the rendering's scale.

    All ``(B, V, n, n)``. A film's brightness and contrast are its own: gain and offset are those of the least
    squares fit of the rendering by the film.
    """
    count = seen.sum((-2, -1), keepdim=True).clamp_min(1.0)

    def centred(image):
        mean = (seen * image).sum((-2, -1), keepdim=True) / count
        return mean, seen * (image - mean)

    (mean_rendered, one), (mean_film, other) = centred(rendered), centred(xrays)
    products, energies = (one * other).sum((-2, -1)), (other * other).sum((-2, -1))
    ncc = products / ((one * one).sum((-2, -1)) * energies).sqrt().clamp_min(1e-12)
    gain = (products / energies.clamp_min(1e-12))[..., None, None]
    return ncc, mean_rendered + gain * (xrays - mean_film)


def make_consistent(
    system: Predictor, volume: torch.Tensor, xrays: torch.Tensor, steps: int, measured: bool, weight: float = WEIGHT
) -> tuple[torch.Tensor, list[str]]:
    """:func:`consistent` for what a system predicted from X-rays, on its device; and what was done, for the user.

    volume: ``(B, 1, D, H, W)`` in [0, 1]. xrays: as :meth:`Predictor.predict` takes them; what a film does not show
    has no weight. measured: the X-rays are no renderings of the system's own geometry but scouts or films. Gain and
    offset are fitted then, and each view has the weight ``(NCC - FIT_NCC) / (1 - FIT_NCC)`` of its correlation with the
    prediction's rendering, or 0.
    """
    if steps == 0:
        return volume, []
    acquisition = Acquisition(system.geometry, system.hu_window, system.xray_scale)
    volume, xrays = volume.to(system.device), xrays.to(system.device).float()
    pixels, seen = xrays.unbind(2) if xrays.ndim == 5 and xrays.shape[2] == 2 else (xrays, None)
    pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
    project = Projection(acquisition, volume.shape, min(pixels.shape[-2:]), pixels.shape[1])
    size = (project.size, project.size)
    pixels = averaged_to(pixels, size)
    weights = torch.ones_like(pixels) if seen is None else (averaged_to(seen, size) >= WHOLLY_SEEN).float()
    before, notes = project.render(volume), []
    if measured:
        ncc, pixels = fit_of_views(before, pixels, weights)
        weights = weights * ((ncc - FIT_NCC) / (1 - FIT_NCC)).clamp(0, 1)[..., None, None]
        notes = [
            f"projection consistency: the {VIEW_LABELS[view]} view correlates with the rendered prediction at"
            f" {float(value):.3f}" + (f", below {FIT_NCC}: not used" if value < FIT_NCC else "")
            for sample in ncc
            for view, value in enumerate(sample)
        ]
        if not weights.any():
            return volume.cpu(), notes
    result = consistent(volume, pixels, acquisition, steps, weight, weights)
    mean = (weights * pixels).mean().clamp_min(1e-12)
    errors = [float((weights * (image - pixels)).abs().mean() / mean) for image in (before, project.render(result))]
    notes.append(
        f"projection consistency, {steps} steps: projection error {errors[0]:.2%} before, {errors[1]:.2%} after"
    )
    return result.cpu(), notes


# ------------------------------------------------------------------------------------------------
# Evaluation


class Remembered:
    """Method that keeps its last volume, so that two methods of an evaluation share one prediction."""

    def __init__(self, method: Method):
        self.method, self.item, self.volume, self.seconds = method, None, None, 0.0

    def __call__(self, item: dict) -> torch.Tensor:
        if self.item is not item:
            start = time.perf_counter()
            self.volume, self.item = self.method(item), item
            self.seconds = time.perf_counter() - start
        assert self.volume is not None
        return self.volume

    @property
    def std(self):
        return getattr(self.method, "std", None)


def with_consistent(
    system: Predictor, methods: dict[str, Method], steps: int, measured: bool, weight: float = WEIGHT
) -> dict[str, Method]:
    """``methods`` with ``NAME_consistent`` before each of the system's own ways NAME (``own_methods``).

    What :func:`make_consistent` notes of measured X-rays is printed for each patient.
    """
    own = {name: Remembered(methods[name]) for name in system.own_methods(methods)}

    def step(plain: Method) -> Method:
        def predict(item: dict) -> torch.Tensor:
            volume, xrays = plain(item)[None, None], system.item_xrays(item)
            volume, notes = make_consistent(system, volume, xrays, steps, measured, weight)
            for note in notes if measured else []:
                tqdm.write(f"note: {item['id']}: {note}")
            return volume[0, 0]

        return predict

    return {f"{name}_consistent": step(plain) for name, plain in own.items()} | methods | own


# ------------------------------------------------------------------------------------------------
# Option


def steps_of(option: int | str) -> int:
    """Steps that an option means: ``auto`` :data:`STEPS`, ``off`` 0, or their number; else :class:`InputError`."""
    if option in ("auto", "off"):
        return STEPS if option == "auto" else 0
    if isinstance(option, bool) or not str(option).isdigit():
        raise InputError(f"--consistency is {option!r}; expected auto, off or a number of steps")
    return int(option)


def add_consistency_argument(parser: argparse.ArgumentParser) -> None:
    """``--consistency auto | off | N``."""
    parser.add_argument(
        "--consistency",
        default="off",
        metavar="N|off|auto",
        help=f"conjugate-gradient steps towards a volume whose X-rays are the given ones; auto: {STEPS}, for scouts and"
        " films as far as they fit (default off)",
    )
