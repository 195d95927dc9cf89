"""Layout: which tissue fills each voxel, by thresholds of its HU, and the head that learns to say so."""

from __future__ import annotations

import torch
from torch import nn

from xray2ct.geometry.lifting import averaged_to
from xray2ct.models.blocks import group_norm, in_full_precision, zero_init
from xray2ct.models.normalisation import norm_silu
from xray2ct.models.working_weights import full_precision

REGIONS = ("air", "lung", "fat", "soft tissue", "bone")
# HU between neighbouring regions: emphysema counts as air below -950 (Gevenois et al., AJRCCM 154, 1996); -400 lies
# half-way between lung and soft tissue, so that voxels across their edge go either way; fat ends at -30 (Yoshizumi et
# al., Radiology 211, 1999). Vessels full of contrast agent count as bone.
BOUNDARIES_HU = (-950.0, -400.0, -30.0, 150.0)
SCALES = {"off": None, "half": 1, "full": 2}  # model.layout_head: which stage of the decoder it reads


class LayoutHead(nn.Module):
    """Features ``(B, C, D, H, W)`` -> logits of the regions ``(B, 5, D, H, W)`` in float32; all 0 before training."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.head = full_precision(zero_init(nn.Conv3d(channels, len(REGIONS), 1)))

    def forward(self, x):
        return in_full_precision(self.head, norm_silu(x, self.norm))


def layout_of(volume: torch.Tensor, hu_window, size) -> torch.Tensor:
    """Share of each region in ``size`` equal cells of volumes ``(B, 1, D, H, W)`` in [0, 1]: ``(B, 5, *size)``.

    Regions are told apart at the volume's own resolution and then averaged: at edges a cell holds several. The shares
    of a cell sum to 1. A boundary outside ``hu_window`` leaves the region beyond it empty.
    """
    low, high = hu_window
    edges = [(hu - low) / (high - low) for hu in BOUNDARIES_HU]
    above = torch.cat([volume > edge for edge in edges], dim=1).to(volume.dtype)  # (B, 4, D, H, W), falling
    shares = averaged_to(above, tuple(size))
    one = torch.ones_like(shares[:, :1])
    return torch.cat([one, shares], dim=1) - torch.cat([shares, torch.zeros_like(one)], dim=1)
