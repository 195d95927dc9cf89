"""Random numbers of samples: known values, independence of batch and order, distribution."""

from __future__ import annotations

import math

import pytest
import torch

from xray2ct.data.sample_random import SampleRandom, _mixed


def test_finaliser_gives_splitmix64s_published_values():
    """First outputs of SplitMix64 with seed 1234567 (the reference implementation's)."""
    state, values = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        values.append(_mixed(state))
    assert values == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_sample_is_the_same_in_any_batch_and_after_any_other_draw():
    seeds = [3, 2**63 + 11, -5, 7]
    together = SampleRandom(seeds)
    together.normal("other", (5,))
    noise, shift = together.normal("noise", (2, 3, 5)), together.uniform("shift", (3,), -1, 1)
    for index, seed in enumerate(seeds):
        alone = SampleRandom([seed])
        assert torch.equal(alone.uniform("shift", (3,), -1, 1)[0], shift[index])
        assert torch.equal(alone.normal("noise", (2, 3, 5))[0], noise[index])


def test_host_and_device_agree_on_scalars():
    random = SampleRandom(range(50))
    assert random.on_host("turn", -4, 4) == pytest.approx(random.uniform("turn", (), -4, 4).tolist(), abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_shapes_of_odd_and_even_counts(count):
    assert SampleRandom([1, 2, 3]).normal("n", (count,)).shape == (3, count)
    assert SampleRandom([1, 2, 3]).uniform("u").shape == (3,)


def test_normal_numbers_have_the_normal_distribution():
    values = SampleRandom(range(20)).normal("noise", (20_001,), std=2.0)
    assert torch.isfinite(values).all()
    x = values.flatten().double() / 2.0
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for edge in (-2.0, -0.5, 0.0, 1.0):
        expected = 0.5 * math.erfc(-edge / math.sqrt(2))
        assert abs((x < edge).double().mean() - expected) < 4 * math.sqrt(0.25 / n)
    # Neighbours, both halves of a pair, and samples with neighbouring seeds are uncorrelated.
    pairs = [(values[:, :-1], values[:, 1:]), (values[:, :10_000], values[:, 10_001:]), (values[:-1], values[1:])]
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / math.sqrt(a.numel())


def test_uniform_numbers_fill_their_range_evenly():
    values = SampleRandom(range(64)).uniform("u", (4096,), -3.0, 5.0)
    assert values.min() >= -3.0
    assert values.max() < 5.0
    counts = torch.histc(values, bins=16, min=-3.0, max=5.0)
    expected = values.numel() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared with 15 degrees of freedom: p < 1e-4


def test_names_give_independent_draws():
    random = SampleRandom(range(8))
    a, b = random.normal("pa", (5000,)), random.normal("lateral", (5000,))
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / math.sqrt(a.numel())
