"""Curves and pictures of a training run in TensorBoard and Weights & Biases, for every training script.

    add_arguments(parser)                                          # --tensorboard, --wandb, --wandb-project
    check_arguments(args)                                          # packages that are asked for are there
    with monitors_from(args, config, output, processes) as monitors:
        fit(model, task, config, output, processes, monitors)

Both packages are optional and imported only on request. Rank 0 writes; ``log.jsonl`` is written whatever is asked.
A run that goes on after an interruption goes on in the same curves.
"""

from __future__ import annotations

import argparse
import importlib
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from xray2ct.files import InputError, read_json, write_json
from xray2ct.imaging.figures import panel

WANDB_STATE = "wandb.json"  # in the output folder: id of the W&B run, so that a resumed run continues it
# What a value of log.jsonl is called in the curves; the others keep their own name.
NAMES = {
    "loss": "Loss",
    "diffusion": "Diffusion Loss",
    "physics": "Physics Loss",
    "psnr": "PSNR",
    "learning_rate": "Learning Rate",
    "samples_per_second": "Samples per Second",
    "gpu_memory_gib": "GPU Memory (GiB)",
}
VALIDATION_NAMES = {"loss": "Val Loss", "psnr": "PSNR", "ssim_3d": "SSIM"}
NOT_CURVES = ("epoch", "step", "step_in_epoch", "patients")


def curves(event: str, values: dict) -> dict[str, float]:
    """The curves one line of ``log.jsonl`` adds to: ``{"Diffusion Loss": 0.12, ...}``.

    Epoch means have the plain names, single steps end in "(step)", validation values begin with "Val" (but for PSNR
    and SSIM, which only validation has). Events of other kinds have none.
    """
    numbers = {k: v for k, v in values.items() if k not in NOT_CURVES and isinstance(v, int | float)}
    if event == "epoch":
        return {NAMES.get(name, name): value for name, value in numbers.items()}
    if event == "step":
        return {f"{NAMES.get(name, name)} (step)": value for name, value in numbers.items()}
    if event == "validation":
        return {VALIDATION_NAMES.get(k, f"Val {NAMES.get(k, k)}"): v for k, v in numbers.items()}
    return {}


class Monitors:
    """The writers of one run (none of them is fine); a context manager that closes them."""

    def __init__(self, writers=()):
        self.writers = list(writers)

    def __enter__(self) -> Monitors:
        return self

    def __exit__(self, kind, error, _trace) -> None:
        self.close(failed=error is not None)

    def start(self, step: int) -> None:
        """Training goes on after ``step`` optimiser steps: what an earlier, longer run wrote beyond is dropped."""
        for writer in self.writers:
            writer.start(step)

    def log(self, event: str, step: int, values: dict) -> None:
        """One line of ``log.jsonl`` at an optimiser step."""
        found = curves(event, values)
        for writer in self.writers if found else ():
            writer.curves({"Epoch": values["epoch"], **found} if "epoch" in values else found, step)

    def pictures(self, samples, step: int) -> None:
        """Pictures of validation samples: dicts of ``id`` and the arguments of :func:`figures.panel`."""
        for sample in samples if self.writers else ():
            image = np.asarray(panel(title=sample["id"], **{k: v for k, v in sample.items() if k != "id"}))
            for writer in self.writers:
                writer.picture(f"Sample {sample['id']}", image, step)

    def stage(self, name: str, folder) -> Monitors:
        """Monitors of one stage of a longer run: curves in ``folder`` (TensorBoard) or under ``name/`` (W&B)."""
        return Monitors([writer.stage(name, Path(folder)) for writer in self.writers])

    def close(self, failed: bool = False) -> None:
        """Write what is pending; ``failed`` marks the W&B run."""
        for writer in self.writers:
            writer.close(failed)


# ------------------------------------------------------------------------------------------------
# Writers


