"""Command line of the training scripts: their options, their configuration, and what each process runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from xray2ct.checkpoints import LAST
from xray2ct.command_line import Parser
from xray2ct.files import InputError, write_json
from xray2ct.progress import be_quiet
from xray2ct.training.clock import minutes_limit
from xray2ct.training.config import config_dict, config_hash, load_config
from xray2ct.training.determinism import deterministic
from xray2ct.training.distributed import Processes, launch, process_group
from xray2ct.training.initial_weights import start_from
from xray2ct.training.monitors import add_arguments, check_arguments, monitors_from
from xray2ct.training.plan import accumulation_steps
from xray2ct.training.precision import Precision
from xray2ct.training.provenance import recorded_run
from xray2ct.training.run_lock import locked_folder
from xray2ct.training.signals import Interrupted
from xray2ct.training.task import PatientTask
from xray2ct.training.trainer import fit


def training_parser(description: str, config_name: str, output: str) -> argparse.ArgumentParser:
    """Options that both scripts have: --config, --data, --output, --init, --set, --dry-run, of run and monitors."""
    parser = Parser(description)
    parser.add_argument("--config", help=f"JSON settings (default: {config_name} next to this script)")
    parser.add_argument("--data", help="data set (default: data.dataset_path of the configuration)")
    parser.add_argument("--output", default=output, help="folder for checkpoints and log.jsonl (default %(default)s)")
    parser.add_argument(
        "--init", metavar="CHECKPOINT", help="begin with these weights: a path or a name (docs/fine_tuning.md)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes, stop")
    add_run_arguments(parser)
    add_arguments(parser)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-minutes``, ``--quiet`` and ``--deterministic``, for every training script."""
    parser.add_argument(
        "--max-minutes",
        type=minutes_limit,
        metavar="N",
        help="end after N minutes of training, of all starts together, the learning rate's cosine finished and the last"
        " epoch validated (default: no limit, or that of the run that goes on; 0: none any more)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print no progress and no losses: one line an epoch, warnings, the result"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU, use deterministic algorithms (slower) and name operations that have none; CPU runs always are",
    )


def read_config(cls, args: argparse.Namespace, path, preset=()):
    """The configuration of a command line: the file at ``path`` (None: defaults), ``preset`` settings, the options."""
    config = load_config(cls, path, [*preset, *args.set])
    if args.data:
        config.data.dataset_path = args.data
    return config


@contextlib.contextmanager
def run_context(args: argparse.Namespace, config, output, processes: Processes, split_hash: str):
    """Train within this block: applies ``--deterministic`` and records the run in ``output/run.json`` (rank 0).

    config: the settings' dataclass. split_hash: of the data set, see :func:`splits.split_hash`.
    """
    facts = {
        "processes": processes.world_size,
        "device": str(processes.device),
        "deterministic": args.deterministic,
        "max_minutes": args.max_minutes,
        "config_hash": config_hash(config_dict(config)),
        "split_hash": split_hash,
    }
    with deterministic(args.deterministic), recorded_run(output, facts, processes.is_main):
        yield


def check_before_launch(args: argparse.Namespace, config) -> None:
    """Raise :class:`InputError` for what no process can do without: missing packages, a missing data set."""
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


def start(args: argparse.Namespace, config, task_class: Callable[[Any, Processes], PatientTask]) -> int:
    """Check what can be checked at once, then train in as many processes as fit; returns the exit status."""
    check_before_launch(args, config)
    return launch(run_training, config.world_size, args, config, task_class)


def run_training(args: argparse.Namespace, config, task_class: Callable[[Any, Processes], PatientTask]) -> int:
    """One process's part of a run; returns its exit status."""
    if args.quiet:
        be_quiet()
    with process_group() as processes:
        task = task_class(config, processes)
        model = task.build_model()
        precision = Precision(config.training.precision, processes.device).name
        lines = [*task.description(model), describe_processes(config, processes, precision)]
        if args.init:
            lines.append(start_from(args.init, model, task))
        if processes.is_main:
            print("\n".join(lines), flush=True)
        if args.dry_run:
            return 0
        settings, output = config_dict(config), Path(args.output)
        record = partial(write_json, output / "config.json", settings)
        try:
            with (
                locked_folder(output, processes),
                run_context(args, config, output, processes, task.header()["split_hash"]),
                monitors_from(args, settings, output, processes) as monitors,
            ):
                fit(model, task, config, output, processes, monitors, record, args.max_minutes)
        except Interrupted as interruption:
            return stopped(interruption, processes, f"saved {output / LAST}")
    return 0


def stopped(interruption: Interrupted, processes: Processes, saved: str) -> int:
    """Report a run that a signal has stopped (rank 0); returns its exit status."""
    if processes.is_main:
        print(f"{interruption}: {saved}; the same command goes on from there", file=sys.stderr)
    return 128 + interruption.signal_number
