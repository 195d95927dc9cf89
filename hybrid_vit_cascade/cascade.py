"""The chain of trained stages: X-rays -> samples, posterior mean and spread of the volume.

    cascade = Cascade.load("checkpoints/quick_2stage", device="cpu")
    volume = cascade.posterior_mean(xrays)                        # (B, 2, S, S) in [0, 1] -> (B, 1, D, H, W) in [0, 1]
    draw = cascade.sample(xrays, steps=25, generator=generator)
    mean, std = cascade.statistics(xrays, samples=8, steps=25, generator=generator)

Each stage is conditioned on the X-rays and on the volume that the stage before it made from the same X-rays: for the
one-step posterior mean on that stage's one-step posterior mean, for a sample on its sample, so that a chain of samples
is one draw from the joint model. No noise is added to that volume: training adds between none and a stated amount, to
cover the errors of the stage before, and is told how much; the least of it (level 0) is what the volume really has.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_vit_cascade.diffusion import PREDICTIONS, Schedule, draw_noise, sample
from hybrid_vit_cascade.models import CascadeStage, Condition
from xray2ct.checkpoints import check_compatible, load_checkpoint, weights_fingerprint
from xray2ct.files import InputError, is_plain_name, read_json
from xray2ct.geometry.projector import Geometry
from xray2ct.inference.system import check_finite
from xray2ct.models.blocks import upsample
from xray2ct.training.precision import Precision, keep_freed_memory, to_channels_last

KIND = "hybrid_vit_cascade"
CONFIG_NAME = "config.json"
BEST_NAME = "best.pt"
DEFAULT_STEPS = 25
HEADER_KEYS = (
    "stage_index",
    "stage_name",
    "stage_names",
    "stage_settings",
    "prediction",
    "num_timesteps",
    "shift",
    "num_views",
    "geometry",
    "hu_window",
    "xray_scale",
    "xray_size",
    "split_hash",
    "train_patients",
)
# What all stages of a chain, and the data they are used on, have to share.
COMMON_KEYS = ("geometry", "hu_window", "xray_scale", "xray_size", "num_views")


def to_signed(unit: torch.Tensor) -> torch.Tensor:
    """[0, 1] (the HU window, outside the cascade) -> [-1, 1] (inside it)."""
    return 2.0 * unit - 1.0


def to_unit(signed: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1]; not clipped."""
    return 0.5 * (signed + 1.0)


@dataclass
class Stage:
    """One trained stage: its network (eval mode, weights of the moving average), schedule and kind of output."""

    name: str
    model: CascadeStage
    schedule: Schedule
    prediction: str

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """``(1, D, H, W)``: shape of one sample's starting noise."""
        return (1,) + (self.model.volume_size,) * 3

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        noise: torch.Tensor,
        steps: int,
        method: str = "dpmpp_2m",
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> torch.Tensor:
        """Volume ``(B, 1, D, H, W)`` in [-1, 1], float32, from noise of that shape; one step: the posterior mean.

        condition: from ``model.encode``. The network runs under whatever autocast is active, the sampler in float32.
        The result is clamped to [-1, 1]; estimates on the way only for noise prediction, whose x0 is unsteady at first.
        """

        def denoise(x_t, t):
            return self.model.denoise(x_t, self.schedule.position(t), condition)

        x0 = sample(
            denoise,
            self.schedule,
            noise,
            steps,
            method,
            self.prediction,
            progress=progress,
            clip_x0=self.prediction == "noise",
        )
        return x0.clamp(-1.0, 1.0).where(x0.isfinite(), x0)  # infinity stays an error that can be seen


