"""Smoke test before a long training: both stages, losses, precision, memory, devices and your data, one line each.

    python test_enhanced.py                                   # under 2 minutes on two CPU cores
    python test_enhanced.py --data data/prepared              # also the first patients of every split
    python test_enhanced.py --config configs/cpu.json --set training.batch_size=2

Exit status 0 when everything is ok, 1 when a line says FAIL. The unit tests are in tests/.
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dataset import PatientDataset
from losses import EnhancedLoss
from model_enhanced import EnhancedDirectModel, RefinementNetwork
from xray2ct.command_line import Parser
from xray2ct.data.augment import PairMaker
from xray2ct.data.splits import SPLITS
from xray2ct.files import InputError, counted, run_cli
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import MU_WATER, Geometry, hu_to_unit, line_integrals, render_xrays
from xray2ct.models.blocks import upsample
from xray2ct.models.memory import choose_tile, process_peak_bytes
from xray2ct.training.config import EnhancedConfig, ModelConfig, config_dict, load_config, resolve_config_path
from xray2ct.training.precision import Precision, set_memory_format
from xray2ct.training.state import parameter_groups

PARAMETERS = (15e6, 20e6)  # of the default model
REFINEMENT_PARAMETERS = (5e6, 8e6)
PRECISION_TOLERANCE = 0.05  # bfloat16 has 8 bits: relative error 2^-9 a rounding, over some 60 layers
GRADIENT_TOLERANCE = 1e-4  # relative; recomputing may sum in another order
SPHERE_TOLERANCE = 0.02  # relative; a voxelised sphere of 40 voxels across
XRAY_TOLERANCE = 0.05  # relative; 8-bit files and a coarser volume stay below
PATIENTS = 3  # per split

# What a check may raise: each is a line that says FAIL, and the next check runs.
FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError)
FAILURES += (OSError, RuntimeError, TypeError, ValueError)


class CheckError(Exception):
    """A check found something wrong."""


def require(condition, message: str) -> None:
    if not condition:
        raise CheckError(message)


@dataclass
class Bench:
    """What the checks share."""

    config: EnhancedConfig
    device: torch.device
    geometry: Geometry
    data: str | None

    @property
    def model_settings(self) -> dict:
        return config_dict(self.config)["model"]

    def build_model(self, alive: bool = False, **changes) -> EnhancedDirectModel:
        """The configured model. alive: zero-initialised layers are drawn too, so that they hide nothing."""
        torch.manual_seed(self.config.training.seed)
        model = EnhancedDirectModel(**{**self.model_settings, **changes}, geometry=self.geometry)
        if alive:
            for parameter in model.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
        return set_memory_format(model.to(self.device), self.config.training.channels_last)

    def build_loss(self) -> EnhancedLoss:
        """The configured loss; VGG16 with random weights where its own are not on this machine yet."""
        settings = {k: v for k, v in config_dict(self.config)["loss"].items() if k != "use_scan_mask"}
        if settings["perceptual_weights"] == "imagenet" and not imagenet_weights().exists():
            settings["perceptual_weights"] = "random"
        return EnhancedLoss(**settings, acquisition=Acquisition(self.geometry)).to(self.device)

    def pair(self, size=None, xray_size=None) -> tuple[torch.Tensor, torch.Tensor]:
        """X-rays ``(1, 2, n, n)`` and volume ``(1, 1, D, H, W)`` of a thorax of three ellipsoids."""
        size, n = size or self.config.model.volume_size, xray_size or self.config.model.xray_size
        axes = [self.geometry.voxel_centres_mm(s, device=self.device) for s in size]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        hu = torch.where((y / 100) ** 2 + (x / 150) ** 2 < 1, 40.0, -1000.0)
        for side, half_width in ((-70, 50), (70, 45)):
            lung = (z / 120) ** 2 + (y / 75) ** 2 + ((x - side) / half_width) ** 2 < 1
            hu = torch.where(lung, -850.0, hu)
        volume = hu_to_unit(hu)[None, None]
        return render_xrays(volume, self.geometry, (n, n)).clamp(0, 1), volume


def imagenet_weights() -> Path:
    """Where torchvision keeps VGG16's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"


