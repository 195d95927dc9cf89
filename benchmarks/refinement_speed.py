"""Time and memory of both stages together: 512 x 512 X-rays -> 256^3, whole and in tiles; stage 2's training steps.

    python -m benchmarks.refinement_speed                # inference; each case in a process of its own
    python -m benchmarks.refinement_speed --steps        # a training step of stage 2, on a patch

All on the CPU; benchmarks/gpu.py is for a GPU.

Default networks with random weights; each figure is the median of the repetitions after a warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys

import torch

from benchmarks.model_speed import machine, median_seconds, peak_memory
from losses import EnhancedLoss
from model_enhanced import EnhancedDirectModel, RefinementNetwork
from xray2ct.command_line import Parser
from xray2ct.files import run_cli
from xray2ct.training.precision import Precision, keep_freed_memory, set_memory_format

COARSE, CPU = 64, torch.device("cpu")


def both_stages(guided: bool, precision: Precision, tile: int | None, repetitions: int) -> str:
    """X-rays -> 256^3, models loaded; the result is collected on the CPU as reconstruct.py does."""
    keep_freed_memory()  # as reconstruct.py does
    base = set_memory_format(EnhancedDirectModel().eval())
    network = set_memory_format(RefinementNetwork(guided=guided).eval())
    torch.nn.init.normal_(network.out.weight, std=0.01)
    xrays = torch.rand(1, 2, 512, 512)

    def predict():
        with torch.inference_mode(), precision.autocast():
            coarse = base(xrays)[0].float()
            network.refine(coarse, xrays if guided else None, tile, device="cpu")

    seconds = median_seconds(predict, repetitions)
    kind = "guided" if guided else "unguided"
    how = f"tiles of {tile}" if tile else "untiled"
    return f"X-rays -> 256^3, {kind}, {precision.name}, {how}: {seconds:.2f} s, {peak_memory()}"


def inference(args) -> None:
    """Every case in a fresh process, so that peaks of memory do not mix."""
    for name, (guided, tile) in itertools.product(("float32", "bfloat16"), ((1, 0), (1, 16), (0, 0))):
        case = ["--case", str(guided), name, str(tile)]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.refinement_speed", *case, "--repetitions", str(args.repetitions)],
            check=True,
        )


def training_step(patch: int, repetitions: int) -> None:
    """One step of the guided stage 2, forward, losses, backward, AdamW, on two patches of a pair."""
    precision = Precision("auto", CPU)
    criterion = EnhancedLoss(ssim_weight=0, multiscale_weight=0, perceptual_weights="random")
    network = set_memory_format(RefinementNetwork(guided=True).train())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    coarse, xrays = torch.rand(1, 1, *[COARSE] * 3), torch.rand(1, 2, 512, 512)
    target = torch.rand(2, 1, *[4 * patch] * 3)
    origins = [[(0, 0, 0), (16, 16, 16)]]

    def step():
        with precision.autocast():
            loss, _ = criterion(network(coarse, xrays, origins=origins, patch=patch), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    seconds = median_seconds(step, repetitions)
    case = f"stage 2 step, two patches of {4 * patch}^3, batch 1, {precision.name}"
    print(f"{case}: {seconds:.3f} s, {1 / seconds:.2f} samples/s, {peak_memory()}", flush=True)


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each")
    parser.add_argument("--steps", action="store_true", help="a training step of stage 2")
    parser.add_argument("--case", nargs=3, metavar=("GUIDED", "PRECISION", "TILE"), help="one inference case only")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.case:
        guided, name, tile = args.case
        print(both_stages(bool(int(guided)), Precision(name, CPU), int(tile) or None, args.repetitions), flush=True)
        return 0
    print(f"Machine: {machine()}", flush=True)
    if args.steps:
        keep_freed_memory()
        training_step(24, args.repetitions)
    else:
        inference(args)
    return 0


if __name__ == "__main__":
    run_cli(main)
