"""Frames, markers and photographs taken at an angle: pictures drawn here, the answers known."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from tests.helpers.xray_cases import picture
from xray2ct.imaging.film_frame import Box, decimated, fill, mask_markers, perspective, trim


def film(rows=300, columns=260):
    """A chest-like film that fills its picture: no value is held along an edge."""
    rng = np.random.default_rng(0)
    return 0.3 + 0.4 * picture(rows, columns) + 0.03 * ndimage.gaussian_filter(rng.normal(size=(rows, columns)), 2) * 8


@pytest.mark.parametrize("level", [0.0, 1.0], ids=["black", "white"])
def test_a_frame_is_cut_off_exactly(level):
    page = np.pad(film(), ((20, 31), (12, 40)), constant_values=level)
    box, notes = trim(page)
    assert box == Box(20, 320, 12, 272)
    assert notes == ["uniform frame cut off: 6% top, 9% bottom, 4% left, 13% right"]
    np.testing.assert_array_equal(box.cut(page), film())


def test_nested_frames_and_padding_are_cut_off():
    page = np.pad(film(), 10, constant_values=0.0)
    page = np.pad(page, 15, constant_values=1.0)
    page = np.pad(page, ((0, 8), (0, 0)), constant_values=np.nan)
    assert trim(page)[0] == Box(25, 325, 25, 285)


def test_a_caption_does_not_hide_a_frame():
    page = np.pad(film(), 40, constant_values=0.0)
    page[8:14, 5:12] = 1.0
    assert trim(page)[0] == Box(40, 340, 40, 300)


def test_air_beside_a_body_and_a_film_without_a_frame_stay():
    body = picture(300, 260)  # zero around a curved outline
    assert (body[:, 0] == 0).all()
    for pixels in (body, film(), np.full((64, 64), 3.0), np.full((64, 64), np.nan)):
        box, notes = trim(pixels)
        assert box == Box(0, pixels.shape[0], 0, pixels.shape[1])
        assert notes == []


def lateral_with_air():
    """A drawn lateral of 512 x 512: black air before a curved chest, and behind a back flat to 8 pixels."""
    v, u = np.mgrid[-1:1:512j, -1:1:512j]
    front, back = -0.65 + 0.2 * v**2, 0.6 - 0.03 * v**2
    inside = np.clip((u - front) * (back - u), 0, None)
    return np.sqrt(inside) * film(512, 512)


def test_air_beside_a_lateral_stays_and_only_frames_around_it_go():
    body = lateral_with_air()
    assert (body[:, :20] == 0).all()  # uniform columns, bounded by the chest's curve
    for pixels in (body, 1 - body, body[:, ::-1]):
        assert trim(pixels) == (Box(0, 512, 0, 512), [])
    for level in (0.5, 1.0):
        box, _ = trim(np.pad(body, ((30, 20), (25, 40)), constant_values=level))
        assert box == Box(30, 542, 25, 537)


def test_collimation_is_cut_off_a_frontal_and_a_tilted_frame_to_its_outermost_pixel():
    shown = np.zeros((600, 560))
    shown[50:540, 70:500] = film(490, 430)
    assert trim(shown)[0] == Box(50, 540, 70, 500)
    tilted = ndimage.rotate(np.pad(film(500, 460), 60), 0.8, reshape=False, order=1)
    box, _ = trim(tilted)
    assert np.abs(np.subtract(box, (60, 560, 60, 520))).max() <= 5  # half of 500 * tan(0.8 degrees) is 3.5


def test_a_large_film_is_cut_to_the_pixel_of_its_decimated_copy():
    page = np.pad(film(1200, 1100), 100, constant_values=1.0)
    step = decimated(page)[1]
    box, _ = trim(page)
    assert step == 2
    assert np.abs(np.subtract(box, (100, 1300, 100, 1200))).max() <= step


def test_a_letter_is_found_and_replaced_by_its_surroundings():
    clean = film(600, 520)
    marked = Image.fromarray(clean.astype(np.float32))
    draw = ImageDraw.Draw(marked)
    draw.rectangle((480, 60, 486, 95), fill=1.4)
    draw.rectangle((480, 90, 503, 95), fill=1.4)
    marked = np.array(marked)
    mask, notes = mask_markers(marked)
    assert mask[60:96, 480:487].all()
    assert mask.mean() < 0.01
    assert "1 burnt-in marker replaced" in notes[0]
    assert np.abs(fill(marked, mask) - clean)[mask].mean() < 0.05  # the letter itself was off by 1
    np.testing.assert_array_equal(fill(marked, mask)[~mask], marked[~mask])


def test_metal_inside_the_chest_is_no_marker():
    clipped = film(600, 520)
    clipped[290:310, 250:262] = 1.4
    assert not mask_markers(clipped)[0].any()
    assert not mask_markers(film(600, 520))[0].any()


def photographed(corners, ground=0.0):
    """A film of 400 x 400 seen with its corners (x, y, clockwise) on a picture of 480 x 480."""
    film8 = Image.fromarray((np.clip(film(400, 400) + 0.2 - ground / 2, 0, 1) * 255).astype(np.uint8))
    equations, wanted = [], []
    for (x, y), (u, v) in zip(corners, ((0, 0), (400, 0), (400, 400), (0, 400))):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        wanted += [u, v]
    coefficients = np.linalg.solve(np.array(equations, float), np.array(wanted, float))
    seen = film8.transform((480, 480), Image.Transform.PERSPECTIVE, coefficients, fillcolor=int(255 * ground))
    return np.asarray(seen, float)


def test_a_photograph_taken_at_an_angle_is_named():
    slanted = photographed(((60, 30), (420, 60), (400, 440), (30, 450)))
    assert "crop and straighten" in perspective(slanted)


def test_straight_and_tilted_films_are_no_photographs():
    assert perspective(photographed(((40, 40), (440, 40), (440, 440), (40, 440)))) is None
    assert perspective(photographed(((60, 30), (450, 60), (420, 450), (30, 420)))) is None
    collimated = lateral_with_air()
    collimated[:50], collimated[-60:] = 0, 0
    assert perspective(collimated) is None
    assert perspective(np.pad(np.pad(lateral_with_air(), 12), 28, constant_values=1.0)) is None
    assert perspective(film()) is None
    assert perspective(picture(300, 260)) is None
