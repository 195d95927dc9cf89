"""Time and memory of stage 1 on this machine's CPU: forward, forward + backward of one 512 x 512 pair.

    python -m benchmarks.model_speed

Each figure is the median of the repetitions after a warm-up; the machine is printed first.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from model_enhanced import EnhancedDirectModel
from xray2ct.command_line import Parser
from xray2ct.files import run_cli
from xray2ct.training.precision import Precision, keep_freed_memory, set_memory_format


def machine() -> str:
    """One line that names processor, threads and versions."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def median_seconds(function, repetitions: int) -> float:
    """Median wall time of ``function`` after one warm-up call."""
    times = []
    for repetition in range(repetitions + 1):
        start = time.perf_counter()
        function()
        if repetition:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory() -> str:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB process peak"


def passes(size: int, repetitions: int) -> None:
    """Forward and forward + backward of the default model, one pair."""
    model = set_memory_format(EnhancedDirectModel())
    xrays = torch.rand(1, 2, size, size)
    for name in ("float32", "bfloat16"):
        precision = Precision(name, torch.device("cpu"))

        def forward(precision=precision):
            with torch.inference_mode(), precision.autocast():
                model.eval()(xrays)

        def both(precision=precision):
            with precision.autocast():
                volume, aux = model.train()(xrays)
                loss = volume.float().square().mean() + sum(v.float().square().mean() for v in aux.values())
            model.zero_grad(set_to_none=True)
            loss.backward()

        seconds = [median_seconds(f, repetitions) for f in (forward, both)]
        print(f"{size}^2 pair, batch 1, {name}: forward {seconds[0]:.2f} s, forward + backward {seconds[1]:.2f} s")
    print(f"peak memory: {peak_memory()}")


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--size", type=int, default=512, help="edge of the X-rays")
    parser.add_argument("--repetitions", type=int, default=5, help="measurements of each")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    keep_freed_memory()  # as the training engine does
    print(f"Machine: {machine()}", flush=True)
    passes(args.size, args.repetitions)
    return 0


if __name__ == "__main__":
    run_cli(main)
