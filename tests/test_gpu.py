"""What only a GPU can show: the same numbers as the CPU, float16 training, NCCL training by plain python."""

import contextlib
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_enhanced_4gpu
from dataset import PatientDataset
from losses import EnhancedLoss
from model_enhanced import RefinementNetwork
from tests.helpers.convolutions import PLAIN, spoiled
from tests.helpers.runs import build
from tests.helpers.tiny_data import TINY_REFINEMENT, largest_difference, make_checkpoint, make_dataset, make_model
from xray2ct.checkpoints import load_checkpoint
from xray2ct.data import warp as warp_module
from xray2ct.data.augment import AugmentConfig, PairMaker, random_affine, random_displacement
from xray2ct.data.film_chain import FilmConfig
from xray2ct.data.sample_random import SampleRandom
from xray2ct.data.warp import DensityChange, SmoothWarp
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.lifting import lift_features
from xray2ct.geometry.projector import Geometry, line_integrals, render_xrays
from xray2ct.inference.system import DirectSystem
from xray2ct.models.memory import available_memory
from xray2ct.models.normalisation import norm_silu
from xray2ct.models.upsampling import upsample_trilinear
from xray2ct.training.config import DataConfig
from xray2ct.training.convolution_check import convolution_defect
from xray2ct.training.determinism import deterministic
from xray2ct.training.distributed import Processes
from xray2ct.training.feed import Feed
from xray2ct.training.plan import EpochPlan
from xray2ct.training.signals import SignalCatcher
from xray2ct.training.trainer import Trainer, fit

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can see")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("gpu") / "data")


def test_rendering_and_lifting_equal_the_cpu():
    volume, features = torch.rand(2, 1, 32, 32, 32), torch.rand(2, 2, 8, 16, 16)
    assert torch.allclose(
        render_xrays(volume.cuda(), Geometry(), (64, 64)).cpu(), render_xrays(volume, Geometry(), (64, 64)), atol=1e-4
    )
    lifted = lift_features(features.cuda(), Geometry(), (16, 16, 16)).cpu()
    assert torch.allclose(lifted, lift_features(features, Geometry(), (16, 16, 16)), atol=1e-4)


@pytest.mark.parametrize("geometry", [Geometry(), Geometry("scout"), Geometry("parallel")], ids=str)
@pytest.mark.parametrize(("shape", "size"), [((40, 24, 56), (70, 45)), ((33, 65, 17), (16, 130))])
def test_triton_renderer_and_its_adjoint_equal_the_dense_products(geometry, shape, size):
    pytest.importorskip("triton")
    volume, weight = torch.rand(3, 1, *shape, device="cuda", requires_grad=True), torch.rand(3, 2, *size, device="cuda")
    images = [line_integrals(volume, geometry, size, backend) for backend in ("dense", "triton", "triton")]
    gradients = [torch.autograd.grad((image * weight).sum(), volume)[0] for image in images]
    for dense, kernels, again in (images, gradients):
        assert torch.allclose(
            kernels, dense, rtol=1e-3, atol=2e-3 * dense.max().item()
        )  # TF32 may be on in the products
        assert torch.equal(kernels, again)


def test_the_model_equals_the_cpu():
    model, xrays = make_model(), torch.rand(1, 2, 64, 64)
    with torch.no_grad():
        expected = model(xrays)[0]
        found = model.cuda()(xrays.cuda())[0].cpu()
    assert torch.allclose(found, expected, atol=5e-3)  # TF32 may be on in the convolutions


@pytest.mark.parametrize("tile", [None, 5])
def test_the_refinement_equals_the_cpu(tile):
    torch.manual_seed(0)
    network = RefinementNetwork(**TINY_REFINEMENT).eval()
    torch.nn.init.normal_(network.out.weight, std=0.05)
    coarse, xrays = 0.4 + 0.2 * torch.rand(1, 1, 16, 16, 16), torch.rand(1, 2, 64, 64)
    expected = network.refine(coarse, xrays)
    found = network.cuda().refine(coarse.cuda(), xrays.cuda(), tile, device="cpu")
    assert torch.allclose(found, expected, atol=5e-3)


def test_free_memory_of_the_gpu_is_known():
    free = available_memory(torch.device("cuda"))
    assert 2**28 < free <= torch.cuda.get_device_properties(0).total_memory


def test_losses_equal_the_cpu():
    criterion = EnhancedLoss(perceptual_weights="random").eval()
    prediction, target = torch.rand(1, 1, 32, 32, 32), torch.rand(1, 1, 32, 32, 32)
    aux = {"volume_16": torch.rand(1, 1, 16, 16, 16)}
    _, expected = criterion(prediction, target, aux)
    _, found = criterion.cuda()(prediction.cuda(), target.cuda(), {k: v.cuda() for k, v in aux.items()})
    assert "multiscale" in expected
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-2), name


