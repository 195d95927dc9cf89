"""Register the training patients of a data set with one of them: the deformations that anatomy mixing draws from.

    python -m tools.register_patients --data data --output anatomy.npz
    python train_enhanced_4gpu.py --data data --set augment.anatomy.file=anatomy.npz

Affine registration, then diffeomorphic demons (Vercauteren et al., NeuroImage 45, 2009) by SimpleITK (pip install
'xray2ct[xray]') at 64^3, on one thread, so that a second run gives the same numbers. Demons know no masks: beyond a
scan's end the patient's volume is the reference's as it is warped so far, which exerts no force.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from dataset import PatientDataset
from xray2ct.command_line import Parser
from xray2ct.data.anatomy import save_deformations
from xray2ct.files import InputError, check_writable, run_cli
from xray2ct.geometry.projector import hu_to_unit
from xray2ct.imaging.optional import import_sitk
from xray2ct.metrics import psnr
from xray2ct.training.run_identity import data_header

SEEN_HU = (-1000.0, 200.0)  # contrast agent and dense bone pull no tissue along
LUNG_HU = (-950.0, -500.0)  # for the Dice coefficient
COVERED = 0.95  # share of the cube that a reference's scan covers, at least
LEVELS = ((4, 30), (2, 30), (1, 20))  # shrink factor and iterations, coarse to fine
ROUNDS = 3  # of each level, between which a scan's end is filled anew
SIGMA = 1.5  # voxels: Gaussian that smooths the displacement after each iteration
LATTICE_SIGMA = 1.0  # voxels: before it is stored at fewer points


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="prepared data set; its training patients are read")
    parser.add_argument("--output", type=Path, default=Path("anatomy.npz"), help="file (default %(default)s)")
    parser.add_argument("--reference", metavar="ID", help="training patient (default: the one most like their mean)")
    parser.add_argument("--size", type=int, default=64, help="voxels per axis to register (default %(default)s)")
    parser.add_argument("--points", type=int, default=16, help="points per axis that are stored (default %(default)s)")
    parser.add_argument("--max-patients", type=int, help="the first so many")
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    args = parser.parse_args(argv)
    if args.size < 16 or args.size % 8:
        raise InputError(f"--size is {args.size}; expected a multiple of 8, at least 16")
    if not 4 <= args.points <= args.size:
        raise InputError(f"--points is {args.points}; expected 4 to {args.size}")
    if args.max_patients is not None and args.max_patients < 3:
        raise InputError(f"--max-patients is {args.max_patients}; expected at least 3")
    check_writable(args.output, "--output")
    return args


# ------------------------------------------------------------------------------------------------
# Registration of two volumes


def register(sitk, fixed: np.ndarray, mask: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Displacement ``(D, H, W, 3)`` (x, y, z in voxels): ``moving`` at x + displacement(x) looks as ``fixed`` at x.

    Volumes ``(D, H, W)`` float32; mask: 1 where ``fixed`` was scanned.
    """
    target, source = (sitk.GetImageFromArray(v.astype(np.float32)) for v in (fixed, moving))
    scanned = sitk.GetImageFromArray(mask.astype(np.uint8))
    whole = _affine(sitk, target, scanned, source)
    field = sitk.TransformToDisplacementField(
        whole, sitk.sitkVectorFloat64, target.GetSize(), target.GetOrigin(), target.GetSpacing(), target.GetDirection()
    )
    for shrink, iterations in LEVELS:
        for _ in range(ROUNDS):
            warped = _warped(sitk, source, field)
            filled = sitk.Mask(target, scanned) + sitk.Mask(warped, scanned == 0)
            demons = sitk.DiffeomorphicDemonsRegistrationFilter()
            demons.SetNumberOfIterations(iterations)
            demons.SetSmoothDisplacementField(True)
            demons.SetStandardDeviations(SIGMA)
            images = [_shrunk(sitk, image, shrink) for image in (filled, source)]
            start = sitk.Resample(field, images[0])
            field = sitk.Resample(demons.Execute(*images, start), target)
            # Beyond the outermost cells of a coarse level a resampled field is 0, not its border's value.
            field = _with_border(sitk, field, shrink)
    return sitk.GetArrayFromImage(field)


