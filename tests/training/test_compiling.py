"""torch.compile of the repeated blocks: the same losses and weights as without; one note where it does not work."""

import contextlib
import copy
import locale

import pytest
import torch
from torch import nn

from xray2ct.models.blocks import ActivationCheckpointing, ResidualBlock
from xray2ct.training import compiling


class Tiny(ActivationCheckpointing):
    def __init__(self):
        super().__init__()
        self.block = ResidualBlock(8, dims=2)
        nn.init.normal_(self.block.conv2.weight, std=0.1)

    def forward(self, x):
        return self._run(self.block, x)


def one_step(runner, model, x):
    """Loss, and the weights after a step, with the weights of the block cast to bfloat16."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = runner(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss.item(), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def utf8():
    """torch reads files of its own in the locale's encoding, and libraries that other tests use set the locale."""
    before = locale.setlocale(locale.LC_CTYPE)
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.usefixtures("utf8")
def test_compiled_blocks_train_as_they_do_without():
    torch.manual_seed(0)
    plain, x = Tiny(), torch.randn(2, 8, 8, 8)
    other, names = copy.deepcopy(plain), list(plain.state_dict())
    notes = []
    # The graphs are captured and differentiated, and run by PyTorch's own kernels: no C++ compiler has to run.
    runner = compiling.compiled(other, "blocks", torch.device("cpu"), notes.append, backend="aot_eager")
    assert runner is other
    assert list(other.state_dict()) == names
    counters = torch._dynamo.utils.counters
    counters.clear()
    (expected, weights), (found, others) = one_step(plain, plain, x), one_step(runner, other, x)
    assert not notes
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert found == pytest.approx(expected, rel=0.01)
    assert (weights - others).abs().max() < 0.01 * weights.abs().max()


def test_without_a_compiler_there_is_one_note_and_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_problem", lambda *_: "no g++")
    model, notes = Tiny(), []
    for mode in ("blocks", "model", "graphs", True):
        assert compiling.compiled(model, mode, torch.device("cpu"), notes.append) is model
    assert notes == ["note: training.compile is off: no working compiler for cpu here (no g++)"] * 4
    assert model.block._compiled_call_impl is None
    assert compiling.compiled(model, False, torch.device("cpu"), notes.append) is model
    assert len(notes) == 4
