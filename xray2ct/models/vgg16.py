"""VGG16's weights for the perceptual loss: from torchvision, a file, or random with a fixed seed."""

from __future__ import annotations

import http.client
import math
import os
import pickle
from pathlib import Path

import torch

from xray2ct.files import InputError

# Convolutions of VGG16 (configuration D) up to relu3_3: index in torchvision's `features`, input and
# output channels, and whether the activation is compared (relu1_2, relu2_2, relu3_3); a 2x2 max
# pooling follows each compared activation.
VGG_LAYERS = (
    (0, 3, 64, False),
    (2, 64, 64, True),
    (5, 64, 128, False),
    (7, 128, 128, True),
    (10, 128, 256, False),
    (12, 256, 256, False),
    (14, 256, 256, True),
)
VGG_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # all 13: VGG11, 13 and 19 have others
RANDOM_SEED = 2016
# What reading a weights file raises when it is missing, truncated, foreign or not to be trusted.
LOAD_ERRORS = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)


def import_torchvision():
    """Import torchvision, also a CUDA build next to a CPU-only torch.

    Such a pair lacks torchvision's compiled operators, and the import fails where it registers shapes for two of
    them. Nothing here calls them: declaring them is enough.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", signature)
        import torchvision
    return torchvision


def imagenet_weights() -> dict:
    """VGG16's ImageNet weights from torchvision (528 MB, cached in ``torch.hub.get_dir()``)."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        weights = import_torchvision().models.VGG16_Weights.IMAGENET1K_V1
        state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (ImportError, http.client.HTTPException, *LOAD_ERRORS) as error:
        raise InputError(
            f"loss.perceptual_weights is 'imagenet', but VGG16's weights can neither be read from {cache}"
            f" nor downloaded ({_first_line(error)}). Run once with internet access; or download"
            " vgg16-397923af.pth from download.pytorch.org/models elsewhere and set"
            " loss.perceptual_weights to its path; or set loss.perceptual_weights to 'random', or"
            " loss.perceptual_weight to 0."
        ) from error
    return _checked(state, cache / "vgg16-397923af.pth")


def file_weights(path) -> dict:
    """VGG16 weights from a file in torchvision's format; anything else raises :class:`InputError`."""
    if not isinstance(path, str | os.PathLike) or not Path(path).expanduser().is_file():
        raise InputError(
            f"loss.perceptual_weights is {path!r}; expected 'imagenet', 'random' or the path of an existing"
            " file vgg16-397923af.pth"
        )
    path = Path(path).expanduser()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        raise InputError(f"{path}: not readable as VGG16 weights ({_first_line(error)})") from None
    return _checked(state, path)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _checked(state, path) -> dict:
    """``state`` if it is a VGG16's in torchvision's format; otherwise :class:`InputError` naming the file."""
    if not isinstance(state, dict):
        raise InputError(f"{path}: not VGG16 weights: holds a {type(state).__name__}, expected a state dict")
    expected: dict[str, tuple[int, ...]] = {
        f"features.{index}.weight": (outputs, inputs, 3, 3) for index, inputs, outputs, _ in VGG_LAYERS
    }
    expected |= {f"features.{index}.bias": (outputs,) for index, _, outputs, _ in VGG_LAYERS}
    for name, shape in expected.items():
        found = tuple(state[name].shape) if isinstance(state.get(name), torch.Tensor) else "missing"
        if found != shape:
            raise InputError(f"{path}: not VGG16 weights: {name} is {found}, expected shape {shape}")
    allowed = {f"features.{index}.{kind}" for index in VGG_CONVOLUTIONS for kind in ("weight", "bias")}
    extra = [key for key in state if str(key).startswith("features.") and key not in allowed]
    if extra:
        raise InputError(f"{path}: not VGG16 weights: holds {extra[0]}, which VGG16 does not have")
    return state


def random_weights() -> dict:
    """He-initialised VGG16 filters from a fixed seed; the global random state is neither used nor changed."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    state = {}
    for index, inputs, outputs, _ in VGG_LAYERS:
        weight = torch.empty(outputs, inputs, 3, 3)
        state[f"features.{index}.weight"] = weight.normal_(0.0, math.sqrt(2 / (9 * inputs)), generator=generator)
        state[f"features.{index}.bias"] = torch.zeros(outputs)
    return state
