"""A data set of many patients: opening it, its cache, the plan of an epoch, and the way to the first training step.

    python -m benchmarks.data_scale --patients 25000

Patients are hard links to a few prepared phantoms, so that only names, files and caches are as many as said. Every
figure is printed as it is measured.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks.model_speed import machine
from dataset import PatientDataset
from xray2ct.command_line import Parser
from xray2ct.conventions import MANIFEST
from xray2ct.data.splits import split_hash
from xray2ct.files import read_json, write_json
from xray2ct.training.distributed import Processes
from xray2ct.training.plan import EpochPlan

ROOT = Path(__file__).resolve().parent.parent
SIZE, XRAY_SIZE = 32, 32


def command(*arguments: str) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def prepare_originals(folder: Path) -> Path:
    """Four phantoms, prepared at :data:`SIZE`."""
    run = {"cwd": ROOT, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(
        command("-m", "tools.make_phantoms", "--output", folder / "cts", "--count", 4, "--spacing", 6), **run
    )
    sizes = ("--size", SIZE, "--xray-size", XRAY_SIZE, "--workers", 2)
    subprocess.run(
        command("prepare_data.py", "--input", folder / "cts", "--output", folder / "originals", *sizes), **run
    )
    return folder / "originals"


def link_patients(originals: Path, output: Path, count: int) -> None:
    """``count`` patients whose files are hard links; 50 validate and 50 test (1 each of fewer than 200)."""
    manifest = read_json(originals / MANIFEST)
    sources = sorted(manifest["patients"])
    entries = {}
    for index in range(count):
        source, patient = sources[index % len(sources)], f"patient{index:06d}"
        (output / patient).mkdir(parents=True)
        entry = dict(manifest["patients"][source])
        entry["files"] = {name.replace(source, patient): code for name, code in entry["files"].items()}
        for name in manifest["patients"][source]["files"]:
            os.link(originals / source / name, output / patient / name.replace(source, patient))
        entries[patient] = entry
    ids, held_out = sorted(entries), 50 if count >= 200 else 1
    split = {"test": ids[:held_out], "val": ids[held_out : 2 * held_out], "train": ids[2 * held_out :]}
    write_json(output / MANIFEST, {**manifest, "split": split, "split_hash": split_hash(split), "patients": entries})


def timed(what: str, function, per: int | None = None):
    """Call ``function`` and print how long it took, and the process's peak memory so far."""
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    each = f", {1000 * seconds / per:.2f} ms each" if per else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what}: {seconds:.2f} s{each} (process peak {peak:.0f} MB)", flush=True)
    return result


def first_step(data: Path, output: Path) -> float:
    """Seconds from the training command to its first reported step."""
    options = ("training.num_epochs=1", "logging.log_interval=1", f"augment.source_size={SIZE}", "data.repeats=1")
    settings = [word for option in options for word in ("--set", option)]
    script = command("train_enhanced_4gpu.py", "--config", "configs/demo.json", "--data", data, "--output", output)
    start = time.perf_counter()
    with subprocess.Popen(
        [*script, *settings], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "Epoch 1 [1/" in line:
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise SystemExit("".join(printed[-5:]) or "training ended without a step")


def measure(folder: Path, count: int) -> None:
    originals = prepare_originals(folder)
    data = folder / "data"
    timed("linking patients", lambda: link_patients(originals, data, count), count)
    train = timed("opening the training split", lambda: PatientDataset(data, "train", SIZE, None, raw=True))
    plan = EpochPlan(len(train), 1, 16, 1, Processes(), 0)
    timed("planning an epoch", lambda: plan.batches(0) and plan.order(1))
    timed("caching all, cold", lambda: train.build_cache(), len(train))
    timed("caching all, warm", lambda: train.build_cache(), len(train))
    timed("reading 1,000 samples", lambda: [train[i % len(train)] for i in range(1000)], 1000)
    print(f"from the command to the first step, cache warm: {first_step(data, folder / 'run'):.1f} s", flush=True)


def main(argv=None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--patients", type=int, default=25_000, help="of the made-up data set")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed at the end)")
    args = parser.parse_args(argv)
    print(machine(), flush=True)
    warnings.simplefilter("ignore")
    if args.folder:
        args.folder.mkdir(parents=True)
        measure(args.folder, args.patients)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args.patients)


if __name__ == "__main__":
    main()
