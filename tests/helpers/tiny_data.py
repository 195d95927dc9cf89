"""A tiny prepared data set and a tiny stage-1 checkpoint for the tests, made in about a second.

    root = make_dataset(tmp_path / "data")              # patients p0 ... p5: train p0-p2, val p3, test p4, p5
    base = make_checkpoint(tmp_path / "base.pt", root)  # 16^3, input-dependent predictions

The layout is that of prepare_data.py, the anatomy asymmetric in all three axes.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch

from dataset import PatientDataset
from model_enhanced import EnhancedDirectModel, RefinementNetwork
from xray2ct.checkpoints import save_checkpoint, weights_fingerprint
from xray2ct.files import read_json, write_json
from xray2ct.geometry.projector import HU_WINDOW, MU_WATER, XRAY_SCALE, Geometry, hu_to_unit, render_xrays
from xray2ct.imaging.cube import cube_affine
from xray2ct.imaging.cube_files import write_cube
from xray2ct.imaging.read_xray import write_png16
from xray2ct.models.loading import load_base_model
from xray2ct.models.registry import KIND, REFINEMENT_KIND
from xray2ct.training.config import EnhancedConfig, config_dict

TINY_MODEL = {
    "volume_size": [16, 16, 16],
    "base_channels": 16,
    "xray_size": 64,
    "stem_stride": 1,
    "encoder_blocks": [1, 1, 1, 1],
    "decoder_blocks": [1, 1, 1],
    "transformer_blocks": 1,
}

# (z, y, x) centre and half-axes in mm (z down, y back, x towards the patient's left) and HU; later ones
# overwrite earlier ones. Heart on the left, liver under the right lung, spine at the back.
ORGANS = (
    ((0, 5, 0), (400, 105, 150), 40),  # body, cut by the top and bottom of the cube
    ((-20, 0, -75), (115, 75, 50), -850),  # right lung
    ((-10, 5, 75), (125, 75, 45), -850),  # left lung
    ((110, -10, -60), (55, 80, 80), 60),  # liver
    ((40, -30, 35), (55, 45, 50), 45),  # heart
    ((0, 85, 0), (400, 18, 20), 400),  # spine
)


def make_hu(seed: int, size: int = 64, fov_mm: float = 360.0) -> np.ndarray:
    """A thorax of ellipsoids: int16 HU ``(size, size, size)``, axes (D, H, W); varies with ``seed``."""
    random = np.random.default_rng(seed)
    axis = ((np.arange(size) + 0.5) / size - 0.5) * fov_mm
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij", sparse=True)
    hu = np.full((size, size, size), -1000.0)
    whole = random.uniform(0.9, 1.05)
    for centre, half_axes, value in ORGANS:
        cz, cy, cx = np.array(centre) * whole + random.uniform(-6, 6, 3)
        az, ay, ax = np.array(half_axes) * whole * random.uniform(0.92, 1.08, 3)
        inside = ((z - cz) / az) ** 2 + ((y - cy) / ay) ** 2 + ((x - cx) / ax) ** 2 < 1
        hu[inside] = value + random.uniform(-15, 15)
    return np.rint(hu + random.normal(0, 10, hu.shape)).clip(-1024, 3071).astype(np.int16)


def make_dataset(root, patients: int = 6, cube_size: int = 64, xray_size: int = 64, geometry=None) -> Path:
    """Write a prepared data set; about half of the patients train, a sixth validates, a third tests.

    Every second patient's scan ends before the cube does: air above it and a scan mask with zeros.
    """
    root, geometry = Path(root), geometry or Geometry()
    ids = [f"p{i}" for i in range(patients)]
    tests, vals = max(1, patients // 3), max(1, patients // 6)
    train = patients - tests - vals
    split = {"train": ids[:train], "val": ids[train : train + vals], "test": ids[train + vals :]}
    manifest = {
        "format_version": 1,
        "geometry": geometry.to_dict(),
        "hu_window": list(HU_WINDOW),
        "mu_water": MU_WATER,
        "xray_scale": XRAY_SCALE,
        "cube_size": cube_size,
        "xray_size": xray_size,
        "couch_removed": False,
        "assume_ras": False,
        "split": split,
        "split_method": "file",
        "patients": {p: write_patient(root, p, i, cube_size, xray_size, geometry) for i, p in enumerate(ids)},
    }
    write_json(root / "dataset.json", manifest)
    manifest["split_hash"] = PatientDataset(root, "all", cube_size, None).split_hash
    write_json(root / "dataset.json", manifest)
    return root


def write_patient(root: Path, patient: str, seed: int, cube_size: int, xray_size: int, geometry) -> dict:
    """Write one patient folder; returns its manifest entry."""
    hu, mask = make_hu(seed, cube_size, geometry.fov_mm), np.ones((cube_size,) * 3, np.uint8)
    if seed % 2:
        hu[: cube_size // 8], mask[: cube_size // 8] = -1024, 0
    volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32)))[None, None]
    pa, lateral = render_xrays(volume, geometry, (xray_size, xray_size))[0].numpy()
    folder, centre = root / patient, (10.0 * seed, -20.0, 30.0)
    affine = cube_affine(centre, geometry.fov_mm, cube_size)
    write_cube(folder / f"{patient}.nii.gz", hu, affine)
    write_cube(folder / f"{patient}_mask.nii.gz", mask, affine)
    write_png16(folder / f"{patient}_pa_drr.png", pa)
    write_png16(folder / f"{patient}_lat_drr.png", lateral)
    return {
        "source": f"{patient}.nii.gz",
        "centre_mm": list(centre),
        "scan_fraction": round(float(mask.mean()), 4),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
    }


def make_model(seed: int = 0, geometry=None, **settings) -> EnhancedDirectModel:
    """A tiny model in eval mode; its zero-initialised layers are drawn too, so that the X-rays matter."""
    torch.manual_seed(seed)
    model = EnhancedDirectModel(**{**TINY_MODEL, **settings}, geometry=geometry)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def make_checkpoint(path, root, model: EnhancedDirectModel | None = None, settings=None, **changes) -> Path:
    """Save ``model`` (default: :func:`make_model`) as a checkpoint that fits the data set ``root``.

    settings: changes to ``TINY_MODEL``. changes: other values of header keys (``epoch=7``).
    """
    settings = {**TINY_MODEL, **(settings or {})}
    data = PatientDataset(root, "train", read_json(Path(root) / "dataset.json")["cube_size"], None)
    model = model or make_model(geometry=data.geometry, **settings)
    checkpoint = {
        "kind": KIND,
        "model_state_dict": model.state_dict(),
        "model_config": settings,
        "config": {**config_dict(EnhancedConfig()), "model": settings},
        "geometry": data.geometry.to_dict(),
        "hu_window": list(data.hu_window),
        "xray_scale": data.xray_scale,
        "xray_size": settings["xray_size"],
        "epoch": 3,
        "step": 12,
        "metrics": {"psnr": 20.0},
        "split_hash": data.split_hash,
        "train_patients": list(data.ids),
    }
    save_checkpoint(path, {**checkpoint, **changes})
    return Path(path)


def largest_difference(one, other) -> float:
    """Largest difference of two nested values of tensors and plain types; infinite where more than numbers differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return max(map(largest_difference, one, other), default=0.0)
    if torch.is_tensor(one) and torch.is_tensor(other) and one.shape == other.shape:
        difference = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        return difference if math.isfinite(difference) else math.inf
    if isinstance(one, int | float) and isinstance(other, int | float):
        return float(abs(one - other))
    if torch.is_tensor(one) or torch.is_tensor(other):
        return math.inf
    return 0.0 if one == other else math.inf


