"""The example X-rays of ``examples``: one patient's renderings from a prepared data set, at 12 bits to keep them small.

    python -m tools.example_xrays --data ROOT --patient lidc_0001 --output examples

Grey values are rounded to multiples of 16 of 65,535: by at most 0.00012 of the X-rays' range of 1, far below
the noise that training adds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from xray2ct.command_line import Parser
from xray2ct.conventions import MANIFEST
from xray2ct.files import InputError, check_patient_id, read_json, run_cli
from xray2ct.imaging.read_xray import write_png16

STEP = 16


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="data set, as from prepare_data.py")
    parser.add_argument("--patient", default="lidc_0001", help="of its test split (default %(default)s)")
    parser.add_argument("--output", default="examples", help="folder to write into (default %(default)s)")
    args = parser.parse_args(argv)
    patient = check_patient_id(args.patient, "--patient")
    if patient not in read_json(Path(args.data) / MANIFEST)["split"]["test"]:
        raise InputError(f"--patient {patient}: is not a test patient of {args.data}; examples must not be trained on")
    for view in ("pa", "lat"):
        stored = np.asarray(Image.open(Path(args.data) / patient / f"{patient}_{view}_drr.png"))
        rounded = (np.rint(stored / STEP) * STEP).clip(0, 65535)
        path = Path(args.output) / f"{patient}_{view}.png"
        write_png16(path, rounded / 65535, own_scale=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    run_cli(main)
