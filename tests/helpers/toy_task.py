"""A training that takes milliseconds a step: the project's trainer and command line with a toy network and toy data.

    main(words("run", "training.num_epochs=3"))     # as a training script's main

For tests that need many whole runs; drop-out, augmentation by seed, EMA and validation are there, so that a run that
is not continued exactly ends with other weights.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import Dataset

from xray2ct.files import run_cli
from xray2ct.metrics import psnr
from xray2ct.training.cli import run_training, training_parser
from xray2ct.training.config import EnhancedConfig, load_config
from xray2ct.training.distributed import Processes
from xray2ct.training.task import Task

KIND = "toy"
# 60 steps; the state is saved after each of them
SETTINGS = ("world_size=1", "training.precision=float32", "training.batch_size=1", "training.num_epochs=10")
SETTINGS += ("training.ema_decay=0.9", "training.learning_rate=2e-3", "logging.log_interval=1")
SETTINGS += ("logging.val_interval=2", "logging.save_checkpoint_interval=5", "logging.checkpoint_minutes=0.0")


class ToyData(Dataset):
    """Six volumes ``(1, 8, 8, 8)`` in [0, 1]."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        volume = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"id": f"p{index}", "volume": volume}


class ToyTask(Task):
    """Learns to remove noise."""

    def __init__(self, config: EnhancedConfig, processes: Processes):
        self.config, self.train_data = config, ToyData()

    def build_model(self) -> nn.Module:
        torch.manual_seed(self.config.training.seed)
        layers = [nn.Conv3d(1, 16, 3, padding=1), nn.GELU(), nn.Conv3d(16, 16, 3, padding=1), nn.Dropout(0.1)]
        return nn.Sequential(*layers, nn.Conv3d(16, 1, 3, padding=1))

    def header(self) -> dict:
        return {"kind": KIND, "split_hash": "toy", "train_patients": [f"p{i}" for i in range(6)]}

    def make_batch(self, raw, seeds, device) -> dict:
        noise = [torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return {"noisy": (raw["volume"] + 0.2 * torch.stack(noise)).to(device), "volume": raw["volume"].to(device)}

    def loss(self, model, batch):
        error = (model(batch["noisy"]).float() - batch["volume"]).square().mean()
        return error, {"mse": error}

    @torch.no_grad()
    def validate(self, model, processes, precision) -> list[dict]:
        rows = []
        for index in range(processes.rank, 2, processes.world_size):
            item = ToyData()[index]
            volume = item["volume"][None].to(processes.device)
            predicted = model(volume)
            loss = (predicted - volume).square().mean().item()
            rows.append({"id": item["id"], "loss": loss, "psnr": float(psnr(predicted[0, 0], volume[0, 0]))})
        return rows


def parse(argv) -> tuple[argparse.Namespace, EnhancedConfig]:
    args = training_parser("toy", "none", "toy").parse_args(argv)
    return args, load_config(EnhancedConfig, args.config, [*SETTINGS, *args.set])


def words(output, *overrides: str) -> list[str]:
    """The command line of a run into ``output``."""
    return ["--output", str(output), *[word for text in overrides for word in ("--set", text)]]


def main(argv=None) -> int:
    args, config = parse(argv)
    return run_training(args, config, ToyTask)


if __name__ == "__main__":
    run_cli(main)
