"""Processes: torchrun, plain python (one process per visible GPU), or a single process; NCCL or Gloo."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from files import InputError, run_cli

GRACE_SECONDS = 10.0  # see spawn()


@dataclass(frozen=True)
class Processes:
    """This process's place among all of them."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather_objects(self, value) -> list:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        if self.world_size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks (a new tensor)."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor / self.world_size


def lost_peer(error: BaseException, processes: Processes) -> bool:
    """True when an error means that another process has died or does not answer: Gloo's and NCCL's, by their words."""
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "socket")
    text = str(error).lower()
    return processes.world_size > 1 and (isinstance(error, dist.DistError) or any(word in text for word in words))


@contextlib.contextmanager
def process_group(timeout_minutes: float = 30.0):
    """Join the group that ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` describe; yields :class:`Processes`.

    Without them: a single process on the first GPU, or on the CPU. NCCL with GPUs (Linux), otherwise Gloo.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank} of this machine has no GPU ({torch.cuda.device_count()} visible);"
                " start no more processes than GPUs"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Processes(device=device)
        return
    nccl = device.type == "cuda" and dist.is_nccl_available()
    dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Processes(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def launch(worker, wanted: int, *args) -> int:
    """Run ``worker(*args)`` in as many processes as the machine and ``wanted`` allow; returns the exit status.

    Under torchrun this process is already one of several: it just runs. Plain ``python`` starts one
    process per visible GPU, at most ``wanted``; without a GPU it runs here.
    """
    count = min(wanted, torch.cuda.device_count())
    if "RANK" in os.environ or count <= 1:
        return worker(*args)
    return spawn(worker, count, *args)


def spawn(worker, count: int, *args) -> int:
    """Run ``worker(*args)`` in ``count`` processes of this machine; returns the first status that is not 0.

    SIGTERM and SIGINT are passed on, so that the workers can finish their step and save. When one
    worker fails or dies the others get ``GRACE_SECONDS`` to end by themselves, as many again after a SIGTERM, then
    SIGKILL: nothing is left waiting for a process that is gone.
    """
    with socket.socket() as probe:  # a free port, so that two runs on one machine do not collide
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.spawn(_spawned, args=(count, port, worker, args), nprocs=count, join=False)

    def forward(number, _frame):
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not context.join(grace_period=GRACE_SECONDS):
            pass
    except mp.ProcessExitedException as error:
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    except mp.ProcessRaisedException as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return 0


def _spawned(local_rank: int, count: int, port: int, worker, args) -> None:
    os.environ.update(
        RANK=str(local_rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if os.name == "nt":  # Windows builds of torch often lack libuv, the store's default
        os.environ["USE_LIBUV"] = "0"
    run_cli(lambda: worker(*args))
