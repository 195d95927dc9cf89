"""The trained cascade with a way of using it, for reconstruction, evaluation and export: :class:`CascadeSystem`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from hybrid_vit_cascade.cascade import DEFAULT_STEPS, Cascade
from hybrid_vit_cascade.one_step import OneStepPath
from xray2ct.checkpoints import weights_fingerprint
from xray2ct.evaluation.statistics import expected_coverage
from xray2ct.files import InputError
from xray2ct.inference.precision import CHECKED, fall_back_where_wrong, precision_name
from xray2ct.inference.predictor import TRILINEAR, LoadedCheckpoint, Method, Predictor
from xray2ct.inference.sample_calibration import NAME, SampleCalibration, read_sample_calibration
from xray2ct.inference.system import pick_device
from xray2ct.models.blocks import upsample


class CascadeSystem(Predictor):
    """A cascade that predicts its posterior mean, a sample, or the mean of several.

    samples: None for the one-step posterior mean, else the number of samples to average, of ``steps`` steps each.
    After :meth:`predict`, ``std`` is the standard deviation (B, 1, D, H, W) of two or more samples in units of [0, 1],
    else None, as the samples have it: :meth:`sample_calibration` says by how much it is off. The same seed gives the
    same volume. progress: wraps the iterable of steps. data_consistency: as :class:`Cascade`, of all these ways.
    """

    name = "the cascade"

    def __init__(
        self,
        cascade: Cascade,
        samples: int | None = None,
        steps: int = DEFAULT_STEPS,
        seed: int = 0,
        data_consistency: int = 0,
    ):
        self.cascade, self.samples, self.steps, self.seed = cascade, samples, steps, seed
        self.data_consistency = cascade.data_consistency = data_consistency
        self.geometry, self.hu_window, self.xray_scale = cascade.geometry, cascade.hu_window, cascade.xray_scale
        self.xray_size, self.num_views, self.volume_size = cascade.xray_size, cascade.num_views, cascade.volume_size
        settings = cascade.header.get("cascade_config", {}).get("data", {})
        self.xray_normalization = settings.get("xray_normalization", "percentile")
        self.device, self.precision = cascade.device, cascade.precision
        self.notes, self.std = [], None
        self.expected_coverage = expected_coverage(samples) if samples and samples > 1 else None
        self.progress: Callable[[Iterable], Iterable] | None = None

    def predict(self, xrays: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        self.std = None
        if self.samples is None:
            return self.cascade.posterior_mean(xrays, generator=generator).cpu()
        if self.samples == 1:
            return self.cascade.sample(xrays, self.steps, generator, progress=self.progress).cpu()
        volume, std = self.cascade.statistics(xrays, self.samples, self.steps, generator, progress=self.progress)
        self.std = std.cpu()
        return volume.cpu()

    def __str__(self) -> str:
        if self.samples is None:
            return "posterior mean in one step"
        draws = "a single sample" if self.samples == 1 else f"mean of {self.samples} samples"
        return f"{draws} of {self.steps} steps, seed {self.seed}"

    def methods(self) -> dict[str, Method]:
        """The ways of using the cascade.

        ``cascade_mean`` (one step) always, ``cascade_sample`` (one draw) with ``samples`` of 1 or more, and
        ``cascade_mean_of_K`` (K = ``samples``, with ``std``) with 2 or more; with several stages also ``trilinear``,
        the one-step mean of the stage before the last, upsampled: what the last stage must beat. A patient's noise
        follows from ``seed`` and the patient's id, whatever the order of patients.
        """
        cascade = self.cascade

        def one_step(item: dict) -> torch.Tensor:
            return cascade.posterior_mean(self.item_xrays(item))[0, 0].cpu()

        def draw(item: dict) -> torch.Tensor:
            noise = self.item_generator(item)
            return cascade.sample(self.item_xrays(item), self.steps, noise, progress=self.progress)[0, 0].cpu()

        def without_last(item: dict) -> torch.Tensor:
            coarse = cascade.posterior_mean(self.item_xrays(item), stages=len(cascade.stages) - 1)
            return upsample(coarse, self.volume_size[0] // coarse.shape[2])[0, 0].cpu()

        methods: dict[str, Method] = {"cascade_mean": one_step}
        if self.samples and self.samples > 1:
            methods[f"cascade_mean_of_{self.samples}"] = SamplesMean(self, self.samples)
        if self.samples:
            methods["cascade_sample"] = draw
        if len(cascade.stages) > 1:
            methods[TRILINEAR] = without_last
        return methods

    def own_methods(self, methods: dict[str, Method]) -> list[str]:
        return [name for name in methods if name.startswith("cascade_")]

    def item_generator(self, item: dict) -> torch.Generator:
        """Generator that follows from the seed and the patient's id alone."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(str(item.get("id", "")).encode()))

    def sampling(self) -> dict:
        """How samples are drawn, as far as their spread depends on it; JSON-ready."""
        return {"steps": self.steps, "data_consistency": self.data_consistency}

    def sample_calibration(self, consistency: dict | None) -> SampleCalibration | None:
        if self.samples is None or self.samples < 2:
            return None
        path, weights = Path(self.cascade.origin) / NAME, self.checkpoints()[0].weights
        assert isinstance(weights, dict)
        found, why = read_sample_calibration(path, weights, self.samples, self.sampling(), consistency)
        note = f"the standard deviation is not calibrated: {why}"
        if found is None and note not in self.notes:
            self.notes.append(note)
        return found

    def checkpoints(self) -> list[LoadedCheckpoint]:
        weights = {stage.name: weights_fingerprint(stage.model.state_dict()) for stage in self.cascade.stages}
        return [LoadedCheckpoint(self.cascade.origin, self.cascade.header, weights)]

    def summary(self) -> dict:
        return {
            "cascade": Path(self.cascade.origin).resolve().name,
            "stages": self.cascade.stage_names,
            "epoch": self.cascade.header["epoch"],
            "parameters": sum(p.numel() for p in self.cascade.parameters()),
            "steps": self.steps,
            "samples": self.samples or 0,
            "seed": self.seed,
            "data_consistency": self.data_consistency,
        }

    def export_module(self) -> nn.Module:
        return OneStepPath(self.cascade)


class SamplesMean:
    """Method: the mean of several samples of an item; ``std`` holds the standard deviation of the last one."""

    def __init__(self, system: CascadeSystem, samples: int):
        self.system, self.samples = system, samples
        self.std: torch.Tensor | None = None

    def __call__(self, item: dict) -> torch.Tensor:
        system = self.system
        xrays, generator = system.item_xrays(item), system.item_generator(item)
        mean, std = system.cascade.statistics(xrays, self.samples, system.steps, generator, progress=system.progress)
        self.std = std[0, 0].cpu()
        return mean[0, 0].cpu()


def load_cascade_system(
    checkpoint,
    samples: int | None = None,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    max_stages: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    data_consistency: int = 0,
) -> CascadeSystem:
    """Load a cascade's checkpoint folder; arguments as those of inference.py's command line.

    Raises :class:`InputError` naming what cannot be used.
    """
    where = pick_device(device)
    cascade = Cascade.load(checkpoint, where, max_stages, precision_name(precision, where))
    if data_consistency < 0:
        raise InputError(f"--data-consistency is {data_consistency}; expected 0 (off) or a number of steps")
    system = CascadeSystem(cascade, samples, steps, seed, data_consistency)
    if precision == CHECKED:
        fall_back_where_wrong(system)
    return system
