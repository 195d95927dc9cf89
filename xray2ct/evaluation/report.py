"""One self-contained ``report.html`` of an evaluation: a viewer for chosen patients and tables, no network.

    collector = ReportCollector(["patient1", "patient2"], "model", data.acquisition)
    collector.observe("model", item, volume, scores)        # for each method and patient; others are passed over
    collector.write("evaluation/report.html", summary, rows)

The page opens from disk in any browser of the last years. Its content security policy lets nothing but its own style
and script run (both by hash) and no request leave.

Size: a patient takes at most :data:`CASE_BYTES` (4.8 MB), five therefore at most 24 MB, without the tables (about
0.6 kB per row). Volumes are rounded to :data:`STEP_HU` (an error of 2 HU at most); a pair of volumes that does not
fit is shown at the first resolution of :data:`SIZES` that does, and the page says which. Measured on five real chest
CTs (2026-11-22): 22.0 MB at 256^3, all five shown at 160^3 (truths smoothed to 64^3 as predictions, one with noise of
10 HU), 6 s of processor time a patient; 2.1 MB at 64^3.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from xray2ct.evaluation.protocols import COLUMNS, PROTOCOLS, format_score
from xray2ct.evaluation.report_words import best, explain_methods, label, sentence
from xray2ct.evaluation.statistics import FEW
from xray2ct.files import InputError, atomic_path
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import unit_to_hu

TEMPLATE = Path(__file__).with_name("report_template.html")
CASE_BYTES = 4_800_000  # of the page, for one patient: 5 x 4.8 MB and the tables stay below 25 MB
STEP_HU = 4.0  # volumes are rounded to this; noise of a chest CT is several times as large
SIZES = (192, 176, 160, 144, 128, 96, 64)  # tried in turn when the full resolution is too large; 64^3 always fits
XRAY_SIZE = 256
XRAY_STEP = 1 / 4096
XRAY_MOST = 3.0  # brighter is clipped; a cube of bone is 2.5
MAIN = {column for protocol in PROTOCOLS.values() for column in protocol.main}  # shown at first, others on request
XRAY_DIFFERENCE = 0.1  # of the X-ray's brightness: shown in full colour


# ------------------------------------------------------------------------------------------------
# Volumes as text


def quantise(values: np.ndarray, low: float, high: float, step: float) -> np.ndarray:
    """Values clipped to [low, high] as int16 levels: ``low + step * level``, off by at most ``step / 2``."""
    return np.rint((np.clip(values, low, high) - low) / step).astype(np.int16)


def level_count(low: float, high: float, step: float) -> int:
    """Number of levels :func:`quantise` can give."""
    return int(np.rint((high - low) / step)) + 1


def pack(levels: np.ndarray) -> bytes:
    """Slices ``(K, n, n)`` of levels (int16, from 0 to 16,000) -> bytes, without loss; ``unpack`` in the page inverts.

    Each level minus the median edge predictor of its left, upper and corner neighbour (LOCO-I: Weinberger et al.,
    IEEE Trans. Image Process. 9, 1309, 2000), zigzag coded, low bytes before high bytes, deflated: what a browser
    can unpack by itself.
    """
    left, up, corner = np.zeros_like(levels), np.zeros_like(levels), np.zeros_like(levels)
    left[:, :, 1:] = levels[:, :, :-1]
    up[:, 1:] = levels[:, :-1]
    corner[:, 1:, 1:] = levels[:, :-1, :-1]
    residual = levels - np.clip(left + up - corner, np.minimum(left, up), np.maximum(left, up))
    code = ((residual << 1) ^ (residual >> 15)).astype(np.uint16)
    packer = zlib.compressobj(6, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED)
    data = packer.compress((code & 255).astype(np.uint8)) + packer.compress((code >> 8).astype(np.uint8))
    return data + packer.flush()


def _resample(volumes: torch.Tensor, size: int) -> np.ndarray:
    """``(2, n, n, n)`` -> float32 ``(2 size, size, size)``: averages over what each new voxel covers."""
    if size != volumes.shape[-1]:
        volumes = F.adaptive_avg_pool3d(volumes, size)
    return volumes.reshape(-1, size, size).numpy()


def pack_volumes(volumes: torch.Tensor, hu_window, budget: int) -> tuple[str, int]:
    """Two volumes ``(2, n, n, n)`` in HU as base64 text of at most ``budget`` characters, and the size they have in it.

    The full resolution when it fits, else the largest of :data:`SIZES` that does.
    """
    full = volumes.shape[-1]
    sizes = [full, *(size for size in SIZES if size < full)]
    for size in sizes:
        levels = quantise(_resample(volumes, size), *hu_window, STEP_HU)
        # Every eighth slice tells the size within a few per cent: no need to pack what cannot fit.
        if size > 128 and 8 * len(pack(levels[::8])) * 4 / 3 > 1.1 * budget:
            continue
        text = base64.b64encode(pack(levels)).decode()
        if len(text) <= budget:
            return text, size
    raise ValueError(f"{sizes[-1]}^3 voxels take {len(text)} characters; the budget is {budget}")


# ------------------------------------------------------------------------------------------------
# The collector


def choose_cases(wanted: Sequence[str], ids: Sequence[str]) -> list[str]:
    """``["3"]`` -> the first three of ``ids``; otherwise ``wanted`` are ids themselves.

    Raises :class:`InputError` naming the first that is not among ``ids``.
    """
    if len(wanted) == 1 and wanted[0] not in ids and wanted[0].isdecimal():
        return list(ids[: int(wanted[0])])
    for name in wanted:
        if name not in ids:
            raise InputError(f"--report-cases {name}: not among the patients scored ({', '.join(ids[:5])}, ...)")
    return list(dict.fromkeys(wanted))


class ReportCollector:
    """Keeps what the viewer shows of the chosen patients (packed: a few MB each), then writes the page.

    cases: ids of the patients to show. method: whose predictions to show. acquisition: the data set's, for
    the re-rendered X-rays.
    """

    def __init__(self, cases: Iterable[str], method: str, acquisition: Acquisition):
        self.cases, self.method, self.acquisition = list(cases), method, acquisition
        self._shown: dict[str, dict] = {}

    def observe(self, method: str, item: dict, volume: torch.Tensor, scores: dict) -> None:
        """Take in one prediction ``(n, n, n)`` in [0, 1]; other methods and patients are passed over.

        item: the data set's, with ``id``, ``xrays`` (2, s, s) and ``ct_volume`` (1, n, n, n).
        """
        if method != self.method or item["id"] not in self.cases:
            return
        volume = volume.detach().float().cpu()
        xray_text, xrays = self._xrays(item["xrays"].float(), volume)
        low, high = window = self.acquisition.hu_window
        both = unit_to_hu(torch.stack([volume, item["ct_volume"][0].float()]), window)
        text, size = pack_volumes(both, window, CASE_BYTES - len(xray_text))
        info = {
            "id": item["id"],
            "about": self._about(volume.shape[-1], size, scores),
            "size": size,
            "low": low,
            "high": high,
            "step": STEP_HU,
            "levels": level_count(low, high, STEP_HU),
            "fov_mm": self.acquisition.geometry.fov_mm,
            "xrays": xrays,
        }
        self._shown[item["id"]] = {"info": info, "volumes": text, "xrays": xray_text}

    def _xrays(self, inputs: torch.Tensor, volume: torch.Tensor) -> tuple[str, dict]:
        """Both input X-rays, each followed by the one rendered from the prediction, as text; and how to show them."""
        rendered = self.acquisition.render(volume[None, None], inputs.shape[1:])[0]
        images = torch.stack([inputs, rendered], dim=1).reshape(1, 4, *inputs.shape[1:])
        size = min(XRAY_SIZE, inputs.shape[-1])
        images = F.adaptive_avg_pool2d(images, size)[0].numpy()
        high = min(max(1.0, float(images.max())), XRAY_MOST)
        peaks = np.percentile(images[::2], 99.8, axis=(1, 2)).clip(1e-3)
        difference = XRAY_DIFFERENCE * float(peaks.max())
        info = {
            "size": size,
            "step": XRAY_STEP,
            "levels": level_count(0.0, high, XRAY_STEP),
            "peaks": peaks.tolist(),
            "difference": difference,
            "about": "Input; re-rendered from the prediction; re-rendered minus input: orange where the prediction"
            f" attenuates more. Full colour: {difference:.2g}, {XRAY_DIFFERENCE:.0%} of the brightest input.",
        }
        return base64.b64encode(pack(quantise(images, 0.0, high, XRAY_STEP))).decode(), info

    def _about(self, full: int, size: int, scores: dict) -> str:
        main = [(column, value) for column, value in scores.items() if not _class(column)]
        values = ", ".join(f"{label(column)} {_number(column, value)}" for column, value in main[:3])
        reduced = f", reduced from {full}\u00b3 to bound this file" if size < full else ""
        resolution = f"{size}\u00b3 voxels of {self.acquisition.geometry.fov_mm / size:.3g} mm{reduced}"
        return f"{self.method}. Shown: {resolution}; HU to \u00b1{STEP_HU / 2:g}. Scores: {values}."

    def write(self, path, summary: dict, rows: list[dict], notes: Sequence[str] = ()) -> None:
        """Write the page, atomically.

        summary: of ``evaluate.py``: ``methods`` and ``minus_*`` become tables, ``protocols`` explains their scores,
        all else is listed. rows: ``{"method", "id", <scores>}``. notes: shown at the top; that patients were seen in
        training is noted there, too.
        """
        if summary.get("seen_in_training"):
            seen = ", ".join(map(str, summary["seen_in_training"]))
            notes = [*notes, f"In the training set, so that their scores mean nothing for new patients: {seen}"]
        shown = [self._shown[case] for case in self.cases if case in self._shown]
        cases = {case["info"]["id"]: index for index, case in enumerate(shown)}
        page = fill_template(
            title=_text(f"Evaluation: {summary.get('data', 'data set')}"),
            subtitle=_text(_subtitle(summary, rows)),
            sentence=_text(sentence(summary, self.method)),
            notes=_notes(notes),
            scores=_scores(summary),
            about=_text(explain_methods(summary.get("methods", {}))),
            differences=_differences(summary),
            patients=_patients(rows, self.method, cases),
            run=_run(summary),
            footer=_text(f"Written {datetime.now():%Y-%m-%d %H:%M}. Research software, not a medical device."),
            # "<" only as an escape: text cannot end the element it stands in.
            cases=json.dumps([case["info"] for case in shown], allow_nan=False).replace("<", "\\u003c"),
            payloads="\n".join(
                f'<script type="text/plain" id="{kind}-{index}">{case[kind]}</script>'
                for index, case in enumerate(shown)
                for kind in ("volumes", "xrays")
            ),
        )
        with atomic_path(path) as temporary:
            temporary.write_bytes(page.encode())


# ------------------------------------------------------------------------------------------------
# The page


def fill_template(**parts: str) -> str:
    """The template with its ``{{names}}`` replaced by ``parts`` (HTML) and a policy that admits only its own code."""
    template = TEMPLATE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src 'sha256-{hashes['style']}'",
            f"script-src 'sha256-{hashes['script']}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = {**parts, "csp": policy}
    return re.sub(r"\{\{([a-z]+)\}\}", lambda match: parts[match.group(1)], template)


def _text(value) -> str:
    return html.escape(str(value), quote=True)


def _finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(column: str, value, signed: bool = False) -> str:
    if not _finite(value):
        return "\u2013"
    text = f"{value:.2f}" if column == "seconds" else format_score(column, value, signed)
    return text.replace("-", "\u2212")


def _class(column: str = "", is_best: bool = False) -> str:
    """Attributes of a cell: a protocol's columns other than its main ones show on request; the best value is marked."""
    more = ["more"] if column in COLUMNS and column not in MAIN else []
    names = " ".join(more + ["best"] * is_best)
    return (f' class="{names}"' if names else "") + (' title="best"' if is_best else "")


