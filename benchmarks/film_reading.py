"""Time and memory of reading one film, and a pair, from file to what a network takes.

    python -m benchmarks.film_reading                           # 4000 x 3000 pixels, PNG and DICOM
    python -m benchmarks.film_reading --pixels 5000 4000

Each film is read in a process of its own. "memory" is how much the process grew by reading, above what Python, PyTorch
and pydicom take by themselves (Linux); time is the median of the repetitions, in a process that has read one before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.model_speed import machine
from xray2ct.command_line import Parser
from xray2ct.data.phantoms import make_phantom
from xray2ct.files import run_cli
from xray2ct.geometry.projector import Geometry, hu_to_unit, render_xrays
from xray2ct.imaging.body import locate_cube
from xray2ct.imaging.cube import resample_cube
from xray2ct.imaging.read_ct import CtImage

KINDS = ("16-bit PNG", "8-bit PNG", "DICOM")
SIZE, REPETITIONS = 512, 3


def make_films(folder: Path, rows: int, columns: int) -> dict[str, list[str]]:
    """Both views of a phantom with a display curve and noise, as files of each kind."""
    geometry = Geometry()
    ct = CtImage(*make_phantom(0, 0, 3.0), "phantom")
    hu, _ = resample_cube(ct, locate_cube(ct, geometry.fov_mm), geometry.fov_mm, 128)
    volume = torch.from_numpy(hu_to_unit(hu.astype(np.float32)))[None, None]
    files: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for view, image in enumerate(render_xrays(volume, geometry, (256, 256))[0].numpy()):
        large = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))
        shown = 1 / (1 + np.exp(-10 * (large - 0.3))) + np.random.default_rng(view).normal(0, 0.01, large.shape)
        stored = np.rint(4095 * shown.clip(0, 1)).astype(np.uint16)
        name = folder / ["pa", "lateral"][view]
        Image.fromarray(stored * 16).save(f"{name}16.png")
        Image.fromarray((stored >> 4).astype(np.uint8)).save(f"{name}8.png")
        _write_dicom(f"{name}.dcm", stored)
        for kind, end in zip(KINDS, ("16.png", "8.png", ".dcm")):
            files[kind].append(f"{name}{end}")
    return files


def _write_dicom(path: str, stored: np.ndarray) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = "1.2.840.10008.5.1.4.1.1.1.1", generate_uid(), "DX"
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME1"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = (4095 - stored).tobytes()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)


def measure(paths: list[str]) -> dict[str, float]:
    """Seconds and growth in MiB of reading one film or a pair, in this process."""
    import pydicom.pixels  # noqa: F401 - its memory is not that of reading

    from xray2ct.imaging.read_films import read_films

    def peak() -> float:  # not ru_maxrss, which a process inherits from the one that started it
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    pair, before, seconds, work = (*paths, None)[:2], peak(), [], []
    for _ in range(1 + REPETITIONS):
        start, busy = time.perf_counter(), time.process_time()
        read_films(pair, "auto", SIZE, geometry=Geometry())
        seconds.append(time.perf_counter() - start)
        work.append(time.process_time() - busy)
    wall, cpu = (float(np.median(values[1:])) for values in (seconds, work))
    return {"first": seconds[0], "wall": wall, "cpu": cpu, "growth": peak() - before, "peak": peak()}


def main(argv=None) -> int:
    parser = Parser(__doc__)
    size = {"nargs": 2, "type": int, "metavar": ("ROWS", "COLUMNS")}
    parser.add_argument("--pixels", default=(4000, 3000), help="of a film", **size)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return 0
    print(machine())
    rows, columns = args.pixels
    with tempfile.TemporaryDirectory() as folder:
        for kind, paths in make_films(Path(folder), rows, columns).items():
            for name, chosen in (("one film", paths[:1]), ("a pair", paths)):
                command = [sys.executable, "-m", "benchmarks.film_reading", "--measure", *chosen]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{rows} x {columns}, {kind}, {name}: {found['wall']:.2f} s (CPU {found['cpu']:.2f} s, first"
                    f" {found['first']:.2f} s),"
                    f" memory {found['growth']:.0f} MiB (process {found['peak']:.0f} MiB)"
                )
    return 0


if __name__ == "__main__":
    run_cli(main)
