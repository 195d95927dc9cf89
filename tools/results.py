"""Evaluate a list of systems on one data set and write the tables of docs/results.md and README from what was measured.

    python -m tools.results --data data                  # every system with a checkpoint in results/systems.json
    python -m tools.results --data data --only stage1    # some of them
    python -m tools.results                              # only write the tables anew
    python -m tools.results --check                      # do text and JSON agree; what is older than code or weights

``results/systems.json`` holds ``systems``, a list of ``{"name", "folder", "base" | "cascade", "refinement", "samples",
"consistency", "split"}`` (a system without checkpoint is kept as it was measured), and ``tables``, what each marked
part shows: ``<!-- table NAME -->`` to ``<!-- end of table -->`` in the Markdown, of docs/results.md or of the table's
``page``. The text around them stays as it is. Tables of the kinds robustness, learning curve,
film benchmark and fine detail come from a ``file``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hybrid_vit_cascade.system import load_cascade_system
from tools import film_benchmark, fine_detail, learning_curve, robustness
from xray2ct.checkpoints import load_checkpoint, weights_fingerprint
from xray2ct.command_line import Parser
from xray2ct.evaluation.record import described, fingerprints, markdown_table, mean_sd, measured, with_interval
from xray2ct.evaluation.run import evaluate
from xray2ct.files import InputError, atomic_path, counted, read_json, run_cli, shown, write_json
from xray2ct.inference.predictor import Predictor
from xray2ct.inference.system import DirectSystem
from xray2ct.training.provenance import ROOT
from xray2ct.weights import find

SYSTEMS, TEXT = Path("results/systems.json"), Path("docs/results.md")
RECORD = "measured.json"  # beside summary.json: command, date, machine, commit, weights
PART = re.compile(r"<!-- table ([\w-]+) -->\n(.*?)<!-- end of table -->", re.DOTALL)
# What a score depends on: a commit that touches one of these makes a figure older than the code.
CODE = ("dataset.py", "losses.py", "model_enhanced.py", "hybrid_vit_cascade", "xray2ct/data", "xray2ct/evaluation")
CODE += ("xray2ct/geometry", "xray2ct/imaging", "xray2ct/inference", "xray2ct/metrics.py", "xray2ct/models")
SYSTEM_KEYS = {"name", "folder", "base", "refinement", "cascade", "samples", "split", "precision", "consistency"}
ROW_KEYS = {"label", "system", "method", "minus"}


def read_systems(path: Path) -> dict:
    """``{"systems": [...], "tables": {...}}``; :class:`InputError` names file and key of what is wrong."""
    found = read_json(path)
    if not isinstance(found, dict) or set(found) != {"systems", "tables"}:
        raise InputError(f"{path}: expected an object with the keys systems and tables")
    names = [system.get("name") for system in found["systems"]]
    for system in found["systems"]:
        name, unknown = shown(system.get("name")), sorted(set(system) - SYSTEM_KEYS)
        if unknown or names.count(system.get("name")) != 1 or "folder" not in system:
            odd = f"unknown key {unknown[0]}" if unknown else "a name of its own and a folder expected"
            raise InputError(f"{path}: system {name}: {odd}; keys are {', '.join(sorted(SYSTEM_KEYS))}")
    for title, table in found["tables"].items():
        for row in table.get("rows", []):
            if set(row) - ROW_KEYS or row.get("system") not in names:
                raise InputError(
                    f"{path}: table {title}: row {shown(row.get('label'))} has an unknown key or system; expected"
                    f" {', '.join(sorted(ROW_KEYS))}, and a system of {', '.join(map(str, names))}"
                )
    return found


# ------------------------------------------------------------------------------------------------
# Measure


def load_system(system: dict, device: str) -> Predictor:
    precision = system.get("precision", "float32")
    if "cascade" in system:
        return load_cascade_system(system["cascade"], system.get("samples"), device=device, precision=precision)
    return DirectSystem(system["base"], system.get("refinement"), device, precision)


def measure(system: dict, args: argparse.Namespace, circumstances: dict) -> None:
    """Evaluate one system into its folder, and write where the figures come from beside them.

    circumstances: of :func:`measured`, from before the first system's files changed the working tree.
    """
    predictor, folder = load_system(system, args.device), Path(system["folder"])
    record = {**circumstances, "weights": fingerprints(predictor)}
    options = {"pictures": 2, "cache_dir": args.cache_dir, "consistency": system.get("consistency", "off")}
    evaluate(predictor, args.data, folder, system.get("split", "test"), **options)
    write_json(folder / RECORD, record)


# ------------------------------------------------------------------------------------------------
# Tables


def scores_table(table: dict, folders: dict[str, Path]) -> str:
    """Rows of systems' methods, columns of scores: mean +- sd; with ``minus`` paired differences and intervals."""
    columns: dict[str, str] = table["columns"]  # name of a score: how it is called
    rows = []
    for row in table["rows"]:
        summary = read_json(folders[row["system"]] / "summary.json")
        try:
            if "minus" in row:
                statistics, cell = summary[f"minus_{row['minus']}"][row["method"]], with_interval
            else:
                statistics, cell = summary["methods"][row["method"]], mean_sd
            rows.append([row["label"], *(cell(c, statistics[c]) if c in statistics else "-" for c in columns)])
        except KeyError as error:
            raise InputError(
                f"{folders[row['system']] / 'summary.json'}: has no {error} for {row['label']!r}"
            ) from None
    head = [f"{table['title']}, n = {_patients(table, folders)}", *columns.values()]
    lines = dict.fromkeys(f"- {name}: {_source(folders[name])}" for name in (row["system"] for row in table["rows"]))
    return markdown_table(head, rows) + "\n\n" + "\n".join(lines)


