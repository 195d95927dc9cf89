"""One stage of the cascade as a training task: noise, earlier stages as condition, diffusion and physics loss."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from hybrid_vit_cascade.cascade import KIND, Cascade, Stage, to_signed, to_unit
from hybrid_vit_cascade.diffusion import Schedule, augment_previous, draw_noise
from hybrid_vit_cascade.models import CascadeStage
from hybrid_vit_cascade.physics import PhysicsLoss
from hybrid_vit_cascade.settings import CascadeConfig, StageRun
from xray2ct.data.augment import AugmentConfig
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.metrics import psnr_tensor
from xray2ct.training.config import config_dict, entry_name
from xray2ct.training.distributed import Processes
from xray2ct.training.precision import Precision
from xray2ct.training.task import FILMS_DIFFER, PatientTask

VALIDATION_TIMES = 4  # noise levels at which the validation loss is measured
NOISE_PREDICTION_STEPS = 10  # of the volume that is validated where one step is not the posterior mean
# A sample's seed is that of its augmentation; with one of these bits flipped, of independent volumes of noise.
NOISE, EARLIER, EARLIER_NOISE = (1 << bit for bit in (61, 60, 59))


class StageLoss(nn.Module):
    """Weighted diffusion loss + ``physics_weight`` x physics loss of one stage.

    ``loss(model, batch)``: batch holds x0 (B, 1, D, H, W) in [-1, 1], noise, t (B,), xrays, and for a stage after the
    first previous and level. Returns the total and both parts as 0-d tensors; ``physics`` is None when switched off.
    """

    def __init__(self, run: StageRun, acquisition: Acquisition):
        super().__init__()
        self.run, self.schedule = run, Schedule.for_prediction(run.prediction, run.num_timesteps, run.shift)
        self.physics = None
        if run.stage.use_physics_loss:
            self.physics = PhysicsLoss(acquisition, run.stage.physics_minimum_weight)

    def forward(self, model, batch):
        schedule, t = self.schedule, batch["t"]
        x_t = schedule.add_noise(batch["x0"], batch["noise"], t)
        output = model(x_t, schedule.position(t), batch["xrays"], batch.get("previous"), batch.get("level"))
        return self.of_output(output, x_t, batch)

    def of_output(self, output, x_t, batch):
        """The same from the network's output; in float32 whatever autocast is active."""
        with torch.autocast(x_t.device.type, enabled=False):
            return self._of_output(output.float(), x_t, batch)

    def _of_output(self, output, x_t, batch):
        schedule, t, prediction = self.schedule, batch["t"], self.run.prediction
        target = schedule.target(prediction, batch["x0"], batch["noise"], t)
        weight = schedule.loss_weight(t, prediction, self.run.training.min_snr_gamma)
        total = (weight * (output - target).square().flatten(1).mean(1)).mean()
        parts = {"diffusion": total}
        if self.physics is not None:
            estimate = schedule.to_x0(output, x_t, t, prediction)
            parts["physics"] = self.physics(estimate, batch["xrays"], schedule.snr(t))
            total = total + self.run.stage.physics_weight * parts["physics"]
        return total, parts


