"""Export of a loaded system as one ONNX file that holds all a user needs, checked against PyTorch."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset import PatientDataset
from xray2ct.checkpoints import weights_fingerprint
from xray2ct.data.phantoms import make_phantom
from xray2ct.files import InputError, atomic_path
from xray2ct.geometry.projector import hu_to_unit, render_xrays
from xray2ct.geometry.traced import each_made_once
from xray2ct.imaging.body import locate_cube
from xray2ct.imaging.cube import cube_affine, resample_cube
from xray2ct.imaging.read_ct import CtImage
from xray2ct.inference.predictor import Predictor
from xray2ct.inference.reconstruction import Pipeline

OPSET = 18  # what torch's exporter writes natively; onnxruntime reads it since 1.14 (2023)
PHANTOM_SIZE, PHANTOM_SPACING_MM = 64, 5.0


def export(predictor: Predictor, path, xrays: torch.Tensor, opset: int = OPSET, tolerance: float = 1e-4) -> None:
    """Write ``predictor`` as the ONNX file ``path``, after a test run at batch 1 and 2 on two cases of ``xrays``.

    Prints the largest differences from PyTorch; :class:`InputError` above ``tolerance`` (of [0, 1]) and for what torch
    cannot export; an existing file is kept then.
    """
    module = predictor.export_module()
    program = trace(module, tuple(xrays.shape[1:]))
    expected = torch.cat([predictor.predict(case[None]) for case in xrays])
    low, high = predictor.hu_window
    with atomic_path(Path(path)) as temporary:
        write_onnx(temporary, program, metadata(predictor, module), opset)
        check_file(path, onnx_runner(temporary), xrays, expected, high - low, tolerance)


def metadata(predictor: Predictor, module: nn.Module) -> dict:
    """What somebody needs who has the file alone: scales, geometry, conventions; JSON-ready."""
    geometry, size = predictor.geometry, predictor.volume_size[0]
    views = "channel 0 PA (columns patient right to left), channel 1 lateral (columns anterior to posterior)"
    shape = "batch, views, S, S"
    if predictor.seen_channel:
        shape = "batch, views, 2, S, S"
        views += "; of each view pixels, then what is seen (0 behind collimators and beyond the film)"
    return {
        "input": f"xrays ({shape}) float32 in [0, 1], line integral / xray_scale, bone bright; {views}",
        "output": "volume (batch, 1, D, H, W) float32 in [0, 1] of hu_window; D superior to inferior, H anterior to"
        " posterior, W patient right to left",
        "xray_size": predictor.xray_size,
        "views": predictor.num_views,
        "seen_channel": predictor.seen_channel,
        "xray_scale": predictor.xray_scale,
        "hu_window": list(predictor.hu_window),
        "volume_size": list(predictor.volume_size),
        "geometry": geometry.to_dict(),
        "affine": cube_affine((0.0, 0.0, 0.0), geometry.fov_mm, size).tolist(),  # of the NIfTI's axes (W, H, D)
        "weights": weights_fingerprint(module.state_dict()),
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------------------------
# Writing


def trace(module: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """The module's graph for X-rays of ``shape`` in any batch, without traces of this machine's files.

    shape: (V, S, S), or (V, 2, S, S) for a network with ``seen_channel``.
    """
    example = torch.rand(2, *shape)  # a batch of 1 would be taken as fixed
    module = module.eval().to(memory_format=torch.contiguous_format)  # channels-last is this machine's choice
    with torch.no_grad(), each_made_once():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    for part in program.graph_module.modules():  # also what ran with autocast switched off
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def to_onnx(program: torch.export.ExportedProgram, opset: int = OPSET):
    """The traced program as ``onnx.ModelProto``, ``xrays`` to ``volume``; :class:`InputError` where torch cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)  # inside torch 2.13
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["xrays"],
            output_names=["volume"],
            verbose=False,
            custom_translation_table={torch.ops.aten.group_norm.default: _group_norm},
        )
    assert exported is not None  # with dynamo=True
    model = exported.model_proto
    written = {entry.domain: entry.version for entry in model.opset_import}[""]
    if written != opset:
        raise InputError(f"--opset {opset}: torch {torch.__version__} writes {written} instead; try {OPSET}")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]  # runtimes infer shapes themselves
    for node in model.graph.node:
        del node.metadata_props[:]  # the tracer's notes
    return model


