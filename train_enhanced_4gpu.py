"""Train stage 1 (X-rays -> 64^3). Works on 4 GPUs, fewer, or none; the same command resumes.

python train_enhanced_4gpu.py --data ROOT                      # one process per visible GPU, or the CPU
torchrun --nproc_per_node 4 train_enhanced_4gpu.py --data ROOT
python train_enhanced_4gpu.py --config config_cpu.json --data ROOT --output runs/cpu
python train_enhanced_4gpu.py --data ROOT --set training.batch_size=2 --dry-run
"""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

from augment import PairMaker
from config import EnhancedConfig, config_dict, load_config, resolve_config_path
from dataset import PatientDataset
from distributed import Processes, launch
from engine import Precision
from files import InputError, run_cli
from losses import EnhancedLoss
from metrics import psnr, ssim_3d
from model_enhanced import KIND, EnhancedDirectModel
from run_identity import data_header
from training_cli import check_before_launch, describe_processes, refuse_losses, run_training, training_parser

SAMPLES = 2  # validation patients whose pictures go to the monitors


class EnhancedTask:
    """Stage 1 for the engine: augmented pairs rendered on the device, :class:`EnhancedLoss`, PSNR."""

    weights_key = "model_state_dict"
    best_name = "best_model.pt"

    def __init__(self, config: EnhancedConfig, processes: Processes):
        self.config = config
        refuse_losses(config.loss, self.impossible_losses())
        size = config.model.volume_size
        if len(set(size)) != 1:
            raise InputError(
                f"model.volume_size is {size}; the data set's field of view is a cube, so expected three equal sizes"
            )
        data = config.data
        common = {"cache_dir": data.cache_dir, "xray_normalization": data.xray_normalization}
        root = data.dataset_path
        self.val_data = PatientDataset(root, "val", size[0], config.model.xray_size, **common)
        self.renders = data.xray_source == "render" or (data.xray_source == "auto" and self.val_data.has_manifest)
        if self.renders:
            source = config.augment.source_size if config.augment.enabled else size[0] * 2
            source = min(source, self.val_data.cube_size)  # the data set has nothing finer
            self.train_data = PatientDataset(
                root, "train", source, None, max_patients=data.max_patients, raw=True, **common
            )
        else:
            self.train_data = PatientDataset(
                root, "train", size[0], config.model.xray_size, max_patients=data.max_patients, **common
            )
        self.pairs = PairMaker(
            self.train_data.geometry,
            size,
            config.model.xray_size,
            config.augment,
            self.train_data.hu_window,
            self.train_data.xray_scale,
        )
        self.data_header = data_header(self.train_data)
        weights = {k: v for k, v in config_dict(config)["loss"].items() if k != "use_scan_mask"}
        acquisition = self.train_data.acquisition
        self.criterion = EnhancedLoss(**weights, **acquisition).to(processes.device)
        for dataset in (self.train_data, self.val_data):
            bar = (lambda it: tqdm(it, desc="Reading patients", leave=False)) if processes.is_main else None
            dataset.build_cache(processes.rank, processes.world_size, bar)
        processes.barrier()

    def impossible_losses(self) -> dict[str, str]:
        """Losses that this task cannot compute, each with the reason; see :func:`training_cli.refuse_losses`."""
        return {}

    def build_model(self) -> EnhancedDirectModel:
        """The network for this data; its initial weights depend on the seed only."""
        torch.manual_seed(self.config.training.seed)
        return EnhancedDirectModel(**config_dict(self.config)["model"], geometry=self.train_data.geometry)

    def header(self) -> dict:
        data = self.train_data
        return {
            "kind": KIND,
            "model_config": config_dict(self.config)["model"],
            **self.data_header,
            "xray_size": self.config.model.xray_size,
            "train_patients": list(data.ids),
        }

    def make_batch(self, raw, seeds, device) -> dict:
        moved = {k: raw[k].to(device, non_blocking=True) for k in ("ct_volume", "mask", "xrays") if k in raw}
        if self.renders:
            moved = self.pairs(moved["ct_volume"], moved["mask"], seeds)
        return moved

    def loss(self, model, batch):
        volume, aux = model(batch["xrays"])
        return self._criterion(volume, aux, batch)

    def _criterion(self, volume, aux, batch):
        mask = batch["mask"] if self.config.loss.use_scan_mask else None
        return self.criterion(volume, batch["ct_volume"], aux=aux, mask=mask, xrays=batch["xrays"])

    @torch.no_grad()
    def validate(self, model, processes, precision: Precision) -> list[dict]:
        rows, self.samples = [], []
        self.criterion.eval()
        for index in range(processes.rank, len(self.val_data), processes.world_size):
            item = self.val_data[index]
            batch = {k: item[k].unsqueeze(0).to(processes.device) for k in ("xrays", "ct_volume", "mask")}
            with precision.autocast():
                volume, aux = model(batch["xrays"])
                total, parts = self._criterion(volume, aux, batch)
            volume, target = volume[0, 0].float(), batch["ct_volume"][0, 0]
            row = {
                "id": item["id"],
                "loss": total.item(),
                "psnr": float(psnr(volume, target)),
                "ssim_3d": float(ssim_3d(volume, target)),
            }
            rows.append(row | {name: value.item() for name, value in parts.items()})
            if len(self.samples) < SAMPLES:
                case = {"id": item["id"], "xrays": item["xrays"], "prediction": volume, "target": target}
                self.samples.append(case | {"hu_window": self.val_data.hu_window})
        self.criterion.train()
        return rows


def parse_args(argv=None) -> argparse.Namespace:
    return training_parser(__doc__, "config_enhanced.json", "checkpoints_enhanced").parse_args(argv)


def read_config(args) -> EnhancedConfig:
    """The configuration a command line describes."""
    config = load_config(EnhancedConfig, resolve_config_path(args.config, "config_enhanced.json"), args.set)
    if args.data:
        config.data.dataset_path = args.data
    return config


def describe(task: EnhancedTask, model, processes: Processes) -> None:
    """Print what is about to run."""
    config = task.config
    parameters = sum(p.numel() for p in model.parameters())
    sizes = f"X-rays {config.model.xray_size}^2 -> {config.model.volume_size[0]}^3"
    patients = f"{len(task.train_data)} training and {len(task.val_data)} validation patients"
    print(f"Model: {parameters / 1e6:.2f} M parameters, {sizes}")
    print(f"Data: {config.data.dataset_path}, {patients}")
    print(f"Geometry: {task.train_data.geometry}; HU window {list(task.train_data.hu_window)}")
    print(f"X-rays in training: {'rendered from the augmented volume' if task.renders else 'files, no augmentation'}")
    print(
        describe_processes(config, processes, Precision(config.training.precision, processes.device).name), flush=True
    )


def worker(args: argparse.Namespace) -> int:
    """What each process runs; returns its exit status."""
    return run_training(args, read_config(args), EnhancedTask, describe)


def main(argv=None) -> int:
    args = parse_args(argv)
    config = read_config(args)
    check_before_launch(args, config)
    return launch(worker, config.world_size, args)


if __name__ == "__main__":
    run_cli(main)
