"""Benchmark of films: simulated films of the test patients through the real reader and any stage-1 networks.

    python -m tools.film_benchmark --data data/prepared --checkpoint runs/film/best_model.pt
    python -m tools.film_benchmark --data data/prepared --output films \\
        --checkpoint runs/plain/best_model.pt --normalization percentile \\
        --checkpoint runs/film/best_model.pt --normalization auto

For each test patient and each thing that happens to films (tools/film_cases.py): PSNR in dB (peak = width of the HU
window) of the volume, and of the volume moved by whole voxels to where it fits best, because a film does not tell where
the patient stood. "clean" is the data set's own pair; all other pictures, and the volumes they are compared with, are
without couch. Films that the reader refuses are counted. Writes ``film_benchmark.json`` and ``film_benchmark.md``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset import PatientDataset
from tools.film_cases import CASES, VIEWS, Rendering, make_case
from tools.model_card import film_table
from xray2ct.checkpoints import check_compatible
from xray2ct.command_line import Parser
from xray2ct.conventions import MANIFEST
from xray2ct.data.film_chain import FilmChain, FilmConfig
from xray2ct.evaluation.record import described, measured, write_result
from xray2ct.files import InputError, atomic_path, check_writable, run_cli
from xray2ct.geometry.lifting import averaged_to
from xray2ct.imaging.read_films import FilmWarning
from xray2ct.imaging.read_xray import write_png16
from xray2ct.imaging.stored_xray import Exposure
from xray2ct.inference.reconstruction import Pipeline
from xray2ct.inference.system import DirectSystem
from xray2ct.metrics import psnr
from xray2ct.progress import progress_bar
from xray2ct.weights import find

REACH = 8  # voxels per axis that a volume may be moved to fit
CLEAN = "clean"
OWN = (CLEAN, "no couch")  # cases that are no films


@dataclass
class Network:
    """A checkpoint and how it is given films."""

    name: str
    path: str
    normalization: str
    pipeline: Pipeline
    checkpoint: dict


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="prepared data set; its test patients are read")
    parser.add_argument(
        "--checkpoint", action="append", required=True, help="stage 1, path or name of weights; repeat to compare"
    )
    parser.add_argument(
        "--normalization",
        action="append",
        help="how each checkpoint's films are read: one for all, or one each (default auto)",
    )
    parser.add_argument("--output", type=Path, default=Path("film_benchmark"), help="folder (default %(default)s)")
    parser.add_argument(
        "--spacing",
        choices=("unknown", "known"),
        default="unknown",
        help="known: the reader is told the films' pixel spacing, as by a DICOM header (default %(default)s)",
    )
    parser.add_argument("--films", type=Path, help="keep the pictures in this folder")
    parser.add_argument("--split", default="test", choices=("val", "test"), help="patients (default %(default)s)")
    parser.add_argument("--case", action="append", choices=(CLEAN, *CASES), help="only this one; repeat for several")
    parser.add_argument("--max-patients", type=int, help="the first so many")
    parser.add_argument("--seed", type=int, default=0, help="of the films (default %(default)s)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------
# Networks and patients


def load_networks(checkpoints: list[str], normalizations: list[str] | None) -> list[Network]:
    """The networks of a command line; names are unique: that of the weights or the file's folder, how it reads."""
    given = normalizations or ["auto"]
    given = given * len(checkpoints) if len(given) == 1 else given
    if len(given) != len(checkpoints):
        raise InputError(f"--normalization is given {len(given)} times; expected once, or once per --checkpoint")
    networks: list[Network] = []
    for checkpoint, normalization in zip(checkpoints, given):
        path = str(find(checkpoint))
        label = checkpoint if path != checkpoint else f"{Path(path).resolve().parent.name}/{Path(path).stem}"
        name = f"{label}, {normalization}"
        if name in {network.name for network in networks}:
            raise InputError(f"--checkpoint {path}: given twice with the same normalization")
        system = DirectSystem(path)
        networks.append(Network(name, path, normalization, Pipeline(system, "off"), system.checkpoint))
    return networks