def test_pairs_equal_the_cpu():
    volume = torch.rand(1, 1, 32, 32, 32)
    pairs = PairMaker(Acquisition(), (16, 16, 16), 32, AugmentConfig(source_size=32))
    one, other = pairs(volume, torch.ones_like(volume), [3]), pairs(volume.cuda(), torch.ones_like(volume).cuda(), [3])
    assert torch.allclose(one["ct_volume"], other["ct_volume"].cpu(), atol=1e-3)
    assert torch.allclose(one["xrays"], other["xrays"].cpu(), atol=1e-3)


def test_films_equal_the_cpu():
    config = AugmentConfig(source_size=32, film=FilmConfig(probability=1.0))
    maker, volumes = PairMaker(Acquisition(), (16, 16, 16), 64, config), torch.rand(2, 1, 32, 32, 32)
    found, expected = maker(volumes.cuda(), None, [1, 2]), maker(volumes, None, [1, 2])
    differs = (found["xrays"].cpu() - expected["xrays"]).abs() > 1e-2  # a pixel may fall on the other side of an edge
    assert differs.float().mean() < 0.01


def test_the_warps_kernel_works_and_equals_the_cpu():
    """Also at a size that fills whole tiles, and one that does not."""
    kernel = warp_module._kernel(CUDA)
    assert kernel is not None, "the Triton kernel does not work here"
    for shape in ((32, 32, 128), (9, 21, 130)):
        random, config = SampleRandom([3, 4]), AugmentConfig(elastic_mm=20.0)
        theta, moved = random_affine(config, 360.0, random), random_displacement(config, 360.0, random)
        change = DensityChange(random.uniform("a", (1,) * 4, -0.3, 0.3), random.uniform("b", (1,) * 4, -0.1, 0.1), 0.01)
        volumes = random.uniform("volume", (1, *shape)).mul(65535).round().to(torch.uint16)
        expected = SmoothWarp(theta, moved, shape).sample(volumes, change)
        warp = SmoothWarp(theta.cuda(), moved.cuda(), shape)
        found = warp.sample(volumes.cuda(), DensityChange(change.stretch.cuda(), change.offset.cuda(), change.air))
        assert torch.allclose(found.cpu(), expected, atol=1e-4)


