"""Each protocol against scikit-image and plain NumPy written from its definition; the page against the command."""

import contextlib
import io
import json
import math
import re

import numpy as np
import pytest
import torch

from tests.helpers.paths import ROOT
from xray2ct.evaluation import protocols
from xray2ct.evaluation.protocols import COLUMNS, PROTOCOLS, TISSUES, Case, score
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, hu_to_unit

PAGE = ROOT / "docs" / "protocols.md"


def make_case(shape=(9, 8, 10), noise=0.2, hu_window=(-1024.0, 1476.0), **more) -> Case:
    """A truth of all tissues; the prediction leaves the window on both sides."""
    random = np.random.default_rng(3)
    low, high = hu_window
    hu = random.uniform(low, min(high, 1400), shape)
    hu = (hu + np.roll(hu, 1, 0) + np.roll(hu, 1, 2)) / 3
    target = ((hu - low) / (high - low)).astype(np.float32)
    prediction = (target + noise * random.standard_normal(shape)).astype(np.float32)
    return Case(torch.from_numpy(prediction), torch.from_numpy(target), hu_window=hu_window, **more)


def in_hu(case):
    low, high = case.hu_window
    return [v.numpy().astype(np.float64) * (high - low) + low for v in (case.prediction, case.target)]


def slicewise_psnr(a, b, peak):
    axes = []
    for axis in range(3):
        scores = []
        for i in range(a.shape[axis]):
            mse = np.mean((a.take(i, axis).astype(np.float64) - b.take(i, axis)) ** 2)
            scores.append(100.0 if mse == 0 else 20 * math.log10(peak / math.sqrt(mse)))
        axes.append(np.mean(scores))
    return np.mean(axes)


