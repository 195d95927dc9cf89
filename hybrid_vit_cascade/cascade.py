"""The chain of trained stages: X-rays -> samples, posterior mean and spread of the volume.

    cascade = Cascade.load("checkpoints/quick_2stage", device="cpu")
    volume = cascade.posterior_mean(xrays)                        # (B, 2, S, S) in [0, 1] -> (B, 1, D, H, W) in [0, 1]
    draw = cascade.sample(xrays, steps=25, generator=generator)
    mean, std = cascade.statistics(xrays, samples=8, steps=25, generator=generator)

Each stage is conditioned on the X-rays and on the volume that the stage before it made from the same X-rays: for the
one-step posterior mean on that stage's one-step posterior mean, for a sample on its sample, so that a chain of samples
is one draw from the joint model. No noise is added to that volume: training adds between none and a stated amount, to
cover the errors of the stage before, with the amount as an input; its least value (level 0) is what a volume without
added noise really has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from hybrid_vit_cascade.diffusion import draw_noise
from hybrid_vit_cascade.stages import KIND, Stage, load_stages
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry
from xray2ct.inference.consistency import consistent
from xray2ct.inference.predictor import check_view_count
from xray2ct.inference.system import check_finite
from xray2ct.training.precision import Precision, keep_freed_memory, set_memory_format

__all__ = ["DEFAULT_STEPS", "KIND", "Cascade", "Stage", "to_signed", "to_unit"]

DEFAULT_STEPS = 25


def to_signed(unit: torch.Tensor) -> torch.Tensor:
    """[0, 1] (the HU window, outside the cascade) -> [-1, 1] (inside it)."""
    return 2.0 * unit - 1.0


def to_unit(signed: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1]; not clipped."""
    return 0.5 * (signed + 1.0)


