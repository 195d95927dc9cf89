r"""Trained checkpoints -> one ONNX file (or a ``.pt2`` of torch.export) from X-rays to volume, checked against PyTorch.

python export_onnx.py --base best_model.pt --output model.onnx
python export_onnx.py --base best_model.pt --refinement best_refinement.pt --output model_256.onnx --pt2 model_256.pt2 \
        --data data
python export_onnx.py --cascade checkpoints/quick_2stage --output cascade.onnx              # all stages in one file
python export_onnx.py --cascade checkpoints/quick_2stage --stage 2 --output stage2.onnx     # one stage

Input ``xrays`` (batch, 2, S, S) float32 in [0, 1], output ``volume`` (batch, 1, D, H, W) in [0, 1], any batch; S, the
HU window, the geometry and the NIfTI affine are in the file's metadata, as JSON. A later stage of a cascade alone also
takes ``previous``, the volume of the stage before. ``docs/onnx_inference.py`` uses such a file without PyTorch.

A cascade gives its posterior mean (one network step a stage, as inference.py does by default), because that is a volume
from X-rays in one call; samples need a loop over the denoiser, for which there is the Python API.

The written file is run at batch 1 and 2 on real X-rays - ``--check-pa``, ``--check-lateral``, or a test patient of
``--data``, else those of a phantom - and refused where it differs from PyTorch by more than ``--tolerance``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoints import weights_fingerprint
from ct_io import CtImage, cube_affine, locate_cube, resample_cube
from dataset import PatientDataset
from files import InputError, atomic_path, check_writable, run_cli
from hybrid_vit_cascade.cascade import Cascade, to_signed, to_unit
from hybrid_vit_cascade.diffusion import draw_noise
from hybrid_vit_cascade.inference import CascadePipeline, CascadeSystem
from make_phantoms import make_phantom
from pipeline import DirectSystem
from projector import hu_to_unit, render_xrays
from reconstruct import Pipeline

OPSET = 18  # what torch's exporter writes natively; onnxruntime reads it since 1.14 (2023)
SUFFIXES = (".onnx", ".pt2")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
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


class CascadePath(nn.Module):
    """One-step posterior mean of the stages ``first`` to ``last`` (from 1) of a cascade.

    X-rays ``(B, V, S, S)`` in [0, 1], for ``first`` > 1 also the volume before it ``(B, 1, d, d, d)`` in [0, 1] ->
    volume ``(B, 1, D, H, W)`` in [0, 1]. The noise that each stage starts from, which a trained network ignores, is
    that of :meth:`Cascade.posterior_mean` for a single case; all cases of a batch have the same.
    """

    def __init__(self, cascade: Cascade, first: int, last: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.models, self.signs = nn.ModuleList(), []
        for number, stage in enumerate(cascade.stages[:last], start=1):
            noise = draw_noise((1, *stage.noise_shape), generator)
            if number >= first:
                self.register_buffer(f"noise_{len(self.models)}", noise)
                self.models.append(stage.model)
                self.signs.append(_sign_at_pure_noise(stage))

    def forward(self, xrays, previous=None):
        volume = None if previous is None else to_signed(previous)
        for index, (model, sign) in enumerate(zip(self.models, self.signs)):
            condition = model.encode(xrays, volume)
            noise = getattr(self, f"noise_{index}").expand(xrays.shape[0], -1, -1, -1, -1)
            output = model.denoise(noise, xrays.new_ones(xrays.shape[0]), condition)
            volume = (sign * output).clamp(-1.0, 1.0)
        return to_unit(volume)


def _sign_at_pure_noise(stage) -> float:
    """Factor from a network's output to x0 at the noisiest step: -1 for v, 1 for x0."""
    if stage.prediction == "noise":
        raise InputError(
            f"stage {stage.name} predicts noise, which has no one-step posterior mean to export; expected a cascade"
            " trained with v_parameterization"
        )
    one, last = torch.ones(1, 1, 1, 1, 1), torch.tensor([stage.schedule.num_timesteps - 1])
    return stage.schedule.to_x0(one, torch.zeros_like(one), last, stage.prediction).item()


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


