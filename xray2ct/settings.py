"""A setting of a configuration with its limits, for the dataclasses that JSON files and ``--set`` fill."""

from __future__ import annotations

from dataclasses import field


def setting(default, **limits):
    """A field with limits: ``minimum``, ``maximum``, ``between`` (both, in one message) or ``choices``."""
    return field(default=default, metadata=limits)


def span(low: float, high: float):
    """A field for a range that a number is drawn from, ``[low, high]``."""
    return field(default_factory=lambda: [low, high])