# ------------------------------------------------------------------------------------------------
# Checks: each returns what its line says, or raises


def check_environment(bench: Bench) -> str:
    device = f"CPU, {torch.get_num_threads()} threads"
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_name(bench.device)
    precision = Precision(bench.config.training.precision, bench.device).name
    return f"Python {platform.python_version()}, torch {torch.__version__}, {device}, {precision}"


def check_processes(bench: Bench) -> str:
    """Join a group of one and add up a tensor over it, as DistributedDataParallel does."""
    backend = "nccl" if bench.device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        value = torch.ones(3, device=bench.device)
        dist.all_reduce(value)
    finally:
        dist.destroy_process_group()
    require(value.sum().item() == 3, f"all_reduce over one process changed the values to {value.tolist()}")
    return f"{backend}, {counted(max(1, torch.cuda.device_count()), 'process', 'processes')} on this machine"


def check_parameters(bench: Bench) -> str:
    count = sum(p.numel() for p in bench.build_model().parameters())
    low, high = PARAMETERS
    if bench.config.model != ModelConfig():
        return f"{count / 1e6:.2f} M (changed by the configuration)"
    require(low <= count <= high, f"{count / 1e6:.2f} M; expected {low / 1e6:g} to {high / 1e6:g} M")
    return f"{count / 1e6:.2f} M"


