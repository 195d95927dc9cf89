"""Protocols by the kind of X-rays that were reconstructed: rendered from the CT, scouts of its session, or films.

A film was taken at another time, standing and in another breath: its reconstruction has no voxel-wise truth, and no
voxel is compared. docs/real_xrays.md explains what is.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import scipy

from xray2ct.evaluation.error_split import ERROR_SPLIT
from xray2ct.evaluation.protocols import PROTOCOLS, Case, Protocol
from xray2ct.evaluation.residuals import residuals
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import VIEWS, unit_to_hu
from xray2ct.imaging.body import body_mask

LUNG_HU = -500.0  # air-filled below it: normally inflated lung ends there (Cressoni et al., Crit. Care 17, R93, 2013)
SMALL_SHARE = 0.2  # of the largest air-filled part in the body; smaller ones are bowel
CUT_SHARE = 0.1  # of the largest axial lung area: more than that in the scan's first or last plane, and it is cut


def residual(case: Case) -> dict[str, float | None]:
    """NCC and gradient NCC of the input with the X-rays rendered from the prediction, and of a misplaced control.

    Over the heights that the scan covers for scouts, whose rows are parallel planes; over whole films. Means something
    where it exceeds the control, which is shifted by 5 mm and turned by 5 degrees. Says nothing about depth.
    """
    if case.xrays is None:
        return dict.fromkeys(RESIDUAL_COLUMNS)
    rows = None
    if case.geometry.kind == "scout" and case.mask is not None:
        scanned = case.mask.flatten(1).any(dim=1).numpy()
        rows = np.flatnonzero(scanned[np.arange(case.xrays.shape[-2]) * len(scanned) // case.xrays.shape[-2]])
    acquisition = Acquisition(case.geometry, case.hu_window, case.xray_scale)
    scores, _ = residuals(acquisition, case.xrays, case.prediction.float(), rows)
    return {f"{view}_{name}": value for view in VIEWS for name, value in scores[view].items()}


def lung_volume(case: Case) -> dict[str, float | None]:
    """Litres of air-filled lung in the prediction and in the CT of the same patient, and their difference.

    Voxels below -500 HU inside each volume's own body, in parts of at least a fifth of the largest: lungs and large
    airways, hardly bowel. A CT that cuts the lungs has no volume, and the difference is None. The two differ for good
    reasons as well: a film is taken standing, in full inspiration.
    """
    hu = [unit_to_hu(volume, case.hu_window).numpy() for volume in (case.prediction, case.target)]
    predicted, true = (lungs(volume, case.geometry.fov_mm) for volume in hu)
    areas = true.sum(axis=(1, 2))
    scanned = np.ones(len(areas), bool) if case.mask is None else case.mask.flatten(1).any(dim=1).numpy()
    planes = np.flatnonzero(scanned)
    cut = not len(planes) or max(areas[planes[0]], areas[planes[-1]]) > CUT_SHARE * areas.max()
    litres = (case.geometry.fov_mm / len(areas)) ** 3 / 1e6
    volume, reference = float(predicted.sum() * litres), None if cut else float(true.sum() * litres)
    error = None if reference is None else volume - reference
    absolute = None if error is None else abs(error)
    return dict(zip(VOLUME_COLUMNS, (volume, reference, error, absolute)))


def lungs(hu: np.ndarray, fov_mm: float) -> np.ndarray:
    """Air-filled lungs with their large airways, bool, of a cube ``(D, H, W)`` in HU with an edge of ``fov_mm``."""
    labels, count = scipy.ndimage.label((hu < LUNG_HU) & body_mask(hu, fov_mm / len(hu)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    kept = 1 + np.flatnonzero(sizes >= SMALL_SHARE * sizes.max(initial=0))
    return np.isin(labels, kept)


RESIDUAL_COLUMNS = {
    f"{view}_{which}{score}": f"{words}, {view} X-ray{more}"
    for view in VIEWS
    for which, more in (("", ""), ("control_", "; of the volume shifted by 5 mm and turned by 5 degrees"))
    for score, words in (
        ("ncc", "correlation of the rendered with the input"),
        ("gradient_ncc", "the same of their derivatives"),
    )
}
VOLUME_COLUMNS = {
    "lung_litres": "litres; air-filled lungs of the prediction",
    "lung_litres_ct": "litres; of the patient's CT, at another time and posture",
    "lung_litres_error": "litres; prediction - CT",
    "lung_litres_absolute_error": "litres; absolute difference of the two",
}
RESIDUAL = Protocol(residual, RESIDUAL_COLUMNS, tuple(name for name in RESIDUAL_COLUMNS if "gradient" not in name))
LUNG_VOLUME = Protocol(lung_volume, VOLUME_COLUMNS, ("lung_litres", "lung_litres_ct", "lung_litres_error"))
BY_KIND = {
    "drr": PROTOCOLS,
    "scout": {**PROTOCOLS, "residual": RESIDUAL},
    "film": {"residual": RESIDUAL, "lung_volume": LUNG_VOLUME},
}


def protocols_of(kind: str, scored: Container[str]) -> dict[str, Protocol]:
    """Protocols of a kind of X-rays, and the error's split where its columns are among those ``scored``."""
    split = {"error_split": ERROR_SPLIT} if ERROR_SPLIT.main[0] in scored else {}
    return {**BY_KIND[kind], **split}


def columns_of(kind: str) -> dict[str, str]:
    """Columns of a kind of X-rays, and what each is."""
    return {column: text for protocol in BY_KIND[kind].values() for column, text in protocol.columns.items()}


def score(case: Case, kind: str = "drr") -> dict[str, float | None]:
    """Every column of every protocol of a kind, in the order of :func:`columns_of`."""
    return {column: value for protocol in BY_KIND[kind].values() for column, value in protocol.score(case).items()}
