"""The perceptual loss: distance of VGG16's features on slices of all three orientations."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError
from xray2ct.models.vgg16 import VGG_LAYERS, file_weights, imagenet_weights, random_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Slices are evaluated this many pixels at a time (128 of 64x64, 8 of 256x256): about 0.5 GB of activations.
CHUNK_PIXELS = 2**19


class PerceptualLoss(nn.Module):
    """VGG16 feature distance on slices of all three orientations.

    Mean over relu1_2, relu2_2 and relu3_3 of the mean |features(prediction) - features(target)| of
    slices, grey values repeated to RGB and normalised with ImageNet's mean and deviation. Features of
    Simonyan and Zisserman (arXiv:1409.1556), compared as in Johnson et al. (ECCV 2016,
    arXiv:1603.08155), with L1 instead of squared distances. At least 0; weights decide its scale.

    weights: ``"imagenet"`` (torchvision's download or cache), ``"random"`` (fixed seed) or the path of
        torchvision's ``vgg16-397923af.pth``. What cannot be loaded raises :class:`InputError`.
    slices: per orientation and call. In eval mode equally spaced; in training drawn without replacement, for each
        sample from its own ``draws`` (so that they do not depend on the batch), without them for the whole batch from
        torch's global CPU generator.

    The filters are buffers outside the state dict: nothing trains, averages or saves them.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, weights: str | os.PathLike = "imagenet", slices: int = 4, chunk_pixels: int = CHUNK_PIXELS):
        super().__init__()
        if slices < 1:
            raise InputError(f"loss.perceptual_slices is {slices}; expected at least 1")
        self.slices, self.chunk_pixels = slices, chunk_pixels
        if weights == "imagenet":
            state = imagenet_weights()
        elif weights == "random":
            state = random_weights()
        else:
            state = file_weights(weights)
        for index, *_ in VGG_LAYERS:
            for kind in ("weight", "bias"):
                value = state[f"features.{index}.{kind}"].detach().float().clone()
                self.register_buffer(f"{kind}{index}", value, persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Grey images ``(N, 1, H, W)`` in [0, 1], at least 8 x 8 -> [relu1_2, relu2_2, relu3_3]."""
        x = (images - self.mean) / self.std
        compared = []
        for index, _, _, is_compared in VGG_LAYERS:
            x = F.relu(F.conv2d(x, getattr(self, f"weight{index}"), getattr(self, f"bias{index}"), padding=1))
            if is_compared:
                compared.append(x)
                x = F.max_pool2d(x, 2)
        return compared

    def _distance(self, prediction, target):
        """Slices ``(N, 1, H, W)`` -> sum over slices of the distance, float32."""
        with torch.no_grad():
            wanted = self.features(target)
        pairs = zip(self.features(prediction), wanted)
        return len(prediction) * torch.stack([F.l1_loss(x.float(), y.float()) for x, y in pairs]).mean()

    def _positions(self, axis: int, volumes: torch.Tensor, draws: SampleRandom | None) -> torch.Tensor:
        """Indices of the slices along an axis of ``volumes`` (B, 1, D, H, W): ``(B, slices)``, on their device."""
        batch, size = len(volumes), volumes.shape[axis]
        count = min(self.slices, size)
        if not self.training:
            positions = ((torch.arange(count, device=volumes.device) + 0.5) * size / count).long()
        elif draws is None:
            positions = torch.randperm(size)[:count].to(volumes.device, non_blocking=True)
        else:  # of each part of a sample other slices; the ranks of random numbers are a permutation
            keys = draws.uniform(f"perceptual slices of axis {axis}", (batch // len(draws), size))
            positions = keys.reshape(batch, size).argsort(dim=1)[:, :count]
        return positions.expand(batch, count)

    def forward(
        self, prediction: torch.Tensor, target: torch.Tensor, draws: SampleRandom | None = None
    ) -> torch.Tensor:
        """Volumes ``(B, 1, D, H, W)`` in [0, 1] -> 0-d float32 tensor.

        draws: random numbers of the B samples, or of B / n samples of n successive parts (patches) each.
        """
        distance, count = torch.zeros((), device=prediction.device), 0
        for axis in (2, 3, 4):
            positions = self._positions(axis, prediction, draws)
            x, y = (_slices(volume, axis, positions).float() for volume in (prediction, target))
            step = max(1, self.chunk_pixels // (x.shape[-2] * x.shape[-1]))
            for start in range(0, len(x), step):
                chunk = x[start : start + step], y[start : start + step]
                if len(x) > step and torch.is_grad_enabled():
                    # Recomputed in the backward pass: only one chunk's activations exist at a time.
                    distance = distance + checkpoint(
                        self._distance, *chunk, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    distance = distance + self._distance(*chunk)
            count += len(x)
        return distance / count


def _slices(volumes: torch.Tensor, axis: int, positions: torch.Tensor) -> torch.Tensor:
    """Slices of ``volumes`` (B, 1, D, H, W) at ``positions`` (B, n) along an axis: ``(B n, 1, H', W')``."""
    sample = torch.arange(len(volumes), device=volumes.device)[:, None]
    found = volumes[(sample, 0, *(positions if axis == other else slice(None) for other in (2, 3, 4)))]
    return found.reshape(-1, 1, *found.shape[-2:])
