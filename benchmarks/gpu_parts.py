"""What benchmarks/gpu.py measures, one function for each part."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.bench import Bench
from benchmarks.cascade_speed import random_batch
from hybrid_vit_cascade.cascade import Stage
from hybrid_vit_cascade.models import CascadeStage
from hybrid_vit_cascade.settings import load_cascade_config, stage_run
from hybrid_vit_cascade.training.task import StageLoss, stage_arguments
from losses import EnhancedLoss
from model_enhanced import EnhancedDirectModel, RefinementNetwork
from xray2ct.data.augment import AugmentConfig, PairMaker
from xray2ct.data.phantoms import encode, make_phantom
from xray2ct.data.prepare_folder import Splitter, prepare_folder
from xray2ct.files import write_json
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.nanodrr_backend import render_xrays_nanodrr
from xray2ct.geometry.projector import HU_WINDOW, MU_WATER, XRAY_SCALE, Geometry, line_integrals, render_xrays
from xray2ct.models.baselines import LiftingUNet
from xray2ct.training.config import EnhancedConfig, load_config
from xray2ct.training.direct_task import EnhancedTask
from xray2ct.training.distributed import Processes
from xray2ct.training.precision import set_memory_format
from xray2ct.training.trainer import fit

ROOT = Path(__file__).parent.parent
CASCADES = ROOT / "hybrid_vit_cascade" / "config"
SMALL_MODEL = {"volume_size": [16] * 3, "base_channels": 16, "xray_size": 64, "stem_stride": 1}
SMALL_REFINEMENT = {"channels": 16, "growth": 8, "rrdb_blocks": 1, "head_channels": (16, 8, 2)}
SMALL_STAGE = {"voxel_dim": 32, "vit_depth": 1, "num_heads": 2}
SMALL_CASCADE = {
    "stages": [{"name": "low", "volume_size": 16, **SMALL_STAGE}, {"name": "high", "volume_size": 32, **SMALL_STAGE}],
    "xray_img_size": 32,
}


def noise(bench: Bench, *shape) -> torch.Tensor:
    return torch.rand(shape, device=bench.device)


def laid_out(bench: Bench, network):
    """On the device, in the memory format that is fastest there."""
    network = network.to(bench.device)
    return network if bench.device.type == "cuda" else set_memory_format(network)


def stepping(bench: Bench, network, loss):
    """A function that runs a whole training step; ``loss()`` computes it under autocast."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=bench.device.type == "cuda")

    def step():
        with bench.precision.autocast():
            total = loss()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return step


def renderer(bench: Bench) -> None:
    """Both views, forward and with the backward pass; every geometry, the dense products, nanodrr."""
    cone = Geometry()
    beams = {"cone": cone, "scout": Geometry("scout"), "parallel": Geometry("parallel")}
    ways = {name: lambda v, size, g=geometry: line_integrals(v, g, size) for name, geometry in beams.items()}
    ways["cone, dense products"] = lambda v, size: line_integrals(v, cone, size, "dense")
    if find_spec("nanodrr"):
        ways["cone, nanodrr"] = lambda v, size: render_xrays_nanodrr(v, cone, size)
    for cube, edge, batch in bench.pick([(128, 256, 16), (256, 512, 1), (256, 512, 4)], [(8, 12, 1)]):
        volume = noise(bench, batch, 1, cube, cube, cube).requires_grad_()
        for name, render in ways.items():

            def forward(render=render, volume=volume, edge=edge):
                with torch.no_grad():
                    render(volume, (edge, edge))

            def both(render=render, volume=volume, edge=edge):
                volume.grad = None
                render(volume, (edge, edge)).mean().backward()

            sizes = f"{cube}^3 -> {edge}^2, {name}"
            bench.measure("renderer", f"{sizes}, forward", batch, forward, 0.3)
            bench.measure("renderer", f"{sizes}, forward + backward", batch, both, 0.3)


def _networks(bench: Bench) -> dict:
    settings = bench.pick({}, SMALL_MODEL)
    return {"stage 1": EnhancedDirectModel(**settings), "plain lifting U-Net": LiftingUNet(**settings)}


def network(bench: Bench) -> None:
    """Stage 1 and the plain lifting U-Net without loss: forward, forward + backward."""
    edge = bench.pick(512, 64)
    for name, model in _networks(bench).items():
        model = laid_out(bench, model)
        for batch in bench.pick((1, 16), (1,)):
            xrays = noise(bench, batch, 2, edge, edge)

            def forward(model=model, xrays=xrays):
                with torch.inference_mode(), bench.precision.autocast():
                    model.eval()(xrays)

            def loss(model=model, xrays=xrays):
                volume, aux = model.train()(xrays)
                return volume.float().square().mean() + sum(v.float().square().mean() for v in aux.values())

            def both(model=model, loss=loss):
                with bench.precision.autocast():
                    total = loss()
                model.zero_grad(set_to_none=True)
                total.backward()

            bench.measure("network", f"{name}, forward, {bench.precision.name}", batch, forward)
            bench.measure("network", f"{name}, forward + backward, {bench.precision.name}", batch, both)


