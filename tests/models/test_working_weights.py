"""Weights cast once a step: values and gradients of autocast alone, with few casts; float32 where it counts."""

import copy

import pytest
import torch
from torch import nn

from hybrid_vit_cascade.models import CascadeStage
from model_enhanced import RefinementNetwork
from tests.helpers.dispatch import OperatorCounter
from tests.helpers.tiny_data import TINY_REFINEMENT, make_model
from xray2ct.models.working_weights import cast_weights_, castable, full_precision, with_cast_weights


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 4), full_precision(nn.Linear(4, 3)))


def test_values_and_gradients_are_those_of_autocast_alone():
    plain = layers()
    other, x = copy.deepcopy(plain), torch.randn(7, 6)
    outputs = []
    for network, cast in ((plain, False), (other, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = (with_cast_weights(network, network) if cast else network)(x)
        output.float().square().sum().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    for (name, one), two in zip(plain.named_parameters(), other.parameters()):
        assert two.grad.dtype == torch.float32, name
        assert torch.equal(one.grad, two.grad), name
        assert isinstance(two, nn.Parameter)
    assert list(other.state_dict()) == list(plain.state_dict())


def test_weights_are_cast_together_and_back_even_after_an_error():
    network, x = layers(), torch.randn(2, 6)
    seen = []
    network[3].register_forward_hook(lambda layer, inputs, output: seen.append((network[0].weight.dtype, layer.weight)))
    with torch.autocast("cpu", dtype=torch.bfloat16), OperatorCounter() as counter:
        call = with_cast_weights(network, network)
    assert counter.counts["aten::_foreach_copy_"] == 1
    assert counter.counts["aten::_to_copy"] == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(x)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call(torch.randn(2, 9))
    assert seen == [(torch.bfloat16, network[3].weight)]
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert with_cast_weights(network, network) is network  # without autocast


def test_a_layer_that_is_not_called_gets_no_gradient():
    network = layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_cast_weights(lambda x: network[0](x), network)(torch.randn(2, 6)).float().sum().backward()
    assert network[0].weight.grad is not None
    assert network[2].weight.grad is None


def test_weights_kept_in_bfloat16_predict_the_same():
    network, x = layers(), torch.randn(2, 6)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = network(x)
        assert torch.equal(cast_weights_(network, torch.bfloat16)(x), expected)
    assert not castable(network[:3])
    assert network[3].weight.dtype == torch.float32


def stage_1():
    model, xrays = make_model(), torch.rand(2, 2, 64, 64)
    return model, lambda: model(xrays)[0]


def stage_2(**region):
    network = RefinementNetwork(**TINY_REFINEMENT)
    coarse, xrays = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 64, 64)
    return network, lambda: network(coarse, xrays, **region)


def stage_2_patches():
    return stage_2(origins=[[(0, 0, 0), (8, 6, 2)]] * 2, patch=8, context=4)


def cascade_stage():
    model = CascadeStage(32, 32, vit_depth=2, num_heads=2, xray_size=64, conditioned=True)
    x, previous, xrays = torch.rand(2, 1, 32, 32, 32), torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 64, 64)
    return model, lambda: model(x, torch.rand(2), xrays, previous)


@pytest.mark.parametrize("case", [stage_1, stage_2, stage_2_patches, cascade_stage], ids=lambda case: case.__name__)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_under_autocast_casts_activations_alone(case, checkpointing):
    """Before, each weight and each of its gradients was cast by an operation of its own: 251 to 402 in such a step."""
    torch.manual_seed(0)
    model, forward = case()
    model.train()
    model.activation_checkpointing = checkpointing
    with OperatorCounter() as counter:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = forward()
        output.float().square().mean().backward()
    assert output.dtype == torch.float32  # volumes are never rounded
    assert len(castable(model)) > 60
    assert counter.counts["aten::_to_copy"] <= (75 if checkpointing else 45)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