def _affine(sitk, fixed, mask, moving):
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetMetricFixedMask(mask)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100, relaxationFactor=0.5)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2, 1])
    start = sitk.AffineTransform(3)
    start.SetCenter([(n - 1) / 2 for n in fixed.GetSize()])
    method.SetInitialTransform(start)
    return method.Execute(fixed, moving)


def _shrunk(sitk, image, factor: int):
    return image if factor == 1 else sitk.BinShrink(image, [factor] * 3)


def _warped(sitk, image, field):
    transform = sitk.DisplacementFieldTransform(sitk.Image(field))
    return sitk.Resample(image, image, transform, sitk.sitkLinear, 0.0)


def _with_border(sitk, field, shrink: int):
    """The field with its outermost voxels, which a level of ``shrink`` does not reach, as the nearest ones inside."""
    rim = shrink // 2
    if not rim:
        return field
    inside = sitk.GetArrayFromImage(field)[rim:-rim, rim:-rim, rim:-rim]
    padded = sitk.GetImageFromArray(np.pad(inside, [(rim, rim)] * 3 + [(0, 0)], mode="edge"), isVector=True)
    padded.CopyInformation(field)
    return padded


def warp(volume: np.ndarray, field: np.ndarray) -> np.ndarray:
    """A volume ``(D, H, W)`` at x + field(x), field as :func:`register` gives it; beyond the cube its border."""
    size = volume.shape[0]
    axis = torch.arange(size, dtype=torch.float64)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    places = torch.stack([x, y, z], dim=-1) + torch.from_numpy(field)
    grid = (2 * places + 1) / size - 1
    sampled = F.grid_sample(
        torch.from_numpy(volume)[None, None].double(), grid[None], align_corners=False, padding_mode="border"
    )
    return sampled[0, 0].float().numpy()


# ------------------------------------------------------------------------------------------------
# Patients


def read_patients(data: PatientDataset) -> tuple[np.ndarray, np.ndarray]:
    """Volumes in [0, 1] and scan masks of all patients, ``(N, D, H, W)`` float32."""
    items = [data[index] for index in tqdm(range(len(data)), desc="Reading patients", leave=False)]
    return tuple(np.stack([item[name][0].numpy() for item in items]) for name in ("ct_volume", "mask"))


def choose_reference(volumes: np.ndarray, masks: np.ndarray) -> int:
    """Index of the patient most like the mean (least mean squared difference) among those scanned over the cube."""
    mean = (volumes * masks).sum(0) / masks.sum(0).clip(1)
    error = ((volumes - mean) ** 2 * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))
    share = masks.mean((1, 2, 3))
    candidates = np.flatnonzero(share >= min(COVERED, share.max()))
    return int(candidates[error[candidates].argmin()])


def agreement(fixed: np.ndarray, mask: np.ndarray, moving: np.ndarray, window) -> tuple[float, float]:
    """PSNR in dB (peak 1) and the lungs' Dice coefficient (by thresholds) where ``fixed`` was scanned."""
    inside = mask > 0
    low, high = (float(v) for v in hu_to_unit(np.array(LUNG_HU), window))
    lungs = [(v[inside] > low) & (v[inside] < high) for v in (fixed, moving)]
    dice = 2 * (lungs[0] & lungs[1]).sum() / max(1, lungs[0].sum() + lungs[1].sum())
    return psnr(*map(torch.from_numpy, (moving, fixed, mask))), float(dice)


def to_lattice(field: np.ndarray, points: int) -> np.ndarray:
    """A field ``(D, H, W, 3)`` in voxels at ``points`` per axis from face to face, in half edges: ``(3, n, n, n)``."""
    smooth = gaussian_filter(field, (LATTICE_SIGMA,) * 3 + (0,), mode="nearest") * (2.0 / field.shape[0])
    moved = torch.from_numpy(np.moveaxis(smooth, -1, 0).copy())[None]
    return F.interpolate(moved, size=(points,) * 3, mode="trilinear", align_corners=True)[0].numpy()


def from_lattice(moved: np.ndarray, size: int) -> np.ndarray:
    """:func:`to_lattice` backwards: what training makes of the stored points."""
    field = F.interpolate(torch.from_numpy(moved)[None], size=(size,) * 3, mode="trilinear", align_corners=True)[0]
    return np.moveaxis(field.numpy(), 0, -1) * (size / 2.0)


def without_shift(fields: np.ndarray) -> np.ndarray:
    """Fields ``(N, 3, n, n, n)`` without their mean over the cube: where a patient lies in it is no anatomy."""
    return fields - fields.mean((2, 3, 4), keepdims=True)


