"""Forward projector: geometry of the two views, differentiable line integrals and their exact adjoint.

Whatever ties a voxel to a detector pixel asks :class:`Geometry`, so that the projector, the
back-projection of features inside the networks (lifting.py) and the DRR loss cannot disagree.

Conventions
-----------
* Volumes are ``(B, 1, D, H, W)``: D superior -> inferior, H anterior -> posterior, W patient
  right -> left. ``volume[0, 0, d]`` is an axial slice as a radiologist sees it.
* X-rays are ``(B, 2, H, W)``: channel 0 frontal (PA), columns patient right -> left; channel 1
  lateral, columns anterior -> posterior. Rows run head to feet in both.
* Millimetres, origin at the centre of the cube: z along D, y along H, x along W.
* Outside the networks volumes are in Hounsfield units; inside they are mapped linearly from
  ``hu_window`` to [0, 1] (default window: the 2,500 HU of the X2CT-GAN literature).
* An X-ray is ``line integral of mu / XRAY_SCALE`` with ``mu = MU_WATER * max(0, 1 + HU / 1000)``:
  linear in attenuation (bone bright), so that a DRR loss means something.
* PA view: source behind the patient (y = +sid), detector in front. Lateral view: source on the
  patient's right (x = -sid), detector on the left (a "left lateral"). A view taken from the other
  side is that of the volume flipped along the depth of the view (H or W).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from numbers import Real

import torch

from xray2ct.autocast import without_autocast
from xray2ct.geometry import banded, dense
from xray2ct.geometry.band import Band
from xray2ct.geometry.traced import made_once

HU_WINDOW = (-1024.0, 1476.0)  # HU mapped to [0, 1]; X2CT-GAN's 2,500 HU
MU_WATER = 0.02  # 1/mm, water at about 65 keV effective energy (NIST XCOM: 0.0206 at 60 keV, 0.0193 at 70 keV)
XRAY_SCALE = 10.0  # line integral that becomes pixel value 1: 500 mm of water
FOV_MM = 360.0
VIEWS = ("pa", "lateral")
BACKENDS = ("auto", "dense", "banded", "triton")
SOURCE_SIDES = (("behind", "in front"), ("on the right", "on the left"))  # of the source, by view: the usual one first
DEFAULT_SIDES = ("behind", "on the right")
KINDS = ("cone", "parallel", "scout")
DISTANCES_MM = {"cone": (1800.0, 1600.0), "scout": (949.0, 541.0)}  # source to detector and to isocentre: defaults


# ------------------------------------------------------------------------------------------------
# Units


def hu_to_unit(hu, hu_window=HU_WINDOW):
    """Map Hounsfield units linearly so that ``hu_window`` becomes [0, 1]; values outside are clipped.

    Works on numpy arrays and torch tensors of any shape.
    """
    low, high = hu_window
    return ((hu - low) / (high - low)).clip(0.0, 1.0)


def unit_to_hu(unit, hu_window=HU_WINDOW):
    """Inverse of :func:`hu_to_unit` (without clipping): [0, 1] -> Hounsfield units."""
    low, high = hu_window
    return unit * (high - low) + low


def unit_to_mu(unit: torch.Tensor, hu_window=HU_WINDOW) -> torch.Tensor:
    """Linear attenuation in 1/mm of a volume in [0, 1] (any shape): mu_water * max(0, 1 + HU/1000)."""
    return hu_to_mu(unit_to_hu(unit, hu_window))


def hu_to_mu(hu):
    """Linear attenuation in 1/mm from Hounsfield units (numpy or torch): mu_water * max(0, 1 + HU/1000)."""
    return MU_WATER * (1.0 + hu / 1000.0).clip(0.0)


# ------------------------------------------------------------------------------------------------
# Geometry


@dataclass(frozen=True)
class Geometry:
    """The two orthogonal views of one cube. All lengths in millimetres.

    kind: ``"cone"`` (point source), ``"parallel"``, or ``"scout"``: the localizer of a CT scanner, whose table
        moves. Each row is a fan beam of its own, so columns are magnified and rows are not.
    fov_mm: edge of the reconstructed cube, centred on the isocentre.
    sdd_mm, sid_mm: source-to-detector and source-to-isocentre distance (cone and scout).
    detector_mm: edge of the square picture, centred on the central ray, measured on the detector (cone) or, as
        DICOM's Pixel Spacing of scouts is, in the plane of the isocentre (scout; ``sdd_mm`` then says which
        scanner it was and changes no pixel). By default it sees exactly ``fov_mm`` at the isocentre
        (``fov_mm * sdd_mm / sid_mm``; parallel and scout: ``fov_mm``).

    source_sides: where the source stands in the frontal and in the lateral view: ``"behind"`` (PA) or ``"in front"``
        (AP); ``"on the right"`` (left lateral) or ``"on the left"``. The detector is opposite; pictures keep their
        orientation.

    Defaults of a scout: 949 and 541 mm, DICOM's Distance Source to Detector and to Patient of GE's scanners.

    Raises ``ValueError`` naming the field when a value is impossible.
    """

    kind: str = "cone"
    fov_mm: float = FOV_MM
    sdd_mm: float | None = None
    sid_mm: float | None = None
    detector_mm: float | None = None
    source_sides: tuple[str, str] = DEFAULT_SIDES

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"geometry.kind is {self.kind!r}; expected {', '.join(map(repr, KINDS))}")
        self._check_length("fov_mm")
        sides = tuple(self.source_sides) if isinstance(self.source_sides, list | tuple) else ()
        if len(sides) != 2 or any(side not in known for side, known in zip(sides, SOURCE_SIDES)):
            raise ValueError(f"geometry.source_sides is {self.source_sides!r}; expected one each of {SOURCE_SIDES}")
        self._set("source_sides", sides)
        if self.kind == "parallel":
            # Distances and sides mean nothing for parallel rays: dropped, so that equal geometries compare equal.
            self._set("sdd_mm", None)
            self._set("sid_mm", None)
            self._set("source_sides", DEFAULT_SIDES)
        else:
            sdd_mm, sid_mm = DISTANCES_MM[self.kind]
            self._set("sdd_mm", sdd_mm if self.sdd_mm is None else self.sdd_mm)
            self._set("sid_mm", sid_mm if self.sid_mm is None else self.sid_mm)
            self._check_length("sdd_mm")
            self._check_length("sid_mm")
            if not self.sid_mm > self.fov_mm / 2:
                raise ValueError(
                    f"geometry.sid_mm is {self.sid_mm}; the source must lie outside the cube"
                    f" (above fov_mm / 2 = {self.fov_mm / 2})"
                )
            if not self.sdd_mm >= self.sid_mm:
                raise ValueError(
                    f"geometry.sdd_mm is {self.sdd_mm}; the detector must lie behind the"
                    f" isocentre (at least sid_mm = {self.sid_mm})"
                )
        if self.detector_mm is None:
            scale = self.sdd_mm / self.sid_mm if self.kind == "cone" else 1.0
            self._set("detector_mm", self.fov_mm * scale)
        self._check_length("detector_mm")

    def _check_length(self, name):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(f"geometry.{name} is {value!r}; expected a length above 0 mm")
        self._set(name, float(value))

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict:
        """Plain dict for JSON manifests and checkpoints; usual sides are left out, as in earlier versions."""
        sides = {} if self.source_sides == DEFAULT_SIDES else {"source_sides": list(self.source_sides)}
        return {key: value for key, value in asdict(self).items() if key != "source_sides"} | sides

    @classmethod
    def from_dict(cls, data: dict) -> Geometry:
        """Inverse of :meth:`to_dict`; an unknown key raises ``ValueError`` naming it."""
        known = set(cls.__dataclass_fields__)
        extra = set(data) - known
        if extra:
            raise ValueError(f"geometry has unknown keys {sorted(extra)}; known: {sorted(known)}")
        return cls(**data)

    def __str__(self) -> str:
        if self.kind == "parallel":
            return f"parallel, cube {self.fov_mm:g} mm, detector {self.detector_mm:g} mm"
        picture = f"picture {self.detector_mm:g} mm at the isocentre" if self.kind == "scout" else ""
        usual = self.source_sides == DEFAULT_SIDES
        sides = "" if usual else f", source {self.source_sides[0]} (frontal) and {self.source_sides[1]} (lateral)"
        return (
            f"{self.kind}, source-detector {self.sdd_mm:g} mm, source-isocentre {self.sid_mm:g} mm,"
            f" cube {self.fov_mm:g} mm, {picture or f'detector {self.detector_mm:g} mm'}{sides}"
        )

    @property
    def picture_distance_mm(self) -> float:
        """Distance from the source of the plane that ``detector_mm`` is measured in; infinite for parallel rays."""
        return {"cone": self.sdd_mm, "scout": self.sid_mm, "parallel": math.inf}[self.kind]

    def magnification(self, view: int, depth_mm):
        """Magnification of a plane of the cube onto the picture, across the view (columns).

        view 0 (PA): ``depth_mm``, a tensor or a number, is y; view 1 (lateral): it is x. Same shape out.
        """
        if self.kind == "parallel":
            return 1.0 + 0.0 * depth_mm
        from_usual_side = self.source_sides[view] == DEFAULT_SIDES[view]
        towards_detector = depth_mm if (view == 1) == from_usual_side else -depth_mm
        return self.picture_distance_mm / (self.sid_mm + towards_detector)

    def row_magnification(self, view: int, depth_mm):
        """:meth:`magnification` along z (rows): the same, but 1 in a scout."""
        return 1.0 + 0.0 * depth_mm if self.kind == "scout" else self.magnification(view, depth_mm)

    def voxel_centres_mm(self, size: int, **tensor_options) -> torch.Tensor:
        """Centres in mm of ``size`` equal voxels along one edge of the cube, ``(size,)``."""
        return _centres(size, self.fov_mm, **tensor_options)

    def project(self, view: int, z_mm, y_mm, x_mm):
        """Detector coordinates ``(v_mm, u_mm)`` (row, column; origin at the centre) of points in mm.

        The three coordinates broadcast against each other.
        """
        depth, across = (y_mm, x_mm) if view == 0 else (x_mm, y_mm)
        return self.row_magnification(view, depth) * z_mm, self.magnification(view, depth) * across


def _centres(size: int, extent_mm: float, **tensor_options) -> torch.Tensor:
    return ((torch.arange(size, **tensor_options) + 0.5) / size - 0.5) * extent_mm


def hat_weights(position_mm: torch.Tensor, extent_mm: float, size: int, constant: bool = False) -> torch.Tensor:
    """Linear-interpolation weights ``(..., size)`` that read ``size`` cells across ``extent_mm`` at positions.

    Beyond the outermost cell centres they fade linearly to zero (zero padding), or, with ``constant``, stay
    on the outermost cell.
    """
    index = (position_mm / extent_mm + 0.5) * size - 0.5
    if constant:
        index = index.clamp(0, size - 1)
    cells = torch.arange(size, device=position_mm.device, dtype=position_mm.dtype)
    return (1.0 - (index.unsqueeze(-1) - cells).abs()).clamp_min(0.0)


# ------------------------------------------------------------------------------------------------
# Rendering (Joseph's method)


def _bands(geometry, view, volume_shape, image_size):
    """Rows and columns of a view: which voxels of each slice perpendicular to the central ray its pixels read."""
    depth, height, width = volume_shape
    slices, across = (height, width) if view == 0 else (width, height)
    outermost = (1 - 1 / slices) / 2 * geometry.fov_mm

    def band(magnification, pixels, voxels):
        step = geometry.detector_mm / pixels / (geometry.fov_mm / voxels)
        first, last = (step / magnification(view, depth_mm) for depth_mm in (-outermost, outermost))
        return Band(first, (last - first) / max(1, slices - 1), slices, pixels, voxels)

    rows = band(geometry.row_magnification, image_size[0], depth)
    return rows, band(geometry.magnification, image_size[1], across)


def _slab_length(geometry, view, volume_shape, image_size, device):
    """Length in mm of each detector ray inside one slab of voxels, ``(rows, columns)``."""
    slices = volume_shape[1] if view == 0 else volume_shape[2]
    thickness = geometry.fov_mm / slices
    if geometry.kind == "parallel":
        return torch.full(image_size, thickness, device=device)
    v = _centres(image_size[0], geometry.detector_mm, device=device)[:, None]
    u = _centres(image_size[1], geometry.detector_mm, device=device)[None, :]
    if geometry.kind == "scout":  # each row's fan lies in its own plane
        v = torch.zeros_like(v)
    return thickness * torch.sqrt(1.0 + (u * u + v * v) / geometry.picture_distance_mm**2)


def _fastest(device: torch.device) -> str:
    """The fastest of :data:`BACKENDS` that works on a device."""
    if torch.compiler.is_compiling():
        return "dense"
    if device.type == "cuda":
        from xray2ct.triton_kernels import kernels_work  # here, as the import of triton takes half a second

        return "triton" if kernels_work(device) else "dense"
    return "banded" if device.type == "cpu" else "dense"


def _backend(name: str, device: torch.device):
    """The module with ``project`` and ``back_project`` that ``backend`` of :func:`line_integrals` means."""
    if name == "auto":
        name = _fastest(device)
    if name == "triton":
        from xray2ct.geometry import joseph_triton

        return joseph_triton
    return {"dense": dense, "banded": banded}[name]


class _ViewIntegral(torch.autograd.Function):
    """Line integrals of one view; linear in the volume, so the backward pass is the exact adjoint.

    Slice k contributes ``R_k S_k C_k^T`` (rows and columns of a slice perpendicular to the central ray are magnified
    independently). Nothing is kept for the backward pass: the weights are made again.
    """

    @staticmethod
    def forward(ctx, volume, geometry, view, image_size, backend):
        ctx.arguments, ctx.volume_shape = (geometry, view, image_size, backend), volume.shape[2:]
        return _project_view(volume, geometry, view, image_size, backend)

    @staticmethod
    def backward(ctx, grad_image):
        geometry, view, _, backend = ctx.arguments
        return _back_project_view(grad_image, geometry, view, ctx.volume_shape, backend), None, None, None, None


class _ViewAdjoint(torch.autograd.Function):
    """The adjoint of :class:`_ViewIntegral`, as an operation of its own; its backward pass is the projection."""

    @staticmethod
    def forward(ctx, image, geometry, view, volume_shape, backend):
        ctx.arguments = (geometry, view, tuple(image.shape[1:]), backend)
        return _back_project_view(image, geometry, view, volume_shape, backend)

    @staticmethod
    def backward(ctx, grad_volume):
        return _project_view(grad_volume, *ctx.arguments), None, None, None, None


def _project_view(volume, geometry, view, image_size, backend):
    """Line integrals ``(B, *image_size)`` of one view of ``(B, 1, D, H, W)``."""
    rows, cols = _bands(geometry, view, volume.shape[2:], image_size)
    slabs = _to_slabs(volume, view)  # (B, K, D, C)
    if geometry.kind == "parallel":  # all slices are read alike: summed first
        image = dense.project(slabs.sum(dim=1, keepdim=True), rows.part(0, 1), cols.part(0, 1))
    else:
        image = _backend(backend, volume.device).project(slabs, rows, cols)
    return image * made_once(_slab_length, geometry, view, tuple(volume.shape[2:]), image_size, volume.device)


def _back_project_view(image, geometry, view, volume_shape, backend):
    """Adjoint of :func:`_project_view`: ``(B, h, w)`` -> ``(B, 1, *volume_shape)``."""
    image_size = tuple(image.shape[1:])
    rows, cols = _bands(geometry, view, volume_shape, image_size)
    image = image * made_once(_slab_length, geometry, view, tuple(volume_shape), image_size, image.device)
    volume = image.new_empty(image.shape[0], 1, *volume_shape)
    slabs = _to_slabs(volume, view)
    if geometry.kind == "parallel":
        slab = torch.empty_like(slabs[:, :1])
        dense.back_project(image, rows.part(0, 1), cols.part(0, 1), slab)
        slabs.copy_(slab.expand_as(slabs))
    else:
        _backend(backend, image.device).back_project(image, rows, cols, slabs)
    return volume


def _to_slabs(volume: torch.Tensor, view: int) -> torch.Tensor:
    """(B, 1, D, H, W) -> (B, slices along the view's depth axis, D, columns)."""
    return volume[:, 0].permute(0, 2, 1, 3) if view == 0 else volume[:, 0].permute(0, 3, 1, 2)


def line_integrals(mu: torch.Tensor, geometry: Geometry, image_size=(512, 512), backend: str = "auto") -> torch.Tensor:
    """Integrate attenuation along every detector ray of both views.

    mu: ``(B, 1, D, H, W)`` in 1/mm over the cube of ``geometry`` (sizes may differ per axis).
    backend: ``"auto"``, or to compare them ``"dense"`` (matrix products, everywhere), ``"banded"`` (sparse sums, a
        CPU's fastest) or ``"triton"`` (a GPU's kernels); parallel rays take one small product in each.
    Returns ``(B, 2, *image_size)``, dimensionless, always accumulated in float32.

    Joseph's method (IEEE Trans. Med. Imaging 1, 192, 1982): one bilinear sample per slice
    perpendicular to the central ray, times the ray's length in the slice. Rays sample pixel
    centres; image pixels much coarser than the voxels are therefore aliased: render finer and
    average. Differentiable with respect to ``mu`` (exact adjoint), not to the geometry.
    """
    if mu.ndim != 5 or mu.shape[1] != 1:
        raise ValueError(f"volume has shape {tuple(mu.shape)}; expected (B, 1, D, H, W)")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected {', '.join(map(repr, BACKENDS))}")
    image_size = (int(image_size[0]), int(image_size[1]))
    with without_autocast(mu.device):
        mu = mu.float()
        views = [_ViewIntegral.apply(mu, geometry, view, image_size, backend) for view in range(2)]
    return torch.stack(views, dim=1)


def back_project(images: torch.Tensor, geometry: Geometry, volume_size, backend: str = "auto") -> torch.Tensor:
    """Exact adjoint of :func:`line_integrals`: images ``(B, 2, h, w)`` -> ``(B, 1, *volume_size)``, float32.

    For all volumes and images ``sum(line_integrals(volume) * images) = sum(volume * back_project(images))``, up to
    rounding. What the backward pass of :func:`line_integrals` computes, where no graph is kept; differentiable itself.
    """
    if images.ndim != 4 or images.shape[1] != 2:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 2, h, w)")
    shape = tuple(volume_size)
    with without_autocast(images.device):
        pa, lateral = (_ViewAdjoint.apply(images[:, v].float(), geometry, v, shape, backend) for v in range(2))
    return pa + lateral


