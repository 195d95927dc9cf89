"""The report page: precision and size of its volumes, escaping, and its behaviour in a real headless Chromium."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from tests.helpers.chromium import Chromium, find_chromium
from tests.helpers.tiny_data import make_checkpoint, make_dataset, make_hu
from xray2ct.evaluation import report
from xray2ct.evaluation.report import STEP_HU, ReportCollector, choose_cases, level_count, pack, pack_volumes, quantise
from xray2ct.evaluation.report_words import best, sentence
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import HU_WINDOW, Geometry, hu_to_unit, render_xrays, unit_to_hu

EVIL = '<script>document.title = "pwned"</script>{{cases}}"\'&'
SIZE = 24
CASES = [EVIL, "p1"]
PRESETS = {
    "Chest": (-300, 1400),
    "Lung": (-600, 1500),
    "Soft tissue": (40, 400),
    "Bone": (400, 1800),
    "Full": (226, 2500),
}


def unpack(data: bytes, size: int) -> np.ndarray:
    """A slow, plain inverse of :func:`report.pack`."""
    raw = np.frombuffer(zlib.decompress(data), np.uint8).astype(int)
    codes = (raw[: len(raw) // 2] | raw[len(raw) // 2 :] << 8).reshape(-1, size, size)
    levels = np.zeros((len(codes), size + 1, size + 1), int)  # with a border of zeros
    for k, y, x in np.ndindex(codes.shape):
        left, up, corner = levels[k, y + 1, x], levels[k, y, x + 1], levels[k, y, x]
        code = codes[k, y, x]
        levels[k, y + 1, x + 1] = sorted((left, up, left + up - corner))[1] + ((code >> 1) ^ -(code & 1))
    return levels[:, 1:, 1:]


def make_item(name: str, seed: int, size: int = SIZE) -> tuple[dict, torch.Tensor]:
    """A data set's item and a blurred, darker "prediction" of it."""
    truth = torch.from_numpy(hu_to_unit(make_hu(seed, size).astype(np.float32)))
    prediction = F.avg_pool3d(truth[None, None], 3, 1, 1, count_include_pad=False)[0, 0] * 0.98
    xrays = render_xrays(truth[None, None], Geometry(), (64, 64))[0]
    return {"id": name, "ct_volume": truth[None], "xrays": xrays}, prediction


def make_rows() -> list[dict]:
    """Three patients, two methods; one score of p2 is missing."""
    scores = {"model": [(24.0, 0.9), (9.5, 0.7), (103.25, None)], "mean_volume": [(18.0, 0.3)] * 3}
    names = [EVIL, "p1", "p2"]
    return [
        {"method": method, "id": name, "psnr_strict": psnr, "ssim_3d": ssim, "rmse_hu": 100.0}
        for method, values in scores.items()
        for name, (psnr, ssim) in zip(names, values)
    ]


