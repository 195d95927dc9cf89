"""Score a system on patients: its methods beside the baselines, every protocol, pictures and coverage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset import PatientDataset, mean_volume
from model_enhanced import RefinementNetwork
from xray2ct.checkpoints import weights_fingerprint
from xray2ct.evaluation.protocols import COLUMNS, Case, scanned_body, score
from xray2ct.evaluation.report import ReportCollector
from xray2ct.evaluation.statistics import paired_interval, summarise
from xray2ct.files import InputError
from xray2ct.imaging.figures import save_panel
from xray2ct.inference.system import DirectSystem
from xray2ct.models.blocks import upsample
from xray2ct.training.config import config_hash

# A method turns a data set's item into a volume (D, H, W) in [0, 1].
Predictor = Callable[[dict], torch.Tensor]
BASELINE = "mean_volume"
TRILINEAR = "trilinear"


def system_predictors(system: DirectSystem) -> dict[str, Predictor]:
    """The trained system's methods: stage 1 alone, or stage 2 beside plain upsampling and its ceiling.

    ``trilinear`` upsamples the same stage-1 volume; ``perfect_64`` the true volume at stage 1's resolution: what
    interpolation alone would reach after a perfect stage 1.
    """

    def predict(item: dict) -> torch.Tensor:
        return system.predict(item["xrays"].unsqueeze(0))[0, 0].float().cpu()

    def trilinear(item: dict) -> torch.Tensor:
        return upsample(system.coarse(item["xrays"].unsqueeze(0)))[0, 0].cpu()

    def perfect(item: dict) -> torch.Tensor:
        return upsample(F.avg_pool3d(item["ct_volume"].unsqueeze(0), RefinementNetwork.scale))[0, 0]

    if system.refinement is None:
        return {"model": predict}
    return {"refined": predict, TRILINEAR: trilinear, f"perfect_{system.model.volume_size[0]}": perfect}


def mean_predictor(data: PatientDataset) -> Predictor:
    """The mean of the training split's volumes, whatever the X-rays show."""
    data.build_cache(progress=partial(tqdm, desc="Training volumes", unit="patient", leave=False))
    volume = mean_volume(data)[0]
    return lambda item: volume


def score_patients(data: PatientDataset, predictors: dict[str, Predictor], observe=None) -> list[dict]:
    """Rows ``{"method", "id", <scores of protocols.COLUMNS>, "seconds"}`` for every method and patient.

    A score that a patient cannot have (a tissue that is not there) is None. observe: called with ``(method, item,
    prediction, its scores)`` for each of them; ``item["body"]`` is the scanned part of the true body, bool (D, H, W).
    """
    rows = []
    common = {"geometry": data.geometry, "hu_window": data.hu_window, "xray_scale": data.xray_scale}
    for index in tqdm(range(len(data)), desc="Evaluating", unit="patient"):
        item = data[index]
        target, mask = item["ct_volume"][0], item["mask"][0]
        item["body"] = scanned_body(target, mask, data.hu_window, data.geometry.fov_mm)
        for method, predict in predictors.items():
            start = time.perf_counter()
            volume = predict(item)
            seconds = time.perf_counter() - start
            scores = score(Case(volume, target, mask, item["body"], item.get("xrays"), **common))
            rows.append({"method": method, "id": item["id"], **scores, "seconds": seconds})
            if observe is not None:
                observe(method, item, volume, scores)
    return rows


def summary_of(rows: list[dict]) -> dict:
    """Statistics per method, and of each method's paired differences to the baselines."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    per_method = {m: [r for r in rows if r["method"] == m] for m in methods}
    summary = {"methods": {m: summarise(r) for m, r in per_method.items()}}
    for reference in (BASELINE, TRILINEAR):
        if reference in methods:
            summary[f"minus_{reference}"] = {
                method: differences(per_method[method], per_method[reference])
                for method in methods
                if method != reference
            }
    return summary


def differences(rows: list[dict], others: list[dict]) -> dict:
    """Paired statistics of every common score's difference between two methods on the same patients."""
    common = [column for column in COLUMNS if column in rows[0] and column in others[0]]
    return {column: paired_interval([r[column] for r in rows], [r[column] for r in others]) for column in common}


# ------------------------------------------------------------------------------------------------
# Where the weights come from


def check_patients(data: PatientDataset, checkpoint: dict, path, split: str, allow_seen: bool) -> list[str]:
    """Patients of ``data`` that the checkpoint was trained on; :class:`InputError` unless they are allowed.

    Another split than the checkpoint's is only said: folders grow, and the patients themselves are compared.
    """
    seen = sorted(set(data.ids) & set(checkpoint["train_patients"]))
    which = f"{', '.join(seen[:5])} ({len(seen)} of the {split} split's {len(data)} patients)"
    if seen and not allow_seen:
        raise InputError(
            f"{path} was trained on {which};"
            " scores on them mean nothing for new patients (--allow-seen scores them all the same)"
        )
    if seen:
        print(f"note: {path} was trained on {which}: these scores mean nothing for new patients")
    if checkpoint["split_hash"] != data.split_hash:
        print(
            f"note: {path} was trained with another split of its data; of the {len(data)} patients scored here"
            f" {len(seen)} were in its training set, but some may have chosen its best epoch"
        )
    return seen