def render_xrays(
    volume: torch.Tensor,
    geometry: Geometry,
    image_size=(512, 512),
    hu_window=HU_WINDOW,
    xray_scale: float = XRAY_SCALE,
) -> torch.Tensor:
    """Digitally reconstructed radiographs of a volume in [0, 1].

    volume: ``(B, 1, D, H, W)``. Returns ``(B, 2, *image_size)``: line integral / ``xray_scale``,
    in [0, 1] for any human chest (not clipped, so that gradients survive).
    """
    return line_integrals(unit_to_mu(volume.float(), hu_window), geometry, image_size) / xray_scale


def image_size_of(xray_size) -> tuple[int, int]:
    """``512`` or ``(512, 512)`` -> ``(512, 512)``."""
    if isinstance(xray_size, int):
        return (xray_size, xray_size)
    rows, columns = xray_size
    return (int(rows), int(columns))


def visible_fraction(geometry: Geometry) -> float:
    """Share of the cube that both views see (1.0 for parallel rays and a full detector)."""
    axis = geometry.voxel_centres_mm(64)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    half = geometry.detector_mm / 2
    inside = torch.ones_like(z, dtype=torch.bool)
    for view in (0, 1):
        v_mm, u_mm = geometry.project(view, z, y, x)
        inside &= (v_mm.abs() <= half) & (u_mm.abs() <= half)
    fraction = inside.float().mean().item()
    return 1.0 if math.isclose(fraction, 1.0) else fraction
