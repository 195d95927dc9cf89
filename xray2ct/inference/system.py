"""The trained direct system: one or two checkpoints that fit together, on a device, with tiles as memory allows.

from xray2ct.inference.system import DirectSystem
system = DirectSystem("best_model.pt", "best_refinement.pt")
volume = system.predict(xrays)      # (B, 2, S, S) -> (B, 1, 256, 256, 256) in [0, 1]
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model_enhanced import EnhancedDirectModel, RefinementNetwork
from xray2ct.checkpoints import check_compatible, weights_fingerprint
from xray2ct.files import InputError
from xray2ct.inference.precision import CHECKED, fall_back_where_wrong, precision_name
from xray2ct.inference.predictor import CUBIC, TRILINEAR, LoadedCheckpoint, Method, Predictor
from xray2ct.models.blocks import upsample
from xray2ct.models.coarse import CoarseModel
from xray2ct.models.loading import load_base_model, load_refinement
from xray2ct.models.memory import TILES, choose_tile
from xray2ct.models.upsampling import upsample_spline
from xray2ct.models.working_weights import cast_weights_
from xray2ct.training.compiling import compiled as compile_for
from xray2ct.training.precision import Precision, keep_freed_memory, set_memory_format


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


def to_host(volume: torch.Tensor) -> torch.Tensor:
    """The volume on the CPU: from a GPU by one copy to pinned memory, which torch keeps for the next one."""
    if volume.device.type != "cuda":
        return volume
    host = torch.empty(volume.shape, dtype=volume.dtype, pin_memory=True)
    host.copy_(volume, non_blocking=True)
    torch.cuda.current_stream(volume.device).synchronize()
    return host


class DirectSystem(Predictor):
    """Stage 1 and, when given, stage 2, ready for inference.

    base, refinement: checkpoint files; base may be a baseline's. device: auto, cpu, cuda, ... precision: float32,
    bfloat16, float16, auto, or checked (float32 on a CPU, on a GPU bfloat16 where it computes that right). tile: coarse
    voxels per axis that stage 2 refines at once; "auto" looks at the free memory, 0 forces the whole volume. compiled:
    stage 1 by torch.compile, on a GPU as CUDA graphs: a minute at the first volume, less time for each later one.
    Raises :class:`InputError` naming the file when a checkpoint is missing, damaged or of another kind, or when the two
    are of different geometries or sizes.
    """

    name = "the direct system"

    def __init__(
        self,
        base,
        refinement=None,
        device="auto",
        precision="float32",
        tile: int | str = "auto",
        compiled: bool = False,
    ):
        if tile != "auto" and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 0):
            raise InputError(f"--tile is {tile!r}; expected auto, 0 (the whole volume) or a number of coarse voxels")
        self.device, self.tile = pick_device(device), tile
        self.base, self.refined_by = str(base), str(refinement)
        self.precision = Precision(precision_name(precision, self.device), self.device)
        model, self.checkpoint = load_base_model(base, self.device)
        assert isinstance(model, CoarseModel)
        self.model, self.seen_channel = model, model.seen_channel
        self.refinement: RefinementNetwork | None = None
        self.refinement_checkpoint: dict = {}
        self.notes = []
        if refinement is not None:
            network, self.refinement_checkpoint = load_refinement(refinement, self.device)
            assert isinstance(network, RefinementNetwork)
            self.refinement = network
            self._check_pair()
        self.geometry, self.hu_window = self.model.geometry, tuple(self.checkpoint["hu_window"])
        self.xray_scale = self.checkpoint["xray_scale"]
        settings = self.checkpoint.get("config", {}).get("data", {})
        self.xray_normalization = settings.get("xray_normalization", "percentile")
        scale = 1 if self.refinement is None else RefinementNetwork.scale
        depth, height, width = (scale * n for n in self.model.volume_size)
        self.volume_size = depth, height, width
        one_pass = isinstance(self.model, EnhancedDirectModel) and self.model.passes == 1
        self.consistency_validated = self.refinement is None and self.volume_size == (64, 64, 64) and one_pass
        guides = [self.refinement_checkpoint] if self.guided else []
        self.xray_size = max(header["xray_size"] for header in (self.checkpoint, *guides))  # the finest trained at
        if self.device.type == "cpu":
            keep_freed_memory()  # page faults were over a quarter of the time of a 256^3 volume
        for network in (self.model, self.refinement):
            if network is not None:
                set_memory_format(network)
        if precision == CHECKED:
            fall_back_where_wrong(self)
        for network in (self.model, self.refinement):
            if network is not None and self.precision.name != "float32":
                cast_weights_(network, self.precision.dtype)  # once, and not at each call
        self.compiled = compile_for(self.model, "graphs" if compiled else False, self.device, self.notes.append)

    @property
    def guided(self) -> bool:
        """Whether stage 2 sees the X-rays, too."""
        return self.refinement is not None and self.refinement.guidance is not None

    def _check_pair(self) -> None:
        expected = {key: self.checkpoint[key] for key in ("geometry", "hu_window", "xray_scale")}
        check_compatible(self.refined_by, self.refinement_checkpoint, **expected)
        found, wanted = list(self.model.volume_size), list(self.refinement_checkpoint["coarse_size"])
        if found != wanted:
            raise InputError(f"{self.refined_by} refines volumes of {wanted} voxels; those of {self.base} have {found}")
        fingerprints = {
            weights_fingerprint(self.model.state_dict()),
            self.checkpoint.get("source", {}).get("fingerprint"),
        }
        if self.refinement_checkpoint["base_fingerprint"] not in fingerprints:  # rounded ones are as good
            self.notes.append(
                f"{self.refined_by} was trained on another stage 1 than {self.base}: expect a little less of it"
            )

    def coarse(self, xrays: torch.Tensor) -> torch.Tensor:
        """Stage 1: X-rays as :meth:`predict` takes -> ``(B, 1, 64, 64, 64)`` in [0, 1], float32 on the device."""
        with torch.inference_mode(), self.precision.autocast():
            volume, _ = self.compiled(xrays.to(self.device))
        volume = volume.float() if self.compiled is self.model else volume.float().clone()  # a graph's own memory
        return check_finite(volume, self.base, self.precision.name)

    def refine(self, coarse: torch.Tensor, xrays: torch.Tensor) -> torch.Tensor:
        """Stage 2: ``(B, 1, 64, 64, 64)`` -> ``(B, 1, 256, 256, 256)`` float32 on the CPU.

        Out of GPU memory, smaller tiles are tried; the values do not depend on the tile.
        """
        assert self.refinement is not None
        guide = xrays.to(self.device) if self.guided else None
        for tile in self._tiles(coarse):
            try:
                whole = tile is None  # tiles are smaller than what fits, and collected on the CPU
                with torch.inference_mode(), self.precision.autocast():
                    volume = self.refinement.refine(coarse.to(self.device), guide, tile, None if whole else "cpu")
                return to_host(check_finite(volume, self.refined_by, self.precision.name))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        raise InputError(
            f"refining {tuple(coarse.shape[2:])} does not fit this GPU's memory even in tiles of {TILES[-1]};"
            " use --device cpu"
        )

    def _tiles(self, coarse) -> list[int | None]:
        """Tile sizes to try, the preferred one first."""
        if isinstance(self.tile, str):  # auto
            size = self.precision.dtype.itemsize
            first = choose_tile(self.refinement, coarse.shape[2:], self.device, size)
        else:
            first = self.tile or None
        limit = max(coarse.shape[2:]) if first is None else first
        return [first, *(tile for tile in TILES if tile < limit)]

    def predict(self, xrays: torch.Tensor) -> torch.Tensor:
        coarse = self.coarse(xrays)
        return to_host(coarse) if self.refinement is None else self.refine(coarse, xrays)

    def methods(self) -> dict[str, Method]:
        """Stage 1 alone, or stage 2 with plain upsampling of the same stage-1 volume and its ceilings.

        ``trilinear`` and ``cubic_consistent`` (:func:`upsampling.upsample_spline`) upsample stage 1's volume. The
        ceilings ``perfect_64`` and ``perfect_64_cubic`` do the same with the true volume at stage 1's resolution: what
        interpolation alone would reach after a perfect stage 1.
        """
        if self.refinement is None:
            return super().methods()

        def predicted(item: dict) -> torch.Tensor:
            return self.coarse(self.item_xrays(item))

        def perfect(item: dict) -> torch.Tensor:
            return F.avg_pool3d(item["ct_volume"].unsqueeze(0), RefinementNetwork.scale)

        ceiling = f"perfect_{self.volume_size[0] // RefinementNetwork.scale}"
        return {
            "refined": self.predict_item,
            TRILINEAR: lambda item: upsample(predicted(item))[0, 0].cpu(),
            CUBIC: lambda item: upsample_spline(predicted(item))[0, 0].clamp(0, 1).cpu(),
            ceiling: lambda item: upsample(perfect(item))[0, 0],
            f"{ceiling}_cubic": lambda item: upsample_spline(perfect(item))[0, 0].clamp(0, 1),
        }

    def checkpoints(self) -> list[LoadedCheckpoint]:
        weights = weights_fingerprint(self.checkpoint["model_state_dict"])
        loaded = [LoadedCheckpoint(self.base, self.checkpoint, weights)]
        if self.refinement is not None:
            weights = weights_fingerprint(self.refinement_checkpoint["refinement_state_dict"])
            loaded.append(LoadedCheckpoint(self.refined_by, self.refinement_checkpoint, weights))
        return loaded

    def summary(self) -> dict:
        entries = {
            "checkpoint": Path(self.base).name,
            "epoch": self.checkpoint["epoch"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        if self.refinement is not None:
            entries |= {
                "refinement": Path(self.refined_by).name,
                "refinement_epoch": self.refinement_checkpoint["epoch"],
                "refinement_parameters": sum(p.numel() for p in self.refinement.parameters()),
                "guided": self.guided,
            }
        return entries

    def export_module(self) -> nn.Module:
        return DirectPath(self)


class DirectPath(nn.Module):
    """Both stages as one: X-rays as :meth:`Predictor.predict` takes -> volume ``(B, 1, D, H, W)`` in [0, 1]."""

    def __init__(self, system: DirectSystem):
        super().__init__()
        self.model, self.refinement, self.guided = system.model, system.refinement, system.guided

    def forward(self, xrays):
        coarse, _ = self.model(xrays)
        if self.refinement is None:
            return coarse
        return self.refinement(coarse, xrays if self.guided else None)


def add_tile_argument(parser) -> None:
    """``--tile auto | 0 | N`` for the scripts that run stage 2."""
    parser.add_argument(
        "--tile",
        default="auto",
        type=lambda text: int(text) if text.lstrip("-").isdigit() else text,
        help="coarse voxels per axis that stage 2 refines at once; 0: all; auto: as memory allows (default auto)",
    )
