"""Procedural thorax CTs in Hounsfield units: :func:`make_phantom`.

Body, lungs, heart, vessels, airways, diaphragm, abdominal organs and skeleton vary from phantom to phantom by 5 to 20
mm. Organs are painted one over the other, from the skin inwards; their shapes are in ``phantom_anatomy.py``, whose
coordinates (x, y, z) lie at ``(-x, -y, -z)`` of the NIfTI world.
"""

from __future__ import annotations

import gzip
import io

import numpy as np
import scipy

from xray2ct.conventions import AIR_HU, MAX_HU
from xray2ct.data.phantom_anatomy import (
    SIDES,
    Anatomy,
    body_distance,
    cage_distance,
    diaphragm,
    ellipsoid,
    grow_vessels,
    heart_distance,
    hilum_of,
    lung_distance,
    rib_points,
    smooth_step,
    sternum_point,
)
from xray2ct.imaging.cube_files import nifti_image

AIR, FAT, MUSCLE, BLOOD, LIVER = -1000.0, -100.0, 50.0, 45.0, 60.0
SPONGY_BONE, COMPACT_BONE, CARTILAGE, DISC = 280.0, 950.0, 110.0, 80.0  # HU, all without contrast agent
RIBS = 12


# ------------------------------------------------------------------------------------------------
# Canvas


class Canvas:
    """HU volume (i, j, k) with the deformed patient coordinates of its voxels."""

    def __init__(self, rng, low, high, spacing):
        """low, high: corners of the scan in mm, patient coordinates; spacing per axis in mm."""
        self.spacing = np.asarray(spacing, dtype=np.float64)
        self.shape = tuple(int(np.ceil((h - l) / s)) for l, h, s in zip(low, high, self.spacing))  # noqa: E741
        # Index 0 has the largest x, y, z, so that the NIfTI axes run right, anterior, superior.
        axes = [h - s * (np.arange(n) + 0.5) for h, s, n in zip(high, self.spacing, self.shape)]
        self.axes = [axis.astype(np.float32) for axis in axes]
        self.affine = np.diag([*self.spacing, 1.0])
        self.affine[:3, 3] = [-float(axis[0]) for axis in axes]
        self.edge = np.float32(self.spacing.mean())  # mm over which edges are blended
        self.x, self.y, self.z = (
            grid + self._deformation(rng, amplitude)
            for grid, amplitude in zip(np.meshgrid(*self.axes, indexing="ij"), (4.0, 4.0, 5.0))
        )
        self.pad = 8.0 + self.edge  # more than the deformation moves any point
        self.hu = np.full(self.shape, AIR, dtype=np.float32)

    def _deformation(self, rng, amplitude, waves=3):
        total = np.zeros(self.shape, dtype=np.float32)
        for _ in range(waves):
            length, phase = rng.uniform(140, 320, 3), rng.uniform(0, 2 * np.pi, 3)
            waves_1d = [np.sin(2 * np.pi * c / n + p) for c, n, p in zip(self.axes, length, phase)]
            total += np.einsum("i,j,k->ijk", *[w.astype(np.float32) for w in waves_1d])
        return total * np.float32(amplitude / waves)

    def box(self, low, high):
        """Slices of the voxels that can lie between two corners in mm."""
        slices = []
        for axis, start, stop in zip(self.axes, low, high):
            inside = np.flatnonzero((axis > start - self.pad) & (axis < stop + self.pad))
            slices.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0))
        return tuple(slices)

    def at(self, box=...):
        return self.x[box], self.y[box], self.z[box]

    def paint(self, distance, hu, box=..., within=None):
        """Blend ``hu`` in where ``distance`` is negative (and ``within``, 0 to 1 per voxel, allows it)."""
        weight = np.clip(0.5 - distance / self.edge, 0.0, 1.0)
        if within is not None:
            weight = weight * within[box]
        self.hu[box] += weight * (hu - self.hu[box])

    def blob(self, centre, axes, hu, within=None):
        box = self.box(np.subtract(centre, axes), np.add(centre, axes))
        self.paint(ellipsoid(*self.at(box), centre, axes), hu, box, within)

    def tube(self, points, radii, hu, within=None, flat=1.0):
        """Round pieces of rod through ``points`` (n, 3); ``flat`` < 1 stretches their section along z."""
        points = np.asarray(points, dtype=np.float64)
        radii = np.broadcast_to(np.asarray(radii, dtype=np.float64), len(points))
        for start, stop, r0, r1 in zip(points[:-1], points[1:], radii[:-1], radii[1:]):
            reach = max(r0, r1) / np.array([1.0, 1.0, flat])
            box = self.box(np.minimum(start, stop) - reach, np.maximum(start, stop) + reach)
            if self.hu[box].size == 0:
                continue
            step = (stop - start).astype(np.float32)
            dx, dy, dz = (c - np.float32(o) for c, o in zip(self.at(box), start))
            along = np.clip((dx * step[0] + dy * step[1] + dz * step[2]) / max(float(step @ step), 1e-6), 0, 1)
            dx, dy, dz = dx - along * step[0], dy - along * step[1], (dz - along * step[2]) * np.float32(flat)
            distance = np.sqrt(dx * dx + dy * dy + dz * dz) - (r0 + along * np.float32(r1 - r0))
            self.paint(distance, hu, box, within)


