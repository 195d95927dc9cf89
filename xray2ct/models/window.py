"""Boxes of a volume's voxels: training patches and tiles, with the context that convolutions see."""

from __future__ import annotations

import torch


class Window:
    """A box of a volume's voxels: origins ``[(z, y, x), ...]`` of one common size.

    One origin serves all samples of a batch; several are dealt to the samples in turn.
    """

    def __init__(self, origins, size, full):
        self.origins, self.size, self.full = origins, tuple(size), tuple(full)

    @classmethod
    def whole(cls, full) -> Window:
        """The whole volume."""
        return cls([(0, 0, 0)], full, full)

    @property
    def is_whole(self) -> bool:
        return self.size == self.full

    def grown(self, margin: int, step: int = 1) -> Window:
        """At least ``margin`` voxels more on each side, kept inside the volume, on multiples of ``step``.

        A window at the border is shifted instead of cut, so that all samples keep one size and what
        lies outside the volume is zero padding there, as in the whole volume.
        """
        size = tuple(
            min(n, max(-(-(o + s + margin) // step) - (o - margin) // step for o in starts) * step)
            for starts, s, n in zip(zip(*self.origins), self.size, self.full)
        )
        origins = [
            tuple(min(max(0, (o - margin) // step * step), n - s) for o, s, n in zip(origin, size, self.full))
            for origin in self.origins
        ]
        return Window(origins, size, self.full)

    def crop(self, volumes: torch.Tensor, scale: int = 1, start=None) -> torch.Tensor:
        """Cut this window out of ``(B, C, ...)`` volumes -> ``(windows, C, ...)``, or all B for one origin.

        scale: voxels of ``volumes`` per voxel of the window. start: where voxel (0, 0, 0) of the volumes lies,
        one per origin (default: the cube's corner).
        """
        boxes = []
        for index, origin in enumerate(self.origins):
            offset = start[index] if start is not None else (0, 0, 0)
            boxes.append([slice((o - a) * scale, (o - a + n) * scale) for o, a, n in zip(origin, offset, self.size)])
        if len(boxes) == 1:
            return volumes[:, :, boxes[0][0], boxes[0][1], boxes[0][2]]
        each = len(boxes) // volumes.shape[0]
        return torch.stack([volumes[i // each, :, box[0], box[1], box[2]] for i, box in enumerate(boxes)])

    def boxes(self, scale: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """Origins and size of the windows in voxels ``scale`` times finer; see :func:`lifting.lift_view`."""
        return [tuple(o * scale for o in origin) for origin in self.origins], tuple(n * scale for n in self.size)


def patch_window(origins, patch, full) -> Window:
    """Window of training patches; raises ``ValueError`` naming a patch that does not lie in the volume."""
    size = (patch,) * 3 if isinstance(patch, int) else tuple(patch)
    full = tuple(full)
    if any(s < 1 or s > n for s, n in zip(size, full)):
        raise ValueError(f"patch {size} does not fit into the coarse volume {full}")
    flat = [tuple(int(v) for v in origin) for sample in origins for origin in sample]
    for origin in flat:
        if any(o < 0 or o + s > n for o, s, n in zip(origin, size, full)):
            raise ValueError(f"patch {size} at {origin} leaves the coarse volume {full}")
    return Window(flat, size, full)
