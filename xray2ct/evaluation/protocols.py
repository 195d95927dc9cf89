"""Named evaluation protocols: which scores, over which voxels, with which window, peak and clipping; whose they are.

    python -m xray2ct.evaluation.protocols              # the list
    python -m xray2ct.evaluation.protocols --example    # one prediction, every protocol

    from xray2ct.evaluation.protocols import Case, score
    row = score(Case(prediction, target, mask, body, xrays))    # {column: value} of every protocol

"PSNR" means several things in this field, 20 dB apart for one and the same volume (docs/protocols.md): a number
without its protocol means nothing. Formulas are in metrics.py; here is what each protocol feeds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import scipy
import torch
import torch.nn.functional as F

from losses import SSIM_TAPS, ProjectionLoss
from xray2ct.command_line import Parser
from xray2ct.evaluation.spectrum import compare_spectra
from xray2ct.files import InputError, run_cli
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import HU_WINDOW, XRAY_SCALE, Geometry, hu_to_unit, render_xrays, unit_to_hu
from xray2ct.imaging.body import body_mask, locate_cube
from xray2ct.imaging.cube import area_average, resample_cube
from xray2ct.imaging.read_ct import CtImage
from xray2ct.metrics import check_pair, error_statistics, psnr, psnr_slices, ssim_3d, ssim_uniform

X2CT_WINDOW = (-1024.0, 1476.0)  # HU of X2CT-GAN's [0, 2500], stored as HU + 1024
X2CT_PEAK = 4095.0  # its PSNR's peak: 12 bit, on data that span 2,500 HU
PM1024_WINDOW = (-1024.0, 1024.0)
# HU of the true volume, lower limit included, inside the body; what lies between two bands belongs to none. Lung: above
# the threshold of low attenuation, -950 (Zach et al., Invest. Radiol. 47, 596, 2012), up to -500, where normally
# inflated lung ends (Cressoni et al., Crit. Care 17, R93, 2013). Fat and soft tissue: the ranges of body-composition
# CT, -190 to -30 and -29 to 150 (Mitsiopoulos et al., J. Appl. Physiol. 85, 115, 1998). Bone: denser than those.
TISSUES = {
    "lung": (-950.0, -500.0),
    "fat": (-190.0, -30.0),
    "soft": (-30.0, 150.0),
    "bone": (150.0, math.inf),
}


# ------------------------------------------------------------------------------------------------
# One prediction and the truth


@dataclass
class Case:
    """What there is to score: volumes ``(D, H, W)`` in [0, 1] of ``hu_window``.

    mask: 1 inside the scan (None: everywhere). body: bool, see :func:`scanned_body`. xrays: ``(2, S, S)``, the input,
    made by ``geometry`` and ``xray_scale``. Without body or xrays the scores that need them are None.
    Raises ``ValueError`` for unlike shapes and for NaN.
    """

    prediction: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor | None = None
    body: torch.Tensor | None = None
    xrays: torch.Tensor | None = None
    geometry: Geometry = field(default_factory=Geometry)
    hu_window: tuple[float, float] = HU_WINDOW
    xray_scale: float = XRAY_SCALE

    def __post_init__(self):
        check_pair(self.prediction, self.target)

    @cached_property
    def error_hu(self) -> torch.Tensor:
        """Prediction minus truth in HU, float64."""
        return (self.prediction.double() - self.target.double()) * (self.hu_window[1] - self.hu_window[0])

    def in_window(self, window: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction, as it is, and truth, clipped, with ``window`` (HU) mapped to [0, 1]; in their own dtype."""
        if tuple(window) == tuple(self.hu_window):
            return self.prediction, self.target.clamp(0, 1)
        low, high = window
        prediction, target = (
            (unit_to_hu(volume, self.hu_window) - low) / (high - low) for volume in (self.prediction, self.target)
        )
        return prediction, target.clamp(0, 1)

    @cached_property
    def slicewise(self) -> dict[str, float]:
        """The columns of :func:`x2ct` and :func:`perx2ct`; in one pass where clipping changes nothing."""
        prediction, target = self.in_window(X2CT_WINDOW)
        scale = X2CT_WINDOW[1] - X2CT_WINDOW[0]
        clipped = prediction.clamp(0, 1)
        psnr_clipped = psnr_slices(clipped, target, scale, X2CT_PEAK)
        if torch.equal(clipped, prediction):
            psnr_raw, ssim = psnr_clipped, ssim_uniform(clipped, target, slices=1.0, volume=2.0)
        else:
            psnr_raw = psnr_slices(prediction, target, scale, X2CT_PEAK)
            ssim = ssim_uniform(clipped, target, slices=1.0) | ssim_uniform(prediction, target, volume=2.0)
        return {
            "psnr_x2ct": psnr_clipped,
            "ssim_slices": ssim["slices"],
            "psnr_perx2ct": psnr_raw,
            "ssim_perx2ct": ssim["volume"],
        }


