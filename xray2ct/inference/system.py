"""The trained direct system: one or two checkpoints that fit together, on a device, with tiles as memory allows.

from pipeline import DirectSystem
system = DirectSystem("best_model.pt", "best_refinement.pt")
volume = system.predict(xrays)      # (B, 2, S, S) -> (B, 1, 256, 256, 256) in [0, 1]
"""

from __future__ import annotations

import torch

from model_enhanced import RefinementNetwork
from xray2ct.checkpoints import check_compatible, weights_fingerprint
from xray2ct.files import InputError
from xray2ct.models.loading import load_base_model, load_refinement
from xray2ct.models.memory import TILES, choose_tile
from xray2ct.training.precision import Precision, keep_freed_memory, to_channels_last


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU; any other that is not there or not supported: :class:`InputError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # torch knows others (mps, xpu, meta): not tested
        raise InputError(f"--device {name}: expected auto, cpu or cuda (cuda:1, ... for another GPU)")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no GPU is visible to this installation of torch")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def check_finite(volume: torch.Tensor, origin: str, precision: str = "float32") -> torch.Tensor:
    """Return a predicted volume; :class:`InputError` naming the weights' ``origin`` for NaN or infinity in it.

    As Hounsfield units they would become plausible numbers: NaN is 0 HU, water, as an integer.
    """
    if volume.isfinite().all():
        return volume
    hint = "are its weights damaged?" if precision == "float32" else f"{precision} overflows: try --precision float32"
    raise InputError(f"{origin}: the predicted volume holds NaN or infinite values; {hint}")


class DirectSystem:
    """Stage 1 and, when given, stage 2, ready for inference.

    base, refinement: checkpoint files. device: auto, cpu, cuda, ... precision: float32, bfloat16, float16 or
    auto. tile: coarse voxels per axis that stage 2 refines at once; "auto" looks at the free memory, 0 forces the
    whole volume. Raises :class:`InputError` naming the file when a checkpoint is missing, damaged or of
    another kind, or when the two are of different geometries or sizes; its methods raise it for weights that
    predict NaN or infinity.
    """

    def __init__(self, base, refinement=None, device="auto", precision="float32", tile: int | str = "auto"):
        if tile != "auto" and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 0):
            raise InputError(f"--tile is {tile!r}; expected auto, 0 (the whole volume) or a number of coarse voxels")
        self.device, self.tile = pick_device(device), tile
        self.base, self.refined_by = str(base), str(refinement)
        self.precision = Precision(precision, self.device)
        self.model, self.checkpoint = load_base_model(base, self.device)
        self.refinement, self.refinement_checkpoint = None, None
        self.notes: list[str] = []
        if refinement is not None:
            self.refinement, self.refinement_checkpoint = load_refinement(refinement, self.device)
            self._check_pair(base, refinement)
        if self.device.type == "cpu":
            keep_freed_memory()  # page faults were over a quarter of the time of a 256^3 volume
            for network in (self.model, self.refinement):
                if network is not None:
                    to_channels_last(network)

    def _check_pair(self, base, refinement) -> None:
        expected = {key: self.checkpoint[key] for key in ("geometry", "hu_window", "xray_scale")}
        check_compatible(refinement, self.refinement_checkpoint, **expected)
        found, wanted = list(self.model.volume_size), list(self.refinement_checkpoint["coarse_size"])
        if found != wanted:
            raise InputError(f"{refinement} refines volumes of {wanted} voxels; those of {base} have {found}")
        if weights_fingerprint(self.model.state_dict()) != self.refinement_checkpoint["base_fingerprint"]:
            self.notes.append(f"{refinement} was trained on another stage 1 than {base}: expect a little less of it")

    @property
    def geometry(self):
        """Geometry of the X-rays and the cube."""
        return self.model.geometry

    @property
    def hu_window(self) -> tuple[float, float]:
        """Hounsfield units of 0 and 1."""
        return tuple(self.checkpoint["hu_window"])

    @property
    def volume_size(self) -> tuple[int, int, int]:
        """``(D, H, W)`` of the result."""
        scale = 1 if self.refinement is None else RefinementNetwork.scale
        return tuple(scale * n for n in self.model.volume_size)

    @property
    def xray_size(self) -> int:
        """Resolution at which X-rays should be read: the finest that a stage was trained at."""
        sizes = [self.checkpoint["xray_size"]]
        if self.refinement is not None and self.refinement.guidance is not None:
            sizes.append(self.refinement_checkpoint["xray_size"])
        return max(sizes)

    def coarse(self, xrays: torch.Tensor) -> torch.Tensor:
        """Stage 1: ``(B, 2, S, S)`` in [0, 1] -> ``(B, 1, 64, 64, 64)`` in [0, 1], float32 on the device."""
        with torch.inference_mode(), self.precision.autocast():
            volume, _ = self.model(xrays.to(self.device))
        return check_finite(volume.float(), self.base, self.precision.name)

    def refine(self, coarse: torch.Tensor, xrays: torch.Tensor) -> torch.Tensor:
        """Stage 2: ``(B, 1, 64, 64, 64)`` -> ``(B, 1, 256, 256, 256)`` float32 on the CPU.

        Out of GPU memory, smaller tiles are tried; the values do not depend on the tile.
        """
        xrays = xrays.to(self.device) if self.refinement.guidance is not None else None
        for tile in self._tiles(coarse):
            try:
                with torch.inference_mode(), self.precision.autocast():
                    volume = self.refinement.refine(coarse.to(self.device), xrays, tile, device="cpu")
                return check_finite(volume, self.refined_by, self.precision.name)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        raise InputError(
            f"refining {tuple(coarse.shape[2:])} does not fit this GPU's memory even in tiles of {TILES[-1]};"
            " use --device cpu"
        )

    def _tiles(self, coarse) -> list[int | None]:
        """Tile sizes to try, the preferred one first."""
        if self.tile == "auto":
            size = self.precision.dtype.itemsize
            first = choose_tile(self.refinement, coarse.shape[2:], self.device, size)
        else:
            first = self.tile or None
        limit = max(coarse.shape[2:]) if first is None else first
        return [first, *(tile for tile in TILES if tile < limit)]

    def predict(self, xrays: torch.Tensor) -> torch.Tensor:
        """``(B, 2, S, S)`` in [0, 1] -> volume ``(B, 1, D, H, W)`` in [0, 1], float32 on the CPU."""
        coarse = self.coarse(xrays)
        return coarse.cpu() if self.refinement is None else self.refine(coarse, xrays)


def add_tile_argument(parser) -> None:
    """``--tile auto | 0 | N`` for the scripts that run stage 2."""
    parser.add_argument(
        "--tile",
        default="auto",
        type=lambda text: int(text) if text.lstrip("-").isdigit() else text,
        help="coarse voxels per axis that stage 2 refines at once; 0: all; auto: as memory allows (default auto)",
    )