def make_summary() -> dict:
    statistics = {"mean": 24.123, "sd": 0.5, "n": 3, "ci95": [23.5, 24.75]}
    gain = {"mean": -6.4, "sd": 0.25, "n": 3, "ci95": [-6.75, -5.5]}
    return {
        "data": f"data {EVIL}",
        "split": "test",
        "seen_in_training": [EVIL],
        "checkpoints": [{"file": "best_model.pt", "config_hash": "00ff00ff00ff", "weights": {"stage1": "beef"}}],
        "split_hash": "3a52373c626db1c6",
        "patients": [EVIL, "p1", "p2"],
        "protocols": {"psnr_strict": "dB; peak & window <whole>"},
        "methods": {
            "model": {"psnr_strict": statistics, "ssim_3d": {"mean": 0.9, "sd": None, "n": 1, "ci95": None}},
            "mean_volume": {"psnr_strict": statistics, "rmse_hu": statistics},
        },
        "minus_mean_volume": {"model": {"psnr_strict": gain}},
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page's path, and what went into it: ``{id: (truth, prediction, xrays)}``."""
    collector = ReportCollector(CASES, "model", Acquisition())
    given = {}
    for seed, name in enumerate([*CASES, "p2"]):
        item, prediction = make_item(name, seed)
        collector.observe("mean_volume", item, prediction * 0, {"psnr_strict": 1.0})
        collector.observe("model", item, prediction, {"psnr_strict": 24.0, "ssim_3d": 0.9})
        given[name] = (item["ct_volume"][0].numpy(), prediction.numpy(), item["xrays"].numpy())
    path = tmp_path_factory.mktemp("report") / "report.html"
    collector.write(path, make_summary(), make_rows(), [f"trained for {EVIL}"])
    return path, given


def test_intervals_are_called_what_they_are_and_few_patients_are_no_proof(written):
    page = written[0].read_text(encoding="utf-8")
    assert "below it the 95 % t interval of the mean" in page
    assert (
        "Minus mean_volume: mean, 95 % t interval (below 10 patients it does not show a difference by itself)" in page
    )
    summary = make_summary()
    summary["minus_mean_volume"]["model"]["psnr_strict"]["n"] = 10
    assert "does not show" not in report._differences(summary)


def test_the_best_method_of_each_score_is_marked():
    values = {"model": 24.0, "refined": 25.0, "mean_volume": 18.0, "perfect_64": 30.0}
    assert best("psnr_strict", values) == {"refined"}  # a method that knows the truth is no competitor
    assert best("mae_hu", values) == {"mean_volume"}
    assert best("body_bias_hu", {"a": -3.0, "b": 2.0, "c": None}) == {"b"}
    assert best("pa_ncc", {"a": 0.9, "b": 0.9, "c": 0.8}) == {"a", "b"}
    assert best("pa_ncc", {"a": 0.9, "b": 0.9}) == set()
    assert best("psnr_strict", {"a": 24.0, "perfect_64": 30.0, "b": float("nan")}) == set()
    assert best("lung_litres", {"a": 4.0, "b": 5.0}) == set()  # neither is better


def test_the_best_values_are_marked_in_both_tables(written):
    page = written[0].read_text(encoding="utf-8")
    rows = re.findall(r'<tr data-method="(\w+)"><td>(.*?)</td><td>\w+</td>(.*?)</tr>', page)
    marked = [(method, 'class="best"' in cells.partition("</td>")[0]) for method, _, cells in rows]
    wins = [True, False, True]  # 24 > 18, 9.5 < 18, 103.25 > 18 dB
    assert marked == [("model", win) for win in wins] + [("mean_volume", not win) for win in wins]
    summary = make_summary()
    summary["methods"]["mean_volume"]["psnr_strict"] = {"mean": 18.0, "sd": 1.0, "n": 3, "ci95": None}
    assert report._scores(summary).count('class="best"') == 1
    assert '<td class="best" title="best">24.12' in report._scores(summary)


def test_one_sentence_tells_the_result():
    scores = {
        "model": {"psnr_strict": {"mean": 24.125, "n": 6}},
        "mean_volume": {"psnr_strict": {"mean": 18.5, "n": 6}},
    }
    assert sentence({"methods": scores}, "model") == (
        "Over 6 patients, model reaches a PSNR (strict) of 24.12 dB, 5.62 dB better than the mean training volume"
        " (18.50 dB), which ignores the X-rays."
    )
    alone = {"model": {"psnr_strict": {"mean": 24.125, "n": 1}}}
    assert sentence({"methods": alone}, "model") == "Over 1 patient, model reaches a PSNR (strict) of 24.12 dB."
    assert sentence({"methods": {"model": {"pa_ncc": {"mean": 0.9, "n": 1}}}}, "model") == ""


def test_the_viewer_comes_first_and_details_are_folded(written):
    page = written[0].read_text(encoding="utf-8")
    places = [page.index(f'id="{name}"') for name in ("viewer", "scores", "every", "run")]
    assert places == sorted(places)
    assert "<details><summary>Differences, patient by patient</summary>" in page
    assert '<details class="card" id="run">' in page
    assert "mean_volume: the mean of the training volumes" in page


# ------------------------------------------------------------------------------------------------
# Volumes as text


def test_packing_is_lossless_and_rounding_is_bounded():
    values = np.random.default_rng(0).uniform(-1200, 1700, (3, 9, 9))
    levels = quantise(values, *HU_WINDOW, STEP_HU)
    assert levels.min() == 0
    assert levels.max() == level_count(*HU_WINDOW, STEP_HU) - 1
    assert np.array_equal(unpack(pack(levels), 9), levels)
    error = HU_WINDOW[0] + STEP_HU * levels - values.clip(*HU_WINDOW)
    assert np.abs(error).max() <= STEP_HU / 2


def test_volumes_step_down_in_resolution_until_they_fit(monkeypatch):
    monkeypatch.setattr(report, "SIZES", (64, 12, 8))
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1024, 1476, (2, 16, 16, 16)).astype(np.float32))
    text, size = pack_volumes(noise, HU_WINDOW, 100_000)
    assert size == 16
    smaller, size = pack_volumes(noise, HU_WINDOW, len(text) - 1)
    assert size == 12
    shown = HU_WINDOW[0] + STEP_HU * unpack(base64.b64decode(smaller), 12)
    expected = F.adaptive_avg_pool3d(noise, 12).reshape(24, 12, 12).numpy()
    assert np.abs(shown - expected).max() <= STEP_HU / 2 + 1e-3
    assert pack_volumes(noise, HU_WINDOW, len(smaller) - 1)[1] == 8
    with pytest.raises(ValueError, match=r"8\^3 voxels take \d+ characters; the budget is 10"):
        pack_volumes(noise, HU_WINDOW, 10)