def scanned_body(target: torch.Tensor, mask: torch.Tensor, hu_window, fov_mm: float) -> torch.Tensor:
    """The scanned part of the true body, without couch: bool ``(D, H, W)``, from :func:`body.body_mask`."""
    hu = unit_to_hu(target, hu_window).cpu().numpy()
    return torch.from_numpy(body_mask(hu, fov_mm / len(hu))) & (mask.cpu() > 0)


# ------------------------------------------------------------------------------------------------
# Protocols


def strict(case: Case) -> dict[str, float | None]:
    """The plain definitions over the whole cube: nothing clipped, the peak is the width of the data's HU window.

    PSNR = 20 log10(width / RMSE in HU); SSIM 3D with a Gaussian window of sigma 1.5 and data range 1 (Wang et al.
    2004, in 3D); MAE and RMSE in HU. Raised by the air around the patient, which is easy to predict and counts.
    """
    errors = error_statistics(case.error_hu)
    return {
        "psnr_strict": psnr(case.prediction, case.target),
        "ssim_3d": ssim_3d(case.prediction, case.target),
        "mae_hu": errors["mae"],
        "rmse_hu": errors["rmse"],
    }


def strict_masked(case: Case) -> dict[str, float]:
    """PSNR as :func:`strict`, over the voxels that the scan saw.

    The cube reaches beyond most scans; what is filled in there is known air. Raises ``ValueError`` for an empty mask.
    """
    return {"psnr_strict_masked": psnr(case.prediction, case.target, case.mask)}


def body(case: Case) -> dict[str, float | None]:
    """MAE, RMSE and signed bias (prediction - truth) in HU inside the body, and in each band of ``TISSUES``.

    Bands are of the true volume: a prediction cannot choose where it is scored. Voxels that mix two tissues fall into
    whichever band their mean lies in (lung next to soft tissue: fat, or none), vessels with contrast agent into bone. A
    band without voxels has None. Worse than whole-cube figures, since no air helps. Source: this project.
    """
    regions = ("body", *TISSUES)
    if case.body is None:
        parts = dict.fromkeys(regions, torch.empty(0))
    else:
        errors, hu = case.error_hu[case.body], unit_to_hu(case.target[case.body], case.hu_window)
        bands = {name: errors[(hu >= low) & (hu < high)] for name, (low, high) in TISSUES.items()}
        parts = {"body": errors, **bands}
    statistics = {name: error_statistics(part) for name, part in parts.items()}
    return {f"{name}_{key}_hu": value for name, values in statistics.items() for key, value in values.items()}


def x2ct(case: Case) -> dict[str, float]:
    """X2CT-GAN's (Ying et al., CVPR 2019; github.com/kylekma/X2CT: 3DGAN/test.py and lib/utils/metrics_np.py).

    Prediction clipped to [-1024, 1476] HU, both cut to integers of 1 HU; PSNR of each slice with peak 4095, mean over
    the slices of each axis, then over the axes. A slice without any error scores 100 dB, as in that code (one with a
    single voxel off scores more: 108 dB at 64^2). SSIM in 2D, 7 x 7 uniform window, data range 1, likewise averaged.
    Raised by the peak, 20 log10(4095 / 2500) = 4.29 dB, and by the mean over slices: empty ones count 100 dB.
    """
    return {key: case.slicewise[key] for key in ("psnr_x2ct", "ssim_slices")}


