"""Validation patients as simulated films: the same films at every validation, scored beside the clean renderings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from dataset import PatientDataset
from xray2ct.data.augment import AugmentConfig, PairMaker

FILMS = 3  # of each patient


class ValidationFilms:
    """Each patient of ``patients`` (opened with raw and body) as :data:`FILMS` films, drawn as ``pairs`` draws them.

    Nothing but the film differs from a clean rendering: the patient is neither moved nor deformed.
    """

    def __init__(self, patients: PatientDataset, pairs: PairMaker):
        self.patients = patients
        config = unchanged(pairs.config)
        self.pairs = PairMaker(pairs.acquisition, pairs.volume_size, pairs.xray_size, config, pairs.with_seen)

    def batches(self, index: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """The films of one patient as batches of one: ``xrays``, ``ct_volume``, ``mask`` and ``seen`` where used."""
        item = self.patients[index]
        volume, body = (item[name].unsqueeze(0).to(device) for name in ("ct_volume", "body"))
        mask = item["mask"].unsqueeze(0).to(device) if "mask" in item else None
        for seed in range(FILMS * index, FILMS * (index + 1)):
            yield self.pairs(volume, mask, [seed], body)


def unchanged(config: AugmentConfig) -> AugmentConfig:
    """``config`` with every pair a film, and every other change off."""
    return AugmentConfig(
        source_size=config.source_size,
        rotation_deg=0.0,
        scale=0.0,
        translation_mm=0.0,
        elastic_mm=0.0,
        hu_shift=0.0,
        hu_scale=0.0,
        mirror_probability=0.0,
        xray_noise=0.0,
        film=replace(config.film, probability=1.0),
    )


def with_films(clean: Mapping[str, torch.Tensor], films: Sequence[Mapping[str, torch.Tensor]]) -> dict:
    """Scores halfway between a patient's clean rendering and the mean of its films; ``psnr_clean``, ``psnr_film``."""
    shown = {name: torch.stack([film[name] for film in films]).mean() for name in clean}
    both = {name: (clean[name] + shown[name]) / 2 for name in clean}
    return both | {"psnr_clean": clean["psnr"], "psnr_film": shown["psnr"]}
