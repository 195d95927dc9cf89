"""Configuration: dataclass defaults, JSON overrides, ``--set key=value`` last; every key is checked."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from xray2ct.data.augment import AugmentConfig
from xray2ct.files import InputError, parse_json, read_json, shown, shown_name
from xray2ct.imaging.xray_scale import NORMALIZATIONS
from xray2ct.settings import setting


def weight(default: float):
    """A field for the weight of a loss."""
    return setting(default, minimum=0.0)


@dataclass
class ModelConfig:
    volume_size: list[int] = field(default_factory=lambda: [64, 64, 64])
    base_channels: int = 64  # decoder width at half resolution
    xray_size: int = 512  # resolution the network is trained at
    stem_stride: int = 2  # 1 for small X-rays (128), 2 for 512
    encoder_blocks: list[int] = field(default_factory=lambda: [1, 1, 2, 3])
    decoder_blocks: list[int] = field(default_factory=lambda: [3, 2, 1])
    transformer_blocks: int = setting(6, minimum=0)
    activation_checkpointing: bool = False  # less memory, about a third more time
    seen_channel: bool = False  # read what each film shows, too: not behind a collimator, not beyond its edge
    passes: int = setting(1, minimum=1, maximum=3)  # 2: a second network corrects the volume; 3: the same one twice
    freeze_first_pass: bool = False  # train the second pass alone, on the weights of --init
    # Training alone: tell air, lung, fat, soft tissue and bone apart, at half or full resolution (loss.layout_weight)
    layout_head: str = setting("off", choices=("off", "half", "full"))
    upsampling: str = setting("trilinear", choices=("trilinear", "learned"))  # of the decoder's features


@dataclass
class CommonTraining:
    """Settings of the trainer that have the same name everywhere."""

    num_epochs: int = setting(200, minimum=1)
    batch_size: int = setting(4, minimum=1)  # per process
    learning_rate: float = setting(3e-4, minimum=0.0)
    weight_decay: float = setting(0.01, minimum=0.0)
    gradient_accumulation_steps: int = setting(1, minimum=1)
    # Samples that a process computes at once; 0: on a GPU as many of its share of a step as fit, else batch_size.
    micro_batch: int = setting(0, minimum=0)
    warmup_epochs: float = setting(2.0, minimum=0.0)  # linear from 0
    min_learning_rate_ratio: float = setting(0.01, minimum=0.0, maximum=1.0)  # where the cosine ends
    ema_decay: float = setting(0.999, minimum=0.0, maximum=1.0)  # 0 switches the moving average off
    precision: str = setting("auto", choices=("auto", "float32", "bfloat16", "float16"))
    # Memory format of the convolutions: auto is channels-last on CPUs, contiguous on GPUs.
    channels_last: bool | str = setting("auto", choices=("auto", True, False))
    # torch.compile: of the repeated blocks (compiled once a kind), of the whole network ("model", as true does), or of
    # that as CUDA graphs ("graphs").
    compile: bool | str = setting(False, choices=(False, "blocks", "model", "graphs", True))
    seed: int = setting(0, minimum=0)


@dataclass
class TrainingConfig(CommonTraining):
    grad_clip_max_norm: float = setting(1.0, minimum=0.0)  # largest gradient norm; 0 for no limit


@dataclass
class LossConfig:
    l1_weight: float = weight(1.0)
    ssim_weight: float = weight(0.5)
    perceptual_weight: float = weight(0.1)
    edge_weight: float = weight(0.1)
    multiscale_weight: float = weight(0.3)
    mse_weight: float = weight(0.0)
    projection_weight: float = weight(0.0)
    layout_weight: float = weight(0.0)  # needs model.layout_head
    perceptual_weights: str = "imagenet"  # imagenet, random, or a path to VGG16 weights
    perceptual_slices: int = setting(4, minimum=1)  # per orientation and volume that VGG16 sees at each step
    use_scan_mask: bool = False  # leave out what the scan did not see (then strict scores there are up to chance)


@dataclass
class CommonData:
    """Settings of the data set that have the same name everywhere."""

    dataset_path: str = "data"
    max_patients: int | None = setting(None, minimum=1)
    subset_seed: int | None = setting(
        None, minimum=0
    )  # which max_patients: null, the first; else nested random subsets
    repeats: int = setting(1, minimum=1)  # times each patient is drawn (and augmented anew) per epoch
    prefetch_factor: int = setting(2, minimum=1)
    # Training volumes stay on the GPU: auto (if they take at most half of its free memory), on, off; ignored on a CPU
    device_cache: str = setting("auto", choices=("auto", "on", "off"))
    cache_dir: str | None = None  # default: DATASET/.cache
    # auto, render (augmented pairs), files (the X-rays on disk, no augmentation)
    xray_source: str = setting("auto", choices=("auto", "render", "files"))
    # for data sets without dataset.json
    xray_normalization: str = setting("auto", choices=NORMALIZATIONS)


@dataclass
class DataConfig(CommonData):
    num_workers: int = setting(4, minimum=0)  # loader processes; ignored on a CPU


@dataclass
class LoggingConfig:
    log_interval: int = setting(10, minimum=1)  # steps
    val_interval: int = setting(1, minimum=1)  # epochs
    save_checkpoint_interval: int = setting(5, minimum=0)  # epochs between epoch_X.pt; 0 for none
    checkpoint_minutes: float = setting(10.0, minimum=0.0)  # last.pt within an epoch


@dataclass
class EnhancedConfig:
    """Everything ``train_enhanced_4gpu.py`` reads; ``config_enhanced.json`` overrides these defaults."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    # The global batch is batch_size x accumulation x this, however many processes run.
    world_size: int = setting(4, minimum=1)


