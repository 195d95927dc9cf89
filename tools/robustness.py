"""How much a trained system loses when X-rays are not taken as it expects: a table, and a picture of the worst case.

    python -m tools.robustness --weights chest64 --data data --output robustness
    python -m tools.robustness --base best_model.pt --data data --patients lidc_0001 lung1_003 --output robustness \\
        --only "view angle" "source distance"

Writes ``robustness.json``, ``robustness.md`` and ``worst.png``: X-rays and volumes of the largest loss. All X-rays are
rendered anew from the patients' volumes, also the unperturbed ones that every difference is paired with; scores are the
strict protocol's (docs/protocols.md).
"""

from __future__ import annotations

import argparse
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset import PatientDataset
from xray2ct.checkpoints import check_compatible
from xray2ct.command_line import Parser
from xray2ct.data.splits import SPLITS
from xray2ct.evaluation.perturbations import PERTURBATIONS, Exam, Shown
from xray2ct.evaluation.protocols import Case, strict
from xray2ct.evaluation.record import described, markdown_table, measured, with_interval, write_result
from xray2ct.evaluation.run import check_patients
from xray2ct.evaluation.statistics import paired_interval, summarise
from xray2ct.files import InputError, check_writable, run_cli
from xray2ct.geometry.lifting import averaged_to
from xray2ct.imaging.figures import save_panel
from xray2ct.inference.predictor import Predictor
from xray2ct.inference.system import DirectSystem
from xray2ct.inference.weights_arguments import add_weights_argument, choose_weights
from xray2ct.progress import progress_bar

COLUMNS = ("psnr_strict", "ssim_3d")
NOMINAL = "as trained"


@dataclass
class Worst:
    """The reconstruction with the largest loss of PSNR so far."""

    loss: float = 0.0
    name: str = ""
    patient: str = ""
    shown: Shown | None = None
    volume: torch.Tensor | None = None
    nominal: torch.Tensor | None = None  # the reconstruction from the same patient's X-rays as trained


def fine_data(root, predictor: Predictor, split: str, patients, cache_dir=None) -> PatientDataset:
    """The patients' volumes at the data set's resolution, but at most twice the system's.

    Raises :class:`InputError` for patients that are not in the split or that the system was trained on.
    """
    size = predictor.volume_size[0]
    data = PatientDataset(root, split, size, None, cache_dir=cache_dir)
    fine = 2 * size if data.cube_size % (2 * size) == 0 else data.cube_size
    data = PatientDataset(root, split, fine, None, cache_dir=cache_dir, with_mask=False)
    for loaded in predictor.checkpoints():
        check_compatible(loaded.path, loaded.header, **data.acquisition.to_dict())
    if patients:
        unknown = sorted(set(patients) - set(data.ids))
        if unknown:
            raise InputError(f"--patients {unknown[0]}: is not in the {split} split of {root}; expected ids of it")
        data.ids = [patient for patient in data.ids if patient in patients]
    for loaded in predictor.checkpoints():
        check_patients(data, loaded, split, allow_seen=False)
    return data


def score_shown(predictor: Predictor, exam: Exam, shown: Shown) -> tuple[torch.Tensor, dict[str, float]]:
    """The system's volume of what it is shown, and its strict scores against the truth."""
    xrays = torch.stack([shown.xrays, shown.seen], dim=2) if predictor.seen_channel else shown.xrays
    volume = predictor.predict(xrays[:, : predictor.num_views])[0, 0]
    truth = averaged_to(shown.truth, predictor.volume_size)[0, 0]
    scores = strict(Case(volume, truth, hu_window=exam.acquisition.hu_window))
    return volume, {column: float(scores[column] or 0.0) for column in COLUMNS}


def measure(predictor: Predictor, data: PatientDataset, chosen: list[str]) -> tuple[list[dict], Worst]:
    """Rows ``{"perturbation", "id", scores}``, the mean over a perturbation's variants, and the worst case."""
    rows, worst = [], Worst()
    bar = progress_bar(total=len(data) * (1 + len(chosen)), desc="Perturbing", unit="case")
    for index in range(len(data)):
        item = data[index]
        seed = zlib.crc32(item["id"].encode())
        exam = Exam(item["ct_volume"][None], data.acquisition, predictor.xray_size, seed)
        as_trained, nominal = score_shown(predictor, exam, exam.show(exam.nominal))
        rows.append({"perturbation": NOMINAL, "id": item["id"], **nominal})
        bar.update()
        for name in chosen:
            scores = []
            for variant in PERTURBATIONS[name].variants:
                shown = variant(exam)
                volume, score = score_shown(predictor, exam, shown)
                scores.append(score)
                loss = nominal["psnr_strict"] - score["psnr_strict"]
                if worst.shown is None or loss > worst.loss:
                    worst = Worst(loss, name, item["id"], shown, volume, as_trained)
            means = {column: sum(s[column] for s in scores) / len(scores) for column in COLUMNS}
            rows.append({"perturbation": name, "id": item["id"], **means})
            bar.update()
    bar.close()
    return rows, worst


