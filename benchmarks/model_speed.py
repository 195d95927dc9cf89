"""Time and memory of stage 1: forward, forward + backward, whole training steps, the data loader.

    python -m benchmarks.model_speed                     # this machine's CPU: one 512 x 512 pair
    python -m benchmarks.model_speed --steps             # training steps: on a GPU batch 4, 8, 16, all options
    python -m benchmarks.model_speed --loader --data ROOT

Each figure is the median of the repetitions after a warm-up; the machine is printed first.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from losses import EnhancedLoss
from model_enhanced import EnhancedDirectModel
from xray2ct.files import run_cli
from xray2ct.geometry.projector import render_xrays
from xray2ct.training.config import EnhancedConfig, config_dict, load_config
from xray2ct.training.direct_task import EnhancedTask
from xray2ct.training.distributed import Processes
from xray2ct.training.feed import Feed
from xray2ct.training.plan import EpochPlan
from xray2ct.training.precision import Precision, keep_freed_memory, to_channels_last


def machine(device: torch.device) -> str:
    """One line that names processor or GPU, threads and versions."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def synchronise(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function, device, repetitions: int) -> float:
    """Median wall time of ``function`` after one warm-up call."""
    times = []
    for repetition in range(repetitions + 1):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        if repetition:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory(device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB process peak"


def passes(device, size: int, repetitions: int) -> None:
    """Forward and forward + backward of the default model, one pair."""
    model = to_channels_last(EnhancedDirectModel().to(device))
    xrays = torch.rand(1, 2, size, size, device=device)
    for name in ("float32", "bfloat16"):
        precision = Precision(name, device)

        def forward(precision=precision):
            with torch.inference_mode(), precision.autocast():
                model.eval()(xrays)

        def both(precision=precision):
            with precision.autocast():
                volume, aux = model.train()(xrays)
                loss = volume.float().square().mean() + sum(v.float().square().mean() for v in aux.values())
            model.zero_grad(set_to_none=True)
            loss.backward()

        seconds = [median_seconds(f, device, repetitions) for f in (forward, both)]
        print(f"{size}^2 pair, batch 1, {name}: forward {seconds[0]:.2f} s, forward + backward {seconds[1]:.2f} s")
    print(f"peak memory: {peak_memory(device)}")


def training_step(model, criterion, batch: int, compiled: bool, device, precision):
    """A function that runs one whole step: render, forward, every loss, backward, AdamW."""
    runner = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    target = torch.rand(batch, 1, 64, 64, 64, device=device)

    def step():
        xrays = render_xrays(target, model.geometry)
        with precision.autocast():
            volume, aux = runner(xrays)
            loss, _ = criterion(volume, target, aux=aux)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def training_steps(device, repetitions: int, perceptual: str) -> None:
    """Whole steps for each batch size, memory format and with torch.compile."""
    batches = (4, 8, 16) if device.type == "cuda" else (1,)
    criterion = EnhancedLoss(perceptual_weights=perceptual).to(device)
    precision = Precision("auto", device)
    for batch, channels_last, compiled in itertools.product(batches, (False, True), (False, True)):
        if compiled and device.type == "cpu":
            continue  # needs a C++ toolchain and minutes of compilation
        model = EnhancedDirectModel().to(device).train()
        model = to_channels_last(model) if channels_last else model
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = median_seconds(
            training_step(model, criterion, batch, compiled, device, precision), device, repetitions
        )
        print(
            f"training step, batch {batch}, {precision.name}, channels_last {channels_last}, compile {compiled}:"
            f" {seconds:.3f} s, {batch / seconds:.2f} samples/s, {peak_memory(device)}",
            flush=True,
        )


def loader(device, config: EnhancedConfig, steps: int) -> None:
    """Samples/s of reading, augmenting and rendering, without the network."""
    processes = Processes(device=device)
    task = EnhancedTask(config, processes)
    repeats = -(-steps * config.training.batch_size // len(task.train_data))
    plan = EpochPlan(len(task.train_data), repeats, config.training.batch_size, 1, processes, 0)
    feed = Feed(task.train_data, config.data, processes)
    start, count = None, 0
    for raw in feed.start(plan, 1, 0, 1):
        batch = task.make_batch(raw, raw["position"].tolist(), device)
        synchronise(device)
        count += len(batch["xrays"]) if start else 0
        start = start or time.perf_counter()  # the first batch starts the workers
    where = "data on the device" if feed.cache else f"{feed.workers} workers"
    print(f"loader with augmentation: {count / (time.perf_counter() - start):.2f} samples/s ({where})")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=512, help="edge of the X-rays")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="whole training steps")
    parser.add_argument("--perceptual-weights", default="random", help="of VGG16 (the speed is the same)")
    parser.add_argument("--loader", action="store_true", help="the data loader; needs --data")
    parser.add_argument("--data", help="data set for --loader")
    parser.add_argument("--config", help="configuration for --loader")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the training engine does
    print(f"Machine: {machine(device)}", flush=True)
    if args.loader:
        config = load_config(EnhancedConfig, args.config, ["loss.perceptual_weight=0"])
        config.data.dataset_path = args.data or config.data.dataset_path
        print({k: config_dict(config)[k] for k in ("augment", "data")})
        loader(device, config, steps=20)
    elif args.steps:
        training_steps(device, args.repetitions, args.perceptual_weights)
    else:
        passes(device, args.size, args.repetitions)
    return 0


if __name__ == "__main__":
    run_cli(main)
