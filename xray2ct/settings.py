"""A setting of a configuration with its limits, for the dataclasses that JSON files and ``--set`` fill."""

from __future__ import annotations

from dataclasses import field


def setting(default, **limits):
    """A field with limits: ``minimum``, ``maximum``, ``between`` (both, in one message) or ``choices``."""
    return field(default=default, metadata=limits)
