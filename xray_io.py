"""Reading and writing X-ray pictures: any common format to float32 in [0, 1], attenuation bright (bone white).

    from xray_io import check_views, read_xray, write_png16
    pa = read_xray("ID_pa_drr.png", size=512)
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from files import atomic_path


def write_png16(path: str | os.PathLike, image01) -> None:
    """Write ``image01`` ``(H, W)`` as 16-bit grey PNG, atomically: pixel = round(65535 * clip(value, 0, 1)).

    Raises ``ValueError`` on another shape, NaN or infinity.
    """
    pixels = np.asarray(image01, dtype=np.float64)
    if pixels.ndim != 2:
        raise ValueError(f"{path}: X-ray has shape {pixels.shape}; expected (H, W)")
    if not np.isfinite(pixels).all():
        raise ValueError(f"{path}: X-ray contains NaN or infinity")
    pixels = np.rint(65535.0 * pixels.clip(0.0, 1.0)).astype(np.uint16)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
