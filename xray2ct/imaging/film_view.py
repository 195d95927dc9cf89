"""What a film shows, from its pixels alone: view, facing, polarity, quarter turns, or that it is no chest radiograph.

from xray2ct.imaging.film_view import classify
finding = classify(pixels)         # FilmFinding(view="lateral", faces="right", polarity="bright", quarter_turns=0, ...)
upright = finding.upright(pixels)  # as the networks know it: head up, bone bright, lateral facing left

A network of 4,000 weights (``film_view.npz``) scores a thumbnail of 32 x 32 pixels, ranks in place of grey values so
that no display curve matters, as "upright frontal" and as "upright lateral that faces left". It is asked about the
picture, and about four parts of it that lack 12 % at one side, in all sixteen positions (four turns, mirrored or not,
inverted or not); the softmax over them, with one constant for "no chest radiograph", is the answer.
`python -m tools.film_templates` makes the weights from renderings of CTs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from torch.nn import functional

from xray2ct.imaging.film_frame import decimated, trim

EDGE = 32  # pixels of the thumbnail
LEFT_OUT = 0.12  # of an edge, in the parts of a picture
# Most films are upright and show bone bright: a prior that decides where the picture hardly does. Chosen with the least
# share of evidence for a chest on 48 real films and 48 renderings of CTs that were not trained on.
UPRIGHT, BRIGHT, LEAST_CHEST = 0.9, 0.9, 0.1
WEIGHTS = "film_view.npz"
POLARITIES = ("bright", "dark")  # how bone is stored
HYPOTHESES = ("pa", "left", "right")  # frontal, lateral facing left, lateral facing right


@dataclass(frozen=True)
class FilmFinding:
    """What a picture shows. All confidences are shares in [0, 1] of the evidence, by the marginals of one softmax.

    view: "pa" (any frontal), "lateral", or None: no chest radiograph was recognised. faces: "left" or "right", where
    the anterior chest lies in the upright lateral; None for a frontal. polarity: "bright" or "dark" bone.
    quarter_turns: counter-clockwise turns (``numpy.rot90``) that put the picture upright: trust them only where their
    confidence is high, since a wrong turn that nobody notices is worse than none. confidence: of each of those
    decisions, by its name, provided that it is a chest radiograph at all, and of that, "chest"; "position": of polarity
    and turn together by this picture alone, without the knowledge that most films are upright and show bone bright.
    """

    view: str | None
    faces: str | None
    polarity: str
    quarter_turns: int
    confidence: dict[str, float]

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """``pixels`` (H, W) turned, inverted within their own range, and mirrored to the networks' convention."""
        pixels = np.rot90(pixels, self.quarter_turns)
        if self.polarity == "dark":
            pixels = np.nanmax(pixels) + np.nanmin(pixels) - pixels
        return pixels[:, ::-1] if self.faces == "right" else pixels


def classify(pixels: np.ndarray) -> FilmFinding:
    """Find out what a picture shows.

    pixels: (H, W) of any size and scale, NaN where there is padding; uniform frames may still be there. Takes some
    20 ms, whatever the size. Raises ``ValueError`` for a picture of one value.
    """
    small, _ = decimated(pixels, 256)
    small = trim(small)[0].cut(small)
    rows, columns = (int(LEFT_OUT * length) for length in small.shape)
    parts = (small, small[rows:], small[: len(small) - rows], small[:, columns:], small[:, : small.shape[1] - columns])
    thumbnails = torch.from_numpy(np.stack([rank_thumbnail(part) for part in parts]))
    with torch.no_grad():
        evidence = logits(_weights(), thumbnails).log_softmax(1).mean(0)
    chances = (evidence + _log_prior()).softmax(0).double().numpy()
    chest = float(1.0 - chances[-1])
    table = chances[:-1].reshape(2, 4, 3) / max(chances[:-1].sum(), 1e-12)  # polarity, turn, hypothesis
    alone = evidence[:-1].softmax(0).double().numpy().reshape(2, 4, 3)
    polarity, turn, hypothesis = np.unravel_index(table.argmax(), table.shape)
    lateral = hypothesis > 0
    facing = table[..., 1:].sum(axis=(0, 1))
    confidence = {
        "chest": chest,
        "view": float(table[..., 1:].sum() if lateral else table[..., 0].sum()),
        "polarity": float(table[polarity].sum()),
        "quarter_turns": float(table[:, turn].sum()),
        "position": float(alone[polarity, turn].sum()),
    }
    if lateral:
        confidence["faces"] = float(facing[hypothesis - 1] / facing.sum())
    return FilmFinding(
        ("lateral" if lateral else "pa") if chest >= LEAST_CHEST else None,
        HYPOTHESES[hypothesis] if lateral else None,
        POLARITIES[polarity],
        int(turn),
        confidence,
    )