def test_a_patient_stays_within_its_share_whatever_the_volume():
    """The worst case: white noise in volume and X-rays at the resolution that is always allowed."""
    random = np.random.default_rng(0)
    noise = torch.from_numpy(random.random((1, 64, 64, 64), np.float32))
    xrays = torch.from_numpy(random.random((2, 256, 256), np.float32))
    collector = ReportCollector(["a"], "model", Acquisition())
    collector.observe("model", {"id": "a", "ct_volume": noise, "xrays": xrays}, noise[0].flip(0), {})
    shown = collector._shown["a"]
    assert shown["info"]["size"] == 64
    assert len(shown["volumes"]) + len(shown["xrays"]) < report.CASE_BYTES
    assert 5 * report.CASE_BYTES < 25e6


def test_cases_are_chosen_by_number_or_by_name():
    ids = ["a", "b", "7", "c"]
    assert choose_cases(["2"], ids) == ["a", "b"]
    assert choose_cases(["7"], ids) == ["7"]  # a patient of that name
    assert choose_cases(["c", "a", "c"], ids) == ["c", "a"]
    assert choose_cases(["0"], ids) == []
    with pytest.raises(InputError, match="--report-cases x: not among the patients scored"):
        choose_cases(["a", "x"], ids)


# ------------------------------------------------------------------------------------------------
# The page as text


def test_names_and_notes_cannot_become_markup(written):
    page = written[0].read_text(encoding="utf-8")
    assert "trained for &lt;script&gt;" in page
    assert "mean nothing for new patients: &lt;script&gt;" in page
    assert '<script>document.title = "pwned"' not in page
    assert page.count("<script>") == 1
    assert '"peak & window' not in page
    assert "dB; peak &amp; window &lt;whole&gt;" in page
    cases = re.search(r'<script type="application/json" id="cases">(.*?)</script>', page, re.DOTALL).group(1)
    assert [case["id"] for case in json.loads(cases)] == CASES


