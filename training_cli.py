"""What the direct system's two training scripts share: their options, and what each process runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from config import config_dict
from distributed import Processes, process_group
from engine import Interrupted, accumulation_steps, fit
from files import InputError, write_json
from monitoring import add_arguments, check_arguments, monitors_from


def training_parser(description: str, config_name: str, output: str) -> argparse.ArgumentParser:
    """Options that both scripts have: --config, --data, --output, --set, --dry-run and the monitors'."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help=f"JSON settings (default: {config_name} beside this script)")
    parser.add_argument("--data", help="data set (default: data.dataset_path of the configuration)")
    parser.add_argument("--output", default=output, help="folder for checkpoints and log.jsonl (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes, stop")
    add_arguments(parser)
    return parser


def check_before_launch(args: argparse.Namespace, config) -> None:
    """Raise :class:`InputError` for what every process would stumble over: missing packages, a missing data set."""
    check_arguments(args)
    if not Path(config.data.dataset_path).is_dir():
        raise InputError(
            f"{config.data.dataset_path}: no such data set; make one with prepare_data.py, then pass --data ROOT"
        )


def describe_processes(config, processes: Processes, precision: str) -> str:
    """How many processes, on what, and what the global batch is made of."""
    accumulation = accumulation_steps(config, processes.world_size)
    batch = config.training.batch_size * accumulation * processes.world_size
    return (
        f"Processes: {processes.world_size} on {processes.device.type}, {precision};"
        f" global batch {batch} = {config.training.batch_size} x {processes.world_size} x {accumulation} (accumulated)"
    )


def run_training(args: argparse.Namespace, config, make_task, describe) -> int:
    """One process's part of a run; returns its exit status.

    make_task: ``(config, processes) -> Task`` with ``build_model()``; describe: ``(task, model, processes)``
    prints what is about to run, on rank 0.
    """
    with process_group() as processes:
        task = make_task(config, processes)
        model = task.build_model()
        if processes.is_main:
            describe(task, model, processes)
        if args.dry_run:
            return 0
        if processes.is_main:
            write_json(Path(args.output) / "config.json", config_dict(config))
        try:
            with monitors_from(args, config_dict(config), args.output, processes) as monitors:
                fit(model, task, config, args.output, processes, monitors)
        except Interrupted as interruption:
            if processes.is_main:
                last = Path(args.output) / "last.pt"
                print(f"{interruption}: saved {last}; the same command goes on from there", file=sys.stderr)
            return 128 + interruption.signal_number
    return 0
