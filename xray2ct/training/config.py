"""Configuration: dataclass defaults, JSON overrides, ``--set key=value`` last; every key is checked."""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from xray2ct.data.augment import AugmentConfig
from xray2ct.files import InputError, parse_json, read_json, shown, shown_name


@dataclass
class ModelConfig:
    volume_size: list[int] = field(default_factory=lambda: [64, 64, 64])
    base_channels: int = 64  # decoder width at half resolution
    xray_size: int = 512  # resolution the network is trained at
    stem_stride: int = 2  # 1 for small X-rays (128), 2 for 512
    encoder_blocks: list[int] = field(default_factory=lambda: [1, 1, 2, 3])
    decoder_blocks: list[int] = field(default_factory=lambda: [3, 2, 1])
    transformer_blocks: int = 6
    activation_checkpointing: bool = False  # less memory, about a third more time


@dataclass
class TrainingConfig:
    num_epochs: int = 200
    batch_size: int = 4  # per process
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    grad_clip_max_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    warmup_epochs: float = 2.0  # linear from 0
    min_learning_rate_ratio: float = 0.01  # where the cosine ends
    ema_decay: float = 0.999  # 0 switches the moving average off
    precision: str = "auto"  # auto, float32, bfloat16, float16
    channels_last: bool = True  # memory format of the convolutions
    compile: bool = False  # torch.compile
    seed: int = 0


@dataclass
class LossConfig:
    l1_weight: float = 1.0
    ssim_weight: float = 0.5
    perceptual_weight: float = 0.1
    edge_weight: float = 0.1
    multiscale_weight: float = 0.3
    mse_weight: float = 0.0
    projection_weight: float = 0.0
    perceptual_weights: str = "imagenet"  # imagenet, random, or a path to VGG16 weights
    perceptual_slices: int = 4  # slices per orientation and volume that VGG16 sees at each step
    use_scan_mask: bool = False  # leave out what the scan did not see (then strict scores there are up to chance)


@dataclass
class DataConfig:
    dataset_path: str = "data"
    max_patients: int | None = None
    repeats: int = 1  # times each patient is drawn (and augmented anew) per epoch
    num_workers: int = 4  # loader processes; ignored on a CPU
    prefetch_factor: int = 2
    cache_dir: str | None = None  # default: DATASET/.cache
    xray_source: str = "auto"  # auto, render (augmented pairs), files (the X-rays on disk, no augmentation)
    xray_normalization: str = "percentile"  # for data sets without dataset.json


@dataclass
class LoggingConfig:
    log_interval: int = 10  # steps
    val_interval: int = 1  # epochs
    save_checkpoint_interval: int = 5  # epochs between epoch_X.pt; 0 for none
    checkpoint_minutes: float = 10.0  # last.pt within an epoch


