"""What a run ran on, what makes it repeatable, and whether this machine's reduced-precision convolutions are right.

    python environment.py                       # versions, devices, variables; checks of Conv3d; exit status 1 if wrong
    python environment.py --json environment.json

Training scripts use the parts: ``run.json`` in every run folder (:func:`recorded_run`), ``--deterministic``
(:func:`deterministic`), and the comparison of convolutions before a run in reduced precision
(:func:`reduced_precision_defects`): cuDNN 9.10 silently computed large bfloat16 Conv3d wrongly (pytorch issue 163539),
and torch 2.13 on a CPU with AVX512 computes the weight gradient of small ones wrongly (3^3 kernel on 2^3 voxels).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from checkpoints import WriteError
from files import InputError, read_json, run_cli, write_json
from launch import read_requirements

HERE = Path(__file__).resolve().parent
RUN_FILE = "run.json"
RUN_FORMAT = 1
# Variables that change results or speed. Names with one of SECRET in them never leave the process.
VARIABLES = ("PYTHONHASHSEED", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "WANDB_MODE")
PREFIXES = (
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_"),
    *("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "HIP_", "ROCR_", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)
CPU_SIZE = 16  # see reduced_precision_defects()
SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
NO_DETERMINISTIC_VERSION = re.compile(r"^(\S+) does not have a deterministic implementation")


# ------------------------------------------------------------------------------------------------
# What a run ran on


def describe_environment() -> dict:
    """Versions, code, machine, threads and the variables that matter, as plain JSON types. Holds no secrets."""
    return {
        "python": platform.python_version(),
        "packages": _packages(),
        "code": _code(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "variables": _variables(),
    }


def _packages() -> dict[str, str | None]:
    versions = {}
    for name, _ in read_requirements(HERE / "requirements.txt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {**versions, "torch": torch.__version__}  # with the build: +cpu, +cu130


def _code() -> dict:
    """Git commit and whether files differ from it, where this is a checkout; the hash of the sources always."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.py"), *(HERE / "hybrid_vit_cascade").rglob("*.py")]):
        digest.update(path.relative_to(HERE).as_posix().encode() + b"\0" + path.read_bytes())
    top = _git("rev-parse", "--show-toplevel")
    ours = top is not None and Path(top).resolve() == HERE  # a checkout around it says nothing about this code
    changed = _git("status", "--porcelain", "--untracked-files=no") if ours else None
    return {
        "commit": _git("rev-parse", "HEAD") if ours else None,
        "dirty": None if changed is None else bool(changed),
        "source_hash": digest.hexdigest()[:16],
    }


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(HERE), *words]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory": properties.total_memory})
    return found


def _variables() -> dict[str, str]:
    chosen = {name: value for name, value in os.environ.items() if name in VARIABLES or name.startswith(PREFIXES)}
    return {name: chosen[name] for name in sorted(chosen) if not SECRET.search(name)}


def command_line(argv: list[str] | None = None) -> list[str]:
    """The command as it was given (with the interpreter); values of options called like a secret become ``***``."""
    words, hidden = [], False
    for word in [sys.executable, *(sys.argv if argv is None else argv)]:
        name, equals, _ = word.partition("=")
        if hidden:
            word, hidden = "***", False
        elif equals and SECRET.search(name):
            word = f"{name}=***"
        elif word.startswith("--") and SECRET.search(name):
            hidden = True
        words.append(word)
    return words


@contextlib.contextmanager
def recorded_run(folder, facts: dict, enabled: bool = True) -> Iterator[None]:
    """Append this run to ``folder/run.json``: command, environment, ``facts``, when it began and how it ended.

    facts: what the caller knows, as JSON types: settings' and split's hash, precision, processes. A run that goes on
    after an interruption appends to the list; ``outcome`` stays None for a run that was killed. enabled: False on all
    processes but one. Raises :class:`checkpoints.WriteError` when the file cannot be written.
    """
    if not enabled:
        yield
        return
    path = Path(folder) / RUN_FILE
    entry = {
        "command": command_line(),
        "folder": os.getcwd(),
        "began": _now(),
        "ended": None,
        "outcome": None,
        **facts,
        "environment": describe_environment(),
    }
    runs = [*_earlier_runs(path), entry]
    try:
        write_json(path, {"format": RUN_FORMAT, "runs": runs})
    except OSError as error:
        raise WriteError(f"{path}: could not be written ({error})") from error
    outcome = "finished"
    try:
        yield
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise
    finally:
        entry.update(ended=_now(), outcome=outcome)
        with contextlib.suppress(OSError):  # the full disk that ended the run is reported by what met it first
            write_json(path, {"format": RUN_FORMAT, "runs": runs})


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _earlier_runs(path: Path) -> list:
    if not path.exists():
        return []
    try:
        data = read_json(path)
        if isinstance(data, dict) and data.get("format") == RUN_FORMAT and isinstance(data.get("runs"), list):
            return data["runs"]
        reason = f"{path}: not a record of runs"
    except InputError as error:
        reason = str(error)
    aside = path.with_name(f"{RUN_FILE}.damaged")
    os.replace(path, aside)  # a record is no reason to refuse training, nor to be lost
    print(f"note: {reason}; kept as {aside}", flush=True)
    return []