def test_every_table_is_there_without_javascript(written):
    page = written[0].read_text(encoding="utf-8")
    assert "<body>" in page  # without the class that hides what is not asked for
    assert "24.12 \u00b1 0.50<small>23.50 to 24.75, n = 3</small>" in page
    assert "\u22126.40<small>\u22126.75 to \u22125.50, n = 3</small>" in page
    assert "Minus mean_volume" in page
    for text in (
        "<code>3a52373c626db1c6</code>",
        "<code>00ff00ff00ff</code>",
        "<dd>best_model.pt</dd>",
        "<dd>beef</dd>",
    ):
        assert text in page
    assert page.count('<tr data-method="model">') == 3
    assert page.count('<tr data-method="mean_volume">') == 3
    assert page.count('class="open"') == len(CASES)


def test_a_page_without_cases_or_statistics_can_be_written(tmp_path):
    path = tmp_path / "report.html"
    ReportCollector([], "model", Acquisition()).write(
        path, {"methods": {}}, [{"method": "model", "id": "a", "x": None}]
    )
    page = path.read_text(encoding="utf-8")
    assert '<script type="application/json" id="cases">[]</script>' in page
    assert "{{" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_evaluate_writes_the_report(tmp_path):
    root = make_dataset(tmp_path / "data", cube_size=32)
    base = make_checkpoint(tmp_path / "base.pt", root)
    output = tmp_path / "results"
    run = ["--data", str(root), "--base", str(base), "--device", "cpu", "--pictures", "0", "--output", str(output)]
    assert evaluate.main([*run, "--report", "--report-cases", "p5"]) == 0
    page = (output / "report.html").read_text(encoding="utf-8")
    cases = re.search(r'<script type="application/json" id="cases">(.*?)</script>', page, re.DOTALL).group(1)
    assert [(case["id"], case["size"]) for case in json.loads(cases)] == [("p5", 16)]
    assert page.count('<tr data-method="model">') == 2
    for value in json.loads((output / "summary.json").read_text(encoding="utf-8"))["checkpoints"][0].values():
        assert str(value) in page
    with pytest.raises(InputError, match="--report-cases p0: not among the patients scored"):
        evaluate.main([*run, "--report", "--report-cases", "p0"])


# ------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium found (apt-get install chromium, or $CHROMIUM)")
    with Chromium(path) as running:
        yield running


@pytest.fixture
def page(browser, written):
    opened = browser.open(written[0].as_uri())
    opened.wait("byId('viewer').dataset.shown === '0'")
    yield opened
    assert opened.complaints() == []
    assert opened.requests() == {written[0].as_uri(): None}


def grey_of(volume: np.ndarray, preset: str) -> np.ndarray:
    """What the window makes of a slice in [0, 1] after rounding."""
    hu = HU_WINDOW[0] + STEP_HU * quantise(unit_to_hu(volume), *HU_WINDOW, STEP_HU)
    centre, width = PRESETS[preset]
    return np.floor(((hu - (centre - width / 2)) / width).clip(0, 1) * 255 + 0.5)


def picture(page, plane: int, tile: int) -> np.ndarray:
    """The pixels ``(n, n, 3)`` of a plane's canvas: tile 0 prediction, 1 truth, 2 error."""
    return canvas_pixels(page, f"byId('planes').children[{plane}].querySelectorAll('canvas')[{tile}]")


def canvas_pixels(page, canvas: str) -> np.ndarray:
    # Read from a copy: reading a canvas itself twice makes Chromium warn of the page.
    values = page.run(
        "(c => { const k = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true});"
        " k.drawImage(c, 0, 0); return [c.width, ...k.getImageData(0, 0, c.width, c.height).data]; })"
        f"({canvas})"
    )
    pixels = np.array(values[1:]).reshape(values[0], values[0], 4)
    assert (pixels[..., 3] == 255).all()
    return pixels[..., :3]


def slide(page, plane: int, position: int) -> None:
    page.run(
        f"(s => {{ s.value = {position}; s.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
        f"(byId('planes').children[{plane}].querySelector('input'))"
    )


def slices(volume: np.ndarray, position) -> list[np.ndarray]:
    z, y, x = position
    return [volume[z], volume[:, y], volume[:, :, x]]


