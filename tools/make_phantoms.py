"""Generate procedural thorax CTs as NIfTI files: no download, no patient, no licence question.

    python -m tools.make_phantoms --output phantoms --count 24 --seed 0
    python prepare_data.py --input phantoms --output data

They are for trying things out and for tests; scores on them say nothing about patients.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from xray2ct.command_line import Parser
from xray2ct.data.phantoms import encode, make_phantom
from xray2ct.data.prepare_folder import start_worker
from xray2ct.files import InputError, atomic_path, check_writable, run_cli
from xray2ct.progress import progress_bar


def write_phantom(index: int, output: Path, seed: int, spacing_mm: float | None, overwrite: bool) -> Path:
    """Make phantom ``index`` and write it; a different file of that name raises InputError."""
    path = Path(output) / f"phantom_{index:04d}.nii.gz"
    content = encode(*make_phantom(seed, index, spacing_mm))
    if path.exists():
        if path.read_bytes() == content:
            return path
        if not overwrite:
            raise InputError(f"{path}: exists and is different; give --overwrite or another --output")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def parse_args(argv=None):
    parser = Parser("Generate procedural thorax CTs as NIfTI files in HU.")
    parser.add_argument("--output", type=Path, required=True, help="folder for phantom_0000.nii.gz, ...")
    parser.add_argument("--count", type=int, default=24, help="number of phantoms (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    parser.add_argument("--spacing-mm", type=float, help="edge of cubic voxels (default: 2.2-2.6 x 3-5 mm)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    return parser.parse_args(argv)


def _check_args(args):
    for name, low in (("count", 1), ("seed", 0), ("workers", 1)):
        if getattr(args, name) < low:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least {low}")
    if args.spacing_mm is not None and not 0.5 <= args.spacing_mm <= 20:
        raise InputError(f"--spacing-mm is {args.spacing_mm:g}; expected 0.5 to 20 mm")
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; expected a folder")
    check_writable(args.output / "phantom_0000.nii.gz", "--output")


def main(argv=None) -> int:
    args = parse_args(argv)
    _check_args(args)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {"output": args.output, "seed": args.seed, "spacing_mm": args.spacing_mm, "overwrite": args.overwrite}
    job = partial(write_phantom, **settings)
    bar = partial(progress_bar, total=args.count, desc="phantoms", unit="CTs")
    if args.workers == 1:
        for index in bar(range(args.count)):
            job(index)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context, initializer=start_worker) as pool:
            try:
                for done in bar(as_completed([pool.submit(job, index) for index in range(args.count)])):
                    done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    print(f"{args.count} phantoms in {args.output} (seed {args.seed})")
    return 0


if __name__ == "__main__":
    run_cli(main)