class Cascade:
    """Trained stages, coarse to fine; see :meth:`load`. Volumes that go in and out are in [0, 1], X-rays too.

    stages: one :class:`Stage` each, the first unconditioned, every other conditioned on the one before.
    header: what the checkpoints share (``COMMON_KEYS``); with ``split_hash`` and ``train_patients`` (of all stages)
    when loaded. precision: ``float32`` (or whatever autocast surrounds a call), ``bfloat16``, ``float16`` or ``auto``.
    """

    def __init__(self, stages: Sequence[Stage], header: dict, device="cpu", precision: str = "float32"):
        self.stages, self.header, self.origin = list(stages), header, "the cascade"
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
        folder = Path(folder)
        config = _read_config(folder)
        names = [stage["name"] for stage in config["stages"]]
        count = len(names) if max_stages is None else max_stages
        if not 1 <= count <= len(names):
            raise InputError(f"{folder}: {count} stages wanted; expected 1 to {len(names)} ({', '.join(names)})")
        stages, headers, hashes = [], [], {}
        for index in range(count):
            path = _stage_path(folder, names, index)
            data = load_checkpoint(path, kind=KIND)
            _check_header(path, data, config, names, index)
            if headers:
                check_compatible_stages(path, data, headers[0])
                _check_earlier_weights(path, data, hashes)
            stages.append(build_stage(path, data))
            hashes[names[index]] = weights_fingerprint(data["model_state_dict"])
            headers.append(
                {key: value for key, value in data.items() if key not in ("model_state_dict", "training_state")}
            )
        cascade = cls(stages, _joint_header(headers), device, precision)
        cascade.origin = str(folder)
        if cascade.device.type == "cpu":
            keep_freed_memory()
            for stage in stages:
                to_channels_last(stage.model)
        return cascade

    # -- what it is ------------------------------------------------------------------------------

    @property
    def volume_size(self) -> tuple[int, int, int]:
        """``(D, H, W)`` of the last stage."""
        return (self.stages[-1].model.volume_size,) * 3

    @property
    def geometry(self) -> Geometry:
        return self.stages[0].model.geometry

    @property
    def num_views(self) -> int:
        return self.stages[0].model.num_views

    @property
    def hu_window(self) -> tuple[float, float]:
        return tuple(self.header["hu_window"])

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
        volume = None
        for stage in self.stages[:count]:
            noise = draw_noise((len(xrays), *stage.noise_shape), generator, self.device)
            # An autocast that is switched off would also switch off one around the call (training's).
            with self.precision.autocast() if self.precision.name != "float32" else contextlib.nullcontext():
                condition = stage.model.encode(xrays, volume)
                volume = stage.generate(condition, noise, steps, method, progress)
            check_finite(volume, f"{self.origin}: stage {stage.name}", self.precision.name)
        return volume

    def _check_xrays(self, xrays):
        if xrays.ndim == 5 and xrays.shape[2] == 1:
            xrays = xrays.squeeze(2)
        if xrays.ndim != 4:
            raise InputError(f"X-rays have shape {tuple(xrays.shape)}; expected (B, {self.num_views}, H, W)")
        self.check_views(xrays.shape[1])
        return xrays.float()

    def check_views(self, given: int) -> None:
        """Raise :class:`InputError` when the stages were trained with another number of views than ``given``."""
        if given == self.num_views:
            return
        if self.num_views == 1:
            raise InputError(f"the cascade was trained with one view, but got {given}; give the PA view alone")
        raise InputError(f"the cascade was trained with two views, but got {given}; give the PA and the lateral view")


# ------------------------------------------------------------------------------------------------
# Loading