def check_forward(bench: Bench) -> str:
    model, (xrays, target) = bench.build_model(alive=True), bench.pair()
    size = tuple(bench.config.model.volume_size)
    with torch.no_grad():
        volume, aux = model.eval()(xrays)
        same, _ = model(xrays.unsqueeze(2))
    require(volume.shape == target.shape, f"output {tuple(volume.shape)}; expected {tuple(target.shape)}")
    require(torch.isfinite(volume).all(), "output has NaN or infinity")
    require(volume.min() >= 0 and volume.max() <= 1, "output outside [0, 1]")
    require(torch.equal(volume, same), "(B, 2, 1, H, W) gives another output than (B, 2, H, W)")
    coarse = sorted(tuple(v.shape[2:]) for v in aux.values())
    expected = [tuple(n // d for n in size) for d in (4, 2)]
    require(coarse == expected, f"coarser outputs {coarse}; expected {expected}")
    return f"{tuple(xrays.shape)} -> {tuple(volume.shape)}"


def check_backward(bench: Bench) -> str:
    model, (xrays, target) = bench.build_model(alive=True), bench.pair()
    total, _ = bench.build_loss()(*_predict(model.train(), xrays, target), xrays=xrays)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    dead = [n for n, g in gradients.items() if g is None or not torch.isfinite(g).all() or not g.any()]
    require(not dead, f"no finite, non-zero gradient in {', '.join(dead[:5])} ({len(dead)} in all)")
    return f"all {len(gradients)} parameter tensors get a gradient"


def _predict(model, xrays, target):
    volume, aux = model(xrays)
    return volume, target, aux


def check_losses(bench: Bench) -> str:
    """Every loss, also those of weight 0: 0 for a perfect prediction, above 0 otherwise, with a gradient."""
    weights = "imagenet" if imagenet_weights().exists() else "random"
    criterion = EnhancedLoss(
        mse_weight=1.0, projection_weight=1.0, perceptual_weights=weights, acquisition=Acquisition(bench.geometry)
    ).to(bench.device)
    criterion.eval()  # the same slices each time
    _, target = bench.pair((32, 32, 32), 32)
    xrays = render_xrays(target, bench.geometry, (64, 64))  # as the projection loss renders 32^3
    prediction = (0.8 * target + 0.05).roll(2, dims=4).requires_grad_()
    exact, parts = (
        criterion(volume, target, aux={"volume_16": F.avg_pool3d(volume, 2)}, xrays=xrays)[1]
        for volume in (target, prediction)
    )
    for name, value in parts.items():
        (gradient,) = torch.autograd.grad(value, prediction, retain_graph=True)
        require(torch.isfinite(value) and value > 0, f"{name} of a wrong prediction is {value.item()}")
        require(torch.isfinite(gradient).all() and gradient.any(), f"{name} has no finite, non-zero gradient")
        require(abs(exact[name].item()) < 1e-4, f"{name} of a perfect prediction is {exact[name].item()}")
    loss, note = bench.config.loss, f"VGG16: {weights}"
    if weights == "random" and loss.perceptual_weight and loss.perceptual_weights == "imagenet":
        note += "; training downloads its weights, 528 MB"  # torchvision's file has 553,433,881 bytes
    return ", ".join(f"{k} {v.item():.3f}" for k, v in parts.items()) + f" ({note})"


def check_precision(bench: Bench) -> str:
    name = Precision(bench.config.training.precision, bench.device).name
    name = "bfloat16" if name == "float32" else name
    model, (xrays, _) = bench.build_model(alive=True).eval(), bench.pair()
    with torch.no_grad():
        exact, _ = model(xrays)
        with Precision(name, bench.device).autocast():
            mixed, _ = model(xrays)
    error = ((mixed.float() - exact).square().mean().sqrt() / exact.std()).item()
    text = f"{name} differs from float32 by {error:.2%} of the output's deviation"
    require(error < PRECISION_TOLERANCE, f"{text}; expected below {PRECISION_TOLERANCE:.0%}")
    return f"{text} (below {PRECISION_TOLERANCE:.0%})"


def check_checkpointing(bench: Bench) -> str:
    small = {"volume_size": [16, 16, 16], "xray_size": min(128, bench.config.model.xray_size)}
    xrays, target = bench.pair(small["volume_size"], small["xray_size"])
    gradients = []
    for switch in (False, True):
        model = bench.build_model(alive=True, activation_checkpointing=switch, **small).train()
        volume, _ = model(xrays)
        (volume - target).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    text = f"gradients differ by {error:.1e}"
    require(error < GRADIENT_TOLERANCE, f"{text}; expected below {GRADIENT_TOLERANCE:.0e}")
    return text


def check_renderer(bench: Bench, line_integrals=line_integrals) -> str:
    """A water sphere at the isocentre: every ray's integral is its chord times mu."""
    geometry, radius, size = bench.geometry, bench.geometry.fov_mm * 0.3, 65
    axis = geometry.voxel_centres_mm(size, device=bench.device)
    mu = MU_WATER * (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 <= radius**2).float()[None, None]
    image = line_integrals(mu, geometry, (size, size))[0]
    pixels = axis * geometry.detector_mm / geometry.fov_mm
    distance = torch.hypot(pixels[:, None], pixels)  # of the ray from the isocentre
    if geometry.kind == "cone":
        distance = geometry.sid_mm * distance / torch.hypot(distance, torch.tensor(geometry.sdd_mm))
    elif geometry.kind == "scout":  # each row's fan lies in its own plane
        distance = torch.hypot(pixels[:, None], pixels / (1 + (pixels / geometry.sid_mm) ** 2).sqrt())
    expected = 2 * MU_WATER * (radius**2 - distance**2).clamp_min(0).sqrt()
    error = ((image - expected).abs().mean() / expected.mean()).item()
    text = f"chords of a sphere within {error:.1%}"
    require(error < SPHERE_TOLERANCE, f"{text}; expected below {SPHERE_TOLERANCE:.0%}")
    return f"{text}, {geometry}"


def check_learning(bench: Bench) -> str:
    """A few steps on one pair, as configured: the loss must fall. Also times a step."""
    training = bench.config.training
    steps = 20 if bench.device.type == "cuda" else 3  # float16 skips the first ones while it finds its scale
    model, criterion = bench.build_model().train(), bench.build_loss()
    criterion.eval()  # the same slices at each step
    precision = Precision(training.precision, bench.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, training.weight_decay), lr=training.learning_rate)
    xrays, target = bench.pair()
    losses, started = [], 0.0
    for step in range(steps + 1):
        if step == 1:  # the first one also allocates
            started = time.monotonic()
        with precision.autocast():
            total, _ = criterion(*_predict(model, xrays, target), xrays=xrays)
        losses.append(total.item())
        optimizer.zero_grad(set_to_none=True)
        precision.scaler.scale(total).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
    seconds = (time.monotonic() - started) / steps
    text = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {steps} steps"
    require(losses[-1] < losses[0], f"{text}; expected it to fall")
    return f"{text} of {seconds:.2f} s ({precision.name}, batch 1)"


def check_memory(bench: Bench) -> str:
    """GPU: peak of a training step with the configured batch. CPU: peak of this process so far."""
    if bench.device.type != "cuda":
        peak = process_peak_bytes()
        return f"peak of this process {peak / 2**30:.2f} GB" if peak else "not told by this system"
    training = bench.config.training
    model, criterion = bench.build_model().train(), bench.build_loss()
    optimizer = torch.optim.AdamW(model.parameters())
    xrays, target = (t.expand(training.batch_size, *t.shape[1:]) for t in bench.pair())
    torch.cuda.reset_peak_memory_stats(bench.device)
    precision = Precision(training.precision, bench.device)
    for _ in range(2):  # the optimiser's state exists from the second step on
        with precision.autocast():
            total, _ = criterion(*_predict(model, xrays, target), xrays=xrays)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**30
    whole = torch.cuda.get_device_properties(bench.device).total_memory / 2**30
    return f"training step with batch {training.batch_size}: {peak:.2f} GB of {whole:.0f} GB"


def check_refinement(bench: Bench) -> str:
    """Stage 2 as configured by default: size, trilinear at the start, tiles that equal the whole, 64^3 -> 256^3."""
    torch.manual_seed(bench.config.training.seed)
    network = RefinementNetwork(guided=True, geometry=bench.geometry).to(bench.device).eval()
    count = sum(p.numel() for p in network.parameters())
    low, high = REFINEMENT_PARAMETERS
    require(low <= count <= high, f"{count / 1e6:.2f} M parameters; expected {low / 1e6:g} to {high / 1e6:g} M")
    xrays, small = bench.pair((8, 8, 8), 128)
    with torch.no_grad():
        require(torch.equal(network(small, xrays), upsample(small)), "untrained, it is not trilinear interpolation")
        torch.nn.init.normal_(network.out.weight, std=0.02)
        difference = (network.refine(small, xrays, tile=3) - network(small, xrays)).abs().max().item()
        require(difference < 1e-4, f"tiles differ from the whole volume by {difference:.1e}")
        size = bench.config.model.volume_size
        xrays, coarse = bench.pair(size, 512)
        tile = choose_tile(network, coarse.shape[2:], bench.device)
        with Precision(bench.config.training.precision, bench.device).autocast():
            fine = network.refine(coarse, xrays, tile)
    expected = (1, 1, *(network.scale * n for n in size))
    require(tuple(fine.shape) == expected, f"output {tuple(fine.shape)}; expected {expected}")
    require(torch.isfinite(fine).all() and fine.min() >= 0 and fine.max() <= 1, "output outside [0, 1] or not finite")
    how = f"in tiles of {tile}" if tile else "at once"
    return f"{count / 1e6:.2f} M parameters, {tuple(coarse.shape[2:])} -> {tuple(fine.shape[2:])} {how}"


def check_refinement_learning(bench: Bench) -> str:
    """A few steps of stage 2 on one patch: every parameter gets a gradient, the loss falls."""
    torch.manual_seed(bench.config.training.seed)
    network = RefinementNetwork(guided=True, geometry=bench.geometry).to(bench.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    xrays, truth = bench.pair((64, 64, 64), 256)
    coarse, losses = F.avg_pool3d(truth, 4), []
    for _ in range(4):
        refined = network(coarse, xrays, [[(4, 4, 4)]], patch=8, context=4)
        loss = F.l1_loss(refined, truth[:, :, 16:48, 16:48, 16:48])
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    require(not dead, f"no finite gradient in {', '.join(dead[:5])} ({len(dead)} in all)")
    text = f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses) - 1} steps on a patch of 32^3"
    require(losses[-1] < losses[0], f"{text}; expected it to fall")
    return text


