r"""Two X-ray files -> a CT volume by the cascade, as NIfTI in Hounsfield units. INFERENCE.md explains the three ways.

python inference.py --pa PA.png --lateral LAT.png --checkpoint checkpoints/quick_2stage --output ct.nii.gz
python inference.py --pa PA.png --lateral LAT.png --checkpoint checkpoints/quick_2stage --output ct.nii.gz \
        --steps 25 --samples 8 --save_std std.nii.gz
python inference.py ... --output draw.nii.gz --steps 50 --samples 1 --seed 3

Without --samples: the posterior mean, one network step per stage. --samples K: the mean of K samples of --steps steps
each, with K = 1 a single sample. From the repository's root: python -m hybrid_vit_cascade.inference ...
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # started by path: the package lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from hybrid_vit_cascade.cascade import DEFAULT_STEPS, Cascade

# isort: split
from xray2ct.files import InputError, run_cli
from xray2ct.imaging.write_volume import check_output, write_volume
from xray2ct.inference.batch import (
    add_common_arguments,
    check_common_arguments,
    describe_volume,
    reconstruct_folder,
    reconstruct_one,
)
from xray2ct.inference.reconstruction import Pipeline
from xray2ct.inference.system import pick_device


class CascadeSystem:
    """A cascade with a way of using it, as :class:`reconstruction.Pipeline` wants a system.

    samples: None for the one-step posterior mean, else the number of samples to average, of ``steps`` steps each.
    After :meth:`predict`, ``std`` is the standard deviation (B, 1, D, H, W) of two or more samples in units of [0, 1],
    else None. The same seed gives the same volume.
    """

    def __init__(self, cascade: Cascade, samples: int | None = None, steps: int = DEFAULT_STEPS, seed: int = 0):
        self.cascade, self.samples, self.steps, self.seed = cascade, samples, steps, seed
        self.xray_size, self.geometry = cascade.xray_size, cascade.geometry
        self.hu_window, self.volume_size = cascade.hu_window, cascade.volume_size
        self.notes: list[str] = []
        self.std: torch.Tensor | None = None
        self.progress = None  # wraps the iterable of steps

    def predict(self, xrays: torch.Tensor) -> torch.Tensor:
        """``(B, num_views, S, S)`` in [0, 1] -> volume ``(B, 1, D, H, W)`` in [0, 1], float32 on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        options = {"steps": self.steps, "generator": generator, "progress": self.progress}
        self.std = None
        if self.samples is None:
            return self.cascade.posterior_mean(xrays, generator=generator).cpu()
        if self.samples == 1:
            return self.cascade.sample(xrays, **options).cpu()
        volume, std = self.cascade.statistics(xrays, self.samples, **options)
        self.std = std.cpu()
        return volume.cpu()

    def __str__(self) -> str:
        if self.samples is None:
            return "posterior mean in one step"
        draws = "a single sample" if self.samples == 1 else f"mean of {self.samples} samples"
        return f"{draws} of {self.steps} steps, seed {self.seed}"


class CascadePipeline(Pipeline):
    """Two X-rays, or PA alone for a cascade of one view -> a volume; ``pipeline("PA.png", "LAT.png")``."""

    system: CascadeSystem

    def read(self, pa, lateral=None, normalization="manifest", invert=False, check=True, exposure=None):
        """X-ray files or arrays -> ``(num_views, S, S)``; as :meth:`Pipeline.read`, with PA alone for one view."""
        self.system.cascade.check_views(1 if lateral is None else 2)
        if lateral is not None:
            return super().read(pa, lateral, normalization, invert, check, exposure)
        stand_in = np.eye(self.system.xray_size, dtype=np.float32)  # any array passes for a second view; dropped
        return super().read(pa, stand_in, normalization, invert, False, exposure)[:1]

    def __call__(self, pa, lateral=None, **options):
        """Two X-rays -> ``(HU int16 (D, H, W), affine)``; as :meth:`Pipeline.__call__`."""
        return super().__call__(pa, lateral, **options)

    def std_hu(self) -> np.ndarray:
        """Standard deviation of the last prediction's samples in HU, float32 (D, H, W)."""
        low, high = self.hu_window
        return (self.system.std[0, 0] * (high - low)).numpy()


def load_cascade_pipeline(
    checkpoint,
    samples: int | None = None,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    max_stages: int | None = None,
    device: str = "auto",
    precision: str = "float32",
) -> CascadePipeline:
    """Load a cascade's checkpoint folder for reconstruction: ``volume_hu, affine = pipeline("PA.png", "LAT.png")``.

    Arguments as those of the command line; raises :class:`InputError` naming what cannot be used.
    """
    cascade = Cascade.load(checkpoint, pick_device(device), max_stages, precision)
    return CascadePipeline(CascadeSystem(cascade, samples, steps, seed))


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder of train_progressive.py")
    add_common_arguments(parser)
    parser.add_argument("--steps", type=int, help=f"network steps per stage and sample (default {DEFAULT_STEPS})")
    parser.add_argument("--samples", type=int, help="mean of K samples, 1: a single one (default: one-step mean)")
    parser.add_argument("--save_std", "--save-std", metavar="FILE", help="voxel-wise standard deviation in HU, NIfTI")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' noise (default %(default)s)")
    parser.add_argument("--max_stages", "--max-stages", type=int, help="stop after this many stages")
    return parser.parse_args(argv)


def check_args(args) -> None:
    """Refuse, before anything is loaded, what cannot be written or would be ignored."""
    check_common_arguments(args)
    if args.save_std:
        if args.folder:
            raise InputError("--save_std is for one pair of X-rays; expected --pa and --lateral instead of --folder")
        check_output(args.save_std, "--save_std", series=False)
        if Path(args.save_std).resolve() == Path(args.output).resolve():
            raise InputError(f"--save_std {args.save_std} is --output too; expected another name")
    if args.samples is not None and args.samples < 1:
        raise InputError(f"--samples {args.samples}: expected at least 1; without it the posterior mean is one step")
    if args.save_std and (args.samples or 0) < 2:
        raise InputError("--save_std needs at least two samples: add --samples 8")
    if args.steps is not None and args.steps != 1 and args.samples is None:
        raise InputError(
            f"--steps {args.steps} without --samples: the posterior mean takes one step;"
            " add --samples 1 for a single sample, or --samples 8 for the mean of eight"
        )


def main(argv=None) -> int:
    args = parse_args(argv)
    check_args(args)
    steps = DEFAULT_STEPS if args.steps is None else args.steps
    pipeline = load_cascade_pipeline(
        args.checkpoint, args.samples, steps, args.seed, args.max_stages, args.device, args.precision
    )
    pipeline.system.progress = partial(tqdm, desc="Sampling", unit="step", leave=False, disable=None)
    if args.folder:
        return reconstruct_folder(pipeline, args, views=pipeline.system.cascade.num_views)
    hu, affine = reconstruct_one(pipeline, args.pa, args.lateral, args.output, args.picture, args)
    print(f"{describe_volume(pipeline, args.output, hu)}; {pipeline.system}")
    if args.save_std:
        std = pipeline.std_hu()
        write_volume(args.save_std, std, affine)
        print(f"{args.save_std}: standard deviation, {std.mean():.1f} HU on average")
    return 0


if __name__ == "__main__":
    run_cli(main)
