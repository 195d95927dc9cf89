"""Train stage 1 (X-rays -> 64^3). Works on 4 GPUs, fewer, or none; the same command resumes.

python train_enhanced_4gpu.py --data ROOT                      # one process per visible GPU, or the CPU
torchrun --nproc_per_node 4 train_enhanced_4gpu.py --data ROOT
python train_enhanced_4gpu.py --config configs/cpu.json --data ROOT --output runs/cpu
python train_enhanced_4gpu.py --data ROOT --set training.batch_size=2 --dry-run
"""

from __future__ import annotations

import argparse

from xray2ct.files import run_cli
from xray2ct.training.cli import check_before_launch, describe_processes, run_training, training_parser
from xray2ct.training.config import EnhancedConfig, load_config, resolve_config_path
from xray2ct.training.direct_task import EnhancedTask
from xray2ct.training.distributed import Processes, launch
from xray2ct.training.precision import Precision


def parse_args(argv=None) -> argparse.Namespace:
    return training_parser(__doc__, "config_enhanced.json", "checkpoints_enhanced").parse_args(argv)


def read_config(args) -> EnhancedConfig:
    """The configuration a command line describes."""
    config = load_config(EnhancedConfig, resolve_config_path(args.config, "config_enhanced.json"), args.set)
    if args.data:
        config.data.dataset_path = args.data
    return config


def describe(task: EnhancedTask, model, processes: Processes) -> None:
    """Print what is about to run."""
    config = task.config
    parameters = sum(p.numel() for p in model.parameters())
    sizes = f"X-rays {config.model.xray_size}^2 -> {config.model.volume_size[0]}^3"
    patients = f"{len(task.train_data)} training and {len(task.val_data)} validation patients"
    print(f"Model: {parameters / 1e6:.2f} M parameters, {sizes}")
    print(f"Data: {config.data.dataset_path}, {patients}")
    print(f"Geometry: {task.train_data.geometry}; HU window {list(task.train_data.hu_window)}")
    print(f"X-rays in training: {'rendered from the augmented volume' if task.renders else 'files, no augmentation'}")
    print(
        describe_processes(config, processes, Precision(config.training.precision, processes.device).name), flush=True
    )


def worker(args: argparse.Namespace) -> int:
    """What each process runs; returns its exit status."""
    return run_training(args, read_config(args), EnhancedTask, describe)


def main(argv=None) -> int:
    args = parse_args(argv)
    config = read_config(args)
    check_before_launch(args, config)
    return launch(worker, config.world_size, args)


if __name__ == "__main__":
    run_cli(main)
