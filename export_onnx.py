"""Trained checkpoints -> one ONNX file (or a ``.pt2`` of torch.export) from X-rays to volume, checked against PyTorch.

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
from pathlib import Path

import torch

from hybrid_vit_cascade.onnx import CascadeSubject
from xray2ct.files import InputError, atomic_path, check_writable, run_cli
from xray2ct.inference.onnx import (
    OPSET,
    DirectSubject,
    check_file,
    check_xrays,
    onnx_runner,
    pt2_runner,
    trace,
    write_onnx,
    write_pt2,
)

SUFFIXES = (".onnx", ".pt2")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4


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
