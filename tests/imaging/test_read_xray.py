"""Reading X-ray pictures: formats, scales, sizes, broken files, mixed-up views."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_data import make_hu
from tests.helpers.xray_cases import eight, picture, refused, sixteen, write_dicom
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, hu_to_unit, render_xrays
from xray2ct.imaging import film, xray_scale
from xray2ct.imaging.film import body_width, check_spacings, check_views
from xray2ct.imaging.read_xray import REFERENCE_PERCENTILES, read_xray, write_png16
from xray2ct.imaging.stored_xray import Exposure

# ------------------------------------------------------------------------------------------------
# Formats and scales


def test_png16_round_trip_is_exact(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    values = np.concatenate([values[::2], values[1::2][::-1]])  # every value, brightest in the middle
    write_png16(tmp_path / "x.png", values / 65535)
    with Image.open(tmp_path / "x.png") as written:
        assert np.array_equal(np.asarray(written), values)
    xray = read_xray(tmp_path / "x.png")
    assert xray.pixels.dtype == np.float32
    assert np.array_equal(np.rint(xray.pixels.astype(np.float64) * 65535), values)
    assert xray.notes == []
    assert read_xray(tmp_path / "x.png", size=256).notes == []


def test_write_png16_clips_rounds_and_refuses(tmp_path):
    write_png16(tmp_path / "x.png", np.array([[-1.0, 0.4 / 65535, 0.6 / 65535, 2.0]]))
    assert np.asarray(Image.open(tmp_path / "x.png")).tolist() == [[0, 0, 1, 65535]]
    for bad in (np.zeros((1, 4, 4)), np.full((4, 4), np.nan), np.full((4, 4), np.inf)):
        with pytest.raises(ValueError, match=r"y\.png"):
            write_png16(tmp_path / "y.png", bad)
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF", ".bmp"])
def test_8_bit_pictures_are_divided_by_255(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(eight()).save(path)
    xray = read_xray(path)
    assert np.array_equal(xray.pixels, (eight() / 255).astype(np.float32))
    assert xray.notes == []


@pytest.mark.parametrize("name", ["x.png", "x.tif", "big_endian.tif"])
def test_16_bit_pictures_are_divided_by_65535(tmp_path, name):
    values = sixteen()
    if name.startswith("big"):
        Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read_xray(tmp_path / name).pixels, (values / 65535).astype(np.float32))


def test_jpeg_is_close_to_the_picture(tmp_path):
    Image.fromarray(eight()).save(tmp_path / "x.jpg", quality=95)
    assert np.abs(read_xray(tmp_path / "x.jpg").pixels - picture()).max() < 0.03


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_colour_pictures_become_grey_and_say_so(tmp_path, mode):
    Image.fromarray(eight()).convert(mode).save(tmp_path / "x.png")
    xray = read_xray(tmp_path / "x.png")
    assert np.abs(xray.pixels - eight() / 255).max() <= 1.01 / 255
    assert xray.notes == [f"converted from colour ({mode}) to grey"]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_1_bit_pictures_are_refused(tmp_path, suffix):
    Image.fromarray(eight()).convert("1").save(tmp_path / f"x{suffix}")
    refused(tmp_path / f"x{suffix}", "1-bit picture.*expected 8 or 16 bit")


def test_float_tiff_is_taken_as_it_is(tmp_path):
    Image.fromarray(picture().astype(np.float32)).save(tmp_path / "x.tif")
    assert np.array_equal(read_xray(tmp_path / "x.tif").pixels, picture().astype(np.float32))


@pytest.mark.parametrize("make", [picture, eight, sixteen])
def test_npy_scale_follows_its_type(tmp_path, make):
    array = make()
    scale = {"f": 1.0, "u": np.iinfo(array.dtype).max if array.dtype.kind == "u" else None}[array.dtype.kind]
    np.save(tmp_path / "x.npy", array)
    np.save(tmp_path / "batch.npy", array[None, None])
    for name in ("x.npy", "batch.npy"):
        assert read_xray(tmp_path / name).pixels == pytest.approx(array / scale, abs=1e-6)


def test_values_beyond_the_projects_scale_are_refused_unless_percentiles_are_asked_for(tmp_path):
    for array in (picture(full=3.0), picture() - 0.5, (1000 * picture()).astype(np.int16)):
        np.save(tmp_path / "x.npy", array)
        refused(tmp_path / "x.npy", "expected 0 to 1 .*percentile")
        assert read_xray(tmp_path / "x.npy", "percentile").pixels.max() <= 1


@pytest.mark.parametrize("view", [0, 1])
def test_percentiles_are_mapped_to_those_of_the_projects_xrays(tmp_path, view):
    results = []
    for name, array in {"small": picture(full=1 / 7), "large": picture(full=900) + 55}.items():
        np.save(tmp_path / f"{name}.npy", array)
        results.append(read_xray(tmp_path / f"{name}.npy", "percentile", view=view).pixels)
    assert results[0] == pytest.approx(results[1], abs=1e-5)  # scale and offset do not matter
    expected = np.clip(REFERENCE_PERCENTILES[view], 0, 1)
    assert np.percentile(results[0], [1, 99]) == pytest.approx(expected, abs=0.005)


def test_reference_percentiles_fit_rendered_xrays():
    volume = torch.from_numpy(hu_to_unit(make_hu(0, 64).astype(np.float32)))[None, None]
    for view, image in enumerate(render_xrays(volume, Geometry(), (128, 128))[0]):
        low, high = np.percentile(image.numpy(), [1, 99])
        assert low == pytest.approx(REFERENCE_PERCENTILES[view][0], abs=0.1)
        assert high == pytest.approx(REFERENCE_PERCENTILES[view][1], abs=0.2)


def test_unknown_normalization_is_named(tmp_path):
    Image.fromarray(eight()).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="normalization is 'minmax'; expected one of auto, manifest, percentile"):
        read_xray(tmp_path / "x.png", "minmax")


# ------------------------------------------------------------------------------------------------
# Unknown increasing scales


@pytest.mark.parametrize("view", [0, 1])
def test_histogram_undoes_any_increasing_curve(tmp_path, view):
    """Gamma or a missing logarithm change nothing; percentiles become the reference's, the order stays."""
    truth = picture() + 0.01 * np.random.default_rng(0).random((48, 48))  # no two pixels alike
    curves = {"plain": truth, "gamma": truth**2.2, "intensity": 1 - np.exp(-2.5 * truth)}
    results = []
    for name, values in curves.items():
        np.save(tmp_path / f"{name}.npy", 1000.0 * values + 50)
        results.append(read_xray(tmp_path / f"{name}.npy", normalization="histogram", view=view).pixels)
    for result in results:
        assert np.abs(result - results[0]).max() < 0.1  # between the percentiles the curves' own bend is left
        found = np.percentile(result, xray_scale.HISTOGRAM_PERCENTILES)
        assert found == pytest.approx(xray_scale.REFERENCE_HISTOGRAMS[view], abs=0.01)
        assert (np.diff(result.ravel()[np.argsort(truth.ravel())]) >= -1e-6).all()


