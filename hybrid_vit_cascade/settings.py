"""Settings of the cascade: ``config/*.json`` -> dataclasses, checked before anything is built.

    config = load_cascade_config("config/quick_2stage.json", ["training.batch_size=2", "stages.1.num_epochs=20"])
    run = stage_run(config, 0, world_size=1)      # what the training engine sees of one stage

Every key of the JSON files is explained here; keys that a file leaves out have these defaults.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from hybrid_vit_cascade import PACKAGE
from hybrid_vit_cascade.diffusion import PREDICTIONS, resolution_shift
from xray2ct.data.augment import AugmentConfig
from xray2ct.files import InputError, is_plain_name, shown
from xray2ct.training.config import DataConfig, LoggingConfig, TrainingConfig, load_config


@dataclass
class StageConfig:
    name: str = ""
    volume_size: int | list[int] = 64  # edge of the cube, also as [64, 64, 64]
    voxel_dim: int = 256  # width of the ViT
    vit_depth: int = 4  # its blocks
    num_heads: int = 4  # must divide voxel_dim
    use_depth_lifting: bool = True  # false: X-ray features are spread evenly over depth
    use_physics_loss: bool = True
    physics_weight: float = 0.3
    physics_minimum_weight: float = 0.0  # what pure noise counts in the physics loss, 0 to 1; clean steps count 1
    base_channels: int | None = None  # width of the convolutions at full resolution; null: the network's default
    token_grid: int | None = None  # ViT tokens per axis; null: the network's default
    noise_shift: float | None = None  # of the noise schedule; null: by resolution, 1 at 64^3
    activation_checkpointing: bool = False  # less memory, about a third more time
    batch_size: int | None = None  # these four: null takes the value in training
    num_epochs: int | None = None
    learning_rate: float | None = None
    gradient_accumulation_steps: int | None = None


@dataclass
class CascadeTraining:
    batch_size: int = 4  # per process
    num_epochs: int = 50  # of each stage
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    num_workers: int = 4  # loader processes; ignored on a CPU
    gradient_clip: float = 1.0  # largest gradient norm; 0 for no limit
    gradient_accumulation_steps: int = 1
    mixed_precision: bool = True  # false: float32
    precision: str = "auto"  # with mixed_precision: auto, bfloat16 or float16
    warmup_epochs: float = 2.0  # linear from 0
    min_learning_rate_ratio: float = 0.01  # where the cosine ends
    ema_decay: float = 0.999  # 0 switches the moving average off
    channels_last: bool = True
    compile: bool = False
    seed: int = 0
    terminal_fraction: float = 0.25  # share of samples at pure noise: they train the one-step posterior mean
    min_snr_gamma: float = 5.0  # limit of the min-SNR loss weight


@dataclass
class ConditioningConfig:
    """What a stage is told about the stages before it while it trains."""

    steps: int = 4  # sampling steps of each earlier stage
    mean_fraction: float = 0.5  # share of batches conditioned on the posterior mean (one step) instead of a sample
    noise: float = 0.1  # largest standard deviation added to the earlier volume, uniform from 0; range of values: 2


@dataclass
class CascadeData:
    dataset_path: str = "../data"  # from the current folder, or else from the folder of the cascade
    max_patients: int | None = None
    repeats: int = 1  # times each patient is drawn (and augmented anew) per epoch
    prefetch_factor: int = 2
    cache_dir: str | None = None  # default: DATASET/.cache
    xray_source: str = "auto"  # auto, render (augmented pairs), files (the X-rays on disk, no augmentation)
    xray_normalization: str = "percentile"  # for data sets without dataset.json


@dataclass
class CascadeConfig:
    """Everything ``train_progressive.py`` reads."""

    description: str = ""
    stages: list[StageConfig] = field(default_factory=list)
    xray_img_size: int = 512
    xray_channels: int = 1  # X-rays are grey: 1
    num_views: int = 2  # 2: PA and lateral; 1: PA only
    v_parameterization: bool = True  # false: the networks predict the noise
    prediction: str | None = None  # v, noise or x0; null: what v_parameterization says
    num_timesteps: int = 1000
    training: CascadeTraining = field(default_factory=CascadeTraining)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    data: CascadeData = field(default_factory=CascadeData)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    world_size: int | None = None  # global batch = batch_size x accumulation x this; null: the processes that run

    @property
    def stage_names(self) -> list[str]:
        return [stage.name for stage in self.stages]


# ------------------------------------------------------------------------------------------------
# Reading and checking

# Smallest and largest value that makes sense (beyond config.MINIMUM); None for no limit.
STAGE_LIMITS = {
    "volume_size": (16, None),
    "voxel_dim": (8, None),
    "vit_depth": (1, None),
    "num_heads": (1, None),
    "physics_weight": (0.0, None),
    "physics_minimum_weight": (0.0, 1.0),
    "base_channels": (8, None),
    "token_grid": (2, None),
    "batch_size": (1, None),
    "num_epochs": (1, None),
    "learning_rate": (0.0, None),
    "gradient_accumulation_steps": (1, None),
}
LIMITS = {
    "xray_img_size": (32, None),
    "xray_channels": (1, 1),
    "num_views": (1, 2),
    "num_timesteps": (2, None),
    "training.num_workers": (0, None),
    "training.gradient_clip": (0.0, None),
    "training.terminal_fraction": (0.0, 1.0),
    "training.min_snr_gamma": (1.0, None),
    "conditioning.steps": (1, None),
    "conditioning.mean_fraction": (0.0, 1.0),
    "conditioning.noise": (0.0, 1.0),
}


def load_cascade_config(path, overrides=()) -> CascadeConfig:
    """Read a cascade's JSON file, apply ``key=value`` overrides (``stages.0.num_epochs=5``) and check everything.

    Raises :class:`InputError` naming file and key: an unknown key, a wrong type, an impossible value, stages that do
    not double, heads that do not divide the width.
    """
    config = load_config(CascadeConfig, path, overrides)
    check_cascade_config(config, str(path))
    return config


def check_cascade_config(config: CascadeConfig, origin: str) -> None:
    """Raise :class:`InputError` naming ``origin`` and the key; sets each ``volume_size`` to one number."""
    _check_limits(config, LIMITS, origin)
    if config.prediction is not None and config.prediction not in PREDICTIONS:
        raise InputError(f"{origin}: prediction is {config.prediction!r}; expected one of {', '.join(PREDICTIONS)}")
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


def _check_limits(config, limits, origin, prefix=""):
    for key, (low, high) in limits.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is None:
            continue
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"{low}" if low == high else f"{low} to {high}"
            raise InputError(f"{origin}: {prefix}{key} is {value}; expected {wanted}")


def _check_stage(stage: StageConfig, index: int, origin: str) -> None:
    prefix = f"stages.{index}."
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
        stage.volume_size = stage.volume_size[0]
    _check_limits(stage, STAGE_LIMITS, origin, prefix)
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
        before, size = stages[index - 1].volume_size, stages[index].volume_size
        if size != 2 * before:
            raise InputError(
                f"{origin}: stages.{index}.volume_size is {size}, after {before}; expected {2 * before}:"
                " each stage doubles the one before"
            )


# ------------------------------------------------------------------------------------------------
# One stage, as the engine sees it


@dataclass
class StageTraining(TrainingConfig):
    """The engine's settings with what the diffusion loss needs."""

    terminal_fraction: float = 0.25
    min_snr_gamma: float = 5.0


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
    stage, training, data = config.stages[index], config.training, asdict(config.data)

    def own(key):
        value = getattr(stage, key)
        return getattr(training, key) if value is None else value

    return StageRun(
        index=index,
        stage=stage,
        xray_img_size=config.xray_img_size,
        num_views=config.num_views,
        prediction=prediction_of(config),
        num_timesteps=config.num_timesteps,
        shift=resolution_shift(stage.volume_size) if stage.noise_shift is None else stage.noise_shift,
        training=StageTraining(
            num_epochs=own("num_epochs"),
            batch_size=own("batch_size"),
            learning_rate=own("learning_rate"),
            weight_decay=training.weight_decay,
            grad_clip_max_norm=training.gradient_clip,
            gradient_accumulation_steps=own("gradient_accumulation_steps"),
            warmup_epochs=training.warmup_epochs,
            min_learning_rate_ratio=training.min_learning_rate_ratio,
            ema_decay=training.ema_decay,
            precision=training.precision if training.mixed_precision else "float32",
            channels_last=training.channels_last,
            compile=training.compile,
            seed=training.seed,
            terminal_fraction=training.terminal_fraction,
            min_snr_gamma=training.min_snr_gamma,
        ),
        conditioning=config.conditioning,
        data=DataConfig(**data, num_workers=training.num_workers),
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
