"""The cascade's one-step posterior mean as a module of tensors alone, for export."""

from __future__ import annotations

import torch
from torch import nn

from hybrid_vit_cascade.cascade import Cascade, Stage, to_unit
from hybrid_vit_cascade.diffusion import draw_noise
from xray2ct.files import InputError


class OneStepPath(nn.Module):
    """X-rays ``(B, V, S, S)`` in [0, 1] -> posterior mean ``(B, 1, D, H, W)`` in [0, 1], one step of each stage.

    The noise that each stage starts from, which a trained network ignores, is that of :meth:`Cascade.posterior_mean`
    for a single case; all cases of a batch have the same. Raises :class:`InputError` for stages that predict noise.
    """

    def __init__(self, cascade: Cascade):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.models = nn.ModuleList(stage.model for stage in cascade.stages)
        self.signs = [_sign_at_pure_noise(stage) for stage in cascade.stages]
        for index, stage in enumerate(cascade.stages):
            self.register_buffer(f"noise_{index}", draw_noise((1, *stage.noise_shape), generator))

    def forward(self, xrays):
        volume = None
        for index, (model, sign) in enumerate(zip(self.models, self.signs)):
            condition = model.encode(xrays, volume)
            noise = getattr(self, f"noise_{index}").expand(xrays.shape[0], -1, -1, -1, -1)
            output = model.denoise(noise, xrays.new_ones(xrays.shape[0]), condition)
            volume = (sign * output).clamp(-1.0, 1.0)
        assert volume is not None  # a cascade has a stage
        return to_unit(volume)


def _sign_at_pure_noise(stage: Stage) -> float:
    """Factor from a network's output to x0 at the noisiest step: -1 for v, 1 for x0."""
    if stage.prediction == "noise":
        raise InputError(
            f"stage {stage.name} predicts noise, which has no one-step posterior mean to export; expected a cascade"
            " trained with v_parameterization"
        )
    one, last = torch.ones(1, 1, 1, 1, 1), torch.tensor([stage.schedule.num_timesteps - 1])
    return stage.schedule.to_x0(one, torch.zeros_like(one), last, stage.prediction).item()
