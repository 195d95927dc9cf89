"""Reporting of a run: the lines it prints, and ``log.jsonl``."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from xray2ct.checkpoints import LAST
from xray2ct.files import counted
from xray2ct.progress import duration

if TYPE_CHECKING:
    from xray2ct.training.state import RunState

ROOT = Path(__file__).resolve().parents[2]
SLOW_SECONDS = 12 * 3600.0  # a run of this length on a CPU is seldom meant
LABELS = {
    "l1": "L1",
    "ssim": "SSIM",
    "perceptual": "Perc",
    "edge": "Edge",
    "multiscale": "Multi",
    "mse": "MSE",
    "projection": "Proj",
    "diffusion": "Diffusion",
    "physics": "Physics",
}
LOG = "log.jsonl"


def append_event(path: Path, event: str, values: dict) -> None:
    """Append one line to the log; OSError when the disk is full."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def mend_log(path: Path) -> None:
    """Drop a last line that was cut off by a full disk or a power cut: all others stay readable."""
    whole = path.read_bytes() if path.exists() else b""
    if whole and not whole.endswith(b"\n"):
        os.truncate(path, whole.rfind(b"\n") + 1)


def step_line(place: str, losses: dict[str, float], samples_per_second: float) -> str:
    """``Epoch 1 [10/50] Loss: 0.1234 | L1: 0.0567 | ... | 12.34 samples/s``."""
    parts = [f"Loss: {losses['loss']:.4f}", *(f"{LABELS[k]}: {losses[k]:.4f}" for k in LABELS if k in losses)]
    return f"{place} {' | '.join(parts)} | {samples_per_second:.2f} samples/s"


def epoch_summary(epoch: int, summary: dict[str, float]) -> str:
    """Mean losses of an epoch, its speed and learning rate."""
    losses = [
        f"  {LABELS.get(name, 'Total Loss')}: {value:.4f}"
        for name, value in summary.items()
        if name == "loss" or name in LABELS
    ]
    speed = f"  {summary['samples_per_second']:.2f} samples/s, learning rate {summary['learning_rate']:.2e}"
    return "\n".join([f"Epoch {epoch} Training Summary:", *losses, speed])


def validation_summary(metrics: dict[str, float], comment: str | None) -> str:
    """Loss, PSNR and the task's other scores; the losses' components are in the log."""
    rest = [k for k in metrics if k not in ("loss", "psnr", "patients") and k not in LABELS]
    lines = [
        f"Validation Results ({counted(metrics['patients'], 'patient')}):",
        f"  Total Loss: {metrics['loss']:.4f}",
        f"  PSNR: {metrics['psnr']:.2f} dB",
        *(f"  {name}: {metrics[name]:.4f}" for name in rest),
    ]
    return "\n".join(lines if comment is None else [*lines, f"  {comment}"])


def numbers(losses: dict[str, float]) -> str:
    """Components of a loss in a message: ``L1 0.05, SSIM nan``."""
    names = [*(name for name in LABELS if name in losses), *(name for name in losses if name not in LABELS)]
    return ", ".join(f"{LABELS.get(name, name)} {losses[name]:.4g}" for name in names)


def loss_text(losses: dict[str, float]) -> str:
    """A loss and its components in a message."""
    parts = {name: value for name, value in losses.items() if name != "loss"}
    return f"the loss is {losses['loss']} ({numbers(parts)})"


def epoch_line(epoch: int, epochs: int, metrics: dict[str, float] | None, best: float | None, left: float) -> str:
    """``Epoch 3/46: PSNR 24.10 dB, best 25.31 dB, 1 h 12 min left``: one line that says it all.

    metrics: of the epoch's validation; None without. left: seconds to the end of the run.
    """
    parts = [] if metrics is None else [f"PSNR {metrics['psnr']:.2f} dB"]
    parts += [] if best is None else [f"best {best:.2f} dB"]
    parts += [f"{duration(left)} left"] if left > 0 else []
    return f"Epoch {epoch}/{epochs}: {', '.join(parts) or 'done'}"


def slow_warning(seconds: float, left: float, epochs: int, advice: str) -> str | None:
    """A warning of a run on a CPU that takes longer than ``SLOW_SECONDS``, from the seconds of one step; else None."""
    if left < SLOW_SECONDS:
        return None
    return f"warning: at {seconds:.2g} s a step these {epochs} epochs take {duration(left)} on this CPU; {advice}"


def conclusion(run: RunState, done: bool) -> str:
    """The last lines of a run: how it ended, its best weights, what to do with them. done: it was so at its start."""
    epochs, ended, limit = run.config.training.num_epochs, run.epoch - 1, run.clock.minutes or 0
    best = run.output / run.task.best_name
    lines = [f"Finished: all {counted(epochs, 'epoch')}"]
    if run.clock.stopped:
        lines = [f"Stopped after {limit:g} minutes: epoch {ended} of {epochs}"]
    if done:
        lines = [f"Nothing to do: {run.output / LAST} has all {epochs} epochs"]
        if run.clock.stopped:
            more = f"--init {best} begins another run with its weights"
            lines = [f"Nothing to do: {run.output / LAST} ended after {limit:g} minutes in epoch {ended}; {more}"]
    if run.best_psnr is not None:
        lines.append(f"Best PSNR {run.best_psnr:.2f} dB: {best}")
    return "\n".join([*lines, *(f"Next: {command}" for command in run.task.next_commands(run.output))])


def command_of(script: str, **options) -> str:
    """A command line to copy: ``python evaluate.py --data ROOT ...``; script: its place in the repository."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["python", path_of(script), *words])


def path_of(name: str) -> str:
    """Path of a file of the repository from the current folder, the shorter of relative and absolute."""
    try:
        return min(os.path.relpath(ROOT / name), str(ROOT / name), key=len)
    except ValueError:  # on another drive
        return str(ROOT / name)