def _patients(table: dict, folders: dict[str, Path]) -> str:
    counts = {len(read_json(folders[row["system"]] / "summary.json")["patients"]) for row in table["rows"]}
    return " or ".join(map(str, sorted(counts)))


def _source(folder: Path) -> str:
    record = folder / RECORD
    return described(read_json(record)) if record.exists() else "no record of command and machine"


def summary_table(table: dict, folders: dict[str, Path]) -> str:
    """A short table: as :func:`scores_table`, with the number of patients and the date instead of the sources."""
    columns, rows = table["columns"], []
    for row in table["rows"]:
        summary, record = (read_json(folders[row["system"]] / name) for name in ("summary.json", RECORD))
        statistics = summary["methods"].get(row["method"])
        if statistics is None:
            raise InputError(
                f"{folders[row['system']] / 'summary.json'}: has no {row['method']!r} for {row['label']!r}"
            )
        cells = [mean_sd(column, statistics[column]) for column in columns]
        rows.append([row["label"], *cells, str(len(summary["patients"])), record["date"]])
    return markdown_table([table["title"], *columns.values(), "patients", "date"], rows)


def coverage_table(table: dict, folders: dict[str, Path]) -> str:
    """Share of the body's voxels within 1 and 2 standard deviations, of the systems that have them."""
    rows = []
    for row in table["rows"]:
        found = read_json(folders[row["system"]] / "summary.json")["coverage"]
        cells = [f"{found[key]['mean']:.3f} ({found['expected'][key]:.3f})" for key in sorted(found["expected"])]
        rows.append([row["label"], *cells])
    return markdown_table([table["title"], "within 1 sd (perfect)", "within 2 sd (perfect)"], rows)


def _from_file(render: Callable[[dict], str]) -> Callable[[dict, dict[str, Path]], str]:
    return lambda table, folders: render(read_json(table["file"])).strip()


KINDS: dict[str, Callable[[dict, dict[str, Path]], str]] = {
    "scores": scores_table,
    "summary": summary_table,
    "coverage": coverage_table,
    "robustness": _from_file(robustness.table),
    "learning curve": _from_file(learning_curve.table),
    "film benchmark": _from_file(film_benchmark.markdown),
    "fine detail": _from_file(fine_detail.table),
}


def tables_by_page(tables: dict, text: Path) -> dict[Path, dict]:
    """The tables of each page: those without ``page``, a path like the others, belong to ``text``."""
    found: dict[Path, dict] = {text: {}}
    for name, table in tables.items():
        found.setdefault(Path(table.get("page", text)), {})[name] = table
    return found


def check_parts(text: str, tables: dict, origin: Path) -> None:
    """Raise :class:`InputError` for a marked part or a table without partner, and for a table of no known kind."""
    parts = [match[1] for match in PART.finditer(text)]
    odd = sorted(set(tables) ^ set(parts)) or sorted({name for name in parts if parts.count(name) > 1})
    if odd:
        raise InputError(f"{origin}: table {odd[0]} is to be in the text and in the list of tables, once in each")
    for name, table in tables.items():
        if table.get("kind") not in KINDS:
            raise InputError(f"table {name}: kind is {shown(table.get('kind'))}; expected {', '.join(KINDS)}")