TINY_REFINEMENT = {
    "guided": True,
    "channels": 8,
    "growth": 4,
    "rrdb_blocks": 1,
    "head_channels": [8, 6, 2],
    "guide_widths": [8, 8, 16, 16],
    "guide_channels": [2, 2, 2],
    "xray_size": 64,
    "stem_stride": 1,
}


def make_refinement_checkpoint(path, root, base, settings=None, **changes) -> Path:
    """Save a tiny stage 2 that fits the data set ``root`` and the stage-1 checkpoint ``base``; it changes its input.

    settings: changes to ``TINY_REFINEMENT``. changes: other values of header keys.
    """
    settings = {**TINY_REFINEMENT, **(settings or {})}
    model, header = load_base_model(base)
    torch.manual_seed(7)
    network = RefinementNetwork(**settings, geometry=model.geometry)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    checkpoint = {
        "kind": REFINEMENT_KIND,
        "refinement_state_dict": network.state_dict(),
        "refinement_config": settings,
        **{key: header[key] for key in ("geometry", "hu_window", "xray_scale", "split_hash", "train_patients")},
        "xray_size": settings["xray_size"],
        "coarse_size": list(model.volume_size),
        "base_fingerprint": weights_fingerprint(model.state_dict()),
        "base_epoch": header["epoch"],
        "epoch": 2,
    }
    save_checkpoint(path, {**checkpoint, **changes})
    return Path(path)