@dataclass
class EnhancedConfig:
    """Everything ``train_enhanced_4gpu.py`` reads; ``config_enhanced.json`` overrides these defaults."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    world_size: int = 4  # the global batch is batch_size x accumulation x this, however many processes run


@dataclass
class RefinementModelConfig:
    guided: bool = True  # read the X-rays too
    channels: int = 64  # of the trunk
    growth: int = 32
    rrdb_blocks: int = 2
    head_channels: list[int] = field(default_factory=lambda: [48, 24, 4])  # at 1x, 2x and per sub-voxel of 4x
    guide_widths: list[int] = field(default_factory=lambda: [24, 48, 64, 96])  # X-ray encoder, fine to coarse
    guide_channels: list[int] = field(default_factory=lambda: [8, 8, 4])  # lifted at 1x, 2x, 4x
    xray_size: int = 512
    stem_stride: int = 2  # 1 for X-rays of 256
    activation_checkpointing: bool = False


@dataclass
class PatchConfig:
    size: int = 32  # coarse voxels; 0 trains on full volumes
    per_volume: int = 2  # patches of each augmented volume
    context: int = 8  # coarse voxels around a patch that the trunk sees


@dataclass
class RefinementConfig:
    """Everything ``train_refinement_4gpu.py`` reads; ``config_refinement.json`` overrides these defaults."""

    base_checkpoint: str = "checkpoints_enhanced/best_model.pt"
    guidance_dropout: float = 0.1  # share of samples without X-rays: a guided network then also works without them
    model: RefinementModelConfig = field(default_factory=RefinementModelConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(num_epochs=100, batch_size=2, learning_rate=2e-4)
    )
    loss: LossConfig = field(default_factory=lambda: LossConfig(ssim_weight=0.0, multiscale_weight=0.0))
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    world_size: int = 4


# Smallest value that makes sense; anything below is an error that names the key.
MINIMUM = {
    "training.num_epochs": 1,
    "training.batch_size": 1,
    "training.learning_rate": 0.0,
    "training.weight_decay": 0.0,
    "training.grad_clip_max_norm": 0.0,
    "training.gradient_accumulation_steps": 1,
    "training.warmup_epochs": 0.0,
    "training.ema_decay": 0.0,
    "loss.perceptual_slices": 1,
    "model.rrdb_blocks": 1,
    "training.min_learning_rate_ratio": 0.0,
    "training.seed": 0,
    "loss.l1_weight": 0.0,
    "loss.ssim_weight": 0.0,
    "loss.perceptual_weight": 0.0,
    "loss.edge_weight": 0.0,
    "loss.multiscale_weight": 0.0,
    "loss.mse_weight": 0.0,
    "loss.projection_weight": 0.0,
    "model.transformer_blocks": 0,
    "augment.source_size": 16,
    "augment.rotation_deg": 0.0,
    "augment.scale": 0.0,
    "augment.translation_mm": 0.0,
    "augment.elastic_mm": 0.0,
    "augment.elastic_points": 2,
    "augment.hu_shift": 0.0,
    "augment.hu_scale": 0.0,
    "augment.mirror_probability": 0.0,
    "augment.xray_noise": 0.0,
    "augment.xray_gain": 0.0,
    "logging.checkpoint_minutes": 0.0,
    "guidance_dropout": 0.0,
    "patch.size": 0,
    "patch.per_volume": 1,
    "patch.context": 0,
    "data.max_patients": 1,
    "data.repeats": 1,
    "data.num_workers": 0,
    "data.prefetch_factor": 1,
    "logging.log_interval": 1,
    "logging.val_interval": 1,
    "logging.save_checkpoint_interval": 0,
    "world_size": 1,
}
MAXIMUM = {
    "training.min_learning_rate_ratio": 1.0,
    "training.ema_decay": 1.0,
    "augment.scale": 0.9,
    "augment.hu_scale": 1.0,
    "augment.mirror_probability": 1.0,
    "augment.xray_gain": 1.0,
    "guidance_dropout": 1.0,
}
CHOICES = {
    "training.precision": ("auto", "float32", "bfloat16", "float16"),
    "data.xray_source": ("auto", "render", "files"),
}


def load_config(cls, path=None, overrides=()):
    """Build ``cls`` from its defaults, a JSON file and ``key=value`` strings (dotted keys, JSON values).

    Raises :class:`InputError` naming file and key for an unknown key (with the nearest known one), a
    wrong type or an impossible value.
    """
    config = cls()
    if path is not None:
        data = read_json(path)
        if not isinstance(data, dict):
            raise InputError(f"{path}: expected a JSON object of settings")
        _apply(config, data, "", str(path))
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"--set {shown_name(text)}: expected key=value, such as training.num_epochs=10")
        origin = f"--set {shown_name(text)}"
        nested = _parse(value, origin)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _apply(config, nested, "", origin)
    check_config(config, str(path or "configuration"))
    return config


def config_dict(config) -> dict:
    """Plain nested dict, for JSON and checkpoints."""
    return asdict(config)


def config_hash(settings: dict) -> str:
    """Sixteen hexadecimal digits of a configuration as :func:`config_dict` gives it: the same for the same settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_config(config, origin: str) -> None:
    """Raise :class:`InputError` naming ``origin`` and the key of a value that cannot work."""
    for key, minimum in MINIMUM.items():
        value = _get(config, key)
        if value is not None and value < minimum:
            raise InputError(f"{origin}: {key} is {value}; expected at least {minimum}")
    for key, maximum in MAXIMUM.items():
        value = _get(config, key)
        if value is not None and value > maximum:
            raise InputError(f"{origin}: {key} is {value}; expected at most {maximum:g}")
    for key, choices in CHOICES.items():
        value = _get(config, key)
        if value is not None and value not in choices:
            raise InputError(f"{origin}: {key} is {value!r}; expected one of {', '.join(choices)}")