def principal_components(fields: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(mean, components, shares)`` of fields ``(N, ...)``: N - 1 components, each times its standard deviation.

    shares: of the whole variance, largest first.
    """
    mean = fields.mean(0)
    flat = (fields - mean).reshape(len(fields), -1)
    _, sizes, directions = np.linalg.svd(flat, full_matrices=False)
    sizes, directions = sizes[: len(fields) - 1], directions[: len(fields) - 1]
    deviations = sizes / np.sqrt(len(fields) - 1)
    return mean, (deviations[:, None] * directions).reshape(-1, *fields.shape[1:]), sizes**2 / (sizes**2).sum()


def explained_when_left_out(fields: np.ndarray) -> float:
    """Share of a patient's deviation from the others' mean that the others' components span, over all patients."""
    flat = fields.reshape(len(fields), -1)
    whole = rest = 0.0
    for index in range(len(flat)):
        others = np.delete(flat, index, axis=0)
        deviation = flat[index] - others.mean(0)
        basis = np.linalg.qr((others[:-1] - others.mean(0)).T)[0]
        whole += (deviation**2).sum()
        rest += ((deviation - basis @ (basis.T @ deviation)) ** 2).sum()
    return 1.0 - rest / whole


def described(scores) -> str:
    """Before, after registration, and by the stored points: three pairs of PSNR and Dice."""
    psnrs, dices = zip(*scores)
    values = [" -> ".join(format(v, f".{digits}f") for v in row) for row, digits in ((psnrs, 1), (dices, 2))]
    return f"PSNR {values[0]} dB, Dice of the lungs {values[1]} (before, registered, as stored)"


def main(argv=None) -> int:
    args = parse_args(argv)
    sitk = import_sitk(args.output, "registering patients")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    data = PatientDataset(args.data, "train", args.size, None, cache_dir=args.cache_dir, max_patients=args.max_patients)
    if len(data) < 3:
        raise InputError(f"{args.data}: {len(data)} training patients; expected at least 3 to compare")
    if args.reference is not None and args.reference not in data.ids:
        raise InputError(f"--reference {args.reference}: is no training patient of {args.data}")
    volumes, masks = read_patients(data)
    index = data.ids.index(args.reference) if args.reference else choose_reference(volumes, masks)
    print(f"Reference: {data.ids[index]}, of {len(data)} training patients", flush=True)
    low, high = hu_to_unit(np.array(SEEN_HU), data.hu_window)
    seen = ((volumes.clip(low, high) - low) / (high - low)).astype(np.float32)
    fields, scores, started = [], [], time.process_time()
    for number, patient in enumerate(tqdm(data.ids, desc="Registering", leave=False)):
        field = np.zeros((*seen.shape[1:], 3))
        if number != index:
            field = register(sitk, seen[number], masks[number], seen[index])
        fields.append(to_lattice(field, args.points))
        if number != index:
            candidates = (np.zeros_like(field), field, from_lattice(fields[-1], args.size))
            warped = [warp(volumes[index], moved) for moved in candidates]
            scores.append([agreement(volumes[number], masks[number], moved, data.hu_window) for moved in warped])
            tqdm.write(f"{patient}: {described(scores[-1])}")
    seconds = (time.process_time() - started) / len(scores)
    fields, scores = without_shift(np.stack(fields)), np.array(scores)
    mean, components, shares = principal_components(fields)
    save_deformations(
        args.output, components=components.astype(np.float32), mean=mean.astype(np.float32), shares=shares,
        patients=np.array(data.ids), reference=np.array(data.ids[index]), fov_mm=data.geometry.fov_mm,
        data_fingerprint=np.array(data_header(data)["data_fingerprint"]), scores=scores,
    )  # fmt: skip
    print(f"Mean: {described(scores.mean(0))}; {seconds:.1f} CPU s each")
    cumulated = ", ".join(f"{k}: {100 * shares[:k].sum():.0f} %" for k in (1, 3, 5, 10, 20) if k < len(shares))
    print(f"Variance in the first components {cumulated}")
    print(f"Of a patient left out, the others' components span {100 * explained_when_left_out(fields):.0f} %")
    print(f"Written: {args.output}, {len(components)} components of {args.points}^3 points")
    return 0


if __name__ == "__main__":
    run_cli(main)