def windowed_ssim(a, b, data_range):
    """SSIM from its definition: each window of 7 per axis, sample statistics, whatever the number of axes."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for corner in np.ndindex(*(n - 6 for n in a.shape)):
        window = tuple(slice(i, i + 7) for i in corner)
        x, y = a[window].ravel(), b[window].ravel()
        (vx, covariance), (_, vy) = np.cov(x, y)
        numerator = (2 * x.mean() * y.mean() + c1) * (2 * covariance + c2)
        values.append(numerator / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def slicewise_ssim(a, b, ssim):
    axes = [np.mean([ssim(a.take(i, axis), b.take(i, axis)) for i in range(a.shape[axis])]) for axis in range(3)]
    return np.mean(axes)


# ------------------------------------------------------------------------------------------------
# Protocols


def test_strict_is_the_plain_definition_over_everything():
    metrics = pytest.importorskip("skimage.metrics")
    case = make_case((12, 13, 11))
    prediction, target = in_hu(case)
    scores = protocols.strict(case)
    assert scores["psnr_strict"] == pytest.approx(20 * math.log10(2500 / np.sqrt(np.mean((prediction - target) ** 2))))
    reference = metrics.peak_signal_noise_ratio(target, prediction, data_range=2500)
    assert scores["psnr_strict"] == pytest.approx(reference, abs=1e-5)
    assert scores["mae_hu"] == pytest.approx(np.abs(prediction - target).mean(), rel=1e-6)
    assert scores["rmse_hu"] == pytest.approx(np.sqrt(np.mean((prediction - target) ** 2)), rel=1e-6)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    volumes = (case.prediction.double().numpy(), case.target.double().numpy())
    assert scores["ssim_3d"] == pytest.approx(metrics.structural_similarity(*volumes, **options), abs=1e-9)


def test_strict_masked_counts_the_scan_only():
    case = make_case()
    case.mask = torch.zeros_like(case.target)
    case.mask[2:7, 1:, 3:9] = 1
    prediction, target = (v[2:7, 1:, 3:9] for v in in_hu(case))
    expected = 20 * math.log10(2500 / np.sqrt(np.mean((prediction - target) ** 2)))
    assert protocols.strict_masked(case)["psnr_strict_masked"] == pytest.approx(expected, abs=1e-5)
    case.mask = None
    prediction, target = in_hu(case)
    expected = 20 * math.log10(2500 / np.sqrt(np.mean((prediction - target) ** 2)))
    assert protocols.strict_masked(case)["psnr_strict_masked"] == pytest.approx(expected, abs=1e-5)


def test_body_and_its_tissues_by_a_loop_over_voxels():
    case = make_case((6, 7, 8))
    body = np.random.default_rng(0).random((6, 7, 8)) < 0.7
    case.body = torch.from_numpy(body)
    errors = {name: [] for name in ("body", *TISSUES)}
    prediction, target = in_hu(case)
    for voxel in np.ndindex(*body.shape):
        if not body[voxel]:
            continue
        error, hu = prediction[voxel] - target[voxel], target[voxel]
        errors["body"].append(error)
        if -950 <= hu < -500:
            errors["lung"].append(error)
        elif -190 <= hu < -30:
            errors["fat"].append(error)
        elif -30 <= hu < 150:
            errors["soft"].append(error)
        elif hu >= 150:
            errors["bone"].append(error)
    scores = protocols.body(case)
    assert len(scores) == 15
    for name, values in errors.items():
        assert values, name
        assert scores[f"{name}_mae_hu"] == pytest.approx(np.mean(np.abs(values)), rel=1e-5), name
        assert scores[f"{name}_rmse_hu"] == pytest.approx(np.sqrt(np.mean(np.square(values))), rel=1e-5), name
        assert scores[f"{name}_bias_hu"] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-3), name


def test_the_limits_of_a_tissue_belong_to_the_upper_band_and_the_bias_has_a_sign():
    hu = torch.tensor([-950.0, -500.0, -190.0, -30.0, 150.0, -700.0]).reshape(1, 1, 6).double()
    target = hu_to_unit(hu, (-1024.0, 1476.0))
    target = torch.round(target * 2500) / 2500  # exact limits
    case = Case(target - 20 / 2500, target, body=torch.ones(1, 1, 6, dtype=torch.bool))
    scores = protocols.body(case)
    assert {name: scores[f"{name}_bias_hu"] for name in TISSUES} == pytest.approx(dict.fromkeys(TISSUES, -20.0))


def test_a_tissue_that_is_not_there_has_no_score():
    target = hu_to_unit(torch.full((4, 4, 4), 40.0))
    case = Case(target + 0.01, target, body=torch.ones(4, 4, 4, dtype=torch.bool))
    scores = protocols.body(case)
    assert scores["soft_mae_hu"] == pytest.approx(25, abs=1e-3)
    assert scores["body_mae_hu"] == pytest.approx(25, abs=1e-3)
    for name in ("lung", "fat", "bone"):
        assert [scores[f"{name}_{key}_hu"] for key in ("mae", "rmse", "bias")] == [None] * 3
    case.body = torch.zeros(4, 4, 4, dtype=torch.bool)
    assert set(protocols.body(case).values()) == {None}
    case.body = None
    assert set(protocols.body(case).values()) == {None}


@pytest.mark.parametrize("hu_window", [(-1024.0, 1476.0), (-1000.0, 2000.0)])
def test_x2ct_from_hounsfield_units(hu_window):
    case = make_case(hu_window=hu_window)
    prediction, target = (np.clip(v + 1024, 0, 2500) for v in in_hu(case))
    scores = protocols.x2ct(case)
    # A value at the edge of an integer may fall on either side in float32: one voxel in hundreds.
    expected = slicewise_psnr(prediction.astype(int), target.astype(int), 4095)
    assert scores["psnr_x2ct"] == pytest.approx(expected, abs=1e-3)
    x, y = prediction / 2500, target / 2500
    assert scores["ssim_slices"] == pytest.approx(slicewise_ssim(x, y, lambda a, b: windowed_ssim(a, b, 1)), abs=1e-6)
    metrics = pytest.importorskip("skimage.metrics")
    reference = slicewise_ssim(x, y, lambda a, b: metrics.structural_similarity(a, b, data_range=1.0))
    assert scores["ssim_slices"] == pytest.approx(reference, abs=1e-6)


def test_x2ct_gives_empty_slices_100_db_and_one_voxel_off_more():
    target = torch.zeros(32, 32, 32)
    prediction = target.clone()
    assert protocols.x2ct(Case(prediction, target))["psnr_x2ct"] == 100
    prediction[10, 20, 30] = 1.5 / 2500  # 1 HU in one slice of each axis: 20 log10(4095 * 32) = 102.35 dB
    expected = (31 * 100 + 20 * math.log10(4095 * 32)) / 32
    assert protocols.x2ct(Case(prediction, target))["psnr_x2ct"] == pytest.approx(expected, abs=1e-6)
    assert expected > 100


def test_perx2ct_does_not_clip_and_doubles_the_range_of_ssim():
    case = make_case()
    assert case.prediction.min() < 0
    assert case.prediction.max() > 1
    prediction, target = (v + 1024 for v in in_hu(case))
    scores = protocols.perx2ct(case)
    expected = slicewise_psnr(np.trunc(prediction), np.trunc(target), 4095)
    assert scores["psnr_perx2ct"] == pytest.approx(expected, abs=1e-3)
    assert scores["psnr_perx2ct"] < protocols.x2ct(case)["psnr_x2ct"] - 0.1
    x, y = prediction / 2500, target / 2500
    assert scores["ssim_perx2ct"] == pytest.approx(windowed_ssim(x, y, 2), abs=1e-6)
    metrics = pytest.importorskip("skimage.metrics")
    assert scores["ssim_perx2ct"] == pytest.approx(metrics.structural_similarity(x, y, data_range=2.0), abs=1e-6)
    assert scores["ssim_perx2ct"] > metrics.structural_similarity(x, y, data_range=1.0) + 0.01


def test_inside_the_window_the_shared_pass_gives_what_two_would():
    inside = make_case((20, 8, 9), noise=0.05)
    inside.prediction.clamp_(0, 1)
    inside.prediction[0, 0, 0] = 0
    outside = Case(inside.prediction.clone(), inside.target)
    outside.prediction[0, 0, 0] = -1e-6  # too small to count, but the volumes are no longer the same
    assert outside.slicewise == pytest.approx(inside.slicewise, abs=1e-6)
    assert inside.slicewise["psnr_perx2ct"] == inside.slicewise["psnr_x2ct"]


@pytest.mark.parametrize("hu_window", [(-1024.0, 1476.0), (-1000.0, 1000.0)])
def test_pm1024_from_hounsfield_units(hu_window):
    metrics = pytest.importorskip("skimage.metrics")
    case = make_case(hu_window=hu_window)
    prediction, target = ((np.clip(v, -1024, 1024) + 1024) / 2048 for v in in_hu(case))
    scores = protocols.pm1024(case)
    assert scores["psnr_pm1024"] == pytest.approx(-10 * math.log10(np.mean((prediction - target) ** 2)), abs=1e-5)
    reference = metrics.peak_signal_noise_ratio(target, prediction, data_range=1.0)
    assert scores["psnr_pm1024"] == pytest.approx(reference, abs=1e-5)
    assert scores["ssim_pm1024"] == pytest.approx(windowed_ssim(prediction, target, 1), abs=1e-6)
    reference = metrics.structural_similarity(prediction, target, data_range=1.0)
    assert scores["ssim_pm1024"] == pytest.approx(reference, abs=1e-6)


def projected(hu, axis, fov_mm, xray_scale):
    """Parallel projection at twice the pixels, averaged in pairs: (1, 6, 1) / 8 of the column sums along each axis."""
    image = 0.02 * np.maximum(0, 1 + hu / 1000).sum(axis) * fov_mm / hu.shape[axis] / xray_scale
    for direction in (0, 1):
        padded = np.pad(image, [(1, 1) if d == direction else (0, 0) for d in (0, 1)])
        n = image.shape[direction]
        before, after = (np.take(padded, np.arange(start, start + n), direction) for start in (0, 2))
        image = 0.75 * image + 0.125 * (before + after)
    return image


def test_projection_from_column_sums():
    random = np.random.default_rng(1)
    geometry = Geometry(kind="parallel", fov_mm=300.0)
    xrays = random.uniform(0.1, 0.5, (2, 8, 8)).astype(np.float32)
    hu_window, size = (-1000.0, 1000.0), (8, 8, 8)
    volume = torch.from_numpy(random.random(size).astype(np.float32))
    case = Case(volume, volume, None, None, torch.from_numpy(xrays), geometry, hu_window, xray_scale=7.0)
    hu = volume.numpy().astype(np.float64) * 2000 - 1000
    rendered = np.stack([projected(hu, axis, 300.0, 7.0) for axis in (1, 2)])
    expected = np.abs(rendered - xrays).mean()
    scores = protocols.projection(case)
    assert scores["projection_mae"] == pytest.approx(expected, rel=1e-5)
    assert scores["projection_relative"] == pytest.approx(expected / xrays.mean(), rel=1e-5)
    case.xrays = torch.from_numpy(rendered.astype(np.float32))
    assert protocols.projection(case)["projection_mae"] < 1e-6
    case.xrays = torch.zeros(2, 8, 8)
    assert protocols.projection(case)["projection_relative"] is None
    case.xrays = None
    assert protocols.projection(case) == {"projection_mae": None, "projection_relative": None}


def test_the_scanned_body_is_soft_tissue_and_lung_inside_the_scan():
    hu = torch.full((24, 24, 24), -1000.0)
    hu[:, 4:20, 3:21] = 40
    hu[6:18, 8:16, 6:10] = -800
    mask = torch.ones_like(hu)
    mask[:5] = 0
    inside = protocols.scanned_body(hu_to_unit(hu), mask, (-1024.0, 1476.0), 360.0)
    assert inside.dtype == torch.bool
    assert not inside[:5].any()
    assert inside[10, 12, 8]  # lung
    assert inside[10, 12, 15]
    assert not inside[10, 1, 12]


# ------------------------------------------------------------------------------------------------
# All of them


def complete_case():
    case = make_case((16, 16, 16), noise=0.05)
    case.mask, case.body = torch.ones(16, 16, 16), torch.ones(16, 16, 16, dtype=torch.bool)
    case.xrays = torch.rand(2, 32, 32)
    return case


def test_a_row_has_every_column_in_order_and_is_json():
    case = complete_case()
    row = score(case)
    assert list(row) == list(COLUMNS) == [c for p in PROTOCOLS.values() for c in p.columns]
    assert all(isinstance(value, float) and math.isfinite(value) for value in row.values())
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    for protocol in PROTOCOLS.values():
        assert set(protocol.main) <= set(protocol.columns)
        assert protocol.score.__doc__
    bare = score(Case(case.prediction, case.target))
    missing = {column for column, value in bare.items() if value is None}
    assert missing == {*PROTOCOLS["body"].columns, *PROTOCOLS["projection"].columns}
    # Columns that results of earlier versions have, for --compare.
    earlier = ["psnr_strict", "psnr_strict_masked", "psnr_x2ct", "ssim_3d", "ssim_slices", "mae_hu", "rmse_hu"]
    assert set(earlier) <= set(COLUMNS)


def test_a_perfect_prediction_is_perfect_under_all():
    case = complete_case()
    row = score(Case(case.target, case.target, case.mask, case.body))
    for column, value in row.items():
        if column.startswith("psnr"):
            assert value == 100, column
        elif column.startswith("ssim"):
            assert value == pytest.approx(1), column
        elif column.endswith("hu"):
            assert value == 0, column


def test_what_cannot_be_scored_is_an_error():
    case = complete_case()
    with pytest.raises(ValueError, match="expected two volumes"):
        Case(case.prediction[1:], case.target)
    case.prediction[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        Case(case.prediction, case.target)
    with pytest.raises(ValueError, match="mask is empty"):
        protocols.strict_masked(Case(case.target, case.target, torch.zeros_like(case.target)))


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("psnr_x2ct", 31.456, "31.46"),
        ("ssim_3d", 0.12345, "0.123"),
        ("lung_bias_hu", -12.34, "-12.3"),
        ("projection_relative", 0.012345, "0.0123"),
        ("bone_mae_hu", None, "-"),
    ],
)
def test_digits(column, value, text):
    assert protocols.format_score(column, value) == text


# ------------------------------------------------------------------------------------------------
# Command and page


@pytest.fixture(scope="module")
def example():
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert protocols.main(["--example"]) == 0
    return stream.getvalue()


def numbers(line):
    """Numbers that stand alone in a line, as printed."""
    return re.findall(r"(?<=\s)-?\d+\.\d+(?=\s|$)", line)


def test_the_page_shows_what_the_command_prints(example):
    (block,) = re.findall(r"```\n(truth: phantom.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    printed, shown = example.strip().splitlines(), block.strip().splitlines()
    assert len(printed) == len(shown)
    for ours, theirs in zip(printed, shown):
        assert re.sub(r"-?\d+\.\d+", "#", ours).split() == re.sub(r"-?\d+\.\d+", "#", theirs).split()
        for a, b in zip(numbers(ours), numbers(theirs), strict=True):  # another processor may round otherwise
            assert float(a) == pytest.approx(float(b), abs=2.1 * 10 ** -len(b.split(".")[1])), ours


def test_one_prediction_scores_differently_under_each_protocol(example):
    words = [line.split() for line in example.splitlines()]
    rows = {word[1]: float(word[2]) for word in words if word and word[0] in PROTOCOLS}
    assert set(rows) == set(COLUMNS)
    order = ("psnr_pm1024", "psnr_strict", "psnr_perx2ct", "psnr_x2ct")
    values = [rows[column] for column in order]
    assert values == sorted(values)
    assert values[-1] - values[0] > 8
    assert rows["ssim_pm1024"] + 0.03 < rows["ssim_perx2ct"]
    assert rows["body_mae_hu"] > 1.4 * rows["mae_hu"]


def test_the_page_has_every_protocol_and_column():
    text = PAGE.read_text(encoding="utf-8")
    for name, protocol in PROTOCOLS.items():
        assert f"\n## {name}\n" in text
        for column in protocol.columns:
            assert f"`{column}`" in text, column


def test_the_list_names_protocols_and_columns(capsys):
    assert protocols.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*PROTOCOLS, *COLUMNS))


def test_an_impossible_example_is_refused():
    with pytest.raises(InputError, match=r"--size 5.*expected at least 11"):
        protocols.main(["--example", "--size", "5"])