def check_networks(networks: list[Network], data: PatientDataset) -> None:
    """Raise :class:`InputError` where a network is of other X-rays, or has been trained on a patient that is scored."""
    for network in networks:
        check_compatible(network.path, network.checkpoint, **data.acquisition.to_dict())
        seen = sorted(set(data.ids) & set(network.checkpoint.get("train_patients", [])))
        if seen:
            raise InputError(f"{network.path}: was trained on {', '.join(seen[:5])}, which it would be scored on")


def render(data: PatientDataset, index: int) -> tuple[Rendering, torch.Tensor]:
    """The benchmark's rendering of a patient without couch, and that volume ``(1, 1, N, N, N)`` in [0, 1]."""
    item = data[index]
    volume = torch.where(item["body"] > 0, item["ct_volume"], 0.0)[None]
    chain = FilmChain(FilmConfig(), data.acquisition)
    size = 2 * volume.shape[-1]  # finer rays than that add nothing
    xrays = data.acquisition.render(volume, (size, size))[0].double().numpy() * data.acquisition.xray_scale
    pixel_mm = chain.field_mm / size
    rows = [(float(end) / pixel_mm + size / 2) for end in chain.scanned(volume)]
    first, end = max(0, math.ceil(rows[0])), min(size, math.floor(rows[1]))
    return Rendering(xrays, pixel_mm, (first, end)), volume


# ------------------------------------------------------------------------------------------------
# Scores


def best_psnr(prediction: torch.Tensor, target: torch.Tensor, reach: int = REACH) -> float:
    """PSNR in dB of ``(D, H, W)`` volumes in [0, 1], moved by at most ``reach`` voxels per axis to where they fit best.

    Beyond the cube both are 0 (air); squared errors out there count, over the number of voxels of the cube.
    """
    size = [n + 2 * reach for n in target.shape]
    spectra = [torch.fft.rfftn(volume.double(), s=size) for volume in (prediction, target)]
    products = torch.fft.irfftn(spectra[0].conj() * spectra[1], s=size)
    near = torch.arange(-reach, reach + 1)
    products = products[near][:, near][:, :, near]
    energy = prediction.double().square().sum() + target.double().square().sum()
    error = (energy - 2 * products.max()).item() / target.numel()
    return min(100.0, -10 * math.log10(max(error, 1e-10)))


def score(network: Network, paths: list[Path], target: torch.Tensor, exposure: Exposure | None) -> dict:
    """A row of the result: scores of one pair of files, or why the reader refused it.

    exposure: what the reader is told of the pixel spacing.
    target: ``(1, 1, N, N, N)`` in [0, 1], at least as fine as the network's volumes.
    """
    pipeline = network.pipeline
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FilmWarning)  # they are among the notes
            xrays = pipeline.read(*map(str, paths), normalization=network.normalization, exposure=exposure)
    except InputError as error:
        return {"refused": str(error)}
    prediction = pipeline.predict(xrays)
    truth = averaged_to(target, prediction.shape)[0, 0]
    return {
        "psnr": psnr(prediction, truth),
        "psnr_moved": best_psnr(prediction, truth),
        "notes": [note.replace(str(paths[0].parent), "") for note in pipeline.notes],
    }


def own_files(data: PatientDataset, index: int) -> list[Path]:
    """The data set's own X-rays of a patient; :class:`InputError` where one is missing."""
    paths = [path for path in data.xray_files(index) if path is not None]
    if len(paths) < len(VIEWS):
        raise InputError(f"{data.root}: {data.ids[index]} has no X-ray file of each view; expected them for {CLEAN!r}")
    return paths


