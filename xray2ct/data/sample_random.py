"""Random numbers of training samples, on any device: each follows from the seed, the name of the draw and an index."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

# SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 2**64 - 1


class SampleRandom:
    """A counter-based generator for a batch: sample b's numbers depend on ``seeds[b]``, the draw's name and the index
    in the draw alone. They are the same whatever the batch, the process, and the order or number of other draws.

    The underlying integers are the same on every device; ``uniform`` is too, ``normal`` within rounding of the
    device's logarithm and cosine.

    seeds: one integer per sample, any size (taken modulo 2^64). Nothing is drawn on the host, and nothing waits for
    the device: the seeds are all that is copied to it.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._seeds = [int(seed) & WORD for seed in seeds]
        words = torch.tensor([_signed(seed) for seed in self._seeds], dtype=torch.int64)
        if self.device.type == "cuda":
            words = words.pin_memory()
        self._words = words.to(self.device, non_blocking=True)

    def __len__(self) -> int:
        return len(self._seeds)

    def uniform(self, name: str, shape: Sequence[int] = (), low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """``(B, *shape)`` float32, uniform in [low, high), with 24 random bits."""
        unit = ((self._bits(name, math.prod(shape)) >> 40) & 0xFFFFFF).float() * 2.0**-24
        return (low + (high - low) * unit).view(len(self), *shape)

    def normal(self, name: str, shape: Sequence[int] = (), std: float = 1.0) -> torch.Tensor:
        """``(B, *shape)`` float32 from N(0, std^2), by the Box-Muller transform: two values per 64 random bits."""
        count = math.prod(shape)
        bits = self._bits(name, (count + 1) // 2)
        # 32 bits each; half a step away from 0, where the logarithm has no value.
        radius = (((bits >> 32) & 0xFFFFFFFF).double() + 0.5).mul_(2.0**-32).float()
        radius = radius.clamp_(max=1.0 - 2.0**-24).log_().mul_(-2.0).sqrt_().mul_(std)
        angle = (bits & 0xFFFFFFFF).float().mul_(2.0**-32 * 2.0 * math.pi)
        pair = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pair[:, :count].reshape(len(self), *shape)

    def on_host(self, name: str, low: float = 0.0, high: float = 1.0) -> list[float]:
        """What ``uniform(name, (), low, high)`` holds, one number per sample, without asking the device."""
        key = _key(name)
        units = [((_mixed(_mixed(seed ^ key) + STEP & WORD) >> 40) & 0xFFFFFF) * 2.0**-24 for seed in self._seeds]
        return [low + (high - low) * unit for unit in units]

    def _bits(self, name: str, count: int) -> torch.Tensor:
        """64 random bits per value, ``(B, count)`` int64."""
        start = _mix(self._words ^ _signed(_key(name)))
        steps = torch.arange(1, count + 1, device=self.device) * _signed(STEP)  # wraps, as the generator does
        return _mix(start[:, None] + steps)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - 2**64 if word >= 2**63 else word


def _mixed(word: int) -> int:
    """SplitMix64's finaliser."""
    word = (word ^ (word >> 30)) * FIRST & WORD
    word = (word ^ (word >> 27)) * SECOND & WORD
    return word ^ (word >> 31)


def _mix(words: torch.Tensor) -> torch.Tensor:
    """:func:`_mixed` of int64 tensors; their right shift copies the sign, which the masks take away."""
    words = (words ^ ((words >> 30) & (2**34 - 1))) * _signed(FIRST)
    words = (words ^ ((words >> 27) & (2**37 - 1))) * _signed(SECOND)
    return words ^ ((words >> 31) & (2**33 - 1))
