"""Validation that waits for the device once: patients sent ahead, scores left there until all are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``; the copy runs while the device still computes what came before."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def read_rows(ids: Sequence[str], rows: Sequence[Mapping[str, torch.Tensor]]) -> list[dict]:
    """Scores of patients as ``{"id", name: float, ...}``, from 0-d tensors on one device, the same names in each."""
    if not rows:
        return []
    names = list(rows[0])
    values = torch.stack([torch.stack([row[name].float() for name in names]) for row in rows]).tolist()
    return [{"id": patient, **dict(zip(names, numbers))} for patient, numbers in zip(ids, values)]
