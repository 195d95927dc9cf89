"""Physics loss: X-rays rendered from the network's estimate of the clean volume against the X-rays it was given.

Rendering is linear in attenuation, and every volume that explains the X-rays has the same line integrals; so has
their mean. The loss therefore never pulls the posterior mean away from itself.
"""

from __future__ import annotations

import torch
from torch import nn

from losses import ProjectionLoss
from xray2ct.geometry.acquisition import Acquisition

RENDERED_SIZE = 64  # longest edge that is rendered: an estimate of 256^3 then costs little more than one of 64^3


class PhysicsLoss(nn.Module):
    """:class:`losses.ProjectionLoss` of volumes in [-1, 1], weighted by how noisy each sample's step was.

    minimum_weight: what the noisiest samples count, in [0, 1]; see :meth:`weight`.
    """

    def __init__(self, acquisition: Acquisition, minimum_weight: float = 0.0):
        super().__init__()
        self.projection, self.minimum_weight = ProjectionLoss(acquisition, RENDERED_SIZE), minimum_weight

    def weight(self, snr: torch.Tensor) -> torch.Tensor:
        """What a sample of signal-to-noise ratio ``snr`` (B,) counts: snr / (1 + snr), raised to the minimum.

        snr / (1 + snr) = alpha^2: the share of the signal in x_t. An estimate made from noise alone is vague, and
        with it its X-rays' difference; weighted so, steps that can match the X-rays decide. With m > 0 it is
        m + (1 - m) snr / (1 + snr): pure noise, where the estimate is the posterior mean, counts m.
        """
        snr = snr.float()
        share = torch.where(snr.isinf(), torch.ones_like(snr), snr / (1.0 + snr))
        return self.minimum_weight + (1.0 - self.minimum_weight) * share

    def forward(self, x0_hat: torch.Tensor, xrays: torch.Tensor, snr: torch.Tensor | None = None) -> torch.Tensor:
        """x0_hat ``(B, 1, D, H, W)`` in [-1, 1] and X-rays ``(B, V, H, W)``, V = 2 or 1 (PA) -> 0-d tensor.

        snr ``(B,)``: signal-to-noise ratio of the step each estimate was made at; None counts all fully.
        """
        return self.projection(0.5 * (x0_hat.float() + 1.0), xrays, None if snr is None else self.weight(snr))
