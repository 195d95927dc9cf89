"""How much of the detail that 64^3 voxels cannot hold can be known at all: from the X-rays, and from a coarse volume.

    python -m tools.fine_detail --base chest64 --data data --output results/fine_detail

Detail is a CT at 256^3 minus the cubic spline through its own area averages (xray2ct/evaluation/error_split.py). Two
bounds on the share of its squared values that stage 2 could remove, over patients that stage 1 was not trained on:

- what the X-rays hold of it: the least-squares solution of the detail's own, noiseless line integrals, which is its
  part in the span of the rays. Nothing linear that knows only X-rays and the coarse volume's averages gets further;
  what more there is must come from knowing how bodies look.
- what a coarse volume tells of it: a convolutional network (ESPCN: Shi et al., CVPR 2016, in 3D) is fitted to predict
  it from stage 1's volume, which is what stage 2 is given, on the validation patients, and another from the true 64^3
  volume, on the training patients, too; both are scored on the test patients.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataset import PatientDataset
from model_enhanced import RefinementNetwork
from tools.calibrate import open_split
from xray2ct.command_line import Parser
from xray2ct.evaluation.error_split import split_frequencies
from xray2ct.evaluation.record import described, markdown_table, measured, write_result
from xray2ct.files import InputError, check_writable, run_cli
from xray2ct.geometry.projector import Geometry, back_project, line_integrals
from xray2ct.inference.system import DirectSystem
from xray2ct.models.blocks import pixel_shuffle_3d
from xray2ct.models.consistent_step import conjugate_gradients
from xray2ct.progress import progress_bar

SCALE = RefinementNetwork.scale
GIVEN = ("predicted", "true")  # coarse volumes that detail is predicted from: the first two of a Case
RAY_STEPS, RAY_WEIGHT = 24, 1e-4  # of the least squares; a weight this small shrinks nothing that the rays resolve
WIDTH, CROP, BATCH, LEARNING_RATE = 32, 24, 2, 2e-3  # of the fitted network


def share_in_rays(detail: torch.Tensor, geometry: Geometry, xray_size: int, steps: int = RAY_STEPS) -> float:
    """Share of a detail's squared values in the span of the rays of two X-rays of ``xray_size`` pixels.

    The least-squares solution from its own line integrals by conjugate gradients from 0, without the area averages
    that it gains: the coarse volume is known by itself. More steps can only add to it.
    """
    pixels, size = (xray_size, xray_size), detail.shape[2:]
    norm = 2 * (geometry.fov_mm * xray_size) ** 2 / detail[0].numel()  # about the largest eigenvalue of A^T A

    def normal(volume):
        return back_project(line_integrals(volume, geometry, pixels), geometry, size) / norm

    found = conjugate_gradients(lambda d: normal(d) + RAY_WEIGHT * d, normal(detail), steps)
    *_, found = split_frequencies(found)
    return 1 - ((detail - found).square().mean() / detail.square().mean()).item()


class DetailNetwork(nn.Module):
    """A coarse volume ``(B, 1, d, d, d)`` -> detail ``(B, 1, 4d, 4d, 4d)``: 3^3 convolutions, then a voxel shuffle."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        sizes = (1, width, width, width)
        self.layers = nn.ModuleList(nn.Conv3d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.last = nn.Conv3d(width, SCALE**3, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, coarse):
        x = 4.0 * coarse
        for layer in self.layers:
            x = F.relu(layer(x))
        return pixel_shuffle_3d(0.1 * self.last(x), SCALE)


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # predicted and true coarse volume, detail


def fit_detail(cases: list[Case], given: str, steps: int, seed: int = 0) -> DetailNetwork:
    """A network fitted by squared error to random crops of the cases, mirrored at random left to right.

    given: which coarse volume it sees, of :data:`GIVEN`.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    network = DetailNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        pairs = [_crop(cases[generator.integers(len(cases))], given, generator) for _ in range(BATCH)]
        coarse, detail = (torch.cat(parts) for parts in zip(*pairs))
        loss = (network(coarse) - detail).square().mean() / detail.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _crop(case: Case, given: str, generator) -> tuple[torch.Tensor, torch.Tensor]:
    coarse, detail = case[GIVEN.index(given)], case[2]
    size = min(CROP, coarse.shape[2])
    starts = [int(generator.integers(n - size + 1)) for n in coarse.shape[2:]]
    box = [slice(start, start + size) for start in starts]
    fine = [slice(SCALE * start, SCALE * (start + size)) for start in starts]
    coarse, detail = coarse[:, :, box[0], box[1], box[2]], detail[:, :, fine[0], fine[1], fine[2]]
    return (coarse.flip(4), detail.flip(4)) if generator.integers(2) else (coarse, detail)


@torch.no_grad()
def share_predicted(network: DetailNetwork, case: Case, given: str) -> float:
    """Share of a case's squared detail that the network removes."""
    coarse, detail = case[GIVEN.index(given)], case[2]
    return 1 - ((network(coarse) - detail).square().mean() / detail.square().mean()).item()


def read_cases(system: DirectSystem, root, split: str, fine_size: int) -> tuple[list[str], list[Case]]:
    """The cases of a split that the system was not trained on."""
    coarse_data = open_split(system, root, split)
    fine = PatientDataset(root, split, fine_size, None)
    fine.ids = coarse_data.ids
    cases = []
    for index in progress_bar(range(len(fine)), desc=f"Reading {split}", unit="patients"):
        true, _, detail = split_frequencies(fine[index]["ct_volume"][None])
        cases.append((system.predict_item(coarse_data[index])[None, None].cpu(), true, detail))
    return fine.ids, cases


def true_cases(root, fine_size: int) -> list[Case]:
    """The training patients' cases, with the true coarse volume in place of a predicted one."""
    fine = PatientDataset(root, "train", fine_size, None)
    bar = progress_bar(range(len(fine)), desc="Reading train", unit="patients")
    parts = (split_frequencies(fine[index]["ct_volume"][None]) for index in bar)
    return [(true, true, detail) for true, _, detail in parts]


def measure(system: DirectSystem, args: argparse.Namespace) -> dict:
    """All figures, as written."""
    size = SCALE * system.volume_size[0]
    fitted_on, training = read_cases(system, args.data, "val", size)
    patients, test = read_cases(system, args.data, "test", size)
    if not training or not test:
        raise InputError(f"{args.data}: expected validation and test patients that {args.base} was not trained on")
    rays = [
        share_in_rays(case[2], system.geometry, args.xray_size, args.ray_steps)
        for case in progress_bar(test, desc="What the X-rays hold", unit="patients")
    ]
    removed, cases = {}, {"predicted": training, "true": [*training, *true_cases(args.data, size)]}
    for given in GIVEN:
        network = fit_detail(cases[given], given, args.steps)
        removed[given] = [share_predicted(network, case, given) for case in test]
        print(f"from the {given} volume: {np.mean(removed[given]):.3f} of the detail", flush=True)
    about = {"steps": args.steps, "ray_steps": args.ray_steps, "xray_size": args.xray_size, "fitted_on": fitted_on}
    return {**about, "patients": patients, "in_the_rays": rays, "removed": removed}


def table(result: dict) -> str:
    """The bounds in Markdown."""

    def cell(values):
        mean, least, most = (round(100 * value, 1) + 0.0 for value in (np.mean(values), min(values), max(values)))
        return f"{mean:.1f} % ({least:.1f} to {most:.1f})"  # + 0.0: no "-0.0"

    lines = {
        f"the detail's own line integrals, two X-rays of {result['xray_size']}^2 pixels": result["in_the_rays"],
        "the predicted 64^3 volume": result["removed"]["predicted"],
        "the true 64^3 volume": result["removed"]["true"],
    }
    rows = [[what, cell(values)] for what, values in lines.items()]
    head = ["from what", f"detail removed, mean (least to most) of {len(result['patients'])} test patients"]
    return f"{markdown_table(head, rows)}\n\n- {described(result['measured'])}\n"


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--base", default="chest64", help="stage-1 checkpoint or shipped weights (default %(default)s)")
    parser.add_argument("--data", required=True, help="data set with cubes four times as fine, from prepare_data.py")
    parser.add_argument("--steps", type=int, default=1000, help="of each network's fit (default %(default)s)")
    parser.add_argument("--ray-steps", type=int, default=RAY_STEPS, help="of the least squares (default %(default)s)")
    parser.add_argument("--xray-size", type=int, default=512, help="pixels of the X-rays' edge (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/fine_detail"), help="folder (default %(default)s)")
    args = parser.parse_args(argv)
    for name in ("steps", "ray_steps", "xray_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    check_writable(args.output / "fine_detail.json", "--output")
    system = DirectSystem(args.base, device="cpu")
    record = measured("tools.fine_detail", sys.argv[1:] if argv is None else argv, system)
    start = time.monotonic()
    result = {"measured": record, **measure(system, args), "seconds": time.monotonic() - start}
    write_result(args.output, "fine_detail", result, table(result))
    return 0


if __name__ == "__main__":
    run_cli(main)
