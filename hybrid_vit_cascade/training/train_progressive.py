"""Train the cascade, one stage after the other. Works on several GPUs, one, or none; the same command resumes.

    cd hybrid_vit_cascade
    python training/train_progressive.py --config config/quick_2stage.json --checkpoint-dir checkpoints/quick_2stage
    python training/train_progressive.py --config config/progressive_3stage.json --data ROOT --dry-run
    torchrun --nproc_per_node 4 -m hybrid_vit_cascade.training.train_progressive ...      # from the repository's root

Each stage trains with all earlier ones frozen, on their sampled, noise-augmented output. ``CHECKPOINT_DIR`` gets
``config.json`` and, for each stage, a folder with ``best.pt`` (by validation PSNR of the posterior mean), ``last.pt``
(everything needed to go on bit for bit), ``log.jsonl`` and the TensorBoard files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started by path: the package lies two folders up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import torch

from dataset import PatientDataset
from hybrid_vit_cascade import PACKAGE
from hybrid_vit_cascade.settings import (
    CascadeConfig,
    StageRun,
    find_data,
    former_spellings,
    load_cascade_config,
    prediction_of,
    stage_run,
)
from hybrid_vit_cascade.training.chain import Chain, check_resume, place_resumed, recorded_config
from hybrid_vit_cascade.training.task import StageTask, outline, stage_settings
from xray2ct.checkpoints import weights_fingerprint
from xray2ct.command_line import Parser
from xray2ct.files import InputError, run_cli
from xray2ct.progress import be_quiet
from xray2ct.training.cli import add_run_arguments, describe_processes, run_context, stopped
from xray2ct.training.config import config_dict
from xray2ct.training.distributed import Processes, launch, process_group
from xray2ct.training.monitors import Monitors, add_arguments, check_arguments, monitors_from
from xray2ct.training.precision import Precision
from xray2ct.training.reporting import command_of
from xray2ct.training.run_lock import locked_folder
from xray2ct.training.signals import Interrupted
from xray2ct.training.trainer import TrainingError, fit


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", default=str(PACKAGE / "config" / "quick_2stage.json"), help="JSON settings")
    parser.add_argument(
        "--checkpoint-dir", help="folder for checkpoints and logs (default: checkpoints/NAME_OF_CONFIG)"
    )
    parser.add_argument("--data", help="data set (default: data.dataset_path of the configuration)")
    parser.add_argument("--resume-from", metavar="CKPT", help="last.pt or epoch_N.pt of a stage to go on from")
    parser.add_argument("--max-stages", type=int, help="train only the first so many stages")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print sizes, stop")
    add_run_arguments(parser)
    add_arguments(parser, tensorboard=None)
    args = parser.parse_args(argv)
    args.checkpoint_dir = args.checkpoint_dir or str(Path("checkpoints") / Path(args.config).stem)
    return args


def read_settings(args) -> tuple[CascadeConfig, int]:
    """Configuration, with the data folder in it, and number of stages of a command line; all of it is checked."""
    config = load_cascade_config(args.config, args.set)
    count = len(config.stages) if args.max_stages is None else args.max_stages
    if not 1 <= count <= len(config.stages):
        raise InputError(f"--max-stages is {count}; {args.config} has {len(config.stages)} stages")
    for index, stage in enumerate(config.stages):
        try:
            stage_settings(config, index)
        except InputError as error:
            raise InputError(f"{args.config}: stage {index + 1} ({stage.name}): {error}") from None
    if args.data and not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: no such data set; make one with prepare_data.py")
    root = Path(args.data) if args.data else find_data(config.data.dataset_path)
    config.data.dataset_path = str(root)
    PatientDataset(root, "all", config.stages[count - 1].size, None)  # the largest volume exists
    return config, count


def describe(config: CascadeConfig, count: int, processes: Processes) -> list[str]:
    """What is about to run, line by line; raises :class:`InputError` for what these processes cannot run."""
    root = config.data.dataset_path
    sets = [PatientDataset(root, split, config.stages[0].size, None) for split in ("train", "val")]
    views = "PA and lateral" if config.num_views == 2 else "PA only"
    lines = [
        f"Data: {root}, {len(sets[0])} training and {len(sets[1])} validation patients",
        f"Geometry: {sets[0].geometry}; HU window {list(sets[0].hu_window)}",
        f"X-rays: {config.xray_img_size}^2, {views}; the networks predict {prediction_of(config)}",
    ]
    for index in range(count):
        run = stage_run(config, index, processes.world_size)
        parameters = sum(p.numel() for p in outline(config, index).parameters())
        precision = Precision(run.training.precision, processes.device).name
        lines += [
            f"Stage {index + 1} {run.stage.name}: {run.stage.size}^3, {parameters / 1e6:.2f} M parameters,"
            f" {run.training.num_epochs} epochs",
            f"  {describe_processes(run, processes, precision)}",
        ]
    return lines


def train_stage(index: int, chain: Chain, run: StageRun, monitors: Monitors, minutes: float | None) -> None:
    """Train one stage, or go on with it, for at most its ``minutes``; its errors name it."""
    processes, folder = chain.processes, chain.stage_folder(index)
    earlier = chain.earlier(index)
    frozen = earlier.stages if earlier else []
    run.earlier_stages = {stage.name: weights_fingerprint(stage.model.state_dict()) for stage in frozen}
    task = StageTask(chain.config, run, earlier, processes)
    if processes.is_main:
        place = f"Stage {index + 1} of {len(chain.config.stages)}"
        print(f"{place}: {run.stage.name}, {run.stage.size}^3", flush=True)
    try:
        with monitors.stage(run.stage.name, folder) as stage_monitors:
            fit(task.build_model(), task, run, folder, processes, stage_monitors, chain.write_config, minutes)
    except TrainingError as error:
        raise TrainingError(f"stage {run.stage.name}: {error}") from None


def train(args, config: CascadeConfig, count: int, processes: Processes) -> None:
    """Train the first ``count`` stages in turn, from wherever the checkpoint folder or ``--resume-from`` stands."""
    folder = Path(args.checkpoint_dir)
    chain = Chain(config, folder, processes)
    resumed = check_resume(args.resume_from, config, count)
    chain.check_config()
    if resumed is not None and processes.is_main:
        place_resumed(args.resume_from, resumed, config, folder)
    processes.barrier()
    with (
        run_context(args, config, folder, processes, chain.data.split_hash),
        monitors_from(args, config_dict(config), folder, processes) as monitors,
    ):
        for index in range(count):
            run = stage_run(config, index, processes.world_size)
            if index < (resumed or 0) or chain.is_frozen(index, run):
                if processes.is_main:
                    print(f"Stage {index + 1}, {run.stage.name}: done, used as it is", flush=True)
                chain.write_config(replace=False)  # which the stages after it read
                processes.barrier()
            else:
                train_stage(index, chain, run, monitors, chain.minutes_of(index, count, args.max_minutes))
        chain.write_config()
    if processes.is_main:
        options = {"data": config.data.dataset_path, "cascade": folder, "output": folder / "evaluation"}
        print(f"Next: {command_of('evaluate.py', **options)}", flush=True)


def worker(args: argparse.Namespace) -> int:
    """What each process runs; returns its exit status."""
    if args.quiet:
        be_quiet()
    with process_group() as processes:
        config, count = read_settings(args)
        recorded = recorded_config(args.checkpoint_dir) or {}
        if config.world_size is None:  # a resumed run keeps its global batch, however many processes run now
            config.world_size = recorded.get("world_size") or processes.world_size
        lines = describe(config, count, processes)
        if processes.is_main:
            print("\n".join(lines), flush=True)
        if args.dry_run:
            return 0
        try:
            with locked_folder(args.checkpoint_dir, processes):
                train(args, config, count, processes)
        except Interrupted as interruption:
            return stopped(interruption, processes, "saved")
    return 0


def main(argv=None) -> int:
    args = parse_args(argv)
    check_arguments(args)
    config, count = read_settings(args)
    for note in former_spellings(args.set):
        print(note, file=sys.stderr)
    check_resume(args.resume_from, config, count)
    return launch(worker, config.world_size or torch.cuda.device_count(), args)


if __name__ == "__main__":
    run_cli(main)
