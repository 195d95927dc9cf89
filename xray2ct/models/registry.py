"""The networks by the kind of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

KIND = "enhanced_direct"
REFINEMENT_KIND = "refinement"
NETWORKS: dict[str, type[nn.Module]] = {}

Network = TypeVar("Network", bound=type[nn.Module])


def register(kind: str) -> Callable[[Network], Network]:
    """Class decorator: checkpoints of this kind are loaded into that network."""

    def add(network: Network) -> Network:
        NETWORKS[kind] = network
        return network

    return add
