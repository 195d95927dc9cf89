"""Settings of the cascade: ``config/*.json`` -> dataclasses, checked before anything is built.

    config = load_cascade_config("config/quick_2stage.json", ["training.batch_size=2", "stage2.num_epochs=20"])
    run = stage_run(config, 0, world_size=1)      # what the trainer sees of one stage

Every key of the JSON files is explained here; keys that a file leaves out have these defaults.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hybrid_vit_cascade import PACKAGE
from hybrid_vit_cascade.diffusion import PREDICTIONS, resolution_shift
from xray2ct.data.augment import AugmentConfig
from xray2ct.files import InputError, is_plain_name, shown
from xray2ct.settings import setting
from xray2ct.training.config import (
    CommonData,
    CommonTraining,
    DataConfig,
    LoggingConfig,
    TrainingConfig,
    check_config,
    entry_name,
    load_config,
    weight,
)


@dataclass
class StageConfig:
    name: str = ""
    volume_size: int | list[int] = setting(64, minimum=16)  # edge of the cube, also as [64, 64, 64]
    voxel_dim: int = setting(256, minimum=8)  # width of the ViT
    vit_depth: int = setting(4, minimum=1)  # its blocks
    num_heads: int = setting(4, minimum=1)  # must divide voxel_dim
    use_depth_lifting: bool = True  # false: X-ray features are spread evenly over depth
    use_physics_loss: bool = True
    physics_weight: float = weight(0.3)
    # What pure noise counts in the physics loss; clean steps count 1.
    physics_minimum_weight: float = setting(0.0, between=(0.0, 1.0))
    # Width of the convolutions at full resolution; null: the network's default.
    base_channels: int | None = setting(None, minimum=8)
    token_grid: int | None = setting(None, minimum=2)  # ViT tokens per axis; null: the network's default
    noise_shift: float | None = None  # of the noise schedule; null: by resolution, 1 at 64^3
    activation_checkpointing: bool = False  # less memory, about a third more time
    batch_size: int | None = setting(None, minimum=1)  # these four: null takes the value in training
    num_epochs: int | None = setting(None, minimum=1)
    learning_rate: float | None = setting(None, minimum=0.0)
    gradient_accumulation_steps: int | None = setting(None, minimum=1)

    @property
    def size(self) -> int:
        """Edge of the cube in voxels."""
        return self.volume_size[0] if isinstance(self.volume_size, list) else self.volume_size


@dataclass
class DiffusionTraining(CommonTraining):
    """What the diffusion loss needs besides the trainer's settings."""

    # Share of samples at pure noise: they train the one-step posterior mean.
    terminal_fraction: float = setting(0.25, between=(0.0, 1.0))
    min_snr_gamma: float = setting(5.0, minimum=1.0)  # limit of the min-SNR loss weight


@dataclass
class CascadeTraining(DiffusionTraining):
    num_epochs: int = setting(50, minimum=1)  # of each stage
    learning_rate: float = setting(1e-4, minimum=0.0)
    num_workers: int = setting(4, minimum=0)  # loader processes; ignored on a CPU
    gradient_clip: float = setting(1.0, minimum=0.0)  # largest gradient norm; 0 for no limit
    mixed_precision: bool = True  # false: float32; true: see ``precision``


@dataclass
class ConditioningConfig:
    """What a stage is told about the stages before it while it trains."""

    steps: int = setting(4, minimum=1)  # sampling steps of each earlier stage
    # Share of samples conditioned on the posterior mean (one step) instead of a sample of several steps.
    mean_fraction: float = setting(0.5, between=(0.0, 1.0))
    # Largest standard deviation added to the earlier volume, uniform from 0; range of values: 2.
    noise: float = setting(0.1, between=(0.0, 1.0))


@dataclass
class CascadeData(CommonData):
    dataset_path: str = "../data"  # from the current folder, or else from the folder of the cascade


@dataclass
class CascadeConfig:
    """Everything ``train_progressive.py`` reads."""

    description: str = ""
    stages: list[StageConfig] = field(default_factory=list)
    xray_img_size: int = setting(512, minimum=32)
    xray_channels: int = setting(1, between=(1, 1))  # X-rays are grey
    num_views: int = setting(2, between=(1, 2))  # 2: PA and lateral; 1: PA only
    v_parameterization: bool = True  # false: the networks predict the noise
    prediction: str | None = setting(None, choices=PREDICTIONS)  # v, noise or x0; null: see v_parameterization
    num_timesteps: int = setting(1000, minimum=2)
    training: CascadeTraining = field(default_factory=CascadeTraining)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    data: CascadeData = field(default_factory=CascadeData)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    # Global batch = batch_size x accumulation x this; null: the processes that run.
    world_size: int | None = setting(None, minimum=1)

    @property
    def stage_names(self) -> list[str]:
        return [stage.name for stage in self.stages]


# ------------------------------------------------------------------------------------------------
# Reading and checking


def load_cascade_config(path, overrides=()) -> CascadeConfig:
    """Read a cascade's JSON file, apply ``key=value`` overrides (``stage1.num_epochs=5``) and check everything.

    Raises :class:`InputError` naming file and key: an unknown key, a wrong type, an impossible value, stages that do
    not double, heads that do not divide the width.
    """
    config = load_config(CascadeConfig, path, overrides)
    check_cascade_config(config, str(path))
    return config


def former_spellings(overrides) -> list[str]:
    """A note for each ``stages.0.KEY=VALUE``, which counts from 0 as the JSON file's list, with today's spelling."""
    notes = []
    for text in overrides:
        if match := re.match(r"stages\.(\d{1,9})\.([\w.]+)", text):
            now = f"{entry_name('stages', int(match[1]))}.{match[2]}"
            notes.append(f"note: --set {match[0]} is read as {now}: options count stages from 1, write {now}")
    return notes