def check_split(bench: Bench, split: str) -> str:
    """The first patients of a split: ranges, X-rays against rendered ones, and one augmented pair."""
    config = bench.config
    size, xray_size = config.model.volume_size[0], config.model.xray_size
    with tempfile.TemporaryDirectory() as cache:
        common = {"cache_dir": cache, "max_patients": PATIENTS, "xray_normalization": config.data.xray_normalization}
        data = PatientDataset(bench.data, split, size, xray_size, **common)
        fine = min(max(size, 128), data.cube_size)
        sources = PatientDataset(bench.data, split, fine, None, **common)
        worst = 0.0
        for index in range(len(data)):
            item, source = data[index], sources[index]["ct_volume"][None]
            _check_item(item, size, xray_size)
            rendered = data.acquisition.render(source, (xray_size, xray_size))[0]
            differences = (item["xrays"] - rendered).abs().mean(dim=(1, 2)) / rendered.mean(dim=(1, 2))  # per view
            worst = max(worst, differences.max().item())
        pairs = PairMaker(data.acquisition, (size,) * 3, xray_size, config.augment)
        batch = pairs(source.to(bench.device), torch.ones_like(source, device=bench.device), [0])
    require(all(torch.isfinite(v).all() for v in batch.values()), "an augmented pair has NaN or infinity")
    text = f"X-rays differ from rendered ones by {worst:.1%} at most"
    if data.has_manifest:
        require(worst < XRAY_TOLERANCE, f"{text}; expected below {XRAY_TOLERANCE:.0%}")
    return f"{counted(len(data), 'patient')} checked, {text}"


