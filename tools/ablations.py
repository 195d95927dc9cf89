"""Compare named changes of a training ("levers") at equal budget on the validation patients.

    python -m tools.ablations --levers configs/levers.json --config configs/cpu.json --data data --output ablations \\
        --epochs 12 --seeds 0 1
    python -m tools.ablations --levers configs/levers.json --output ablations --report

The JSON file holds ``{name: [settings]}``, settings as ``--set`` takes them, or ``--init=WEIGHTS`` to begin from
trained ones; the first one is what the others are compared with. ``{output}`` and ``{seed}`` in them are this folder
and the run's seed: ``--init={output}/plain-seed{seed}/best_model.pt`` goes on from another lever's run. Each lever
trains as often as there are seeds, one after the other, with equal data, ``--epochs`` (equal steps) or ``--minutes``
(epochs that fit, timed by one epoch of each lever beforehand: for a machine of one's own). Each run's ``best_model.pt``
is then scored. The same command goes on where it was stopped: what is done is kept in ``OUTPUT/NAME-seedN.json``, from
which the table between the marks in ``--table`` is written. ``--report`` writes it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from dataset import PatientDataset
from xray2ct.command_line import Parser
from xray2ct.evaluation.record import circumstances, markdown_table
from xray2ct.files import PLAIN_NAME, InputError, atomic_path, check_writable, read_json, run_cli, write_json
from xray2ct.inference.consistency import STEPS, make_consistent
from xray2ct.inference.system import DirectSystem
from xray2ct.metrics import psnr, ssim_3d
from xray2ct.training.config import EnhancedConfig, load_config
from xray2ct.training.provenance import ROOT
from xray2ct.training.reporting import LOG

SCORES = ("psnr", "ssim_3d", "projection_error", "psnr_consistent")
BEGIN, END = "<!-- ablations: begin -->", "<!-- ablations: end -->"


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--levers", type=Path, required=True, help="JSON file: name -> list of settings")
    parser.add_argument("--data", type=Path, help="prepared data set")
    parser.add_argument("--config", default="configs/cpu.json", help="settings of all runs (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all runs")
    parser.add_argument("--output", type=Path, default=Path("ablations"), help="folder (default %(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=int, help="of each run")
    budget.add_argument("--minutes", type=float, help="of each run, without validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training.seed (default 0)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these levers alone")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "ablations.md", help="page with the marks")
    parser.add_argument("--report", action="store_true", help="write the table alone")
    args = parser.parse_args(argv)
    if not args.report:
        if args.data is None or not args.data.is_dir():
            raise InputError(f"--data {args.data}: no such data set; expected one of prepare_data.py")
        if args.epochs is None and args.minutes is None:
            raise InputError("expected --epochs or --minutes: how long each run takes")
        for name in ("epochs", "minutes"):
            if getattr(args, name) is not None and not getattr(args, name) > 0:
                raise InputError(f"--{name} is {getattr(args, name)}; expected more than 0")
    check_writable(args.table, "--table")
    return args


def read_levers(path: Path, only=None) -> dict[str, list[str]]:
    """Settings by name; :class:`InputError` naming the file and the entry that is none."""
    levers = read_json(path)
    if not isinstance(levers, dict) or not levers:
        raise InputError(f"{path}: expected an object of at least one lever, name -> list of settings")
    for name, settings in levers.items():
        if not PLAIN_NAME.fullmatch(name) or " " in name:
            raise InputError(f"{path}: {name!r} is no name for a folder; expected letters, digits, dots, _ and -")
        if not isinstance(settings, list) or not all(isinstance(s, str) and "=" in s for s in settings):
            raise InputError(f"{path}: {name} is {settings!r}; expected a list of settings such as model.passes=2")
        if options := [s for s in split_init(settings)[0] if s.startswith("-")]:
            raise InputError(f"{path}: {name} has {options[0]!r}; expected settings, or --init=WEIGHTS")
    if unknown := sorted({*(only or ())} - levers.keys()):
        raise InputError(f"--only {unknown[0]}: not in {path}; it has {', '.join(levers)}")
    return {name: settings for name, settings in levers.items() if only is None or name in only}


def split_init(entries: Iterable[str]) -> tuple[list[str], list[str]]:
    """A lever's settings, and its ``--init=`` options."""
    parts: tuple[list[str], list[str]] = [], []
    for text in entries:
        parts[text.startswith("--init=")].append(text)
    return parts


