"""Weights are made once in a trace, and are those that are made outside of it."""

import pytest
import torch

from xray2ct.geometry.projector import Geometry, back_project, line_integrals
from xray2ct.geometry.traced import each_made_once, made_once


def test_equal_arguments_give_one_tensor_within_the_context_only():
    made = []

    def make(size):
        made.append(size)
        return torch.zeros(size)

    with each_made_once():
        assert made_once(make, 3) is made_once(make, 3)
        assert made_once(make, 4).shape == (4,)
    assert made == [3, 4]
    assert made_once(make, 3) is not made_once(make, 3)
    with each_made_once():
        made_once(make, 4)
    assert made == [3, 4, 3, 3, 4]


@pytest.mark.parametrize("kind", ["cone", "scout", "parallel"])
def test_what_is_rendered_with_them_is_the_same_bit_for_bit(kind):
    geometry, size = Geometry(kind), (10, 12)
    volumes = torch.rand(2, 1, 1, 7, 8, 9)
    expected = [line_integrals(volume, geometry, size, "dense") for volume in volumes]
    with each_made_once():
        found = [line_integrals(volume, geometry, size, "dense") for volume in volumes]
        adjoints = [back_project(images, geometry, (7, 8, 9), "dense") for images in found]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(adjoints[1], back_project(expected[1], geometry, (7, 8, 9), "dense"))