def _log_prior() -> torch.Tensor:
    """``(25)``: of polarity and turn, relative to none preferred; the chance of "no chest" stays as it is."""
    polarity, turn = torch.tensor([BRIGHT, 1 - BRIGHT]), torch.tensor([UPRIGHT] + 3 * [(1 - UPRIGHT) / 3])
    prior = (8 * polarity[:, None] * turn).log()[..., None].expand(2, 4, 3)
    return torch.cat([prior.flatten(), torch.zeros(1)])


def rank_thumbnail(small: np.ndarray) -> np.ndarray:
    """``(H, W)`` -> ``(32, 32)`` float32: area average, then ranks spread over [-1, 1]; 0 for padding (NaN).

    Raises ``ValueError`` where all pixels have one value.
    """
    valid = np.isfinite(small)
    share = _area_sum(valid.astype(np.float32))
    mean = _area_sum(np.where(valid, small, 0)) / np.maximum(share, 1e-9)
    known = mean[share > 0]
    if not known.size or np.ptp(known) == 0:
        raise ValueError("the picture holds one value; expected an X-ray")
    from scipy.stats import rankdata  # a fifth of a command's start: not for those that read no films

    out = np.zeros((EDGE, EDGE), np.float32)
    out[share > 0] = (rankdata(known) - 0.5) / known.size * 2 - 1
    return out


def _area_sum(array) -> np.ndarray:
    for axis in (0, 1):
        length = array.shape[axis]
        if length < EDGE:
            array = np.repeat(array, -(-EDGE // length), axis)
            length = array.shape[axis]
        array = np.add.reduceat(array, np.arange(EDGE) * length // EDGE, axis)
    return array


def positions(thumbnails: torch.Tensor) -> torch.Tensor:
    """``(B, E, E)`` -> ``(B, 16, E, E)``: inverted or not, by quarter turns, mirrored after turning or not."""
    turned = [torch.rot90(thumbnails, turn, (-2, -1)) for turn in range(4)]
    ways = torch.stack([picture for way in turned for picture in (way, way.flip(-1))], 1)
    return torch.cat([ways, -ways], 1)


def logits(weights: dict[str, torch.Tensor], thumbnails: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """``(B, 32, 32)`` -> ``(B, 25)``: polarity x turn x :data:`HYPOTHESES` of the picture, then "no chest radiograph".

    A mirrored frontal is a frontal: its two scores are averaged as probabilities. ``dropout`` is for training.
    """
    ways = positions(thumbnails)
    x = ways.reshape(-1, 1, EDGE, EDGE)
    for layer in range(3):
        x = functional.relu(functional.conv2d(x, weights[f"w{layer}"], weights[f"b{layer}"], stride=2, padding=1))
    x = functional.dropout(x.flatten(1), dropout, training=dropout > 0)
    scores = functional.linear(x, weights["w3"], weights["b3"]).reshape(-1, 2, 4, 2, 2)  # polarity, turn, mirror, view
    frontal = torch.logsumexp(scores[..., 0], -1, keepdim=True) - np.log(2)
    table = torch.cat([frontal, scores[..., 1]], -1).flatten(1)
    return torch.cat([table, weights["none"].expand(len(table), 1)], 1)


@lru_cache(maxsize=1)
def _weights() -> dict[str, torch.Tensor]:
    with files(__package__).joinpath(WEIGHTS).open("rb") as stream, np.load(stream) as stored:
        return {name: torch.from_numpy(stored[name].astype(np.float32)) for name in stored.files}