class TensorBoardWriter:
    """Event files in ``folder``; ``tensorboard --logdir`` on it, or on any folder above, shows them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: Any = None

    def start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def curves(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run keeps its curves

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self.writer.add_image(name, image, step, dataformats="HW")

    def stage(self, _name: str, folder: Path) -> TensorBoardWriter:
        return TensorBoardWriter(folder / "tensorboard")

    def close(self, _failed: bool = False) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbWriter:
    """Curves of one W&B run; a stage's names begin with ``prefix`` and count its own steps."""

    def __init__(self, run, prefix: str = ""):
        self.run, self.prefix = run, prefix

    def start(self, _step: int) -> None:
        self.run.define_metric(f"{self.prefix}Step", hidden=True)
        self.run.define_metric(f"{self.prefix}*", step_metric=f"{self.prefix}Step")

    def curves(self, values: dict[str, float], step: int) -> None:
        named = {f"{self.prefix}{name}": value for name, value in values.items()}
        self.run.log({**named, f"{self.prefix}Step": step})

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        import wandb

        self.run.log({f"{self.prefix}{name}": wandb.Image(image), f"{self.prefix}Step": step})

    def stage(self, name: str, _folder: Path) -> WandbWriter:
        return WandbWriter(self.run, f"{name}/")

    def close(self, failed: bool = False) -> None:
        if not self.prefix:  # the run ends with the whole training, not with a stage
            self.run.finish(exit_code=int(failed))


# ------------------------------------------------------------------------------------------------
# Command line


def add_arguments(parser: argparse.ArgumentParser, tensorboard: bool | None = False) -> None:
    """Add ``--tensorboard``, ``--wandb`` and ``--wandb-project``.

    tensorboard: the default; None writes event files where the package is installed and asks for nothing.
    """
    when = "when it is installed" if tensorboard is None else "off"
    parser.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=tensorboard,
        help=f"write TensorBoard event files into the output folder (default: {when})",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="log to Weights & Biases (WANDB_MODE=offline for no network)"
    )
    parser.add_argument("--wandb-project", metavar="NAME", help="its project (default: xray2ct)")


def check_arguments(args: argparse.Namespace) -> None:
    """Import what the command line asks for, before anything else takes time.

    Raises :class:`InputError` with the command that installs a missing package.
    """
    if args.wandb_project and not args.wandb:
        raise InputError(f"--wandb-project {args.wandb_project} is given without --wandb")
    if args.wandb:
        _require("wandb", "--wandb", "wandb")
    if args.tensorboard:
        _require("torch.utils.tensorboard", "--tensorboard", "tensorboard")


def _require(module: str, option: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{option} needs the package {package} ({error}): pip install {package}") from None


def _tensorboard_wanted(args) -> bool:
    if args.tensorboard is not None:
        return args.tensorboard
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return False
    return True


def monitors_from(args: argparse.Namespace, config: dict, output, processes) -> Monitors:
    """The writers the command line asks for, on rank 0; none on the other ranks.

    config: settings to keep with the W&B run. output: the run's folder (event files go to ``output/tensorboard``).
    Raises :class:`InputError` for a package that is not installed, and where W&B cannot start (no login, no network).
    """
    check_arguments(args)
    if not processes.is_main:
        return Monitors()
    writers = []
    if _tensorboard_wanted(args):
        writers.append(TensorBoardWriter(Path(output) / "tensorboard"))
    if args.wandb:
        writers.append(WandbWriter(_start_wandb(args.wandb_project or "xray2ct", config, Path(output))))
    return Monitors(writers)


def _start_wandb(project: str, config: dict, output: Path):
    import wandb

    output.mkdir(parents=True, exist_ok=True)
    state = output / WANDB_STATE
    run_id = read_json(state)["id"] if state.exists() else secrets.token_hex(4)
    try:
        run = wandb.init(
            project=project, name=output.resolve().name, dir=str(output), config=config, id=run_id, resume="allow"
        )
    except wandb.errors.Error as error:
        raise InputError(
            f"--wandb: W&B did not start ({error}). Log in with 'wandb login', or set WANDB_MODE=offline and send the"
            " run later with 'wandb sync'"
        ) from None
    write_json(state, {"id": run_id, "project": project})
    return run
