"""The cascade as a module that can be exported: one step of each stage from pure noise."""

from __future__ import annotations

import torch
from torch import nn

from hybrid_vit_cascade.cascade import Cascade, to_signed, to_unit
from hybrid_vit_cascade.diffusion import draw_noise
from hybrid_vit_cascade.inference import CascadePipeline, CascadeSystem
from xray2ct.files import InputError


class CascadePath(nn.Module):
    """One-step posterior mean of the stages ``first`` to ``last`` (from 1) of a cascade.

    X-rays ``(B, V, S, S)`` in [0, 1], for ``first`` > 1 also the volume before it ``(B, 1, d, d, d)`` in [0, 1] ->
    volume ``(B, 1, D, H, W)`` in [0, 1]. The noise that each stage starts from, which a trained network ignores, is
    that of :meth:`Cascade.posterior_mean` for a single case; all cases of a batch have the same.
    """

    def __init__(self, cascade: Cascade, first: int, last: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.models, self.signs = nn.ModuleList(), []
        for number, stage in enumerate(cascade.stages[:last], start=1):
            noise = draw_noise((1, *stage.noise_shape), generator)
            if number >= first:
                self.register_buffer(f"noise_{len(self.models)}", noise)
                self.models.append(stage.model)
                self.signs.append(_sign_at_pure_noise(stage))

    def forward(self, xrays, previous=None):
        volume = None if previous is None else to_signed(previous)
        for index, (model, sign) in enumerate(zip(self.models, self.signs)):
            condition = model.encode(xrays, volume)
            noise = getattr(self, f"noise_{index}").expand(xrays.shape[0], -1, -1, -1, -1)
            output = model.denoise(noise, xrays.new_ones(xrays.shape[0]), condition)
            volume = (sign * output).clamp(-1.0, 1.0)
        return to_unit(volume)


def _sign_at_pure_noise(stage) -> float:
    """Factor from a network's output to x0 at the noisiest step: -1 for v, 1 for x0."""
    if stage.prediction == "noise":
        raise InputError(
            f"stage {stage.name} predicts noise, which has no one-step posterior mean to export; expected a cascade"
            " trained with v_parameterization"
        )
    one, last = torch.ones(1, 1, 1, 1, 1), torch.tensor([stage.schedule.num_timesteps - 1])
    return stage.schedule.to_x0(one, torch.zeros_like(one), last, stage.prediction).item()


class CascadeSubject:
    """As :class:`DirectSubject`, for a whole cascade (``stage`` None) or one stage of it, from 1."""

    def __init__(self, folder, stage: int | None = None):
        self.cascade = Cascade.load(folder, device="cpu", max_stages=stage)
        self.stage = stage
        self.system = CascadeSystem(self.cascade)
        self.pipeline = CascadePipeline(self.system)
        count = len(self.cascade.stages)
        self.module = CascadePath(self.cascade, stage or 1, count)
        self.volume_size, self.xray_scale = self.cascade.volume_size, self.cascade.xray_scale
        self.inputs = {"xrays": (self.cascade.num_views, *(self.cascade.xray_size,) * 2)}
        if stage is not None and stage > 1:
            self.inputs["previous"] = self.cascade.stages[-2].noise_shape

    def arguments(self, xrays: torch.Tensor) -> list[torch.Tensor]:
        if "previous" not in self.inputs:
            return [xrays]
        before = [self.cascade.posterior_mean(case[None], stages=self.stage - 1) for case in xrays]
        return [xrays, torch.cat(before)]

    def reference(self, xrays: torch.Tensor) -> torch.Tensor:
        return self.system.predict(xrays)
