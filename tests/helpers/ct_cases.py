"""Tiny CTs with a known anatomy in patient millimetres, and ways to store them, for the tests.

World coordinates are RAS: x to the patient's right, y anterior, z superior. The thorax is asymmetric in
all three axes, and its edges are soft so that resampling hardly changes it.
"""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np

from xray2ct.data.prepare_folder import try_patient
from xray2ct.imaging.read_ct import CtImage

AIR, TISSUE, LUNG = -1000.0, 40.0, -800.0


# The header of an NRRD file of 5 x 4 x 3 voxels of 2 x 3 x 4 mm, whose first one lies at LPS (1, 2, 3) mm.
NRRD_FIELDS = {
    "type": "int16",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "5 4 3",
    "space directions": "(2,0,0) (0,3,0) (0,0,4)",
    "space origin": "(1,2,3)",
    "kinds": "domain domain domain",
    "encoding": "raw",
    "endian": "little",
}


def grid_affine(shape, spacing_mm, centre_mm=(0, 0, 0), rotation=None) -> np.ndarray:
    """Affine of a grid of ``shape`` whose centre lies at ``centre_mm``; ``rotation`` 3 x 3."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) @ np.diag(np.broadcast_to(spacing_mm, 3))
    affine[:3, 3] = np.asarray(centre_mm) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def rotation(x=0.0, y=0.0, z=0.0) -> np.ndarray:
    """Rotation about the three axes, degrees."""
    matrix = np.eye(3)
    for axis, degrees in enumerate((x, y, z)):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        step = np.eye(3)
        step[i, i], step[j, j], step[i, j], step[j, i] = c, c, -s, s
        matrix = step @ matrix
    return matrix


def world(shape, affine):
    """World coordinates x, y, z (each of ``shape``) of all voxel centres."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    return np.einsum("ab,b...->a...", affine[:3, :3], index) + affine[:3, 3].reshape(3, 1, 1, 1)


def blob(x, y, z, centre, half_axes, edge_mm=12.0):
    """1 inside an ellipsoid, 0 outside, linear over ``edge_mm``; a half axis may be infinite."""
    scaled = [(p - c) / a for p, c, a in zip((x, y, z), centre, half_axes)]
    radius = np.sqrt(sum(s * s for s in scaled))
    return np.clip(0.5 - (radius - 1) * min(half_axes) / edge_mm, 0, 1)


def thorax(shape=(40, 40, 40), affine=None, centre=(0, 0, 0), lung_z=0.0, lungs=True, extra=None) -> CtImage:
    """A chest: body around ``centre`` (x, y), both lungs around z = ``lung_z``, heart on the left, spine behind.

    ``extra(x, y, z)`` may return HU that replaces the rest where it is not NaN.
    """
    affine = grid_affine(shape, 8.0) if affine is None else affine
    x, y, z = world(shape, affine)
    u, v, w = x - centre[0], y - centre[1], z - lung_z
    hu = np.full(shape, AIR)
    parts = [((0, 0, 0), (130, 90, np.inf), TISSUE)]
    if lungs:
        parts += [((60, 5, 10), (45, 60, 100), LUNG), ((-62, 5, 0), (42, 60, 90), LUNG)]
        parts += [((-30, 25, -30), (40, 35, 45), 50.0)]
    parts += [((0, -65, 0), (18, 18, np.inf), 400.0)]
    for middle, half_axes, value in parts:
        inside = blob(u, v, w, middle, half_axes)
        hu += inside * (value - hu)
    if extra is not None:
        given = extra(x, y, z)
        hu = np.where(np.isnan(given), hu, given)
    return CtImage(np.rint(hu).astype(np.int16), affine, "thorax")


def save_nifti(path, ct: CtImage):
    """Write a CT as NIfTI in its own axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(ct.data, ct.affine), path)
    return path


def reoriented(ct: CtImage, axes: str) -> CtImage:
    """The same CT stored with other axes (``"LPS"``, ``"SAR"``, ...), by nibabel."""
    image = nib.Nifti1Image(ct.data, ct.affine)
    start = nib.io_orientation(image.affine)
    image = image.as_reoriented(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes)))
    assert "".join(nib.aff2axcodes(image.affine)) == axes
    return CtImage(np.asarray(image.dataobj), image.affine, axes)


def dying_worker(source, folder, settings):
    """Stands in for one CT's preparation; the worker process that gets patient ``killer`` dies."""
    if source.patient_id == "killer":
        os._exit(9)
    return try_patient(source, folder, settings)
