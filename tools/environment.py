"""What this machine is, and whether its reduced-precision 3D convolutions are right.

python -m tools.environment     # versions, devices, variables; checks of Conv3d; exit status 1 if wrong
python -m tools.environment --json environment.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from xray2ct.command_line import Parser
from xray2ct.files import run_cli, write_json
from xray2ct.training.convolution_check import reduced_precision_defects
from xray2ct.training.provenance import describe_environment


def default_networks(device) -> list[tuple[str, Callable[[], object]]]:
    """Name and one forward pass of both stages as the default configurations train them, one sample each."""
    from model_enhanced import EnhancedDirectModel, RefinementNetwork
    from xray2ct.training.config import EnhancedConfig, RefinementConfig, config_dict

    base, refinement = EnhancedConfig().model, RefinementConfig()
    size = base.xray_size

    def first():
        EnhancedDirectModel(**config_dict(base)).to(device)(torch.rand(1, 2, size, size, device=device))

    def second():
        network = RefinementNetwork(**config_dict(refinement.model)).to(device)
        coarse, xrays = torch.rand(1, 1, *base.volume_size, device=device), torch.rand(1, 2, size, size, device=device)
        network(coarse, xrays, origins=[[(0, 0, 0)]], patch=refinement.patch.size, context=refinement.patch.context)

    return [("stage 1", torch.no_grad()(first)), ("stage 2", torch.no_grad()(second))]


def main(argv=None) -> int:
    """Print the environment and compare the default networks' convolutions; 1 when one is wrong."""
    parser = Parser(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and checks as JSON, too")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU where there is one)")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = {"environment": describe_environment(), "checks": {}}
    print(json.dumps(report["environment"], indent=2))
    for name, run in default_networks(device):
        defects = reduced_precision_defects(run, torch.bfloat16, device)
        report["checks"][name] = defects
        print(f"{name}: bfloat16 Conv3d on {device}: {'right' if not defects else 'WRONG'}", flush=True)
        for defect in defects:
            print(f"  {defect}", flush=True)
    if args.json:
        write_json(args.json, report)
    wrong = any(report["checks"].values())
    if wrong:
        print("A run with such a convolution trains in float32 by itself")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_cli(main)