# ------------------------------------------------------------------------------------------------
# Organs


def paint_trunk(canvas: Canvas, a: Anatomy):
    body = body_distance(a, *canvas.at())
    for side in SIDES:
        breast = (0.4 * a.width, 0.2 * a.depth + 26 * a.breast, 66)
        canvas.blob((side * 0.48 * a.width, -0.75 * a.depth, 0), breast, FAT)
    canvas.paint(body, FAT)
    canvas.paint(body + a.fat, MUSCLE)
    canvas.paint(np.maximum(np.abs(body + a.fat + 7.0) - 1.0, 0.0), FAT + 60)  # fat between the muscles
    canvas.paint(cage_distance(a, *canvas.at()) + 1.0, FAT)


def paint_lungs(canvas: Canvas, a: Anatomy, rng):
    """Returns the lungs' share (0 to 1) of each voxel."""
    distance = lung_distance(a, *canvas.at())
    grain = scipy.ndimage.gaussian_filter(rng.standard_normal(canvas.shape, dtype=np.float32), 1.2) * 260.0
    canvas.paint(distance, a.lung_hu + grain + 0.5 * canvas.y)  # blood settles at the back: denser there
    return np.clip(0.5 - distance / canvas.edge, 0.0, 1.0)


def paint_abdomen(canvas: Canvas, a: Anatomy, rng):
    x, y, z = canvas.at()
    cage = np.maximum(cage_distance(a, x, y, z), diaphragm(a, x, y) - z)
    below = np.clip(0.5 - (cage + 5.0) / canvas.edge, 0.0, 1.0)
    half_width, half_depth, centre = a.cage
    canvas.paint(np.maximum(cage, -4.0 - cage), MUSCLE)  # the diaphragm itself
    left, right = a.domes[1], a.domes[-1]
    canvas.blob((0.55 * half_width, centre - 20, left + 50), (45, 42, 62), MUSCLE, below)  # stomach
    canvas.blob((0.55 * half_width, centre - 32, left + 40), (36, 26, 40), AIR + 20, below)  # its air
    canvas.blob((0.68 * half_width, centre + 0.55 * half_depth, left + 60), (30, 33, 52), MUSCLE, below)  # spleen
    liver = ellipsoid(x, y, z, (-0.42 * half_width, centre - 8, right + 45), (0.72 * half_width, 0.95 * half_depth, 92))
    left_lobe = ellipsoid(x, y, z, (10, centre - 0.45 * half_depth, right + 60), (62, 36, 40))
    canvas.paint(np.minimum(liver, left_lobe), LIVER, within=below)
    for _ in range(6):  # veins of the liver
        points = np.array([-0.4 * half_width, centre, right + 55]) + np.cumsum(rng.normal(0, 18, (4, 3)), axis=0)
        canvas.tube(points, [5, 4, 3, 2], BLOOD - 8, below)
    for side in SIDES:
        canvas.blob((side * 52, centre + 0.6 * half_depth, right + 115), (27, 24, 50), MUSCLE - 18, below)  # kidney


def paint_mediastinum(canvas: Canvas, a: Anatomy):
    """Heart in its fat, great vessels and oesophagus."""
    x, y, z = canvas.at()
    heart = np.maximum(heart_distance(a, x, y, z), 0.8 * (z - diaphragm(a, x, y) - 8.0))
    canvas.paint(np.maximum(heart_distance(a, x, y, z) - 5.0, z - diaphragm(a, x, y)), FAT)
    canvas.paint(heart, BLOOD)
    spine_x, spine_y = a.spine(0.0)
    hx, hy, hz = a.heart
    top, bottom = a.apex - 80, 260.0
    behind = [(spine_x + 24, a.spine(level)[1] - 14, level) for level in (a.arch + 22, 0, 60, 120, 180, bottom)]
    arch = [(hx - 22, hy, hz - 25), (-10, hy, a.arch + 25), (-3, hy + 8, a.arch + 6)]
    arch += [(10, (hy + spine_y) / 2, a.arch), (22, spine_y - 20, a.arch + 7)]
    radii = [1.15] * 3 + [1.0] * 2 + [0.9] * len(behind)
    canvas.tube(arch + behind, a.aorta * np.array(radii), BLOOD)
    for x_end, y_start in ((-26, hy + 8), (14, hy + 20), (24, hy + 32)):  # to head and arms
        canvas.tube([(x_end / 3, y_start, a.arch), (x_end, y_start + 4, a.apex), (1.2 * x_end, y_start, top)], 5, BLOOD)
    canvas.tube([(-24, hy + 18, top), (-26, hy + 12, a.arch), (-28, hy + 10, hz)], 9, BLOOD)  # upper vena cava
    canvas.tube([(-22, hy + 25, hz), (-22, spine_y - 35, a.domes[-1] + 50), (-18, spine_y - 22, bottom)], 11, BLOOD)
    hilum = a.carina + 18
    canvas.tube([(hx - 5, hy - 8, hz - 20), (8, hy + 14, hilum - 12)], 13, BLOOD)  # pulmonary trunk
    for side in SIDES:
        canvas.tube([(8, hy + 14, hilum - 12), hilum_of(a, side)], [12, 8], BLOOD)
    levels = np.linspace(top, bottom, 7)
    canvas.tube([(4, a.spine(level)[1] - 23, level) for level in levels], 6, MUSCLE - 15)  # oesophagus


