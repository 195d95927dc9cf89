"""The precision of inference: reduced on a GPU whose convolutions are found right, float32 elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from xray2ct.inference.predictor import Predictor
from xray2ct.training.convolution_check import reduced_precision_defects

CHECKED = "checked"


def precision_name(wanted: str, device: torch.device) -> str:
    """``checked`` is bfloat16 on a GPU that has it and float32 elsewhere; other names are themselves."""
    if wanted != CHECKED:
        return wanted
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def fall_back_where_wrong(system: Predictor, convolve=F.conv3d) -> None:
    """Compare the 3D convolutions of one prediction with float32, and use that, with a note, where one is wrong.

    Found on the actual shapes, as before a training: cuDNN's known defects are of large inputs.
    """
    if system.precision.name == "float32":
        return
    xrays = torch.rand(1, system.num_views, system.xray_size, system.xray_size)
    name, dtype = system.precision.name, system.precision.dtype
    defects = reduced_precision_defects(lambda: system.predict(xrays), dtype, system.device, convolve)
    if defects:
        system.precision.use_float32()
        system.notes.append(f"{name} convolutions are wrong here ({defects[0]}); computed in float32")
