"""What the direct system's two training scripts share: their options, and what each process runs."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from pathlib import Path

from xray2ct.files import InputError, write_json
from xray2ct.training.config import LossConfig, config_dict, config_hash
from xray2ct.training.determinism import deterministic
from xray2ct.training.distributed import Processes, process_group
from xray2ct.training.monitors import add_arguments, check_arguments, monitors_from
from xray2ct.training.plan import accumulation_steps
from xray2ct.training.provenance import recorded_run
from xray2ct.training.run_lock import locked_folder
from xray2ct.training.trainer import Interrupted, fit


def training_parser(description: str, config_name: str, output: str) -> argparse.ArgumentParser:
    """Options that both scripts have: --config, --data, --output, --set, --dry-run, --deterministic, the monitors'."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help=f"JSON settings (default: {config_name} beside this script)")
    parser.add_argument("--data", help="data set (default: data.dataset_path of the configuration)")
    parser.add_argument("--output", default=output, help="folder for checkpoints and log.jsonl (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes, stop")
    add_run_arguments(parser)
    add_arguments(parser)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--deterministic``, for every training script."""
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU, use deterministic algorithms (slower) and name operations that have none; CPU runs always are",
    )


@contextlib.contextmanager
def run_context(args: argparse.Namespace, config, output, processes: Processes, split_hash: str):
    """What surrounds the training of every script: ``--deterministic``, and ``output/run.json`` (by rank 0).

    config: the settings' dataclass. split_hash: of the data set, see :func:`splits.split_hash`.
    """
    facts = {
        "processes": processes.world_size,
        "device": str(processes.device),
        "deterministic": args.deterministic,
        "config_hash": config_hash(config_dict(config)),
        "split_hash": split_hash,
    }
    with deterministic(args.deterministic), recorded_run(output, facts, processes.is_main):
        yield


def check_before_launch(args: argparse.Namespace, config) -> None:
    """Raise :class:`InputError` for what every process would stumble over: missing packages, a missing data set."""
    check_arguments(args)
    if not Path(config.data.dataset_path).is_dir():
        raise InputError(
            f"{config.data.dataset_path}: no such data set; make one with prepare_data.py, then pass --data ROOT"
        )


def refuse_losses(loss: LossConfig, reasons: dict[str, str]) -> None:
    """Raise :class:`InputError` naming key and value when a loss is wanted that a task cannot compute.

    reasons: why, by the name of each such loss (``{"multiscale": "..."}``).
    """
    for name, reason in reasons.items():
        weight = getattr(loss, f"{name}_weight")
        if weight:
            raise InputError(f"loss.{name}_weight is {weight:g}, but {reason}: expected 0")


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
        try:
            with (
                locked_folder(args.output, processes),
                run_context(args, config, args.output, processes, task.header()["split_hash"]),
            ):
                settings = config_dict(config)
                with monitors_from(args, settings, args.output, processes) as monitors:
                    record = functools.partial(write_json, Path(args.output) / "config.json", settings)
                    fit(model, task, config, args.output, processes, monitors, record)
        except Interrupted as interruption:
            if processes.is_main:
                last = Path(args.output) / "last.pt"
                print(f"{interruption}: saved {last}; the same command goes on from there", file=sys.stderr)
            return 128 + interruption.signal_number
    return 0