def paint_airways(canvas: Canvas, a: Anatomy, lungs):
    y = a.heart[1] + 28
    carina = np.array([2.0, y, a.carina])
    tubes = [([(0, y - 12, a.apex - 80), (0, y - 4, a.apex), carina], [8.5, 8.5, 8.0])]
    for side in SIDES:
        hilum = hilum_of(a, side) + [0, 6, 4]
        tubes.append(([carina, hilum], [6.5, 5.0]))
        for dx, dy, dz in ((30, -12, -38), (28, -34, 25), (26, 22, 48)):
            tubes.append(
                ([hilum, hilum + [0.5 * side * dx, 0.4 * dy, 0.5 * dz], hilum + [side * dx, dy, dz]], [4, 3, 1.8])
            )
    for wall, hu in ((1.6, 0.0), (0.0, AIR)):
        for points, radii in tubes:
            canvas.tube(points, np.add(radii, wall), hu)


def paint_lung_contents(canvas: Canvas, a: Anatomy, lungs, rng):
    for side in SIDES:
        nodes, parents, radii = grow_vessels(a, rng, side)
        for node in range(1, len(nodes)):
            canvas.tube(nodes[[parents[node], node]], radii[node], BLOOD, lungs)
        for _ in range(rng.integers(0, 3)):  # nodules
            canvas.blob(nodes[rng.integers(1, len(nodes))], rng.uniform(3, 9, 3), MUSCLE - 10, lungs)


# ------------------------------------------------------------------------------------------------
# Skeleton


def paint_bone(canvas: Canvas, points, radii, flat=1.0, shell=2.0):
    """A rod of compact bone, filled with spongy bone."""
    canvas.tube(points, radii, COMPACT_BONE, flat=flat)
    canvas.tube(points, np.maximum(np.asarray(radii) - shell, 0.4 * np.asarray(radii)), SPONGY_BONE, flat=flat)


def paint_spine(canvas: Canvas, a: Anatomy):
    _, _, centre = a.cage
    box = canvas.box((-60, centre - 20, -400), (60, a.depth, 400))
    x, y, z = canvas.at(box)
    spine_x, spine_y = a.spine(z)
    x, y = x - spine_x, y - spine_y
    size = 1.0 + 0.0012 * z  # vertebrae grow towards the feet
    from_middle = np.abs((z - a.apex) / a.vertebra % 1.0 - 0.5) * a.vertebra  # mm from the middle of the vertebra
    column = (np.sqrt((x / 17) ** 2 + (y / 14) ** 2) - size) * 15
    bone = np.maximum(column, from_middle - a.vertebra / 2 + 2.8)
    canvas.paint(np.maximum(column, np.abs(x) - 30), DISC, box)
    arch = np.maximum((np.hypot(x, y - 22 * size) - 14) * 1.0, from_middle - 8)
    canvas.paint(np.minimum(bone, arch), COMPACT_BONE, box)
    canvas.paint(np.minimum(bone, arch) + 2.5, SPONGY_BONE, box)
    slanted = np.abs((z - a.apex - 0.5 * (y - 30)) / a.vertebra % 1.0 - 0.5) * a.vertebra
    skin = body_distance(a, *canvas.at(box)) + 0.6 * a.fat + 4.0
    process = np.maximum.reduce([np.abs(x) - 3.5, np.abs(y - 44) - 12, slanted - 6, skin])
    wings = np.maximum.reduce([np.abs(x) - 30, np.abs(y - 22 - 0.25 * np.abs(x)) - 5, from_middle - 6])
    canvas.paint(np.minimum(process, wings), SPONGY_BONE + 120, box)
    canvas.paint(np.hypot(x, y - 22 * size) - 8.5, 25.0, box)  # spinal canal