# ------------------------------------------------------------------------------------------------
# Runs


def training_command(args: argparse.Namespace, settings: Iterable[str], seed: int, epochs: int, output) -> list[str]:
    words = [sys.executable, str(ROOT / "train_enhanced_4gpu.py"), "--config", args.config, "--data", str(args.data)]
    settings, init = split_init(text.format(output=args.output, seed=seed) for text in settings)
    for text in (*args.set, *settings, f"training.seed={seed}", f"training.num_epochs={epochs}"):
        words += ["--set", text]
    return [*words, *init, "--output", str(output)]


def timed(words: list[str]) -> dict[str, float]:
    """Run a command; its wall-clock and CPU seconds. Raises :class:`InputError` when it fails."""
    before, started = os.times(), time.monotonic()
    status = subprocess.run(words, cwd=Path.cwd(), check=False).returncode
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    if status:
        raise InputError(f"{shlex.join(words)}: ended with status {status}; the same command goes on")
    return {"seconds": time.monotonic() - started, "cpu_seconds": cpu}


def epochs_that_fit(args: argparse.Namespace, settings: list[str], folder: Path) -> int:
    """How many epochs take ``--minutes``, by the pace of a run of one epoch."""
    timed(training_command(args, settings, args.seeds[0], 1, folder))
    events = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    pace = next(event["samples_per_second"] for event in reversed(events) if event["event"] == "epoch")
    data = load_config(EnhancedConfig, args.config, [*args.set, *split_init(settings)[0]]).data
    patients = len(PatientDataset(args.data, "train", 1, None, max_patients=data.max_patients))
    return max(1, int(60 * args.minutes * pace / (patients * data.repeats)))


def run_lever(args: argparse.Namespace, name: str, settings: list[str]) -> None:
    """Train and score a lever with every seed, without what is done already."""
    for seed in args.seeds:
        result, folder = args.output / f"{name}-seed{seed}.json", args.output / f"{name}-seed{seed}"
        wanted = {"lever": name, "settings": settings, "common": args.set, "config": args.config, "seed": seed}
        wanted |= {"epochs": args.epochs, "minutes": args.minutes}
        if result.exists():
            done = read_json(result)
            changed = [key for key in wanted if done.get(key) != wanted[key] and not (key == "epochs" and args.minutes)]
            if changed:
                key = changed[0]
                raise InputError(f"{result}: its {key} is {done.get(key)}, not {wanted[key]}; choose another --output")
            continue
        spent_file = folder / "spent.json"
        spent = read_json(spent_file) if spent_file.exists() else {"seconds": 0.0, "cpu_seconds": 0.0}
        epochs = args.epochs or spent.get("epochs") or epochs_that_fit(args, settings, args.output / f"{name}-pace")
        words = training_command(args, settings, seed, epochs, folder)
        print(f"{name}, seed {seed}: {epochs} epochs", flush=True)
        write_json(spent_file, {**spent, "epochs": epochs})
        times = {key: value + spent[key] for key, value in timed(words).items()}
        write_json(spent_file, {**times, "epochs": epochs})
        scores = score(folder / "best_model.pt", args.data)
        command = shlex.join(["python", Path(words[1]).name, *words[2:]])
        write_json(result, {**wanted, "epochs": epochs, **times, **scores, "command": command, **circumstances()})


