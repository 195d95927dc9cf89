"""How samples reach the device: one iterator for a run, read ahead, or kept there; always the same samples."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from dataset import PatientDataset
from tests.helpers.tiny_data import make_dataset
from xray2ct.files import InputError
from xray2ct.training import feed as feed_module
from xray2ct.training.config import DataConfig, EnhancedConfig, load_config
from xray2ct.training.distributed import Processes
from xray2ct.training.feed import DeviceCache, Feed, Prefetcher, cache_bytes, sample_loader, samples_of_run, wants_cache
from xray2ct.training.plan import EpochPlan

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EPOCHS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = make_dataset(tmp_path_factory.mktemp("feed") / "data")
    return PatientDataset(root, "train", 16, 32, raw=True)


class Numbers(Dataset):
    """Five samples, each its own number, and the process that read it."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        return {"id": f"p{index}", "value": torch.tensor([index]), "process": os.getpid()}


def plan(batch_size=2, accumulation=1, processes=None):
    return EpochPlan(5, 2, batch_size, accumulation, processes or Processes(), seed=3)


def a_feed(**settings) -> Feed:
    return Feed(Numbers(), DataConfig(**settings), Processes())


def expected(run: EpochPlan, epoch=1, step=0):
    """Positions and patients of the rest of a run, epoch by epoch."""
    return [
        [(position, run.order(number)[position]) for position in positions]
        for number in range(epoch, EPOCHS + 1)
        for positions in run.batches(step if number == epoch else 0)
    ]


def seen(batches):
    return [list(zip(batch["position"].tolist(), batch["value"].flatten().tolist())) for batch in batches]


# -- order ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
def test_one_loader_gives_the_batches_of_all_epochs(workers):
    run = plan(accumulation=2)
    batches = list(sample_loader(Numbers(), samples_of_run(run, 1, 0, EPOCHS), workers, 2, pin=False))
    assert seen(batches) == expected(run)
    readers = {process for batch in batches for process in batch["process"].tolist()}
    assert len(readers) == max(1, workers)  # the same processes in every epoch
    assert (os.getpid() in readers) == (workers == 0)


