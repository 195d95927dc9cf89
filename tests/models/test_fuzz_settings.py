"""Fuzzing of the networks' settings: a network works, or its setting is refused by name."""

from __future__ import annotations

import functools
import math

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from hybrid_vit_cascade.models import CascadeStage
from model_enhanced import EnhancedDirectModel, RefinementNetwork
from tests.helpers.fuzzing import outcome
from xray2ct.models.baselines import LiftingUNet

pytestmark = pytest.mark.fuzz

ODD_NUMBERS = [None, True, -1, 0, 1, 2, 3, 7, 12, 16, 20, 24, 28, 32, 48, 64, 136, 0.5, 2.0, math.nan, math.inf, "16"]
ODD_SETTINGS = st.one_of(st.sampled_from(ODD_NUMBERS), st.lists(st.sampled_from(ODD_NUMBERS), max_size=5))
BLOCKS = {"encoder_blocks": [1, 1, 1, 1], "decoder_blocks": [1, 1, 1]}
COARSE = {"volume_size": [16, 16, 16], "base_channels": 16, "xray_size": 32, "stem_stride": 1, **BLOCKS}
REFINEMENT = {
    **{"channels": 8, "growth": 4, "rrdb_blocks": 1, "head_channels": [8, 6, 2], "guide_widths": [8, 8, 16, 16]},
    **{"guide_channels": [2, 2, 2], "xray_size": 32, "stem_stride": 1},
}
CASCADE = {
    **{"volume_size": 16, "voxel_dim": 32, "vit_depth": 1, "num_heads": 2, "xray_size": 32, "num_views": 2},
    **{"token_grid": 4, "base_channels": 8, "xray_channels": 1},
}


def denoised(stage):
    noisy = torch.zeros(1, 1, *[stage.volume_size] * 3)
    return stage(noisy, torch.zeros(1), torch.zeros(1, stage.num_views, 64, 64))


NETWORKS = {
    "direct": (EnhancedDirectModel, {**COARSE, "transformer_blocks": 1}, lambda net: net(torch.zeros(1, 2, 64, 64))),
    "unet": (LiftingUNet, COARSE, lambda net: net(torch.zeros(1, 2, 64, 64))),
    "refinement": (
        functools.partial(RefinementNetwork, guided=True),
        REFINEMENT,
        lambda net: net(torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 2, 64, 64)),
    ),
    "cascade": (CascadeStage, CASCADE, denoised),
}


@given(st.sampled_from(sorted(NETWORKS)), st.data())
def test_a_network_of_any_settings_works_or_is_refused_by_name(kind, data):
    build, settings, run = NETWORKS[kind]
    key = data.draw(st.sampled_from(sorted(settings)))
    value = data.draw(ODD_SETTINGS)
    network = outcome(functools.partial(build, **{**settings, key: value}), names=key)
    if network is not None and sum(p.numel() for p in network.parameters()) < 3_000_000:
        with torch.no_grad():
            run(network)
