"""Score methods on patients: every protocol, statistics per method, pictures and coverage on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from dataset import PatientDataset, mean_volume
from xray2ct.evaluation.error_split import ERROR_SPLIT, add_shares
from xray2ct.evaluation.protocols import Case, scanned_body
from xray2ct.evaluation.real_xrays import score
from xray2ct.evaluation.report import ReportCollector
from xray2ct.evaluation.statistics import coverage, paired_interval, summarise
from xray2ct.imaging.figures import save_panel
from xray2ct.inference.consistency import CONSISTENT
from xray2ct.inference.predictor import CUBIC, TRILINEAR, Method
from xray2ct.inference.sample_calibration import SampleCalibration
from xray2ct.progress import progress_bar

BASELINE = "mean_volume"


def mean_method(data: PatientDataset) -> Method:
    """The mean of the training split's volumes, whatever the X-rays show."""
    data.build_cache(progress=partial(progress_bar, desc="Training volumes", unit="patients", leave=False))
    volume = mean_volume(data)[0]
    return lambda item: volume


def score_patients(data: PatientDataset, methods: dict[str, Method], observe=None) -> list[dict]:
    """Rows ``{"method", "id", <scores of the data's X-rays>, "seconds"}`` for every method and patient.

    Which scores: :data:`real_xrays.BY_KIND`, and :data:`error_split.ERROR_SPLIT` where ``cubic_consistent`` is among
    the methods and voxels are compared.

    A score that a patient cannot have (a tissue that is not there) is None. observe: called with ``(method, item,
    prediction, its scores)`` for each of them; ``item["body"]`` is the scanned part of the true body, bool (D, H, W).
    """
    rows = []
    splits = CUBIC in methods and data.xrays != "film"
    common = {"geometry": data.geometry, "hu_window": data.hu_window, "xray_scale": data.xray_scale}
    for index in progress_bar(range(len(data)), desc="Evaluating", unit="patients"):
        item = data[index]
        target, mask = item["ct_volume"][0], item["mask"][0]
        item["body"] = scanned_body(target, mask, data.hu_window, data.geometry.fov_mm)
        for method, predict in methods.items():
            start = time.perf_counter()
            volume = predict(item)
            seconds = getattr(predict, "seconds", time.perf_counter() - start)
            case = Case(volume, target, mask, item["body"], item.get("xrays"), **common)
            scores = score(case, data.xrays)
            if splits:
                scores |= {**dict.fromkeys(ERROR_SPLIT.columns), **ERROR_SPLIT.score(case)}
            rows.append({"method": method, "id": item["id"], **scores, "seconds": seconds})
            if observe is not None:
                observe(method, item, volume, scores)
        if splits:
            add_shares(rows[-len(methods) :])
    return rows


def summary_of(rows: list[dict], ways: Sequence[str] = ()) -> dict:
    """Statistics per method, and of each method's paired differences to the baselines.

    ways: of using one system, by name; the others' differences to the first of several are added.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    per_method = {m: [r for r in rows if r["method"] == m] for m in methods}
    summary = {"methods": {m: summarise(r) for m, r in per_method.items()}}
    for reference in (BASELINE, TRILINEAR, CUBIC):
        if reference in methods:
            summary[f"minus_{reference}"] = {
                method: differences(per_method[method], per_method[reference])
                for method in methods
                if method != reference
            }
    if len(ways) > 1:
        reference, *others = ways
        summary[f"minus_{reference}"] = {m: differences(per_method[m], per_method[reference]) for m in others}
    return summary


def differences(rows: list[dict], others: list[dict]) -> dict:
    """Paired statistics of every common score's difference between two methods on the same patients."""
    common = [column for column in rows[0] if column in others[0] and column not in ("method", "id", "seconds")]
    return {column: paired_interval([r[column] for r in rows], [r[column] for r in others]) for column in common}


class Observer:
    """Pictures of the first method's volumes, and coverage of methods with a standard deviation, as they are scored.

    It is the ``observe`` of :func:`score_patients`; output: folder for ``pictures``. ``coverages`` holds a row per
    method and patient; calibration: of the standard deviation. A report collects from it, too.
    """

    def __init__(
        self,
        output: Path,
        data: PatientDataset,
        methods: dict[str, Method],
        pictures: int,
        report: ReportCollector | None = None,
        calibration: SampleCalibration | None = None,
    ):
        self.output, self.data, self.methods, self.report = output, data, methods, report
        self.calibration = calibration
        self.first, self.drawn = next(iter(methods)), set(data.ids[:pictures])
        self.coverages: list[dict] = []

    def coverage_summary(self, expected: dict[str, float] | None) -> dict:
        """Statistics of the first method with a standard deviation, and of ``others``; ``expected`` of a perfect model.

        ``calibrated_1sd``, ``_2sd`` and ``_factor95``: within 1, 2 and ``factor95`` calibrated standard deviations.
        """
        names = dict.fromkeys(row["method"] for row in self.coverages)
        per_method = {name: [row for row in self.coverages if row["method"] == name] for name in names}
        first, *others = per_method
        summary = {"in": "body", "method": first, **summarise(per_method[first]), "expected": expected}
        if self.calibration is not None:
            summary["calibration"] = {key: getattr(self.calibration, key) for key in ("factor", "factor95")}
        if others:
            summary["others"] = {method: summarise(per_method[method]) for method in others}
        return summary

    def __call__(self, method: str, item: dict, volume: torch.Tensor, scores: dict) -> None:
        if method == self.first and item["id"] in self.drawn:
            self._draw(item, volume, scores)
        if self.report is not None:
            self.report.observe(method, item, volume, scores)
        plain = self.methods.get(method.removesuffix(CONSISTENT))  # none for cubic_consistent, an upsampling
        std = getattr(plain, "std", None)
        if std is not None and self.data.xrays != "film":  # whose volumes have no voxel-wise truth
            # In the air around the body every sample is right, which would flatter the standard deviation.
            shares = self._coverage(method, volume, std, item["ct_volume"][0], item["body"])
            self.coverages.append({"method": method, "id": item["id"], **shares})

    def _coverage(self, method: str, *volumes_and_body: torch.Tensor) -> dict[str, float]:
        """:func:`coverage`, and that of the calibrated standard deviation where the calibration is of this method."""
        volume, std, target, body = volumes_and_body
        shares, calibration = coverage(volume, std, target, body), self.calibration
        if calibration is not None and method.endswith(CONSISTENT) == (calibration.consistency is not None):
            std = calibration.factor * std
            calibrated = coverage(volume, std, target, body)
            shares |= {f"calibrated_{k}sd": calibrated[f"coverage_{k}sd"] for k in (1, 2)}
            wide = coverage(volume, calibration.factor95 * std, target, body)
            shares["calibrated_factor95"] = wide["coverage_1sd"]
        return shares

    def _draw(self, item, volume, scores):
        shown = f"NCC {scores['pa_ncc']:.3f}, {scores['lateral_ncc']:.3f}" if self.data.xrays == "film" else None
        shown = shown or f"PSNR {scores['psnr_strict']:.1f} dB, SSIM {scores['ssim_3d']:.3f}"
        title = f"{item['id']}    {shown}"
        path = self.output / "pictures" / f"{item['id']}.png"
        save_panel(path, item["xrays"], volume, item["ct_volume"][0], self.data.hu_window, title)