def _statistics(column: str, entry: dict | None, signed: bool, is_best: bool) -> str:
    """A table cell: mean, spread, interval and count of one score."""
    if not entry:
        return "<td>\u2013</td>"
    spread = f" \u00b1 {_number(column, entry['sd'])}" if not signed and _finite(entry.get("sd")) else ""
    limits = "".join(f"{_number(column, v, signed)}{end}" for v, end in zip(entry.get("ci95") or (), (" to ", ", ")))
    count = _text(f"{limits}n = {entry.get('n', '?')}")
    mean = _number(column, entry.get("mean"), signed)
    return f"<td{_class(is_best=is_best)}>{mean}{spread}<small>{count}</small></td>"


def _metric_table(methods: dict[str, dict], meanings: dict[str, str], caption: str, signed: bool = False) -> str:
    """One row per score, one column per method."""
    columns = dict.fromkeys(column for statistics in methods.values() for column in statistics)
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in methods)
    body = []
    for column in columns:
        entries = {name: statistics.get(column) for name, statistics in methods.items()}
        tops = set() if signed else best(column, {name: (entry or {}).get("mean") for name, entry in entries.items()})
        cells = "".join(_statistics(column, entry, signed, name in tops) for name, entry in entries.items())
        named = [column] if label(column) != column else []
        meaning = ": ".join(named + ([meanings[column]] if column in meanings else []))
        meaning = f"<small>{_text(meaning)}</small>" if meaning else ""
        body.append(f'<tr{_class(column)}><th scope="row">{_text(label(column))}{meaning}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<caption><span>{_text(caption)}</span></caption>"
        f'<thead><tr><th scope="col">score</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _scores(summary: dict) -> str:
    caption = "Mean \u00b1 standard deviation over patients; below it the 95 % t interval of the mean. Green: the best"
    return _metric_table(summary.get("methods", {}), summary.get("protocols", {}), caption)


def _differences(summary: dict) -> str:
    """Folded, one table per reference: paired differences of every other method to it."""
    tables = [
        _metric_table(value, {}, f"Minus {key.removeprefix('minus_')}: mean, 95 % t interval{_caution(value)}", True)
        for key, value in summary.items()
        if key.startswith("minus_") and value
    ]
    if not tables:
        return ""
    return f"<details><summary>Differences, patient by patient</summary>{'<br>'.join(tables)}</details>"


def _caution(methods: dict[str, dict]) -> str:
    counts = [entry.get("n", 0) for statistics in methods.values() for entry in statistics.values()]
    return f" (below {FEW} patients it does not show a difference by itself)" if min(counts, default=FEW) < FEW else ""


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return f'<section class="card"><h2>Please note</h2><ul class="notes">{items}</ul></section>'


def _subtitle(summary: dict, rows: list[dict]) -> str:
    patients = len(dict.fromkeys(row["id"] for row in rows))
    methods = len(dict.fromkeys(row["method"] for row in rows))
    split = f" of the {summary['split']} split" if "split" in summary else ""
    return f"{patients} patient{'s'[: patients != 1]}{split}, {methods} method{'s'[: methods != 1]}"


def _patients(rows: list[dict], method: str, cases: dict[str, int]) -> str:
    """The sortable table of every row; the patients in the viewer open there."""
    columns = dict.fromkeys(column for row in rows for column in row if column not in ("method", "id"))
    heads = [("id", "text"), ("method", "text"), *((column, "number") for column in columns)]
    head = "".join(
        f'<th scope="col" aria-sort="none" data-kind="{kind}"{_class(name)}>'
        f'<button type="button">{_text(label(name))}</button></th>'
        for name, kind in heads
    )
    values: dict[tuple[str, str], dict] = {}  # of each patient and score
    for row in rows:
        for column in columns:
            values.setdefault((row["id"], column), {})[row["method"]] = row.get(column)
    tops = {key: best(key[1], found) for key, found in values.items()}
    body = []
    for row in rows:
        name = _text(row["id"])
        if row["method"] == method and row["id"] in cases:
            button = f'<button type="button" class="open" data-case="{cases[row["id"]]}"'
            name = f'{button} title="show in the viewer">{name}</button>'
        cells = "".join(
            f'<td{_class(c, row["method"] in tops[row["id"], c])} data-value="{float(row[c])!r}">'
            f"{_number(c, row[c])}</td>"
            if _finite(row.get(c))
            else f'<td{_class(c)} data-value="">\u2013</td>'
            for c in columns
        )
        body.append(
            f'<tr data-method="{_text(row["method"])}"><td>{name}</td><td>{_text(row["method"])}</td>{cells}</tr>'
        )
    return f'<table class="sortable" id="patients"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _run(summary: dict) -> str:
    """All of the summary but the tables: checkpoints, hashes, split, geometry, precision, versions."""
    left_out = {"methods", "protocols", "protocol_columns"}
    kept = {key: value for key, value in summary.items() if key not in left_out and not key.startswith("minus_")}
    return _listing(kept)


def _listing(value) -> str:
    """Nested dicts as nested lists, lists of plain values in one line; hashes in a fixed-width font."""
    if isinstance(value, dict):
        lines = (f"<dt>{_text(str(key).replace('_', ' '))}</dt><dd>{_listing(v)}</dd>" for key, v in value.items())
        return f"<dl>{''.join(lines)}</dl>"
    if isinstance(value, (list, tuple)):
        if any(isinstance(v, (dict, list, tuple)) for v in value):
            return "".join(_listing(v) for v in value)
        return _text(", ".join(map(str, value)) or "none")
    text = _text("\u2013" if value is None else value)
    return f"<code>{text}</code>" if re.fullmatch(r"[0-9a-f]{12,}", text) else text