class StageTask(PatientTask):
    """Augmented pairs, noise and the volume of the frozen earlier stages -> :class:`CascadeStage`.

    cascade: the whole configuration, of which ``run`` is this stage's part. earlier: the frozen stages before it;
    None for the first stage.
    """

    kind = KIND
    best_name = "best.pt"
    cpu_config = "--config config/real_cpu.json"

    def __init__(self, cascade: CascadeConfig, run: StageRun, earlier: Cascade | None, processes: Processes):
        self.cascade, self.config, self.earlier = cascade, run, earlier
        if earlier is not None:
            earlier.checked = False  # NaN shows in the loss, and looking for it would wait for the device
        size, augment = run.stage.size, run.augment
        # Noise prediction has no step from pure noise: its one-step volume is rough, and nothing is built on it.
        self.has_mean = run.prediction != "noise"
        self.open_data(size, run.xray_img_size, max(augment.source_size, size) if augment.enabled else 2 * size)
        if self.makes_films and run.stage.use_physics_loss:
            name = f"{entry_name('stages', run.index)}.use_physics_loss"
            raise InputError(f"{name} is true, but {FILMS_DIFFER}: expected false")
        self.build_cache(processes)
        self.criterion = StageLoss(run, self.train_data.acquisition)
        self.schedule, self.physics = self.criterion.schedule, self.criterion.physics

    def augment_config(self, source_size: int) -> AugmentConfig:
        return dataclasses.replace(self.config.augment, source_size=source_size)

    def build_model(self) -> CascadeStage:
        torch.manual_seed(self.config.training.seed)
        return CascadeStage(**stage_arguments(self.cascade, self.config.index), geometry=self.train_data.geometry)

    def header(self) -> dict:
        run = self.config
        return {
            **super().header(),
            "stage_index": run.index,
            "stage_name": run.stage.name,
            "stage_names": self.cascade.stage_names,
            "stage_settings": stage_settings(self.cascade, run.index),
            "cascade_config": config_dict(self.cascade),
            "prediction": run.prediction,
            "num_timesteps": run.num_timesteps,
            "shift": run.shift,
            "num_views": run.num_views,
        }

    # -- training --------------------------------------------------------------------------------

    def make_batch(self, raw, seeds, device) -> dict:
        """``xrays``, ``x0`` (B, 1, D, H, W) in [-1, 1], ``noise``, ``t`` (B,); ``previous`` after stage 1."""
        pair, draws = super().make_batch(raw, seeds, device), SampleRandom(seeds, device)
        xrays, x0 = pair["xrays"][:, : self.config.num_views], to_signed(pair["ct_volume"])
        batch = {"xrays": xrays, "x0": x0, "t": self.draw_times(draws), "noise": _noise(x0.shape, seeds, NOISE, device)}
        if self.earlier is not None:
            batch |= self._condition(self.earlier, xrays, seeds, draws)
        return batch

    def draw_times(self, draws: SampleRandom) -> torch.Tensor:
        """Each sample's time step (B,): the last one for the share ``terminal_fraction``, otherwise uniform."""
        count = self.schedule.num_timesteps
        times = (draws.uniform("time") * count).long().clamp_max(count - 1)
        return times.masked_fill(draws.uniform("terminal") < self.config.training.terminal_fraction, count - 1)

    @torch.no_grad()
    def _condition(self, earlier: Cascade, xrays, seeds, draws: SampleRandom) -> dict:
        """The earlier stages' volume with noise, and how much of it: the network is told its level."""
        settings = self.config.conditioning
        means = [self.has_mean and draw < settings.mean_fraction for draw in draws.on_host("mean of earlier stages")]
        previous = self._earlier_volumes(earlier, xrays, seeds, means)
        level = draws.uniform("level of noise", high=settings.noise)
        noise = _noise(previous.shape, seeds, EARLIER_NOISE, xrays.device)
        return {"previous": augment_previous(previous, level, noise), "level": level}

    def _earlier_volumes(self, earlier: Cascade, xrays, seeds, means: list[bool]) -> torch.Tensor:
        """The earlier stages' posterior mean or sample (``means``) of each sample, in [-1, 1], by its own seed."""
        generators = [torch.Generator(xrays.device).manual_seed(seed ^ EARLIER) for seed in seeds]
        volumes: list = [None] * len(seeds)
        for mean, steps in ((True, 1), (False, self.config.conditioning.steps)):
            chosen = [i for i, wanted in enumerate(means) if wanted == mean]
            if chosen:
                # Stacked: a list as an index would be copied to the device, which waits.
                drawn = earlier.sample(torch.stack([xrays[i] for i in chosen]), steps, [generators[i] for i in chosen])
                for i, volume in zip(chosen, drawn):
                    volumes[i] = volume
        return to_signed(torch.stack(volumes))

    def loss(self, model, batch):
        return self.criterion(model, batch)

    def precisions(self) -> list[Precision]:
        return [self.earlier.precision] if self.earlier is not None else []

    def memory_advice(self) -> str:
        stage = f"--set {entry_name('stages', self.config.index)}"
        return (
            f"Try {stage}.activation_checkpointing=true, or a smaller {stage}.batch_size with as much more"
            f" {stage}.gradient_accumulation_steps"
        )

    # -- validation ------------------------------------------------------------------------------

    def score(self, model, batch, precision, index) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """PSNR of the posterior mean (with noise prediction: of a sample), losses at fixed noise levels.

        The noise, drawn on the device, is the same at every validation; on a CPU the volume is that of
        :meth:`Cascade.posterior_mean`.
        """
        with precision.autocast():
            return self._score(model, batch, index)

    def _score(self, model, batch, index) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        steps = 1 if self.has_mean else NOISE_PREDICTION_STEPS
        xrays, target = batch["xrays"][:, : self.config.num_views], batch["ct_volume"]
        generator, row, previous = torch.Generator(target.device).manual_seed(0), {}, None
        if self.earlier is not None:
            before = self.earlier.sample(xrays, steps, generator)
            previous = to_signed(before)
            before = F.interpolate(before, size=target.shape[2:], mode="trilinear", align_corners=False)
            row |= self._scores(before, target, xrays, "_before")  # what the stage must beat
        stage = Stage(self.config.stage.name, model, self.schedule, self.config.prediction)
        condition = model.encode(xrays, previous)
        volume = to_unit(stage.generate(condition, draw_noise(target.shape, generator, target.device), steps))
        noise = torch.Generator(target.device).manual_seed(index + 1)
        row |= self._validation_losses(model, condition, to_signed(target), xrays, noise)
        return row | self._scores(volume, target, xrays), volume[0, 0]

    def _scores(self, volume, target, xrays, suffix: str = "") -> dict[str, torch.Tensor]:
        """PSNR and physics loss (not weighted by noise) of a volume (1, 1, D, H, W) in [0, 1]."""
        scores = {f"psnr{suffix}": psnr_tensor(volume[0, 0], target[0, 0])}
        if self.physics is not None:
            scores[f"physics{suffix}"] = self.physics(to_signed(volume), xrays)
        return scores

    def _validation_losses(self, model, condition, x0, xrays, generator) -> dict[str, torch.Tensor]:
        last = self.schedule.num_timesteps - 1
        rows = []
        for step in range(1, VALIDATION_TIMES + 1):
            t = torch.full((1,), last * step // VALIDATION_TIMES, device=x0.device)
            batch = {"x0": x0, "xrays": xrays, "t": t, "noise": draw_noise(x0.shape, generator, x0.device)}
            x_t = self.schedule.add_noise(x0, batch["noise"], t)
            output = model.denoise(x_t, self.schedule.position(t), condition)
            total, parts = self.criterion.of_output(output, x_t, batch)
            rows.append({"loss": total, **parts})
        return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def _noise(shape, seeds, purpose: int, device) -> torch.Tensor:
    """N(0, 1) of ``shape`` (B, ...), each sample from its own seed, drawn on the device."""
    return draw_noise(shape, [torch.Generator(device).manual_seed(seed ^ purpose) for seed in seeds], device)


def stage_arguments(config: CascadeConfig, index: int) -> dict:
    """What :class:`CascadeStage` is built with, but for the geometry."""
    stage = config.stages[index]
    own = ("volume_size", "voxel_dim", "vit_depth", "num_heads", "use_depth_lifting")
    own += ("activation_checkpointing", "token_grid", "base_channels")
    shared = {"xray_size": config.xray_img_size, "num_views": config.num_views, "xray_channels": config.xray_channels}
    return {key: getattr(stage, key) for key in own} | shared | {"conditioned": index > 0}


def outline(config: CascadeConfig, index: int) -> CascadeStage:
    """The stage without memory for its weights: to count and to check."""
    with torch.device("meta"):
        return CascadeStage(**stage_arguments(config, index))


def stage_settings(config: CascadeConfig, index: int) -> dict:
    """:func:`stage_arguments` with the network's own defaults filled in."""
    return outline(config, index).settings
