"""Training tasks: data, batch, loss and validation; one base for stage 1, stage 2, baselines and cascade stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dataset import PatientDataset
from losses import EnhancedLoss
from xray2ct.data.augment import AugmentConfig, PairMaker
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.progress import progress_bar
from xray2ct.training.config import LossConfig, config_dict
from xray2ct.training.distributed import Processes
from xray2ct.training.precision import Precision
from xray2ct.training.run_identity import data_header
from xray2ct.training.validation import read_rows, sent
from xray2ct.training.validation_films import ValidationFilms, with_films

FILMS_DIFFER = "simulated films (augment.film.probability) are no renderings of their volumes"


class Task:
    """What a trainer needs to know; the methods without a body have to be there.

    samples: validation cases for the monitors' pictures (arguments of :func:`figures.panel` and ``id``), which
    :meth:`validate` leaves.
    """

    weights_key = "model_state_dict"  # checkpoint key of the weights
    best_name = "best_model.pt"
    cpu_config = "a smaller configuration"  # which one a CPU trains in hours
    config: Any  # settings' dataclass with ``training``, ``data``, ``logging`` and ``world_size``
    train_data: Any  # a Dataset with a length
    samples: Sequence[dict] = ()

    def header(self) -> dict:
        """Checkpoint entries that describe model and data: kind, model_config, geometry, ..."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """The network for this data; its initial weights depend on the seed only."""
        raise NotImplementedError

    def make_batch(self, raw: dict, seeds: list[int], device: torch.device) -> dict:
        """Loader output -> what :meth:`loss` needs, on the device; all that is drawn follows from the seeds."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Total loss and its components (0-d tensors)."""
        raise NotImplementedError

    def validate(self, model: nn.Module, processes: Processes, precision: Precision) -> list[dict]:
        """Rows of this rank's share of the validation patients: ``{"id", "loss", "psnr", ...}``."""
        raise NotImplementedError

    def description(self, model: nn.Module) -> list[str]:
        """Lines about network and data, printed before training."""
        return []

    def comment(self, metrics: dict[str, float]) -> str | None:
        """A line on a validation's means."""
        return None

    def precisions(self) -> list[Precision]:
        """Those of frozen networks, which fall back to float32 together with the trained one."""
        return []

    def next_commands(self, output: Path) -> list[str]:
        """Command lines that make use of a finished run in ``output``."""
        return []

    def cpu_advice(self) -> str:
        """What ends a training in time that would take days on a CPU."""
        return f"{self.cpu_config} is made for CPUs, --max-minutes N ends any run in time"

    def memory_advice(self) -> str:
        """What to try when the GPU's memory ran out, the least harmful first."""
        batch = max(1, self.config.training.batch_size // 2)
        return f"Try --set training.batch_size={batch} or --set model.activation_checkpointing=true"


class PatientTask(Task):
    """Training on a data set of patients: opening it, pairs of X-rays and volume, header, validation loop.

    A subclass calls :meth:`open_data` and :meth:`build_cache` and sets ``criterion``; its network, losses and scores
    are its own.
    """

    kind: str  # of the checkpoints
    train_data: PatientDataset
    val_data: PatientDataset
    kept_samples = 2  # validation patients whose pictures go to the monitors
    uses_mask = False  # whether the scan mask is wanted in a batch
    makes_films = False  # whether some of the pairs become simulated films
    scanned: PatientDataset | None = None  # one that has looked at the data set's folders, before open_data
    seen_channel = False  # whether the network that reads the X-rays wants to know what they show
    val_films: ValidationFilms | None = None  # the validation patients as films, where some of the training's are
    initial: dict = {}  # noqa: RUF012 (replaced, never changed): see initial_weights.start_from
    criterion: nn.Module

    # -- data ------------------------------------------------------------------------------------

    def open_data(self, size: int, xray_size: int, source_size: int) -> None:
        """Open both splits for volumes of ``size`` voxels per axis and X-rays of ``xray_size`` pixels.

        source_size: of the volumes that are augmented and rendered, in voxels per axis; at most the data set's own.
        """
        data = self.config.data
        self.xray_size = xray_size
        self.val_data = self._open("val", size, xray_size, scanned=self.scanned)
        self.renders = data.xray_source == "render" or (data.xray_source == "auto" and self.val_data.has_manifest)
        source_size = min(source_size, self.val_data.cube_size)  # the data set has nothing finer
        augment = self.augment_config(source_size)
        self.makes_films = augment.enabled and augment.film.probability > 0
        if self.makes_films and not self.renders:
            raise InputError(
                f"augment.film.probability is {augment.film.probability:g}, but X-rays are read from files: expected 0,"
                " or data.xray_source=render"
            )
        sizes = (source_size, None) if self.renders else (size, xray_size)  # None: no X-ray is read
        wanted = {"raw": self.renders, "with_mask": self.uses_mask, "body": self.makes_films, "scanned": self.val_data}
        subset = {"max_patients": data.max_patients, "subset_seed": data.subset_seed}
        self.train_data = self._open("train", *sizes, **wanted, **subset)
        self.data_header = data_header(self.train_data)
        self.pairs = PairMaker(self.train_data.acquisition, (size,) * 3, xray_size, augment, self.seen_channel)
        if self.makes_films:
            self.val_films = ValidationFilms(self._open("val", *sizes, **wanted), self.pairs)
        if self.pairs.deformations is not None:
            self._check_anatomies(augment.anatomy.file)

    def _open(self, split: str, size: int, xray_size: int | None, **options) -> PatientDataset:
        """A split of the configured data set; options: of :class:`PatientDataset`, besides the configured ones."""
        data = self.config.data
        options |= {"cache_dir": data.cache_dir, "xray_normalization": data.xray_normalization}
        return PatientDataset(data.dataset_path, split, size, xray_size, seen=self.seen_channel, **options)

    def _check_anatomies(self, path) -> None:
        """Refuse deformations that this training cannot use: of another cube, of patients that validate or test."""
        if not self.renders:
            raise InputError(
                f"augment.anatomy.file is {path}, but X-rays are read from files: expected null, or"
                " data.xray_source=render"
            )
        unseen = {*self.val_data.splits["val"], *self.val_data.splits["test"]}
        self.pairs.deformations.check(path, self.val_data.geometry.fov_mm, unseen)

    def augment_config(self, source_size: int) -> AugmentConfig:
        """The settings of augmentation, for source volumes of ``source_size``."""
        return self.config.augment

    def build_cache(self, processes: Processes) -> None:
        """Read every patient once, shared among the ranks; rank 0 shows a bar."""
        bar = partial(progress_bar, desc="Reading patients", unit="patients", leave=False)
        films = [] if self.val_films is None else [self.val_films.patients]
        for dataset in (self.train_data, self.val_data, *films):
            dataset.build_cache(processes.rank, processes.world_size, bar if processes.is_main else None)
        processes.barrier()

    def patients(self) -> str:
        """How many there are, in words."""
        restricted = len(self.train_data.non_commercial.intersection(self.train_data.ids))
        terms = f" ({restricted} of the former under a non-commercial licence)" if restricted else ""
        return f"{len(self.train_data)} training and {len(self.val_data)} validation patients{terms}"

    def header(self) -> dict:
        header = {
            "kind": self.kind,
            **self.data_header,
            "xray_size": self.xray_size,
            "train_patients": list(self.train_data.ids),
        }
        if self.pairs.deformations is not None:
            header["anatomies"] = self.pairs.deformations.fingerprint
            header["train_patients"] += [p for p in self.pairs.deformations.patients if p not in self.train_data.ids]
        if self.initial:
            header["train_patients"] += [p for p in self.initial["patients"] if p not in header["train_patients"]]
            header["init"] = self.initial["init"]
        return header

    def make_batch(self, raw, seeds, device) -> dict:
        """``xrays`` (B, 2, H, W) and ``ct_volume`` (B, 1, D, H, W) in [0, 1]; ``mask`` and ``seen`` where used."""
        wanted = ("ct_volume", "mask", "xrays", "seen", *["body"] * self.makes_films)
        batch = {k: raw[k].to(device, non_blocking=True) for k in wanted if k in raw}
        if self.renders:
            batch = self.pairs(batch["ct_volume"], batch.get("mask"), seeds, batch.get("body"))
        return batch

    def network_xrays(self, batch: dict) -> torch.Tensor:
        """A batch's X-rays as the network reads them: ``(B, 2, H, W)``, or with what is seen ``(B, 2, 2, H, W)``."""
        return torch.stack([batch["xrays"], batch["seen"]], dim=2) if self.seen_channel else batch["xrays"]

    # -- validation ------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, model, processes, precision: Precision) -> list[dict]:
        ids, rows, self.samples = [], [], []
        self.criterion.eval()
        names = ["xrays", "ct_volume", *["mask"] * self.uses_mask, *["seen"] * self.seen_channel]
        own = range(processes.rank, len(self.val_data), processes.world_size)
        for index in progress_bar(own, desc="Validating", unit="patients", disable=not processes.is_main, leave=False):
            item = self.val_data[index]
            batch = {name: sent(item[name].unsqueeze(0), processes.device) for name in names}
            row, volume = self.score(model, batch, precision, index)
            if self.val_films is not None:
                films = self.val_films.batches(index, processes.device)
                row = with_films(row, [self.score(model, film, precision, index)[0] for film in films])
            ids.append(item["id"])
            rows.append(row)
            if len(self.samples) < self.kept_samples:
                case = {"id": item["id"], "xrays": item["xrays"], "prediction": volume}
                self.samples.append(case | {"target": batch["ct_volume"][0, 0], "hu_window": self.val_data.hu_window})
        self.criterion.train()
        return read_rows(ids, rows)

    def score(
        self, model, batch: dict, precision: Precision, index: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Scores of one validation patient, with ``loss`` and ``psnr``, and the volume (D, H, W) in float32.

        Scores are 0-d tensors on the device: nothing is read before the last patient is done.
        """
        raise NotImplementedError


class RegressionTask(PatientTask):
    """Predicts the volume and is trained by :class:`losses.EnhancedLoss`: stage 1, stage 2 and the baselines."""

    def impossible_losses(self) -> dict[str, str]:
        """Losses that this task cannot compute, each with the reason; see :func:`refuse_losses`."""
        return {}

    @property
    def uses_mask(self) -> bool:
        return self.config.loss.use_scan_mask

    def set_criterion(self, device: torch.device) -> None:
        """Make ``criterion`` from the settings and the data's acquisition."""
        if self.makes_films:
            refuse_losses(self.config.loss, {"projection": FILMS_DIFFER})
        weights = {k: v for k, v in config_dict(self.config.loss).items() if k != "use_scan_mask"}
        self.criterion = EnhancedLoss(**weights, acquisition=self.train_data.acquisition).to(device)

    def make_batch(self, raw, seeds, device) -> dict:
        """The base's batch, with the samples' random ``draws`` for the loss."""
        return {**super().make_batch(raw, seeds, device), "draws": SampleRandom(seeds, device)}

    def compare(self, volume, batch: dict, aux=None, whole: bool = True):
        """Total loss and components of a prediction; without X-rays where it is a part (not whole) of the cube."""
        mask = batch["mask"] if self.uses_mask else None
        xrays = batch["xrays"] if whole else None  # a part of the cube has no X-ray of its own to compare with
        draws = batch.get("draws")  # in training
        return self.criterion(volume, batch["ct_volume"], aux=aux, mask=mask, xrays=xrays, draws=draws)


def refuse_losses(loss: LossConfig, reasons: dict[str, str]) -> None:
    """Raise :class:`InputError` naming key and value when a loss is wanted that a task cannot compute.

    reasons: why, by the name of each such loss (``{"multiscale": "..."}``).
    """
    for name, reason in reasons.items():
        weight = getattr(loss, f"{name}_weight")
        if weight:
            raise InputError(f"loss.{name}_weight is {weight:g}, but {reason}: expected 0")