def paint_ribs(canvas: Canvas, a: Anatomy):
    for side in SIDES:
        for rib in range(RIBS):
            points = rib_points(a, rib, side)
            paint_bone(canvas, points, 4.2, flat=0.62)
            if rib < 10:
                joint = sternum_point(a, 0.06 + 0.145 * min(rib, 6)) + [side * 13, 0, 0]
                middle = (points[-1] + joint) / 2 + [0, -4, 8]
                canvas.tube([points[-1], middle, joint], 4.5, CARTILAGE, flat=0.7)


def paint_sternum(canvas: Canvas, a: Anatomy):
    for fraction in np.linspace(0, 1, 24):
        half = 25 - 13 * smooth_step(fraction, 0.1, 0.35)
        middle = sternum_point(a, fraction)
        paint_bone(canvas, [middle - [half, 0, 0], middle + [half, 0, 0]], 5.5)


def paint_shoulders(canvas: Canvas, a: Anatomy):
    x, y, z = canvas.at()
    half_width, half_depth, centre = a.cage
    shell = np.abs(cage_distance(a, x, y, z) - 14.0) - 2.2
    top, tip = a.apex + 10, a.apex + 140
    down = np.clip((z - top) / (tip - top), 0.0, 1.0)
    for side in SIDES:
        away = side * x
        blade = np.maximum.reduce([0.42 * half_width + 18 * down - away, away - (0.95 - 0.35 * down) * half_width])
        blade = np.maximum.reduce([shell, blade, top - z, z - tip, centre - y])
        canvas.paint(blade, COMPACT_BONE - 100)
        shoulder = np.array([side * min(0.80 * a.width, half_width + 15), centre + 5, a.apex - 2])
        canvas.blob(shoulder, (20, 20, 22), COMPACT_BONE - 100)
        canvas.blob(shoulder, (17, 17, 19), SPONGY_BONE)
        edge = [side * 0.45 * half_width, centre + half_depth * 0.75, a.apex + 30]
        paint_bone(canvas, [edge, shoulder + [0, 18, 0]], [3, 6])
        manubrium = sternum_point(a, 0.0) + [side * 24, -2, -6]
        bend = [side * 0.45 * half_width, manubrium[1] + 2, a.apex + 22]
        paint_bone(canvas, [manubrium, bend, shoulder + [0, -18, -6]], [8, 6, 6.5])


# ------------------------------------------------------------------------------------------------
# Phantom


def make_phantom(seed: int, index: int, spacing_mm: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One phantom: int16 HU ``(i, j, k)`` and its 4 x 4 affine to RAS mm.

    The anatomy depends on ``seed`` and ``index`` only. ``spacing_mm``: edge of cubic voxels; by default
    2.2 to 2.6 mm in-plane and slices of 3 to 5 mm, different for each phantom.
    """
    rng = np.random.default_rng([seed, index])
    a = Anatomy.draw(rng)
    in_plane, slices = rng.uniform(2.2, 2.6), rng.uniform(3.0, 5.0)
    spacing = [spacing_mm] * 3 if spacing_mm else [round(in_plane, 3)] * 2 + [round(slices, 2)]
    margin, top, height = rng.uniform(12, 25), a.apex - rng.uniform(20, 40), rng.uniform(305, 355)
    low = (-a.width - margin, -a.depth - margin - 28 * a.breast, top)
    canvas = Canvas(rng, low, (a.width + margin, a.depth + margin, top + height), spacing)
    paint_trunk(canvas, a)
    organ_rng, grain_rng = (np.random.default_rng([seed, index, stream]) for stream in (1, 2))
    lungs = paint_lungs(canvas, a, grain_rng)
    paint_abdomen(canvas, a, organ_rng)
    paint_mediastinum(canvas, a)
    paint_lung_contents(canvas, a, lungs, organ_rng)
    paint_airways(canvas, a, lungs)
    paint_shoulders(canvas, a)
    paint_ribs(canvas, a)
    paint_sternum(canvas, a)
    paint_spine(canvas, a)
    hu = scipy.ndimage.gaussian_filter(canvas.hu, 0.5)
    hu += 14.0 * scipy.ndimage.gaussian_filter(grain_rng.standard_normal(canvas.shape, dtype=np.float32), 0.4)
    return np.rint(np.clip(hu, AIR_HU, MAX_HU)).astype(np.int16), canvas.affine


def encode(hu: np.ndarray, affine: np.ndarray) -> bytes:
    """The bytes of a ``.nii.gz``; the same input gives the same bytes (no time, no file name inside)."""
    stream = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=stream, compresslevel=6, mtime=0) as packed:
        packed.write(nifti_image(hu, affine).to_bytes())
    return stream.getvalue()
