"""Processes: torchrun, plain python (one process per visible GPU), or a single process; NCCL or Gloo."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xray2ct.files import InputError, run_cli, shown_name
from xray2ct.training.signals import PASSED_ON, exit_status, passed_on

GRACE_SECONDS = 10.0  # see spawn()
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI; MPICH, Intel MPI and srun --mpi=pmi2
LAUNCH_ADVICE = "start by torchrun, one per node (docs/clusters.md has a Slurm script)"


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
        return bool(self.largest(flag))

    def largest(self, value: float) -> float:
        """The largest of the ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(float(value), device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks (a new tensor)."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor / self.world_size


def data_parallel(model: nn.Module, processes: Processes, static: bool) -> DistributedDataParallel:
    """``model`` with gradients averaged over the processes while the backward pass runs.

    static: every step has one backward pass over the same parameters (no accumulation).
    """
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(functools.partial(_strided_like, parameter.stride()))
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, static_graph=static)


def _strided_like(stride: tuple[int, ...], gradient: torch.Tensor) -> torch.Tensor | None:
    """The gradient with its weight's strides where they differ in axes of size 1 alone, which the values do not know.

    Kernels of one voxel come out of the backward pass in either memory format; DDP would warn and copy them.
    """
    theirs = gradient.stride()
    if theirs == stride or any(n > 1 and a != b for n, a, b in zip(gradient.shape, theirs, stride)):
        return None
    return gradient.as_strided(gradient.shape, stride)


def lost_peer(error: BaseException, processes: Processes) -> bool:
    """True when an error means that another process has died or does not answer: Gloo's and NCCL's, by their words."""
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "socket")
    text = str(error).lower()
    return processes.world_size > 1 and (isinstance(error, dist.DistError) or any(word in text for word in words))


def launched_place() -> tuple[int, int, int] | None:
    """``(RANK, WORLD_SIZE, LOCAL_RANK)`` that a launcher set; None when this process was started by itself.

    Empty variables count as absent. Raises :class:`InputError` when only a part of them is there or they contradict
    each other, and when srun or mpirun started several processes without them: each would train alone.
    """
    values = {name: os.environ.get(name, "").strip() for name in (*PLACE, "MASTER_ADDR", "MASTER_PORT")}
    if not any(values[name] for name in PLACE):
        _refuse_copies()
        return None
    group = values["WORLD_SIZE"] not in ("", "1")
    missing = [name for name in (values if group else PLACE) if not values[name]]
    if missing:
        there = ", ".join(f"{name}={shown_name(value)}" for name, value in values.items() if value)
        raise InputError(
            f"environment: {there} without {', '.join(missing)}; expected all of {', '.join(PLACE)}, and for several"
            " processes MASTER_ADDR and MASTER_PORT, as torchrun sets them, or none of them (unset them to start alone)"
        )
    rank, world_size, local_rank = (_whole_number(name, values[name]) for name in PLACE)
    if group:
        _whole_number("MASTER_PORT", values["MASTER_PORT"], limit=2**16)
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value >= world_size:
            raise InputError(
                f"environment: {name}={value}, but WORLD_SIZE={world_size}; expected less: {LAUNCH_ADVICE}"
            )
    return rank, world_size, local_rank


def _whole_number(name: str, text: str, limit: int = 2**31) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < limit):
        raise InputError(f"environment: {name}={shown_name(text)}; expected a whole number: {LAUNCH_ADVICE}")
    return int(text)


def _refuse_copies() -> None:
    """Raise :class:`InputError` when this is one of several processes that know nothing of each other.

    Slurm sets the step's variables in what srun starts, not in a batch script, which runs once whatever
    SLURM_NTASKS is; a rank above 0 is one of several in any case.
    """
    step = "SLURM_STEP_NUM_TASKS" if os.environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    in_step = step == "SLURM_STEP_NUM_TASKS" or "SLURM_STEP_ID" in os.environ
    sizes = [name for name in (step, *MPI_SIZES) if os.environ.get(name, "").strip() not in ("", "0", "1")]
    if step in sizes and not in_step and os.environ.get("SLURM_PROCID", "0") == "0":
        sizes.remove(step)
    if sizes:
        count = shown_name(os.environ[sizes[0]])
        raise InputError(
            f"environment: {sizes[0]}={count}, so {count} processes were started, but without RANK and WORLD_SIZE each"
            f" would be a whole run of its own; {LAUNCH_ADVICE}"
        )


@contextlib.contextmanager
def process_group(timeout_minutes: float = 30.0):
    """Join the group that ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` describe; yields :class:`Processes`.

    Without them (see :func:`launched_place`): a single process on the first GPU, or on the CPU. NCCL with GPUs
    (Linux), otherwise Gloo.
    """
    rank, world_size, local_rank = launched_place() or (0, 1, 0)
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
    launched = launched_place() is not None
    count = min(wanted, torch.cuda.device_count())
    if launched or count <= 1:
        return worker(*args)
    return spawn(worker, count, *args)


def spawn(worker, count: int, *args) -> int:
    """Run ``worker(*args)`` in ``count`` processes of this machine; returns the first status that is not 0.

    SIGTERM and SIGINT are passed on, so that the workers can finish their step and save; then the status is 128 + the
    signal's number (see :func:`signals.exit_status`). When one worker fails or dies the others get ``GRACE_SECONDS``
    to end by themselves, as many again after a SIGTERM, then SIGKILL: nothing is left waiting for a process that is
    gone.
    """
    with socket.socket() as probe:  # a free port, so that two runs on one machine do not collide
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes: list = []

    def send(number):
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    with passed_on(send) as received:
        context = mp.spawn(_spawned, args=(count, port, worker, args), nprocs=count, join=False)
        processes += context.processes
        for number in set(received) & set(PASSED_ON):  # while the workers were being started
            send(number)
        try:
            while not context.join(grace_period=GRACE_SECONDS):
                pass
        except mp.ProcessExitedException as error:
            return exit_status(error.exit_code, received)
        except mp.ProcessRaisedException as error:
            print(error, file=sys.stderr)
            return 1
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