def check_cascade_config(config: CascadeConfig, origin: str) -> None:
    """Raise :class:`InputError` naming ``origin`` and the key; sets each ``volume_size`` to one number."""
    if config.xray_img_size % 32:
        raise InputError(f"{origin}: xray_img_size is {config.xray_img_size}; expected a multiple of 32")
    if config.conditioning.steps > config.num_timesteps:
        raise InputError(f"{origin}: conditioning.steps is {config.conditioning.steps}; expected at most num_timesteps")
    training = config.training
    if not training.mixed_precision and training.precision not in ("auto", "float32"):
        raise InputError(
            f"{origin}: training.mixed_precision is false, but training.precision is {training.precision!r};"
            " change one of them"
        )
    if not config.stages:
        raise InputError(f"{origin}: stages is empty; expected a list of at least one stage")
    for index, stage in enumerate(config.stages):
        _check_stage(stage, index, origin)
    _check_chain(config.stages, origin)


def _check_stage(stage: StageConfig, index: int, origin: str) -> None:
    prefix = f"{entry_name('stages', index)}."
    if not is_plain_name(stage.name):  # stage names are folder names, on every system
        raise InputError(
            f"{origin}: {prefix}name is {shown(stage.name)};"
            " expected a folder name of letters, digits, '_', '-' and '.'"
        )
    if isinstance(stage.volume_size, list):
        if len(stage.volume_size) != 3 or len(set(stage.volume_size)) != 1:
            raise InputError(
                f"{origin}: {prefix}volume_size is {stage.volume_size}; expected three equal sizes, a cube"
            )
        stage.volume_size = stage.size
    check_config(stage, origin, prefix)
    if stage.voxel_dim % stage.num_heads:
        raise InputError(
            f"{origin}: {prefix}num_heads is {stage.num_heads}, which does not divide voxel_dim {stage.voxel_dim}"
        )
    if stage.noise_shift is not None and not stage.noise_shift > 0:
        raise InputError(f"{origin}: {prefix}noise_shift is {stage.noise_shift}; expected a factor above 0")


def _check_chain(stages: list[StageConfig], origin: str) -> None:
    names = [stage.name.lower() for stage in stages]  # folders of one name, on some systems
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{origin}: two stages are called {name!r}; expected a name of its own for each")
    for index in range(1, len(stages)):
        before, size = stages[index - 1].size, stages[index].size
        if size != 2 * before:
            raise InputError(
                f"{origin}: {entry_name('stages', index)}.volume_size is {size}, after {before}; expected {2 * before}:"
                " each stage doubles the one before"
            )


# ------------------------------------------------------------------------------------------------
# One stage, as the trainer sees it

# Settings that a stage may have of its own; null takes the value in training.
OWN = ("batch_size", "num_epochs", "learning_rate", "gradient_accumulation_steps")


@dataclass
class StageTraining(DiffusionTraining, TrainingConfig):
    """The trainer's settings with what the diffusion loss needs."""


@dataclass
class StageRun:
    """One stage's training run: :func:`trainer.fit` reads it, its checkpoints keep it, a resumed run must equal it.

    Other stages' settings are not in it, so that they may change; fingerprints of the earlier stages' weights are.
    """

    index: int
    stage: StageConfig
    xray_img_size: int
    num_views: int
    prediction: str
    num_timesteps: int
    shift: float
    training: StageTraining
    conditioning: ConditioningConfig
    data: DataConfig
    augment: AugmentConfig
    logging: LoggingConfig
    world_size: int
    earlier_stages: dict[str, str] = field(default_factory=dict)  # name -> fingerprint of the frozen weights


def stage_run(config: CascadeConfig, index: int, world_size: int) -> StageRun:
    """The run of stage ``index``; ``world_size`` counts where the configuration leaves it open."""
    stage, settings = config.stages[index], asdict(config.training)
    settings |= {key: value for key in OWN if (value := getattr(stage, key)) is not None}
    num_workers, clip = settings.pop("num_workers"), settings.pop("gradient_clip")
    if not settings.pop("mixed_precision"):
        settings["precision"] = "float32"
    return StageRun(
        index=index,
        stage=stage,
        xray_img_size=config.xray_img_size,
        num_views=config.num_views,
        prediction=prediction_of(config),
        num_timesteps=config.num_timesteps,
        shift=resolution_shift(stage.size) if stage.noise_shift is None else stage.noise_shift,
        training=StageTraining(**settings, grad_clip_max_norm=clip),
        conditioning=config.conditioning,
        data=DataConfig(**asdict(config.data), num_workers=num_workers),
        augment=config.augment,
        logging=config.logging,
        world_size=config.world_size or world_size,
    )


def prediction_of(config: CascadeConfig) -> str:
    """What the networks predict: ``prediction``, or what ``v_parameterization`` stands for."""
    return config.prediction or ("v" if config.v_parameterization else "noise")


def find_data(path: str) -> Path:
    """The data set's folder: ``path`` from the current folder, or else from the cascade's.

    The default ``../data`` is the repository's ``data`` folder from wherever the script is started.
    Raises :class:`InputError` naming the places that were looked at.
    """
    places = [Path(path), PACKAGE / path]
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(dict.fromkeys(str(place.resolve()) for place in places))
    raise InputError(
        f"{path}: no such data set (looked at {looked}); make one with prepare_data.py, then pass --data ROOT"
    )
