"""Counting of the operators that code calls, forward and backward, and of those that wait for the device."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The host reads a value of the device: .item(), float(), bool() and `if` (one operator), and shapes that depend on
# values. On a GPU each waits for everything queued before it.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}
COPYING = {"aten::_to_copy", "aten::clone", "aten::copy_"}  # casts, devices, layouts


class OperatorCounter(TorchDispatchMode):
    """Within the block, counts operators by name (``"aten::_to_copy"``) in :attr:`counts`.

    waiting: names of those that make the host wait, in order: reads of values, indexing by a boolean tensor, and
    copies between devices (to the CPU, and to another device unless ``non_blocking``). All but the copies show with
    tensors on the CPU as well. ``torch.tensor(list, device=...)`` hides its copy from any such count:
    ``torch.cuda.set_sync_debug_mode`` finds it.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.counts[name] += 1
        if name in WAITING or _by_mask(name, args):
            self.waiting.append(name)
        result = func(*args, **(kwargs or {}))
        between = name == "aten::_to_copy" and args[0].device.type != result.device.type
        if between and (result.device.type == "cpu" or not kwargs.get("non_blocking")):
            self.waiting.append(f"aten::_to_copy to {result.device}")
        return result

    @property
    def copies(self) -> dict[str, int]:
        """How often each operator of :data:`COPYING` was called."""
        return {name: self.counts[name] for name in sorted(COPYING)}


def _by_mask(name: str, args) -> bool:
    """Whether elements are chosen by a boolean tensor: how many, only the device knows."""
    indices = args[1] if name in ("aten::index", "aten::index_put_", "aten::index_put") else ()
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
