"""Training losses: L1, MSE, 3D SSIM, VGG16 perceptual, 3D Sobel edge, multi-scale L1, layout, projection.

    from losses import EnhancedLoss
    criterion = EnhancedLoss(perceptual_weights="random")
    total, parts = criterion(prediction, target, aux)   # volumes (B, 1, D, H, W) in [0, 1]

Each loss is a function or module of its own with its formula in its docstring; ``EnhancedLoss`` is
their weighted sum. Statistics and sums are float32 whatever the prediction's dtype and whether or
not autocast is on; only the VGG16 convolutions follow autocast.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.lifting import averaged_to
from xray2ct.geometry.projector import line_integrals, unit_to_mu
from xray2ct.models.layout import layout_of
from xray2ct.models.perceptual import PerceptualLoss

SSIM_SIGMA = 1.5
SSIM_TAPS = 11
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # (K1 * range)^2 and (K2 * range)^2 for a data range of 1


# ------------------------------------------------------------------------------------------------
# Separable filters


class _CorrelateAxis(torch.autograd.Function):
    """Correlation with a short 1D kernel along one axis, no padding, as shifted sums.

    On a CPU about 20 times faster than a one-channel ``conv3d``; on a GPU exact float32 (cuDNN
    would use TF32, which is too coarse for the variances of SSIM) and deterministic.
    """

    @staticmethod
    def forward(ctx, x, taps, axis):
        ctx.taps, ctx.axis, ctx.shape = taps, axis, x.shape
        length = x.shape[axis] - len(taps) + 1
        out = x.narrow(axis, 0, length) * taps[0]
        for k, tap in enumerate(taps[1:], start=1):
            if tap:
                out.add_(x.narrow(axis, k, length), alpha=tap)
        return out

    @staticmethod
    def backward(ctx, grad):
        length = grad.shape[ctx.axis]
        grad_x = grad.new_zeros(ctx.shape)
        for k, tap in enumerate(ctx.taps):
            if tap:
                grad_x.narrow(ctx.axis, k, length).add_(grad, alpha=tap)
        return grad_x, None, None


def correlate(x: torch.Tensor, taps: Mapping[int, tuple[float, ...]]) -> torch.Tensor:
    """Correlate ``x`` with the outer product of 1D kernels ``{axis: taps}``; each axis shrinks by taps - 1.

    Raises ``ValueError`` when an axis is shorter than its kernel.
    """
    size, needed = [x.shape[axis] for axis in taps], [len(kernel) for kernel in taps.values()]
    if any(have < need for have, need in zip(size, needed)):
        raise ValueError(f"volume of {size} voxels is smaller than the window; expected at least {needed}")
    for axis, kernel in taps.items():
        x = _CorrelateAxis.apply(x, kernel, axis)
    return x


def _full_precision(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32 (the moments of SSIM cancel); float64 stays, for gradient checks."""
    return x if x.dtype == torch.float64 else x.float()


