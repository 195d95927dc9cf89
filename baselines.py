r"""Baselines from the same data and budget: a plain lifting U-Net, and the mean training volume.

    python baselines.py unet --config config_cpu.json --data ROOT --output runs/unet
    python baselines.py mean --data ROOT --output runs/mean
    python evaluate.py --data ROOT --base runs/unet/best_model.pt --output evaluation/unet \
        --compare evaluation/direct/per_patient.csv

Both take the configuration, data, augmentation, validation and checkpoints of ``train_enhanced_4gpu.py``; their
checkpoints go wherever a stage-1 checkpoint goes (evaluate.py, reconstruct.py, train_refinement_4gpu.py --base).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import train_enhanced_4gpu as train_enhanced
from checkpoints import load_checkpoint, save_checkpoint
from config import EnhancedConfig, config_dict, load_config, resolve_config_path
from dataset import mean_volume
from distributed import launch, process_group
from engine import Trainer
from files import InputError, run_cli, write_json
from model_enhanced import (
    CoarseModel,
    ResidualBlock,
    XrayEncoder,
    check_shape,
    group_norm,
    in_full_precision,
    prepare_xrays,
)
from monitoring import monitors_from
from projector import Geometry, pooled_to
from run_identity import check_same_run
from run_lock import locked_folder
from training_cli import check_before_launch, run_context, run_training, training_parser

DEFAULT_OUTPUT = "checkpoints_BASELINE"
# Mean squared error alone, as X2CT-CNN (X2CT-GAN without its discriminator, CVPR 2019): what PSNR measures, so that the
# baseline is not held back by its loss. ``--set loss...`` overrides it; the loss of the configuration is not its own.
LOSS = (
    "loss.mse_weight=1",
    *(f"loss.{name}_weight=0" for name in ("l1", "ssim", "perceptual", "edge", "multiscale", "projection")),
)


# ------------------------------------------------------------------------------------------------
# Networks


def replicate(pa: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
    """Repeat each view's features along its rays, bring both to the volume's axes, and average them.

    pa ``(B, C, D, W)``: constant along H (anterior-posterior); lateral ``(B, C, D, H)``: constant along W
    (right-left). Returns ``(B, C, D, H, W)``. X2CT-GAN's connections B (duplicate along the third axis) and C
    (permute, average; Ying et al., CVPR 2019, section 3.2): rays count as parallel, and detector as cube.
    """
    return 0.5 * (pa.unsqueeze(3) + lateral.unsqueeze(4))


def to_grid(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Feature maps ``(B, C, h, w)`` at the resolution of a volume's face: finer pixels are averaged."""
    features = pooled_to(features, size)
    if tuple(features.shape[-2:]) == size:
        return features
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


class DecoderScale(nn.Module):
    """Upsampled coarser volume (if any) + replicated features of both views -> residual blocks.

    Adding after 1x1 convolutions is a U-Net's concatenation followed by one; cheaper, as those of the views are 2D.
    """

    def __init__(self, coarse_channels: int, image_channels: int, channels: int, blocks: int):
        super().__init__()
        self.skips = nn.ModuleList(nn.Conv2d(image_channels, channels, 1) for _ in range(2))
        self.reduce = nn.Conv3d(coarse_channels, channels, 1) if coarse_channels else None
        self.blocks = nn.Sequential(*[ResidualBlock(channels, 3) for _ in range(blocks)])

    def forward(self, coarse, pa, lateral, size):
        depth, height, width = size
        pa, lateral = self.skips[0](pa), self.skips[1](lateral)
        x = replicate(to_grid(pa, (depth, width)), to_grid(lateral, (depth, height)))
        if self.reduce is not None:
            x = x + F.interpolate(self.reduce(coarse), size=size, mode="trilinear", align_corners=False)
        return self.blocks(x)


