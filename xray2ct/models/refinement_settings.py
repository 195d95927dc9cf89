"""The settings that give stage 2's network its shape, checked."""

from __future__ import annotations

from xray2ct.files import InputError, whole_number, whole_numbers
from xray2ct.models.blocks import check_stem_stride, checked_width

STARTS = ("trilinear", "cubic")  # what details are added to; the first is that of weights which name none


def checked_refinement(settings: dict) -> dict:
    """Stage 2's settings with lists for tuples; :class:`InputError` naming the one that it cannot have."""
    settings = {"start": STARTS[0], **settings}  # weights of earlier versions do not name it
    for name in ("channels", "growth", "rrdb_blocks"):
        whole_number(f"model.{name}", settings[name], 1)
    check_stem_stride(settings["stem_stride"])
    if settings["start"] not in STARTS:
        raise InputError(f"model.start is {settings['start']!r}; expected {' or '.join(STARTS)}")
    lists = {name: whole_numbers(f"model.{name}", settings[name], 3, 1) for name in ("head_channels", "guide_channels")}
    widths = whole_numbers("model.guide_widths", settings["guide_widths"], 4, 1)
    for index, width in enumerate(widths):
        checked_width(f"model.guide_widths[{index}]", width)
    return {**settings, **lists, "guide_widths": widths}
