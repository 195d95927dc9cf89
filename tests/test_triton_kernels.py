"""Whether Triton's kernels can be used is tried, not assumed."""

import pytest
import torch

from tests.helpers.interpreter import check_in_interpreter


def test_a_device_without_a_driver_is_told_once():
    pytest.importorskip("triton")
    from xray2ct.triton_kernels import kernels_work

    kernels_work.cache_clear()
    with pytest.warns(UserWarning, match="Triton kernels do not run on cpu, slower ways are taken"):
        assert not kernels_work(torch.device("cpu"))
    assert not kernels_work(torch.device("cpu"))
    kernels_work.cache_clear()


def test_where_kernels_run_they_are_used():
    check_in_interpreter("""
import torch
from xray2ct.triton_kernels import kernels_work
assert kernels_work(torch.device("cpu"))
print("equal")
""")
