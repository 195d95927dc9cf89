"""Findings of the data set check, and how they are reported."""

from __future__ import annotations

from dataclasses import asdict, dataclass

OK, FAILED, UNKNOWN = "ok", "failed", "cannot tell"
CHECKS = (
    "manifest",
    "split",
    "folders",
    "files",
    "checksums",
    "grid",
    "values",
    "head-feet",
    "front-back",
    "left-right",
    "PA X-ray",
    "lateral X-ray",
    "duplicates",
)
SIDES = ("head-feet", "front-back", "left-right")


@dataclass
class Finding:
    """One answer. patient: None for the data set as a whole; status: ``ok``, ``failed`` or ``cannot tell``."""

    patient: str | None
    check: str
    status: str
    message: str = ""


def one_per_problem(patient: str | None, check: str, problems: list[str]) -> list[Finding]:
    """A failed finding for each problem, or a single one that says all is well."""
    return [Finding(patient, check, FAILED, text) for text in problems] or [Finding(patient, check, OK)]


def summarise(findings: list[Finding]) -> dict[str, dict[str, int]]:
    """Per check the number of patients (or 1, for the data set) by their worst status."""
    worst: dict[tuple, str] = {}
    order = (OK, UNKNOWN, FAILED)
    for finding in findings:
        key = finding.check, finding.patient
        worst[key] = max(worst.get(key, OK), finding.status, key=order.index)
    table = {check: {OK: 0, FAILED: 0, UNKNOWN: 0} for check in CHECKS}
    for (check, _), status in worst.items():
        table[check][status] += 1
    return table


def print_report(findings: list[Finding]) -> None:
    """A line per patient and check that failed, then the counts."""
    failed = [finding for finding in findings if finding.status == FAILED]
    width = max([len(finding.patient or "") for finding in failed] + [len("(data set)")])
    for finding in failed:
        print(f"{finding.patient or '(data set)':<{width}}  {finding.check:<13}  {finding.message}")
    print(f"\n{'check':<13}  {OK:>5}  {FAILED:>6}  {UNKNOWN:>11}")
    for check, counts in summarise(findings).items():
        print(f"{check:<13}  {counts[OK]:>5}  {counts[FAILED]:>6}  {counts[UNKNOWN]:>11}")
    patients = {finding.patient for finding in findings if finding.patient is not None}
    bad = {finding.patient for finding in failed if finding.patient is not None}
    verdict = f"{len(bad)} of them with failures" if failed else "all is well"
    print(f"\n{len(patients)} patients: {verdict}")


def report_dict(findings: list[Finding]) -> dict:
    """The report as plain data: ``ok``, ``patients`` (number), ``summary`` per check, ``findings``."""
    return {
        "ok": not any(finding.status == FAILED for finding in findings),
        "patients": len({finding.patient for finding in findings} - {None}),
        "summary": summarise(findings),
        "findings": [asdict(finding) for finding in findings],
    }
