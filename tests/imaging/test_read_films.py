"""Two films of any source: views, sides, polarity, scale; what is refused, and with which words."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from tests.helpers.xray_cases import write_dicom
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.film_sides import FilmOptions
from xray2ct.imaging.read_films import read_films, read_pair
from xray2ct.imaging.read_xray import write_png16
from xray2ct.imaging.stored_xray import Exposure

FILMS = Path(__file__).with_name("films")


def grey(name, edge=128):
    with Image.open(FILMS / name) as picture:
        return np.asarray(picture.convert("L").resize((edge, edge)))


PA, LATERAL, OTHER_PA = grey("lidc_0001_pa.png"), grey("lidc_0001_lat.png"), grey("mhh_7afaaccc.png")


@pytest.fixture
def write(tmp_path):
    def write(name, pixels):
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def pa(write):
    return write("pa.png", PA)


@pytest.fixture
def lateral(write):
    return write("lateral.png", LATERAL)


def shows(xray, picture) -> float:
    """Correlation of what was read with a picture of the same field."""
    small = np.asarray(Image.fromarray(picture).resize(xray.pixels.shape), dtype=float)
    return float(np.corrcoef(xray.pixels.ravel(), small.ravel())[0, 1])


def test_upright_films_need_no_decision(pa, lateral):
    pair = read_pair(pa, lateral, size=64)
    assert pair.doubts == []
    assert shows(pair.pa, PA) > 0.95
    assert shows(pair.lateral, LATERAL) > 0.85
    assert sum("by their distribution inside the body" in note for note in pair.notes) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:, ::-1], "faced right: mirrored"),
        (lambda x: 255 - x, "bone looked dark: inverted"),
        (lambda x: np.rot90(x), "lay on its side: turned by 90 degrees clockwise"),
        (lambda x: x[::-1, ::-1], "lay upside down: turned by 180 degrees"),
        (lambda x: np.pad(x, 20, constant_values=255), "uniform frame cut off"),
    ],
    ids=["mirrored", "inverted", "on its side", "upside down", "on a white page"],
)
def test_a_lateral_is_put_right_with_a_note(write, pa, change, words):
    pair = read_pair(pa, write("x.png", change(LATERAL)), size=64)
    assert shows(pair.lateral, LATERAL) > 0.85
    assert any(words in note for note in pair.notes)


def test_films_given_the_wrong_way_round_are_exchanged(pa, lateral):
    pair = read_pair(lateral, pa, size=64)
    assert np.array_equal(pair.pa.pixels, read_pair(pa, lateral, size=64).pa.pixels)
    assert any("lateral.png: given as the PA view, is the lateral view" in doubt for doubt in pair.doubts)


def test_the_user_decides_before_the_pixels(write, pa):
    """Each option leaves as it is, or does, what the pixels would not."""
    mirrored = write("mirrored.png", LATERAL[:, ::-1])
    as_it_lies = read_pair(pa, mirrored, size=64, options=FilmOptions(view_from="header"))
    assert shows(as_it_lies.lateral, LATERAL[:, ::-1]) > 0.85
    flipped = read_pair(pa, write("lateral.png", LATERAL), size=64, options=FilmOptions(flip_lateral=True))
    assert shows(flipped.lateral, LATERAL[:, ::-1]) > 0.85
    turned = read_pair(pa, write("x.png", np.rot90(LATERAL)), size=64, options=FilmOptions(rotate=(0, 90)))
    assert shows(turned.lateral, LATERAL) > 0.85
    assert turned.doubts == []
    dark = write("dark.png", 255 - LATERAL)
    left = read_pair(pa, dark, size=64, options=FilmOptions(polarity_check=False))
    assert not any("inverted" in note for note in left.notes)
    both = read_pair(write("dark_pa.png", 255 - PA), dark, size=64, options=FilmOptions(invert=True))
    assert shows(both.lateral, LATERAL) > 0.85
    assert both.doubts == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"view_from": "guess"}, "--view-from is 'guess'"),
        ({"rotate": (45, 0)}, "--rotate is"),
        ({"thorax_width_mm": 25}, "--thorax-width-mm is 25; expected 100 to 500"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        FilmOptions(**options)


def test_own_xrays_are_read_bit_for_bit(tmp_path):
    """Known by their mark under any name, and never looked at: an ellipse is no chest."""
    v, u = np.mgrid[-1:1:64j, -1:1:64j]
    pictures = [0.5 * np.clip(1.2 - (v / 1.1) ** 2 - (u / width) ** 2, 0, 1) for width in (0.8, 0.6)]
    paths = [tmp_path / "a_pa_drr.png", tmp_path / "a_lat_drr.png"]
    copies = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, copy, picture in zip(paths, copies, pictures):
        write_png16(path, picture)
        copy.write_bytes(path.read_bytes())
    for pair in (read_pair(*paths), read_pair(*copies)):
        for xray, picture in zip(pair.views, pictures):
            assert np.array_equal(np.rint(65535 * xray.pixels.astype(np.float64)), np.rint(65535 * picture))
        assert pair.notes == []
    with pytest.raises(InputError, match="look swapped"):
        read_pair(*copies[::-1])


# ------------------------------------------------------------------------------------------------
# Scale

GEOMETRY = Geometry()


def dicom(path, picture, mm):
    return write_dicom(path, np.rint(picture * 16.0), ImagerPixelSpacing=[mm, mm])


def test_each_films_own_spacing_is_used(tmp_path):
    fine, coarse = GEOMETRY.detector_mm / 128, GEOMETRY.detector_mm / 100
    paths = [dicom(tmp_path / "a.dcm", PA, fine), dicom(tmp_path / "b.dcm", grey("lidc_0001_lat.png", 100), coarse)]
    pair = read_pair(*paths, size=64, geometry=GEOMETRY)
    assert pair.doubts == []
    assert shows(pair.pa, PA) > 0.9
    assert shows(pair.lateral, LATERAL) > 0.85


def test_a_spacing_left_over_from_the_whole_picture_is_not_used(tmp_path):
    """0.168 mm on a thumbnail; then a spacing that is 40 % too small, which no more than the lungs tell."""
    right = GEOMETRY.detector_mm / 128
    for mm, words in (
        (0.168, "mm, too small for a chest: left over"),
        (0.6 * right, "does not fit the size of the"),
    ):
        paths = [dicom(tmp_path / "a.dcm", PA, mm), dicom(tmp_path / "b.dcm", LATERAL, mm)]
        pair = read_pair(*paths, size=64, geometry=GEOMETRY)
        assert any(words in doubt for doubt in pair.doubts)
        assert any("scale estimated from the size of the lungs" in doubt for doubt in pair.doubts)
        assert shows(pair.pa, PA) > 0.8  # 360 mm within the estimate's 11 %


def test_a_spacing_of_one_film_only_is_not_used(tmp_path, lateral):
    path = dicom(tmp_path / "a.dcm", PA, GEOMETRY.detector_mm / 128)
    pair = read_pair(path, lateral, size=64, geometry=GEOMETRY)
    assert f"{lateral}: its pixel spacing is missing, that of {path} is known" in pair.doubts[0]
    alone = read_pair(tmp_path / "a.dcm", lateral, size=64, geometry=GEOMETRY, exposure=Exposure(405 / 128))
    assert shows(alone.pa, PA) > 0.95


def test_a_thorax_width_sets_the_scale(pa, lateral):
    def width(mm):
        pair = read_pair(pa, lateral, size=64, geometry=GEOMETRY, options=FilmOptions(thorax_width_mm=mm))
        assert any(f"scale set by a thorax {mm} mm wide" in doubt for doubt in pair.doubts)
        return (pair.pa.pixels > 0.15).any(axis=0).sum()

    assert width(160) / width(200) == pytest.approx(0.8, abs=0.08)


# ------------------------------------------------------------------------------------------------
# What is no pair of chest films


def hand():
    """A palm and five fingers."""
    v, u = np.mgrid[-1:1:128j, -1:1:128j]
    picture = 0.5 * (np.hypot(u / 0.45, (v - 0.5) / 0.45) < 1)
    for angle in np.deg2rad((-40, -18, 0, 16, 34)):
        across, along = u * np.cos(angle) + (v - 0.8) * np.sin(angle), (v - 0.8) * np.cos(angle) - u * np.sin(angle)
        picture = np.maximum(picture, 0.6 * ((np.abs(across) < 0.09) & (along < 0) & (along > -1.5)))
    return np.rint(240 * picture + np.random.default_rng(0).uniform(0, 15, picture.shape)).astype(np.uint8)


def head():
    """A skull in profile: a bright shell, brain inside."""
    v, u = np.mgrid[-1:1:128j, -1:1:128j]
    inside = np.hypot(u / 0.8, (v + 0.1) / 0.75)
    return np.rint(255 * (0.35 * (inside < 1) + 0.5 * ((inside > 0.9) & (inside < 1)))).astype(np.uint8)


def axial_slice():
    """A CT slice of the thorax: body, two lungs, spine."""
    v, u = np.mgrid[-1:1:128j, -1:1:128j]
    picture = 0.5 * (np.hypot(u / 0.9, v / 0.65) < 1)
    for side in (-1, 1):
        picture[np.hypot((u - 0.42 * side) / 0.32, v / 0.45) < 1] = 0.08
    picture[np.hypot(u / 0.12, (v - 0.4) / 0.12) < 1] = 0.95
    return np.rint(255 * picture).astype(np.uint8)


def noise():
    return np.random.default_rng(0).integers(100, 110, (128, 128)).astype(np.uint8)


@pytest.mark.parametrize("picture", [hand, head, axial_slice])
def test_what_is_no_chest_is_refused(write, lateral, picture):
    with pytest.raises(InputError, match=r"x\.png: does not look like a chest X-ray .*--no-check"):
        read_pair(write("x.png", picture()), lateral, size=64)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (PA, OTHER_PA, r"one\.png and .*two\.png both look like frontal films; expected a frontal and a lateral"),
        (LATERAL, LATERAL[5:-5, ::-1] // 2, r"both look like lateral films|are the same picture"),
        (PA, PA, r"one\.png and .*two\.png are the same picture"),
        (PA, PA[:, ::-1], "are the same picture"),
        (PA, 255 - PA, "are the same picture"),
    ],
    ids=["two frontals", "two laterals", "the same", "the same mirrored", "the same inverted"],
)
def test_two_films_of_one_view_are_refused(write, first, second, words):
    paths = write("one.png", first), write("two.png", second)
    with pytest.raises(InputError, match=words):
        read_pair(*paths, size=64)


def test_a_single_film_of_the_other_view_is_refused(lateral):
    with pytest.raises(InputError, match=r"lateral\.png: the picture shows a lateral view; expected the PA view"):
        read_films((lateral, None), size=64)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (noise(), "holds nothing but noise; expected an X-ray"),
        (np.full((128, 128), 255, np.uint8), r"the picture is constant \(255\)"),
        (np.zeros((128, 128), np.uint8), "the picture is all black"),
        (PA > 100, "a 1-bit picture, black and white only; expected 8 or 16 bit grey"),
    ],
    ids=["noise", "white page", "empty", "1 bit"],
)
def test_pictures_without_a_film_are_refused(write, lateral, pixels, words):
    with pytest.raises(InputError, match=rf"x\.png: .*{words}"):
        read_pair(write("x.png", pixels), lateral, size=64)


def test_a_film_of_40_megapixels_is_reduced_before_it_is_looked_at(write, lateral):
    """Its blocks are averaged; the result is that of the small film."""
    large = np.repeat(np.repeat(PA, 50, axis=0), 50, axis=1)
    assert large.size == 40_960_000
    pair = read_pair(write("large.bmp", large), lateral, size=64)
    assert shows(pair.pa, PA) > 0.95
    assert pair.doubts == []


def test_no_check_reads_what_would_be_refused(write, lateral):
    pair = read_pair(write("x.png", hand()), lateral, size=64, options=FilmOptions(check=False))
    assert any("does not look like a chest X-ray" in doubt for doubt in pair.doubts)


# -- what is seen --------------------------------------------------------------------------------


def box(edge, rows, columns):
    seen = np.zeros((edge, edge), np.float32)
    seen[slice(*rows), slice(*columns)] = 1
    return seen


def test_beyond_the_films_edge_nothing_is_seen(write, lateral):
    """128 pixels of 2.5 mm in a field of 360 mm, which has 144; 14 columns of the lateral are a frame, cut off."""
    given, pa = Exposure(2.5, spacing_at_patient=True), write("pa.png", OTHER_PA)
    pair = read_pair(pa, lateral, geometry=Geometry("parallel"), exposure=given)
    assert np.array_equal(pair.pa.seen, box(144, (8, 136), (8, 136)))
    assert np.array_equal(pair.lateral.seen, box(144, (8, 136), (15, 129)))
    for xray in pair.views:
        assert (xray.pixels[xray.seen == 0] == 0).all()
    smaller = read_pair(pa, lateral, size=48, geometry=Geometry("parallel"), exposure=given).pa
    expected = box(48, (3, 45), (3, 45))  # 8 of 144 pixels are 2 2/3 of 48
    expected[[2, 45], 3:45] = expected[3:45, [2, 45]] = 1 / 3
    expected[2, [2, 45]] = expected[45, [2, 45]] = 1 / 9
    assert smaller.seen == pytest.approx(expected, abs=1e-6)


def test_what_a_collimator_hides_is_not_seen(tmp_path, lateral):
    """Sixteen columns of 128 are cut off, and the rest is padded to a square: eight on each side."""
    edges = {"LeftVertical": 17, "RightVertical": 128, "UpperHorizontal": 1, "LowerHorizontal": 128}
    tags = {"CollimatorShape": "RECTANGULAR"} | {f"Collimator{side}Edge": place for side, place in edges.items()}
    path = write_dicom(tmp_path / "pa.dcm", 16 * OTHER_PA.astype(int), **tags)
    xray = read_pair(path, lateral, size=128).pa
    assert np.array_equal(xray.seen, box(128, (0, 128), (8, 120)))
    assert (xray.pixels[xray.seen == 0] == 0).all()


def test_a_whole_film_and_the_projects_own_xrays_are_seen_everywhere(tmp_path, write):
    assert (read_films((write("pa.png", OTHER_PA), None), size=64).pa.seen == 1).all()
    write_png16(tmp_path / "x_drr.png", PA / 400)
    assert (read_films((tmp_path / "x_drr.png", None)).pa.seen == 1).all()


def blurred(picture):
    return np.rint(ndimage.gaussian_filter(picture.astype(float), 4)).astype(np.uint8)


def test_a_position_that_the_picture_does_not_tell_is_noted(write, lateral):
    """Upside down, blurred and without its upper third, a frontal is taken as upright, but not without a word."""
    path = write("half.png", blurred(OTHER_PA[::-1, ::-1])[48:])
    pair = read_films((path, None), size=64)
    assert "half.png: taken as upright, with a confidence of" in pair.doubts[0]
    told = read_films((path, None), size=64, options=FilmOptions(view_from="header"))
    assert not any("upright" in doubt for doubt in told.doubts)


def test_a_picture_that_is_hardly_a_chest_does_not_decide_the_view(write):
    path = write("half.png", blurred(255 - PA[::-1, ::-1])[:, 48:])  # looks like a lateral, 15 % like a chest at all
    pair = read_films((path, None), size=64)
    assert any("which view it is cannot be told: taken for the PA view, as given" in doubt for doubt in pair.doubts)
