"""Base class of the stage-1 networks: sizes, and the acquisition that travels in the ``state_dict``."""

from __future__ import annotations

from collections.abc import Collection

from xray2ct.files import InputError, whole_number, whole_numbers
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry
from xray2ct.models.blocks import ActivationCheckpointing, check_stem_stride, check_xray_size


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise :class:`InputError` naming a setting of the model that is none of its choices."""
    if value not in choices:
        raise InputError(f"model.{name} is {value!r}; expected one of {', '.join(choices)}")


def check_shape(base_channels, stem_stride, encoder_blocks, decoder_blocks, transformer_blocks=0) -> None:
    """Raise :class:`InputError` naming the setting that a stage-1 network cannot have."""
    whole_number("model.base_channels", base_channels, 16, multiple=16)
    if base_channels >= 256:  # the narrowest features, half of them, are normalised in groups of at least 16
        whole_number("model.base_channels", base_channels, 256, multiple=32)
    check_stem_stride(stem_stride)
    whole_numbers("model.encoder_blocks", encoder_blocks, 4, 0)
    whole_numbers("model.decoder_blocks", decoder_blocks, 3, 0)
    whole_number("model.transformer_blocks", transformer_blocks, 0)


class CoarseModel(ActivationCheckpointing):
    """What loading and stage 2 want of a stage-1 network: sizes, and how its data were made in the ``state_dict``.

    acquisition: geometry, HU window and X-ray scale of the data that it is trained on.
    seen_channel: whether it reads what each X-ray shows as a second channel (:func:`blocks.prepare_xrays`).
    """

    seen_channel = False

    def __init__(self, volume_size, geometry: Geometry | None, xray_size: int | None):
        super().__init__()
        self.volume_size = tuple(whole_numbers("model.volume_size", volume_size, 3, 16, multiple=8))
        check_xray_size(xray_size)
        self.acquisition, self.xray_size = Acquisition(geometry or Geometry()), xray_size

    @property
    def geometry(self) -> Geometry:
        return self.acquisition.geometry

    def get_extra_state(self) -> dict:
        return {**self.acquisition.to_dict(), "xray_size": self.xray_size}

    def set_extra_state(self, state: dict) -> None:
        ours = self.acquisition  # earlier versions stored the geometry alone
        window, scale = state.get("hu_window", ours.hu_window), state.get("xray_scale", ours.xray_scale)
        self.acquisition = Acquisition(Geometry.from_dict(state["geometry"]), window, scale)
        self.xray_size = state["xray_size"]
