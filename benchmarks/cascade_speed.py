"""Time and memory of the cascade's stages on the CPU: sampling steps and whole training steps.

    python -m benchmarks.cascade_speed                                           # stage 1 of progressive_3stage
    python -m benchmarks.cascade_speed --config hybrid_vit_cascade/config/quick_2stage.json --stage 2 --batch 2

Each figure is the median of the repetitions after a warm-up; the machine is printed first. A training step is
forward, both losses, backward, AdamW and the moving average; data and the sampling of earlier stages are not in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.model_speed import machine, median_seconds, peak_memory
from hybrid_vit_cascade.cascade import Stage
from hybrid_vit_cascade.models import CascadeStage
from hybrid_vit_cascade.settings import load_cascade_config, stage_run
from hybrid_vit_cascade.training.task import StageLoss, stage_arguments
from xray2ct.command_line import Parser
from xray2ct.files import InputError, run_cli
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.training.ema import MovingAverage
from xray2ct.training.precision import Precision, keep_freed_memory, set_memory_format

CONFIG = Path(__file__).parent.parent / "hybrid_vit_cascade" / "config" / "progressive_3stage.json"
CPU = torch.device("cpu")


def random_batch(run, batch: int, device) -> dict:
    """What a training step needs, filled with noise."""
    size = (batch, 1) + (run.stage.volume_size,) * 3
    views, edge = run.num_views, run.xray_img_size
    made = {
        "x0": 2 * torch.rand(size, device=device) - 1,
        "noise": torch.randn(size, device=device),
        "t": torch.randint(0, run.num_timesteps, (batch,), device=device),
        "xrays": torch.rand(batch, views, edge, edge, device=device),
    }
    if run.index:
        coarse = (batch, 1) + (run.stage.volume_size // 2,) * 3
        made |= {"previous": 2 * torch.rand(coarse, device=device) - 1, "level": torch.zeros(batch, device=device)}
    return made


def sampling(model, run, steps: int, precision, repetitions: int) -> None:
    """``steps`` sampling steps of one case, the condition included; measured on a few, as all take the same time."""
    made = random_batch(run, 1, CPU)
    stage = Stage(run.stage.name, model.eval(), StageLoss(run, Acquisition(model.geometry)).schedule, run.prediction)

    def encode():
        with torch.no_grad(), precision.autocast():
            return model.encode(made["xrays"], made.get("previous"))

    condition, few = encode(), min(5, steps)

    def generate():
        with precision.autocast():
            stage.generate(condition, made["noise"], few)

    first = median_seconds(encode, repetitions)
    step = median_seconds(generate, repetitions) / few
    total = f"{steps} steps {first + steps * step:.1f} s"
    print(f"sampling, batch 1, {precision.name}: condition {first:.2f} s, step {step:.2f} s, {total}", flush=True)


def training(model, run, batch: int, precision, repetitions: int) -> None:
    """Whole training steps."""
    model.train().requires_grad_(True)
    criterion, average = StageLoss(run, Acquisition(model.geometry)), MovingAverage(model, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    made = random_batch(run, batch, CPU)

    def step():
        with precision.autocast():
            total, _ = criterion(model, made)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        average.update(model, 1000)

    seconds = median_seconds(step, repetitions)
    speed = f"{seconds:.2f} s, {batch / seconds:.2f} samples/s, {peak_memory()}"
    checkpointing = run.stage.activation_checkpointing
    print(f"training step, batch {batch}, {precision.name}, activation checkpointing {checkpointing}: {speed}")


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", default=str(CONFIG), help="JSON settings of the cascade")
    parser.add_argument("--stage", type=int, default=1, help="which one, from 1 (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="of the training step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--precision", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    config = load_cascade_config(args.config, args.set)
    if not 1 <= args.stage <= len(config.stages):
        raise InputError(f"--stage is {args.stage}; {args.config} has {len(config.stages)} stages")
    keep_freed_memory()  # as the trainer does
    print(f"Machine: {machine()}", flush=True)
    run, precision = stage_run(config, args.stage - 1, world_size=1), Precision(args.precision, CPU)
    model = set_memory_format(CascadeStage(**stage_arguments(config, args.stage - 1)))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{run.stage.name}: {run.stage.volume_size}^3, {parameters:.2f} M parameters, X-rays {run.xray_img_size}^2")
    sampling(model, run, args.steps, precision, args.repetitions)
    training(model, run, args.batch, precision, args.repetitions)
    return 0


if __name__ == "__main__":
    run_cli(main)
