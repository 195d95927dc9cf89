"""Micro-batches on their way to the device: loader processes, copies ahead of the step, or a data set kept there."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Generator, Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from xray2ct.files import InputError
from xray2ct.models.memory import available_memory
from xray2ct.progress import progress_bar
from xray2ct.training.config import DataConfig
from xray2ct.training.distributed import Processes
from xray2ct.training.plan import EpochPlan

Sample = tuple[int, int]  # position in the epoch, index of the patient
CACHE_SHARE = 0.5  # of the device's free memory that data.device_cache=auto may take; training needs the rest
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM)
WORKER_GRACE_SECONDS = 30  # how long a loader process works on after a SIGTERM


class Samples(Dataset):
    """A data set read by :data:`Sample`: what a loader process needs to know of the order is in the request."""

    def __init__(self, data: Dataset):
        self.data = data

    def __getitem__(self, sample: Sample) -> dict:
        position, patient = sample
        return {**self.data[patient], "position": position}


def outlive_signals(_worker: int) -> None:
    """Let a loader process read on after a signal to the whole group: the step in progress is finished and saved.

    The training process ends it when it is done. Should that be gone, too, it ends by itself: after
    ``WORKER_GRACE_SECONDS`` where SIGTERM came, otherwise as the loader's own watch over its parent sees to it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)  # a new process began with them held back


@contextlib.contextmanager
def signals_held() -> Generator[None]:
    """Hold signals back while processes are made: one that comes before :func:`outlive_signals` would end them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sample_loader(data: Dataset, batches: Iterable[list[Sample]], workers: int, prefetch: int, pin: bool) -> DataLoader:
    """Raw micro-batches in the order of ``batches``, read once; by ``workers`` processes, ``prefetch`` ahead each.

    pin: into page-locked memory, from which a GPU reads by itself.
    """
    return DataLoader(
        Samples(data),
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        worker_init_fn=outlive_signals,
    )


def samples_of_run(plan: EpochPlan, epoch: int, step: int, last_epoch: int) -> Iterator[list[Sample]]:
    """This rank's micro-batches from a step of an epoch (the first is 1) to the end of the run."""
    for number in range(epoch, last_epoch + 1):
        order = plan.order(number)
        for positions in plan.batches(step if number == epoch else 0):
            yield [(position, order[position]) for position in positions]


class Prefetcher:
    """Iterates over raw batches, each copied to ``device`` on a stream of its own while the one before is used.

    The copies run beside the step when the batches are in page-locked memory. Positions stay on the host, where they
    are needed. What goes wrong in reading ahead is raised when that batch is due.
    """

    def __init__(self, batches: Iterable[dict], device: torch.device):
        self.source, self.device = iter(batches), device
        self.module = torch.get_device_module(device)
        self.stream = self.module.Stream(device) if device.type != "cpu" else self.module.Stream()
        self.ahead: dict | Exception | None = None

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> dict:
        due = self._fetch() if self.ahead is None else self.ahead
        if isinstance(due, Exception):
            self.ahead = due
            raise due
        current = self.module.current_stream(self.device)
        current.wait_stream(self.stream)  # before the next copy is on it
        for value in due.values():
            if torch.is_tensor(value) and value.device.type != "cpu":
                value.record_stream(current)
        self.ahead = self._fetch()
        return due

    def _fetch(self) -> dict | Exception:
        try:
            batch = next(self.source)
        except Exception as error:  # noqa: BLE001 - also the end of the iteration; raised by __next__
            return error
        with self.module.stream(self.stream):
            moved = {name: value for name, value in batch.items() if torch.is_tensor(value) and name != "position"}
            return batch | {name: value.to(self.device, non_blocking=True) for name, value in moved.items()}


class DeviceCache:
    """All samples of a data set on a device; micro-batches are gathered there.

    Holds each tensor of the samples (uint16 volumes as such) and their ids. Batches are those of
    :func:`sample_loader`, bit for bit.
    """

    def __init__(self, data, device: torch.device, progress=None):
        self.ids: list[str] = []
        self.values: dict[str, torch.Tensor] = {}
        for index in progress(range(len(data))) if progress else range(len(data)):
            item = data[index]
            self.ids.append(item["id"])
            for name, value in item.items():
                if torch.is_tensor(value):
                    if index == 0:
                        shape = (len(data), *value.shape)
                        self.values[name] = torch.empty(shape, dtype=value.dtype, device=device)
                    self.values[name][index].copy_(value)
        self.device = device

    def __call__(self, samples: list[Sample]) -> dict:
        """The raw micro-batch of some samples."""
        rows = torch.tensor([patient for _, patient in samples])
        rows = rows.pin_memory() if self.device.type == "cuda" else rows
        rows = rows.to(self.device, non_blocking=True)
        batch = {name: _gathered(values, rows) for name, values in self.values.items()}
        position = torch.tensor([position for position, _ in samples])
        return {"id": [self.ids[patient] for _, patient in samples], **batch, "position": position}