# ------------------------------------------------------------------------------------------------
# The same result again


@contextlib.contextmanager
def deterministic(enabled: bool = True) -> Iterator[list[str]]:
    """Use torch's deterministic algorithms within the block; what was set before comes back.

    ``torch.use_deterministic_algorithms``, no cuDNN benchmark, ``CUBLAS_WORKSPACE_CONFIG`` (has to be set before the
    first product on a GPU). Operations without a deterministic version run as they are: yields the list that their
    names are put into (such as ``upsample_trilinear3d_backward_out_cuda``), and prints them once at the end. On one
    machine a run that names none repeats bit for bit; on a CPU that is so without the switch.
    """
    unsafe: list[str] = []
    if not enabled:
        yield unsafe
        return
    cudnn, name = torch.backends.cudnn, "CUBLAS_WORKSPACE_CONFIG"
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags, variable = (cudnn.benchmark, cudnn.deterministic), os.environ.get(name)
    os.environ.setdefault(name, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with _collected(unsafe):
            yield unsafe
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, cudnn.deterministic = flags
        if variable is None:
            os.environ.pop(name, None)
        if unsafe:
            print(f"note: without a deterministic version: {', '.join(unsafe)}; a repeated run may differ", flush=True)


@contextlib.contextmanager
def _collected(names: list[str]):
    """Torch's warnings on operations without a deterministic version become entries of ``names``."""
    show = warnings.showwarning

    def collect(message, *args, **kwargs):
        match = NO_DETERMINISTIC_VERSION.match(str(message))
        if match is None:
            show(message, *args, **kwargs)
        elif match[1] not in names:
            names.append(match[1])

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=NO_DETERMINISTIC_VERSION.pattern)
        warnings.showwarning = collect
        yield


# ------------------------------------------------------------------------------------------------
# Convolutions in reduced precision