def summary_of(rows: list[dict]) -> dict:
    """Statistics of the unperturbed scores, and of each perturbation's paired differences to them."""
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["perturbation"], []).append({k: v for k, v in row.items() if k != "perturbation"})
    nominal = by_name.pop(NOMINAL)
    differences = {
        name: {c: paired_interval([r[c] for r in group], [r[c] for r in nominal]) for c in COLUMNS}
        for name, group in by_name.items()
    }
    return {NOMINAL: summarise(nominal), "differences": differences}


def table(result: dict) -> str:
    """The result as Markdown: a table of differences with their 95 % t intervals, and where the figures come from."""
    nominal, patients = result["summary"][NOMINAL], result["patients"]
    head = [f"{len(patients)} patients", "PSNR strict, dB", "SSIM 3D"]
    first = [NOMINAL, f"{nominal['psnr_strict']['mean']:.2f}", f"{nominal['ssim_3d']['mean']:.3f}"]
    rows = [[name, *(with_interval(c, s[c]) for c in COLUMNS)] for name, s in result["summary"]["differences"].items()]
    worst = result["worst"]
    text = f"Worst case: {worst['perturbation']}, patient {worst['id']}, {-worst['loss_db']:+.2f} dB."
    return f"{markdown_table(head, [first, *rows])}\n\n{text}\n\n{described(result['measured'])}\n"


def draw_worst(path: Path, worst: Worst, predictor: Predictor) -> None:
    """The perturbed X-rays, and in rows the volume as trained, that from the perturbed X-rays, the truth, the error."""
    assert worst.shown is not None
    truth = averaged_to(worst.shown.truth, predictor.volume_size)[0, 0]
    volumes = {"as trained": worst.nominal, "perturbed": worst.volume}
    title = f"{worst.patient}, {worst.name}: {-worst.loss:+.2f} dB"
    save_panel(path, worst.shown.xrays[0], volumes, truth, predictor.hu_window, title)


def choose(only: list[str] | None, predictor: Predictor) -> list[str]:
    """The perturbations whose name holds one of the texts, and that the system's geometry allows."""
    names = [name for name, one in PERTURBATIONS.items() if one.possible(predictor.geometry)]
    for text in only or []:
        if not any(text in name for name in names):
            raise InputError(f"--only {text!r}: is in no perturbation's name; expected part of: {'; '.join(names)}")
    return [name for name in names if not only or any(text in name for text in only)]


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--base", help="stage-1 checkpoint")
    parser.add_argument("--refinement", help="stage-2 checkpoint")
    add_weights_argument(parser)
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument("--split", default="test", choices=(*SPLITS, "all"), help="patients to score")
    parser.add_argument("--patients", nargs="+", metavar="ID", help="of the split (default: all)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="perturbations whose name holds one of these")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default auto)")
    precisions = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--precision", default="float32", choices=precisions, help="of the networks")
    parser.add_argument("--cache-dir", help="default: DATA/.cache")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    check_writable(args.output / "robustness.json", "--output")
    choose_weights(args)
    predictor = DirectSystem(args.base, args.refinement, args.device, args.precision)
    chosen = choose(args.only, predictor)
    data = fine_data(args.data, predictor, args.split, args.patients, args.cache_dir)
    rows, worst = measure(predictor, data, chosen)
    result = {
        "measured": measured("tools.robustness", sys.argv[1:] if argv is None else argv, predictor),
        "split": args.split,
        "split_hash": data.split_hash,
        "patients": data.ids,
        "summary": summary_of(rows),
        "rows": rows,
        "worst": {"perturbation": worst.name, "id": worst.patient, "loss_db": worst.loss},
    }
    draw_worst(args.output / "worst.png", worst, predictor)
    write_result(args.output, "robustness", result, table(result))
    return 0


if __name__ == "__main__":
    run_cli(main)
