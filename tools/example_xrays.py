"""The example X-rays of ``examples``: one patient's renderings from a prepared data set, and simulated films of it.

    python -m tools.example_xrays --data ROOT --patient lidc_0001 --output examples

Grey values of the renderings are rounded to multiples of 16 of 65,535: by at most 0.00012 of the X-rays' range of 1,
far below the noise that training adds. The films are a case of the film benchmark (``tools/film_cases.py``), which
training does not draw from: a display curve, 8 bits, on a page with a black and a white border.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dataset import PatientDataset
from tools.film_benchmark import render
from tools.film_cases import make_case
from xray2ct.command_line import Parser
from xray2ct.conventions import MANIFEST
from xray2ct.files import InputError, atomic_path, check_patient_id, read_json, run_cli
from xray2ct.imaging.read_xray import write_png16

STEP = 16
CASE, SEED = "frame", 0
VIEWS = ("pa", "lat")


def write_renderings(root: Path, patient: str, output: Path) -> list[Path]:
    """The data set's X-rays of a patient, rounded."""
    paths = [output / f"{patient}_{view}.png" for view in VIEWS]
    for view, path in zip(VIEWS, paths):
        stored = np.asarray(Image.open(root / patient / f"{patient}_{view}_drr.png"))
        rounded = (np.rint(stored / STEP) * STEP).clip(0, 65535)
        write_png16(path, rounded / 65535, own_scale=True)
    return paths


def write_films(root: Path, patient: str, output: Path) -> list[Path]:
    """The patient without couch on two simulated films."""
    size = PatientDataset(root, "all", 1, None).cube_size
    data = PatientDataset(root, "test", size, None, body=True)
    rendering, _ = render(data, data.ids.index(patient))
    paths = [output / f"{patient}_film_{view}.png" for view in VIEWS]
    for path, picture in zip(paths, make_case(CASE, rendering, patient, SEED)):
        with atomic_path(path) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG", optimize=True)
    return paths


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="data set, as from prepare_data.py")
    parser.add_argument("--patient", default="lidc_0001", help="of its test split (default %(default)s)")
    parser.add_argument("--output", default="examples", type=Path, help="folder to write into (default %(default)s)")
    args = parser.parse_args(argv)
    patient = check_patient_id(args.patient, "--patient")
    if patient not in read_json(args.data / MANIFEST)["split"]["test"]:
        raise InputError(f"--patient {patient}: is not a test patient of {args.data}; examples must not be trained on")
    for write in (write_renderings, write_films):
        for path in write(args.data, patient, args.output):
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    run_cli(main)
