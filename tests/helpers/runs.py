"""Training runs for the tests: tiny settings, whole commands as processes, their weights and logs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.helpers import forked
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import TINY_MODEL
from xray2ct.checkpoints import load_checkpoint
from xray2ct.training.config import EnhancedConfig, load_config
from xray2ct.training.direct_task import EnhancedTask
from xray2ct.training.distributed import Processes

TINY = [
    *[f"model.{key}={json.dumps(value)}" for key, value in TINY_MODEL.items()],
    "training.precision=float32",
    "training.batch_size=1",
    "training.num_epochs=2",
    "training.learning_rate=2e-3",
    "training.warmup_epochs=0.5",
    "training.ema_decay=0.9",
    "loss.perceptual_weight=0",
    "augment.source_size=32",
    "logging.log_interval=1",
    "world_size=2",
]


def build(root, *overrides):
    config = load_config(EnhancedConfig, None, [*TINY, f"data.dataset_path={root}", *overrides])
    task = EnhancedTask(config, Processes())
    return config, task, task.build_model()


SCRIPT = str(ROOT / "train_enhanced_4gpu.py")


def command(root, output, *overrides):
    options = [word for text in (*TINY, *overrides) for word in ("--set", text)]
    return [
        sys.executable,
        SCRIPT,
        "--config",
        str(ROOT / "config_enhanced.json"),
        "--data",
        str(root),
        "--output",
        str(output),
        *options,
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


SECONDS = 300  # for anything that is waited for, on a machine with much else to do


def run(words) -> subprocess.CompletedProcess:
    """A command to its end: ``[python, script, ...]`` or ``[python, "-m", module, ...]``, from the repository's root.

    Where the system can, it is forked from a server that has imported torch.
    """
    if os.name == "nt":
        own = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": SECONDS}
        return subprocess.run(words, cwd=ROOT, env=environment(), check=False, **own)
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder) / name for name in ("stdout", "stderr")]
        status = _ended(forked.start(words, *printed))
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in printed]
    return subprocess.CompletedProcess(words, status, *texts)


def run_ranks(words, count=2) -> list[subprocess.CompletedProcess]:
    """:func:`run` on ``count`` processes at once, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder:
        printed = [[Path(folder) / f"{name}{rank}" for name in ("stdout", "stderr")] for rank in range(count)]
        ranks = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        processes = [forked.start(words, *paths, **own) for paths, own in zip(printed, ranks)]
        statuses = [_ended(process) for process in processes]
        texts = [[path.read_text(encoding="utf-8", errors="replace") for path in paths] for paths in printed]
    return [subprocess.CompletedProcess(words, status, *text) for status, text in zip(statuses, texts)]


def _ended(process) -> int:
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running after {SECONDS} s")
    return process.exitcode


def events(output, kind):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def weights(path):
    state = load_checkpoint(path)["training_state"]["model"]
    return {k: v for k, v in state.items() if torch.is_tensor(v)}


def assert_same_tensors(one, other):
    one, other = ({k: v for k, v in state.items() if torch.is_tensor(v)} for state in (one, other))
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def assert_same_weights(one, other):
    assert_same_tensors(weights(one / "last.pt"), weights(other / "last.pt"))
    a, b = load_checkpoint(one / "best_model.pt"), load_checkpoint(other / "best_model.pt")
    assert a["metrics"]["psnr"] == b["metrics"]["psnr"]


LONGER = ("training.num_epochs=3", "data.repeats=4", "logging.checkpoint_minutes=0.0")


def start_and_signal(words, output, steps, number):
    """Start a run, send it a signal once it has logged so many steps; returns its exit status."""
    process = forked.start(words, os.devnull, os.devnull)
    deadline = time.monotonic() + SECONDS
    while process.is_alive() and time.monotonic() < deadline:
        log = output / "log.jsonl"
        if log.exists() and log.read_text().count('"event": "step"') >= steps:
            os.kill(process.pid, number)
            break
        time.sleep(0.01)
    return _ended(process)


def arguments(root, output, *overrides):
    return command(root, output, *overrides)[2:]
