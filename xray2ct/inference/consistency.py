"""Projection consistency: a predicted volume is moved as little as is plausible until its X-rays are the given ones.

    x = argmin  |A (x - x0) - r|^2 / norm  +  weight |(x - x0) / spread|^2        r = X-rays - A x0

x0 is the prediction, A renders X-rays, each pixel's square counts by its weight from 0 to 1. Found by conjugate
gradients with the projector's exact adjoint (:func:`models.consistent_step.consistent_change`), then clamped: the
maximum a posteriori where errors are independent, of standard deviations proportional to ``spread``
(:func:`prior_spread`). For diffusion models it is the data-consistency step of DiffusionMBIR (Chung et al., CVPR 2023)
and of decomposed diffusion sampling (Chung et al., ICLR 2024), here after the last step only. docs/consistency.md:
figures.
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
from xray2ct.inference.predictor import Method, Predictor
from xray2ct.models.consistent_step import XrayResidual, consistent_change

STEPS, WEIGHT = 4, 0.12  # chosen on patients that the networks had not seen
BODY_HU, BODY_SPREAD_HU = 50.0, 140.0  # above air: where the body begins; error there, next to the local contrast
FIT_NCC = 0.99  # of a measured X-ray with the prediction's: below, it is not used
CONSISTENT = "_consistent"  # ends the names of methods of an evaluation
WHOLLY_SEEN = 0.999  # share of a cell's area


def air_of(hu_window) -> float:
    """-1000 HU in a volume of the window; 0 if it begins higher: thinner than that has the same X-rays."""
    low, high = hu_window
    return max(0.0, (-1000.0 - low) / (high - low))


def prior_spread(volume: torch.Tensor, hu_window) -> torch.Tensor:
    """How large errors of a prediction may be, voxel by voxel, in relation to each other: ``(B, 1, D, H, W)``.

    Their variance is taken to be the local one of the prediction, over 3^3 voxels, since organs' surfaces lie a little
    off, and in the body :data:`BODY_SPREAD_HU` squared besides. The body is where the mean of 3^3 voxels reaches
    :data:`BODY_HU` above air; towards 0 there the second part falls to 0, so that the air around the patient, which is
    known best, is hardly touched. 1: as in the body far from surfaces.
    """
    low, high = hu_window
    body, spread, air = BODY_HU / (high - low), BODY_SPREAD_HU / (high - low), air_of(hu_window)
    mean = _local_mean(volume)
    variance = (_local_mean(volume * volume) - mean * mean).clamp_min(0)
    inside = (_local_mean((volume - air).clamp_min(0)) / body).clamp_max(1)
    return (variance + (spread * inside) ** 2).sqrt() / spread


def _local_mean(volume):
    return F.avg_pool3d(F.pad(volume, (1,) * 6, mode="replicate"), 3, 1)


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
    volume = volume.float()
    residual = XrayResidual(xrays, acquisition, volume.shape[2:], pixel_weights)
    with torch.no_grad(), torch.autocast(volume.device.type, enabled=False):
        spread = prior_spread(volume, acquisition.hu_window)
        moved = volume + consistent_change(residual.of(volume), residual, steps, weight, spread)
    # Thinner than air has no X-ray: what was predicted there is no reason for more of it.
    return torch.maximum(moved, volume.clamp_max(air_of(acquisition.hu_window))).clamp(0, 1)


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


def pixels_and_seen(xrays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What :meth:`Predictor.predict` takes -> pixels ``(B, V, h, w)``, and how much of each a film shows, likewise.

    xrays: ``(B, V, h, w)``, ``(B, V, 1, h, w)``, or with the channel of what is seen ``(B, V, 2, h, w)``; None for
    seen where that channel is missing.
    """
    if xrays.ndim == 4:
        return xrays, None
    return xrays[:, :, 0], xrays[:, :, 1] if xrays.shape[2] == 2 else None


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
    pixels, seen = pixels_and_seen(xrays)
    residual = XrayResidual(pixels, acquisition, volume.shape[2:])
    size, pixels = (residual.size, residual.size), residual.xrays
    weights = torch.ones_like(pixels) if seen is None else (averaged_to(seen, size) >= WHOLLY_SEEN).float()
    before, notes = residual.rendered(volume), []
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
    errors = [float((weights * (image - pixels)).abs().mean() / mean) for image in (before, residual.rendered(result))]
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
    """``methods`` with ``NAME`` + :data:`CONSISTENT` before each of the system's own ways NAME (``own_methods``).

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

    return {name + CONSISTENT: step(plain) for name, plain in own.items()} | methods | own


# ------------------------------------------------------------------------------------------------
# Option


def steps_of(option: int | str, validated: bool = True) -> int:
    """Steps that an option means: ``off`` 0, a number itself, ``auto`` :data:`STEPS` for a system whose volumes they
    make better by measurement (:attr:`Predictor.consistency_validated`) and 0 for others; else :class:`InputError`."""
    if option in ("auto", "off"):
        return STEPS if option == "auto" and validated else 0
    if isinstance(option, bool) or not str(option).isdigit():
        raise InputError(f"--consistency is {option!r}; expected auto, off or a number of steps")
    return int(option)


def how_of(steps: int) -> dict | None:
    """What a summary of results says about ``steps`` steps; None for none."""
    settings = {"weight": WEIGHT, "body_hu": BODY_HU, "body_spread_hu": BODY_SPREAD_HU}
    return {"steps": steps, **settings} if steps else None


def add_consistency_argument(parser: argparse.ArgumentParser) -> None:
    """``--consistency auto | off | N``."""
    parser.add_argument(
        "--consistency",
        default="auto",
        metavar="N|off|auto",
        help="conjugate-gradient steps towards a volume whose X-rays are the given ones, for scouts and films as far as"
        f" they fit; auto: {STEPS} for 64^3 volumes of the direct system, off for others (default auto)",
    )


def add_data_consistency_argument(parser: argparse.ArgumentParser) -> None:
    """``--data-consistency N``, of the cascade."""
    parser.add_argument(
        "--data-consistency",
        type=int,
        default=0,
        metavar="N",
        help="cascade: N conjugate-gradient steps towards the X-rays at each step of sampling, for X-rays as trained"
        " with, not for films (default 0, off)",
    )


def refuse_measured(system: Predictor, measured: bool) -> None:
    """:class:`InputError` where a system enforces X-rays on the way that are no renderings of its own geometry."""
    if measured and system.data_consistency:
        raise InputError(
            f"--data-consistency is {system.data_consistency}, but the X-rays are scouts or films, which no volume"
            " explains exactly; expected renderings, or --consistency, which weighs each view by how well it fits"
        )