def score(checkpoint: Path, root: Path) -> dict:
    """Means over the validation patients, and each one's row.

    psnr: dB, peak 1 of the HU window; ssim_3d; projection_error: norm of the difference of the volume's rendering and
    the X-rays, of the X-rays' norm, both views; psnr_consistent: with the X-rays enforced
    as by default.
    """
    system = DirectSystem(checkpoint, None, "cuda" if torch.cuda.is_available() else "cpu")
    data = PatientDataset(root, "val", system.volume_size[0], system.xray_size, seen=system.seen_channel)
    rows = []
    for index in range(len(data)):
        item = data[index]
        xrays = system.item_xrays(item)
        volume = system.predict(xrays).float().cpu()
        rendered = data.acquisition.render(volume, item["xrays"].shape[-2:])[0]
        error = (rendered - item["xrays"]).norm() / item["xrays"].norm()
        consistent, _ = make_consistent(system, volume, xrays, STEPS, measured=False)
        truth = item["ct_volume"][0]
        scores = psnr(volume[0, 0], truth), ssim_3d(volume[0, 0], truth), error.item(), psnr(consistent[0, 0], truth)
        rows.append({"id": item["id"], **dict(zip(SCORES, scores))})
    means = {name: float(np.mean([row[name] for row in rows])) for name in SCORES}
    return {**means, "best_epoch": system.checkpoint["epoch"], "patients": rows}


# ------------------------------------------------------------------------------------------------
# Table


def table(levers: dict[str, list[str]], results: list[dict]) -> str:
    """The comparison in Markdown: a line for each lever with results, means over its seeds."""
    head = ["lever", "settings", "runs", "PSNR, dB", "gain", "SSIM 3D", "projection error"]
    head += ["PSNR with the X-rays enforced", "gain", "epochs", "CPU minutes"]
    rows = []
    first = {r["seed"]: r for r in results if r["lever"] == next(iter(levers))}

    def gains(runs, score):
        values = [r[score] - first[r["seed"]][score] for r in runs if r["seed"] in first]
        return "-" if runs[0]["lever"] == next(iter(levers)) or not values else " / ".join(f"{v:+.2f}" for v in values)

    for name, settings in levers.items():
        runs = [r for r in results if r["lever"] == name]
        if not runs:
            continue
        mean = {key: float(np.mean([r[key] for r in runs])) for key in SCORES}
        epochs, minutes = (_each(runs, key) for key in ("epochs", "cpu_seconds"))
        cells = [
            name,
            " ".join(f"`{s}`" for s in settings) or "-",
            str(len(runs)),
            f"{mean['psnr']:.2f}",
            gains(runs, "psnr"),
        ]
        cells += [f"{mean['ssim_3d']:.3f}", f"{100 * mean['projection_error']:.1f} %"]
        cells += [f"{mean['psnr_consistent']:.2f}", gains(runs, "psnr_consistent"), epochs, minutes]
        rows.append(cells)
    shared = {shlex.join(["--config", r["config"], *(w for s in r["common"] for w in ("--set", s))]) for r in results}
    machines, dates = sorted({r["machine"] for r in results}), sorted({r["date"] for r in results})
    commits = sorted({(r["commit"] or "unknown")[:7] for r in results})
    where = f"{'; '.join(machines)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}"
    foot = f"All runs: {' or '.join(f'`{words}`' for words in sorted(shared))}; {where}."
    return f"{markdown_table(head, rows)}\n\n{foot}"


def _each(runs: list[dict], key: str) -> str:
    scale = 60.0 if key == "cpu_seconds" else 1.0
    return " / ".join(f"{run[key] / scale:.0f}" for run in runs)


def write_table(path: Path, text: str) -> None:
    """Put the table between the marks of a page; a page without them is refused, a new one is made."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"# Ablations\n\n{BEGIN}\n{END}\n"
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise InputError(f"{path}: expected the lines {BEGIN} and {END}, once each, for the table between them")
    before, rest = page.split(BEGIN)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def report(args: argparse.Namespace) -> None:
    levers = read_levers(args.levers)
    results = [read_json(path) for path in sorted(args.output.glob("*-seed*.json"))]
    results = [result for result in results if result["lever"] in levers]
    if not results:
        raise InputError(f"{args.output}: holds no results of {args.levers}; run without --report first")
    write_table(args.table, table(levers, results))
    print(f"Written: {args.table}, {len(results)} runs")


def main(argv=None) -> int:
    args = parse_args(argv)
    levers = read_levers(args.levers, args.only)
    if not args.report:
        for settings in levers.values():  # before the first run
            load_config(EnhancedConfig, args.config, [*args.set, *split_init(settings)[0]])
        for name, settings in levers.items():
            run_lever(args, name, settings)
    report(args)
    return 0


if __name__ == "__main__":
    run_cli(main)
