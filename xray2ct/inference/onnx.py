"""Export of the networks as ONNX files that hold all a user needs, checked against PyTorch."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import torch
from torch import nn

from dataset import PatientDataset
from xray2ct.checkpoints import weights_fingerprint
from xray2ct.data.phantoms import make_phantom
from xray2ct.files import InputError
from xray2ct.geometry.projector import hu_to_unit, render_xrays
from xray2ct.imaging.body import locate_cube
from xray2ct.imaging.cube import cube_affine, resample_cube
from xray2ct.imaging.read_ct import CtImage
from xray2ct.inference.reconstruction import Pipeline
from xray2ct.inference.system import DirectSystem

OPSET = 18  # what torch's exporter writes natively; onnxruntime reads it since 1.14 (2023)
METADATA_FILE = "metadata.json"  # in a .pt2 archive
PHANTOM_SIZE, PHANTOM_SPACING_MM = 64, 5.0


# ------------------------------------------------------------------------------------------------
# What is exported: only the path that inference takes


class DirectPath(nn.Module):
    """Both stages as one: X-rays ``(B, 2, S, S)`` in [0, 1] -> volume ``(B, 1, D, H, W)`` in [0, 1]."""

    def __init__(self, system: DirectSystem):
        super().__init__()
        self.model, self.refinement = system.model, system.refinement
        self.guided = self.refinement is not None and self.refinement.guidance is not None

    def forward(self, xrays):
        coarse, _ = self.model(xrays)
        if self.refinement is None:
            return coarse
        return self.refinement(coarse, xrays if self.guided else None)


class DirectSubject:
    """The direct system with its inputs, PyTorch's own answer to compare with, and what users of the file must know.

    inputs: shape of each input of ``module`` without the batch.
    """

    def __init__(self, base, refinement=None):
        self.system = DirectSystem(base, refinement, device="cpu")
        self.pipeline, self.module = Pipeline(self.system), DirectPath(self.system)
        self.volume_size, self.xray_scale = self.system.volume_size, self.system.checkpoint["xray_scale"]
        size = self.system.xray_size
        self.inputs = {"xrays": (2, size, size)}

    def arguments(self, xrays: torch.Tensor) -> list[torch.Tensor]:
        """Inputs of ``module`` for X-rays ``(B, 2, S, S)``."""
        return [xrays]

    def reference(self, xrays: torch.Tensor) -> torch.Tensor:
        """Volume of one case by the code that reconstruct.py runs, ``(1, 1, D, H, W)``."""
        return self.system.predict(xrays)


def metadata_of(subject) -> dict:
    """What somebody needs who has the file alone: scales, geometry, conventions; JSON-ready."""
    geometry, size = subject.system.geometry, subject.volume_size[0]
    views = "channel 0 PA (columns patient right to left), channel 1 lateral (columns anterior to posterior)"
    return {
        "input": f"xrays (batch, views, S, S) float32 in [0, 1], line integral / xray_scale, bone bright; {views}",
        "output": "volume (batch, 1, D, H, W) float32 in [0, 1] of hu_window; D superior to inferior, H anterior to"
        " posterior, W patient right to left",
        "xray_size": subject.inputs["xrays"][-1],
        "views": subject.inputs["xrays"][0],
        "xray_scale": subject.xray_scale,
        "hu_window": list(subject.system.hu_window),
        "volume_size": list(subject.volume_size),
        "geometry": geometry.to_dict(),
        "affine": cube_affine((0.0, 0.0, 0.0), geometry.fov_mm, size).tolist(),  # of the NIfTI's axes (W, H, D)
        "weights": weights_fingerprint(subject.module.state_dict()),
        "torch": torch.__version__,
    }


# ------------------------------------------------------------------------------------------------
# Writing


def trace(subject) -> torch.export.ExportedProgram:
    """The module's graph for any batch; what it says about this machine's files is taken out."""
    batch = torch.export.Dim("batch", min=1)
    examples = tuple(torch.rand(2, *shape) for shape in subject.inputs.values())  # a batch of 1 would be taken as fixed
    module = subject.module.eval().to(memory_format=torch.contiguous_format)  # channels-last is this machine's choice
    with torch.no_grad():
        program = torch.export.export(
            module, examples, dynamic_shapes=tuple({0: batch} for _ in examples), strict=False
        )
    for part in program.graph_module.modules():  # also what ran with autocast switched off
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def to_onnx(program: torch.export.ExportedProgram, names: list[str], opset: int = OPSET):
    """The traced program as ``onnx.ModelProto`` with inputs ``names``; :class:`InputError` where torch cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)  # inside torch 2.13
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=["volume"],
            verbose=False,
            custom_translation_table={torch.ops.aten.group_norm.default: _group_norm},
        )
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