def write_onnx(path, program: torch.export.ExportedProgram, about: dict, opset: int = OPSET) -> None:
    """Write the traced program as one ONNX file, with ``about`` as JSON texts in its metadata."""
    import onnx

    model = to_onnx(program, opset)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _group_norm(x, num_groups, weight, bias, eps=1e-5, cudnn_enabled=True):
    """``aten.group_norm`` of ``(B, C, ..., W)`` in ONNX's operators, for torch's exporter.

    onnxruntime sums all values of a group one after the other in float32 (InstanceNormalization, which the exporter
    takes by itself): 2e-5 off on 256^2 features, 3e-4 behind the default network of random weights. Means of means
    are 1e-6 off, and 9e-6.
    """
    from onnxscript import opset18 as op

    def mean(values):
        return op.ReduceMean(op.ReduceMean(values, op.Constant(value_ints=[3])), op.Constant(value_ints=[2]))

    sizes = [int(n) for n in x.shape[1:]]
    grouped = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1, math.prod(sizes[2:])]))
    centred = op.Sub(grouped, mean(grouped))
    variance = op.Add(mean(op.Mul(centred, centred)), op.Constant(value_float=eps))
    normal = op.Reshape(op.Div(centred, op.Sqrt(variance)), op.Constant(value_ints=[0, *sizes]))
    channels = op.Constant(value_ints=[-1, *(1 for _ in sizes[1:])])
    return op.Add(op.Mul(normal, op.Reshape(weight, channels)), op.Reshape(bias, channels))


# ------------------------------------------------------------------------------------------------
# Checking


def check_xrays(predictor: Predictor, pa=None, lateral=None, data=None) -> torch.Tensor:
    """Two different cases of X-rays, as :meth:`Predictor.predict` takes; of one alone, the second is the mirror image.

    From the files ``pa`` and ``lateral``, else the first test patients of the data set ``data``, else a phantom.
    """
    size = predictor.xray_size
    if pa:
        cases = [Pipeline(predictor).read(pa, lateral)]
    elif data:
        seen = predictor.seen_channel
        patients = PatientDataset(data, "test", predictor.volume_size[0], size, max_patients=2, seen=seen)
        cases = [predictor.item_xrays(patients[index])[0] for index in range(len(patients))]
    else:
        xrays = phantom_xrays(predictor, size)
        cases = [predictor.item_xrays({"xrays": xrays, "seen": torch.ones_like(xrays)})[0]]
    return torch.stack([cases[0], cases[1] if len(cases) > 1 else cases[0].flip(-1)])


def phantom_xrays(predictor: Predictor, size: int) -> torch.Tensor:
    """X-rays ``(2, size, size)`` of a phantom in the geometry that the weights were trained with."""
    geometry, window = predictor.geometry, predictor.hu_window
    ct = CtImage(*make_phantom(0, 0, PHANTOM_SPACING_MM), "phantom")
    hu, _ = resample_cube(ct, locate_cube(ct, geometry.fov_mm), geometry.fov_mm, PHANTOM_SIZE)
    volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32), window))[None, None]
    return render_xrays(volume, geometry, (size, size), window, predictor.xray_scale)[0].clip(0.0, 1.0)


def onnx_runner(path):
    """``X-rays -> volume`` (tensors) by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda xrays: torch.from_numpy(session.run(None, {"xrays": xrays.numpy()})[0])


def check_file(name, run, xrays: torch.Tensor, expected: torch.Tensor, hu_range: float, tolerance: float) -> None:
    """Compare at batch 1 and 2 and print the largest differences, of [0, 1] and in HU.

    Raises :class:`InputError` above ``tolerance``, and for NaN and other shapes.
    """
    for batch in (1, 2):
        found, wanted = run(xrays[:batch]), expected[:batch]
        if found.shape != wanted.shape:
            raise InputError(f"{name}: gives a volume of {tuple(found.shape)}; expected {tuple(wanted.shape)}")
        worst = (found - wanted).abs().max().item()
        print(f"{name}: batch {batch}, largest difference from PyTorch {worst:.2g} ({worst * hu_range:.2g} HU)")
        if not worst <= tolerance:
            raise InputError(f"{name}: {worst:.2g} away from PyTorch; expected at most {tolerance:g}; not written")