def _get(config, dotted):
    for part in dotted.split("."):
        config = getattr(config, part, None)
    return config


def _parse(text: str, origin: str):
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text  # a bare word is a string: data.dataset_path=ROOT
    except ValueError as error:
        raise InputError(f"{origin}: {error}") from None


def _apply(config, data: dict, prefix: str, origin: str) -> None:
    kinds = typing.get_type_hints(type(config))
    known = {f.name for f in fields(config)}
    for key, value in data.items():
        name = f"{prefix}{shown_name(key)}"
        if key not in known:
            near = difflib.get_close_matches(key[:80], known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise InputError(f"{origin}: unknown key {name}; {hint}")
        current = getattr(config, key)
        if is_dataclass(current):
            _apply_object(current, value, name, origin)
        elif (item := _dataclass_item(kinds[key])) is not None:
            setattr(config, key, _items(current, value, item, name, origin))
        else:
            setattr(config, key, _convert(value, kinds[key], name, origin))


def _dataclass_item(kind):
    """The dataclass that a ``list[...]`` annotation holds, or None for any other annotation."""
    item = next(iter(typing.get_args(kind)), None) if typing.get_origin(kind) is list else None
    return item if is_dataclass(item) else None


def _items(current: list, value, item, name: str, origin: str) -> list:
    """A list of dataclasses from a JSON list, or with an object ``{"0": {...}}`` changes of some of its entries."""
    if isinstance(value, dict):
        for index, settings in value.items():
            if index not in map(str, range(len(current))):
                there = f"expected 0 to {len(current) - 1}" if current else "the list is empty"
                raise InputError(f"{origin}: {name}.{shown_name(index)} does not exist; {there}")
            _apply_object(current[int(index)], settings, f"{name}.{index}", origin)
        return current
    if not isinstance(value, list):
        raise InputError(f"{origin}: {name} is {shown(value)}; expected a list of objects with settings")
    items = [item() for _ in value]
    for index, (entry, settings) in enumerate(zip(items, value)):
        _apply_object(entry, settings, f"{name}.{index}", origin)
    return items


def _apply_object(config, value, name: str, origin: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{origin}: {name} is {shown(value)}; expected an object with settings")
    _apply(config, value, f"{name}.", origin)


def _convert(value, kind, name: str, origin: str):
    """Check one value against its annotation; whole numbers are taken for floats, nothing else is bent."""
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        if value is None and types.NoneType in kinds:
            return None
        kinds = [k for k in kinds if k is not types.NoneType]
        kind = next((k for k in kinds if isinstance(value, typing.get_origin(k) or k)), kinds[0])
    if typing.get_origin(kind) is list:
        item = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise InputError(f"{origin}: {name} is {shown(value)}; expected a list of {item.__name__}")
        return [_convert(v, item, f"{name}[{i}]", origin) for i, v in enumerate(value)]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{origin}: {name} is {shown(value)}; expected a number of at most 63 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{origin}: {name} is {shown(value)}; expected {kind.__name__}")
    if kind is str and not _is_text(value):
        raise InputError(f"{origin}: {name} is {shown(value)}; expected text without NUL and broken characters")
    return value


def _is_text(value: str) -> bool:
    """False for what no file name or log can hold: NUL and lone halves of surrogate pairs."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def resolve_config_path(path: str | None, default_name: str) -> Path | None:
    """``--config`` as given, or the repository's own file when it is there."""
    if path is not None:
        return Path(path)
    default = Path(__file__).resolve().parents[2] / default_name
    return default if default.exists() else None
