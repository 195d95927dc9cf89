"""Anatomy of procedural chests: what differs between patients, and the shapes of their organs as signed distances.

Coordinates are the patient's in mm as in ``projector.py``: x to the left, y posterior, z inferior. Distances are
approximate, negative inside, for any x, y, z that broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LUNG = -850.0  # HU, the mean of all phantoms
SIDES = (-1, 1)  # sign of x: the patient's right, left


@dataclass
class Anatomy:
    """What differs between patients; lengths and positions in mm, patient coordinates."""

    width: float  # half the body's width
    depth: float  # half its depth
    fat: float  # below the skin
    breast: float  # size of the breasts, 0 to 1
    apex: float  # z of the tip of the lungs
    domes: dict  # z of the top of the diaphragm, per side
    costal_drop: float  # from the dome to the posterior recess
    chest_wall: float  # between fat and rib cage
    mediastinum: float  # half its width
    heart: np.ndarray  # centre
    heart_axes: np.ndarray  # semi-axes: long, across, short
    heart_turn: np.ndarray  # (3, 3), rows are the directions of the axes
    aorta: float  # radius
    arch: float  # z of the top of the aortic arch
    carina: float  # z of the bifurcation of the trachea
    vertebra: float  # height of a vertebra with its disc
    scoliosis: float  # sideways amplitude of the spine
    lung_hu: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Anatomy:
        def normal(mean, sd):
            return mean + sd * float(np.clip(rng.normal(), -2.0, 2.0))

        right, apex = normal(55, 14), normal(-115, 8)
        left = right + rng.uniform(4, 24)
        axes = np.array([normal(66, 7), normal(48, 6), normal(44, 5)])
        heart = np.array([normal(22, 6), normal(-22, 6), (left + right) / 2 - axes[2] + normal(11, 5)])
        long_axis = _unit([1.0, normal(-0.75, 0.15), normal(0.6, 0.2)])  # to the left, front and feet
        across = _unit(np.cross(long_axis, [0.0, 0.0, 1.0]))
        turn = np.array([long_axis, across, np.cross(long_axis, across)])
        return cls(
            rng.uniform(150, 188), rng.uniform(102, 132), rng.uniform(7, 24), max(0.0, rng.uniform(-1, 1)),
            apex, {-1: right, 1: left}, normal(62, 8), normal(19, 3), normal(27, 4), heart, axes, turn,
            normal(14, 2), normal(-70, 7), normal(-42, 6), normal(24.5, 1), normal(0, 4), normal(LUNG, 25),
        )  # fmt: skip

    @property
    def cage(self):
        """Rib cage: half width, half depth, y of its centre."""
        front = -self.depth + self.fat + self.chest_wall
        back = self.depth - self.fat - self.chest_wall - 8.0
        return self.width - self.fat - self.chest_wall - 6.0, (back - front) / 2, (back + front) / 2

    def cage_scale(self, y, z):
        """Size of the rib cage relative to its widest level; 0 at the apex, which is tilted forwards."""
        level = (z + 0.3 * (y - self.cage[2]) - self.apex) / 105.0
        return np.sqrt(1.0 - (1.0 - np.clip(level, 0.0, 1.0)) ** 2)

    def spine(self, z):
        """(x, y) of the centre of the vertebral bodies at level z."""
        _, half_depth, centre = self.cage
        return self.scoliosis * np.sin(z / 55.0), centre + half_depth - 20.0 - 0.0006 * (z - 40.0) ** 2

    def front(self, z):
        """y of the inside of the anterior chest wall in the midline."""
        _, half_depth, centre = self.cage
        return centre - half_depth * np.maximum(self.cage_scale(centre - half_depth, z), 0.45)


def _unit(vector):
    return np.asarray(vector) / np.linalg.norm(vector)


def smooth_step(value, start, stop):
    t = np.clip((value - start) / (stop - start), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


# ------------------------------------------------------------------------------------------------
# Distances in mm


def body_distance(a: Anatomy, x, y, z):
    width = a.width * (1.0 - 0.35 * smooth_step(z, a.apex + 15, a.apex - 55) - 0.08 * smooth_step(z, 50, 190))
    depth = a.depth * (1.0 - 0.30 * smooth_step(z, a.apex + 45, a.apex - 55))
    radius = (np.abs(x / width) ** 2.5 + np.abs(y / depth) ** 2.5) ** 0.4
    return (radius - 1.0) * (width + depth) / 2


def cage_distance(a: Anatomy, x, y, z):
    half_width, half_depth, centre = a.cage
    scale = np.maximum(a.cage_scale(y, z), 0.02)
    radius = np.sqrt((x / half_width) ** 2 + ((y - centre) / half_depth) ** 2)
    return (radius / scale - 1.0) * scale * (half_width + half_depth) / 2


def diaphragm(a: Anatomy, x, y):
    """z of the diaphragm above (x, y): two domes, deepest at the back and the sides."""
    half_width, half_depth, centre = a.cage
    v = (y - centre + 8.0) / half_depth
    over_y = np.where(v > 0, 1.0, 0.45) * v**2
    tops = []
    for side in SIDES:
        u = (side * x - 0.52 * half_width) / (0.48 * half_width)
        tops.append(a.domes[side] + a.costal_drop * (over_y + np.where(u > 0, 0.75, 0.20) * u**2))
    return -8.0 * np.logaddexp(-tops[0] / 8.0, -tops[1] / 8.0)


def heart_distance(a: Anatomy, x, y, z):
    offset = (x - a.heart[0], y - a.heart[1], z - a.heart[2])
    local = [sum(c * o for c, o in zip(row, offset)) / axis for row, axis in zip(a.heart_turn, a.heart_axes)]
    return (np.sqrt(sum(c * c for c in local)) - 1.0) * a.heart_axes.mean()


def lung_distance(a: Anatomy, x, y, z):
    """Both lungs: inside the cage, above the diaphragm, next to mediastinum, heart and spine."""
    spine_x, spine_y = a.spine(z)
    _, half_depth, centre = a.cage
    forwards = smooth_step((y - centre) / half_depth, -0.3, -0.95)  # the lungs nearly meet behind the sternum
    width = a.mediastinum * (0.7 + 0.3 * np.exp(-(((z - a.carina - 15.0) / 35.0) ** 2)))  # widest at the hila
    medial = width * (1.0 - 0.8 * forwards) - np.abs(x - 3.0 * forwards)
    gutter = 19.0 - np.hypot(x - spine_x, 0.7 * np.minimum(y - spine_y - 4.0, 0.0))  # next to the vertebrae
    outside = np.maximum(cage_distance(a, x, y, z) + 2.0, 0.7 * (z - diaphragm(a, x, y)))
    return np.maximum.reduce([outside, medial, gutter, 5.0 - heart_distance(a, x, y, z)])


def ellipsoid(x, y, z, centre, axes):
    radius = np.sqrt(sum(((c - m) / s) ** 2 for c, m, s in zip((x, y, z), centre, axes)))
    return (radius - 1.0) * min(axes)


# ------------------------------------------------------------------------------------------------
# Points and centre lines


def hilum_of(a: Anatomy, side):
    return np.array([side * (a.mediastinum + 12), a.heart[1] + 22, a.carina + 18 + 4 * side * -1])


def rib_points(a: Anatomy, rib, side, count=22):
    """Centre line (count, 3) of one rib, from the vertebra around the side to the front; ``rib`` is 0 to 11."""
    half_width, half_depth, centre = a.cage
    last = np.radians([128, 140, 146, 148, 148, 146, 142, 136, 128, 120, 92, 65][rib])
    angle = np.linspace(np.radians(13), last, count)
    z = a.apex - 6 + a.vertebra * (rib + 0.2) + (38 + 6.0 * min(rib, 7)) * (1 - np.cos(angle)) / 2
    y = centre + half_depth * np.cos(angle)
    scale = np.maximum(a.cage_scale(y, z), 0.42)
    x = side * (half_width * scale + 5) * np.sin(angle)
    return np.stack([x, centre + (half_depth * scale + 5) * np.cos(angle), z], axis=1)


def sternum_point(a: Anatomy, fraction):
    z = a.apex + 40 + 155 * fraction
    return np.array([0.0, a.front(z) - 5.0, z])


def grow_vessels(a: Anatomy, rng, side, count=170):
    """Vessel tree of one lung: nodes (n, 3), parent of each node, radii in mm.

    Random points of the lung are joined, nearest to the hilum first, to the closest node of the tree;
    radii follow Murray's law (flow proportional to the cube of the radius).
    """
    half_width, half_depth, centre = a.cage
    low = np.array([8, centre - half_depth, a.apex])
    points = rng.uniform(low, [half_width, centre + half_depth, max(a.domes.values()) + 60], (40 * count, 3))
    points *= [side, 1, 1]
    points = points[lung_distance(a, *points.T) < -5.0][:count]
    hilum = hilum_of(a, side)
    points = points[np.argsort(np.linalg.norm(points - hilum, axis=1))]
    nodes, parents = [hilum], [0]
    for point in points:
        tree = np.array(nodes)
        detour = np.linalg.norm(tree - point, axis=1) + 0.35 * np.linalg.norm(tree - hilum, axis=1)
        parent = int(detour.argmin())
        middle = (tree[parent] + point) / 2 + rng.normal(0, 2.0, 3)
        nodes += [middle, point]
        parents += [parent, len(nodes) - 2]
    flow = np.zeros(len(nodes))
    for node in range(len(nodes) - 1, 0, -1):
        flow[node] = max(flow[node], 1.0)
        flow[parents[node]] += flow[node]
    return np.array(nodes), np.array(parents), 1.05 * np.cbrt(flow)
