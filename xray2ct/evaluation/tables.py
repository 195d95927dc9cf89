"""Tables of scores: per-patient CSV, printed summary, comparison with another run."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from xray2ct.evaluation.protocols import format_score
from xray2ct.evaluation.real_xrays import columns_of, protocols_of
from xray2ct.evaluation.statistics import FEW
from xray2ct.files import InputError, atomic_path, read_json
from xray2ct.inference.consistency import CONSISTENT

GAINS = ("psnr_strict", "ssim_3d", "mae_hu", "body_mae_hu", "psnr_x2ct", "projection_relative")  # printed by default
REAL_GAINS = ("pa_ncc", "lateral_ncc", "lung_litres_absolute_error")  # likewise, for scouts and films


# ------------------------------------------------------------------------------------------------
# Another run


def read_rows(path, method: str, patients: list[str], xrays: str = "drr", otherwise: str | None = None) -> list[dict]:
    """Another run's rows of one method, in the order of ``patients``, from its ``per_patient.csv``.

    xrays: kind of X-rays whose scores are to be compared: a run on rendered ones has only some of them, and may have
    more patients than those with real ones. otherwise: the method to take from a file that lacks ``method``, which is
    noted. Columns that the file does not have are named in a note and left out; an empty cell is None.
    Raises :class:`InputError` naming the file when it is missing, of another kind, or lacks the method or a patient.
    """
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--compare {path}: cannot be read ({error}); expected a per_patient.csv") from None
    wanted = columns_of(xrays)
    columns = [column for column in wanted if rows and column in rows[0]]
    if not columns or not {"method", "id"} <= rows[0].keys():
        raise InputError(f"--compare {path}: not a per_patient.csv of evaluate.py --xrays {xrays} (method, id, scores)")
    there = dict.fromkeys(row["method"] for row in rows)
    if method not in there and otherwise in there:
        print(f"note: {path} has no method {method}; compared with {otherwise}")
        method = otherwise
    if method not in there:
        raise InputError(
            f"--compare {path}: has no method {method!r}, only {', '.join(there)} (choose by --compare-method)"
        )
    found = {row["id"]: row for row in rows if row["method"] == method}
    if xrays != "drr":  # not every patient has them
        found = {patient: row for patient, row in found.items() if patient in patients}
    if set(found) != set(patients):
        odd = sorted(set(found) ^ set(patients))
        raise InputError(f"--compare {path}: other patients than scored here ({', '.join(odd[:5])})")
    if len(columns) < len(wanted):
        missing = ", ".join(column for column in wanted if column not in columns)
        what = "of an earlier version" if xrays == "drr" else "of an earlier version or of other X-rays"
        print(f"note: {path} is {what}; not compared, since it does not have them: {missing}")
    return [{column: _cell(path, found[patient], column) for column in columns} for patient in patients]


def _cell(path, row: dict, column: str) -> float | None:
    """A score; None for an empty cell. A cell that a cut-off line lacks is an error."""
    text = row[column]
    if text == "":
        return None
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--compare {path}: {column} of {row['id']} is {text!r}, not a number")
    return value


def note_other_truth(path, summary: dict) -> None:
    """Print a note where the other run (``summary.json`` next to its CSV) was scored against other volumes."""
    other_summary = Path(path).with_name("summary.json")
    if not other_summary.exists():
        return
    other = read_json(other_summary)
    for key in ("volume_size", "hu_window", "geometry", "xrays"):
        if key in other and other[key] != summary[key]:
            print(f"note: {path} was scored with {key} {other[key]}, this with {summary[key]}: not the same task")


# ------------------------------------------------------------------------------------------------
# This run


def write_rows(path, rows: list[dict]) -> None:
    """Write rows as CSV, atomically; numbers with six significant digits."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def print_table(summary: dict, full: bool = False) -> None:
    """Mean +- sd per protocol and method, then the first method's paired gains with their intervals.

    full: every column, not only each protocol's main ones. n is given where some patients lack a score.
    """
    methods = summary["methods"]
    first = next(iter(methods))
    patients = max(statistics["n"] for statistics in methods[first].values())
    print(f"{'':36}" + "".join(f"{name:>18}" for name in methods))
    for name, protocol in protocols_of(summary.get("xrays", "drr"), methods[first]).items():
        for index, column in enumerate(protocol.columns if full else protocol.main):
            cells = "".join(_mean(column, s[column], patients).rjust(18) for s in methods.values())
            print(f"{name if index == 0 else '':15}{column:21}{cells}")
    for key, gains in summary.items():
        if key.startswith("minus_") and first in gains:
            print(f"{first} minus {key.removeprefix('minus_')} (paired, 95 % t interval):")
            for column in (*GAINS, *REAL_GAINS):
                if column in gains[first]:
                    print(f"  {column:20}{_gain(column, gains[first][column])}")
            if patients < FEW:
                print(f"  (below {FEW} patients an interval does not show a difference by itself)")
    reference = first.removesuffix(CONSISTENT)
    if f"minus_{reference}" in summary and "fine_power_db" in methods[reference]:
        print_sharpness(summary[f"minus_{reference}"], reference)


def _mean(column: str, statistics: dict, patients: int) -> str:
    spread = f" +- {format_score(column, statistics['sd'])}" if statistics["sd"] is not None else ""
    count = f" (n {statistics['n']})" if statistics["n"] != patients else ""
    return format_score(column, statistics["mean"]) + spread + count


def _gain(column: str, statistics: dict) -> str:
    mean, *interval = (
        format_score(column, value, signed=True) for value in (statistics["mean"], *(statistics["ci95"] or ()))
    )
    limits = f" ({' to '.join(interval)})" if interval else ""
    return f"{mean}{limits}, n = {statistics['n']}"


def print_sharpness(gains_of: dict[str, dict], reference: str) -> None:
    """What is gained in sharpness, and lost in PSNR, by other ways of one system than ``reference``, paired."""
    print(f"sharpness and its price, minus {reference} (paired, 95 % t interval):")
    for method, gains in gains_of.items():
        cells = [f"{column} {_gain(column, gains[column])}" for column in ("fine_power_db", "psnr_strict")]
        print(f"  {method:20}{'; '.join(cells)}")


def print_coverage(statistics: dict) -> None:
    """Share of the body's voxels whose error lies within 1 and 2 standard deviations, and calibrated ones."""
    print(f"coverage of {statistics['method']}, in the body:")
    for key, expected in statistics["expected"].items():
        print(f"  {key:20}{statistics[key]['mean']:.3f}; {expected:.3f} for a perfect model")
    if "calibrated_1sd" in statistics:
        factors = statistics["calibration"]
        texts = (f"times {factors['factor']:.3f}", "twice that", f"{factors['factor95']:.2f} times that")
        for key, text in zip(("calibrated_1sd", "calibrated_2sd", "calibrated_factor95"), texts):
            print(f"  {key:20}{statistics[key]['mean']:.3f}; the standard deviation {text}")
