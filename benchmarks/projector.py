"""Compare the built-in renderer with nanodrr on one CT: line integrals and time.

    python -m benchmarks.projector --ct ROOT/ID/ID.nii.gz           # a prepared cube, or any CT
    python -m benchmarks.projector --ct CT.nii.gz --sizes 128:128:2 256:512:1

On the CPU; benchmarks/gpu.py times both on a GPU. Needs: pip install nanodrr.

The relative error (mean absolute difference over mean, per view) compares
the built-in renderer with nanodrr reading the same cube from a NIfTI file, with its own conversion of HU
and its own cameras; the timings compare ``render_xrays`` with ``render_xrays_nanodrr``.
"""

from __future__ import annotations

import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from xray2ct.command_line import Parser
from xray2ct.files import InputError, counted, run_cli
from xray2ct.geometry.nanodrr_backend import SAMPLES_PER_VOXEL, render_xrays_nanodrr
from xray2ct.geometry.projector import HU_WINDOW, MU_WATER, Geometry, hu_to_mu, hu_to_unit, line_integrals, render_xrays
from xray2ct.imaging.cube_files import read_cube, write_cube

RENDERERS = {"built-in": render_xrays, "nanodrr": render_xrays_nanodrr}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--ct", required=True, help="a prepared cube or any CT (NIfTI, MetaImage, NRRD, DICOM folder)")
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["128:128:2", "256:512:1"],
        metavar="CUBE:XRAY:BATCH",
        help="what to time",
    )
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many counts (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    return parser.parse_args(argv)


def nanodrr_line_integrals(hu, affine, geometry: Geometry, size: int) -> torch.Tensor:
    """Line integrals ``(2, size, size)`` of a cube ``(D, H, W)`` in HU, all by nanodrr and through a file."""
    from nanodrr.camera import make_rt_inv
    from nanodrr.data import Subject
    from nanodrr.drr import DRR

    with tempfile.TemporaryDirectory() as folder:
        write_cube(Path(folder) / "cube.nii.gz", hu, affine)
        # Its bone scale set so that attenuation is linear in HU, as ours is.
        scale = {"mu_water": MU_WATER, "mu_bone": 2 * MU_WATER, "hu_bone": 1000.0}
        subject = Subject.from_filepath(Path(folder) / "cube.nii.gz", max_label=0, **scale)
    pixel = geometry.detector_mm / size
    camera = DRR.from_carm_intrinsics(geometry.sdd_mm, pixel, pixel, 0.0, 0.0, size, size)
    turn = torch.tensor([[0.0, 0.0, 0.0], [90.0, 0.0, 0.0]])  # PA, then about the patient's long axis
    behind = torch.tensor([[0.0, -geometry.sid_mm, 0.0]])
    poses = make_rt_inv(turn, behind.expand(2, -1), "PA", subject.isocenter)
    with torch.no_grad():
        images = [camera(subject, pose[None], n_samples=2 * hu.shape[0])[0, 0] for pose in poses]
    return torch.stack(images)


def relative_errors(ct, geometry: Geometry, cube_size: int, xray_size: int) -> list[float]:
    """Mean absolute difference over nanodrr's mean, for PA and lateral, in cone geometry."""
    hu, _, affine = read_cube(ct, geometry.fov_mm, cube_size)
    hu = hu.clip(*HU_WINDOW)
    ours = line_integrals(hu_to_mu(torch.from_numpy(hu))[None, None], geometry, (xray_size, xray_size))[0]
    reference = nanodrr_line_integrals(hu, affine, geometry, xray_size)
    return ((ours - reference).abs().mean((1, 2)) / reference.mean((1, 2))).tolist()


def fastest(render, volume, geometry, xray_size, backward, repeats) -> float:
    """Seconds of the fastest of ``repeats`` runs, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        volume.grad = None
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            image = render(volume, geometry, (xray_size, xray_size))
        if backward:
            image.mean().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def time_backends(ct, geometry, cube_size, xray_size, batch, repeats):
    """Rows ``(pass, seconds built-in, seconds nanodrr)``."""
    hu = torch.from_numpy(read_cube(ct, geometry.fov_mm, cube_size)[0])
    volume = hu_to_unit(hu).expand(batch, 1, -1, -1, -1).contiguous().requires_grad_()
    for backward in (False, True):
        seconds = [fastest(f, volume, geometry, xray_size, backward, repeats) for f in RENDERERS.values()]
        yield "forward + backward" if backward else "forward", *seconds


def describe() -> str:
    machine = f"{processor()}, {counted(torch.get_num_threads(), 'thread')}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, nanodrr {version('nanodrr')}"
    return f"{machine}; {versions}"


def processor() -> str:
    """The CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        sizes = [tuple(int(number) for number in entry.split(":")) for entry in args.sizes]
        sizes = [(cube, xray, batch) for cube, xray, batch in sizes]
    except ValueError:
        raise InputError(
            f"--sizes is {' '.join(args.sizes)}; expected CUBE:XRAY:BATCH, for example 128:128:2"
        ) from None
    if args.threads:
        torch.set_num_threads(args.threads)
    geometry = Geometry()
    render_xrays_nanodrr(torch.zeros(1, 1, 8, 8, 8), geometry, (8, 8))  # says so at once when nanodrr is missing
    print(f"{describe()}\n{geometry}; nanodrr: {SAMPLES_PER_VOXEL:g} samples per voxel\n")
    print("| cube -> X-ray | relative error PA | lateral |\n|---|---|---|")
    for cube, xray in dict.fromkeys(size[:2] for size in sizes):
        pa, lateral = relative_errors(args.ct, geometry, cube, xray)
        print(f"| {cube}^3 -> {xray}^2 | {pa:.3%} | {lateral:.3%} |", flush=True)
    print("\n| cube -> X-ray | batch | pass | built-in s | nanodrr s | ratio |\n|---|---|---|---|---|---|")
    for cube, xray, batch in sizes:
        for name, ours, theirs in time_backends(args.ct, geometry, cube, xray, batch, args.repeats):
            row = f"{cube}^3 -> {xray}^2 | {batch} | {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f}"
            print(f"| {row} |", flush=True)
    return 0


if __name__ == "__main__":
    run_cli(main)