# ------------------------------------------------------------------------------------------------
# What is evaluated


@dataclass
class Subject:
    """What is evaluated: its methods, what it was trained on, and what the summary says about it."""

    predictors: dict[str, Predictor]
    checkpoints: dict[str, dict]  # path -> header
    weights: dict[str, str | dict[str, str]]  # path -> fingerprint, or of each stage
    volume_size: tuple[int, int, int]
    xray_size: int
    xray_normalization: str
    device: torch.device
    precision: str
    entries: dict
    notes: list[str] = field(default_factory=list)
    expected_coverage: dict | None = None


def load_direct_subject(args) -> Subject:
    """The direct system of ``--base`` and ``--refinement``."""
    system = DirectSystem(args.base, args.refinement, args.device, args.precision, args.tile)
    checkpoints = {args.base: system.checkpoint}
    weights = {args.base: weights_fingerprint(system.checkpoint["model_state_dict"])}
    entries = {
        "checkpoint": Path(args.base).name,
        "epoch": system.checkpoint["epoch"],
        "parameters": sum(p.numel() for p in system.model.parameters()),
    }
    if system.refinement is not None:
        checkpoints[args.refinement] = system.refinement_checkpoint
        weights[args.refinement] = weights_fingerprint(system.refinement_checkpoint["refinement_state_dict"])
        entries |= {
            "refinement": Path(args.refinement).name,
            "refinement_epoch": system.refinement_checkpoint["epoch"],
            "refinement_parameters": sum(p.numel() for p in system.refinement.parameters()),
            "guided": system.refinement.guidance is not None,
        }
    return Subject(
        system_predictors(system),
        checkpoints,
        weights,
        system.volume_size,
        system.xray_size,
        system.checkpoint["config"]["data"]["xray_normalization"],
        system.device,
        system.precision.name,
        entries,
        system.notes,
    )


def provenance(subject: Subject) -> list[dict]:
    """What the summary says of each checkpoint: file, hash of its training configuration, split, weights.

    The configuration's hash is None where the checkpoint holds no configuration; a cascade has its last stage's.
    """
    entries = []
    for path, header in subject.checkpoints.items():
        settings = header.get("config")
        entries.append(
            {
                "file": Path(path).resolve().name,
                "kind": header.get("kind"),
                "epoch": header["epoch"],
                "config_hash": header.get("config_hash") or (config_hash(settings) if settings else None),
                "split_hash": header["split_hash"],
                "weights": subject.weights[path],
            }
        )
    return entries


# ------------------------------------------------------------------------------------------------
# What is seen while scoring


class Observer:
    """Pictures of the first method's volumes, and coverage of methods with a standard deviation, as they are scored.

    It is the ``observe`` of :func:`score_patients`; output: folder for ``pictures``. ``coverages`` holds a row per
    method and patient. A report collects from it, too.
    """

    def __init__(
        self,
        output: Path,
        data: PatientDataset,
        predictors: dict[str, Predictor],
        pictures: int,
        report: ReportCollector | None = None,
    ):
        self.output, self.data, self.predictors, self.report = output, data, predictors, report
        self.first, self.drawn = next(iter(predictors)), set(data.ids[:pictures])
        self.coverages: list[dict] = []

    def __call__(self, method: str, item: dict, volume: torch.Tensor, scores: dict) -> None:
        if method == self.first and item["id"] in self.drawn:
            self._draw(item, volume, scores)
        if self.report is not None:
            self.report.observe(method, item, volume, scores)
        std = getattr(self.predictors[method], "std", None)
        if std is not None:
            self.coverages.append({"method": method, "id": item["id"], **body_coverage(item, volume, std)})

    def _draw(self, item, volume, scores):
        title = f"{item['id']}    PSNR {scores['psnr_strict']:.1f} dB, SSIM {scores['ssim_3d']:.3f}"
        path = self.output / "pictures" / f"{item['id']}.png"
        save_panel(path, item["xrays"], volume, item["ct_volume"][0], self.data.hu_window, title)


def body_coverage(item: dict, volume, std) -> dict[str, float]:
    """:func:`hybrid_vit_cascade.cascade.coverage` inside the scanned part of the true body.

    In the air around it every sample is right, which would flatter the standard deviation.
    """
    from xray2ct.evaluation.statistics import coverage

    return coverage(volume, std, item["ct_volume"][0], item["body"])


# ------------------------------------------------------------------------------------------------
# Command line


def acquisition(data: PatientDataset) -> dict:
    """How the data were made: what a checkpoint has to share, and the summary says."""
    return {"geometry": data.geometry.to_dict(), "hu_window": list(data.hu_window), "xray_scale": data.xray_scale}
