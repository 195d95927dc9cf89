"""Trained checkpoints -> one ONNX file from X-rays to volume, checked against PyTorch.

python export_onnx.py --output chest64.onnx                      # shipped weights
python export_onnx.py --base best_model.pt --output model.onnx
python export_onnx.py --base best_model.pt --refinement best_refinement.pt --output model_256.onnx --data data
python export_onnx.py --cascade checkpoints/quick_2stage --output cascade.onnx              # all stages in one file

Input ``xrays`` (batch, 2, S, S) float32 in [0, 1], output ``volume`` (batch, 1, D, H, W) in [0, 1], any batch; S, the
HU window, the geometry and the NIfTI affine are in the file's metadata, as JSON. ``docs/onnx_inference.py`` uses such a
file without PyTorch. A network with ``model.seen_channel`` takes (batch, 2, 2, S, S): of each view pixels, then what is
seen in [0, 1] (ones for a whole picture).

A cascade gives its posterior mean (one network step a stage, as inference.py does by default), because that is a volume
from X-rays in one call; samples need a loop over the denoiser, for which there is the Python API.

The written file is run at batch 1 and 2 on real X-rays - ``--check-pa``, ``--check-lateral``, or a test patient of
``--data``, else those of a phantom - and refused where it differs from PyTorch by more than ``--tolerance``.
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import argparse
import importlib.util
from pathlib import Path

from hybrid_vit_cascade.system import load_cascade_system
from xray2ct.command_line import Parser
from xray2ct.files import InputError, check_writable, run_cli
from xray2ct.inference.onnx import OPSET, check_xrays, export
from xray2ct.inference.system import DirectSystem
from xray2ct.inference.weights_arguments import add_weights_argument, choose_weights

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_weights_argument(parser)
    parser.add_argument("--base", help="stage-1 checkpoint (also a baseline's)")
    parser.add_argument("--refinement", help="stage-2 checkpoint: the volume is 256^3")
    parser.add_argument("--cascade", metavar="DIR", help="instead: checkpoint folder of a cascade")
    parser.add_argument("--output", required=True, help="file to write, .onnx")
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
    if args.base and args.cascade:
        raise InputError("expected either --base (with --refinement for stage 2) or --cascade")
    if args.cascade and args.refinement:
        raise InputError("--refinement belongs to --base")
    if Path(args.output).suffix != ".onnx":
        raise InputError(f"--output {args.output}: expected a name ending in .onnx")
    if (args.check_lateral and not args.check_pa) or (not args.cascade and args.check_pa and not args.check_lateral):
        raise InputError("--check-pa and --check-lateral go together; expected both X-rays of a case")
    if not args.tolerance >= 0:
        raise InputError(f"--tolerance {args.tolerance}; expected 0 or more")
    check_writable(args.output, "--output")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--output {args.output}: needs {', '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")


def main(argv=None) -> int:
    args = parse_args(argv)
    choose_weights(args)
    check_args(args)
    if args.cascade:
        predictor = load_cascade_system(args.cascade, device="cpu")
    else:
        predictor = DirectSystem(args.base, args.refinement, device="cpu")
    xrays = check_xrays(predictor, args.check_pa, args.check_lateral, args.data)
    export(predictor, args.output, xrays, args.opset, args.tolerance)
    shapes = [", ".join(map(str, shape)) for shape in (xrays.shape[1:], (1, *predictor.volume_size))]
    ports = f"xrays (batch, {shapes[0]}) -> volume (batch, {shapes[1]})"
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB, ONNX, opset {args.opset}; {ports}")
    return 0


if __name__ == "__main__":
    run_cli(main)