@pytest.mark.parametrize(("epoch", "step"), [(1, 0), (1, 3), (2, 0), (2, 1), (3, 4)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_gets_the_batches_that_are_left(epoch, step, rank):
    run = plan(batch_size=1, processes=Processes(rank, 2))
    whole, rest = (seen(a_feed().start(run, *place, EPOCHS)) for place in ((1, 0), (epoch, step)))
    done = (epoch - 1) * run.steps + step
    assert rest == whole[done:] == expected(run, epoch, step)
    assert len(rest) == EPOCHS * run.steps - done


def test_a_feed_goes_on_from_epoch_to_epoch_and_starts_anew_elsewhere():
    opened = []

    class Counted(Feed):
        def _open(self, batches):
            opened.append(1)
            return super()._open(batches)

    run = plan()
    feed, found = Counted(Numbers(), DataConfig(), Processes()), []
    for epoch in range(1, EPOCHS + 1):
        batches = feed.start(run, epoch, 0, EPOCHS)
        found += seen(next(batches) for _ in range(run.steps))
    assert found == expected(run)
    assert len(opened) == 1
    assert seen(feed.start(run, 2, 1, EPOCHS)) == expected(run, 2, 1)  # back to an earlier place
    other = plan(batch_size=5)
    assert seen(feed.start(other, 2, 0, EPOCHS)) == expected(other, 2)
    assert len(opened) == 3


def test_closing_ends_the_loader_processes():
    before = set(multiprocessing.active_children())
    feed = a_feed()
    feed.workers = 2
    next(feed.start(plan(), 1, 0, EPOCHS))
    assert len(set(multiprocessing.active_children()) - before) == 2
    feed.close()
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.skipif(os.name == "nt", reason="signals between processes are POSIX")
def test_loader_processes_read_on_after_a_signal_to_all():
    """Ctrl-C and a scheduler reach them, too; the step in progress may still want their samples."""
    before = set(multiprocessing.active_children())
    feed = a_feed(prefetch_factor=1)
    feed.workers = 2
    run = plan(batch_size=1)
    batches = feed.start(run, 1, 0, EPOCHS)
    found = seen([next(batches)])
    readers = set(multiprocessing.active_children()) - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        for process in readers:
            os.kill(process.pid, number)
    time.sleep(0.05)
    found += seen(batches)
    assert found == expected(run)
    began = time.monotonic()
    feed.close()
    assert time.monotonic() - began < 5
    assert not any(process.is_alive() for process in readers)


# -- copies ahead --------------------------------------------------------------------------------
def test_a_prefetcher_reads_one_ahead_and_keeps_the_order():
    read = []

    def source():
        for number in range(4):
            read.append(number)
            yield {"value": torch.tensor([number]), "position": torch.tensor([number]), "id": [str(number)]}

    batches = Prefetcher(source(), CPU)
    assert read == []
    for number in range(4):
        batch = next(batches)
        assert (batch["value"].item(), batch["id"]) == (number, [str(number)])
        assert read == list(range(min(4, number + 2)))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(batches)


def test_an_error_ahead_is_raised_when_its_batch_is_due():
    def source():
        yield {"value": torch.tensor([0])}
        yield {"value": torch.tensor([1])}
        raise InputError("patient p2: damaged")

    batches = Prefetcher(source(), CPU)
    assert [next(batches)["value"].item() for _ in range(2)] == [0, 1]
    with pytest.raises(InputError, match="patient p2: damaged"):
        next(batches)


# -- on the device -------------------------------------------------------------------------------
def test_the_device_cache_equals_the_loader(data):
    run = EpochPlan(len(data), 3, 2, 1, Processes(), seed=1)
    cache = DeviceCache(data, CPU)
    loader = sample_loader(data, samples_of_run(run, 1, 0, 2), 0, 2, pin=False)
    cached = [cache(samples) for samples in samples_of_run(run, 1, 0, 2)]
    assert len(cached) == 2 * run.steps
    for one, other in zip(cached, loader, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if not torch.is_tensor(value):
                assert value == other[name]
                continue
            assert value.dtype == other[name].dtype
            same = (v.view(torch.int16) if v.dtype == torch.uint16 else v for v in (value, other[name]))
            assert torch.equal(*same), name
    assert cached[0]["ct_volume"].dtype == torch.uint16


def test_the_cache_takes_what_it_was_said_to_take(data):
    assert cache_bytes(data) == sum(value.nbytes for value in DeviceCache(data, CPU).values.values())
    assert cache_bytes(data) == 3 * (16**3 * (2 + 1) + 2 * 32**2 * 4 + 16 * 8)  # volume, mask, X-rays, affine


@pytest.mark.parametrize(
    ("setting", "needed", "device", "wanted"),
    [
        ("auto", 50, GPU, True),
        ("auto", 51, GPU, False),
        ("on", 99, GPU, True),
        ("off", 1, GPU, False),
        ("auto", 1, CPU, False),
        ("on", 1, CPU, False),
    ],
)
def test_the_cache_is_taken_where_it_fits_or_is_asked_for(setting, needed, device, wanted):
    assert wants_cache(setting, needed, 100, device) == wanted


def test_a_feed_gives_what_its_cache_holds(data):
    run = EpochPlan(len(data), 3, 2, 1, Processes(), seed=1)
    feed = Feed(data, DataConfig(), Processes())
    feed.cache, feed._decided = DeviceCache(data, CPU), True
    plain = list(Feed(data, DataConfig(), Processes()).start(run, 1, 1, 2))
    cached = list(feed.start(run, 1, 1, 2))
    assert [batch["id"] for batch in cached] == [batch["id"] for batch in plain]
    assert [batch["position"].tolist() for batch in cached] == [batch["position"].tolist() for batch in plain]


def test_other_settings_of_the_cache_are_refused():
    with pytest.raises(InputError, match=r"data\.device_cache is 'maybe'; expected one of auto, on, off"):
        load_config(EnhancedConfig, None, ["data.device_cache=maybe"])


def test_the_mask_is_read_where_it_is_wanted(data):
    without = PatientDataset(data.root, "train", 16, None, raw=True, with_mask=False)[0]
    assert set(without) == {"id", "ct_volume", "affine"}
    assert torch.equal(without["ct_volume"].view(torch.int16), data[0]["ct_volume"].view(torch.int16))
    assert feed_module.cache_bytes([data[0]]) > feed_module.cache_bytes([without])
