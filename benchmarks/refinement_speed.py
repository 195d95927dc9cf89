"""Time and memory of both stages together: 512 x 512 X-rays -> 256^3, whole and in tiles; stage 2's training steps.

    python -m benchmarks.refinement_speed                # inference; each case in a process of its own
    python -m benchmarks.refinement_speed --steps        # training steps of stage 2 (meant for a GPU)

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
from xray2ct.files import run_cli
from xray2ct.training.precision import Precision, keep_freed_memory, set_memory_format

COARSE, FINE = 64, 256


def both_stages(device, guided: bool, precision: Precision, tile: int | None, repetitions: int) -> str:
    """X-rays -> 256^3, models loaded; the result is collected on the CPU as reconstruct.py does."""
    if device.type == "cpu":
        keep_freed_memory()  # as reconstruct.py does
    base = set_memory_format(EnhancedDirectModel().to(device).eval())
    network = set_memory_format(RefinementNetwork(guided=guided).to(device).eval())
    torch.nn.init.normal_(network.out.weight, std=0.01)
    xrays = torch.rand(1, 2, 512, 512, device=device)

    def predict():
        with torch.inference_mode(), precision.autocast():
            coarse = base(xrays)[0].float()
            network.refine(coarse, xrays if guided else None, tile, device="cpu")

    seconds = median_seconds(predict, device, repetitions)
    kind = "guided" if guided else "unguided"
    how = f"tiles of {tile}" if tile else "untiled"
    return f"X-rays -> 256^3, {kind}, {precision.name}, {how}: {seconds:.2f} s, {peak_memory(device)}"


def inference(args) -> None:
    """Every case in a fresh process, so that peaks of memory do not mix."""
    for name, (guided, tile) in itertools.product(("float32", "bfloat16"), ((1, 0), (1, 16), (0, 0))):
        case = ["--case", str(guided), name, str(tile), "--device", args.device]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.refinement_speed", *case, "--repetitions", str(args.repetitions)],
            check=True,
        )


def training_step(network, criterion, batch: int, patch: int, precision: Precision, device):
    """A function that runs one step of stage 2: forward, losses, backward, AdamW. patch 0: full volumes."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    coarse = torch.rand(batch, 1, *[COARSE] * 3, device=device)
    xrays = torch.rand(batch, 2, 512, 512, device=device)
    whole = torch.rand(batch, 1, *[FINE] * 3, device=device)
    region, target = {}, whole
    if patch:
        region = {"origins": [[(0, 0, 0), (16, 16, 16)]] * batch, "patch": patch}
        target = whole[:, :, : 4 * patch, : 4 * patch, : 4 * patch].repeat_interleave(2, 0)

    def step():
        with precision.autocast():
            loss, _ = criterion(network(coarse, xrays, **region), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def training_steps(device, repetitions: int) -> None:
    """Batch 1, 2, 4; full volumes with and without activation checkpointing; two patches of 128^3 per volume."""
    precision = Precision("auto", device)
    criterion = EnhancedLoss(ssim_weight=0, multiscale_weight=0, perceptual_weights="random").to(device)
    cases = [(1, 24, False)]  # a CPU shows one small patch step
    if device.type == "cuda":
        cases = [(b, *c) for b in (1, 2, 4) for c in ((0, False), (0, True), (32, False))]
    for batch, patch, checkpointing in cases:
        network = RefinementNetwork(guided=True, activation_checkpointing=checkpointing).to(device).train()
        set_memory_format(network)
        what = f"patches of {4 * patch}^3, two per volume" if patch else "full 256^3"
        case = f"stage 2 step, {what}, batch {batch}, {precision.name}, checkpointing {checkpointing}"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            step = training_step(network, criterion, batch, patch, precision, device)
            seconds = median_seconds(step, device, repetitions)
            print(f"{case}: {seconds:.3f} s, {batch / seconds:.2f} samples/s, {peak_memory(device)}", flush=True)
        except torch.OutOfMemoryError:
            print(f"{case}: out of memory", flush=True)
            torch.cuda.empty_cache()


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", action="store_true", help="training steps of stage 2")
    parser.add_argument("--case", nargs=3, metavar=("GUIDED", "PRECISION", "TILE"), help="one inference case only")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    device = torch.device(args.device)
    if args.case:
        guided, name, tile = args.case
        case = (device, bool(int(guided)), Precision(name, device), int(tile) or None, args.repetitions)
        print(both_stages(*case), flush=True)
        return 0
    print(f"Machine: {machine(device)}", flush=True)
    if args.steps:
        if device.type == "cpu":
            keep_freed_memory()
        training_steps(device, args.repetitions)
    else:
        inference(args)
    return 0


if __name__ == "__main__":
    run_cli(main)