def pictures(name: str, rendering: Rendering, patient: str, folder: Path, seed: int) -> list[Path]:
    """Write the pictures of a case as PNG; returns PA, lateral."""
    paths = []
    for view, picture in zip(VIEWS, make_case(name, rendering, patient, seed)):
        stem = f"{patient}_{name.replace(' ', '_')}_{view}"
        if picture.dtype.kind == "f":
            paths.append(folder / f"{stem}_drr.png")  # the name of what this project rendered
            write_png16(paths[-1], picture)
            continue
        paths.append(folder / f"{stem}.png")
        with atomic_path(paths[-1]) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")
    return paths


def run(args: argparse.Namespace, networks: list[Network], folder: Path) -> list[dict]:
    """All rows: ``{"case", "patient", "network", "psnr", "psnr_moved", "notes"}``, or ``"refused"`` for the scores."""
    data = PatientDataset(args.data, args.split, _cube_size(args.data), None, max_patients=args.max_patients, body=True)
    if not data.has_manifest:
        raise InputError(f"{args.data}: has no {MANIFEST}; expected a data set of prepare_data.py")
    check_networks(networks, data)
    rows = []
    for index, patient in enumerate(progress_bar(data.ids, desc="Patients", unit="patients", leave=False)):
        rendering, volume = render(data, index)
        for name in args.case or (CLEAN, *CASES):
            if name == CLEAN:
                paths, target = own_files(data, index), data[index]["ct_volume"][None]
            else:
                paths, target = pictures(name, rendering, patient, folder, args.seed), volume
            for network in networks:
                row = {"case": name, "patient": patient, "network": network.name}
                told = Exposure(rendering.pixel_mm, spacing_at_patient=True)
                exposure = told if args.spacing == "known" and name not in OWN else None
                rows.append({**row, **score(network, paths, target, exposure)})
    return rows


def _cube_size(root: Path) -> int:
    return PatientDataset(root, "all", 1, None).cube_size


# ------------------------------------------------------------------------------------------------
# Table


def mean(values) -> float | None:
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def table(rows: list[dict], networks: list[Network]) -> list[dict]:
    """One entry per case: for each network the means over the patients, and how many films were refused."""
    entries = []
    for case in dict.fromkeys(row["case"] for row in rows):
        entry: dict = {"case": case}
        for network in networks:
            own = [row for row in rows if row["case"] == case and row["network"] == network.name]
            entry[network.name] = {
                "psnr": mean(row.get("psnr") for row in own),
                "psnr_moved": mean(row.get("psnr_moved") for row in own),
                "refused": sum("refused" in row for row in own),
                "patients": len(own),
            }
        entries.append(entry)
    return entries


def markdown(result: dict) -> str:
    """The table of ``film_benchmark.json``: PSNR, in brackets moved to fit, and films refused; where it comes from."""
    names = [network["name"] for network in result["networks"]]
    patients = len({row["patient"] for row in result["rows"]})
    head = f"film, {patients} {result['split']} patients, pixel spacing {result['spacing']}: PSNR, dB (moved to fit)"
    sources = dict.fromkeys(described(network["measured"]) for network in result["networks"])
    cases = {entry["case"]: entry for entry in result["table"]}
    return film_table(head, names, cases) + "\n\n" + "".join(f"- {source}\n" for source in sources)


def main(argv=None) -> int:
    args = parse_args(argv)
    check_writable(args.output / "film_benchmark.json")
    networks = load_networks(args.checkpoint, args.normalization)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.films or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = run(args, networks, folder)
    entries = table(rows, networks)
    settings = {"data": str(args.data), "split": args.split, "seed": args.seed, "spacing": args.spacing}
    argv = sys.argv[1:] if argv is None else argv
    entered = [
        {
            "name": network.name,
            "checkpoint": Path(network.path).name,
            "normalization": network.normalization,
            "measured": measured("tools.film_benchmark", argv, network.pipeline.system),
        }
        for network in networks
    ]
    result = {**settings, "networks": entered, "table": entries, "rows": rows}
    write_result(args.output, "film_benchmark", result, markdown(result))
    return 0


if __name__ == "__main__":
    run_cli(main)
