"""Provenance of a run: ``run.json`` with command, versions, git commit, machine and how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Generator
from datetime import datetime, timezone
from pathlib import Path

import torch

from xray2ct.checkpoints import WriteError
from xray2ct.files import InputError, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torchvision", "numpy", "nibabel", "tqdm", "pillow", "scipy")
# The modules at the root that a result depends on; the packages count as a whole.
MODULES = ("dataset", "losses", "model_enhanced", "train_enhanced_4gpu", "train_refinement_4gpu")
RUN_FILE = "run.json"
RUN_FORMAT = 1
# Variables that change results or speed. Names with one of SECRET in them never leave the process.
VARIABLES = ("PYTHONHASHSEED", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "WANDB_MODE")
PREFIXES = (
    *("OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_"),
    *("TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "HIP_", "ROCR_", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)
SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)


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
    versions = {"torch": torch.__version__}  # with the build: +cpu, +cu130
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _code() -> dict:
    """Git commit and whether files differ from it, where this is a checkout; the hash of the sources always."""
    digest = hashlib.sha256()
    paths = [path for name in MODULES if (path := ROOT / f"{name}.py").exists()]
    paths += [path for package in ("xray2ct", "hybrid_vit_cascade") for path in (ROOT / package).rglob("*.py")]
    for path in sorted(paths):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    top = _git("rev-parse", "--show-toplevel")
    ours = top is not None and Path(top).resolve() == ROOT  # a checkout around it is not of this code
    changed = _git("status", "--porcelain", "--untracked-files=no") if ours else None
    return {
        "commit": _git("rev-parse", "HEAD") if ours else None,
        "dirty": None if changed is None else bool(changed),
        "source_hash": digest.hexdigest()[:16],
    }


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(ROOT), *words]
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
def recorded_run(folder, facts: dict, enabled: bool = True) -> Generator[None]:
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
