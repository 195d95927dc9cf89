"""Stage 2 as a training task: a frozen stage 1 in between, patches or full volumes at four times its resolution."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from dataset import PatientDataset
from model_enhanced import RefinementNetwork
from xray2ct.checkpoints import check_compatible, weights_fingerprint
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.metrics import psnr_tensor, ssim_3d_tensor
from xray2ct.models.blocks import upsample
from xray2ct.models.loading import load_base_model
from xray2ct.models.memory import choose_tile
from xray2ct.models.registry import REFINEMENT_KIND
from xray2ct.models.upsampling import upsample_spline
from xray2ct.models.window import patch_window
from xray2ct.training.config import RefinementConfig, config_dict
from xray2ct.training.distributed import Processes
from xray2ct.training.precision import Precision, set_memory_format
from xray2ct.training.reporting import command_of
from xray2ct.training.task import RegressionTask, refuse_losses


class RefinementTask(RegressionTask):
    """Augmented pairs -> volume of a frozen stage 1 -> :class:`RefinementNetwork`."""

    kind = REFINEMENT_KIND
    weights_key = "refinement_state_dict"
    best_name = "best_refinement.pt"
    cpu_config = "--config configs/refinement_cpu.json (launch_4gpu.sh --preset laptop)"
    kept_samples = 1  # at 256^3 more would only fill memory

    def __init__(self, config: RefinementConfig, processes: Processes):
        self.config = config
        refuse_losses(config.loss, self.impossible_losses())
        self.base, self.base_checkpoint = load_base_model(config.base_checkpoint, processes.device)
        self.base.requires_grad_(False)
        set_memory_format(self.base, config.training.channels_last)
        self.fingerprint = weights_fingerprint(self.base.state_dict())
        self.coarse_size, self.seen_channel = self.base.volume_size[0], self.base.seen_channel
        self.size = RefinementNetwork.scale * self.coarse_size
        self._check_sizes()
        self.open_data(self.size, config.model.xray_size, source_size=self.size)
        self._check_base(processes)
        self.set_criterion(processes.device)
        self.precision = Precision(config.training.precision, processes.device)
        self.build_cache(processes)

    def impossible_losses(self) -> dict[str, str]:
        impossible = {"multiscale": "stage 2 predicts no volumes of lower resolution"}
        impossible["layout"] = "stage 2 predicts no layout"
        if self.config.patch.size:
            impossible["projection"] = f"patches (patch.size is {self.config.patch.size}) have no X-ray of their own"
        return impossible

    def _check_sizes(self) -> None:
        """Refuse patches larger than the coarse volume, and data without volumes of the refined size."""
        if self.config.patch.size > self.coarse_size:
            raise InputError(
                f"patch.size is {self.config.patch.size}; the coarse volume has {self.coarse_size} voxels per axis"
                " (0 trains on full volumes)"
            )
        data = self.scanned = PatientDataset(self.config.data.dataset_path, "all", self.coarse_size, None)
        if data.cube_size % self.size:
            raise InputError(
                f"{data.root}: its volumes have {data.cube_size} voxels per axis; refining {self.coarse_size}^3 needs"
                f" {self.size} or a multiple (prepare_data.py --size {self.size})"
            )

    def _check_base(self, processes: Processes) -> None:
        """Refuse a stage 1 of another acquisition, or one that has seen the patients of validation or test."""
        path, data = self.config.base_checkpoint, self.val_data
        check_compatible(path, self.base_checkpoint, **data.acquisition.to_dict())
        couch = [entry.get("volumes", {}).get("couch_removed") for entry in (self.base_checkpoint, self.data_header)]
        if None not in couch:  # unknown for data without a manifest, and in checkpoints of earlier versions
            check_compatible(path, {"couch_removed": couch[0]}, couch_removed=couch[1])
        unseen = set(data.splits["val"]) | set(data.splits["test"])
        seen = sorted(unseen & set(self.base_checkpoint["train_patients"]))
        if seen:
            raise InputError(
                f"{path} was trained on {', '.join(seen[:5])}, which validate or test here ({len(seen)} patients):"
                " its volumes of them are better than of new patients. Train stage 1 on this data set's split"
            )
        if self.base_checkpoint["split_hash"] != data.split_hash and processes.is_main:
            print(f"note: {path} was trained with another split; none of its training patients validates or tests here")

    def build_model(self) -> RefinementNetwork:
        torch.manual_seed(self.config.training.seed)
        return RefinementNetwork(**config_dict(self.config.model), **vars(self.train_data.acquisition))

    def header(self) -> dict:
        header = super().header()
        return {
            **header,
            "refinement_config": config_dict(self.config.model),
            "coarse_size": list(self.base.volume_size),
            "train_patients": sorted({*header["train_patients"], *self.base_checkpoint["train_patients"]}),
            "base_fingerprint": self.fingerprint,
            "base_epoch": self.base_checkpoint["epoch"],
        }

    def description(self, model) -> list[str]:
        config, patch = self.config, self.config.patch
        parameters = sum(p.numel() for p in model.parameters())
        guide = f"guided by X-rays of {config.model.xray_size}^2" if config.model.guided else "without X-rays"
        what = f"{patch.per_volume} patches of {4 * patch.size}^3 per volume" if patch.size else "full volumes"
        return [
            f"Model: {parameters / 1e6:.2f} M parameters, {self.coarse_size}^3 -> {self.size}^3, {guide},"
            f" from {config.model.start} upsampling",
            f"Stage 1: {config.base_checkpoint} (epoch {self.base_checkpoint['epoch']}, frozen)",
            f"Data: {config.data.dataset_path}, {self.patients()}; training on {what}",
            f"Geometry: {self.train_data.geometry}; HU window {list(self.train_data.hu_window)}",
        ]

    # -- training --------------------------------------------------------------------------------

    def make_batch(self, raw, seeds, device) -> dict:
        """The pairs with stage 1's volume ``coarse``, ``gate`` (B,): 0 without X-rays, and patches at ``origins``."""
        batch = super().make_batch(raw, seeds, device)
        batch["coarse"] = self.predict_coarse(self.network_xrays(batch), self.precision)
        batch["gate"] = self.gate(batch["draws"])
        if self.config.patch.size:
            batch["origins"] = self.patch_origins(batch["draws"])
            window = patch_window(batch["origins"], self.config.patch.size, batch["coarse"].shape[2:])
            for name in {"ct_volume", "mask"} & batch.keys():
                batch[name] = window.crop(batch[name], RefinementNetwork.scale)
        return batch

    @torch.no_grad()
    def predict_coarse(self, xrays, precision: Precision) -> torch.Tensor:
        """Stage 1's volume ``(B, 1, 64, 64, 64)``: frozen, in eval mode, without gradients."""
        with precision.autocast():
            coarse, _ = self.base(xrays)
        return coarse.float()

    def patch_origins(self, random: SampleRandom) -> list[list[tuple[int, ...]]]:
        """Corners (z, y, x) of each volume's patches, in coarse voxels, drawn evenly from those on the trunk's cells.

        Windows there are no wider than patch and context. The last place is among them though it may lie between.
        """
        patch, step = self.config.patch, RefinementNetwork.stride
        last = self.coarse_size - patch.size
        cells = -(-last // step) + 1
        names = [[f"patch {number} {axis}" for axis in "zyx"] for number in range(patch.per_volume)]
        draws = [[[min(last, step * int(u * cells)) for u in random.on_host(n)] for n in axes] for axes in names]
        return [[tuple(axis[sample] for axis in axes) for axes in draws] for sample in range(len(random))]

    def gate(self, random: SampleRandom) -> torch.Tensor:
        """``(B,)`` float32: 0 for the share ``guidance_dropout`` of samples, which see no X-rays, 1 for the others."""
        return (random.uniform("guidance") >= self.config.guidance_dropout).float()

    def loss(self, model, batch):
        patch = self.config.patch
        region = {"origins": batch["origins"], "patch": patch.size, "context": patch.context} if patch.size else {}
        guide = (batch["xrays"], batch["gate"]) if self.config.model.guided else (None, None)
        volume = model(batch["coarse"], guide[0], gate=guide[1], **region)
        return self.compare(volume, batch, whole=not patch.size)

    def next_commands(self, output: Path) -> list[str]:
        checkpoints = {"base": self.config.base_checkpoint, "refinement": output / self.best_name}
        data = self.config.data.dataset_path
        return [command_of("evaluate.py", data=data, **checkpoints, output=output / "evaluation")]

    def precisions(self) -> list[Precision]:
        return [self.precision]

    def memory_advice(self) -> str:
        """What costs only time, then a smaller batch (accumulation makes up for it), then smaller patches."""
        config, advice = self.config, []
        if not config.model.activation_checkpointing:
            advice.append("--set model.activation_checkpointing=true")
        if config.training.batch_size > 1:
            advice.append(f"--set training.batch_size={config.training.batch_size // 2}")
        size = (config.patch.size or self.coarse_size) // 2
        if size >= 8 and not config.loss.projection_weight:  # patches have no X-ray of their own
            advice.append(f"--set patch.size={size} --set patch.per_volume=1")
        advice.append("a smaller model.channels")
        return f"Try, in this order, {', then '.join(advice)}"

    # -- validation ------------------------------------------------------------------------------

    def score(self, model, batch, precision, index) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Full volumes, with plain upsampling of stage 1's volume and of a perfect coarse one."""
        coarse, target = self.predict_coarse(self.network_xrays(batch), precision), batch["ct_volume"]
        tile = choose_tile(model, coarse.shape[2:], target.device, precision.dtype.itemsize)
        with precision.autocast():
            volume = model.refine(coarse, batch["xrays"] if self.config.model.guided else None, tile)
        total, parts = self.compare(volume, batch)
        volume, perfect = volume[0, 0].float(), F.avg_pool3d(target, RefinementNetwork.scale)
        row = {
            "loss": total,
            "psnr": psnr_tensor(volume, target[0, 0]),
            "psnr_trilinear": psnr_tensor(upsample(coarse)[0, 0], target[0, 0]),
            "psnr_cubic_consistent": psnr_tensor(upsample_spline(coarse)[0, 0].clamp(0, 1), target[0, 0]),
            "psnr_perfect_coarse": psnr_tensor(upsample(perfect)[0, 0], target[0, 0]),
            "ssim_3d": ssim_3d_tensor(volume, target[0, 0]),
        }
        return row | parts, volume

    def comment(self, metrics: dict[str, float]) -> str:
        """Which of the two stages holds the result back, from a validation's means."""
        names = ("psnr", "psnr_trilinear", "psnr_cubic_consistent", "psnr_perfect_coarse")
        refined, plain, cubic, perfect = (metrics[name] for name in names)
        n = self.coarse_size
        if refined < perfect:
            verdict = f"stage 1: a perfect {n}^3 volume, only interpolated, would be {perfect - refined:.2f} dB better"
        else:
            verdict = f"stage 2: the result is {refined - perfect:.2f} dB above an interpolated perfect {n}^3 volume"
        return (
            f"trilinear of the predicted {n}^3: {plain:.2f} dB | cubic: {cubic:.2f} dB | refined: {refined:.2f} dB"
            f" ({refined - plain:+.2f} and {refined - cubic:+.2f})"
            f" | trilinear of the true {n}^3: {perfect:.2f} dB\n  Bottleneck is {verdict}"
        )
