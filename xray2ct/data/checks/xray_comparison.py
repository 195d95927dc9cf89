"""Does an X-ray show its volume? If not, what was done to it: mirrored, turned, swapped, rescaled, another geometry?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from xray2ct.conventions import VIEW_LABELS
from xray2ct.data.checks.findings import FAILED, OK, UNKNOWN
from xray2ct.geometry.projector import Geometry, render_xrays

# 1 - correlation of stored and re-rendered X-ray. Seen: 7e-5 at most where they belong together (the render is
# coarser), 6e-4 at least with the source 300 mm nearer; a mirrored one at most 0.97 correlation.
SAME_XRAY = 3e-4
SAME_XRAY_COARSE = 2e-3  # at 64 pixels, or where a part of the pixels is saturated
FOREIGN_XRAY = 0.1  # without a manifest: another renderer, or a real X-ray
# How far the control of a comparison is misplaced: where it fits as well, a high correlation says little.
CONTROL_MM, CONTROL_DEGREES = 5.0, 5.0
GAIN_TOLERANCE, OFFSET_TOLERANCE = 0.01, 0.004  # seen: 0.002 and 0.0003


def compare_xray(stored: np.ndarray, rendered: np.ndarray, view: int, linear: bool = True) -> tuple[str, str]:
    """Does a stored picture show its volume, and if not, what was done to it?

    stored: (n, n). rendered: (2, n, n), both views from the volume. view: the one ``stored`` should be (0 PA,
    1 lateral). linear: the pictures come from prepare_data.py, so brightness must fit too; otherwise only a
    turned or swapped view is a failure. Returns ``(status, what is wrong)``, ``("failed", "")`` for no known cause.
    """
    if stored.std() < 1e-6:
        return FAILED, "the picture is constant"
    if not linear:  # films have display curves
        stored, rendered = _ranks(stored), [_ranks(image) for image in rendered]
    own, same = ncc_distance(stored, rendered[view]), SAME_XRAY if linear else FOREIGN_XRAY
    candidates = [(ncc_distance(stored, image), name, image) for name, image in _transforms(rendered, view)]
    distance, transform, image = min(candidates, key=lambda candidate: candidate[0])
    if own <= same and not distance < 0.25 * own:
        text = _name_brightness(stored, rendered[view]) if linear else ""
        return (FAILED, text) if text else (OK, "")
    if distance <= same and distance < 0.25 * own:
        text = _name_brightness(stored, image) if linear else ""
        return FAILED, "; ".join([transform, text] if text else [transform])
    if not linear:
        return UNKNOWN, f"correlation with the picture rendered from the volume is only {1 - own:.2f}"
    if ncc_distance(_ranks(stored), _ranks(rendered[view])) <= SAME_XRAY_COARSE:
        return FAILED, "brightness changed non-linearly (gamma, or the logarithm not taken)"
    open_pixels = (stored > 0.004) & (stored < 0.996)
    if open_pixels.mean() > 0.1 and ncc_distance(stored[open_pixels], rendered[view][open_pixels]) <= SAME_XRAY_COARSE:
        return FAILED, "brightness rescaled and clipped (a stretched window)"
    return FAILED, ""


def ncc(one, other) -> float:
    """Normalised cross-correlation of two arrays of one size, -1 to 1; 0 where one is constant."""
    one, other = (np.asarray(array, dtype=np.float64).ravel() for array in (one, other))
    one, other = one - one.mean(), other - other.mean()
    norm = np.sqrt((one @ one) * (other @ other))
    return 0.0 if norm < 1e-12 else float(one @ other) / norm


def ncc_distance(one, other) -> float:
    """1 - |NCC| of two arrays of one size, 0 to 1: blind to gain, offset and inversion."""
    return 1.0 - abs(ncc(one, other))


def _transforms(rendered, view) -> Iterable[tuple[str, np.ndarray]]:
    """(name, picture) for everything a view may be mistaken for: mirrored, turned, the other view."""
    names = {
        (0, False): "",
        (1, False): "rotated by 90 degrees anticlockwise",
        (2, False): "rotated by 180 degrees",
        (3, False): "rotated by 90 degrees clockwise",
        (0, True): "mirrored left-right",
        (1, True): "rotated by 90 degrees and mirrored",
        (2, True): "upside down (mirrored top to bottom)",
        (3, True): "rotated by 90 degrees and mirrored (transposed)",
    }
    for other, (turns, mirrored) in product((False, True), names):
        image = rendered[1 - view if other else view]
        image = np.rot90(image[:, ::-1] if mirrored else image, turns)
        words = [f"views swapped: this is the {VIEW_LABELS[1 - view]} view"] if other else []
        words += [names[turns, mirrored]] if names[turns, mirrored] else []
        if words:
            yield ", ".join(words), image


def _name_brightness(stored, rendered) -> str:
    """Empty where ``stored`` is ``rendered`` in its own scale."""
    gain, offset = (float(v) for v in np.polyfit(rendered.ravel(), stored.ravel(), 1))
    if abs(gain - 1) <= GAIN_TOLERANCE and abs(offset) <= OFFSET_TOLERANCE:
        return ""
    if gain < 0:
        return f"inverted (gain {gain:.3f}, offset {offset:+.3f})"
    # Half-way between the pooled extremes and 0 or 1 is close enough: pooling takes the edge off single pixels.
    if stored.min() < 0.01 and stored.max() > 0.97 and rendered.max() < 0.95:
        return f"brightness stretched to its own minimum and maximum (gain {gain:.3f}, offset {offset:+.3f})"
    if abs(offset) <= OFFSET_TOLERANCE:
        return f"brightness rescaled by a gain of {gain:.3f}"
    return f"brightness changed: gain {gain:.3f}, offset {offset:+.3f}"


def _ranks(image) -> np.ndarray:
    """Ranks of the pixels above air, equal values sharing one: what survives any monotone change of brightness."""
    _, inverse, counts = np.unique(np.round(image, 3), return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    return middle[inverse.reshape(image.shape)]


def name_geometry(stored, rendered, others, view) -> tuple[bool, str]:
    """Another acquisition geometry that explains the picture, if one does: ``(sure, what is wrong)``."""
    size = others[0][1].shape[-1]
    picture, exact = resize(stored, size), size == stored.shape[0]
    own = ncc_distance(picture, resize(rendered[view], size))
    distance, name = min((ncc_distance(picture, images[view]), name) for name, images in others)
    if distance <= (SAME_XRAY if exact else SAME_XRAY_COARSE) and distance < 0.25 * own:
        return True, f"another geometry than the manifest's: fits {name}"
    if distance < 0.005 and distance < 0.25 * own:
        return False, f"another geometry than the manifest's, near {name}"
    if own > 0.03:
        return False, f"does not show this volume (correlation {1 - own:.2f}): another patient's, or edited"
    return False, f"does not match the volume (correlation {1 - own:.4f}): edited, or another geometry"


def other_geometries(unit, settings) -> Iterable[tuple[str, np.ndarray]]:
    """(name, both views (2, n, n)) of the volume in geometries that are easily taken for the manifest's."""
    own, unit = settings.geometry, resize(unit, max(32, unit.shape[0] // 2))  # coarse: sixteen renders
    exchanged = render(unit[:, ::-1], own, settings)[0], render(unit[:, :, ::-1], own, settings)[1]
    yield "the same with source and detector exchanged", np.stack(exchanged)
    variants = {"parallel rays": Geometry("parallel", own.fov_mm)} if own.kind != "parallel" else {}
    for sdd, sid in ((1800, 1600), (1800, 1400), (1500, 1300), (1200, 1000), (1000, 750)):
        geometry = Geometry("cone", own.fov_mm, sdd, sid)
        if geometry != own:
            variants[str(geometry)] = geometry
    for zoom in (0.8, 0.85, 8 / 9, 0.95, 1.05, 1.125, 1.2, 1.3):
        geometry = replace(own, detector_mm=own.detector_mm * zoom)
        variants[f"a detector of {geometry.detector_mm:.0f} mm instead of {own.detector_mm:.0f} mm"] = geometry
    for name, geometry in variants.items():
        yield name, render(unit, geometry, settings)


def render(unit, geometry, settings) -> np.ndarray:
    """Both views of a cube (n, n, n) in [0, 1]: (2, n, n), clipped to [0, 1] as stored pictures are."""
    volume = torch.from_numpy(np.ascontiguousarray(unit, dtype=np.float32))[None, None]
    with torch.inference_mode():
        images = render_xrays(volume, geometry, unit.shape[:2], settings.hu_window, settings.xray_scale)
    return images[0].clip(0, 1).numpy()


def resize(array, size) -> np.ndarray:
    """Area average (or nearest where it does not divide) over the last axes to ``size`` cells each."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.ndim == 3 and array.shape[0] == array.shape[2]:
        return torch.nn.functional.adaptive_avg_pool3d(tensor[None, None], size)[0, 0].numpy()
    return torch.nn.functional.adaptive_avg_pool2d(tensor[None], size)[0].numpy()