def build_stage(path, data: dict) -> Stage:
    """The stage that a checkpoint describes, with its weights.

    Raises :class:`InputError` naming ``path`` when they do not fit each other.
    """
    try:
        model = CascadeStage(**data["stage_settings"], geometry=Geometry.from_dict(data["geometry"]))
        model.load_state_dict(data["model_state_dict"])
        schedule = Schedule.for_prediction(data["prediction"], data["num_timesteps"], data["shift"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: its weights do not fit its own settings ({str(error).splitlines()[0]})") from None
    return Stage(data["stage_name"], model.eval().requires_grad_(False), schedule, data["prediction"])


def check_compatible_stages(path, data: dict, first: dict) -> None:
    """Raise :class:`InputError` naming both sides where a stage was made for other data than the first one."""
    try:
        check_compatible(path, data, **{key: first[key] for key in COMMON_KEYS})
    except InputError as error:
        message = str(error).replace("is not the data's", f"is not that of stage {first['stage_name']}")
        raise InputError(message) from None


def _check_earlier_weights(path, data: dict, hashes: dict[str, str]) -> None:
    """Raise :class:`InputError` when the stages before were trained anew since this one was trained on them."""
    trained_on = data.get("config", {}).get("earlier_stages", {})
    for name, found in hashes.items():
        if trained_on.get(name, found) != found:
            raise InputError(
                f"{path}: was trained on other weights of stage {name} than are there now; train"
                f" {data['stage_name']} again, or use the stages before it (--max_stages {len(hashes)})"
            )


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}; expected the checkpoint folder of a cascade")
    if not path.exists():
        hint = f"; it looks like one stage's folder: give {folder.parent}" if (folder / BEST_NAME).exists() else ""
        raise InputError(f"{folder}: no {CONFIG_NAME}; expected the checkpoint folder of a cascade{hint}")
    config = read_json(path)
    stages = config.get("stages") if isinstance(config, dict) else None
    named = (
        isinstance(stages, list)
        and stages
        and all(isinstance(s, dict) and is_plain_name(s.get("name")) for s in stages)
    )
    if not named:
        raise InputError(f"{path}: no list of stages with plain names; expected the configuration of a cascade")
    return config


def _stage_path(folder: Path, names: list[str], index: int) -> Path:
    path = folder / names[index] / BEST_NAME
    if path.exists():
        return path
    hint = "train it" if index == 0 else f"train it, or use the {index} before it (--max_stages {index})"
    if (path.parent / "last.pt").exists():
        hint += "; it has not been validated yet, there is only last.pt"
    raise InputError(f"{path}: stage {index + 1} of {len(names)}, {names[index]}, has no checkpoint; {hint}")


def _check_header(path, data: dict, config: dict, names: list[str], index: int) -> None:
    """Raise :class:`InputError` unless ``data`` is stage ``index`` of the configuration."""
    missing = [key for key in (*HEADER_KEYS, "model_state_dict") if key not in data]
    if missing:
        raise InputError(f"{path}: key {missing[0]!r} is missing; expected a stage's checkpoint")
    if list(data["stage_names"])[: index + 1] != names[: index + 1]:
        raise InputError(
            f"{path}: belongs to a cascade of other stages ({', '.join(data['stage_names'])};"
            f" {CONFIG_NAME} lists {', '.join(names)})"
        )
    if (data["stage_index"], data["stage_name"]) != (index, names[index]):
        raise InputError(f"{path}: is stage {data['stage_name']}; expected {names[index]}")
    if data["prediction"] not in PREDICTIONS:
        raise InputError(f"{path}: prediction is {data['prediction']!r}; expected one of {', '.join(PREDICTIONS)}")
    settings, wanted = data["stage_settings"], config["stages"][index]
    for key in ("volume_size", "voxel_dim", "vit_depth", "num_heads", "use_depth_lifting"):
        value = wanted.get(key, settings.get(key))
        value = value[0] if isinstance(value, list) else value
        if value != settings.get(key):
            raise InputError(
                f"{path}: {key} is {settings.get(key)}, but {value} in {CONFIG_NAME};"
                " the checkpoint is of another configuration"
            )
    if bool(settings.get("conditioned")) != (index > 0):
        raise InputError(f"{path}: only a stage after the first can be conditioned, and has to be")


def _joint_header(headers: list[dict]) -> dict:
    """The last stage's header, with the training patients of all stages."""
    patients = sorted({patient for header in headers for patient in header["train_patients"]})
    return {**headers[-1], "train_patients": patients}


# ------------------------------------------------------------------------------------------------
# Evaluation


class SamplesMean:
    """Mean of K samples of an item; ``std`` holds the standard deviation of the last one, for :func:`coverage`."""

    def __init__(self, cascade: Cascade, samples: int, steps: int, seed: int):
        self.cascade, self.samples, self.steps, self.seed = cascade, samples, steps, seed
        self.std: torch.Tensor | None = None

    def __call__(self, item: dict) -> torch.Tensor:
        generator = item_generator(item, self.seed)
        mean, std = self.cascade.statistics(item_xrays(item, self.cascade), self.samples, self.steps, generator)
        self.std = std[0, 0].cpu()
        return mean[0, 0].cpu()


def predictors(
    cascade: Cascade, steps: int = DEFAULT_STEPS, samples: int | None = None, seed: int = 0
) -> dict[str, Callable[[dict], torch.Tensor]]:
    """Methods for ``evaluate.score_patients``: each turns a data set's item into a volume (D, H, W) in [0, 1].

    ``cascade_mean`` (one step) always, ``cascade_sample`` (one draw) with ``samples`` of 1 or more, and
    ``cascade_mean_of_K`` (K = ``samples``, with ``std``) with 2 or more; with several stages also ``trilinear``, the
    one-step mean of the stage before the last, upsampled: what the last stage must beat. A patient's noise follows
    from ``seed`` and the patient's id, whatever the order of patients.
    """

    def one_step(item):
        return cascade.posterior_mean(item_xrays(item, cascade))[0, 0].cpu()

    def draw(item):
        return cascade.sample(item_xrays(item, cascade), steps, item_generator(item, seed))[0, 0].cpu()

    def without_last(item):
        coarse = cascade.posterior_mean(item_xrays(item, cascade), stages=len(cascade.stages) - 1)
        return upsample(coarse, cascade.volume_size[0] // coarse.shape[2])[0, 0].cpu()

    methods = {"cascade_mean": one_step}
    if samples is not None and samples > 1:
        methods[f"cascade_mean_of_{samples}"] = SamplesMean(cascade, samples, steps, seed)
    if samples:
        methods["cascade_sample"] = draw
    if len(cascade.stages) > 1:
        methods["trilinear"] = without_last
    return methods


def item_xrays(item: dict, cascade: Cascade) -> torch.Tensor:
    """X-rays ``(1, num_views, H, W)`` of a data set's item, which always has both views: PA first."""
    return item["xrays"][None, : cascade.num_views]


def item_generator(item: dict, seed: int) -> torch.Generator:
    """Generator that follows from the seed and the patient's id alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(str(item.get("id", "")).encode()))
