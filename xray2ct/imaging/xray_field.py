"""The part of the patient that the networks see: a picture cut, padded with air and resized, never stretched."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from xray2ct.files import InputError
from xray2ct.geometry.lifting import averaged_to
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.stored_xray import Exposure
from xray2ct.imaging.xray_scale import AIR

MAX_EDGE = 8192  # pixels; the picture is padded to a square in memory


def fit(path, pixels, outside, exposure, geometry, size, notes) -> tuple[np.ndarray, np.ndarray]:
    """The picture as the network sees it, and how much of each of its pixels the film shows, in [0, 1]; float32 both.

    pixels (H, W), air where ``outside`` (bool). exposure, geometry: see :func:`fit_field`; None leaves the picture
    whole. size: see :func:`fit_size`; None leaves its resolution. notes: what was done is added.
    """
    fitted = []
    for picture, hidden, said in ((pixels, AIR, notes), (np.ones_like(pixels), 0.0, [])):
        picture = np.where(outside, np.float32(hidden), picture)
        if geometry is not None:
            picture = fit_field(path, picture, exposure, geometry, said, hidden)
        if size is not None:
            picture = fit_size(picture, size, said, hidden)
        fitted.append(np.ascontiguousarray(picture, dtype=np.float32))
    return fitted[0], fitted[1]


def fit_field(path, pixels, exposure: Exposure, geometry: Geometry, notes, outside=AIR) -> np.ndarray:
    """Cut or pad the picture (H, W) to a square of what the geometry's detector sees at the isocentre.

    outside: value of what is added.

    The isocentre stands where it does in the geometry, before the detector, unless ``sid_mm`` is known. The rays'
    other slant where the source stood nearer stays: only the scale is made right. Raises :class:`InputError` for a
    spacing that shows far more or less of the patient than the detector.
    """
    wanted, spacing = geometry.detector_mm, exposure.pixel_spacing_mm
    assert wanted is not None
    assert spacing is not None  # known to the caller
    if geometry.kind == "cone":
        assert geometry.sdd_mm is not None
        assert geometry.sid_mm is not None
        wanted *= geometry.sid_mm / geometry.sdd_mm
        if not exposure.spacing_at_patient:
            behind = geometry.sdd_mm - geometry.sid_mm
            sdd = exposure.sdd_mm or geometry.sdd_mm
            sid = exposure.sid_mm or sdd - behind
            if not 0 < sid <= sdd:
                raise InputError(
                    f"{path}: source to detector is {sdd:g} mm; expected more than {behind:g}, or --sid-mm too"
                )
            spacing *= sid / sdd
    edge = round(wanted / spacing)
    if not max(pixels.shape) / 4 <= edge <= min(MAX_EDGE, 4 * max(pixels.shape)):
        seen = " x ".join(f"{n * spacing:.0f}" for n in reversed(pixels.shape))
        raise InputError(
            f"{path}: shows {seen} mm of the patient by its pixel spacing of {exposure.pixel_spacing_mm:g} mm;"
            f" expected about {wanted:.0f} x {wanted:.0f} mm (--pixel-spacing-mm gives another)"
        )
    if pixels.shape != (edge, edge):
        seen = " x ".join(f"{n * spacing:.0f}" for n in reversed(pixels.shape))
        notes.append(f"cut or padded from {seen} mm to the {wanted:.0f} x {wanted:.0f} mm that the model sees")
    return to_edge(pixels, edge, outside)


def to_edge(pixels, edge: int, outside=AIR) -> np.ndarray:
    """Cut or pad both axes about the middle to ``edge`` pixels; what is added has the value ``outside``, else air's."""
    for axis in range(2):
        missing = edge - pixels.shape[axis]
        if missing < 0:
            start = -missing // 2
            pixels = pixels[start : start + edge] if axis == 0 else pixels[:, start : start + edge]
        elif missing:
            padding = [(0, 0), (0, 0)]
            padding[axis] = (missing // 2, missing - missing // 2)
            pixels = np.pad(pixels, padding, constant_values=outside)
    return pixels


def fit_size(pixels, size: int, notes: list[str], outside=AIR) -> np.ndarray:
    """``pixels`` (H, W) padded to a square with air, as ``(size, size)``: averaged by area or interpolated linearly.

    outside: value of the padding instead of air's.
    """
    rows, columns = pixels.shape
    if rows != columns:
        notes.append(f"padded from {columns} x {rows} to a square, not stretched")
        pixels = to_edge(pixels, max(rows, columns), outside)
    if pixels.shape[0] != size:
        notes.append(f"resized from {pixels.shape[1]} x {pixels.shape[0]} to {size} x {size}")
        if pixels.shape[0] > size:
            pixels = averaged_to(torch.from_numpy(np.array(pixels, np.float64))[None, None], (size, size))[0, 0].numpy()
        else:
            picture = Image.fromarray(pixels.astype(np.float32))
            pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
    return pixels
