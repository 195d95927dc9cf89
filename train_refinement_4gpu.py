"""Train stage 2 (64^3 -> 256^3) on a frozen stage 1. Works on 4 GPUs, fewer, or none; the same command resumes.

python train_refinement_4gpu.py --data ROOT --base checkpoints_enhanced/best_model.pt
torchrun --nproc_per_node 4 train_refinement_4gpu.py --data ROOT
python train_refinement_4gpu.py --config configs/refinement_cpu.json --data ROOT --output runs/refinement_cpu
python train_refinement_4gpu.py --data ROOT --set patch.size=0 --set training.batch_size=1   # full volumes
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
from pathlib import Path

from xray2ct.files import InputError, run_cli, write_json
from xray2ct.training import cli
from xray2ct.training.config import RefinementConfig, config_dict
from xray2ct.training.refinement_task import RefinementTask
from xray2ct.weights import find

FOLDER = Path(__file__).resolve().parent


def default_config_path(folder: Path = FOLDER) -> Path:
    """``config_refinement.json`` next to this script; written with the defaults when it is missing."""
    path = folder / "config_refinement.json"
    if not path.exists():
        write_json(path, config_dict(RefinementConfig()))
        print(f"{path}: was missing, written with the defaults")
    return path


def main(argv=None) -> int:
    parser = cli.training_parser(__doc__, "config_refinement.json, made when missing,", "checkpoints_refinement")
    parser.add_argument("--base", help="stage-1 checkpoint (default: base_checkpoint of the configuration)")
    args = parser.parse_args(argv)
    config = cli.read_config(RefinementConfig, args, args.config or default_config_path())
    config.base_checkpoint = args.base or config.base_checkpoint
    if not find(config.base_checkpoint).exists():
        raise InputError(
            f"{config.base_checkpoint}: no such stage-1 checkpoint; train_enhanced_4gpu.py makes one,"
            " then pass --base CHECKPOINT"
        )
    return cli.start(args, config, RefinementTask)


if __name__ == "__main__":
    run_cli(main)