class CascadeSubject:
    """As :class:`DirectSubject`, for a whole cascade (``stage`` None) or one stage of it, from 1."""

    def __init__(self, folder, stage: int | None = None):
        self.cascade = Cascade.load(folder, device="cpu", max_stages=stage)
        self.stage = stage
        self.system = CascadeSystem(self.cascade)
        self.pipeline = CascadePipeline(self.system)
        count = len(self.cascade.stages)
        self.module = CascadePath(self.cascade, stage or 1, count)
        self.volume_size, self.xray_scale = self.cascade.volume_size, self.cascade.xray_scale
        self.inputs = {"xrays": (self.cascade.num_views, *(self.cascade.xray_size,) * 2)}
        if stage is not None and stage > 1:
            self.inputs["previous"] = self.cascade.stages[-2].noise_shape

    def arguments(self, xrays: torch.Tensor) -> list[torch.Tensor]:
        if "previous" not in self.inputs:
            return [xrays]
        before = [self.cascade.posterior_mean(case[None], stages=self.stage - 1) for case in xrays]
        return [xrays, torch.cat(before)]

    def reference(self, xrays: torch.Tensor) -> torch.Tensor:
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


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="stage-1 checkpoint (also a baseline's)")
    parser.add_argument("--refinement", help="stage-2 checkpoint: the volume is 256^3")
    parser.add_argument("--cascade", metavar="DIR", help="instead: checkpoint folder of a cascade")
    parser.add_argument("--stage", type=int, help="one stage of the cascade, from 1 (default: all in one file)")
    parser.add_argument("--output", required=True, help="file to write: .onnx, or .pt2 for torch.export")
    parser.add_argument("--pt2", metavar="FILE", help="write a .pt2 of torch.export, too")
    parser.add_argument("--opset", type=int, default=OPSET, help="ONNX operator set (default %(default)s)")
    parser.add_argument("--check-pa", metavar="FILE", help="X-rays to check on: PA")
    parser.add_argument("--check-lateral", metavar="FILE", help="and lateral")
    parser.add_argument("--data", metavar="ROOT", help="check on the first test patients of this data set")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest difference allowed, of [0, 1] (default %(default)g)"
    )
    return parser.parse_args(argv)


def check_args(args) -> None:
    """Refuse, before anything is loaded, what cannot be exported or written."""
    if (args.base is None) == (args.cascade is None):
        raise InputError("expected either --base (with --refinement for stage 2) or --cascade")
    if (args.cascade and args.refinement) or (args.base and args.stage is not None):
        raise InputError("--refinement belongs to --base, --stage to --cascade")
    if args.stage is not None and args.stage < 1:
        raise InputError(f"--stage {args.stage}; expected 1 or more")
    if Path(args.output).suffix not in SUFFIXES:
        raise InputError(f"--output {args.output}: expected a name ending in {' or '.join(SUFFIXES)}")
    if args.pt2 and not args.pt2.endswith(".pt2"):
        raise InputError(f"--pt2 {args.pt2}: expected a name ending in .pt2")
    if args.pt2 and Path(args.pt2).resolve() == Path(args.output).resolve():
        raise InputError(f"--pt2 {args.pt2} is --output too; expected another name")
    if (args.check_lateral and not args.check_pa) or (args.base and args.check_pa and not args.check_lateral):
        raise InputError("--check-pa and --check-lateral go together; expected both X-rays of a case")
    if not args.tolerance >= 0:
        raise InputError(f"--tolerance {args.tolerance}; expected 0 or more")
    for option, path in (("--output", args.output), ("--pt2", args.pt2)):
        if path:
            check_writable(path, option)
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if args.output.endswith(".onnx") and missing:
        raise InputError(f"--output {args.output}: needs {', '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")


def main(argv=None) -> int:
    args = parse_args(argv)
    check_args(args)
    subject = CascadeSubject(args.cascade, args.stage) if args.cascade else DirectSubject(args.base, args.refinement)
    xrays = check_xrays(subject, args)
    program = trace(subject)
    arguments = subject.arguments(xrays)
    expected = torch.cat([subject.reference(case[None]) for case in xrays])
    low, high = subject.system.hu_window
    shapes = ", ".join(f"{name} (batch, {', '.join(map(str, shape))})" for name, shape in subject.inputs.items())
    volume = f"volume (batch, 1, {', '.join(map(str, subject.volume_size))})"
    for path in (Path(p) for p in (args.output, args.pt2) if p):
        is_onnx = path.suffix == ".onnx"
        with atomic_path(path) as temporary:
            if is_onnx:
                write_onnx(temporary, program, subject, args.opset)
            else:
                write_pt2(temporary, program, subject)
            run = onnx_runner(temporary) if is_onnx else pt2_runner(temporary)
            check_file(path, run, arguments, expected, high - low, args.tolerance)
        kind = f"ONNX, opset {args.opset}" if is_onnx else f"torch.export, torch {torch.__version__}"
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {kind}; {shapes} -> {volume}")
    return 0


if __name__ == "__main__":
    run_cli(main)
