"""Stage 2 as a training task: pairs at full resolution, a frozen stage 1 in between, patches or volumes."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset import PatientDataset
from losses import EnhancedLoss
from model_enhanced import RefinementNetwork
from xray2ct.checkpoints import check_compatible, weights_fingerprint
from xray2ct.data.augment import PairMaker
from xray2ct.files import InputError
from xray2ct.metrics import psnr, ssim_3d
from xray2ct.models.blocks import upsample
from xray2ct.models.loading import load_base_model
from xray2ct.models.memory import choose_tile
from xray2ct.models.registry import REFINEMENT_KIND
from xray2ct.models.window import patch_window
from xray2ct.training.cli import refuse_losses
from xray2ct.training.config import RefinementConfig, config_dict
from xray2ct.training.distributed import Processes
from xray2ct.training.precision import Precision, free_memory, to_channels_last
from xray2ct.training.run_identity import data_header


class RefinementTask:
    """Stage 2 for the engine: pairs at full resolution, a frozen stage 1 in between, patches or volumes."""

    weights_key = "refinement_state_dict"
    best_name = "best_refinement.pt"

    def __init__(self, config: RefinementConfig, processes: Processes):
        self.config, self.device = config, processes.device
        impossible = {"multiscale": "stage 2 predicts no volumes of lower resolution"}
        if config.patch.size:
            impossible["projection"] = f"patches (patch.size is {config.patch.size}) have no X-ray of their own"
        refuse_losses(config.loss, impossible)
        self.base, self.base_checkpoint = load_base_model(config.base_checkpoint, processes.device)
        self.base.requires_grad_(False)
        if config.training.channels_last:
            to_channels_last(self.base)
        self.fingerprint = weights_fingerprint(self.base.state_dict())
        self.coarse_size = self.base.volume_size[0]
        self.size = RefinementNetwork.scale * self.coarse_size
        if config.patch.size > self.coarse_size:
            raise InputError(
                f"patch.size is {config.patch.size}; the coarse volume has {self.coarse_size} voxels per axis"
                " (0 trains on full volumes)"
            )
        data = config.data
        common = {"cache_dir": data.cache_dir, "xray_normalization": data.xray_normalization}
        self.val_data = self._data("val", self.size, config.model.xray_size, **common)
        self.data_header = data_header(self.val_data)
        self._check_base(processes)
        self.renders = data.xray_source == "render" or (data.xray_source == "auto" and self.val_data.has_manifest)
        self.train_data = self._data(
            "train",
            self.size,
            None if self.renders else config.model.xray_size,
            max_patients=data.max_patients,
            raw=self.renders,
            **common,
        )
        acquisition = self.train_data.acquisition
        self.pairs = PairMaker(acquisition, (self.size,) * 3, config.model.xray_size, config.augment)
        weights = {k: v for k, v in config_dict(config)["loss"].items() if k != "use_scan_mask"}
        self.criterion = EnhancedLoss(**weights, acquisition=acquisition).to(processes.device)
        self.precision = Precision(config.training.precision, processes.device)
        for dataset in (self.train_data, self.val_data):
            bar = (lambda it: tqdm(it, desc="Reading patients", leave=False)) if processes.is_main else None
            dataset.build_cache(processes.rank, processes.world_size, bar)
        processes.barrier()

    def _data(self, split, size, xray_size, **options) -> PatientDataset:
        data = PatientDataset(self.config.data.dataset_path, "all", self.coarse_size, None)
        if data.cube_size % size:
            raise InputError(
                f"{data.root}: its volumes have {data.cube_size} voxels per axis; refining {self.coarse_size}^3 needs"
                f" {size} or a multiple (prepare_data.py --size {size})"
            )
        return PatientDataset(data.root, split, size, xray_size, **options)

    def _check_base(self, processes: Processes) -> None:
        """Refuse a stage 1 of another acquisition, or one that has seen the patients that must judge."""
        path, data = self.config.base_checkpoint, self.val_data
        check_compatible(
            path,
            self.base_checkpoint,
            geometry=data.geometry.to_dict(),
            hu_window=list(data.hu_window),
            xray_scale=data.xray_scale,
        )
        couch = [entry.get("volumes", {}).get("couch_removed") for entry in (self.base_checkpoint, self.data_header)]
        if None not in couch:  # unknown for data without a manifest, and in checkpoints of earlier versions
            check_compatible(path, {"couch_removed": couch[0]}, couch_removed=couch[1])
        judges = set(data.splits["val"]) | set(data.splits["test"])
        seen = sorted(judges & set(self.base_checkpoint["train_patients"]))
        if seen:
            raise InputError(
                f"{path} was trained on {', '.join(seen[:5])}, which validate or test here ({len(seen)} patients):"
                " its volumes of them are better than of new patients. Train stage 1 on this data set's split"
            )
        if self.base_checkpoint["split_hash"] != data.split_hash and processes.is_main:
            print(f"note: {path} was trained with another split; none of its training patients validates or tests here")

    def build_model(self) -> RefinementNetwork:
        """The network for this data; its initial weights depend on the seed only."""
        torch.manual_seed(self.config.training.seed)
        return self._network(self.config)

    def _network(self, config: RefinementConfig) -> RefinementNetwork:
        return RefinementNetwork(**config_dict(config)["model"], **vars(self.train_data.acquisition))

    def header(self) -> dict:
        data = self.train_data
        return {
            "kind": REFINEMENT_KIND,
            "refinement_config": config_dict(self.config)["model"],
            **self.data_header,
            "xray_size": self.config.model.xray_size,
            "coarse_size": list(self.base.volume_size),
            "train_patients": sorted({*data.ids, *self.base_checkpoint["train_patients"]}),
            "base_fingerprint": self.fingerprint,
            "base_epoch": self.base_checkpoint["epoch"],
        }

    # -- training --------------------------------------------------------------------------------

    def make_batch(self, raw, seeds, device) -> dict:
        batch = {k: raw[k].to(device, non_blocking=True) for k in ("ct_volume", "mask", "xrays") if k in raw}
        if self.renders:
            masks = batch["mask"] if self.config.loss.use_scan_mask else None
            batch = self.pairs(batch["ct_volume"], masks, seeds)
        batch["coarse"] = self.predict_coarse(batch["xrays"], self.precision)
        batch["gate"] = torch.tensor([self._sees_xrays(seed) for seed in seeds], device=device, dtype=torch.float32)
        if self.config.patch.size:
            batch["origins"] = [self._origins(seed) for seed in seeds]
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

    def _origins(self, seed: int) -> list[tuple[int, int, int]]:
        """Corners of one volume's patches, in coarse voxels; they follow from the sample's seed."""
        generator = torch.Generator().manual_seed(int(seed) ^ 0x5EED)
        patch = self.config.patch
        corners = torch.randint(0, self.coarse_size - patch.size + 1, (patch.per_volume, 3), generator=generator)
        return [tuple(corner) for corner in corners.tolist()]

    def _sees_xrays(self, seed: int) -> bool:
        """False for the share ``guidance_dropout`` of samples; it follows from the sample's seed."""
        generator = torch.Generator().manual_seed(int(seed) ^ 0x6A7E)
        return torch.rand((), generator=generator).item() >= self.config.guidance_dropout

    def loss(self, model, batch):
        patch = self.config.patch
        region = {"origins": batch["origins"], "patch": patch.size, "context": patch.context} if patch.size else {}
        guide = (batch["xrays"], batch["gate"]) if self.config.model.guided else (None, None)
        volume = model(batch["coarse"], guide[0], gate=guide[1], **region)
        return self._criterion(volume, batch, whole=not patch.size)

    def _criterion(self, volume, batch, whole: bool):
        mask = batch["mask"] if self.config.loss.use_scan_mask else None
        # A part of the cube has no X-ray of its own to compare with.
        xrays = batch["xrays"] if whole else None
        return self.criterion(volume, batch["ct_volume"], mask=mask, xrays=xrays)

    def precisions(self) -> list[Precision]:
        """Those beside the trained network's: the frozen stage 1's."""
        return [self.precision]

    # -- memory ----------------------------------------------------------------------------------

    def memory_advice(self) -> str:
        """After the GPU's memory ran out: the first settings that need less and fit, found by trying a step of each."""
        for changes in smaller_settings(self.config):
            if self._fits(changes):
                options = " ".join(f"--set {key}={json.dumps(value)}" for key, value in changes.items())
                return f"A step fits with {options}"
        return "Not even the smallest step tried fits: free this GPU's memory, or use a smaller model.channels"

    def _fits(self, changes: dict) -> bool:
        """True when a training step with these settings runs on the device."""
        config = RefinementConfig()
        for part in ("model", "patch", "training"):
            setattr(config, part, replace(getattr(self.config, part)))
        for key, value in changes.items():
            part, name = key.split(".")
            setattr(getattr(config, part), name, value)
        try:
            self._try_step(config)
        except torch.OutOfMemoryError:
            return False
        finally:
            free_memory(self.device)
        return True

    def _try_step(self, config: RefinementConfig) -> None:
        """Forward and backward pass of a new network on noise, with the moving average and AdamW's state beside it."""
        batch, patch, xray_size = config.training.batch_size, config.patch, config.model.xray_size
        network = self._network(config).to(self.device).train()
        beside = [torch.zeros_like(p) for p in network.parameters() for _ in range(3)]
        coarse = torch.rand(batch, 1, *[self.coarse_size] * 3, device=self.device)
        xrays = torch.rand(batch, 2, xray_size, xray_size, device=self.device)
        region = {"patch": patch.size, "context": patch.context} if patch.size else {}
        if patch.size:
            region["origins"] = [[(0, 0, 0)] * patch.per_volume] * batch
        whole = torch.rand(batch, 1, *[self.size] * 3, device=self.device)  # the augmented volumes, there all the time
        with self.precision.autocast():
            volume = network(coarse, xrays if config.model.guided else None, **region)
            target = torch.rand_like(volume) if patch.size else whole
            total, _ = self.criterion(volume, target, xrays=None if patch.size else xrays)
        total.backward()
        del beside

    # -- validation ------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, model, processes, precision: Precision) -> list[dict]:
        """Full volumes, beside plain upsampling of stage 1's volume and of a perfect coarse one."""
        rows, self.samples = [], []
        self.criterion.eval()
        for index in range(processes.rank, len(self.val_data), processes.world_size):
            item = self.val_data[index]
            batch = {k: item[k].unsqueeze(0).to(processes.device) for k in ("xrays", "ct_volume", "mask")}
            coarse = self.predict_coarse(batch["xrays"], precision)
            tile = choose_tile(model, coarse.shape[2:], processes.device, precision.dtype.itemsize)
            with precision.autocast():
                volume = model.refine(coarse, batch["xrays"] if self.config.model.guided else None, tile)
            total, parts = self._criterion(volume, batch, whole=True)
            target = batch["ct_volume"]
            perfect = upsample(F.avg_pool3d(target, RefinementNetwork.scale))
            row = {
                "id": item["id"],
                "loss": total.item(),
                "psnr": float(psnr(volume[0, 0].float(), target[0, 0])),
                "psnr_trilinear": float(psnr(upsample(coarse)[0, 0], target[0, 0])),
                "psnr_perfect_coarse": float(psnr(perfect[0, 0], target[0, 0])),
                "ssim_3d": float(ssim_3d(volume[0, 0].float(), target[0, 0])),
            }
            rows.append(row | {name: value.item() for name, value in parts.items()})
            if not self.samples:  # one case for the monitors: at 256^3 more would only fill memory
                case = {"id": item["id"], "xrays": item["xrays"], "prediction": volume[0, 0].float()}
                self.samples.append(case | {"target": target[0, 0], "hu_window": self.val_data.hu_window})
        self.criterion.train()
        return rows

    def comment(self, metrics: dict[str, float]) -> str:
        """Which of the two stages holds the result back, from a validation's means."""
        refined, plain, perfect = (metrics[k] for k in ("psnr", "psnr_trilinear", "psnr_perfect_coarse"))
        n = self.coarse_size
        if refined < perfect:
            verdict = f"stage 1: a perfect {n}^3 volume, only interpolated, would be {perfect - refined:.2f} dB better"
        else:
            verdict = f"stage 2: the result is {refined - perfect:.2f} dB above an interpolated perfect {n}^3 volume"
        return (
            f"trilinear of the predicted {n}^3: {plain:.2f} dB | refined: {refined:.2f} dB ({refined - plain:+.2f})"
            f" | trilinear of the true {n}^3: {perfect:.2f} dB\n  Bottleneck is {verdict}"
        )


def smaller_settings(config: RefinementConfig):
    """Changes to try when memory is short, the least harmful first: recomputation, smaller batches, smaller patches.

    The global batch stays what it is: accumulation makes up for a smaller ``training.batch_size``.
    """
    changes = {} if config.model.activation_checkpointing else {"model.activation_checkpointing": True}
    if changes:
        yield dict(changes)
    batch = config.training.batch_size
    while batch > 1:
        batch = max(1, batch // 2)
        changes["training.batch_size"] = batch
        yield dict(changes)
    for size in (32, 24, 16, 12) if not config.loss.projection_weight else ():  # patches have no X-ray of their own
        if not config.patch.size or size < config.patch.size:
            changes |= {"patch.size": size, "patch.per_volume": 1}
            yield dict(changes)