def perx2ct(case: Case) -> dict[str, float]:
    """PerX2CT's (Kyung et al., ICASSP 2023; github.com/dek924/PerX2CT: main_test.py and utils/metrics.py).

    PSNR as :func:`x2ct` with the prediction not clipped: the same where it stays in the window. SSIM in 3D, 7 x 7 x 7
    uniform window, data range 2: the code gives none, and scikit-image 0.19.1, which it pins, then takes that of a
    float image, [-1, 1]. There the three axes are three separately decoded stacks; here all are cut from one volume.
    PSNR is raised as in x2ct; SSIM by the doubled range, which lets four times the deviation pass for noise.
    """
    return {key: case.slicewise[key] for key in ("psnr_perx2ct", "ssim_perx2ct")}


def pm1024(case: Case) -> dict[str, float]:
    """Both clipped to [-1024, 1024] HU, mapped to [0, 1]: PSNR over the whole volume with peak 1, SSIM 3D range 1.

    The window of SPARC and LiftXR; computed as in github.com/xmed-lab/DIF-Gaussian, code/evaluate.py (prediction
    clipped; scikit-image's defaults, so SSIM with a uniform window of 7^3), which takes [-1000, 1024] HU.
    Lowers PSNR by 20 log10(2500 / 2048) = 1.73 dB against strict, less what clipping dense bone hides.
    """
    prediction, target = case.in_window(PM1024_WINDOW)
    prediction = prediction.clamp(0, 1)
    return {
        "psnr_pm1024": psnr(prediction, target),
        "ssim_pm1024": ssim_uniform(prediction, target, volume=1.0)["volume"],
    }


def projection(case: Case) -> dict[str, float | None]:
    """Does the volume explain its X-rays: mean |X-rays rendered from the prediction - input X-rays|.

    In X-ray units (1 = a line integral of ``xray_scale``, by default 10, the attenuation of 500 mm of water), over
    both views, at the volume's own resolution (:class:`losses.ProjectionLoss`); relative: divided by the input's mean.
    Says nothing about depth: a blurred volume explains its X-rays well. Means something only where the input was
    rendered, or measured, in the stated geometry and scale. Even the truth is not at 0: its voxels are coarser than
    what the X-rays were rendered from.
    """
    if case.xrays is None:
        return {"projection_mae": None, "projection_relative": None}
    criterion = ProjectionLoss(Acquisition(case.geometry, case.hu_window, case.xray_scale))
    with torch.no_grad():
        absolute = criterion(case.prediction[None, None].float(), case.xrays[None]).item()
    mean = case.xrays.double().mean().item()
    return {"projection_mae": absolute, "projection_relative": absolute / mean if mean > 0 else None}


def spectrum(case: Case) -> dict[str, float | None]:
    """Sharpness: the power spectrum of axial slices against the truth's, see :func:`spectrum.compare_spectra`."""
    return compare_spectra(case.prediction, case.target)


@dataclass(frozen=True)
class Protocol:
    """A function from a :class:`Case` to its columns, what these are, and which of them a short table shows."""

    score: Callable[[Case], Mapping[str, float | None]]
    columns: dict[str, str]
    main: tuple[str, ...]


def _body_columns() -> dict[str, str]:
    words = {"mae": "mean absolute error", "rmse": "root mean squared error", "bias": "mean of prediction - truth"}
    where = {"body": "body", **{name: f"{name}, {low:g} to {high:g} HU" for name, (low, high) in TISSUES.items()}}
    where["bone"] = f"bone, above {TISSUES['bone'][0]:g} HU"
    return {f"{name}_{key}_hu": f"HU; {text}; {where[name]}" for name in where for key, text in words.items()}


