"""A tiny trained-looking cascade for the tests: 16^3 -> 32^3 from 32^2 X-rays, made in well under a second.

    folder = make_cascade(tmp_path / "cascade", root)       # config.json, low/best.pt, high/best.pt
    cascade = Cascade.load(folder)

``root`` is a data set of ``tiny_data.make_dataset``.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dataset import PatientDataset
from hybrid_vit_cascade.cascade import KIND
from hybrid_vit_cascade.models import CascadeStage
from xray2ct.checkpoints import save_checkpoint
from xray2ct.files import read_json, write_json

NAMES = ("low", "high")
SIZES = (16, 32)
NETWORK = {"voxel_dim": 32, "vit_depth": 1, "num_heads": 2, "use_depth_lifting": True}
# Settings of a whole training of two stages, three steps an epoch.
TINY = {
    "stages": [{"name": "low", "volume_size": 16, **NETWORK}, {"name": "high", "volume_size": 32, **NETWORK}],
    "xray_img_size": 32,
    "training": {
        "batch_size": 2,
        "num_epochs": 2,
        "learning_rate": 2e-3,
        "warmup_epochs": 0.5,
        "ema_decay": 0.9,
        "mixed_precision": False,
    },
    "data": {"repeats": 2},
    "conditioning": {"steps": 2},
    "augment": {"source_size": 32},
    "logging": {"log_interval": 1, "save_checkpoint_interval": 0},
    "world_size": 1,
}


def make_stage(index: int, num_views: int = 2, xray_size: int = 32, geometry=None, **settings) -> CascadeStage:
    """A stage in eval mode; its zero-initialised layers are drawn too, so that its inputs matter."""
    torch.manual_seed(index)
    stage = CascadeStage(
        volume_size=SIZES[index],
        conditioned=index > 0,
        xray_size=xray_size,
        num_views=num_views,
        geometry=geometry,
        **{**NETWORK, **settings},
    )
    for parameter in stage.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return stage.eval()


def make_cascade(
    folder, root, num_views: int = 2, prediction: str = "v", stages: int = 2, changes: dict | None = None
) -> Path:
    """Write the checkpoint folder of ``stages`` stages that fits the data set ``root``.

    changes: ``{stage index: {header key: other value}}``.
    """
    folder = Path(folder)
    data = PatientDataset(root, "train", read_json(Path(root) / "dataset.json")["cube_size"], None)
    config = {
        "stages": [{"name": n, "volume_size": s, **NETWORK} for n, s in zip(NAMES, SIZES)][:stages],
        "num_views": num_views,
        "xray_img_size": 32,
    }
    write_json(folder / "config.json", config)
    for index in range(stages):
        model = make_stage(index, num_views, geometry=data.geometry)
        checkpoint = {
            "kind": KIND,
            "model_state_dict": model.state_dict(),
            "stage_index": index,
            "stage_name": NAMES[index],
            "stage_names": list(NAMES[:stages]),
            "cascade_config": config,
            "stage_settings": model.settings,
            "prediction": prediction,
            "num_timesteps": 1000,
            "shift": 1.0 if index == 0 else 0.5,
            "num_views": num_views,
            "geometry": data.geometry.to_dict(),
            "hu_window": list(data.hu_window),
            "xray_scale": data.xray_scale,
            "xray_size": 32,
            "config": {"data": {"xray_normalization": "percentile"}},
            "epoch": 3,
            "step": 12,
            "metrics": {"psnr": 20.0},
            "split_hash": data.split_hash,
            "train_patients": list(data.ids),
        }
        save_checkpoint(folder / NAMES[index] / "best.pt", {**checkpoint, **(changes or {}).get(index, {})})
    return folder
