"""Train stage 2 (64^3 -> 256^3) on a frozen stage 1. Works on 4 GPUs, fewer, or none; the same command resumes.

python train_refinement_4gpu.py --data ROOT --base checkpoints_enhanced/best_model.pt
torchrun --nproc_per_node 4 train_refinement_4gpu.py --data ROOT
python train_refinement_4gpu.py --config configs/refinement_cpu.json --data ROOT --output runs/refinement_cpu
python train_refinement_4gpu.py --data ROOT --set patch.size=0 --set training.batch_size=1   # full volumes
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xray2ct.files import InputError, run_cli, write_json
from xray2ct.training.cli import check_before_launch, describe_processes, run_training, training_parser
from xray2ct.training.config import RefinementConfig, config_dict, load_config
from xray2ct.training.distributed import Processes, launch
from xray2ct.training.refinement_task import RefinementTask

CONFIG_NAME = "config_refinement.json"


def parse_args(argv=None) -> argparse.Namespace:
    parser = training_parser(__doc__, f"{CONFIG_NAME}, made when missing,", "checkpoints_refinement")
    parser.add_argument("--base", help="stage-1 checkpoint (default: base_checkpoint of the configuration)")
    return parser.parse_args(argv)


def default_config_path() -> Path:
    """``config_refinement.json`` beside this script; written with the defaults when it is missing."""
    path = Path(__file__).with_name(CONFIG_NAME)
    if not path.exists():
        write_json(path, config_dict(RefinementConfig()))
        print(f"{path}: was missing, written with the defaults")
    return path


def read_config(args) -> RefinementConfig:
    """The configuration a command line describes."""
    config = load_config(RefinementConfig, args.config or default_config_path(), args.set)
    if args.data:
        config.data.dataset_path = args.data
    if args.base:
        config.base_checkpoint = args.base
    return config


def describe(task: RefinementTask, model, processes: Processes) -> None:
    """Print what is about to run."""
    config, patch = task.config, task.config.patch
    parameters = sum(p.numel() for p in model.parameters())
    guide = f"guided by X-rays of {config.model.xray_size}^2" if config.model.guided else "without X-rays"
    patients = f"{len(task.train_data)} training and {len(task.val_data)} validation patients"
    what = f"{patch.per_volume} patches of {4 * patch.size}^3 per volume" if patch.size else "full volumes"
    print(f"Model: {parameters / 1e6:.2f} M parameters, {task.coarse_size}^3 -> {task.size}^3, {guide}")
    print(f"Stage 1: {config.base_checkpoint} (epoch {task.base_checkpoint['epoch']}, frozen)")
    print(f"Data: {config.data.dataset_path}, {patients}; training on {what}")
    print(f"Geometry: {task.train_data.geometry}; HU window {list(task.train_data.hu_window)}")
    print(describe_processes(config, processes, task.precision.name), flush=True)


def worker(args: argparse.Namespace) -> int:
    """What each process runs; returns its exit status."""
    return run_training(args, read_config(args), RefinementTask, describe)


def main(argv=None) -> int:
    args = parse_args(argv)
    config = read_config(args)
    check_before_launch(args, config)
    if not Path(config.base_checkpoint).exists():
        raise InputError(
            f"{config.base_checkpoint}: no such stage-1 checkpoint; train_enhanced_4gpu.py makes one,"
            " then pass --base CHECKPOINT"
        )
    return launch(worker, config.world_size, args)


if __name__ == "__main__":
    run_cli(main)
