"""The GPU pipeline in one table: renderer, networks, training steps, inference, augmentation, the real training.

    python -m benchmarks.gpu                                          # all parts
    python -m benchmarks.gpu --parts renderer,step --output figures.jsonl
    python -m benchmarks.gpu --small --device cpu                     # tiny sizes: does every part run?

Needs no data: volumes are noise, the real training has generated phantoms. Each figure is a line of JSON as soon as
it is known, on the terminal and in ``--output``; the table comes last. Times are medians after a warm-up call, memory
is the peak of torch's allocations. nanodrr is compared where it is installed. What the deadline leaves no time for
is reported as skipped, and a part that fails, with its error: the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.bench import Bench
from benchmarks.gpu_parts import PARTS
from xray2ct.command_line import Parser
from xray2ct.files import InputError, counted, run_cli
from xray2ct.training.precision import keep_freed_memory
from xray2ct.training.provenance import describe_environment

TABLE = ("part", "what", "batch", "ms", "samples_per_second", "peak_gib")


def machine(device: torch.device) -> dict:
    """Card or processor, versions and commit."""
    found = describe_environment()
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {counted(torch.get_num_threads(), 'thread')}",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "packages": {name: found["packages"].get(name) for name in ("triton", "nanodrr")},
        "python": found["python"],
        "code": found["code"],
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[dict]) -> str:
    """Markdown table of all figures; in place of one that is missing, why."""
    lines = ["| " + " | ".join(TABLE) + " |", "|" + "---|" * len(TABLE)]
    for row in rows:
        cells = [str(row.get(key, "")) for key in TABLE]
        cells[3] = cells[3] or row.get("error") or f"skipped: {row['skipped']}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="which ones, in this order (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cpu, cuda, ...")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a test on a CPU")
    parser.add_argument("--deadline", type=float, default=150, metavar="SECONDS", help="no part begins later than this")
    parser.add_argument("--output", type=Path, help="file that the lines of JSON are appended to")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    parts, device = args.parts.split(","), torch.device(args.device)
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise InputError(f"--parts has {', '.join(unknown)!r}; expected some of {','.join(PARTS)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device is {args.device}, but torch sees no GPU (--small --device cpu runs tiny sizes)")
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    bench = Bench(device, args.small, args.deadline, args.output)
    bench.record(part="machine", what="", **machine(device))
    for name in parts:
        try:
            PARTS[name](bench)
        except (RuntimeError, ValueError, OSError) as error:
            bench.record(part=name, what="whole part", error=f"{type(error).__name__}: {error}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print("\n" + table(bench.rows[1:]))
    return 1 if any("error" in row for row in bench.rows) else 0


if __name__ == "__main__":
    run_cli(main)
