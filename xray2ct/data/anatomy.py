"""New anatomies for training: random mixtures of the deformations between training patients.

``python -m tools.register_patients`` registers the patients and stores the principal components of their deformations
in one ``.npz`` file; here it is read, and displacements are drawn from it on the batch's device.

After Cootes et al., "Active shape models", CVIU 61, 1995 (shapes from principal components, coefficients limited) and
Rueckert, Frangi and Schnabel, IEEE TMI 22, 2003 (components of deformations instead of shapes).
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError, atomic_path
from xray2ct.settings import setting

FORMAT = 1  # raised when the meaning of a key changes
LIMIT = 2.0  # standard deviations that a coefficient may be away from the mean
SMALLEST = 0.2  # volume that any part of the body keeps, at least
STEPS = 20  # fractions of a displacement that are tried until no part shrinks further than that
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass
class AnatomyConfig:
    """How training mixes anatomies."""

    file: str | None = None  # of tools/register_patients.py; null: no mixing
    probability: float = setting(0.5, minimum=0.0, maximum=1.0)  # share of samples that get a new anatomy
    strength: float = setting(0.5, minimum=0.0, maximum=2.0)  # 1: as far from each patient as patients from their mean


@dataclass
class DeformationModel:
    """Principal components of the deformations between patients.

    components: ``(K, 3, n, n, n)`` float32, each times its standard deviation over the patients: displacements
    (x, y, z) in half edges of the cube at n points along D, H and W, from face to face. patients: who was registered.
    fov_mm: edge of the cube. fingerprint: of the file.
    """

    components: torch.Tensor
    patients: list[str]
    fov_mm: float
    fingerprint: str

    def draw(self, random: SampleRandom, config: AnatomyConfig) -> torch.Tensor:
        """Random displacements ``(B, 3, n, n, n)`` on the draws' device, none of which folds the body.

        Coefficients are normal, at most LIMIT, times ``strength``; samples beyond ``probability`` get zero.
        """
        coefficients = random.normal("anatomy", (len(self.components),)).clamp_(-LIMIT, LIMIT).mul_(config.strength)
        chosen = random.uniform("anatomy chosen", (1,)) < config.probability
        if self.components.device != random.device:  # once: they stay there
            self.components = self.components.to(random.device)
        # No matrix product: its rounding would depend on the size of the batch.
        moved = ((coefficients * chosen).view(-1, len(self.components), 1, 1, 1, 1) * self.components).sum(dim=1)
        return moved * unfolded_share(moved).view(-1, 1, 1, 1, 1)

    def check(self, path, acquisition_fov_mm: float, unseen: set[str]) -> None:
        """Raise :class:`InputError` naming ``path`` for another cube, or for patients that validate or test."""
        if self.fov_mm != acquisition_fov_mm:
            raise InputError(
                f"augment.anatomy.file {path}: its cube has {self.fov_mm:g} mm; expected the data set's"
                f" {acquisition_fov_mm:g}"
            )
        if found := sorted(unseen & set(self.patients)):
            raise InputError(
                f"augment.anatomy.file {path}: holds the anatomy of {', '.join(found[:5])}, which validate or test here"
                f" ({len(found)} patients); expected training patients alone"
            )


def unfolded_share(displacement: torch.Tensor) -> torch.Tensor:
    """The largest share ``(B,)``, 1 at most, of displacements ``(B, 3, n, n, n)`` that folds nothing.

    Up to it the Jacobian determinant of x -> x + share * displacement(x) stays above SMALLEST at every corner of
    every cell of the (trilinear) lattice. In twentieths.
    """
    n = displacement.shape[-1]
    spacing = 2.0 / (n - 1)
    slopes = []
    for axis in (4, 3, 2):  # along x, y, z
        edge = displacement.diff(dim=axis) / spacing  # of each cell's edges along this axis
        others = [a for a in (2, 3, 4) if a != axis]
        corners = []
        for corner in range(8):
            part = edge
            for other in others:
                part = part.narrow(other, corner >> (4 - other) & 1, n - 1)
            corners.append(part)
        slopes.append(torch.stack(corners, dim=1))
    jacobian = torch.stack(slopes, dim=-1).movedim(2, -2)  # (B, 8, cells, component, axis)
    # det(I + t A) = 1 + t tr(A) + t^2 (tr(A)^2 - tr(A^2)) / 2 + t^3 det(A)
    trace = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = (trace * trace - (jacobian * jacobian.transpose(-1, -2)).sum((-2, -1))) / 2
    x, y, z = jacobian.unbind(-1)
    cube = (torch.linalg.cross(x, y) * z).sum(-1)
    good = []
    for step in range(1, STEPS + 1):
        t = step / STEPS
        good.append((1.0 + t * (trace + t * (square + t * cube))).flatten(1).amin(1) >= SMALLEST)
    return torch.stack(good, dim=1).cumprod(dim=1).sum(dim=1) / STEPS


# ------------------------------------------------------------------------------------------------
# Files


def save_deformations(path: str | os.PathLike, **entries) -> None:
    """Write a file of deformations: ``components``, ``patients`` and ``fov_mm`` of :class:`DeformationModel`, and
    what else is worth keeping (``mean``, ``shares``, ``reference``, ``data_fingerprint``, ``scores``); always whole.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, format=FORMAT, **entries)


def load_deformations(path: str | os.PathLike) -> DeformationModel:
    """Read what :func:`save_deformations` wrote; :class:`InputError` naming file and entry for anything else."""
    path, name = Path(path), f"augment.anatomy.file {path}"
    if not path.is_file():
        raise InputError(f"{name}: no such file; make it with python -m tools.register_patients")
    try:
        content = path.read_bytes()
        with np.load(path, allow_pickle=False) as entries:
            version, components = int(entries["format"]), entries["components"]
            patients, fov_mm = entries["patients"].tolist(), float(entries["fov_mm"])
    except UNREADABLE as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: not a file of tools/register_patients.py, or damaged ({detail})") from None
    if version != FORMAT:
        raise InputError(f"{name}: format {version}; this version reads format {FORMAT}")
    shape = components.shape
    if components.dtype != np.float32 or len(shape) != 5 or shape[1] != 3 or len({*shape[2:]}) != 1 or min(shape) < 1:
        raise InputError(f"{name}: components are {components.dtype} {shape}; expected float32 (K, 3, n, n, n)")
    if shape[2] < 2 or not np.isfinite(components).all():
        raise InputError(
            f"{name}: components are not finite, or of one point; expected displacements of 2^3 points or more"
        )
    if not all(isinstance(patient, str) for patient in patients):
        raise InputError(f"{name}: patients are no texts; expected their ids")
    fingerprint = hashlib.sha256(content).hexdigest()[:16]
    return DeformationModel(torch.from_numpy(components), patients, fov_mm, fingerprint)
