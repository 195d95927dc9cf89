"""View, facing, polarity and turn of real frontals and of a CT that the network has not seen, in all positions."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xray2ct.imaging.film_view import classify, rank_thumbnail

FILMS = Path(__file__).with_name("films")
FRONTALS = sorted(path.name for path in FILMS.glob("mhh_*.png")) + ["lidc_0001_pa.png"]
POSITIONS = list(product((False, True), (0, 1, 2, 3)))


def film(name):
    return np.asarray(Image.open(FILMS / name), dtype=float)


@pytest.mark.parametrize(("inverted", "turns"), POSITIONS)
@pytest.mark.parametrize("name", FRONTALS)
def test_frontals_in_all_positions(name, inverted, turns):
    upright = film(name)
    given = np.rot90(255 - upright if inverted else upright, turns)
    found = classify(given)
    assert (found.view, found.faces, found.quarter_turns) == ("pa", None, -turns % 4)
    assert found.polarity == ("dark" if inverted else "bright")
    np.testing.assert_allclose(np.sort(found.upright(given), axis=None), np.sort(upright, axis=None), atol=255)
    assert np.corrcoef(found.upright(given).ravel(), upright.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("inverted", "turns"), POSITIONS)
def test_laterals_in_all_positions(inverted, turns, mirrored):
    upright = film("lidc_0001_lat.png")
    given = 255 - upright if inverted else upright
    found = classify(np.rot90(given[:, ::-1] if mirrored else given, turns))
    assert (found.view, found.quarter_turns) == ("lateral", -turns % 4)
    assert found.faces == ("right" if mirrored else "left")
    back = found.upright(np.rot90(given[:, ::-1] if mirrored else given, turns))
    assert np.corrcoef(back.ravel(), upright.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("size", [64, 300, 2000])
def test_neither_size_nor_frame_nor_display_curve_matter(size):
    picture = Image.fromarray(film(FRONTALS[0]).astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    curved = (np.array(picture) / 255) ** 2.2 * 4095
    page = np.pad(curved, size // 8, constant_values=4095.0)
    page[: size // 30] = np.nan
    found = classify(page)
    assert (found.view, found.polarity, found.quarter_turns) == ("pa", "bright", 0)


def hand():
    """A palm and five fingers with bones."""
    v, u = np.mgrid[-1:1:96j, -1:1:96j]
    picture = 0.5 * (np.hypot(u / 0.45, (v - 0.5) / 0.45) < 1)
    for angle in np.deg2rad((-40, -18, 0, 16, 34)):
        across, along = u * np.cos(angle) + (v - 0.8) * np.sin(angle), (v - 0.8) * np.cos(angle) - u * np.sin(angle)
        picture += (along < 0) * (along > -1.5) * (0.4 * (abs(across) < 0.1) + 0.4 * (abs(across) < 0.045))
    return picture


def slice_of_a_chest():
    """An axial slice: body, two lungs, spine."""
    v, u = np.mgrid[-1:1:96j, -1:1:96j]
    picture = 1.0 * (np.hypot(u / 0.9, v / 0.6) < 1)
    for side in (-0.42, 0.42):
        picture[np.hypot((u - side) / 0.3, v / 0.42) < 1] = 0.1
    return picture + 0.6 * (np.hypot(u / 0.13, (v - 0.38) / 0.13) < 1)


@pytest.mark.parametrize("picture", [hand(), slice_of_a_chest()])
def test_what_is_no_chest_radiograph(picture):
    found = classify(picture)
    assert found.view is None
    assert found.confidence["chest"] < 0.1


def test_confidences_are_shares():
    confidence = classify(film("lidc_0001_lat.png")).confidence
    assert set(confidence) == {"chest", "view", "polarity", "quarter_turns", "position", "faces"}
    assert all(0.5 < value <= 1 for value in confidence.values())


def test_a_thumbnail_holds_ranks():
    thumb = rank_thumbnail(np.arange(64.0)[None].repeat(64, axis=0))
    np.testing.assert_allclose(thumb[0], np.linspace(-1, 1, 65)[1::2], atol=1e-6)  # by hand: 32 columns, ties averaged
    padded = rank_thumbnail(np.where(np.arange(64) < 32, np.nan, np.arange(64.0))[None].repeat(64, axis=0))
    assert (padded[:, :16] == 0).all()
    np.testing.assert_allclose(padded[0, [16, -1]], [-15 / 16, 15 / 16], atol=1e-6)
    with pytest.raises(ValueError, match="one value"):
        rank_thumbnail(np.ones((40, 40)))