@contextlib.contextmanager
def not_waiting():
    """What waits for the GPU is an error within the block."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_making_pairs_does_not_wait_for_the_gpu():
    volumes = torch.empty(2, 1, 32, 32, 32, dtype=torch.uint16, device="cuda")
    masks = torch.ones(2, 1, 32, 32, 32, dtype=torch.uint8, device="cuda")
    config = AugmentConfig(source_size=32, xray_gain=0.1, film=FilmConfig(probability=1.0))
    pairs = PairMaker(Acquisition(), (16, 16, 16), 32, config)
    pairs(volumes, masks, [3, 4])  # kernels are compiled and tried
    with not_waiting():
        pairs(volumes, masks, [3, 4])


@pytest.mark.parametrize("setting", ["on", "off"])
def test_samples_on_the_gpu_are_those_of_the_files(root, setting):
    data, run = PatientDataset(root, "train", 16, None, raw=True), EpochPlan(3, 4, 2, 1, Processes(), seed=1)
    plain = list(Feed(data, DataConfig(), Processes()).start(run, 1, 0, 2))
    with contextlib.closing(Feed(data, DataConfig(device_cache=setting), Processes(device=CUDA))) as feed:
        found = list(feed.start(run, 1, 0, 2))
    assert (feed.cache is not None) == (setting == "on")
    assert len(found) == len(plain) == 12
    for one, other in zip(found, plain):
        assert one["id"] == other["id"]
        assert one["position"].tolist() == other["position"].tolist()
        assert one["ct_volume"].device.type == "cuda"
        assert torch.equal(one["ct_volume"].cpu().view(torch.int16), other["ct_volume"].view(torch.int16))
        assert torch.equal(one["mask"].cpu(), other["mask"])


def test_reading_ahead_does_not_wait_for_the_gpu(root):
    data, run = PatientDataset(root, "train", 16, None, raw=True), EpochPlan(3, 4, 2, 1, Processes(), seed=1)
    feed = Feed(data, DataConfig(device_cache="off"), Processes(device=CUDA))
    with contextlib.closing(feed), not_waiting():
        assert len([batch["ct_volume"].float().mul_(2.0) for batch in feed.start(run, 1, 0, 2)]) == 12


@pytest.mark.parametrize("precision", ["float16", "auto"])
def test_a_run_learns_in_mixed_precision(root, tmp_path, precision):
    config, task, model = build(root, f"training.precision={precision}", "training.num_epochs=6", "data.repeats=2")
    fit(model, task, config, tmp_path, Processes(device=torch.device("cuda", 0)))
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(event["gpu_memory_gib"] > 0 for event in events if event["event"] == "epoch")
    losses = [e["l1"] for e in events if e["event"] == "epoch"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("precision", ["float16", "auto"])
def test_a_step_does_not_wait_for_the_gpu(root, tmp_path, precision):
    """Making the batch included."""
    config, task, model = build(root, f"training.precision={precision}", "data.repeats=2", "loss.edge_weight=0.1")
    trainer = Trainer(model, task, config, tmp_path, Processes(device=torch.device("cuda", 0)))
    raw = list(trainer.loader(trainer.plan.order(1), trainer.plan.batches(0), workers=0))
    trainer.model.train()
    trainer.step(iter(raw))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(iter(raw))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.collect(SignalCatcher()).losses["loss"] > 0


def test_a_gpu_computes_as_much_of_a_step_at_once_as_fits(root, tmp_path):
    config, task, model = build(root, "world_size=4", "training.num_epochs=1")
    fit(model, task, config, tmp_path, Processes(device=torch.device("cuda", 0)))
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["samples"], e["share"]) for e in events if e["event"] == "micro_batch"] == [(4, 4)]


def test_convolutions_in_reduced_precision_are_right_or_the_run_falls_back(root, tmp_path, capsys):
    """The shapes of a tiny run; ``python -m tools.environment`` does those of the default configurations."""
    config, task, model = build(root, "training.precision=bfloat16", "training.num_epochs=1")
    fit(model, task, config, tmp_path, Processes(device=torch.device("cuda", 0)))
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ("precision" in events) == ("convolutions are wrong here" in capsys.readouterr().out)


def test_a_wrong_convolution_is_noticed_on_the_gpu():
    wrong = functools.partial(spoiled, "output")
    assert "output" in convolution_defect(PLAIN, torch.bfloat16, "cuda", wrong)
    assert convolution_defect(PLAIN, torch.bfloat16, "cuda", functools.partial(spoiled, None)) is None


def test_a_deterministic_run_repeats_up_to_the_operations_it_names(root, tmp_path):
    """Bit for bit when it names none; those that it names add up in another order."""

    def run(output):
        config, task, model = build(root, "training.num_epochs=2", "training.precision=float32")
        with deterministic() as unsafe:
            fit(model, task, config, output, Processes(device=torch.device("cuda", 0)))
        return load_checkpoint(output / "last.pt")["training_state"]["model"], unsafe

    (one, unsafe), (other, _) = run(tmp_path / "one"), run(tmp_path / "other")
    assert largest_difference(one, other) <= (1e-2 if unsafe else 0.0)


def test_plain_python_uses_the_gpus_there_are(root, tmp_path, capfd):
    options = ["--data", str(root), "--output", str(tmp_path / "out"), "--set", "loss.perceptual_weight=0"]
    options += ["--set", "training.num_epochs=1", "--set", "training.batch_size=1", "--dry-run"]
    assert train_enhanced_4gpu.main(options) == 0
    count = min(4, torch.cuda.device_count())
    assert f"Processes: {count} on cuda" in capfd.readouterr().out


def test_upsampling_by_matrices_and_norms_in_bfloat16_equal_the_cpu():
    x, norm = torch.randn(2, 16, 8, 8, 8), nn.GroupNorm(4, 16)
    expected = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    assert torch.allclose(upsample_trilinear(x.cuda(), (16, 16, 16)).cpu(), expected, atol=1e-5)
    expected = F.silu(norm(x))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = norm_silu(x.cuda().bfloat16(), norm.cuda())
    assert found.dtype == torch.bfloat16
    assert (found.float().cpu() - expected).abs().max() < 0.05


def test_checked_precision_predicts_what_float32_does_and_the_volume_comes_back_pinned(root, tmp_path):
    base, xrays = make_checkpoint(tmp_path / "base.pt", root), torch.rand(1, 2, 64, 64)
    system = DirectSystem(base, device="cuda", precision="checked")
    found, expected = system.predict(xrays), DirectSystem(base, device="cpu").predict(xrays)
    assert found.device.type == "cpu"
    assert found.is_pinned()
    assert (found - expected).abs().max() < 0.02


def test_a_compiled_system_predicts_what_a_plain_one_does_for_each_pair(root, tmp_path):
    base, pairs = make_checkpoint(tmp_path / "base.pt", root), torch.rand(3, 1, 2, 64, 64)
    plain, graphs = (DirectSystem(base, device="cuda", compiled=compiled) for compiled in (False, True))
    found = [graphs.predict(xrays) for xrays in pairs]  # kept while the graph runs again
    for volume, xrays in zip(found, pairs):
        assert torch.allclose(volume, plain.predict(xrays), atol=1e-3)


def test_patches_lifted_together_equal_the_cpu():
    torch.manual_seed(0)
    network = RefinementNetwork(**TINY_REFINEMENT).train()
    torch.nn.init.normal_(network.out.weight, std=0.05)
    coarse, xrays = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 64, 64)
    region = {"origins": [[(0, 0, 0), (8, 6, 2)]] * 2, "patch": 8, "context": 4}
    expected = network(coarse, xrays, **region)
    found = network.cuda()(coarse.cuda(), xrays.cuda(), **region).cpu()
    assert torch.allclose(found, expected, atol=5e-3)
