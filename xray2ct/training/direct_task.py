"""Stage 1 as a training task: X-rays in, volume out, trained and scored at the network's own resolution."""

from __future__ import annotations

from pathlib import Path

import torch

from model_enhanced import EnhancedDirectModel
from xray2ct.files import InputError
from xray2ct.metrics import psnr_tensor, ssim_3d_tensor
from xray2ct.models.coarse import CoarseModel
from xray2ct.models.registry import KIND
from xray2ct.training.config import EnhancedConfig, config_dict
from xray2ct.training.distributed import Processes
from xray2ct.training.reporting import command_of, path_of
from xray2ct.training.task import RegressionTask, refuse_losses


class EnhancedTask(RegressionTask):
    """X-rays and volumes rendered and augmented on the device -> :class:`EnhancedDirectModel`."""

    kind = KIND
    cpu_config = "--config configs/cpu.json (launch_4gpu.sh --preset laptop)"
    network: type[CoarseModel] = EnhancedDirectModel

    def __init__(self, config: EnhancedConfig, processes: Processes):
        self.config = config
        refuse_losses(config.loss, self.impossible_losses())
        size = config.model.volume_size
        if len(set(size)) != 1:
            raise InputError(
                f"model.volume_size is {size}; the data set's field of view is a cube, so expected three equal sizes"
            )
        self.seen_channel = self.model_config().get("seen_channel", False)
        source = config.augment.source_size if config.augment.enabled else size[0] * 2
        self.open_data(size[0], config.model.xray_size, source)
        self.set_criterion(processes.device)
        self.build_cache(processes)

    def impossible_losses(self) -> dict[str, str]:
        head, weight = self.config.model.layout_head, self.config.loss.layout_weight
        if head != "off" and not weight:
            raise InputError(
                f"model.layout_head is {head}, but loss.layout_weight is 0: expected more, or the head off"
            )
        return {"layout": "model.layout_head is off"} if head == "off" else {}

    def model_config(self) -> dict:
        """The network's settings, as its checkpoints hold them."""
        return config_dict(self.config.model)

    def build_model(self) -> CoarseModel:
        torch.manual_seed(self.config.training.seed)
        model = self.network(**self.model_config(), geometry=self.train_data.geometry)
        model.acquisition = self.train_data.acquisition
        return model

    def header(self) -> dict:
        return {**super().header(), "model_config": self.model_config()}

    def description(self, model) -> list[str]:
        config, parameters = self.config, sum(p.numel() for p in model.parameters())
        sizes = f"X-rays {config.model.xray_size}^2 -> {config.model.volume_size[0]}^3"
        xrays = "rendered from the augmented volume" if self.renders else "files, no augmentation"
        return [
            f"Model: {parameters / 1e6:.2f} M parameters, {sizes}",
            f"Data: {config.data.dataset_path}, {self.patients()}",
            f"Geometry: {self.train_data.geometry}; HU window {list(self.train_data.hu_window)}",
            f"X-rays in training: {xrays}",
        ]

    def loss(self, model, batch):
        volume, aux = model(self.network_xrays(batch))
        return self.compare(volume, batch, aux)

    def score(self, model, batch, precision, index) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        with precision.autocast():
            volume, aux = model(self.network_xrays(batch))
            total, parts = self.compare(volume, batch, aux)
        volume, target = volume[0, 0].float(), batch["ct_volume"][0, 0]
        row = {"loss": total, "psnr": psnr_tensor(volume, target), "ssim_3d": ssim_3d_tensor(volume, target)}
        return row | parts, volume

    def next_commands(self, output: Path) -> list[str]:
        data, base = self.config.data.dataset_path, output / self.best_name
        commands = [command_of("evaluate.py", data=data, base=base, output=output / "evaluation")]
        if self.val_data.cube_size % (4 * self.config.model.volume_size[0]) == 0:  # it has volumes for stage 2
            small = {} if torch.cuda.is_available() else {"config": path_of("configs/refinement_cpu.json")}
            commands.append(command_of("train_refinement_4gpu.py", **small, data=data, base=base))
        return commands
