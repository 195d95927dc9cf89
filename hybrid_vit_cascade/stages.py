"""A trained stage of the cascade, and how the stages of a checkpoint folder are read and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_vit_cascade.diffusion import PREDICTIONS, Schedule, sample
from hybrid_vit_cascade.models import CascadeStage, Condition
from xray2ct.checkpoints import check_compatible, load_checkpoint, weights_fingerprint
from xray2ct.files import InputError, is_plain_name, read_json
from xray2ct.geometry.projector import Geometry

KIND = "hybrid_vit_cascade"
CONFIG_NAME = "config.json"
BEST_NAME = "best.pt"
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
        correct: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Volume ``(B, 1, D, H, W)`` in [-1, 1], float32, from noise of that shape; one step: the posterior mean.

        condition: from ``model.encode``. The network runs under whatever autocast is active, the sampler in float32.
        correct: as :func:`diffusion.sample`, of estimates in [-1, 1]. The result is clamped to [-1, 1]; estimates on
        the way only for it and for noise prediction, whose x0 is unsteady at first.
        """

        def denoise(x_t, t):
            return self.model.denoise(x_t, self.schedule.position(t), condition)

        def clipped(x0):
            x0 = x0.clamp(-1.0, 1.0)
            return x0 if correct is None else correct(x0)

        change = None if correct is None and self.prediction != "noise" else clipped
        x0 = sample(denoise, self.schedule, noise, steps, method, self.prediction, progress=progress, correct=change)
        return x0.clamp(-1.0, 1.0).where(x0.isfinite(), x0)  # infinity stays an error that can be seen


# ------------------------------------------------------------------------------------------------
# Reading a checkpoint folder


def load_stages(folder: Path, max_stages: int | None = None) -> tuple[list[Stage], dict]:
    """The stages of ``folder``, or its first ``max_stages``, and the last one's header with all training patients.

    Raises :class:`InputError` as :meth:`Cascade.load` says.
    """
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
        headers.append({key: value for key, value in data.items() if key not in ("model_state_dict", "training_state")})
    patients = sorted({patient for header in headers for patient in header["train_patients"]})
    return stages, {**headers[-1], "train_patients": patients}


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
                f" {data['stage_name']} again, or use the stages before it (--max-stages {len(hashes)})"
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
    hint = "train it" if index == 0 else f"train it, or use the {index} before it (--max-stages {index})"
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
