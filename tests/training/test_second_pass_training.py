"""Training of a second pass: from a single pass's weights, on a frozen first one, to evaluation, stage 2 and ONNX."""

import re

import numpy as np
import pytest
import torch

import export_onnx
import train_enhanced_4gpu
from tests.helpers.runs import arguments, assert_same_tensors, build
from tests.helpers.tiny_data import make_checkpoint, make_refinement_checkpoint
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError
from xray2ct.inference.onnx import check_xrays, onnx_runner
from xray2ct.inference.reconstruction import load_pipeline
from xray2ct.inference.system import DirectSystem
from xray2ct.models.loading import load_base_model
from xray2ct.training.initial_weights import start_from

FROZEN = ("model.passes=2", "model.freeze_first_pass=true", "loss.multiscale_weight=0")


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base.pt", root)


@pytest.fixture(scope="module")
def trained(root, base, tmp_path_factory):
    """Output folder of a short training of the second pass alone."""
    output = tmp_path_factory.mktemp("frozen")
    words = arguments(root, output, *FROZEN, "training.num_epochs=1", "world_size=1")
    assert train_enhanced_4gpu.main([*words, "--init", str(base)]) == 0
    return output


def first_pass(state):
    return {name: value for name, value in state.items() if not name.startswith("second_pass.")}


def test_a_second_pass_begins_with_a_single_passs_weights_and_says_so(root, base):
    _, task, model = build(root, *FROZEN)
    drawn = {name: value.clone() for name, value in model.second_pass.state_dict().items()}
    line = start_from(base, model, task)
    assert line.endswith("; they are the first pass, the second one is new")
    assert_same_tensors(first_pass(model.state_dict()), load_checkpoint(base)["model_state_dict"])
    assert_same_tensors(model.second_pass.state_dict(), drawn)


def test_three_passes_begin_with_two_but_one_does_not(root, tmp_path):
    two = make_checkpoint(tmp_path / "two.pt", root, settings={"passes": 2})
    _, task, model = build(root, "model.passes=3")
    assert start_from(two, model, task).endswith(")")
    assert_same_tensors(model.state_dict(), load_checkpoint(two)["model_state_dict"])
    _, task, model = build(root)
    with pytest.raises(InputError, match=re.escape("its model.passes is 2, this run's is 1; expected the same")):
        start_from(two, model, task)


def test_the_first_pass_stays_and_the_second_learns(base, trained):
    best = load_checkpoint(trained / "best_model.pt")
    assert_same_tensors(first_pass(best["model_state_dict"]), load_checkpoint(base)["model_state_dict"])
    assert best["model_state_dict"]["second_pass.head.weight"].any()
    assert best["model_config"]["passes"] == 2
    optimizer = load_checkpoint(trained / "last.pt")["training_state"]["optimizer"]
    assert len(optimizer["state"]) == len([n for n in best["model_state_dict"] if n.startswith("second_pass.")])


def test_a_frozen_first_pass_wants_weights(root, tmp_path):
    with pytest.raises(InputError, match=r"freeze_first_pass is true: expected the checkpoint .* as --init"):
        train_enhanced_4gpu.main(arguments(root, tmp_path / "out", *FROZEN))
    assert not (tmp_path / "out").exists()


def test_it_reconstructs_and_serves_as_the_base_of_stage_2(root, trained, tmp_path):
    best = trained / "best_model.pt"
    pa, lateral = (root / "p4" / f"p4_{view}_drr.png" for view in ("pa", "lat"))
    volume, _ = load_pipeline(best, device="cpu")(pa, lateral)
    assert volume.shape == (16, 16, 16)
    assert np.std(volume) > 100
    refinement = make_refinement_checkpoint(tmp_path / "refinement.pt", root, best)
    system = DirectSystem(best, refinement, "cpu")
    assert system.notes == []
    assert system.predict(torch.rand(1, 2, 64, 64)).shape == (1, 1, 64, 64, 64)
    reduced, full = (
        DirectSystem(best, device="cpu", precision=p).predict(torch.rand(1, 2, 64, 64)) for p in ("bfloat16", "float32")
    )
    assert reduced.dtype == full.dtype == torch.float32


def test_onnx_gives_pytorchs_volume_also_of_what_is_seen(root, tmp_path):
    """Both in one export, which takes long."""
    for package in export_onnx.ONNX_PACKAGES:
        pytest.importorskip(package)
    few = {"encoder_blocks": [0] * 4, "decoder_blocks": [0] * 3, "transformer_blocks": 0, "xray_size": 32}
    base = make_checkpoint(tmp_path / "two.pt", root, settings={"passes": 2, "seen_channel": True, **few})
    assert export_onnx.main(["--base", str(base), "--output", str(tmp_path / "two.onnx"), "--data", str(root)]) == 0
    system = DirectSystem(base, device="cpu")
    xrays = check_xrays(system)
    assert xrays.shape == (2, 2, 2, 32, 32)
    xrays = torch.cat([xrays, 0.5 * torch.rand(1, 2, 2, 32, 32)])
    whole = system.predict(xrays)
    xrays[:, 1, 1, 16:] = 0
    expected = system.predict(xrays)
    assert (onnx_runner(tmp_path / "two.onnx")(xrays) - expected).abs().max() < 1e-4
    assert (whole - expected).abs().max() > 1e-3  # what is seen matters
    one, _ = load_base_model(base)
    one.second_pass = None
    with torch.no_grad():
        assert (one(xrays)[0] - expected).abs().max() > 1e-3  # the second pass is in it
