"""Stage 1 as a training task: augmented pairs rendered on the device, :class:`losses.EnhancedLoss`, PSNR."""

from __future__ import annotations

import torch
from tqdm import tqdm

from dataset import PatientDataset
from losses import EnhancedLoss
from model_enhanced import EnhancedDirectModel
from xray2ct.data.augment import PairMaker
from xray2ct.files import InputError
from xray2ct.metrics import psnr, ssim_3d
from xray2ct.models.registry import KIND
from xray2ct.training.cli import refuse_losses
from xray2ct.training.config import EnhancedConfig, config_dict
from xray2ct.training.distributed import Processes
from xray2ct.training.precision import Precision
from xray2ct.training.run_identity import data_header

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
        acquisition = self.train_data.acquisition
        self.pairs = PairMaker(acquisition, size, config.model.xray_size, config.augment)
        self.data_header = data_header(self.train_data)
        weights = {k: v for k, v in config_dict(config)["loss"].items() if k != "use_scan_mask"}
        self.criterion = EnhancedLoss(**weights, acquisition=acquisition).to(processes.device)
        for dataset in (self.train_data, self.val_data):
            bar = (lambda it: tqdm(it, desc="Reading patients", leave=False)) if processes.is_main else None
            dataset.build_cache(processes.rank, processes.world_size, bar)
        processes.barrier()

    def impossible_losses(self) -> dict[str, str]:
        """Losses that this task cannot compute, each with the reason; see :func:`cli.refuse_losses`."""
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
