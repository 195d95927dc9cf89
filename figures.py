"""Pictures: two X-rays | prediction | truth in three planes, as a radiologist hangs them.

from figures import save_panel
save_panel("case.png", xrays, prediction, target)
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from files import atomic_path
from projector import HU_WINDOW, unit_to_hu

DISPLAY_WINDOW_HU = (-1000.0, 400.0)  # shows lung and soft tissue in one picture
TILE = 256
GAP = 6
CAPTION = 22
BACKGROUND, INK = 16, 225
PLANES = ("axial", "coronal", "sagittal")


def planes(volume: np.ndarray) -> list[np.ndarray]:
    """Middle axial (anterior up), coronal and sagittal (head up, anterior left) slices of ``(D, H, W)``.

    Patient right is on the left in the first two; no turning is needed, the axes are made for it.
    """
    depth, height, width = (n // 2 for n in volume.shape)
    return [volume[depth], volume[:, height], volume[:, :, width]]


def panel(xrays, prediction, target=None, hu_window=HU_WINDOW, title: str = "") -> Image.Image:
    """One case as a picture.

    xrays: ``(2, h, w)`` in [0, 1]. prediction, target: ``(D, H, W)`` in [0, 1] of ``hu_window`` (torch or
    numpy). Columns: an X-ray, axial, coronal, sagittal; first row prediction, second row truth and, below
    it, the absolute difference (white: 500 HU) when there is a target.
    """
    xrays, prediction = _array(xrays), _array(prediction)
    brightest = max(1e-6, float(np.percentile(xrays, 99.8)))
    rows = [("prediction", [_window(s, hu_window) for s in planes(prediction)])]
    if target is not None:
        target = _array(target)
        difference = np.abs(prediction - target) * (hu_window[1] - hu_window[0]) / 500.0
        rows.append(("truth", [_window(s, hu_window) for s in planes(target)]))
        rows.append(("|difference|, white 500 HU", planes(difference)))
    count = max(2, len(rows))
    top = CAPTION if title else 0
    width = GAP + 4 * (TILE + GAP)
    canvas = Image.new("L", (width, top + GAP + count * (TILE + CAPTION + GAP)), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    if title:
        draw.text((GAP, 4), title, fill=INK, font=font)
    for row in range(count):
        y = top + GAP + row * (TILE + CAPTION + GAP)
        if row < 2:
            _paste(canvas, draw, font, (GAP, y), xrays[row] / brightest, ("PA X-ray", "lateral X-ray")[row])
        if row < len(rows):
            name, tiles = rows[row]
            for column, (plane, tile) in enumerate(zip(PLANES, tiles), start=1):
                _paste(canvas, draw, font, (GAP + column * (TILE + GAP), y), tile, f"{name}, {plane}")
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


def _paste(canvas, draw, font, place, tile, caption) -> None:
    grey = Image.fromarray((np.clip(tile, 0, 1) * 255).round().astype(np.uint8))
    canvas.paste(grey.resize((TILE, TILE), Image.Resampling.BICUBIC), place)
    draw.text((place[0] + 2, place[1] + TILE + 2), caption, fill=INK, font=font)