def test_values_that_many_pixels_share_stay_one_value(tmp_path):
    pixels = picture()  # a fifth of it is air, exactly 0
    np.save(tmp_path / "air.npy", pixels)
    result = read_xray(tmp_path / "air.npy", normalization="histogram").pixels
    assert len(np.unique(result[pixels == 0])) == 1
    assert result[pixels == 0].max() <= result[pixels > 0].min()


def test_a_picture_of_few_values_has_no_histogram(tmp_path):
    pixels = np.zeros((64, 64))
    pixels[:, 20:40] = 1
    np.save(tmp_path / "two.npy", pixels)
    with pytest.raises(InputError, match=r"two\.npy: most pixels have the same value"):
        read_xray(tmp_path / "two.npy", normalization="histogram")


# ------------------------------------------------------------------------------------------------
# Scale of the patient


GEOMETRY = Geometry()  # source to detector 1800 mm, to the isocentre 1600 mm; the detector sees 360 mm there


def blob_width_mm(pixels, extent_mm=360.0):
    """Width in mm at the isocentre of what is brighter than half, in a picture of the model's whole field."""
    return (pixels[pixels.shape[0] // 2] > 0.5 * pixels.max()).sum() * extent_mm / pixels.shape[1]


def box(width_mm, spacing_mm, shape):
    """A picture with a bright box of a width, in millimetres on the detector."""
    x = (np.arange(shape[1]) + 0.5 - shape[1] / 2) * spacing_mm
    y = (np.arange(shape[0]) + 0.5 - shape[0] / 2) * spacing_mm
    return np.where((np.abs(x) < width_mm / 2) & (np.abs(y[:, None]) < 150), 3000, 10).astype(np.uint16)


@pytest.mark.parametrize("shape", [(500, 400), (300, 500)])
def test_pixel_spacing_brings_the_patient_to_the_models_scale(tmp_path, shape):
    """100 mm at the isocentre, whatever the detector's size and aspect: cut or padded, never stretched."""
    stored = box(100 * 1800 / 1600, 1.0, shape)
    path = write_dicom(tmp_path / "x.dcm", stored, ImagerPixelSpacing=[1.0, 1.0])
    xray = read_xray(path, size=256, geometry=GEOMETRY)
    assert blob_width_mm(xray.pixels) == pytest.approx(100, abs=3)
    assert "mm that the model sees" in xray.notes[0]
    plain = read_xray(path, size=256)  # without a geometry the whole picture is taken for the field
    assert blob_width_mm(plain.pixels) != pytest.approx(100, abs=10)


def test_distances_of_the_header_and_of_the_options_scale_too(tmp_path):
    stored = box(100 * 1.25, 1.0, (500, 500))  # magnified by 1.25: detector at 1500 mm, patient at 1200
    header = {"ImagerPixelSpacing": [1.0, 1.0], "DistanceSourceToDetector": "1500"}
    header["EstimatedRadiographicMagnificationFactor"] = "1.25"
    path = write_dicom(tmp_path / "x.dcm", stored, **header)
    assert blob_width_mm(read_xray(path, size=256, geometry=GEOMETRY).pixels) == pytest.approx(100, abs=3)
    np.save(tmp_path / "x.npy", stored / 4095.0)
    given = Exposure(1.0, 1500.0, 1200.0)
    pixels = read_xray(tmp_path / "x.npy", size=256, geometry=GEOMETRY, exposure=given).pixels
    assert blob_width_mm(pixels) == pytest.approx(100, abs=3)
    twice = read_xray(path, size=256, geometry=GEOMETRY, exposure=Exposure(pixel_spacing_mm=2.0)).pixels
    assert blob_width_mm(twice) == pytest.approx(200, abs=3)  # options go before the header


def test_the_projects_own_xrays_fill_the_field_exactly(tmp_path):
    """A rendered X-ray with its true spacing is left as it is."""
    stored = np.rint(picture(full=4000)).astype(np.uint16)
    spacing = GEOMETRY.detector_mm / 64
    square = np.pad(stored, ((0, 64 - stored.shape[0]), (0, 64 - stored.shape[1])))
    path = write_dicom(tmp_path / "x.dcm", square, ImagerPixelSpacing=[spacing, spacing])
    xray = read_xray(path, geometry=GEOMETRY)
    assert np.array_equal(xray.pixels, (square / 4095).astype(np.float32))
    assert xray.notes == []


@pytest.mark.parametrize(
    "header",
    [
        {"ImagerPixelSpacing": [1.0, 1.0], "PixelSpacing": [0.8, 0.8]},  # the detector's goes before a calibrated one
        {"PixelSpacing": [1.0, 1.0]},
        {"NominalScannedPixelSpacing": [1.0, 1.0], "PixelSpacing": [3.0, 3.0]},
        {"PixelSpacing": [1600 / 1800] * 2, "PixelSpacingCalibrationType": "GEOMETRY"},  # of the patient's plane
        {"ImagerPixelSpacing": [1.0, 1.0], "EstimatedRadiographicMagnificationFactor": "1.25"},
    ],
)
def test_each_spacing_belongs_to_its_plane(tmp_path, header):
    magnified = float(header.get("EstimatedRadiographicMagnificationFactor", 1800 / 1600))
    stored = box(100 * magnified, 1.0, (500, 500))
    path = write_dicom(tmp_path / "x.dcm", stored, **header)
    xray = read_xray(path, size=256, geometry=GEOMETRY)
    assert blob_width_mm(xray.pixels) == pytest.approx(100, abs=3)
    assert xray.spacing_known
    own = read_xray(path, size=256, geometry=GEOMETRY, exposure=Exposure(2.0)).pixels  # of the detector, always
    assert blob_width_mm(own) == pytest.approx(200 * magnified / 1.125, abs=3)  # at the model's distances


def test_a_spacing_of_one_file_only_is_refused_naming_the_other(tmp_path):
    stored = np.rint(picture(full=4000)).astype(np.uint16)
    paths = [write_dicom(tmp_path / "a.dcm", stored, ImagerPixelSpacing=[8.0, 8.0]), tmp_path / "b.npy"]
    np.save(paths[1], picture())
    for exposure, refusal in ((None, True), (Exposure(8.0), False)):
        views = {path: read_xray(path, geometry=GEOMETRY, exposure=exposure) for path in paths}
        if refusal:
            with pytest.raises(InputError, match=r"b\.npy: its pixel spacing is missing, that of .*a\.dcm is known"):
                check_spacings(views)
        else:
            check_spacings(views)
        check_spacings({paths[0]: views[paths[0]]})


def test_impossible_spacings_and_distances_are_named(tmp_path):
    stored = np.rint(picture(full=4000)).astype(np.uint16)
    tiny = write_dicom(tmp_path / "x.dcm", stored, ImagerPixelSpacing=[0.01, 0.01])
    with pytest.raises(InputError, match=r"x\.dcm: shows .* mm of the patient by its pixel spacing of 0\.01 mm"):
        read_xray(tiny, geometry=GEOMETRY)
    oblong = write_dicom(tmp_path / "y.dcm", stored, ImagerPixelSpacing=[0.2, 0.4])
    refused(oblong, r"y\.dcm: its pixels are 0\.2 x 0\.4 mm; expected square ones")
    aspect = write_dicom(tmp_path / "z.dcm", stored, PixelAspectRatio=["2", "1"])
    refused(aspect, r"z\.dcm: its pixels are 2 x 1; expected square ones")
    with pytest.raises(InputError, match="--sid-mm is 1600, beyond the detector"):
        Exposure(1.0, 1500.0, 1600.0)
    with pytest.raises(InputError, match="--pixel-spacing-mm is -1"):
        Exposure(-1.0)


# ------------------------------------------------------------------------------------------------
# Size


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 96)])
def test_oblong_pictures_are_padded_not_stretched(tmp_path, rows, columns):
    values = np.full((rows, columns), 0.1)
    middle = slice(rows // 2 - 12, rows // 2 + 12), slice(columns // 2 - 12, columns // 2 + 12)
    values[middle] = 0.9
    np.save(tmp_path / "x.npy", values)
    xray = read_xray(tmp_path / "x.npy", size=96)
    assert xray.notes == [f"padded from {columns} x {rows} to a square, not stretched"]
    expected = np.zeros((96, 96))  # air, not a smeared border
    start = (96 - rows) // 2, (96 - columns) // 2
    expected[start[0] : start[0] + rows, start[1] : start[1] + columns] = 0.1
    expected[36:60, 36:60] = 0.9  # still square and in the middle
    assert xray.pixels == pytest.approx(expected)


def test_shrinking_averages_and_growing_interpolates(tmp_path):
    write_png16(tmp_path / "x.png", picture(64, 64))
    small, large = (read_xray(tmp_path / "x.png", size=size) for size in (32, 96))
    assert small.pixels == pytest.approx(picture(64, 64).reshape(32, 2, 32, 2).mean((1, 3)), abs=2e-5)
    assert small.notes == ["resized from 64 x 64 to 32 x 32"]
    assert large.pixels.shape == (96, 96)
    assert large.pixels.mean() == pytest.approx(picture(64, 64).mean(), rel=0.01)


def test_shrinking_by_a_fraction_weighs_pixels_by_area(tmp_path):
    np.save(tmp_path / "x.npy", picture(48, 48))
    doubled = np.kron(picture(48, 48), np.ones((2, 2)))  # 96 = 3 x 32: every area is a whole number of these
    expected = doubled.reshape(32, 3, 32, 3).mean((1, 3))
    assert read_xray(tmp_path / "x.npy", size=32).pixels == pytest.approx(expected, abs=1e-5)


def test_resizing_keeps_a_gradient_on_its_place(tmp_path):
    ramp = np.tile(np.linspace(0.1, 0.7, 60), (60, 1))
    np.save(tmp_path / "x.npy", ramp)
    for size in (40, 30, 120):
        place = ((np.arange(size) + 0.5) * 60 / size - 0.5).clip(0, 59)
        expected = np.interp(place, np.arange(60), ramp[0])
        assert read_xray(tmp_path / "x.npy", size=size).pixels[7] == pytest.approx(expected, abs=0.006)


# ------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((64, 64)), "all black"),
        (np.full((64, 64), 0.25), r"constant \(0.25\)"),
        (np.where(np.eye(64), np.nan, 0.5), "NaN or infinite"),
        (np.where(np.eye(64), np.inf, 0.5), "NaN or infinite"),
        (np.zeros((64, 64, 64)), r"\(64, 64, 64\)"),
        (np.zeros(64), r"shape \(64,\)"),
        (np.float64(3), r"shape \(\)"),
        (np.zeros((0, 64)), r"shape \(0, 64\)"),
        (picture(31, 64), r"\(31, 64\); expected .*32 x 32"),
        (np.zeros((64, 64), complex), "complex128; expected numbers"),
        (np.array([{"a": 1}]), "not a readable .npy"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path, array, match):
    np.save(tmp_path / "x.npy", array)
    refused(tmp_path / "x.npy", match)


def test_black_and_constant_pictures_are_refused(tmp_path):
    for value, match in ((0, "all black"), (77, r"constant \(77\)")):
        Image.fromarray(np.full((64, 64), value, np.uint8)).save(tmp_path / "x.png")
        refused(tmp_path / "x.png", match)
    sparse = np.zeros((64, 64))
    sparse[30, 30] = 1.0
    np.save(tmp_path / "x.npy", sparse)
    refused(tmp_path / "x.npy", "98 % of the pixels", normalization="percentile")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.npy"])
def test_files_cut_anywhere_are_refused(tmp_path, name):
    path = tmp_path / name
    if name.endswith("npy"):
        np.save(path, picture())
    else:
        Image.fromarray(eight(rows=96, columns=96)).save(path)
    content = path.read_bytes()
    for share in (0.0, 0.005, 0.02, 0.1, 0.4, 0.7, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        refused(path, "not a readable")


def test_missing_and_unknown_files_are_refused(tmp_path):
    refused(tmp_path / "none.png", "no such X-ray file")
    refused(tmp_path, "no such X-ray file")
    (tmp_path / "notes.txt").write_text("not an X-ray")
    refused(tmp_path / "notes.txt", r"unknown X-ray format; expected .*\.png.*DICOM")
    (tmp_path / "text.png").write_text("not a picture")
    refused(tmp_path / "text.png", "not a readable picture")


@pytest.mark.parametrize("normalization", ["manifest", "percentile"])
def test_inverted_pictures_are_refused_and_can_be_inverted_back(tmp_path, normalization):
    upright, inverted = tmp_path / "x.png", tmp_path / "y.png"
    write_png16(upright, picture())
    write_png16(inverted, 1 - picture())
    refused(inverted, "bone bright .*--invert", normalization=normalization)
    refused(upright, "bone bright", normalization=normalization, invert=True)
    again = read_xray(inverted, normalization, invert=True)
    assert again.notes == ["inverted"]
    assert again.pixels == pytest.approx(read_xray(upright, normalization).pixels, abs=2e-5)


# ------------------------------------------------------------------------------------------------
# Two views


@pytest.fixture(scope="module")
def views():
    """PA and lateral of a synthetic chest, with (wide) and without (full) air beside it."""
    volume = torch.from_numpy(hu_to_unit(make_hu(0, 48).astype(np.float32)))[None, None]
    return render_xrays(volume, Geometry(), (96, 96))[0].clip(0, 1).numpy()


def test_right_views_pass_and_swapped_ones_are_named(views):
    pa, lateral = views
    assert body_width(lateral) < body_width(pa)
    assert check_views(pa, lateral) == []
    with pytest.raises(InputError, match=r"a\.png .* and b\.png .* look swapped: the body is \d+%"):
        check_views(lateral, pa, ("a.png", "b.png"))


def test_one_picture_given_twice_is_refused(views):
    with pytest.raises(InputError, match=r"a\.png and b\.png are the same picture"):
        check_views(views[0], views[0].copy(), ("a.png", "b.png"))


def test_views_that_fill_the_picture_say_nothing_about_their_order(views):
    pa, lateral = (np.clip(0.3 + view, 0, 1) for view in views)
    assert check_views(pa, lateral) == []
    assert check_views(lateral, pa) == []


def test_views_of_different_heights_raise_a_doubt(views):
    pa, lateral = views
    (doubt,) = check_views(pa, lateral[::-1], ("a.png", "b.png"))
    assert "a.png and b.png hardly match row by row" in doubt
    assert check_views(pa, np.repeat(np.repeat(lateral, 2, 0), 2, 1)) == []  # sizes may differ


def test_swap_threshold_separates_both_orders(views):
    ratio = body_width(views[1]) / body_width(views[0])
    assert ratio < film.SWAPPED_WIDTH_RATIO < 1 / ratio
