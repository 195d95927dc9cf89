"""Train stage 1 (X-rays -> 64^3). Works on 4 GPUs, fewer, or none; the same command resumes.

python train_enhanced_4gpu.py --data ROOT                      # one process per visible GPU, or the CPU
torchrun --nproc_per_node 4 train_enhanced_4gpu.py --data ROOT
python train_enhanced_4gpu.py --config configs/cpu.json --data ROOT --output runs/cpu
python train_enhanced_4gpu.py --data ROOT --set training.batch_size=2 --dry-run
python train_enhanced_4gpu.py --config configs/second_pass.json --init first/best_model.pt --data ROOT --output runs/two
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
from xray2ct.files import InputError, run_cli
from xray2ct.training.cli import read_config, start, training_parser
from xray2ct.training.config import EnhancedConfig, resolve_config_path
from xray2ct.training.direct_task import EnhancedTask


def main(argv=None) -> int:
    args = training_parser(__doc__, "config_enhanced.json", "checkpoints_enhanced").parse_args(argv)
    config = read_config(EnhancedConfig, args, resolve_config_path(args.config, "config_enhanced.json"))
    if config.model.freeze_first_pass and not args.init:
        raise InputError("model.freeze_first_pass is true: expected the checkpoint of the first pass as --init")
    return start(args, config, EnhancedTask)


if __name__ == "__main__":
    run_cli(main)