PROTOCOLS = {
    "strict": Protocol(
        strict,
        {
            "psnr_strict": "dB; whole volume, peak = width of the HU window",
            "ssim_3d": "3D, Gaussian window of sigma 1.5, data range 1",
            "mae_hu": "HU; mean absolute error, whole volume",
            "rmse_hu": "HU; root mean squared error, whole volume",
        },
        ("psnr_strict", "ssim_3d", "mae_hu"),
    ),
    "strict_masked": Protocol(
        strict_masked,
        {"psnr_strict_masked": "dB; inside the scan only, peak = width of the HU window"},
        ("psnr_strict_masked",),
    ),
    "body": Protocol(body, _body_columns(), ("body_mae_hu", "body_bias_hu")),
    "x2ct": Protocol(
        x2ct,
        {
            "psnr_x2ct": "dB; slices of integer HU, three axes, peak 4095 (4.3 dB and more above strict)",
            "ssim_slices": "2D 7 x 7 uniform window, mean over slices of three axes, data range 1",
        },
        ("psnr_x2ct", "ssim_slices"),
    ),
    "perx2ct": Protocol(
        perx2ct,
        {
            "psnr_perx2ct": "dB; as psnr_x2ct, prediction not clipped",
            "ssim_perx2ct": "3D 7 x 7 x 7 uniform window, data range 2",
        },
        ("psnr_perx2ct", "ssim_perx2ct"),
    ),
    "pm1024": Protocol(
        pm1024,
        {
            "psnr_pm1024": "dB; window [-1024, 1024] HU mapped to [0, 1], whole volume, peak 1",
            "ssim_pm1024": "window [-1024, 1024] HU, 3D 7 x 7 x 7 uniform window, data range 1",
        },
        ("psnr_pm1024", "ssim_pm1024"),
    ),
    "projection": Protocol(
        projection,
        {
            "projection_mae": "X-ray units; mean absolute difference of rendered and input X-rays",
            "projection_relative": "mean absolute difference of rendered and input X-rays, divided by the input's mean",
        },
        ("projection_relative",),
    ),
    "spectrum": Protocol(
        spectrum,
        {
            "fine_power_db": "dB; power of axial slices above 1/4 cycle per voxel over the truth: 0 is as sharp",
            "lsd_db": "dB; log-spectral distance of axial slices, 8 rings up to 1/2 cycle per voxel",
        },
        ("fine_power_db",),
    ),
}
COLUMNS = {column: text for protocol in PROTOCOLS.values() for column, text in protocol.columns.items()}


def score(case: Case) -> dict[str, float | None]:
    """Every column of every protocol, in the order of ``COLUMNS``; None where a patient has nothing to score."""
    return {column: value for protocol in PROTOCOLS.values() for column, value in protocol.score(case).items()}


def format_score(column: str, value: float | None, signed: bool = False) -> str:
    """A score with the digits that mean something: dB, litres 2, SSIM, NCC 3, HU 1, projection 4; "-" for none."""
    if value is None:
        return "-"
    three = column.startswith("ssim") or column.endswith("ncc")
    two = column.startswith(("psnr", "lung_litres")) or column.endswith("_db")
    digits = 3 if three else 1 if column.endswith("hu") else 2 if two else 4
    return f"{value:{'+' if signed else ''}.{digits}f}"


# ------------------------------------------------------------------------------------------------
# Worked example


def phantom_case(size: int = 64, blur_mm: float = 7.5, offset_hu: float = -10.0, seed: int = 0) -> Case:
    """A procedural thorax as the truth, ``size``^3 voxels over 360 mm; as the prediction the same, blurred and shifted.

    blur_mm: standard deviation of the Gaussian. offset_hu: added to every voxel, also to air, so that the prediction
    leaves the window and clipping matters. The X-rays are rendered from twice the resolution.
    """
    from xray2ct.data.phantoms import make_phantom

    ct, geometry = CtImage(*make_phantom(seed, 0, spacing_mm=3.0), "phantom"), Geometry()
    hu, mask = resample_cube(ct, locate_cube(ct, geometry.fov_mm), geometry.fov_mm, 2 * size)
    fine = torch.from_numpy(hu_to_unit(hu.astype(np.float32)))
    xrays = render_xrays(fine[None, None], geometry, (4 * size, 4 * size))[0]
    target = torch.from_numpy(area_average(fine.numpy(), 2))
    mask = torch.from_numpy(area_average(mask, 2) >= 0.5)
    sigma = blur_mm * size / geometry.fov_mm
    blurred = scipy.ndimage.gaussian_filter(target.numpy(), sigma, mode="nearest")
    prediction = torch.from_numpy(blurred) + offset_hu / (HU_WINDOW[1] - HU_WINDOW[0])
    inside = scanned_body(target, mask, HU_WINDOW, geometry.fov_mm)
    return Case(prediction, target, mask, inside, xrays, geometry)


