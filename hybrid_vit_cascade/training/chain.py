"""The chain of a cascade's stages in one checkpoint folder: what is finished, what is frozen, where a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from dataset import PatientDataset
from hybrid_vit_cascade.cascade import KIND, Cascade
from hybrid_vit_cascade.settings import CascadeConfig, StageRun, prediction_of, stage_run
from hybrid_vit_cascade.training.task import stage_settings
from xray2ct.checkpoints import check_compatible, find_state, load_checkpoint, save_checkpoint
from xray2ct.files import InputError, atomic_path, is_plain_name, read_json, write_json
from xray2ct.training.clock import is_finished
from xray2ct.training.config import config_dict
from xray2ct.training.distributed import Processes
from xray2ct.training.run_identity import changed_settings, check_same_data, data_header


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
        check_same_data(path, checkpoint, data_header(data), "choose another --checkpoint-dir")
    return index


def recorded_config(folder) -> dict | None:
    """``config.json`` of a checkpoint folder, or None; :class:`InputError` when it is something else."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return None
    data = read_json(path)
    stages = data.get("stages") if isinstance(data, dict) else None
    if not isinstance(stages, list) or not all(isinstance(s, dict) and is_plain_name(s.get("name")) for s in stages):
        raise InputError(f"{path}: not the configuration of a cascade; choose another --checkpoint-dir")
    return data


LEAST_MINUTES = 0.01  # of a stage, where those before it have used up the limit: some steps, validated


def stage_minutes(limit: float, used: float, stages: int) -> float:
    """What each of so many ``stages`` gets of a cascade's ``limit`` when those before have ``used`` so many minutes."""
    return max((limit - used) / stages, LEAST_MINUTES)


class Chain:
    """The stages of one checkpoint folder: what is finished, what comes before a stage, where training goes on."""

    def __init__(self, config: CascadeConfig, folder: Path, processes: Processes):
        self.config, self.folder, self.processes = config, folder, processes
        self.data = PatientDataset(config.data.dataset_path, "train", config.stages[0].size, None)

    def stage_folder(self, index: int) -> Path:
        return self.folder / self.config.stages[index].name

    def check_config(self) -> None:
        """Refuse a folder that another cascade uses."""
        recorded, ours = recorded_config(self.folder), self.config.stage_names
        found = [stage["name"] for stage in recorded["stages"]] if recorded else ours
        if found != ours:
            raise InputError(
                f"{self.folder} holds a cascade with the stages {', '.join(found)}; the configuration's are"
                f" {', '.join(ours)}: choose another --checkpoint-dir"
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
        if not started and not is_finished(
            checkpoint["training_state"], checkpoint["config"]["training"]["num_epochs"]
        ):
            return False
        check_stage_checkpoint(path, checkpoint, self.config, self.data)
        changed = changed_settings(
            checkpoint["config"], {**config_dict(run), "earlier_stages": checkpoint["config"]["earlier_stages"]}
        )
        if changed and self.processes.is_main:
            print(f"note: {run.stage.name} stays as it was trained, with other settings ({'; '.join(changed)})")
        return True

    def minutes_of(self, index: int, count: int, limit: float | None) -> float | None:
        """A stage's part of ``--max-minutes`` for ``count`` stages: what those before it left, shared evenly.

        None and 0 are passed on: the limit that the stage had, none.
        """
        if not limit:
            return limit
        used = 0.0
        for i in range(index):
            found = find_state(self.stage_folder(i), kind=KIND)
            clock = found[1]["training_state"].get("clock") if found else None
            used += clock["seconds"] / 60 if clock else 0.0
        return stage_minutes(limit, used, count - index)

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
    """Index of the stage that ``--resume-from`` goes on with; None without it.

    Raises :class:`InputError` for a folder, a damaged or foreign file, other stages, weights without training state.
    """
    if path is None:
        return None
    if Path(path).is_dir():
        raise InputError(f"--resume-from {path}: is a folder; expected a file such as {Path(path) / 'last.pt'}")
    checkpoint = load_checkpoint(path, kind=KIND)
    if "training_state" not in checkpoint:
        raise InputError(
            f"--resume-from {path}: holds weights for inference only; expected last.pt or epoch_N.pt of a stage"
        )
    index = check_stage_checkpoint(path, checkpoint, config)
    if index >= max_stages:
        raise InputError(f"--resume-from {path}: is of stage {index + 1}, beyond --max-stages {max_stages}")
    return index


def place_resumed(path, index: int, config: CascadeConfig, folder: Path) -> None:
    """Make ``--resume-from`` the state that the checkpoint folder goes on from, with the stages before it (rank 0)."""
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
                " move it away, or choose another --checkpoint-dir"
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