@dataclass
class RefinementModelConfig:
    guided: bool = True  # read the X-rays too
    channels: int = 64  # of the trunk
    growth: int = 32
    rrdb_blocks: int = setting(2, minimum=1)
    head_channels: list[int] = field(default_factory=lambda: [48, 24, 4])  # at 1x, 2x and per sub-voxel of 4x
    guide_widths: list[int] = field(default_factory=lambda: [24, 48, 64, 96])  # X-ray encoder, fine to coarse
    guide_channels: list[int] = field(default_factory=lambda: [8, 8, 4])  # lifted at 1x, 2x, 4x
    xray_size: int = 512
    stem_stride: int = 2  # 1 for X-rays of 256
    activation_checkpointing: bool = False
    start: str = setting("cubic", choices=("cubic", "trilinear"))  # upsampling that details are added to


@dataclass
class PatchConfig:
    size: int = setting(32, minimum=0)  # coarse voxels; 0 trains on full volumes
    per_volume: int = setting(2, minimum=1)  # patches of each augmented volume
    context: int = setting(4, minimum=0)  # coarse voxels around a patch that the trunk sees; 8 costs a third more


@dataclass
class RefinementConfig:
    """Everything ``train_refinement_4gpu.py`` reads; ``config_refinement.json`` overrides these defaults."""

    base_checkpoint: str = "checkpoints_enhanced/best_model.pt"
    # Share of samples without X-rays: a guided network then also works without them.
    guidance_dropout: float = setting(0.1, minimum=0.0, maximum=1.0)
    model: RefinementModelConfig = field(default_factory=RefinementModelConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(num_epochs=100, batch_size=2, learning_rate=2e-4)
    )
    loss: LossConfig = field(default_factory=lambda: LossConfig(ssim_weight=0.0, multiscale_weight=0.0))
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    world_size: int = setting(4, minimum=1)


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


def check_config(config, origin: str, prefix: str = "") -> None:
    """Raise :class:`InputError` naming ``origin`` and the key of a value beyond the limits that stand at its field."""
    for entry in fields(config):
        name, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            check_config(value, origin, f"{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if is_dataclass(item):
                    check_config(item, origin, f"{entry_name(name, index)}.")
        elif value is not None and (expected := _expected(value, **entry.metadata)):
            raise InputError(f"{origin}: {name} is {value!r}; expected {expected}")


def _expected(value, minimum=None, maximum=None, between=None, choices=None) -> str | None:
    """What a value had to be; None when it is."""
    if choices and value not in choices:
        return f"one of {', '.join(c if isinstance(c, str) else json.dumps(c) for c in choices)}"
    if between and not between[0] <= value <= between[1]:
        return f"{between[0]} to {between[1]}" if between[0] < between[1] else f"{between[0]}"
    if minimum is not None and value < minimum:
        return f"at least {minimum}"
    return f"at most {maximum:g}" if maximum is not None and value > maximum else None


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
        if key not in known and (entry := _numbered(config, key, origin)):
            _apply_object(entry, value, name, origin)
            continue
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


def entry_name(name: str, index: int) -> str:
    """What entry ``index`` (from 0) of a list of settings is called, counted from 1: ``("stages", 0)`` -> stage1."""
    return f"{name.removesuffix('s')}{index + 1}"


def _numbered(config, key: str, origin: str):
    """The entry that a key such as ``stage1`` names in a list of settings; None where there is no such list."""
    match = re.fullmatch(r"([a-z_]+?)(\d{1,9})", key)
    entries = getattr(config, f"{match[1]}s", None) if match else None
    if not isinstance(entries, list) or _dataclass_item(typing.get_type_hints(type(config))[f"{match[1]}s"]) is None:
        return None
    if key not in [entry_name(f"{match[1]}s", index) for index in range(len(entries))]:
        there = f"expected {match[1]}1 to {match[1]}{len(entries)}" if entries else "the list is empty"
        raise InputError(f"{origin}: {key} does not exist; {there}")
    return entries[int(match[2]) - 1]


def _items(current: list, value, item, name: str, origin: str) -> list:
    """A list of dataclasses from a JSON list, or with an object ``{"0": {...}}`` changes of some of its entries.

    The latter, ``stages.0.num_epochs`` on a command line, is the former spelling of ``stage1.num_epochs``.
    """
    if isinstance(value, dict):
        for index, settings in value.items():
            if index not in map(str, range(len(current))):
                there = f"expected 0 to {len(current) - 1}" if current else "the list is empty"
                raise InputError(f"{origin}: {name}.{shown_name(index)} does not exist; {there}")
            _apply_object(current[int(index)], settings, entry_name(name, int(index)), origin)
        return current
    if not isinstance(value, list):
        raise InputError(f"{origin}: {name} is {shown(value)}; expected a list of objects with settings")
    items = [item() for _ in value]
    for index, (entry, settings) in enumerate(zip(items, value)):
        _apply_object(entry, settings, entry_name(name, index), origin)
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
