"""A folder's pairs overlap: one is read and one is written while another is computed; order and errors stay apart."""

import threading

import pytest
import torch

from tests.helpers.convolutions import spoiled
from tests.helpers.tiny_data import make_checkpoint, make_dataset
from xray2ct.files import InputError
from xray2ct.inference.batch import overlapped
from xray2ct.inference.precision import fall_back_where_wrong, precision_name
from xray2ct.inference.system import DirectSystem


def test_the_next_is_read_and_the_last_is_written_while_one_is_computed():
    """Each step waits for what must run beside it: without the overlap this would stop at the first barrier."""
    both = {n: threading.Barrier(3, timeout=20) for n in (1, 2)}  # read n + 1, compute n, write n - 1
    written, order = [], []

    def read(n):
        if n - 1 in both:
            both[n - 1].wait()
        return 10 * n

    def compute(value):
        order.append(value)
        if value // 10 in both:
            both[value // 10].wait()
        return value + 1

    def write(n, value):
        if n + 1 in both:
            both[n + 1].wait()
        written.append((n, value))

    assert overlapped(range(4), read, compute, write) == {}
    assert order == [0, 10, 20, 30]
    assert written == [(0, 1), (1, 11), (2, 21), (3, 31)]


def test_errors_of_any_step_are_those_of_their_item_in_order():
    written, count = [], []

    def failing(step, at):
        def function(n, value=None):
            if n % 10 == at:
                raise InputError(f"{step} {n}")
            return n

        return function

    write = failing("write", 1)
    errors = overlapped(
        range(5),
        failing("read", 3),
        failing("compute", 2),
        lambda n, value: written.append(write(n)),
        lambda: count.append(1),
    )
    assert {n: str(error) for n, error in errors.items()} == {1: "write 1", 2: "compute 2", 3: "read 3"}
    assert list(errors) == [1, 2, 3]
    assert written == [0, 4]
    assert len(count) == 5
    assert overlapped([], None, None, None) == {}


def test_at_most_three_items_are_in_memory():
    """One computed, the next read, the last written: the one after is not read before."""
    read, written = [], []

    def compute(n):
        assert max(read) <= n + 1
        assert n - len(written) <= 2
        return n

    assert not overlapped(range(6), lambda n: read.append(n) or n, compute, lambda n, value: written.append(n))
    assert written == list(range(6))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    return make_checkpoint(folder / "base.pt", make_dataset(folder / "data", patients=3))


def test_reduced_precision_is_left_where_its_convolutions_are_wrong(base):
    system, xrays = DirectSystem(base, device="cpu"), torch.rand(1, 2, 64, 64)
    expected = system.predict(xrays)
    fall_back_where_wrong(system)
    assert system.notes == []
    system.precision.name, system.precision.dtype = "bfloat16", torch.bfloat16
    fall_back_where_wrong(system, lambda *call: spoiled("output", *call))
    assert system.precision.name == "float32"
    assert "bfloat16 convolutions are wrong here (output of a" in system.notes[0]
    assert torch.equal(system.predict(xrays), expected)


def test_checked_is_float32_on_a_cpu_and_bfloat16_weights_are_kept(base):
    assert precision_name("checked", torch.device("cpu")) == "float32"
    assert precision_name("auto", torch.device("cpu")) == "auto"
    assert DirectSystem(base, device="cpu", precision="checked").precision.name == "float32"
    system, xrays = DirectSystem(base, device="cpu", precision="bfloat16"), torch.rand(1, 2, 64, 64)
    assert system.model.encoder.stem.weight.dtype == torch.bfloat16
    assert system.model.decoder[0].head.weight.dtype == torch.float32
    volume = system.predict(xrays)
    assert volume.dtype == torch.float32
    assert (volume - DirectSystem(base, device="cpu").predict(xrays)).abs().max() < 0.02