class Cascade:
    """Trained stages, coarse to fine; see :meth:`load`. Volumes that go in and out are in [0, 1], X-rays too.

    stages: one :class:`Stage` each, the first unconditioned, every other conditioned on the one before.
    header: what the checkpoints share (``COMMON_KEYS``); with ``split_hash`` and ``train_patients`` (of all stages)
    when loaded. precision: ``float32`` (or whatever autocast surrounds a call), ``bfloat16``, ``float16`` or ``auto``.
    ``data_consistency``: each estimate of the clean volume on the way of a sample is moved towards its X-rays by as
    many conjugate-gradient steps (:func:`xray2ct.inference.consistency.consistent`; decomposed diffusion sampling,
    Chung et al., ICLR 2024); 0 for none. For X-rays as trained with, not for films.
    """

    def __init__(self, stages: Sequence[Stage], header: dict, device="cpu", precision: str = "float32"):
        self.stages, self.header, self.origin = list(stages), header, "the cascade"
        self.data_consistency = 0  # steps towards the X-rays at each step of sampling
        self.checked = True  # whether NaN in a volume is refused; training notices it by itself
        self.device = torch.device(device)
        self.precision = Precision(precision, self.device)
        for stage in self.stages:
            stage.model.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(cls, folder, device="cpu", max_stages: int | None = None, precision: str = "float32") -> Cascade:
        """Load ``folder/<stage>/best.pt`` of the stages that ``folder/config.json`` lists, or the first ``max_stages``.

        Raises :class:`InputError` naming the file: no folder of a cascade, a stage without checkpoint, a foreign,
        truncated or damaged file, stages that are not the configuration's or do not belong together.
        """
        stages, header = load_stages(Path(folder), max_stages)
        cascade = cls(stages, header, device, precision)
        cascade.origin = str(Path(folder))
        if cascade.device.type == "cpu":
            keep_freed_memory()
        for stage in stages:
            set_memory_format(stage.model)
        return cascade

    # -- what it is ------------------------------------------------------------------------------

    @property
    def volume_size(self) -> tuple[int, int, int]:
        """``(D, H, W)`` of the last stage."""
        size = self.stages[-1].model.volume_size
        return size, size, size

    @property
    def geometry(self) -> Geometry:
        return self.stages[0].model.geometry

    @property
    def num_views(self) -> int:
        return self.stages[0].model.num_views

    @property
    def hu_window(self) -> tuple[float, float]:
        low, high = self.header["hu_window"]
        return low, high

    @property
    def xray_scale(self) -> float:
        return self.header["xray_scale"]

    @property
    def xray_size(self) -> int:
        return self.header["xray_size"]

    @property
    def stage_names(self) -> list[str]:
        return [stage.name for stage in self.stages]

    def parameters(self) -> Iterable[torch.Tensor]:
        """Weights of all stages."""
        return (parameter for stage in self.stages for parameter in stage.model.parameters())

    # -- volumes ---------------------------------------------------------------------------------

    def sample(
        self,
        xrays: torch.Tensor,
        steps: int = DEFAULT_STEPS,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        stages: int | None = None,
        method: str = "dpmpp_2m",
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> torch.Tensor:
        """One draw of the volume for each pair of X-rays.

        xrays: ``(B, num_views, H, W)`` in [0, 1]. steps: network evaluations per stage. generator: makes the noise; the
        same seed gives the same volume (None: torch's global one; a list: one for each sample, whatever the others
        draw). stages: how many of them to run (None: all). method: ``dpmpp_2m`` or ``ddim``. progress: wraps each
        stage's iterable of steps (tqdm).
        Returns ``(B, 1, D, H, W)`` in [0, 1], float32, on the cascade's device. Raises :class:`InputError` for the
        wrong number of views, stages or steps, and naming the stage for NaN in what it makes.
        """
        return to_unit(self._chain(xrays, steps, generator, stages, method, progress))

    def posterior_mean(
        self,
        xrays: torch.Tensor,
        samples: int | None = None,
        steps: int = DEFAULT_STEPS,
        generator: torch.Generator | None = None,
        stages: int | None = None,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> torch.Tensor:
        """The expected volume: what scores best by PSNR, and smoother than any patient. Arguments as :meth:`sample`.

        samples: None takes one step from pure noise in each stage: fast, and the same at every call (its noise, which a
        well-trained network ignores, is that of seed 0 unless a generator is given). A number averages as many draws of
        ``steps`` steps.
        """
        if samples is not None:
            return self._moments(xrays, samples, steps, generator, stages, progress)[0]
        return self.sample(xrays, 1, generator or torch.Generator().manual_seed(0), stages)

    def statistics(
        self,
        xrays: torch.Tensor,
        samples: int,
        steps: int = DEFAULT_STEPS,
        generator: torch.Generator | None = None,
        stages: int | None = None,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Voxel-wise mean and standard deviation (n - 1) of ``samples`` draws, each ``(B, 1, D, H, W)`` in [0, 1].

        Only two volumes are kept, however many draws. At least two samples, else :class:`InputError`.
        """
        if samples < 2:
            raise InputError(f"a standard deviation of {samples} samples; expected at least 2")
        mean, squares = self._moments(xrays, samples, steps, generator, stages, progress)
        return mean, squares.div_(samples - 1).sqrt_()

    def _moments(self, xrays, samples, steps, generator, stages, progress):
        """Mean of the draws and sum of squared deviations from it (Welford, 1962), updated draw by draw."""
        if samples < 1:
            raise InputError(f"{samples} samples; expected at least 1")
        draws = (self.sample(xrays, steps, generator, stages, progress=progress) for _ in range(samples))
        mean = next(draws)
        squares = torch.zeros_like(mean)
        for count, draw in enumerate(draws, start=2):
            difference = draw - mean
            mean += difference / count
            squares += difference.mul_(draw.sub_(mean))
        return mean, squares

    @torch.no_grad()
    def _chain(self, xrays, steps, generator, stages, method, progress):
        """Run the stages one after the other; [-1, 1]."""
        xrays = self._check_xrays(xrays).to(self.device)
        count = len(self.stages) if stages is None else stages
        if not 1 <= count <= len(self.stages):
            raise InputError(f"{count} stages wanted; this cascade has {len(self.stages)}")
        volume, correct = None, self._towards(xrays) if self.data_consistency else None
        for stage in self.stages[:count]:
            noise = draw_noise((len(xrays), *stage.noise_shape), generator, self.device)
            # An autocast that is switched off would also switch off one around the call (training's).
            with self.precision.autocast() if self.precision.name != "float32" else contextlib.nullcontext():
                condition = stage.model.encode(xrays, volume)
                volume = stage.generate(condition, noise, steps, method, progress, correct)
            if self.checked:
                check_finite(volume, f"{self.origin}: stage {stage.name}", self.precision.name)
        return volume

    def _towards(self, xrays) -> Callable[[torch.Tensor], torch.Tensor]:
        """A volume in [-1, 1] -> one nearby that agrees with the X-rays."""
        acquisition = Acquisition(self.geometry, self.hu_window, self.xray_scale)
        return lambda x0: to_signed(consistent(to_unit(x0), xrays, acquisition, self.data_consistency))

    def _check_xrays(self, xrays):
        if xrays.ndim == 5 and xrays.shape[2] == 1:
            xrays = xrays.squeeze(2)
        if xrays.ndim != 4:
            raise InputError(f"X-rays have shape {tuple(xrays.shape)}; expected (B, {self.num_views}, H, W)")
        check_view_count("the cascade", self.num_views, xrays.shape[1])
        return xrays.float()
