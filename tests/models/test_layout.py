"""Layout: regions by HU against values by hand, cross-entropy against torch's, and what the head changes (little)."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import EnhancedLoss, layout_loss
from model_enhanced import EnhancedDirectModel
from tests.helpers.runs import build
from tests.helpers.tiny_data import TINY_MODEL, make_dataset, make_hu
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import HU_WINDOW, hu_to_unit
from xray2ct.models.layout import REGIONS, layout_of

HU = {"air": -1000.0, "lung": -800.0, "fat": -100.0, "soft tissue": 40.0, "bone": 700.0}
LAYOUT_ONLY = {f"{name}_weight": 0.0 for name in ("l1", "ssim", "perceptual", "edge", "multiscale")}


def volume_of(*names):
    """One voxel a tissue, along W."""
    return hu_to_unit(torch.tensor([HU[name] for name in names])).view(1, 1, 1, 1, -1)


def test_typical_tissues_fall_into_their_regions():
    shares = layout_of(volume_of(*REGIONS), HU_WINDOW, (1, 1, 5))
    assert torch.equal(shares[0, :, 0, 0], torch.eye(5))


def test_a_cell_across_an_edge_holds_its_regions_shares():
    shares = layout_of(volume_of("bone", "lung", "lung", "lung", "air", "air", "air", "air"), HU_WINDOW, (1, 1, 2))
    assert torch.allclose(shares[0, :, 0, 0].T, torch.tensor([[0, 0.75, 0, 0, 0.25], [1.0, 0, 0, 0, 0]]))


def test_boundaries_outside_the_window_leave_regions_empty():
    """In a window of -500 to 100 HU nothing is told from lung below, nor from soft tissue above."""
    window = (-500.0, 100.0)
    hu = torch.tensor([-1000.0, -450.0, -100.0, 40.0, 700.0])
    shares = layout_of(hu_to_unit(hu, window).view(1, 1, 1, 1, 5), window, (1, 1, 5))
    assert shares[0, :, 0, 0].argmax(0).tolist() == [1, 1, 2, 3, 3]


def test_the_loss_is_torchs_cross_entropy_of_shares():
    random = SampleRandom([1, 2])
    target, logits = random.uniform("t", (1, 8, 8, 8)), random.normal("l", (5, 4, 4, 4))
    expected = F.cross_entropy(logits, layout_of(target, HU_WINDOW, (4, 4, 4)))
    assert layout_loss(logits, target, HU_WINDOW).item() == pytest.approx(expected.item(), rel=1e-5)
    assert layout_loss(0 * logits, target, HU_WINDOW).item() == pytest.approx(math.log(5), rel=1e-5)


def test_what_the_mask_leaves_out_does_not_count():
    random = SampleRandom([1])
    target, logits = random.uniform("t", (1, 4, 4, 4)), random.normal("l", (5, 4, 4, 4))
    mask = torch.zeros_like(target)
    mask[..., :2] = 1.0
    half = layout_loss(logits[..., :2], target[..., :2], HU_WINDOW)
    assert layout_loss(logits, target, HU_WINDOW, mask).item() == pytest.approx(half.item(), rel=1e-5)


@pytest.mark.parametrize(("scale", "size"), [("half", 8), ("full", 16)])
def test_the_head_changes_neither_the_other_weights_nor_the_volume(scale, size):
    xrays = torch.rand(1, 2, 64, 64)
    models = []
    for head in ("off", scale):
        torch.manual_seed(0)
        models.append(EnhancedDirectModel(**TINY_MODEL, layout_head=head))
    plain, model = models
    own = {name for name in model.state_dict() if name.startswith("layout.")}
    assert model.state_dict().keys() - own == plain.state_dict().keys()
    assert len(own) == 4
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items() if torch.is_tensor(v))
    volume, aux = model(xrays)
    assert torch.equal(volume, plain(xrays)[0])
    assert aux["layout"].shape == (1, 5, size, size, size)
    assert aux.keys() - {"layout"} == plain.eval()(xrays)[1].keys() == model.eval()(xrays)[1].keys()


def test_the_head_learns_the_regions_and_moves_the_features():
    torch.manual_seed(0)
    model = EnhancedDirectModel(**TINY_MODEL, layout_head="half")
    criterion = EnhancedLoss(**LAYOUT_ONLY | {"l1_weight": 1e-6}, layout_weight=1.0, acquisition=Acquisition())
    random = SampleRandom([5])
    target = F.avg_pool3d(hu_to_unit(torch.from_numpy(make_hu(0, 32)).float())[None, None], 2)
    xrays = random.uniform("x", (2, 64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        volume, aux = model(xrays)
        total, parts = criterion(volume, target, aux)
        optimizer.zero_grad()
        total.backward()
        losses.append(parts["layout"].item())
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(5), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert model.encoder.stem.weight.grad.abs().max() > 0


def test_layout_needs_its_input_in_training_and_is_left_out_in_evaluation():
    criterion = EnhancedLoss(**LAYOUT_ONLY | {"l1_weight": 1.0}, layout_weight=1.0, acquisition=Acquisition())
    volume = torch.rand(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match=r"loss.layout_weight is 1, which needs aux\[.layout.\]"):
        criterion(volume, volume)
    assert criterion.eval()(volume, volume)[1].keys() == {"l1"}
    with pytest.raises(InputError, match=r"loss.layout_weight is 1.0, which needs the data's HU window"):
        EnhancedLoss(layout_weight=1.0)


def test_training_takes_both_settings_or_neither(tmp_path):
    root = make_dataset(tmp_path / "data")
    for settings, message in (
        (["model.layout_head=half"], "loss.layout_weight is 0: expected more"),
        (["loss.layout_weight=0.2"], "model.layout_head is off: expected 0"),
        (["model.layout_head=third", "loss.layout_weight=0.2"], "expected one of off, half, full"),
    ):
        with pytest.raises(InputError, match=message):
            build(root, *settings)
    _, task, model = build(root, "model.layout_head=half", "loss.layout_weight=0.2")
    raw = {k: v[None] for k, v in task.train_data[0].items() if torch.is_tensor(v)}
    total, parts = task.loss(model, task.make_batch(raw, [1], torch.device("cpu")))
    assert parts["layout"].item() == pytest.approx(math.log(5), rel=1e-5)
    total.backward()
    assert all(p.grad is not None for p in model.parameters())
