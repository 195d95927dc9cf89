"""What a training script gives to the trainer: data, batch, loss, validation."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.utils.data import Dataset

from xray2ct.training.distributed import Processes


class Task(Protocol):
    """What differs between the training scripts."""

    weights_key: str  # checkpoint key of the weights: "model_state_dict", ...
    best_name: str  # "best_model.pt", ...
    train_data: Dataset

    def header(self) -> dict:
        """Checkpoint entries that describe model and data: kind, model_config, geometry, ..."""

    def make_batch(self, raw: dict, seeds: list[int], device: torch.device) -> dict:
        """Loader output -> what :meth:`loss` needs, on the device."""

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss and its components (0-d tensors)."""

    def validate(self, model: nn.Module, processes: Processes, precision) -> list[dict]:
        """Rows of this rank's share of the validation patients: ``{"id", "loss", "psnr", ...}``."""
