"""Free memory of a device, and what stage 2 can do with it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from model_enhanced import RefinementNetwork

TILES = (48, 32, 24, 16, 8)  # coarse voxels; below 8 the overlap is most of the work
SHARE = 0.6  # of the free memory that a tile may take: allocators and other processes need some
UNKNOWN = 4 * 2**30  # assumed where the system does not report it


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``; 4 GiB where the system does not report it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [limit for limit in (_system_available(), _container_available()) if limit is not None]
    return min(known, default=UNKNOWN)


def process_peak_bytes() -> int | None:
    """Largest resident size of this process so far; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _system_available() -> int | None:
    """``MemAvailable`` of Linux: free memory and what caches would give back."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return values[0] if values else None


def _container_available() -> int | None:
    """What is left of a container's limit (cgroup v2, then v1)."""
    root = Path("/sys/fs/cgroup")
    version_1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, used in (("memory.max", "memory.current"), version_1):
        try:
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # absent, or "max": no limit
            continue
    return None


def head_bytes(network: RefinementNetwork, window: int, element_size: int = 4) -> int:
    """Peak bytes of the head on ``window``^3 coarse voxels without gradients (estimate, from above)."""
    _, c2, c4 = network.settings["head_channels"]
    g4 = network.settings["guide_channels"][2] if network.settings["guided"] else 0
    at_2x = 8 * (3 * c2 + 2 * (c2 + 8 * g4) + 8 * c4)
    at_4x = 64 * 8 * g4 + 64 * 4  # two views, product, their concatenation, fused; base, detail, sum, result
    return (at_2x + at_4x) * window**3 * element_size


def choose_tile(network: RefinementNetwork, size, device: torch.device, element_size: int = 4) -> int | None:
    """Largest tile (coarse voxels) of a volume of ``size`` that fits the free memory; None: no tiles needed."""
    budget = SHARE * available_memory(device)
    if head_bytes(network, max(size), element_size) <= budget:
        return None
    for tile in TILES:
        if tile < max(size) and head_bytes(network, tile + 2 * network.halo, element_size) <= budget:
            return tile
    return TILES[-1]
