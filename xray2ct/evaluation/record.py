"""What every published figure carries: command, date, machine, commit, weights; the table of a JSON file of figures."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from xray2ct.evaluation.protocols import format_score
from xray2ct.files import atomic_path, write_json
from xray2ct.inference.predictor import Predictor
from xray2ct.training.provenance import describe_environment


def measured(module: str, argv: Sequence[str], predictor: Predictor | None = None) -> dict:
    """The command of ``python -m MODULE`` and :func:`circumstances`."""
    return {"command": shlex.join(["python", "-m", module, *argv]), **circumstances(predictor)}


def circumstances(predictor: Predictor | None = None) -> dict:
    """Date (UTC), machine, versions and commit of a measurement, and the weights it was made with.

    commit: None outside a checkout; ``dirty``: whether files differ from it.
    """
    facts = describe_environment()
    code, gpus = facts["code"], facts["gpus"]
    machine = ", ".join(dict.fromkeys(gpu["name"] for gpu in gpus)) or f"{facts['cpus']} cores of {facts['cpu']}"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine,
        "torch": facts["packages"]["torch"],
        **{key: code[key] for key in ("commit", "dirty", "source_hash")},
        "weights": [] if predictor is None else fingerprints(predictor),
    }


def fingerprints(predictor: Predictor) -> list[str]:
    """Of the weights of all its checkpoints, in their order."""
    found = (loaded.weights for loaded in predictor.checkpoints())
    return [text for one in found for text in (one.values() if isinstance(one, dict) else [one])]


def described(record: dict) -> str:
    """One line about a measurement, for the foot of its table."""
    commit = f"commit {record['commit'][:7]}" if record.get("commit") else "no commit recorded"
    if record.get("dirty"):
        commit += " with changes"
    weights = f", weights {'+'.join(record['weights'])}" if record.get("weights") else ""
    torch = f", torch {record['torch']}" if record.get("torch") else ""
    return f"`{record['command']}`; {record['date']}, {record['machine']}{torch}, {commit}{weights}"


def write_result(folder: str | os.PathLike, name: str, result: dict, text: str) -> None:
    """Write a result as ``NAME.json`` and its table as ``NAME.md`` into a folder, and print the table."""
    write_json(Path(folder) / f"{name}.json", result)
    with atomic_path(Path(folder) / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, end="")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def mean_sd(column: str, statistics: dict) -> str:
    """``24.89 +- 0.98``, with the digits of :func:`format_score`; "-" where no patient has the score."""
    if column == "seconds":
        return f"{statistics['mean']:.1f}"
    spread = f" +- {format_score(column, statistics['sd'])}" if statistics["sd"] is not None else ""
    return format_score(column, statistics["mean"]) + spread


def with_interval(column: str, statistics: dict) -> str:
    """``+0.12 (-0.03 to +0.27)``: a difference with its 95 % t interval."""
    mean, *limits = (
        format_score(column, value, signed=True) for value in (statistics["mean"], *(statistics["ci95"] or ()))
    )
    return f"{mean} ({' to '.join(limits)})" if limits else mean
