"""The whole main job on generated phantoms, in minutes on two CPU cores: nothing is downloaded.

    bash launch_4gpu.sh demo                       # or: python -m tools.demo
    python -m tools.demo --output demo_output --patients 40 --seed 1 --set training.num_epochs=20

Phantoms -> prepared data -> both stages, 32^3 and 128^3, an eighth of the real volumes' voxels -> scores on held-out
phantoms -> a reconstruction from two PNG files as NIfTI, and a picture of it. The same command skips what is
done and resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

import evaluate
import prepare_data
import reconstruct
import train_enhanced_4gpu
import train_refinement_4gpu
from dataset import PatientDataset
from tools import make_phantoms
from xray2ct.command_line import Parser
from xray2ct.evaluation import scoring
from xray2ct.files import InputError, counted, read_json, run_cli, write_json
from xray2ct.geometry.projector import hu_to_unit
from xray2ct.imaging.figures import save_panel

SPACING_MM = 3.0  # of the phantoms: fine enough for 128^3 voxels of 2.8 mm
CUBE_SIZE, XRAY_SIZE = 128, 256


def split_of(patients: int) -> dict[str, list[str]]:
    """The last sixth of the phantoms is the test set; the twelfth before it validates and chooses the checkpoint."""
    ids = [f"phantom_{index:04d}" for index in range(patients)]
    test, val = max(1, patients // 6), max(1, patients // 12)
    return {"train": ids[: -test - val], "val": ids[-test - val : -test], "test": ids[-test:]}


class Demo:
    """Paths and steps of one demo; every step can be repeated."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, Path(args.output)
        self.phantoms, self.data = self.output / "phantoms", self.output / "data"
        self.training, self.results = self.output / "training", self.output / "results"
        self.refinement_training = self.output / "training_refinement"
        self.checkpoint = self.training / "best_model.pt"
        self.refinement = self.refinement_training / "best_refinement.pt"
        self.reconstruction, self.picture = self.output / "reconstruction.nii.gz", self.output / "reconstruction.png"
        self.split = split_of(args.patients)

    def remember_settings(self) -> None:
        """Refuse a folder that another demo made: its phantoms would be mixed with these."""
        path = self.output / "demo.json"
        settings = {"patients": self.args.patients, "seed": self.args.seed}
        if path.exists() and read_json(path) != settings:
            raise InputError(f"{path}: made with {read_json(path)}, now {settings}; choose another --output")
        write_json(path, settings)
        write_json(self.output / "split.json", self.split)

    def make_phantoms(self) -> int:
        ids = [patient for part in self.split.values() for patient in part]
        if all((self.phantoms / f"{patient}.nii.gz").exists() for patient in ids):
            print(f"{len(ids)} phantoms are done already")
            return 0
        count, seed, workers = self.args.patients, self.args.seed, self.args.workers
        options = {"output": self.phantoms, "count": count, "seed": seed, "spacing-mm": SPACING_MM, "workers": workers}
        return make_phantoms.main(arguments(options))

    def prepare(self) -> int:
        options = {"input": self.phantoms, "output": self.data, "split": self.output / "split.json"}
        options |= {"size": CUBE_SIZE, "xray-size": XRAY_SIZE, "workers": self.args.workers}
        return prepare_data.main(arguments(options))

    def train(self) -> int:
        options = arguments({"config": self.args.config, "data": self.data, "output": self.training})
        for setting in self.args.set:
            options += ["--set", setting]
        return train_enhanced_4gpu.main(options)

    def train_refinement(self) -> int:
        options = {"config": self.args.config_refinement, "data": self.data, "base": self.checkpoint}
        options = arguments(options | {"output": self.refinement_training})
        for setting in self.args.set_refinement:
            options += ["--set", setting]
        return train_refinement_4gpu.main(options)

    @property
    def checkpoints(self) -> dict:
        return {"base": self.checkpoint, "refinement": self.refinement}

    def evaluate(self) -> int:
        summary, checkpoints = self.results / "summary.json", self.checkpoints.values()
        if summary.exists() and summary.stat().st_mtime_ns > max(path.stat().st_mtime_ns for path in checkpoints):
            print(f"{summary} has the scores of these checkpoints already")
            return 0
        options = {"data": self.data, "split": "test", **self.checkpoints, "output": self.results}
        return evaluate.main([*arguments(options), "--report"])

    def reconstruct(self) -> int:
        """One held-out phantom from its two PNG files, as a user would; then the picture of what was written."""
        patient = self.split["test"][0]
        xrays = {view: self.data / patient / f"{patient}_{view}_drr.png" for view in ("pa", "lat")}
        options = {"pa": xrays["pa"], "lateral": xrays["lat"], **self.checkpoints, "output": self.reconstruction}
        status = reconstruct.main(arguments(options))
        hu = np.asarray(nib.Nifti1Image.from_filename(self.reconstruction).dataobj).transpose(
            2, 1, 0
        )  # (W, H, D) there
        data = PatientDataset(self.data, "test", hu.shape[0], XRAY_SIZE)
        item = data[data.ids.index(patient)]
        prediction = hu_to_unit(hu.astype(np.float32), data.hu_window)
        save_panel(self.picture, item["xrays"], prediction, item["ct_volume"][0], data.hu_window, patient)
        return status

    def conclude(self, seconds: float) -> None:
        """Print the scores and where the results are."""
        methods = read_json(self.results / "summary.json")["methods"]
        names = ("refined", scoring.TRILINEAR, scoring.BASELINE)
        model, coarse, mean = (methods[name]["psnr_strict"] for name in names)
        patient = self.split["test"][0]
        print(
            f"\nDone in {seconds / 60:.1f} min. PSNR (strict) of {counted(model['n'], 'held-out phantom')}:"
            f" {model['mean']:.2f} dB; mean-volume predictor: {mean['mean']:.2f} dB;"
            f" gain: {model['mean'] - mean['mean']:+.2f} dB"
            f" (stage 1, only interpolated: {coarse['mean']:.2f} dB)"
        )
        print(f"  {self.picture}: {patient}, two X-rays | prediction | truth")
        print(f"  {self.reconstruction}: {patient} from its two X-rays, in HU")
        print(f"  {self.results / 'report.html'}: open it in a browser: volumes, truth and error, scores")
        print(f"  {self.results}: scores per phantom, pictures")
        print(f"  {self.training}, {self.refinement_training}: checkpoints, logs")
        print("Phantoms show that everything works; scores on them say nothing about patients.")
        if command := activation(sys.prefix, sys.base_prefix, os.environ.get("VIRTUAL_ENV")):
            print(f"The other commands need this environment: {command}")


