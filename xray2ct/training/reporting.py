"""Reporting of a run: the lines it prints, and ``log.jsonl``."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

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
        f"Validation Results ({metrics['patients']} patients):",
        f"  Total Loss: {metrics['loss']:.4f}",
        f"  PSNR: {metrics['psnr']:.2f} dB",
        *(f"  {name}: {metrics[name]:.4f}" for name in rest),
    ]
    return "\n".join(lines if comment is None else [*lines, f"  {comment}"])


def numbers(losses: dict[str, float]) -> str:
    """Components of a loss in a message: ``L1 0.05, SSIM nan``."""
    names = [*(name for name in LABELS if name in losses), *(name for name in losses if name not in LABELS)]
    return ", ".join(f"{LABELS.get(name, name)} {losses[name]:.4g}" for name in names)