class LiftingUNet(CoarseModel):
    """The shape that published two-view methods share (X2CT-GAN's generator and what followed), and nothing more.

    One 2D encoder per view, features repeated along the rays and averaged at each scale (:func:`replicate`), a 3D
    U-Net decoder. No acquisition geometry, depth prior, attention, intermediate supervision or discriminator. The
    blocks, widths and depths are :class:`EnhancedDirectModel`'s, so that lifting, prior, attention and supervision are
    what separates the two scores. Settings as there; 4.22 M parameters with ``config_cpu.json`` (the direct model:
    4.38 M), 15.8 M by default (16.3 M).
    """

    def __init__(
        self,
        volume_size=(64, 64, 64),
        base_channels: int = 64,
        geometry: Geometry | None = None,
        xray_size: int | None = None,
        stem_stride: int = 2,
        encoder_blocks=(1, 1, 2, 3),
        decoder_blocks=(3, 2, 1),
        activation_checkpointing: bool = False,
    ):
        super().__init__(volume_size, geometry, xray_size)
        check_shape(base_channels, stem_stride, encoder_blocks, decoder_blocks)
        self.activation_checkpointing = activation_checkpointing
        c = base_channels
        widths = (c // 2, c, 2 * c, 4 * c)
        self.encoders = nn.ModuleList(XrayEncoder(widths, encoder_blocks, stem_stride, views=1) for _ in range(2))
        # coarser channels, image channels, channels, blocks; at 1/8, 1/4, 1/2 and full resolution
        self.decoder = nn.ModuleList(
            [
                DecoderScale(0, widths[3], 4 * c, 1),
                DecoderScale(4 * c, widths[3], 2 * c, decoder_blocks[0]),
                DecoderScale(2 * c, widths[2], c, decoder_blocks[1]),
                DecoderScale(c, widths[1], c // 2, decoder_blocks[2]),
            ]
        )
        self.norm = group_norm(c // 2)
        self.head = nn.Conv3d(c // 2, 1, 1)
        nn.init.constant_(self.head.bias, 0.2)  # a volume of lungs and soft tissue averages about that

    def forward(self, xrays):
        """xrays ``(B, 2, H, W)`` in [0, 1] -> ``(volume (B, 1, D, H, W), {})``; in eval mode clamped to [0, 1].

        Raises ``ValueError`` on another shape.
        """
        xrays = prepare_xrays(xrays, self.xray_size)
        pa, lateral = (self._run(encoder, xrays[:, v : v + 1]) for v, encoder in enumerate(self.encoders))
        x = None
        for scale, divisor, level in zip(self.decoder, (8, 4, 2, 1), (3, 3, 2, 1)):
            size = tuple(n // divisor for n in self.volume_size)
            x = self._run(scale, x, pa[level], lateral[level], size)
        volume = in_full_precision(self.head, F.silu(in_full_precision(self.norm, x)))
        return (volume if self.training else volume.clamp(0.0, 1.0)), {}


class MeanVolume(CoarseModel):
    """The same volume whatever the X-rays show; its parameters are the voxels, in [0, 1]."""

    def __init__(self, volume_size=(64, 64, 64), geometry: Geometry | None = None, xray_size: int | None = None):
        super().__init__(volume_size, geometry, xray_size)
        self.volume = nn.Parameter(torch.zeros(1, 1, *self.volume_size))

    def forward(self, xrays):
        """xrays ``(B, 2, H, W)`` -> ``(volume (B, 1, D, H, W), {})``."""
        return self.volume.repeat(xrays.shape[0], 1, 1, 1, 1), {}


# ------------------------------------------------------------------------------------------------
# Training


class BaselineTask(train_enhanced.EnhancedTask):
    """:class:`EnhancedTask` (data, augmentation, loss, validation) with another network."""

    kind: str  # of the checkpoints; model_enhanced.BASE_MODELS names the network
    network: type[CoarseModel]
    settings: tuple[str, ...]  # of the configuration's ``model`` that the network has

    def impossible_losses(self) -> dict[str, str]:
        return {"multiscale": "a baseline predicts no volumes of lower resolution"}

    def model_config(self) -> dict:
        """The network's settings, as its checkpoints hold them."""
        return {name: getattr(self.config.model, name) for name in self.settings}

    def build_model(self) -> CoarseModel:
        """The network for this data; its initial weights depend on the seed only."""
        torch.manual_seed(self.config.training.seed)
        return self.network(**self.model_config(), geometry=self.train_data.geometry)

    def header(self) -> dict:
        return {**super().header(), "kind": self.kind, "model_config": self.model_config()}


class UNetTask(BaselineTask):
    """Trains :class:`LiftingUNet`."""

    kind, network = "lifting_unet", LiftingUNet
    settings = (
        "volume_size",
        "base_channels",
        "xray_size",
        "stem_stride",
        "encoder_blocks",
        "decoder_blocks",
        "activation_checkpointing",
    )


class MeanTask(BaselineTask):
    """Fills :class:`MeanVolume` with the training patients' mean.

    In closed form: of all volumes that ignore the X-rays, the voxel-wise mean has the least squared error on the
    training patients, so gradient steps could only approach it. Not augmented: patients that are scored lie as they do.
    """

    kind, network = "mean_volume", MeanVolume
    settings = ("volume_size", "xray_size")

    def build_model(self) -> MeanVolume:
        model = super().build_model()
        with torch.no_grad():
            model.volume[0] = mean_volume(self.train_data)
        return model


TASKS = {"unet": UNetTask, "mean": MeanTask}


def parse_args(argv=None) -> argparse.Namespace:
    parser = training_parser(__doc__, "config_enhanced.json", DEFAULT_OUTPUT)
    parser.add_argument("baseline", choices=TASKS, help="unet: the lifting U-Net; mean: the mean training volume")
    args = parser.parse_args(argv)
    if args.output == DEFAULT_OUTPUT:
        args.output = f"checkpoints_{args.baseline}"
    return args


def read_config(args) -> EnhancedConfig:
    """The configuration a command line describes, with the baselines' loss; no other part differs from stage 1's."""
    path = resolve_config_path(args.config, "config_enhanced.json")
    config = load_config(EnhancedConfig, path, [*LOSS, "model.transformer_blocks=0", *args.set])
    blocks = config.model.transformer_blocks
    if blocks:
        raise InputError(f"model.transformer_blocks is {blocks}; a baseline has no attention: expected 0")
    if args.data:
        config.data.dataset_path = args.data
    if args.baseline == "mean":
        config.data.xray_source = "files"  # volumes as they are, at the model's resolution
    return config


def worker(args: argparse.Namespace) -> int:
    """What each process of ``unet`` runs; returns its exit status."""
    return run_training(args, read_config(args), UNetTask, train_enhanced.describe)


def save_mean(args: argparse.Namespace) -> int:
    """Write the mean volume's checkpoint and its validation scores; returns the exit status.

    Raises :class:`InputError` when the output folder holds a ``best_model.pt`` of another network, data or settings.
    """
    config, output = read_config(args), Path(args.output)
    best = output / MeanTask.best_name
    if best.exists():
        load_checkpoint(best, kind=MeanTask.kind)  # before the volumes are read
    with process_group() as processes:
        task = MeanTask(config, processes)
        model = task.build_model()
        if processes.is_main:
            print(f"Mean of {len(task.train_data)} training patients, {config.model.volume_size[0]}^3", flush=True)
        if args.dry_run:
            return 0
        with (
            locked_folder(output, processes),
            run_context(args, config, output, processes, task.train_data.split_hash),
        ):
            if best.exists():
                check_same_run(best, load_checkpoint(best, kind=MeanTask.kind), task.header(), config)
            if processes.is_main:
                write_json(output / "config.json", config_dict(config))
            with monitors_from(args, config_dict(config), output, processes) as monitors:
                _validate_and_save(Trainer(model, task, config, output, processes, monitors), best)
    return 0


def _validate_and_save(trainer: Trainer, path: Path) -> None:
    """What the engine does at the end of an epoch, without the epoch: validate, log, save."""
    trainer.epoch = 0
    trainer.monitors.start(0)
    metrics = trainer.validate()
    trainer.log("validation", **metrics)
    trainer.monitors.pictures(trainer.task.samples, 0)
    if trainer.processes.is_main:
        save_checkpoint(path, trainer.checkpoint(metrics))
        print(f"{path}: PSNR {metrics['psnr']:.2f} dB on {metrics['patients']} validation patients")


def main(argv=None) -> int:
    args = parse_args(argv)
    config = read_config(args)
    check_before_launch(args, config)
    if args.baseline == "mean":
        return save_mean(args)
    return launch(worker, config.world_size, args)


if __name__ == "__main__":
    run_cli(main)