def test_sliders_move_the_slices_of_both_volumes(page, written):
    truth, prediction, _ = written[1][EVIL]
    middle = SIZE // 2
    before = [picture(page, plane, 1)[..., 0] for plane in range(3)]
    for shown, expected in zip(before, slices(truth, [middle] * 3)):
        assert np.array_equal(shown, grey_of(expected, "Chest"))
    position = [5, 9, 16]
    for plane, value in enumerate(position):
        slide(page, plane, value)
    for plane in range(3):
        for tile, volume in enumerate((prediction, truth)):
            shown = picture(page, plane, tile)
            assert np.array_equal(shown[..., 0], grey_of(slices(volume, position)[plane], "Chest"))
            assert np.array_equal(shown[..., 0], shown[..., 2])  # grey
        assert not np.array_equal(picture(page, plane, 1)[..., 0], before[plane])
    assert page.run("byId('planes').children[0].querySelector('output').textContent").startswith("slice 6 of 24")
    assert page.run("document.title").startswith("Evaluation: data <script>")  # the name is text, nothing ran


def test_presets_change_the_window_and_the_error_is_signed(page, written):
    truth, prediction, _ = written[1][EVIL]
    middle = SIZE // 2
    for preset in PRESETS:
        page.click(f"#presets button[data-name='{preset}']")
        assert np.array_equal(picture(page, 0, 1)[..., 0], grey_of(truth[middle], preset))
        assert page.run("document.querySelector('#presets [aria-pressed=true]').textContent") == preset
    hu = [HU_WINDOW[0] + STEP_HU * quantise(unit_to_hu(v[middle]), *HU_WINDOW, STEP_HU) for v in (prediction, truth)]
    error = hu[0] - hu[1]
    shown = picture(page, 0, 2)
    assert (shown[error == 0] == [14, 16, 19]).all()
    assert (shown[error > 20][:, 0] > shown[error > 20][:, 2]).all()  # too dense: orange
    assert (shown[error < -20][:, 2] > shown[error < -20][:, 0]).all()  # too thin: blue
    assert (error > 20).any()
    assert (error < -20).any()
    page.run("byId('error-range').value = 100; byId('error-range').dispatchEvent(new Event('change'))")
    assert (picture(page, 0, 2)[error >= 100] == [255, 150, 40]).all()