def rendered(text: str, systems: dict, tables: dict, origin: Path) -> str:
    """``text``, which was read from ``origin``, with every marked part written anew from its ``tables``."""
    folders = {system["name"]: Path(system["folder"]) for system in systems["systems"]}
    check_parts(text, tables, origin)

    def part(match: re.Match) -> str:
        table = tables[match[1]]
        return f"<!-- table {match[1]} -->\n{KINDS[table['kind']](table, folders)}\n<!-- end of table -->"

    return PART.sub(part, text)


# ------------------------------------------------------------------------------------------------
# Check


def ages(systems: dict) -> list[str]:
    """Which entries are older than the code or the weights that they describe, one sentence each."""
    measurements = []  # what it is called, its record, and the checkpoints that it names
    for system in systems["systems"]:
        path = Path(system["folder"]) / RECORD
        measurements.append((system["name"], read_json(path) if path.exists() else {}, system))
    for name, table in systems["tables"].items():
        if "file" in table:
            measurements += [(f"table {name}", record, table) for record in _records(read_json(table["file"]))]
    found = []
    for name, record, checkpoints in measurements:
        found += [f"{name}: {text}" for text in (*_older(record), *_other_weights(checkpoints, record))]
    return found


def _records(result: dict) -> list[dict]:
    """The records in a file of figures: one, or one for each run or network."""
    if "measured" in result:
        return [result["measured"]]
    return [one["measured"] for one in result.get("runs") or result["networks"]]


def _older(record: dict) -> list[str]:
    """Why a measurement is older than the code, if it is."""
    commit = record.get("commit")
    if commit is None:
        return [f"no commit recorded ({record.get('date', 'no date')}), so older than the code"]
    newer = newer_commits(commit)
    if newer is None:
        return [f"measured at commit {commit[:7]}, which is not in this checkout"]
    if newer or record.get("dirty"):
        changes = f"the code has changed in {newer} commits since" if newer else "with changes not committed"
        return [f"measured at commit {commit[:7]}; {changes}"]
    return []


def newer_commits(commit: str) -> int | None:
    """How many commits after ``commit`` touch :data:`CODE`; None where git does not know it."""
    words = ["git", "-C", str(ROOT), "rev-list", "--count", f"{commit}..HEAD", "--", *CODE]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return int(done.stdout)


def _other_weights(system: dict, record: dict) -> list[str]:
    """Checkpoints on this machine whose weights are not those that were measured."""
    known, keys = record.get("weights", []), {"base": "model_state_dict", "refinement": "refinement_state_dict"}
    odd = []
    for option, key in keys.items():
        if known and system.get(option) and (path := find(system[option])).is_file():
            fingerprint = weights_fingerprint(load_checkpoint(path)[key])
            if fingerprint not in known:
                odd.append(f"{system[option]} holds other weights ({fingerprint}) than were measured ({known[0]})")
    return odd


def check(systems: dict, text_path: Path) -> int:
    """Print what does not hold; 1 when a page is not what the JSON says, 0 otherwise, also for old entries."""
    for age in ages(systems):
        print(f"old: {age}")
    status = 0
    for page, tables in tables_by_page(systems["tables"], text_path).items():
        text = page.read_text(encoding="utf-8")
        if rendered(text, systems, tables, page) != text:
            print(f"{page}: a table is not what its JSON says; run: python -m tools.results")
            status = 1
        else:
            print(f"{page}: {counted(len(tables), 'table')} as the JSON says")
    return status


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", help="data set to evaluate on; without it only the tables are written")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="systems to evaluate (default: all with a checkpoint)"
    )
    parser.add_argument("--systems", type=Path, default=SYSTEMS, help="default %(default)s")
    parser.add_argument("--text", type=Path, default=TEXT, help="page of tables without page (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 where text and JSON differ")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    systems = read_systems(args.systems)
    if args.check:
        return check(systems, args.text)
    able = [system for system in systems["systems"] if system.keys() & {"base", "cascade"}]
    names = [system["name"] for system in able]
    for name in args.only or []:
        if name not in names:
            raise InputError(f"--only {name}: no system of that name with a checkpoint in {args.systems}; {names}")
    pages = tables_by_page(systems["tables"], args.text)
    for page, tables in pages.items():
        check_parts(page.read_text(encoding="utf-8"), tables, page)
    circumstances = measured("tools.results", sys.argv[1:] if argv is None else argv)
    for system in able if args.data else []:
        if not args.only or system["name"] in args.only:
            measure(system, args, circumstances)
    for page, tables in pages.items():
        text = rendered(page.read_text(encoding="utf-8"), systems, tables, page)
        with atomic_path(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"{page}: {counted(len(tables), 'table')} written")
    return 0


if __name__ == "__main__":
    run_cli(main)
