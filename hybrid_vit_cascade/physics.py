"""Physics loss: X-rays rendered from the network's estimate of the clean volume against the X-rays it was given.

    physics = PhysicsLoss(geometry, hu_window, xray_scale)
    loss = physics(x0_hat, xrays, snr)       # training: noisy steps count less
    value = physics(x0_hat, xrays)           # evaluation: every sample counts fully

Rendering is linear in attenuation, and every volume that explains the X-rays has the same line integrals; so has
their mean. The loss therefore never pulls the posterior mean away from itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from xray2ct.files import InputError
from xray2ct.geometry.lifting import averaged_to
from xray2ct.geometry.projector import HU_WINDOW, XRAY_SCALE, Geometry, line_integrals, unit_to_mu


class PhysicsLoss(nn.Module):
    """Mean absolute difference between rendered and given X-rays, in X-ray units ([0, 1]); 0 at agreement.

    geometry, hu_window, xray_scale: how the X-rays were made (:mod:`xray2ct.geometry.projector`).
    size: edge of the images compared, at most; also of the volume that is rendered. Attenuation is averaged down to
        it first, which keeps line integrals, so that a 256^3 volume costs little more than a 64^3 one.
    minimum_weight: what the noisiest samples count, in [0, 1]; see :meth:`weight`.
    """

    def __init__(
        self,
        geometry: Geometry,
        hu_window=HU_WINDOW,
        xray_scale: float = XRAY_SCALE,
        size: int = 64,
        minimum_weight: float = 0.0,
    ):
        super().__init__()
        if size < 1 or not 0 <= minimum_weight <= 1:
            raise InputError(
                f"physics: size {size}, minimum_weight {minimum_weight}; expected a size above 0, a weight in [0, 1]"
            )
        self.geometry, self.hu_window, self.xray_scale = geometry, tuple(hu_window), xray_scale
        self.size, self.minimum_weight = size, minimum_weight

    def weight(self, snr: torch.Tensor) -> torch.Tensor:
        """What a sample of signal-to-noise ratio ``snr`` (B,) counts: snr / (1 + snr), raised to the minimum.

        snr / (1 + snr) = alpha^2: the share of the signal in x_t. An estimate made from noise alone is vague, and
        with it its X-rays' difference; weighted so, steps that can match the X-rays decide. With m > 0 it is
        m + (1 - m) snr / (1 + snr): pure noise, where the estimate is the posterior mean, counts m.
        """
        snr = snr.float()
        share = torch.where(snr.isinf(), torch.ones_like(snr), snr / (1.0 + snr))
        return self.minimum_weight + (1.0 - self.minimum_weight) * share

    def forward(self, x0_hat, xrays, snr=None) -> torch.Tensor:
        """x0_hat ``(B, 1, D, H, W)`` in [-1, 1] and X-rays ``(B, V, H, W)``, V = 2 or 1 (PA) -> 0-d tensor.

        snr ``(B,)``: signal-to-noise ratio of the step each estimate was made at; None counts all fully.
        Raises ``ValueError`` on other shapes.
        """
        difference = self.per_sample(x0_hat, xrays)
        return (difference if snr is None else self.weight(snr) * difference).mean()

    def per_sample(self, x0_hat, xrays) -> torch.Tensor:
        """The unweighted loss of each sample, ``(B,)``."""
        if xrays.ndim == 5 and xrays.shape[2] == 1:
            xrays = xrays.squeeze(2)
        batch, views = x0_hat.shape[0], xrays.shape[1] if xrays.ndim == 4 else 0
        if xrays.ndim != 4 or xrays.shape[0] != batch or views not in (1, 2):
            raise ValueError(
                f"X-rays have shape {tuple(xrays.shape)}; expected ({batch}, 2, H, W) or ({batch}, 1, H, W)"
            )
        rendered = self._render(x0_hat)[:, :views]
        size = (min(rendered.shape[-1], *xrays.shape[-2:]),) * 2
        difference = averaged_to(rendered, size) - averaged_to(xrays.float(), size)
        return difference.abs().flatten(1).mean(dim=1)

    def _render(self, x0_hat):
        """Both X-rays of the estimate, ``(B, 2, n, n)`` with n at most ``size``, float32 even under autocast."""
        with torch.autocast(x0_hat.device.type, enabled=False):
            mu = unit_to_mu(0.5 * (x0_hat.float() + 1.0), self.hu_window)
            while max(mu.shape[-3:]) > self.size and all(n % 2 == 0 for n in mu.shape[-3:]):
                mu = F.avg_pool3d(mu, 2)
            size = max(mu.shape[-3:])
            # Rays are samples: twice as many as voxels, averaged, as in ProjectionLoss.
            integrals = line_integrals(mu, self.geometry, (2 * size, 2 * size))
            return F.avg_pool2d(integrals, 2) / self.xray_scale