def _check_item(item, size, xray_size):
    cube = (1, size, size, size)
    expected = {"xrays": (2, xray_size, xray_size), "ct_volume": cube, "mask": cube}
    for name, shape in expected.items():
        value, patient = item[name], item["id"]
        require(tuple(value.shape) == shape, f"{patient}: {name} is {tuple(value.shape)}; expected {shape}")
        require(torch.isfinite(value).all(), f"{patient}: {name} has NaN or infinity")
        require(value.min() >= 0 and value.max() <= 1, f"{patient}: {name} outside [0, 1]")
        require(name == "mask" or value.std() > 0.01, f"{patient}: {name} is constant")
    require(item["mask"].any(), f"{item['id']}: the scan mask is empty")


# ------------------------------------------------------------------------------------------------
# Command line


def list_checks(bench: Bench) -> list[tuple[str, Callable[[Bench], str]]]:
    """``(name, check)`` in the order they run."""
    n = bench.config.model.xray_size
    checks = [
        ("environment", check_environment),
        ("processes", check_processes),
        ("renderer", check_renderer),
        ("parameters", check_parameters),
        (f"forward {n} x {n}", check_forward),
        (f"backward {n} x {n}", check_backward),
        ("losses", check_losses),
        ("mixed precision", check_precision),
        ("activation checkpointing", check_checkpointing),
        ("learning", check_learning),
        ("stage 2", check_refinement),
        ("stage 2 learning", check_refinement_learning),
        ("memory", check_memory),
    ]
    if bench.data:
        for split in SPLITS:
            checks.append((f"data: {split}", lambda bench, split=split: check_split(bench, split)))
    return checks


def run_checks(bench: Bench, checks: list[tuple[str, Callable[[Bench], str]]]) -> int:
    """Run all checks, a line each; returns how many failed."""
    failed = 0
    for name, check in checks:
        started = time.monotonic()
        try:
            word, detail = "ok  ", check(bench)
        except (CheckError, *FAILURES) as error:
            word, detail = "FAIL", str(error) or type(error).__name__
            failed += 1
        print(f"{word} {name:<26} {detail} ... {time.monotonic() - started:.1f} s", flush=True)
    print(f"{len(checks) - failed} of {len(checks)} checks ok")
    return failed


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", help="JSON settings (default: config_enhanced.json next to this script)")
    parser.add_argument("--data", help="data set to look at (default: none)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    return parser.parse_args(argv)


def main(argv=None, list_checks=list_checks) -> int:
    args = parse_args(argv)
    config = load_config(EnhancedConfig, resolve_config_path(args.config, "config_enhanced.json"), args.set)
    if args.data and not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: no such folder")
    geometry = PatientDataset(args.data, "all", config.model.volume_size[0], None).geometry if args.data else Geometry()
    bench = Bench(config, torch.device(args.device), geometry, args.data)
    return 1 if run_checks(bench, list_checks(bench)) else 0


if __name__ == "__main__":
    run_cli(main)
