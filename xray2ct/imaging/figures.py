"""Pictures: two X-rays | prediction | truth | difference in three planes, as a radiologist hangs them.

from xray2ct.imaging.figures import save_panel
save_panel("case.png", xrays, prediction, target)
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from xray2ct.files import atomic_path
from xray2ct.geometry.projector import HU_WINDOW, unit_to_hu

DISPLAY_WINDOW_HU = (-1000.0, 400.0)  # shows lung and soft tissue in one picture
DIFFERENCE_HU = 500.0  # shown white
TILE = 256
GAP = 6
CAPTION = 22
BACKGROUND, INK, FAINT = 16, 225, 150
XRAYS = (("PA X-ray", "RL"), ("lateral X-ray", "AP"))  # caption; what lies left and right
PLANES = (("axial", "RL"), ("coronal", "RL"), ("sagittal", "AP"))


def planes(volume: np.ndarray) -> list[np.ndarray]:
    """Middle axial (anterior up), coronal and sagittal (head up, anterior left) slices of ``(D, H, W)``.

    Patient right is on the left in the first two; no turning is needed, the axes are made for it.
    """
    depth, height, width = (n // 2 for n in volume.shape)
    return [volume[depth], volume[:, height], volume[:, :, width]]


def panel(xrays, prediction, target=None, hu_window=HU_WINDOW, title: str = "") -> Image.Image:
    """One case as a grey picture, about 1,200 x 900 pixels with a target and 1,300 x 300 without.

    xrays: ``(2, h, w)`` in [0, 1]. prediction, target: ``(D, H, W)`` in [0, 1] of ``hu_window`` (torch or
    numpy, any size). With a target: the X-rays stacked on the left; prediction, truth and their absolute
    difference (white: 500 HU) in rows of axial, coronal and sagittal. Without: all in one row.
    With a target, ``prediction`` may be a dict of captions and volumes, a row each; the difference is that of the last.
    """
    predictions = prediction if isinstance(prediction, dict) else {"prediction": prediction}
    xrays, predictions = _array(xrays), {name: _array(volume) for name, volume in predictions.items()}
    xrays = xrays / np.percentile(xrays, 99.8, axis=(1, 2), keepdims=True).clip(1e-6)
    rows = [(name, [_window(s, hu_window) for s in planes(volume)]) for name, volume in predictions.items()]
    if target is not None:
        target = _array(target)
        difference = np.abs([*predictions.values()][-1] - target) * (hu_window[1] - hu_window[0]) / DIFFERENCE_HU
        rows.append(("truth", [_window(s, hu_window) for s in planes(target)]))
        rows.append((f"difference (white: {DIFFERENCE_HU:g} HU)", planes(difference)))
    line = TILE + CAPTION + GAP
    edge = TILE if len(rows) == 1 else len(rows) * line // 2 - CAPTION - GAP  # two X-rays fill the rows' height
    top, left = GAP + (CAPTION if title else 0), GAP + (edge + GAP) * (2 if len(rows) == 1 else 1)
    canvas = Image.new("L", (left + 3 * (TILE + GAP), top + len(rows) * line), BACKGROUND)
    ImageDraw.Draw(canvas).text((GAP, GAP), title, fill=INK, font=ImageFont.load_default(size=16))
    for view, (caption, sides) in enumerate(XRAYS):
        corner = (GAP + view * (TILE + GAP), top) if len(rows) == 1 else (GAP, top + view * (edge + CAPTION + GAP))
        _paste(canvas, corner, edge, xrays[view], caption, sides)
    for row, (name, slices) in enumerate(rows):
        for column, (tile, (plane, sides)) in enumerate(zip(slices, PLANES)):
            _paste(canvas, (left + column * (TILE + GAP), top + row * line), TILE, tile, f"{name}, {plane}", sides)
    return canvas


def save_panel(path, xrays, prediction, target=None, hu_window=HU_WINDOW, title: str = "") -> None:
    """Write :func:`panel` as PNG, atomically."""
    picture = panel(xrays, prediction, target, hu_window, title)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def _array(value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, dtype=np.float32)


def _window(unit, hu_window):
    low, high = DISPLAY_WINDOW_HU
    return (unit_to_hu(unit, hu_window) - low) / (high - low)


def _paste(canvas, corner, edge, tile, caption, sides) -> None:
    """Draw one square tile with its caption below and its sides' letters in the upper corners."""
    grey = Image.fromarray((np.clip(tile, 0, 1) * 255).round().astype(np.uint8))
    canvas.paste(grey.resize((edge, edge), Image.Resampling.BICUBIC), corner)
    draw, font, (x, y) = ImageDraw.Draw(canvas), ImageFont.load_default(size=14), corner
    draw.text((x + 2, y + edge + 2), caption, fill=INK, font=font)
    for left, side, anchor in ((x + 6, sides[0], "la"), (x + edge - 6, sides[1], "ra")):
        draw.text((left, y + 4), side, FAINT, font, anchor, stroke_width=1, stroke_fill=0)
