"""Draw loss and PSNR of one or more training runs, from their ``log.jsonl``, into one PNG.

python -m tools.plot_run checkpoints_enhanced
python -m tools.plot_run hybrid_vit_cascade/checkpoints/quick_2stage      # every stage that has begun
python -m tools.plot_run run_a run_b/log.jsonl --output curves.png
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from xray2ct.command_line import Parser
from xray2ct.files import InputError, atomic_path, check_writable, counted, is_plain_name, read_json, run_cli

LOG = "log.jsonl"


@dataclass
class Run:
    """One run's curves by epoch: mean training loss, validation loss and PSNR in dB."""

    name: str
    loss: dict[int, float] = field(default_factory=dict)
    validation_loss: dict[int, float] = field(default_factory=dict)
    psnr: dict[int, float] = field(default_factory=dict)


def read_log(path: Path) -> list[dict]:
    """The events of a ``log.jsonl``; a last line cut short by a crash is left out.

    Raises :class:`InputError` naming file and line when the file is missing or another line is not an event.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected the {LOG} of a training run") from None
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number} is not valid JSON ({error})") from None
        if not isinstance(event, dict) or "event" not in event:
            raise InputError(f"{path}: line {number} has no 'event'; expected the {LOG} of a training run")
        events.append(event)
    return events


def read_runs(path: str | Path) -> list[Run]:
    """The run of a folder or ``log.jsonl``, or the stages of a cascade's checkpoint folder that have begun.

    Raises :class:`InputError` as :func:`read_run`, and for a cascade whose training has not begun.
    """
    path = Path(path)
    config = path / "config.json"
    settings = read_json(config) if config.is_file() and not (path / LOG).exists() else None
    stages = settings.get("stages") if isinstance(settings, dict) else None
    if not isinstance(stages, list):
        return [read_run(path)]
    names = [stage["name"] for stage in stages if isinstance(stage, dict) and is_plain_name(stage.get("name"))]
    runs = [read_run(path / name, f"{path.resolve().name}/{name}") for name in names if (path / name / LOG).exists()]
    if not runs:
        raise InputError(f"{path}: none of its stages ({', '.join(names)}) has a {LOG} yet; nothing to draw")
    return runs


def read_run(path: str | Path, name: str | None = None) -> Run:
    """The curves of a run, given by its folder or its ``log.jsonl``; name: for the legend (default: the folder's).

    An epoch that a resumed run repeated counts once, as of its last time. Raises :class:`InputError` as
    :func:`read_log`, and when no epoch was finished.
    """
    path = Path(path)
    log = path / LOG if path.is_dir() else path
    run = Run(name or log.resolve().parent.name)
    for event in read_log(log):
        epoch = event.get("epoch")
        if event["event"] == "epoch" and "loss" in event:
            run.loss[epoch] = event["loss"]
        elif event["event"] == "validation":
            for key, curve in (("loss", run.validation_loss), ("psnr", run.psnr)):
                if event.get(key) is not None:
                    curve[epoch] = event[key]
    if not run.loss and not run.psnr:
        raise InputError(f"{log}: holds no finished epoch and no validation; nothing to draw")
    return run


def legend_names(runs: list[Run]) -> list[str]:
    """The runs' names, numbered where two are the same."""
    names = [run.name for run in runs]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def draw(runs: list[Run]):
    """A matplotlib figure: loss (training solid, validation dashed) and validation PSNR, the best marked, by epoch."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing curves needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, psnrs = figure.subplots(1, 2)
    for name, run, index in zip(legend_names(runs), runs, range(len(runs))):
        colour = f"C{index % 10}"
        losses.plot(*_curve(run.loss), color=colour, label=name)
        losses.plot(*_curve(run.validation_loss), color=colour, linestyle="--")
        if not run.psnr:
            continue
        best = max(run.psnr, key=run.psnr.__getitem__)
        # The value in the legend: beside the dots of runs that end alike, numbers would lie upon each other.
        psnrs.plot(*_curve(run.psnr), color=colour, label=f"{name}: {run.psnr[best]:.2f} dB")
        psnrs.plot(best, run.psnr[best], "o", color=colour)
    losses.set(title="loss (solid: training, dashed: validation)", xlabel="epoch")
    psnrs.set(title="validation PSNR, dB (dot: best)", xlabel="epoch")
    if all(value > 0 for run in runs for curve in (run.loss, run.validation_loss) for value in curve.values()):
        losses.set_yscale("log")
    psnrs.margins(y=0.12)
    for axes in (losses, psnrs):
        axes.grid(alpha=0.3, which="both")
    for axes in (losses, psnrs):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small", framealpha=0.8)  # in the emptiest corner
    return figure


def _curve(values: dict[int, float]) -> tuple[list[int], list[float]]:
    epochs = sorted(values)
    return epochs, [values[epoch] for epoch in epochs]


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"a run's folder, its {LOG}, or a cascade's folder")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="picture to write")
    args = parser.parse_args(argv)
    if args.output.suffix.lower() != ".png":
        raise InputError(f"--output {args.output}: expected a name ending in .png")
    check_writable(args.output, "--output")
    runs = [run for path in args.runs for run in read_runs(path)]
    figure = draw(runs)
    with atomic_path(args.output) as temporary:
        figure.savefig(temporary, dpi=130)
    for name, run in zip(legend_names(runs), runs):
        best = max(run.psnr.items(), key=lambda item: item[1], default=None)
        result = f"best PSNR {best[1]:.2f} dB at epoch {best[0]}" if best else "no validation yet"
        print(f"{name}: {counted(len(run.loss), 'epoch')}, {result}")
    print(f"drawn in {args.output}")
    return 0


if __name__ == "__main__":
    run_cli(main)