def _gathered(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if values.dtype != torch.uint16:
        return values.index_select(0, rows)
    return values.view(torch.int16).index_select(0, rows).view(torch.uint16)  # few kernels know unsigned integers


def cache_bytes(data) -> int:
    """What :class:`DeviceCache` of a data set takes, from its first sample."""
    return len(data) * sum(value.nbytes for value in data[0].values() if torch.is_tensor(value))


def wants_cache(setting: str, needed: int, free: int, device: torch.device) -> bool:
    """Whether ``data.device_cache`` asks for a cache of ``needed`` bytes on a device with ``free`` bytes.

    On a CPU never: there the memory-mapped files are in memory already.
    """
    return device.type != "cpu" and (setting == "on" or (setting == "auto" and needed <= CACHE_SHARE * free))


class Feed:
    """The raw micro-batches of a run: one iterator for all its epochs, so that nothing starts anew between them.

    From a :class:`DeviceCache` where ``data.device_cache`` wants one, otherwise from a loader and, on a GPU, a
    :class:`Prefetcher`. The samples are the same. workers: loader processes; none on a CPU.
    """

    def __init__(self, data, settings: DataConfig, processes: Processes):
        self.data, self.settings, self.processes, self.device = data, settings, processes, processes.device
        self.workers = settings.num_workers if self.device.type == "cuda" else 0
        self.cache: DeviceCache | None = None
        self._decided = False
        self.close()

    def start(self, plan: EpochPlan, epoch: int, step: int, last_epoch: int) -> Feed:
        """Itself, as an iterator from a step to the end of ``last_epoch``; it goes on where it has arrived there."""
        left = len(plan.batches(step)) + (last_epoch - epoch) * len(plan.batches(0))
        if left != self._left:
            self._batches, self._left = self._open(samples_of_run(plan, epoch, step, last_epoch)), left
        return self

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> dict:
        batch = next(self._batches)
        self._left -= 1
        return batch

    def prepare(self) -> None:
        """Decide whether the data set stays on the device, and copy it there; at the latest when the feed starts."""
        if not self._decided:
            self.cache, self._decided = self._cached(), True

    def close(self) -> None:
        """End the loader processes."""
        self._batches, self._left = iter(()), 0

    def _open(self, batches: Iterable[list[Sample]]) -> Iterator[dict]:
        self.close()  # the old processes end before new ones start
        self.prepare()
        if self.cache is not None:
            return map(self.cache, batches)
        pin = self.device.type == "cuda"
        loader = sample_loader(self.data, batches, self.workers, self.settings.prefetch_factor, pin)
        with signals_held():
            return iter(loader) if self.device.type == "cpu" else Prefetcher(loader, self.device)

    def _cached(self) -> DeviceCache | None:
        if self.device.type == "cpu" or self.settings.device_cache == "off":
            return None
        needed, free, main = cache_bytes(self.data), available_memory(self.device), self.processes.is_main
        gib = f"{needed / 2**30:.1f} GiB"
        if not wants_cache(self.settings.device_cache, needed, free, self.device):
            if main:
                share = f"more than {CACHE_SHARE:.0%} of the {free / 2**30:.1f} GiB free"
                print(f"Training data: {gib} do not stay on the GPU ({share}); read by {self.workers} processes")
            return None
        if main:
            print(f"Training data: {gib} stay on the GPU", flush=True)
        bar = functools.partial(progress_bar, desc="Copying patients", unit="patients", leave=False) if main else None
        with contextlib.suppress(torch.OutOfMemoryError):
            return DeviceCache(self.data, self.device, bar)
        raise InputError(
            f"data.device_cache is {self.settings.device_cache!r}, but the GPU has no room for {gib}"
            f" ({free / 2**30:.1f} GiB free); expected 'off', or 'auto', which keeps data there only where they fit"
        )
