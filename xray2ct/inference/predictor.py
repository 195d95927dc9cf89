"""The one interface of loaded systems (direct, baseline, cascade) that evaluation, reconstruction and export use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry
from xray2ct.inference.sample_calibration import SampleCalibration
from xray2ct.training.precision import Precision

# Turns a data set's item into a volume (D, H, W) in [0, 1], on the CPU. One that has a standard deviation, too, leaves
# that of its last volume in an attribute ``std``.
Method = Callable[[dict], torch.Tensor]
# Methods that only upsample what the last network starts from: trilinear, and by upsampling.upsample_spline.
TRILINEAR, CUBIC = "trilinear", "cubic_consistent"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Where a predictor's weights come from: path, entries of the checkpoint, fingerprint (of each stage)."""

    path: str
    header: dict
    weights: str | dict[str, str]


class Predictor(ABC):
    """Loaded networks that turn X-rays into a volume; subclasses set the attributes below when they are built.

    Raises :class:`InputError` naming the file for weights that predict NaN or infinity.
    """

    name: str  # in messages: "the direct system"
    geometry: Geometry
    hu_window: tuple[float, float]  # Hounsfield units of 0 and 1
    xray_scale: float  # line integral that an X-ray shows as 1
    xray_size: int  # resolution at which X-rays should be read
    xray_normalization: str  # how X-ray files were read in training, where a data set has no manifest
    num_views: int = 2  # 2: PA and lateral; 1: PA alone
    seen_channel: bool = False  # whether predict() takes what each X-ray shows, too
    volume_size: tuple[int, int, int]  # (D, H, W)
    device: torch.device
    precision: Precision
    notes: list[str]  # for the user
    std: torch.Tensor | None = None  # standard deviation of the last predict (B, 1, D, H, W), where it has one
    expected_coverage: dict[str, float] | None = None  # of ``std``, for a perfect model
    data_consistency: int = 0  # steps towards the X-rays within the prediction itself: the cascade's sampling
    consistency_validated: bool = False  # whether projection consistency made its volumes better: docs/consistency.md

    @abstractmethod
    def predict(self, xrays: torch.Tensor) -> torch.Tensor:
        """``(B, num_views, S, S)`` in [0, 1] -> volume ``(B, 1, D, H, W)`` in [0, 1], float32 on the CPU.

        With ``seen_channel`` also ``(B, num_views, 2, S, S)``: of each view pixels, then what is seen.
        """

    def methods(self) -> dict[str, Method]:
        """What an evaluation compares, by name: the system's own way first, then its parts and ceilings."""
        return {"model": self.predict_item}

    def own_methods(self, methods: dict[str, Method]) -> list[str]:
        """Which of :meth:`methods` are the system's own volumes; the others are its parts and ceilings."""
        return list(methods)[:1]

    def sample_calibration(self, consistency: dict | None) -> SampleCalibration | None:
        """The calibration of ``std`` for volumes of this consistency (:func:`consistency.how_of`), where there is one.

        Why there is none is added to ``notes``. Raises :class:`InputError` naming the file for one of other weights.
        """
        return None

    def predict_item(self, item: dict) -> torch.Tensor:
        """:meth:`predict` for a data set's item."""
        return self.predict(self.item_xrays(item))[0, 0]

    def item_xrays(self, item: dict) -> torch.Tensor:
        """X-rays ``(1, num_views, S, S)`` of a data set's item, which always has both views: PA first.

        With ``seen_channel`` ``(1, num_views, 2, S, S)``, from the item's ``seen``.
        """
        xrays = torch.stack([item["xrays"], item["seen"]], dim=1) if self.seen_channel else item["xrays"]
        return xrays[None, : self.num_views]

    @abstractmethod
    def checkpoints(self) -> list[LoadedCheckpoint]:
        """The checkpoints it was loaded from, the first stage's first."""

    @abstractmethod
    def summary(self) -> dict:
        """What a summary of results says about it: file names, epochs, parameters, settings; JSON-ready."""

    @abstractmethod
    def export_module(self) -> nn.Module:
        """:meth:`predict` as a module of tensors alone, with the same weights; :class:`InputError` where impossible."""


def check_view_count(name: str, trained: int, given: int) -> None:
    """Raise :class:`InputError` when ``name`` was trained with another number of views (1 or 2) than are given."""
    if given == trained:
        return
    if trained == 1:
        raise InputError(f"{name} was trained with one view, but got {given}; give the PA view alone")
    raise InputError(f"{name} was trained with two views, but got {given}; give the PA and the lateral view")
