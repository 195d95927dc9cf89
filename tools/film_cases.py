"""Films of the benchmark: pictures of rendered X-rays by chains that training does not draw from.

Other physics and other curves than in xray2ct/data/film_chain.py, on purpose: a polynomial hardens the beam, scatter
falls off exponentially, noise is counted, the display is an exponential or an arctangent, and contrast is equalised
locally. Everything is fixed by a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, signal

VIEWS = ("pa", "lateral")


@dataclass
class Rendering:
    """One patient without couch: line integrals ``(2, S, S)``, the edge of a pixel in mm at the isocentre, and the rows
    ``(first, end)`` that the CT covers: films end there, renderings fade."""

    integrals: np.ndarray
    pixel_mm: float
    rows: tuple[int, int]


def detected(integrals: np.ndarray, pixel_mm: float, random: np.random.Generator) -> np.ndarray:
    """-log of what a detector counts behind line integrals ``(H, W)``: same shape, bone bright, without unit."""
    primary = np.exp(-integrals * (1 - 0.028 * integrals + 0.0006 * integrals**2))  # increases up to 15 and beyond
    reach = round(120 / pixel_mm)
    axis = np.arange(-reach, reach + 1) * pixel_mm
    kernel = np.exp(-np.hypot(*np.meshgrid(axis, axis)) / random.uniform(25, 45))
    source = np.pad(primary * np.sqrt(integrals), reach, mode="reflect")
    scatter = signal.fftconvolve(source, kernel / kernel.sum(), mode="valid")
    photons = 10 ** random.uniform(4.5, 5.5) * pixel_mm**2
    expected = photons * (primary + random.uniform(0.01, 0.06) * scatter)
    return -np.log(np.maximum(random.poisson(expected), 1) / photons)


def displayed(values: np.ndarray, pixel_mm: float, random: np.random.Generator) -> np.ndarray:
    """As a console shows them: local contrast evened out, a window, a curve; ``(H, W)`` uint8."""
    sigma = random.uniform(15, 30) / pixel_mm
    mean = ndimage.gaussian_filter(values, sigma)
    spread = np.sqrt(np.maximum(ndimage.gaussian_filter(values**2, sigma) - mean**2, 0))
    values = values + random.uniform(0.2, 0.5) * (values - mean) / (spread + 0.2)
    low, high = np.percentile(values, [random.uniform(0.5, 4), random.uniform(96, 99.5)])
    unit = ((values - low) / (high - low)).clip(0, 1)
    steepness = random.uniform(1, 3)
    if random.random() < 0.5:
        unit = (1 - np.exp(-steepness * unit)) / (1 - np.exp(-steepness))
    else:
        unit = 0.5 + 0.5 * np.arctan(steepness * (2 * unit - 1)) / np.arctan(steepness)
    return np.rint(255 * unit).astype(np.uint8)


# ------------------------------------------------------------------------------------------------
# What is done to a pair


def moved(rendering: Rendering, view: int, across_mm=0.0, scale=1.0, degrees=0.0) -> np.ndarray:
    """A view's line integrals turned and scaled about the middle and shifted to the right; outside is air."""
    picture = rendering.integrals[view]
    angle, middle = np.deg2rad(degrees), (np.array(picture.shape) - 1) / 2
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    offset = middle - matrix @ (middle + [0, across_mm / rendering.pixel_mm])
    return ndimage.affine_transform(picture, matrix, offset, order=1)


def film(rendering: Rendering, random, move: tuple[dict, dict] = ({}, {})) -> list[np.ndarray]:
    """Both views as a console shows them, uint8, cut to the rows that the CT covers. move: of each view."""
    pictures = []
    for view in range(2):
        integrals = moved(rendering, view, **move[view])[slice(*rendering.rows)]
        pictures.append(displayed(detected(integrals, rendering.pixel_mm, random), rendering.pixel_mm, random))
    return pictures


