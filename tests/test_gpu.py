"""What only a GPU can show: the same numbers as the CPU, float16 training, NCCL training by plain python."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_enhanced_4gpu
from losses import EnhancedLoss
from model_enhanced import RefinementNetwork
from tests.helpers.convolutions import PLAIN, spoiled
from tests.helpers.runs import build
from tests.helpers.tiny_data import TINY_REFINEMENT, largest_difference, make_checkpoint, make_dataset, make_model
from xray2ct.checkpoints import load_checkpoint
from xray2ct.data.augment import AugmentConfig, PairMaker
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.lifting import lift_features
from xray2ct.geometry.projector import Geometry, render_xrays
from xray2ct.inference.system import DirectSystem
from xray2ct.models.memory import available_memory
from xray2ct.models.normalisation import norm_silu
from xray2ct.models.upsampling import upsample_trilinear
from xray2ct.training.convolution_check import convolution_defect
from xray2ct.training.determinism import deterministic
from xray2ct.training.distributed import Processes
from xray2ct.training.trainer import fit

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


@pytest.mark.parametrize("precision", ["float16", "auto"])
def test_a_run_learns_in_mixed_precision(root, tmp_path, precision):
    config, task, model = build(root, f"training.precision={precision}", "training.num_epochs=6", "data.repeats=2")
    fit(model, task, config, tmp_path, Processes(device=torch.device("cuda", 0)))
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(event["gpu_memory_gib"] > 0 for event in events if event["event"] == "epoch")
    losses = [e["l1"] for e in events if e["event"] == "epoch"]
    assert losses[-1] < 0.8 * losses[0]


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


def test_patches_lifted_together_equal_the_cpu():
    torch.manual_seed(0)
    network = RefinementNetwork(**TINY_REFINEMENT).train()
    torch.nn.init.normal_(network.out.weight, std=0.05)
    coarse, xrays = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 64, 64)
    region = {"origins": [[(0, 0, 0), (8, 6, 2)]] * 2, "patch": 8, "context": 4}
    expected = network(coarse, xrays, **region)
    found = network.cuda()(coarse.cuda(), xrays.cuda(), **region).cpu()
    assert torch.allclose(found, expected, atol=5e-3)