def explain(case: Case, scores: dict[str, float]) -> list[tuple[str, float]]:
    """What lies between the scores of one case with X-rays and body, as (words, value): dB, SSIM, ratios."""
    peak = 20 * math.log10(X2CT_PEAK / (X2CT_WINDOW[1] - X2CT_WINDOW[0]))
    window = 20 * math.log10((PM1024_WINDOW[1] - PM1024_WINDOW[0]) / (HU_WINDOW[1] - HU_WINDOW[0]))
    x2ct_gap, pm1024_gap = (scores[name] - scores["psnr_strict"] for name in ("psnr_x2ct", "psnr_pm1024"))
    margin = len(case.target) // 8
    prediction, target = (F.pad(v, (0, 0, 0, 0, margin, margin)) for v in (case.prediction, case.target))
    padded = Case(prediction, target)
    truth = projection(replace(case, prediction=case.target))["projection_relative"]
    assert truth is not None
    return [
        ("psnr_x2ct - psnr_strict, dB", x2ct_gap),
        ("    by peak 4095 instead of 2500", peak),
        ("    by the mean over slices, clipping and integers", x2ct_gap - peak),
        ("psnr_perx2ct - psnr_strict, dB", scores["psnr_perx2ct"] - scores["psnr_strict"]),
        ("psnr_pm1024 - psnr_strict, dB", pm1024_gap),
        ("    by peak 2048 instead of 2500", window),
        ("    by clipping", pm1024_gap - window),
        ("ssim_perx2ct - ssim_pm1024", scores["ssim_perx2ct"] - scores["ssim_pm1024"]),
        ("body_mae_hu / mae_hu", scores["body_mae_hu"] / scores["mae_hu"]),
        ("projection_relative of the truth itself", truth),
        (f"with {margin} slices of air added above and below: psnr_strict, dB", psnr(padded.prediction, padded.target)),
        ("    psnr_x2ct, dB", x2ct(padded)["psnr_x2ct"]),
    ]


def print_example(size: int, blur_mm: float, offset_hu: float, seed: int) -> None:
    """The scores of :func:`phantom_case`, protocol by protocol, and what lies between them."""
    case = phantom_case(size, blur_mm, offset_hu, seed)
    scores = score(case)
    print(f"truth: phantom of seed {seed}, {size}^3 voxels of {case.geometry.fov_mm / size:.1f} mm")
    print(f"prediction: the same, blurred by {blur_mm:g} mm, {offset_hu:+g} HU\n")
    for name, protocol in PROTOCOLS.items():
        for column, text in protocol.columns.items():
            print(f"{name:14}{column:20}{format_score(column, scores[column]):>8}  {text}")
    print()
    for words, value in explain(case, {name: value for name, value in scores.items() if value is not None}):
        print(f"{words:64}{value:8.3f}")


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--example", action="store_true", help="score one blurred phantom under every protocol")
    parser.add_argument("--size", type=int, default=64, help="of the example: voxels per axis (default %(default)s)")
    parser.add_argument("--blur-mm", type=float, default=7.5, help="of the example: Gaussian (default %(default)s)")
    parser.add_argument("--offset-hu", type=float, default=-10.0, help="of the example, added (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the example's phantom (default %(default)s)")
    args = parser.parse_args(argv)
    if args.size < SSIM_TAPS or args.blur_mm < 0:
        raise InputError(f"--size {args.size}, --blur-mm {args.blur_mm}; expected at least {SSIM_TAPS} and 0")
    if args.example:
        print_example(args.size, args.blur_mm, args.offset_hu, args.seed)
        return 0
    for name, protocol in PROTOCOLS.items():
        print(f"{name}: {(protocol.score.__doc__ or '').splitlines()[0]}")
        for column, text in protocol.columns.items():
            print(f"    {column:20}{text}")
    return 0


if __name__ == "__main__":
    run_cli(main)