def write_onnx(path, program: torch.export.ExportedProgram, subject, opset: int = OPSET) -> None:
    """Write the traced program as one ONNX file, with the metadata as JSON texts."""
    import onnx

    model = to_onnx(program, list(subject.inputs), opset)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata_of(subject).items()})
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


def write_pt2(path, program: torch.export.ExportedProgram, subject) -> None:
    """Write the traced program for ``torch.export.load(path).module()``, with :data:`METADATA_FILE` in the archive."""
    torch.export.save(program, str(path), extra_files={METADATA_FILE: json.dumps(metadata_of(subject))})


# ------------------------------------------------------------------------------------------------
# Checking


def check_xrays(subject, args) -> torch.Tensor:
    """Two different cases of real X-rays, ``(2, V, S, S)``; of one alone, the second is the mirror image."""
    views, size, _ = subject.inputs["xrays"]
    if args.check_pa:
        cases = [subject.pipeline.read(args.check_pa, args.check_lateral)]
    elif args.data:
        data = PatientDataset(args.data, "test", subject.volume_size[0], size, max_patients=2)
        cases = [data[index]["xrays"][:views] for index in range(len(data))]
    else:
        cases = [phantom_xrays(subject, size)[:views]]
    return torch.stack([cases[0], cases[1] if len(cases) > 1 else cases[0].flip(-1)])


def phantom_xrays(subject, size: int) -> torch.Tensor:
    """X-rays ``(2, size, size)`` of a phantom in the geometry that the weights were trained with."""
    geometry, window = subject.system.geometry, subject.system.hu_window
    ct = CtImage(*make_phantom(0, 0, PHANTOM_SPACING_MM), "phantom")
    hu, _ = resample_cube(ct, locate_cube(ct, geometry.fov_mm), geometry.fov_mm, PHANTOM_SIZE)
    volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32), window))[None, None]
    return render_xrays(volume, geometry, (size, size), window, subject.xray_scale)[0].clip(0.0, 1.0)


def onnx_runner(path):
    """``arguments -> volume`` (tensors) by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(arguments):
        return torch.from_numpy(session.run(None, {n: a.numpy() for n, a in zip(names, arguments)})[0])

    return run


def pt2_runner(path):
    """``arguments -> volume`` by the program that was written."""
    module = torch.export.load(str(path)).module()

    def run(arguments):
        with torch.no_grad():
            return module(*arguments)

    return run


def largest_difference(run, arguments, expected: torch.Tensor) -> float:
    """max |volume - expected| of a batch, in units of [0, 1]; NaN where a value is missing."""
    found = run(arguments)
    if found.shape != expected.shape:
        raise InputError(f"the exported model gives a volume of {tuple(found.shape)}; expected {tuple(expected.shape)}")
    return (found - expected).abs().max().item()


def check_file(name, run, arguments, expected, hu_range: float, tolerance: float) -> None:
    """Compare at batch 1 and 2 and print the largest differences, of [0, 1] and in HU.

    Raises :class:`InputError` above ``tolerance``, and for NaN.
    """
    for batch in (1, 2):
        worst = largest_difference(run, [a[:batch] for a in arguments], expected[:batch])
        print(f"{name}: batch {batch}, largest difference from PyTorch {worst:.2g} ({worst * hu_range:.2g} HU)")
        if not worst <= tolerance:
            raise InputError(f"{name}: {worst:.2g} away from PyTorch; expected at most {tolerance:g}; not written")