@dataclass(frozen=True)
class Convolution:
    """One Conv3d as it is called: weight (O, I / groups, k, k, k), input (B, I, D, H, W), and how."""

    weight: tuple[int, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    channels_last: bool

    def __str__(self) -> str:
        kernel = "x".join(str(n) for n in self.weight[2:])
        size = " x ".join(str(n) for n in self.shape)
        return f"{kernel} Conv3d {self.shape[1]} -> {self.weight[0]} channels on {size}"


def recorded_convolutions(run: Callable[[], object]) -> list[Convolution]:
    """The different Conv3d calls that ``run()`` makes, in the order of their first call, whatever network has them."""
    found: dict[Convolution, None] = {}

    def note(module, inputs):
        if isinstance(module, nn.Conv3d):
            x, weight = inputs[0], module.weight
            kept = weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
            how = (module.stride, module.padding, module.dilation, module.groups, kept)
            found[Convolution(tuple(weight.shape), tuple(x.shape), *how)] = None

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return list(found)


def convolution_defect(case: Convolution, dtype: torch.dtype, device, convolve=F.conv3d) -> str | None:
    """What is wrong with ``convolve`` in ``dtype`` on one case: output or a gradient, by how much; None if nothing.

    The same random numbers, representable in ``dtype``, go through ``convolve`` in ``dtype`` and ``F.conv3d`` in
    float32 (TF32 off): they may differ by the rounding of the result alone. Beyond 4 epsilon in the root mean square,
    or anywhere by a quarter of the values' own, it is a defect, as a value that is not finite.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape, scale=1.0):
        numbers = scale * torch.randn(shape, generator=generator, device=device)
        layout = torch.channels_last_3d if case.channels_last else torch.contiguous_format
        return numbers.to(dtype).contiguous(memory_format=layout)

    fan_in = case.weight[1] * case.weight[2] * case.weight[3] * case.weight[4]
    x, weight = draw(case.shape), draw(case.weight, fan_in**-0.5)
    with torch.autocast(torch.device(device).type, enabled=False):
        with torch.no_grad():
            gradient = draw(convolve(x, weight, None, *_how(case)).shape)
        found = _with_gradients(convolve, case, x, weight, gradient)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            wanted = _with_gradients(F.conv3d, case, x.float(), weight.float(), gradient.float())
    for name, ours, right in zip(("output", "input gradient", "weight gradient"), found, wanted):
        error = _relative_error(ours.float(), right, torch.finfo(dtype).eps)
        if error is not None:
            return f"{name} of a {case}: {error}"
    return None


def _how(case: Convolution) -> tuple:
    return case.stride, case.padding, case.dilation, case.groups


def _with_gradients(convolve, case, x, weight, gradient):
    """Output, gradient of the input and gradient of the weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        output = convolve(x, weight, None, *_how(case))
        return output.detach(), *torch.autograd.grad(output, (x, weight), gradient)


def _relative_error(found: torch.Tensor, wanted: torch.Tensor, epsilon: float) -> str | None:
    if not torch.isfinite(found).all():
        return "not finite"
    size = wanted.square().mean().sqrt().clamp_min(1e-12)
    difference = (found - wanted).abs_()
    mean = (difference.square().mean().sqrt() / size).item()
    worst = ((difference - 4 * epsilon * wanted.abs()).max() / size).item()
    if mean > 4 * epsilon or worst > 0.25:
        return f"differs from float32 by {mean:.2g} (root mean square), {worst:.2g} at most, of its size"
    return None


def reduced_precision_defects(run: Callable[[], object], dtype: torch.dtype, device, convolve=F.conv3d) -> list[str]:
    """Defects (:func:`convolution_defect`) of the Conv3d calls that ``run()`` makes; empty when all are right.

    A case that is too large for the memory that is free is tried with one sample, or left out, and said. On a CPU
    volumes are cut to ``CPU_SIZE`` voxels per axis: the defects known there are of small ones, large ones take minutes.
    """
    defects, cases = [], recorded_convolutions(run)
    if torch.device(device).type == "cpu":
        cases = dict.fromkeys(replace(c, shape=(*c.shape[:2], *(min(n, CPU_SIZE) for n in c.shape[2:]))) for c in cases)
    for case in cases:
        try:
            defect = _checked(case, dtype, device, convolve)
        except torch.OutOfMemoryError:
            print(f"note: {case}: not enough memory to compare {dtype} with float32", flush=True)
            continue
        if defect is not None:
            defects.append(defect)
    return defects


@functools.cache  # the same for every run of a process
def _checked(case: Convolution, dtype, device, convolve) -> str | None:
    with contextlib.suppress(torch.OutOfMemoryError):
        return convolution_defect(case, dtype, device, convolve)
    return convolution_defect(replace(case, shape=(1, *case.shape[1:])), dtype, device, convolve)


# ------------------------------------------------------------------------------------------------
# Command line


def default_networks(device) -> list[tuple[str, Callable[[], object]]]:
    """Name and one forward pass of both stages as the default configurations train them, one sample each."""
    from config import EnhancedConfig, RefinementConfig, config_dict
    from model_enhanced import EnhancedDirectModel, RefinementNetwork

    base, refinement = EnhancedConfig().model, RefinementConfig()
    size = base.xray_size

    def first():
        EnhancedDirectModel(**config_dict(base)).to(device)(torch.rand(1, 2, size, size, device=device))

    def second():
        network = RefinementNetwork(**config_dict(refinement.model)).to(device)
        coarse, xrays = torch.rand(1, 1, *base.volume_size, device=device), torch.rand(1, 2, size, size, device=device)
        network(coarse, xrays, origins=[[(0, 0, 0)]], patch=refinement.patch.size, context=refinement.patch.context)

    return [("stage 1", torch.no_grad()(first)), ("stage 2", torch.no_grad()(second))]


def main(argv=None) -> int:
    """Print the environment and compare the default networks' convolutions; 1 when one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and checks as JSON, too")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU where there is one)")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = {"environment": describe_environment(), "checks": {}}
    print(json.dumps(report["environment"], indent=2))
    for name, run in default_networks(device):
        defects = reduced_precision_defects(run, torch.bfloat16, device)
        report["checks"][name] = defects
        print(f"{name}: bfloat16 Conv3d on {device}: {'right' if not defects else 'WRONG'}", flush=True)
        for defect in defects:
            print(f"  {defect}", flush=True)
    if args.json:
        write_json(args.json, report)
    wrong = any(report["checks"].values())
    if wrong:
        print("A run with such a convolution trains in float32 by itself")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_cli(main)