def gaussian_window(sigma: float = SSIM_SIGMA, taps: int = SSIM_TAPS) -> tuple[float, ...]:
    """1D Gaussian of ``taps`` samples that sums to 1 (Wang et al. 2004: sigma 1.5, 11 taps)."""
    weights = [math.exp(-((k - (taps - 1) / 2) ** 2) / (2 * sigma**2)) for k in range(taps)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


# ------------------------------------------------------------------------------------------------
# SSIM


def ssim_of_moments(mean_x, mean_y, variances, covariance, data_range: float = 1.0) -> torch.Tensor:
    """SSIM = (2 mx my + C1)(2 sxy + C2) / ((mx^2 + my^2 + C1)(sx^2 + sy^2 + C2)), element by element; in [-1, 1].

    variances: their sum sx^2 + sy^2. C1 = (0.01 data_range)^2, C2 = (0.03 data_range)^2.
    Wang et al., IEEE Trans. Image Process. 13, 600 (2004), eq. 13.
    """
    c1, c2 = SSIM_C1 * data_range**2, SSIM_C2 * data_range**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def ssim_map(x, y, window=None, axes=(-3, -2, -1), covariance_scale=1.0) -> torch.Tensor:
    """Structural similarity of two float tensors with data range 1, at every position the window fits.

    :func:`ssim_of_moments` of window-weighted means, variances and covariance over ``axes`` (three axes:
    true 3D statistics). In [-1, 1].

    x, y: same shape. window: 1D weights that sum to 1 (default: Gaussian, sigma 1.5, 11 taps).
    covariance_scale: factor on variances and covariance (N / (N - 1) makes sample statistics).
    Returns the map, each of ``axes`` shorter by taps - 1. Raises ``ValueError`` if it would be empty.
    """
    x, y = _full_precision(x), _full_precision(y)
    kernels = dict.fromkeys(axes, window or gaussian_window())
    # Two stacks: the target's moments need no backward pass.
    mean_y, mean_yy = correlate(torch.stack([y, y * y]), kernels)
    mean_x, mean_xx, mean_xy = correlate(torch.stack([x, x * x, x * y]), kernels)
    var_x = covariance_scale * (mean_xx - mean_x * mean_x)
    var_y = covariance_scale * (mean_yy - mean_y * mean_y)
    covariance = covariance_scale * (mean_xy - mean_x * mean_y)
    return ssim_of_moments(mean_x, mean_y, var_x + var_y, covariance)


def ssim_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """1 - mean 3D SSIM (:func:`ssim_map`), in [0, 2]; 0 at equality. Volumes ``(B, 1, D, H, W)``, range 1.

    mask: the window's centre voxel decides whether a position counts. Sizes below 11 raise ``ValueError``.
    """
    return masked_mean(1.0 - ssim_map(prediction, target), _crop(mask, SSIM_TAPS // 2))


# ------------------------------------------------------------------------------------------------
# Voxel losses


def masked_mean(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Mean over the samples of their means of ``values``, weighted by ``weight`` (both ``(B, ...)``, of one shape).

    Each sample counts the same, however much of it counts, so that the loss of a batch is the mean of its parts'
    losses, on whichever processes they are. A sample of which nothing counts adds 0, with zero gradient.
    """
    if weight is None:
        return values.mean()
    values, weight = values.flatten(1), weight.flatten(1)
    return ((values * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1e-6)).mean()


def _crop(mask, margin):
    return None if mask is None else mask[..., margin:-margin, margin:-margin, margin:-margin]


def edge_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """L1 distance of the 3D Sobel gradients: mean over voxels and axes a of |S_a(prediction - target)|.

    S_a = derivative (-1, 0, 1)/2 along axis a, smoothing (1, 2, 1)/4 along the other two (Sobel and
    Feldman 1968 in 3D), scaled so that a ramp of 1 per voxel gives 1; positions where the kernel fits.
    Components, not magnitudes: orientation counts, and the gradient is finite at equality.
    Volumes ``(B, 1, D, H, W)``, at least 3 voxels per axis; mask: the centre voxel decides.
    """
    # The filter is linear: one pass over the difference serves both volumes.
    difference = _full_precision(prediction) - _full_precision(target)
    smooth, derive = (0.25, 0.5, 0.25), (-0.5, 0.0, 0.5)
    weight = _crop(mask, 1)
    terms = []
    for axis in (-3, -2, -1):
        gradient = correlate(difference, {a: derive if a == axis else smooth for a in (-3, -2, -1)})
        terms.append(masked_mean(gradient.abs(), weight))
    return torch.stack(terms).mean()


def multiscale_loss(aux: Mapping[str, torch.Tensor], target: torch.Tensor, mask: torch.Tensor | None = None):
    """Mean over the lower-resolution predictions of their L1 distance to the average-pooled target.

    aux: ``{name: (B, 1, d, h, w)}``, each size dividing the target's; target ``(B, 1, D, H, W)``.
    mask: coarse voxels count by the fraction of them inside it. Another size raises ``ValueError``.
    """
    terms = []
    for name, coarse in aux.items():
        coarse = _full_precision(coarse)
        size = tuple(coarse.shape[-3:])
        factors = tuple(big // small for big, small in zip(target.shape[-3:], size))
        if coarse.shape[:2] != target.shape[:2] or tuple(f * s for f, s in zip(factors, size)) != target.shape[-3:]:
            raise ValueError(
                f"aux[{name!r}] has shape {tuple(coarse.shape)}; expected (B, 1, d, h, w) with sizes that"
                f" divide the target's {tuple(target.shape)}"
            )
        weight = None if mask is None else F.avg_pool3d(mask, factors)
        terms.append(masked_mean((coarse - F.avg_pool3d(target, factors)).abs(), weight))
    return torch.stack(terms).mean()


def layout_loss(logits: torch.Tensor, target: torch.Tensor, hu_window, mask: torch.Tensor | None = None):
    """Cross-entropy of the regions' logits with the target's regions, in nats: mean over cells of -sum_k q_k log p_k.

    p: softmax of ``logits`` ``(B, 5, d, h, w)``; q: the regions' shares in each cell of the target ``(B, 1, D, H, W)``
    (:func:`layout.layout_of`). At least the entropy of q, which is 0 away from edges; log 5 for equal logits.
    mask: cells count by the fraction of them inside it.
    """
    size = tuple(logits.shape[-3:])
    shares = layout_of(target, hu_window, size)
    values = -(shares * F.log_softmax(_full_precision(logits), dim=1)).sum(dim=1, keepdim=True)
    return masked_mean(values, None if mask is None else averaged_to(mask, size))


class ProjectionLoss(nn.Module):
    """DRR loss: mean |rendered X-rays of a volume - X-rays|, in X-ray units ([0, 1]); 0 at agreement.

    The volume is rendered at twice its own resolution (rays are samples) and both sides are averaged
    down to it, so that detail the volume cannot hold does not count. It looks at the whole cube: an
    X-ray knows no mask.

    size: longest edge in voxels that is rendered, and of the images compared. The attenuation of a larger
    volume is averaged by twos first, which keeps line integrals: 256^3 then costs little more than 64^3.
    """

    def __init__(self, acquisition: Acquisition, size: int | None = None):
        super().__init__()
        self.acquisition, self.size = acquisition, size

    def forward(self, volume: torch.Tensor, xrays: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Mean of :meth:`per_sample`, each sample multiplied by its weight (``(B,)``); 0-d float32 tensor."""
        values = self.per_sample(volume, xrays)
        return (values if weights is None else weights * values).mean()

    def per_sample(self, volume: torch.Tensor, xrays: torch.Tensor) -> torch.Tensor:
        """Loss of each sample, ``(B,)``, float32 even under autocast.

        volume: ``(B, 1, D, H, W)`` in [0, 1]. xrays: ``(B, V, H, W)`` or ``(B, V, 1, H, W)``, V = 2, or 1 (PA alone).
        Raises ``ValueError`` on another shape of ``xrays``.
        """
        if xrays.ndim == 5 and xrays.shape[2] == 1:
            xrays = xrays[:, :, 0]
        batch, views = volume.shape[0], xrays.shape[1] if xrays.ndim == 4 else 0
        if xrays.ndim != 4 or xrays.shape[0] != batch or views not in (1, 2):
            raise ValueError(
                f"xrays have shape {tuple(xrays.shape)}; expected ({batch}, 2, H, W), or ({batch}, 1, H, W): PA alone"
            )
        with torch.autocast(volume.device.type, enabled=False):
            rendered = self._render(volume, min(xrays.shape[-2:]))[:, :views]
            size = (min(rendered.shape[-1], *xrays.shape[-2:]),) * 2
            difference = averaged_to(rendered, size) - averaged_to(xrays.float(), size)
        return difference.abs().flatten(1).mean(dim=1)

    def _render(self, volume, finest: int):
        """Both X-rays of the volume as they are compared with ``finest``^2 ones, ``(B, 2, n, n)``."""
        mu = unit_to_mu(volume.float(), self.acquisition.hu_window)
        if self.size is None:
            size = min(max(mu.shape[-3:]), finest)
        else:
            while max(mu.shape[-3:]) > self.size and all(n % 2 == 0 for n in mu.shape[-3:]):
                mu = F.avg_pool3d(mu, 2)
            size = max(mu.shape[-3:])
        integrals = line_integrals(mu, self.acquisition.geometry, (2 * size, 2 * size))
        return F.avg_pool2d(integrals / self.acquisition.xray_scale, 2)


# ------------------------------------------------------------------------------------------------
# The sum


class EnhancedLoss(nn.Module):
    """Weighted sum of the losses above; a term of weight 0 is neither built nor computed.

    Terms: ``l1`` mean |p - t|; ``mse`` mean (p - t)^2; ``ssim`` :func:`ssim_loss`; ``perceptual``
    :class:`PerceptualLoss`; ``edge`` :func:`edge_loss`; ``multiscale`` :func:`multiscale_loss` (needs ``aux``);
    ``projection`` :class:`ProjectionLoss` (needs ``acquisition`` and ``xrays``); ``layout`` :func:`layout_loss` (needs
    ``acquisition`` and ``aux["layout"]``; left out in eval mode, where networks predict no layout).

    perceptual_weights, perceptual_slices: see :class:`PerceptualLoss`.
    acquisition: of the data, for the projection term.
    Raises :class:`InputError` naming the option for a negative or non-finite weight, all weights 0,
    perceptual weights that cannot be loaded, or a projection or layout weight without acquisition.
    """

    def __init__(
        self,
        l1_weight: float = 1.0,
        ssim_weight: float = 0.5,
        perceptual_weight: float = 0.1,
        edge_weight: float = 0.1,
        multiscale_weight: float = 0.3,
        mse_weight: float = 0.0,
        projection_weight: float = 0.0,
        perceptual_weights: str | os.PathLike = "imagenet",
        acquisition: Acquisition | None = None,
        perceptual_slices: int = 4,
        layout_weight: float = 0.0,
    ):
        super().__init__()
        self.weights = {
            "l1": l1_weight,
            "mse": mse_weight,
            "ssim": ssim_weight,
            "perceptual": perceptual_weight,
            "edge": edge_weight,
            "multiscale": multiscale_weight,
            "projection": projection_weight,
            "layout": layout_weight,
        }
        for name, weight in self.weights.items():
            if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight >= 0):
                raise InputError(f"loss.{name}_weight is {weight!r}; expected a number of at least 0")
        if not any(self.weights.values()):
            raise InputError("loss: every weight is 0, nothing would be trained; set at least one above 0")
        self.projection = self.perceptual = self.hu_window = None
        for name, needed in (("projection", "geometry"), ("layout", "HU window")):
            if self.weights[name] and acquisition is None:
                raise InputError(f"loss.{name}_weight is {self.weights[name]}, which needs the data's {needed}")
        if acquisition is not None:
            self.hu_window = acquisition.hu_window
        if acquisition is not None and projection_weight:
            self.projection = ProjectionLoss(acquisition)
        if perceptual_weight:
            self.perceptual = PerceptualLoss(perceptual_weights, perceptual_slices)

    def forward(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        aux: Mapping[str, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        xrays: torch.Tensor | None = None,
        draws: SampleRandom | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compare volumes ``(B, 1, D, H, W)`` in [0, 1], any float dtype.

        aux: lower-resolution predictions ``{name: (B, 1, d, h, w)}``, which the multi-scale term needs, and
            ``{"layout": (B, 5, d, h, w)}``, logits for the layout term.
        mask: ``(B, 1, D, H, W)`` in {0, 1}; what the prediction holds where it is 0 has no influence
            on any term but the projection. Terms are means over each sample's mask, then over the samples.
        xrays: ``(B, 2, H, W)`` in [0, 1]; the projection term needs them.
        draws: random numbers of the samples, for the perceptual term's slices; see :class:`PerceptualLoss`.
        Returns ``(total, {term: unweighted 0-d float32 tensor})``. Shapes that differ raise ``ValueError``, and so
        does a term with a weight but without its input.
        """
        aux = dict(aux or {})
        layout = aux.pop("layout", None)
        needs = [("multiscale", "aux", aux), ("projection", "xrays", xrays)]
        for term, name, given in [*needs, ("layout", 'aux["layout"]', layout)] if self.training else needs:
            if self.weights[term] and (given is None or not len(given)):
                raise ValueError(f"loss.{term}_weight is {self.weights[term]:g}, which needs {name}: none given")
        for name, volume in (("target", target), ("mask", mask)):
            if volume is not None and volume.shape != prediction.shape:
                raise ValueError(
                    f"{name} has shape {tuple(volume.shape)}, the prediction {tuple(prediction.shape)};"
                    " expected the same (B, 1, D, H, W)"
                )
        parts = {}
        with torch.autocast(device_type=prediction.device.type, enabled=False):
            prediction, target = _full_precision(prediction), _full_precision(target)
            if self.projection is not None:
                parts["projection"] = self.projection(prediction, xrays)
            if mask is not None:
                mask = mask.to(prediction.dtype)
                # Windows and kernels of counted voxels reach outside the mask: nothing to see there.
                prediction = torch.where(mask > 0, prediction, target)
            parts |= self._volume_terms(prediction, target, aux, mask)
            if self.weights["layout"] and layout is not None:
                parts["layout"] = layout_loss(layout, target, self.hu_window, mask)
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(prediction, target, draws)
        parts = {name: parts[name] for name in self.weights if name in parts}
        return sum(self.weights[name] * value for name, value in parts.items()), parts

    def _volume_terms(self, prediction, target, aux, mask) -> dict[str, torch.Tensor]:
        weights, parts = self.weights, {}
        difference = prediction - target
        if weights["l1"]:
            parts["l1"] = masked_mean(difference.abs(), mask)
        if weights["mse"]:
            parts["mse"] = masked_mean(difference.square(), mask)
        if weights["ssim"]:
            parts["ssim"] = ssim_loss(prediction, target, mask)
        if weights["edge"]:
            parts["edge"] = edge_loss(prediction, target, mask)
        if weights["multiscale"]:
            parts["multiscale"] = multiscale_loss(aux, target, mask)
        return parts