def test_clicks_and_keys_link_the_planes(page, written):
    truth = written[1][EVIL][0]
    page.click("#planes > div:nth-child(1) figure:nth-child(2) canvas", across=(6 + 0.5) / SIZE, down=(18 + 0.5) / SIZE)
    assert page.run("state.position") == [SIZE // 2, 18, 6]
    assert np.array_equal(picture(page, 1, 1)[..., 0], grey_of(truth[:, 18], "Chest"))
    assert np.array_equal(picture(page, 2, 1)[..., 0], grey_of(truth[:, :, 6], "Chest"))
    for key in ("ArrowDown", "ArrowRight", "PageUp", "ArrowUp"):  # the click gave the axial plane the focus
        page.press(key)
    assert page.run("state.position") == [SIZE // 2 + 2 - 10 - 1, 18, 6]
    for _ in range(2):
        page.press("PageUp")
    assert page.run("state.position[0]") == 0  # it ends at the first slice
    assert np.array_equal(picture(page, 0, 1)[..., 0], grey_of(truth[0], "Chest"))
    text = page.run("byId('readout').textContent")
    level = quantise(unit_to_hu(truth[0, 18, 6]), *HU_WINDOW, STEP_HU)
    assert f"truth {HU_WINDOW[0] + STEP_HU * level:.0f} HU".replace("-", "\u2212") in text


def test_xrays_are_shown_next_to_those_of_the_prediction(page, written):
    _, prediction, inputs = written[1][EVIL]
    rendered = render_xrays(torch.from_numpy(prediction)[None, None], Geometry(), (64, 64))[0].numpy()
    for view in range(2):
        peak = np.percentile(inputs[view], 99.8)
        for tile, image in enumerate((inputs[view], rendered[view])):
            shown = canvas_pixels(page, f"byId('xrays').querySelectorAll('canvas')[{3 * view + tile}]")[..., 0]
            assert np.abs(shown - (image / peak).clip(0, 1) * 255).max() <= 1
        difference = rendered[view] - inputs[view]
        shown = canvas_pixels(page, f"byId('xrays').querySelectorAll('canvas')[{3 * view + 2}]")
        clear = difference < -0.02
        assert clear.any()
        assert (shown[clear][:, 2] > shown[clear][:, 0]).all()


def test_another_patient_is_opened_from_the_table(page, written):
    page.click(".open[data-case='1']")
    page.wait("byId('viewer').dataset.shown === '1'")
    truth = written[1]["p1"][0]
    assert np.array_equal(picture(page, 1, 1)[..., 0], grey_of(truth[:, SIZE // 2], "Chest"))
    assert page.run("byId('case').selectedOptions[0].textContent") == "p1"


def test_the_patient_table_sorts_by_its_headers(page):
    def column(index):
        return page.run(f"[...byId('patients').tBodies[0].rows].map(r => r.cells[{index}].textContent)")

    def click(index):
        page.click(f"#patients th:nth-child({index + 1}) button")
        return page.run(f"byId('patients').tHead.rows[0].cells[{index}].getAttribute('aria-sort')")

    assert click(2) == "ascending"
    assert column(2) == ["9.50", "18.00", "18.00", "18.00", "24.00", "103.25"]  # as numbers, not as text
    assert click(2) == "descending"
    assert column(2) == ["103.25", "24.00", "18.00", "18.00", "18.00", "9.50"]
    assert click(3) == "ascending"
    assert column(3)[-1] == "\u2013"  # missing: last
    assert click(3) == "descending"
    assert column(3)[-1] == "\u2013"
    assert page.run("byId('patients').tHead.rows[0].cells[2].getAttribute('aria-sort')") == "none"
    assert click(0) == "ascending"
    assert column(0) == [EVIL, EVIL, "p1", "p1", "p2", "p2"]
    page.run("byId('method').value = 'model'; byId('method').dispatchEvent(new Event('change'))")
    assert page.run("[...byId('patients').tBodies[0].rows].filter(r => !r.hidden).length") == 3


def test_scores_other_than_the_main_ones_are_shown_on_request(page):
    def shown():
        hidden = "[...document.querySelectorAll('.more')].map(e => getComputedStyle(e).display === 'none')"
        return page.run(f"{hidden}.filter(gone => !gone).length")

    assert shown() == 0
    page.click("#every-score")
    assert shown() == 1 + 1 + len(make_rows())  # a line of the scores; the patients' column
    page.click("#every-score")
    assert shown() == 0


def test_a_link_opens_what_it_leads_to(page):
    assert not page.run("byId('run').open")
    page.click("nav a[href='#run']")
    assert page.run("byId('run').open")


def test_a_narrow_window_does_not_scroll_sideways(page, tmp_path):
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=False)
    assert page.run("document.documentElement.scrollWidth") <= 360
    page.screenshot(tmp_path / "narrow.png", 360)
    with Image.open(tmp_path / "narrow.png") as picture:
        assert picture.width <= 360
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 256  # greys, and errors in colour


def test_the_policy_stops_every_request(browser, written):
    page = browser.open(written[0].as_uri())
    assert page.run("fetch('https://example.invalid/').then(() => 'sent', () => 'refused')") == "refused"
    page.run("document.body.append(Object.assign(new Image(), {src: 'https://example.invalid/a.png'}))")
    page.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.run("window.ran") is None
    assert page.requests().pop("https://example.invalid/a.png", "csp") == "csp"
    assert [url for url, refused in page.requests().items() if refused is None] == [written[0].as_uri()]
    assert any("Content Security Policy" in text for text in page.complaints())  # complaints are seen
