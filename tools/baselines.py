"""Baselines from the same data and budget: a plain lifting U-Net, X2CT-GAN's generator, the mean training volume.

    python -m tools.baselines unet --config configs/cpu.json --data ROOT --output runs/unet
    python -m tools.baselines x2ct --config configs/cpu.json --data ROOT --output runs/x2ct
    python -m tools.baselines mean --data ROOT --output runs/mean
    python evaluate.py --data ROOT --base runs/unet/best_model.pt --output evaluation/unet \\
        --compare evaluation/direct/per_patient.csv

All take the configuration, data, augmentation, validation and checkpoints of ``train_enhanced_4gpu.py``; their
checkpoints go wherever a stage-1 checkpoint goes (evaluate.py, reconstruct.py, train_refinement_4gpu.py --base).

x2ct has the published widths and 128^2 X-rays whatever the configuration says (model.base_channels=64,
model.xray_size=128; --set changes them), and its reconstruction and projection losses, each of weight 10. Its volumes
are of the configuration's size, 64^3: the decoders stop there. model.volume_size=[128,128,128] is the published one;
such a checkpoint is scored at 128^3. The adversarial loss is left out: by the authors' table it costs 1.1 dB. The
projection loss compares X-rays rendered by the data's geometry, where theirs compares means along the volume's axes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dataset import mean_volume
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError, run_cli, write_json
from xray2ct.models.baselines import LiftingUNet, MeanVolume
from xray2ct.models.x2ct import BASE_CHANNELS, X2CTGenerator
from xray2ct.training import cli
from xray2ct.training.config import EnhancedConfig, config_dict, resolve_config_path
from xray2ct.training.direct_task import EnhancedTask
from xray2ct.training.distributed import process_group
from xray2ct.training.monitors import monitors_from
from xray2ct.training.run_identity import check_same_run
from xray2ct.training.run_lock import locked_folder
from xray2ct.training.trainer import Trainer

DEFAULT_OUTPUT = "checkpoints_BASELINE"
# Mean squared error alone, as X2CT-CNN (X2CT-GAN without its discriminator, CVPR 2019): what PSNR measures, so that the
# baseline is not held back by its loss. ``--set loss...`` overrides it; the loss of the configuration is not its own.
LOSS = (
    "loss.mse_weight=1",
    *(f"loss.{name}_weight=0" for name in ("l1", "ssim", "perceptual", "edge", "multiscale", "projection", "layout")),
)
# Of X2CT-GAN without its discriminator, by its published settings; X-rays of 128 pixels and all its channels.
X2CT = (
    "loss.mse_weight=10",
    "loss.projection_weight=10",
    f"model.base_channels={BASE_CHANNELS}",
    "model.xray_size=128",
)


class BaselineTask(EnhancedTask):
    """:class:`EnhancedTask` (data, augmentation, loss, validation) with another network."""

    settings: tuple[str, ...]  # of the configuration's ``model`` that the network has

    def impossible_losses(self) -> dict[str, str]:
        return {
            "multiscale": "a baseline predicts no volumes of lower resolution",
            "layout": "a baseline predicts no layout",
        }

    def model_config(self) -> dict:
        return {name: getattr(self.config.model, name) for name in self.settings}


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


class X2CTTask(BaselineTask):
    """Trains :class:`X2CTGenerator`."""

    kind, network = "x2ct_generator", X2CTGenerator
    settings = ("volume_size", "base_channels", "xray_size", "activation_checkpointing")


class MeanTask(BaselineTask):
    """Fills :class:`MeanVolume` with the training patients' mean.

    In closed form: of all volumes that ignore the X-rays, the voxel-wise mean has the least squared error on the
    training patients, so gradient steps could only approach it. Not augmented: patients that are scored lie as they do.
    """

    kind, network = "mean_volume", MeanVolume
    settings = ("volume_size", "xray_size")

    def build_model(self) -> MeanVolume:
        model = super().build_model()
        assert isinstance(model, MeanVolume)
        with torch.no_grad():
            model.volume[0] = mean_volume(self.train_data)
        return model


TASKS = {"unet": UNetTask, "x2ct": X2CTTask, "mean": MeanTask}


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.training_parser(__doc__, "config_enhanced.json", DEFAULT_OUTPUT)
    parser.add_argument(
        "baseline",
        choices=TASKS,
        help="unet: the lifting U-Net; x2ct: X2CT-GAN's generator; mean: the mean training volume",
    )
    args = parser.parse_args(argv)
    if args.output == DEFAULT_OUTPUT:
        args.output = f"checkpoints_{args.baseline}"
    return args


def read_config(args) -> EnhancedConfig:
    """The configuration a command line describes, with the baselines' loss; no other part differs from stage 1's."""
    path = resolve_config_path(args.config, "config_enhanced.json")
    preset = [*LOSS, *(X2CT if args.baseline == "x2ct" else ()), "model.transformer_blocks=0"]
    config = cli.read_config(EnhancedConfig, args, path, preset)
    blocks = config.model.transformer_blocks
    if blocks:
        raise InputError(f"model.transformer_blocks is {blocks}; a baseline has no attention: expected 0")
    if config.model.seen_channel:
        raise InputError("model.seen_channel is true; a baseline reads pixels alone: expected false")
    if config.model.passes > 1:
        raise InputError(f"model.passes is {config.model.passes}; a baseline has a single pass: expected 1")
    if config.model.upsampling != "trilinear":
        raise InputError(f"model.upsampling is {config.model.upsampling}; a baseline has its own: expected trilinear")
    if config.model.layout_head != "off":
        raise InputError(f"model.layout_head is {config.model.layout_head}; a baseline has no such head: expected off")
    if args.baseline == "mean":
        config.data.xray_source = "files"  # volumes as they are, at the model's resolution
    return config


def save_mean(args: argparse.Namespace, config: EnhancedConfig) -> int:
    """Write the mean volume's checkpoint and its validation scores; returns the exit status.

    Raises :class:`InputError` when the output folder holds a ``best_model.pt`` of another network, data or settings.
    """
    output = Path(args.output)
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
            cli.run_context(args, config, output, processes, task.train_data.split_hash),
        ):
            if best.exists():
                check_same_run(best, load_checkpoint(best, kind=MeanTask.kind), task.header(), config)
            if processes.is_main:
                write_json(output / "config.json", config_dict(config))
            with monitors_from(args, config_dict(config), output, processes) as monitors:
                _validate_and_save(Trainer(model, task, config, output, processes, monitors))
    return 0


def _validate_and_save(trainer: Trainer) -> None:
    """What the trainer does at the end of an epoch, without the epoch: validate, log, save."""
    trainer.epoch = 0
    trainer.monitors.start(0)
    metrics = trainer.validate()
    trainer.log("validation", **metrics)
    trainer.monitors.pictures(trainer.task.samples, 0)
    path = trainer.save_best(metrics)
    if trainer.processes.is_main:
        print(f"{path}: PSNR {metrics['psnr']:.2f} dB on {metrics['patients']} validation patients")


def main(argv=None) -> int:
    args = parse_args(argv)
    config = read_config(args)
    if args.baseline == "mean":
        if args.init:
            raise InputError(f"--init {args.init}: the mean volume is not trained; expected it with unet or x2ct")
        cli.check_before_launch(args, config)
        return save_mean(args, config)
    return cli.start(args, config, TASKS[args.baseline])


if __name__ == "__main__":
    run_cli(main)