def step(bench: Bench) -> None:
    """Rendering, forward, all losses, backward, AdamW; the plain lifting U-Net has no coarser volumes to supervise."""
    perceptual = bench.pick({"perceptual_weights": "random"}, {"perceptual_weight": 0})
    for name, model in _networks(bench).items():
        model = laid_out(bench, model).train()
        supervised = {} if name == "stage 1" else {"multiscale_weight": 0}
        criterion = EnhancedLoss(**perceptual, **supervised).to(bench.device)
        for batch in bench.pick((4, 8, 16), (1,)) if name == "stage 1" else bench.pick((16,), (1,)):
            target = noise(bench, batch, 1, *model.volume_size)

            def loss(model=model, criterion=criterion, target=target):
                edge = bench.pick(512, 64)
                volume, aux = model(render_xrays(target, model.geometry, (edge, edge)))
                return criterion(volume, target, aux=aux)[0]

            bench.measure("step", f"{name}, all losses", batch, stepping(bench, model, loss), 2.0)


def stage2(bench: Bench) -> None:
    """Training steps of the guided refinement: full volumes, with checkpointing, two patches a volume."""
    perceptual = bench.pick({"perceptual_weights": "random"}, {"perceptual_weight": 0})
    criterion = EnhancedLoss(ssim_weight=0, multiscale_weight=0, **perceptual).to(bench.device)
    coarse_edge, xray_edge, batch = bench.pick((64, 512, 2), (8, 64, 1))
    fine, patch = 4 * coarse_edge, coarse_edge // 2
    coarse, xrays = noise(bench, batch, 1, *[coarse_edge] * 3), noise(bench, batch, 2, xray_edge, xray_edge)
    whole = noise(bench, batch, 1, *[fine] * 3)
    cut = whole[..., : 4 * patch, : 4 * patch, : 4 * patch].repeat_interleave(2, 0)
    patches = {"origins": [[(0, 0, 0), (patch // 2,) * 3]] * batch, "patch": patch}
    cases = {
        f"full {fine}^3": (False, {}, whole),
        f"full {fine}^3, activation checkpointing": (True, {}, whole),
        f"two patches of {4 * patch}^3": (False, patches, cut),
    }
    for name, (checkpointing, region, target) in cases.items():
        settings = {"activation_checkpointing": checkpointing, **bench.pick({}, SMALL_REFINEMENT)}
        model = laid_out(bench, RefinementNetwork(guided=True, **settings)).train()

        def loss(model=model, region=region, target=target):
            return criterion(model(coarse, xrays, **region), target)[0]

        bench.measure("stage2", f"step, {name}", batch, stepping(bench, model, loss), 2.0)


def inference(bench: Bench) -> None:
    """X-rays to the finest volume by both stages, and its way to the CPU as reconstruct.py does it."""
    base = laid_out(bench, EnhancedDirectModel(**bench.pick({}, SMALL_MODEL))).eval()
    fine = laid_out(bench, RefinementNetwork(guided=True, **bench.pick({}, SMALL_REFINEMENT))).eval()
    torch.nn.init.normal_(fine.out.weight, std=0.01)
    edge = bench.pick(512, 64)
    xrays = noise(bench, 1, 2, edge, edge)

    def predict():
        with torch.inference_mode(), bench.precision.autocast():
            fine.refine(base(xrays)[0].float(), xrays, None, device="cpu")

    what = f"X-rays -> {4 * base.volume_size[0]}^3 on the CPU, {bench.precision.name}"
    bench.measure("inference", what, 1, predict)


def cascade(bench: Bench) -> None:
    """Training steps of the cascade's stages, and one sampling step of each."""
    cases = bench.pick(
        [("quick_2stage", 0, 8), ("quick_2stage", 1, 2), ("progressive_3stage", 2, 1), ("progressive_3stage", 2, 8)],
        [("small", 0, 1), ("small", 1, 1)],
    )
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "small.json", SMALL_CASCADE)
        for name, index, batch in cases:
            config = load_cascade_config(str((Path(folder) if bench.small else CASCADES) / f"{name}.json"), [])
            _stage(bench, f"{name}, stage {index + 1}", config, index, batch)


def _stage(bench: Bench, name: str, config, index: int, batch: int) -> None:
    run = stage_run(config, index, world_size=1)
    model = laid_out(bench, CascadeStage(**stage_arguments(config, index))).train().requires_grad_(True)
    criterion, made = StageLoss(run, Acquisition(model.geometry)), random_batch(run, batch, bench.device)
    step = stepping(bench, model, lambda: criterion(model, made)[0])
    bench.measure("cascade", f"{name}, training step", batch, step, 1.5)
    stage = Stage(run.stage.name, model.eval(), criterion.schedule, run.prediction)
    one = random_batch(run, 1, bench.device)
    with torch.no_grad(), bench.precision.autocast():
        condition = model.encode(one["xrays"], one.get("previous"))

    def sample():
        with bench.precision.autocast():
            stage.generate(condition, one["noise"], 1)

    bench.measure("cascade", f"{name}, sampling step", 1, sample, 0.5)


def augment(bench: Bench) -> None:
    """Augmentation and rendering of pairs from volumes on the device."""
    target, edge = bench.pick((64, 512), (8, 32))
    for source, batch in bench.pick([(128, 16), (256, 4)], [(16, 2)]):
        pairs = PairMaker(Acquisition(), (target,) * 3, edge, AugmentConfig(source_size=source))
        volumes = (65535 * noise(bench, batch, 1, *[source] * 3)).to(torch.int32).to(torch.uint16)
        masks = torch.ones(volumes.shape, dtype=torch.uint8, device=bench.device)
        seeds = list(range(batch))
        bench.measure("augment", f"{source}^3 source", batch, lambda m=pairs, v=volumes, k=masks, s=seeds: m(v, k, s))


def loader(bench: Bench) -> None:
    """The real training on phantoms, loading and augmenting included: samples/s of the second of two epochs."""
    if bench.seconds_left <= 0:
        bench.record(part="loader", what="training", skipped="deadline")
        return
    cube, edge, patients, batch = bench.pick((256, 512, 3, 16), (32, 64, 3, 2))
    settings = ["world_size=1", f"training.batch_size={batch}", "training.num_epochs=2", "training.warmup_epochs=0"]
    settings += [f"data.repeats={bench.pick(320, 4)}", "loss.perceptual_weights=random", "training.ema_decay=0.9"]
    if bench.small:
        settings += [f"model.{key}={json.dumps(value)}" for key, value in SMALL_MODEL.items()]
        settings += ["loss.perceptual_weight=0", "augment.source_size=32", "model.transformer_blocks=1"]
    with tempfile.TemporaryDirectory() as folder:
        data = _phantoms(Path(folder), cube, edge, patients, 3.0 if not bench.small else 12.0)
        config = load_config(
            EnhancedConfig, str(ROOT / "config_enhanced.json"), [*settings, f"data.dataset_path={data}"]
        )
        task = EnhancedTask(config, Processes(device=bench.device))
        fit(task.build_model(), task, config, Path(folder) / "run", Processes(device=bench.device))
        lines = (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [event for event in map(json.loads, lines) if event["event"] == "epoch"]
    speed = epochs[-1]["samples_per_second"]
    memory = {"peak_gib": epochs[-1]["gpu_memory_gib"]} if "gpu_memory_gib" in epochs[-1] else {}
    what = f"training from {config.augment.source_size}^3, all losses"
    ms = round(1e3 * batch / speed, 2)
    bench.record(part="loader", what=what, batch=batch, ms=ms, samples_per_second=round(speed, 2), **memory)


def _phantoms(folder: Path, cube: int, edge: int, patients: int, spacing_mm: float) -> Path:
    """A prepared data set of phantoms: one to train, one to validate, one to test."""
    names = [f"phantom_{index}" for index in range(patients)]
    (folder / "cts").mkdir()
    for index, name in enumerate(names):
        (folder / "cts" / f"{name}.nii.gz").write_bytes(encode(*make_phantom(0, index, spacing_mm)))
    write_json(folder / "split.json", {"train": names[:-2], "val": names[-2:-1], "test": names[-1:]})
    settings = {
        "geometry": Geometry().to_dict(),
        "hu_window": list(HU_WINDOW),
        "mu_water": MU_WATER,
        "xray_scale": XRAY_SCALE,
        "cube_size": cube,
        "xray_size": edge,
        "couch_removed": False,
        "assume_ras": False,
    }
    prepare_folder(folder / "cts", folder / "data", settings, Splitter(folder / "split.json", 0.1, 0.1, 0), 1, False)
    return folder / "data"


PARTS = {
    "renderer": renderer,
    "network": network,
    "step": step,
    "stage2": stage2,
    "cascade": cascade,
    "inference": inference,
    "augment": augment,
    "loader": loader,
}
