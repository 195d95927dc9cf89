"""Train the cascade, one stage after the other. Works on several GPUs, one, or none; the same command resumes.

    cd hybrid_vit_cascade
    python training/train_progressive.py --config config/quick_2stage.json --checkpoint_dir checkpoints/quick_2stage
    python training/train_progressive.py --config config/progressive_3stage.json --data ROOT --dry-run
    torchrun --nproc_per_node 4 -m hybrid_vit_cascade.training.train_progressive ...      # from the repository's root

Each stage trains with all earlier ones frozen, on their sampled, noise-augmented output. ``CHECKPOINT_DIR`` gets
``config.json`` and, for each stage, a folder with ``best.pt`` (by validation PSNR of the posterior mean), ``last.pt``
(everything needed to go on bit for bit), ``log.jsonl`` and the TensorBoard files.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

if not __package__:  # started by path: the package lies two folders up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import PatientDataset
from hybrid_vit_cascade import PACKAGE
from hybrid_vit_cascade.cascade import KIND, Cascade, Stage, to_signed, to_unit
from hybrid_vit_cascade.diffusion import Schedule, augment_previous, draw_noise
from hybrid_vit_cascade.models import CascadeStage
from hybrid_vit_cascade.physics import PhysicsLoss
from hybrid_vit_cascade.settings import (
    CascadeConfig,
    StageRun,
    find_data,
    load_cascade_config,
    prediction_of,
    stage_run,
)
from xray2ct.checkpoints import check_compatible, find_state, load_checkpoint, save_checkpoint, weights_fingerprint
from xray2ct.data.augment import PairMaker
from xray2ct.files import InputError, atomic_path, is_plain_name, read_json, run_cli, write_json
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.metrics import psnr
from xray2ct.training.cli import add_run_arguments, describe_processes, run_context
from xray2ct.training.config import config_dict
from xray2ct.training.distributed import Processes, launch, process_group
from xray2ct.training.monitors import Monitors, add_arguments, check_arguments, monitors_from
from xray2ct.training.precision import Precision
from xray2ct.training.run_identity import changed_settings, check_same_data, data_header
from xray2ct.training.run_lock import locked_folder
from xray2ct.training.trainer import Interrupted, TrainingError, fit

SAMPLES = 2  # validation patients whose pictures go to the monitors
VALIDATION_TIMES = 4  # noise levels at which the validation loss is measured
NOISE_PREDICTION_STEPS = 10  # of the volume that is validated where one step is not the posterior mean
# A sample's seed serves its augmentation; with one of these bits turned it serves another purpose, independently.
TIME, NOISE, EARLIER, EARLIER_NOISE = (1 << bit for bit in (62, 61, 60, 59))


# ------------------------------------------------------------------------------------------------
# One stage


class StageLoss:
    """Weighted diffusion loss + ``physics_weight`` x physics loss of one stage.

    ``loss(model, batch)``: batch holds x0 (B, 1, D, H, W) in [-1, 1], noise, t (B,), xrays, and for a stage after the
    first previous and level. Returns the total and both parts as 0-d tensors; ``physics`` is None when switched off.
    """

    def __init__(self, run: StageRun, acquisition: Acquisition):
        self.run, self.schedule = run, Schedule.for_prediction(run.prediction, run.num_timesteps, run.shift)
        self.physics = None
        if run.stage.use_physics_loss:
            self.physics = PhysicsLoss(acquisition, run.stage.physics_minimum_weight)

    def __call__(self, model, batch):
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


class StageTask:
    """One stage for the engine: pairs, what the frozen stages make of the X-rays, noise, losses, posterior mean.

    earlier: the frozen stages before it; None for the first stage.
    """

    weights_key = "model_state_dict"
    best_name = "best.pt"

    def __init__(self, config: CascadeConfig, run: StageRun, root: Path, earlier: Cascade | None, processes: Processes):
        self.config, self.run, self.earlier = config, run, earlier
        self.size, self.prediction = run.stage.volume_size, run.prediction
        # Noise prediction has no step from pure noise: its one-step volume is rough, and nothing is built on it.
        self.has_mean = run.prediction != "noise"
        self._open_data(root, processes)
        self.criterion = StageLoss(run, self.acquisition)
        self.schedule, self.physics = self.criterion.schedule, self.criterion.physics
        self.samples: list[dict] = []

    def _open_data(self, root, processes):
        data, size, xray_size = self.run.data, self.size, self.run.xray_img_size
        common = {"cache_dir": data.cache_dir, "xray_normalization": data.xray_normalization}
        self.val_data = PatientDataset(root, "val", size, xray_size, **common)
        self.renders = data.xray_source == "render" or (data.xray_source == "auto" and self.val_data.has_manifest)
        augment = self.run.augment
        source = max(augment.source_size, size) if augment.enabled else 2 * size
        source = min(source, self.val_data.cube_size)  # the data set has nothing finer
        kind = {"volume_size": source, "xray_size": None, "raw": True}
        if not self.renders:
            kind = {"volume_size": size, "xray_size": xray_size}
        self.train_data = PatientDataset(root, "train", max_patients=data.max_patients, **kind, **common)
        self.acquisition, self.data_header = self.train_data.acquisition, data_header(self.train_data)
        augment = dataclasses.replace(augment, source_size=source)
        self.pairs = PairMaker(self.acquisition, (size,) * 3, xray_size, augment)
        for dataset in (self.train_data, self.val_data):
            bar = (lambda it: tqdm(it, desc="Reading patients", leave=False)) if processes.is_main else None
            dataset.build_cache(processes.rank, processes.world_size, bar)
        processes.barrier()

    def build_model(self) -> CascadeStage:
        """The stage's network; its initial weights depend on the seed only."""
        torch.manual_seed(self.run.training.seed)
        return CascadeStage(**stage_arguments(self.config, self.run.index), geometry=self.acquisition.geometry)

    def header(self) -> dict:
        data, run = self.train_data, self.run
        return {
            "kind": KIND,
            "stage_index": run.index,
            "stage_name": run.stage.name,
            "stage_names": self.config.stage_names,
            "stage_settings": stage_settings(self.config, run.index),
            "cascade_config": config_dict(self.config),
            "prediction": run.prediction,
            "num_timesteps": run.num_timesteps,
            "shift": run.shift,
            "num_views": run.num_views,
            **self.data_header,
            "xray_size": run.xray_img_size,
            "train_patients": list(data.ids),
        }

    # -- training --------------------------------------------------------------------------------

    def make_batch(self, raw, seeds, device) -> dict:
        """Pairs with all that is drawn for them: everything follows from the samples' seeds."""
        pair = {k: raw[k].to(device, non_blocking=True) for k in ("ct_volume", "mask", "xrays") if k in raw}
        if self.renders:
            pair = self.pairs(pair["ct_volume"], pair["mask"], seeds)
        xrays, x0 = pair["xrays"][:, : self.run.num_views], to_signed(pair["ct_volume"])
        draws = [torch.Generator().manual_seed(seed ^ TIME) for seed in seeds]
        batch = {
            "xrays": xrays,
            "x0": x0,
            "t": torch.tensor([self._draw_time(draw) for draw in draws], device=device),
            "noise": _noise(x0.shape, seeds, NOISE, device),
        }
        if self.earlier is not None:
            batch |= self._condition(xrays, seeds, draws)
        return batch

    def _draw_time(self, draw: torch.Generator) -> int:
        last = self.schedule.num_timesteps - 1
        if torch.rand((), generator=draw) < self.run.training.terminal_fraction:
            return last
        return int(torch.randint(0, last + 1, (), generator=draw))

    @torch.no_grad()
    def _condition(self, xrays, seeds, draws) -> dict:
        """The earlier stages' volume with noise, and how much of it: what the stage will meet when it is used."""
        settings = self.run.conditioning
        means = [self.has_mean and bool(torch.rand((), generator=draw) < settings.mean_fraction) for draw in draws]
        previous = self._earlier_volumes(xrays, seeds, means)
        level = torch.cat([settings.noise * torch.rand(1, generator=draw) for draw in draws]).to(xrays.device)
        noise = _noise(previous.shape, seeds, EARLIER_NOISE, xrays.device)
        return {"previous": augment_previous(previous, level, noise), "level": level}

    def _earlier_volumes(self, xrays, seeds, means: list[bool]) -> torch.Tensor:
        """The earlier stages' posterior mean or sample (``means``) of each sample, in [-1, 1], by its own seed."""
        generators = [torch.Generator(xrays.device).manual_seed(seed ^ EARLIER) for seed in seeds]
        volumes: list = [None] * len(seeds)
        for mean, steps in ((True, 1), (False, self.run.conditioning.steps)):
            chosen = [i for i, wanted in enumerate(means) if wanted == mean]
            if chosen:
                drawn = self.earlier.sample(xrays[chosen], steps, [generators[i] for i in chosen])
                for i, volume in zip(chosen, drawn):
                    volumes[i] = volume
        return to_signed(torch.stack(volumes))

    def loss(self, model, batch):
        return self.criterion(model, batch)

    def precisions(self) -> list[Precision]:
        """Those beside the trained network's: the frozen stages'."""
        return [self.earlier.precision] if self.earlier is not None else []

    def memory_advice(self) -> str:
        """What to try when the stage runs out of GPU memory, by the names of its settings."""
        stage = f"--set stages.{self.run.index}"
        return (
            f"Try {stage}.activation_checkpointing=true, or a smaller {stage}.batch_size with as much more"
            f" {stage}.gradient_accumulation_steps"
        )

    # -- validation ------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, model, processes, precision: Precision) -> list[dict]:
        """Posterior mean (PSNR) and losses at fixed noise levels, with noise that is the same at every validation."""
        rows, self.samples = [], []
        for index in range(processes.rank, len(self.val_data), processes.world_size):
            item = self.val_data[index]
            with precision.autocast():
                row, volume = self._validate(model, item, index, processes.device)
            rows.append({"id": item["id"], **row})
            if len(self.samples) < SAMPLES:
                case = {"id": item["id"], "xrays": item["xrays"], "prediction": volume, "target": item["ct_volume"][0]}
                self.samples.append(case | {"hu_window": self.val_data.hu_window})
        return rows

    def _validate(self, model, item, index, device) -> tuple[dict, torch.Tensor]:
        """Scores of one patient's posterior mean, and its volume: the very one of :meth:`Cascade.posterior_mean`.

        With noise prediction it is a sample.
        """
        steps = 1 if self.has_mean else NOISE_PREDICTION_STEPS
        xrays = item["xrays"][None, : self.run.num_views].to(device)
        target = item["ct_volume"][None].to(device)
        generator, row, previous = torch.Generator().manual_seed(0), {}, None
        if self.earlier is not None:
            before = self.earlier.sample(xrays, steps, generator)
            previous = to_signed(before)
            before = F.interpolate(before, size=target.shape[2:], mode="trilinear", align_corners=False)
            row |= self._scores(before, target, xrays, "_before")  # what the stage must beat
        stage = Stage(self.run.stage.name, model, self.schedule, self.prediction)
        condition = model.encode(xrays, previous)
        x0 = stage.generate(condition, draw_noise(target.shape, generator, device), steps)
        volume = to_unit(x0)
        noise = torch.Generator().manual_seed(index + 1)
        row |= self._validation_losses(model, condition, to_signed(target), xrays, noise)
        return row | self._scores(volume, target, xrays), volume[0, 0]

    def _scores(self, volume, target, xrays, suffix: str = "") -> dict[str, float]:
        """PSNR and physics loss (not weighted by noise) of a volume (1, 1, D, H, W) in [0, 1]."""
        scores = {f"psnr{suffix}": psnr(volume[0, 0], target[0, 0])}
        if self.physics is not None:
            scores[f"physics{suffix}"] = self.physics(to_signed(volume), xrays).item()
        return scores

    def _validation_losses(self, model, condition, x0, xrays, generator) -> dict[str, float]:
        last = self.schedule.num_timesteps - 1
        rows = []
        for step in range(1, VALIDATION_TIMES + 1):
            t = torch.full((1,), last * step // VALIDATION_TIMES, device=x0.device)
            batch = {"x0": x0, "xrays": xrays, "t": t, "noise": draw_noise(x0.shape, generator, x0.device)}
            x_t = self.schedule.add_noise(x0, batch["noise"], t)
            output = model.denoise(x_t, self.schedule.position(t), condition)
            total, parts = self.criterion.of_output(output, x_t, batch)
            rows.append({"loss": total.item()} | {name: value.item() for name, value in parts.items()})
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


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


def _outline(config: CascadeConfig, index: int) -> CascadeStage:
    """The stage without memory for its weights: to count and to check."""
    with torch.device("meta"):
        return CascadeStage(**stage_arguments(config, index))


def stage_settings(config: CascadeConfig, index: int) -> dict:
    """:func:`stage_arguments` with the network's own defaults filled in."""
    return _outline(config, index).settings


# ------------------------------------------------------------------------------------------------
# The chain: earlier stages, finished stages, resuming


def check_stage_checkpoint(path, checkpoint: dict, config: CascadeConfig, data: PatientDataset | None = None) -> int:
    """Raise :class:`InputError` unless a stage's checkpoint belongs to this cascade (and data); returns its index."""
    index, names = checkpoint["stage_index"], checkpoint["stage_names"]
    if names != config.stage_names:
        raise InputError(
            f"{path}: its stages are {', '.join(names)}; the configuration's are {', '.join(config.stage_names)}"
        )
    if checkpoint["num_views"] != config.num_views:
        raise InputError(f"{path}: trained with num_views {checkpoint['num_views']}; now {config.num_views}")
    # How activations are kept in memory does not change what the weights mean.
    both = (checkpoint["stage_settings"], stage_settings(config, index))
    settings, wanted = ({**entry, "activation_checkpointing": False} for entry in both)
    run = stage_run(config, index, world_size=1)
    check_compatible(
        path,
        {**checkpoint, "stage_settings": settings},
        stage_settings=wanted,
        prediction=prediction_of(config),
        num_timesteps=run.num_timesteps,
        shift=run.shift,
    )
    if data is not None:
        check_same_data(path, checkpoint, data_header(data), "choose another --checkpoint_dir")
    return index


def recorded_config(folder) -> dict | None:
    """``config.json`` of a checkpoint folder, or None; :class:`InputError` when it is something else."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return None
    data = read_json(path)
    stages = data.get("stages") if isinstance(data, dict) else None
    if not isinstance(stages, list) or not all(isinstance(s, dict) and is_plain_name(s.get("name")) for s in stages):
        raise InputError(f"{path}: not the configuration of a cascade; choose another --checkpoint_dir")
    return data


class Chain:
    """The stages of one checkpoint folder: what is finished, what comes before a stage, where training goes on."""

    def __init__(self, config: CascadeConfig, folder: Path, root: Path, processes: Processes):
        self.config, self.folder, self.root, self.processes = config, folder, root, processes
        self.data = PatientDataset(root, "train", config.stages[0].volume_size, None)

    def stage_folder(self, index: int) -> Path:
        return self.folder / self.config.stages[index].name

    def check_config(self) -> None:
        """Refuse a folder that another cascade uses."""
        recorded, ours = recorded_config(self.folder), self.config.stage_names
        found = [stage["name"] for stage in recorded["stages"]] if recorded else ours
        if found != ours:
            raise InputError(
                f"{self.folder} holds a cascade with the stages {', '.join(found)}; the configuration's are"
                f" {', '.join(ours)}: choose another --checkpoint_dir"
            )

    def write_config(self, replace: bool = True) -> None:
        """Write ``config.json`` (rank 0), once it is clear that this run may go on in the folder."""
        path = self.folder / "config.json"
        if self.processes.is_main and (replace or not path.exists()):
            write_json(path, config_dict(self.config))

    def is_frozen(self, index: int, run: StageRun) -> bool:
        """Whether a stage is trained to its end, or a later one already builds on it; notes what changed since."""
        started = any((self.stage_folder(i) / "last.pt").exists() for i in range(index + 1, len(self.config.stages)))
        found = find_state(self.stage_folder(index), kind=KIND)
        if found is None:
            return started
        path, checkpoint, _ = found
        if not started and checkpoint["training_state"]["epoch"] <= checkpoint["config"]["training"]["num_epochs"]:
            return False
        check_stage_checkpoint(path, checkpoint, self.config, self.data)
        changed = changed_settings(
            checkpoint["config"], {**config_dict(run), "earlier_stages": checkpoint["config"]["earlier_stages"]}
        )
        if changed and self.processes.is_main:
            print(f"note: {run.stage.name} stays as it was trained, with other settings ({'; '.join(changed)})")
        return True

    def earlier(self, index: int) -> Cascade | None:
        """The frozen stages before ``index``; None for the first stage."""
        for i in range(index):
            path = self.stage_folder(i) / "best.pt"
            check_stage_checkpoint(path, load_checkpoint(path, kind=KIND), self.config, self.data)
        if not index:
            return None
        precision = stage_run(self.config, index, world_size=1).training.precision
        return Cascade.load(self.folder, self.processes.device, max_stages=index, precision=precision)


def check_resume(path, config: CascadeConfig, max_stages: int) -> int | None:
    """Index of the stage that ``--resume_from`` goes on with; None without it.

    Raises :class:`InputError` for a folder, a damaged or foreign file, other stages, weights without training state.
    """
    if path is None:
        return None
    if Path(path).is_dir():
        raise InputError(f"--resume_from {path}: is a folder; expected a file such as {Path(path) / 'last.pt'}")
    checkpoint = load_checkpoint(path, kind=KIND)
    if "training_state" not in checkpoint:
        raise InputError(
            f"--resume_from {path}: holds weights for inference only; expected last.pt or epoch_N.pt of a stage"
        )
    index = check_stage_checkpoint(path, checkpoint, config)
    if index >= max_stages:
        raise InputError(f"--resume_from {path}: is of stage {index + 1}, beyond --max_stages {max_stages}")
    return index


def place_resumed(path, index: int, config: CascadeConfig, folder: Path) -> None:
    """Make ``--resume_from`` the state that the checkpoint folder goes on from, with the stages before it (rank 0)."""
    path = Path(path)
    for stage in config.stages[:index]:
        target, source = folder / stage.name, path.resolve().parent.parent / stage.name
        if not (target / "best.pt").exists():
            if not (source / "best.pt").exists():
                raise InputError(f"{path} builds on stage {stage.name}: no best.pt in {target} or {source}")
            for name in ("best.pt", "last.pt"):
                if (source / name).exists():
                    copy_file(source / name, target / name)
    target, checkpoint = folder / config.stages[index].name / "last.pt", load_checkpoint(path, kind=KIND)
    if target.exists():
        step = load_checkpoint(target, kind=KIND)["step"]
        if not target.parent.samefile(path.parent) and step >= checkpoint["step"]:
            print(f"note: {target} is as far as {path} or further: going on from there")  # the same command again
        elif not target.samefile(path):
            raise InputError(
                f"{target} (step {step}) would be lost for {path} (step {checkpoint['step']});"
                " move it away, or choose another --checkpoint_dir"
            )
        return
    best, state = path.with_name("best.pt"), checkpoint["training_state"]
    if best.exists() and load_checkpoint(best)["step"] <= checkpoint["step"]:
        if not target.with_name("best.pt").exists():
            copy_file(best, target.with_name("best.pt"))
    else:
        state["best_psnr"] = None  # the best weights so far are not at hand: the next validation chooses anew
    save_checkpoint(target, checkpoint)


def copy_file(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(PACKAGE / "config" / "quick_2stage.json"), help="JSON settings")
    parser.add_argument(
        "--checkpoint_dir", help="folder for checkpoints and logs (default: checkpoints/NAME_OF_CONFIG)"
    )
    parser.add_argument("--data", help="data set (default: data.dataset_path of the configuration)")
    parser.add_argument("--resume_from", metavar="CKPT", help="last.pt or epoch_N.pt of a stage to go on from")
    parser.add_argument("--max_stages", type=int, help="train only the first so many stages")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print sizes, stop")
    add_run_arguments(parser)
    add_arguments(parser, tensorboard=None)
    args = parser.parse_args(argv)
    args.checkpoint_dir = args.checkpoint_dir or str(Path("checkpoints") / Path(args.config).stem)
    return args


def read_settings(args) -> tuple[CascadeConfig, Path, int]:
    """Configuration, data folder and number of stages of a command line; everything that can be known is checked."""
    config = load_cascade_config(args.config, args.set)
    count = len(config.stages) if args.max_stages is None else args.max_stages
    if not 1 <= count <= len(config.stages):
        raise InputError(f"--max_stages is {count}; {args.config} has {len(config.stages)} stages")
    for index, stage in enumerate(config.stages):
        try:
            stage_settings(config, index)
        except InputError as error:
            raise InputError(f"{args.config}: stages.{index} ({stage.name}): {error}") from None
    if args.data and not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: no such data set; make one with prepare_data.py")
    root = Path(args.data) if args.data else find_data(config.data.dataset_path)
    config.data.dataset_path = str(root)
    PatientDataset(root, "all", config.stages[count - 1].volume_size, None)  # the largest volume exists
    return config, root, count


def describe(config: CascadeConfig, root: Path, count: int, processes: Processes) -> list[str]:
    """What is about to run, line by line; raises :class:`InputError` for what these processes cannot run."""
    sets = [PatientDataset(root, split, config.stages[0].volume_size, None) for split in ("train", "val")]
    views = "PA and lateral" if config.num_views == 2 else "PA only"
    lines = [
        f"Data: {root}, {len(sets[0])} training and {len(sets[1])} validation patients",
        f"Geometry: {sets[0].geometry}; HU window {list(sets[0].hu_window)}",
        f"X-rays: {config.xray_img_size}^2, {views}; the networks predict {prediction_of(config)}",
    ]
    for index in range(count):
        run = stage_run(config, index, processes.world_size)
        parameters = sum(p.numel() for p in _outline(config, index).parameters())
        precision = Precision(run.training.precision, processes.device).name
        lines += [
            f"Stage {index + 1} {run.stage.name}: {run.stage.volume_size}^3, {parameters / 1e6:.2f} M parameters,"
            f" {run.training.num_epochs} epochs",
            f"  {describe_processes(run, processes, precision)}",
        ]
    return lines


def train_stage(index: int, chain: Chain, run: StageRun, monitors: Monitors) -> None:
    """Train one stage, or go on with it; its errors name it."""
    processes, folder = chain.processes, chain.stage_folder(index)
    earlier = chain.earlier(index)
    frozen = earlier.stages if earlier else []
    run.earlier_stages = {stage.name: weights_fingerprint(stage.model.state_dict()) for stage in frozen}
    task = StageTask(chain.config, run, chain.root, earlier, processes)
    if processes.is_main:
        place = f"Stage {index + 1} of {len(chain.config.stages)}"
        print(f"{place}: {run.stage.name}, {run.stage.volume_size}^3", flush=True)
    try:
        with monitors.stage(run.stage.name, folder) as stage_monitors:
            fit(task.build_model(), task, run, folder, processes, stage_monitors, chain.write_config)
    except TrainingError as error:
        raise TrainingError(f"stage {run.stage.name}: {error}") from None


def train(args, config: CascadeConfig, root: Path, count: int, processes: Processes) -> None:
    """Train the first ``count`` stages in turn, from wherever the checkpoint folder or ``--resume_from`` stands."""
    folder = Path(args.checkpoint_dir)
    chain = Chain(config, folder, root, processes)
    resumed = check_resume(args.resume_from, config, count)
    chain.check_config()
    if resumed is not None and processes.is_main:
        place_resumed(args.resume_from, resumed, config, folder)
    processes.barrier()
    with (
        run_context(args, config, folder, processes, chain.data.split_hash),
        monitors_from(args, config_dict(config), folder, processes) as monitors,
    ):
        for index in range(count):
            run = stage_run(config, index, processes.world_size)
            if index < (resumed or 0) or chain.is_frozen(index, run):
                if processes.is_main:
                    print(f"Stage {index + 1}, {run.stage.name}: done, used as it is", flush=True)
                chain.write_config(replace=False)  # which the stages after it read
                processes.barrier()
            else:
                train_stage(index, chain, run, monitors)
        chain.write_config()


def worker(args: argparse.Namespace) -> int:
    """What each process runs; returns its exit status."""
    with process_group() as processes:
        config, root, count = read_settings(args)
        recorded = recorded_config(args.checkpoint_dir) or {}
        if config.world_size is None:  # a resumed run keeps its global batch, however many processes run now
            config.world_size = recorded.get("world_size") or processes.world_size
        lines = describe(config, root, count, processes)
        if processes.is_main:
            print("\n".join(lines), flush=True)
        if args.dry_run:
            return 0
        try:
            with locked_folder(args.checkpoint_dir, processes):
                train(args, config, root, count, processes)
        except Interrupted as interruption:
            if processes.is_main:
                print(f"{interruption}: saved; the same command goes on from there", file=sys.stderr)
            return 128 + interruption.signal_number
    return 0


def main(argv=None) -> int:
    args = parse_args(argv)
    check_arguments(args)
    config, _, count = read_settings(args)
    check_resume(args.resume_from, config, count)
    return launch(worker, config.world_size or torch.cuda.device_count(), args)


if __name__ == "__main__":
    run_cli(main)