def activation(prefix: str, base_prefix: str, active: str | None, windows: bool = os.name == "nt") -> str | None:
    """The command that activates the virtual environment of this Python; None where there is none, or it is active.

    prefix, base_prefix: as in :mod:`sys`; active: the environment's variable ``VIRTUAL_ENV``.
    """
    if prefix == base_prefix or (active and Path(active).resolve() == Path(prefix).resolve()):
        return None
    return str(Path(prefix) / "Scripts" / "activate") if windows else f"source {shlex.quote(f'{prefix}/bin/activate')}"


def run_steps(steps: dict[str, Callable[[], int]]) -> int:
    """Run steps by name until one returns a status other than 0, which is returned."""
    for number, (name, step) in enumerate(steps.items(), start=1):
        print(f"\n[{number}/{len(steps)}] {name}", flush=True)
        status = step()
        if status:
            return status
    return 0


def arguments(options: dict) -> list[str]:
    """``{"xray-size": 256}`` -> ``["--xray-size", "256"]``."""
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", default="demo_output", help="folder for everything (default %(default)s)")
    parser.add_argument("--patients", type=int, default=24, help="phantoms (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the phantoms (default %(default)s)")
    configs = Path(__file__).resolve().parent.parent / "configs"
    parser.add_argument("--config", default=configs / "demo.json", help="JSON settings of stage 1")
    parser.add_argument(
        "--config-refinement", default=configs / "demo_refinement.json", help="JSON settings of stage 2"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one of stage 1's")
    parser.add_argument(
        "--set-refinement", action="append", default=[], metavar="KEY=VALUE", help="override one of stage 2's"
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes for the data")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.patients < 3:
        raise InputError(f"--patients is {args.patients}; expected at least 3 (training, validation, test)")
    started, demo = time.monotonic(), Demo(args)
    demo.remember_settings()
    steps = {
        "phantoms": demo.make_phantoms,
        "data set (cubes, X-rays, split)": demo.prepare,
        "stage 1": demo.train,
        "stage 2": demo.train_refinement,
        "scores on held-out phantoms": demo.evaluate,
        "reconstruction from two PNG files": demo.reconstruct,
    }
    status = run_steps(steps)
    if not status:
        demo.conclude(time.monotonic() - started)
    return status


if __name__ == "__main__":
    run_cli(main)