def clean(rendering: Rendering, random, scale: float = 10.0) -> list[np.ndarray]:
    """The project's own X-rays, in [0, 1] (a line integral of ``scale`` is 1), without couch."""
    return [(view / scale).clip(0, 1) for view in rendering.integrals]


def logarithm(rendering: Rendering, random) -> list[np.ndarray]:
    """Logarithm of the counts, linear, 12 bits in 16, with an offset and a gain: a raw film without display curve."""
    pictures = []
    for view in rendering.integrals:
        values = detected(view[slice(*rendering.rows)], rendering.pixel_mm, random)
        gain, offset = random.uniform(250, 450), random.uniform(100, 400)
        pictures.append(np.rint(gain * (values - values.min()) + offset).clip(0, 4095).astype(np.uint16))
    return pictures


def framed(rendering, random) -> list[np.ndarray]:
    """On a page: a black border within a white one."""
    return [np.pad(np.pad(p, 6, constant_values=0), 14, constant_values=255) for p in film(rendering, random)]


def collimated(rendering, random) -> list[np.ndarray]:
    """A tenth cut at every side, a seventh at one: black there."""
    pictures = film(rendering, random)
    for picture in pictures:
        shares = np.full(4, 0.1)
        shares[random.integers(4)] = 0.14
        height, width = picture.shape
        top, bottom, left, right = (round(share * n) for share, n in zip(shares, (height, height, width, width)))
        shown = picture[top : height - bottom, left : width - right].copy()
        picture[:] = 0
        picture[top : height - bottom, left : width - right] = shown
    return pictures


def marked(rendering, random) -> list[np.ndarray]:
    """A white letter near an upper corner, as of lead, and a burnt-in line of text below."""
    pictures = []
    for picture, letter in zip(film(rendering, random), "RL"):
        image = Image.fromarray(picture)
        draw, (width, height) = ImageDraw.Draw(image), image.size
        at = (round(random.uniform(0.05, 0.9) * width), round(random.uniform(0.04, 0.12) * height))
        draw.text(at, letter, fill=255, font=ImageFont.load_default(round(0.08 * width)))
        draw.text((0.05 * width, 0.92 * height), "portable", fill=255, font=ImageFont.load_default(round(0.04 * width)))
        pictures.append(np.asarray(image))
    return pictures


def inverted(rendering, random) -> list[np.ndarray]:
    """Bone black, air white."""
    return [255 - picture for picture in film(rendering, random)]


def swapped(rendering, random) -> list[np.ndarray]:
    """The lateral view given as PA, and the other way round."""
    return film(rendering, random)[::-1]


def mirrored(rendering, random) -> list[np.ndarray]:
    """The lateral view faces right."""
    frontal, lateral = film(rendering, random)
    return [frontal, np.ascontiguousarray(lateral[:, ::-1])]


Maker = Callable[[Rendering, np.random.Generator], list[np.ndarray]]
CASES: dict[str, Maker] = {
    "no couch": clean,
    "log": logarithm,
    "display": film,
    "frame": framed,
    "collimated": collimated,
    "marker": marked,
    "shift": partial(film, move=({"across_mm": 20.0}, {"across_mm": -15.0})),
    "scale": partial(film, move=({"scale": 1.07}, {"scale": 0.94})),
    "turned": partial(film, move=({"degrees": 3.0}, {"degrees": -2.0})),
    "inverted": inverted,
    "swapped": swapped,
    "mirrored": mirrored,
}


def make_case(name: str, rendering: Rendering, patient: str, seed: int) -> list[np.ndarray]:
    """Both pictures (PA first) of a case of :data:`CASES`; they follow from case, patient and seed.

    Grey levels as uint8 or uint16; those of the project's own scale in [0, 1].
    """
    key = [seed, list(CASES).index(name), *patient.encode()]
    return CASES[name](rendering, np.random.default_rng(key))
