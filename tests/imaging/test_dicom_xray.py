"""DICOM X-rays: every statement of the header about the pixels is used, or the file is refused."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.xray_cases import lut, picture, refused, write_dicom
from xray2ct.files import InputError
from xray2ct.imaging.read_xray import read_xray


def test_dicom_is_divided_by_its_stored_range(tmp_path):
    stored = np.rint(picture(full=4000)).astype(np.uint16)
    for name in ("x.dcm", "IM0001"):  # also without a suffix
        xray = read_xray(write_dicom(tmp_path / name, stored))
        assert np.array_equal(xray.pixels, (stored / 4095).astype(np.float32))
        assert xray.notes == []


def test_monochrome1_is_inverted_about_the_stored_range(tmp_path):
    wanted = np.rint(picture(full=3000)).astype(np.uint16)  # darkest 0, brightest 3000 of 4095
    xray = read_xray(write_dicom(tmp_path / "x.dcm", 4095 - wanted, "MONOCHROME1"))
    assert np.array_equal(xray.pixels, (wanted / 4095).astype(np.float32))
    assert xray.notes == ["MONOCHROME1: inverted, so that bone is bright"]


def test_dicom_rescale_is_applied(tmp_path):
    stored = np.rint(picture(full=1000)).astype(np.uint16)
    path = write_dicom(tmp_path / "x.dcm", stored, RescaleSlope="2", RescaleIntercept="10")
    assert read_xray(path).pixels == pytest.approx((2.0 * stored + 10) / 4095, abs=1e-6)
    path = write_dicom(tmp_path / "y.dcm", stored, RescaleSlope="1", RescaleIntercept="-500")
    refused(path, "values -500 .*percentile")


def test_broken_dicoms_are_refused(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "x.dcm", np.rint(picture(full=4000)))
    path.write_bytes(path.read_bytes()[:-2000])
    refused(path, "not a readable DICOM")
    path.write_bytes(b"no DICOM at all")
    refused(path, "not a readable DICOM")
    frames = write_dicom(tmp_path / "f.dcm", np.zeros((80, 40)), Rows=40, NumberOfFrames=2)
    refused(frames, r"\(2, 40, 40\)")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(path, "reading DICOM X-rays needs pydicom; run: pip install 'pydicom>=3'")


# ------------------------------------------------------------------------------------------------
# Lookup tables and curves

STORED = np.rint(picture(full=4000)).astype(np.uint16)
CURVE = np.rint(1023 * (np.arange(4096) / 4095.0) ** 2)  # of 10 bits
SEQUENCES = {"VOILUTSequence": "VOI LUT applied", "ModalityLUTSequence": "Modality LUT applied"}


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_a_table_is_applied_on_the_scale_of_its_descriptor(tmp_path, sequence, vr):
    xray = read_xray(write_dicom(tmp_path / "x.dcm", STORED, **{sequence: [lut(CURVE, depth=10, vr=vr)]}))
    assert xray.pixels == pytest.approx(CURVE[STORED] / 1023.0, abs=1e-6)
    assert xray.notes == [SEQUENCES[sequence]]
    wide = read_xray(write_dicom(tmp_path / "y.dcm", STORED, **{sequence: [lut(CURVE, depth=12, vr=vr)]}))
    assert wide.pixels == pytest.approx(CURVE[STORED] / 4095.0, abs=1e-6)  # no value of it says so


def test_a_table_in_a_big_endian_file(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(write_dicom(tmp_path / "x.dcm", STORED, VOILUTSequence=[lut(CURVE, depth=10, order=">")]))
    data.PixelData = STORED.astype(">u2").tobytes()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    pydicom.dcmwrite(tmp_path / "y.dcm", data, implicit_vr=False, little_endian=False, force_encoding=True)
    assert read_xray(tmp_path / "y.dcm").pixels == pytest.approx(CURVE[STORED] / 1023.0, abs=1e-6)


def test_both_tables_apply_one_after_the_other(tmp_path):
    root = np.rint(65535 * (np.arange(4096) / 4095) ** 0.5)
    square = np.rint(255 * (np.arange(65536) / 65535) ** 2)
    square = lut(square, depth=8, count=0)  # 0 says 65,536 entries
    tables = {"ModalityLUTSequence": [lut(root)], "VOILUTSequence": [square]}
    xray = read_xray(write_dicom(tmp_path / "x.dcm", STORED, **tables))
    assert xray.pixels == pytest.approx(STORED / 4095.0, abs=1.01 / 255)
    assert xray.notes == ["Modality LUT applied", "VOI LUT applied"]


def test_a_table_starts_at_its_first_mapped_value(tmp_path):
    """Values before it get its first entry, those behind it its last; the rescale, here to below 0, comes before it."""
    ramp = np.arange(200, 1200)
    for first, tags in ((100, {}), (-900, {"RescaleSlope": "1", "RescaleIntercept": "-1000"})):
        xray = read_xray(write_dicom(tmp_path / "x.dcm", STORED, VOILUTSequence=[lut(ramp, first, 12)], **tags))
        assert xray.pixels == pytest.approx(ramp[(STORED.astype(int) - 100).clip(0, 999)] / 4095, abs=1e-6)
    tags["VOILUTSequence"] = [lut(ramp, -900 + 65536, 12)]  # the same number, written as an unsigned one
    assert np.array_equal(read_xray(write_dicom(tmp_path / "y.dcm", STORED, **tags)).pixels, xray.pixels)
    tags = {"RescaleSlope": "-1", "RescaleIntercept": "0", "VOILUTSequence": [lut(ramp, -4095 + 65536, 12)]}
    falling = read_xray(write_dicom(tmp_path / "z.dcm", 4095 - STORED, **tags)).pixels
    assert falling == pytest.approx(ramp[STORED.clip(0, 999)] / 4095, abs=1e-6)


def test_a_table_of_8_bits_may_hold_two_entries_in_a_word(tmp_path):
    entries = np.rint(255 * np.linspace(0, 1, 4096) ** 2).astype(np.uint8)
    item = lut(entries.view("<u2"), depth=8, count=4096)
    xray = read_xray(write_dicom(tmp_path / "x.dcm", STORED, VOILUTSequence=[item]))
    assert xray.pixels == pytest.approx(entries[STORED] / 255, abs=1e-6)


def test_the_first_of_several_tables_is_taken_and_noted(tmp_path):
    both = [lut(CURVE, depth=10), lut(CURVE[::-1], depth=10)]
    xray = read_xray(write_dicom(tmp_path / "x.dcm", STORED, VOILUTSequence=both))
    assert xray.pixels == pytest.approx(CURVE[STORED] / 1023.0, abs=1e-6)
    assert xray.notes == ["VOI LUT applied, the first of 2"]


def test_a_decreasing_table_shows_what_it_says(tmp_path):
    for photometric in ("MONOCHROME1", "MONOCHROME2"):  # what is stored dark is shown bright, then what that means
        stored = 4095 - STORED if photometric == "MONOCHROME2" else STORED
        path = write_dicom(tmp_path / "x.dcm", stored, photometric, VOILUTSequence=[lut(CURVE[::-1], depth=10)])
        assert read_xray(path).pixels == pytest.approx(
            CURVE[STORED] / 1023 if photometric == "MONOCHROME2" else 1 - CURVE[::-1][STORED] / 1023, abs=1e-6
        )


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"entries": CURVE[:100], "count": 4096, "depth": 10}, "holds 100 entries up to .* expected 4096 of 10 bits"),
        ({"entries": CURVE, "depth": 9}, "holds 4096 entries up to 1023; expected 4096 of 9 bits by its LUT Desc"),
        ({"entries": CURVE, "depth": 32}, "holds .* expected 4096 of 32 bits"),
    ],
)
def test_a_table_that_contradicts_its_descriptor_is_refused(tmp_path, sequence, item, words):
    path = write_dicom(tmp_path / "x.dcm", STORED, **{sequence: [lut(**item)]})
    refused(path, f"its {SEQUENCES[sequence][:-8]} {words}")


def test_windows_are_left_out_unless_they_are_sigmoids(tmp_path):
    window = {"WindowCenter": "1000", "WindowWidth": "500"}
    for function in (None, "LINEAR", "LINEAR_EXACT"):  # they would only clip
        linear = read_xray(write_dicom(tmp_path / "y.dcm", STORED, VOILUTFunction=function, **window))
        assert np.array_equal(linear.pixels, (STORED / 4095).astype(np.float32))
    expected = 1 / (1 + np.exp(-4 * (STORED - 1000.0) / 500))
    path = write_dicom(tmp_path / "z.dcm", STORED, VOILUTFunction="SIGMOID", **window)
    assert read_xray(path).pixels == pytest.approx(expected, abs=1e-6)
    several = {"WindowCenter": ["1000", "2000"], "WindowWidth": ["500", "100"], "VOILUTFunction": "SIGMOID"}
    several.update(RescaleSlope="-1", RescaleIntercept="4095")
    xray = read_xray(write_dicom(tmp_path / "z.dcm", 4095 - STORED, "MONOCHROME1", **several), invert=True)
    assert xray.pixels == pytest.approx(expected, abs=1e-6)
    assert xray.notes[0] == "VOI LUT applied: a sigmoid, the first of 2"
    refused(write_dicom(tmp_path / "u.dcm", STORED, VOILUTFunction="SIGMOID"), "SIGMOID; expected a Window Center")
    refused(write_dicom(tmp_path / "u.dcm", STORED, VOILUTFunction="CUBIC"), "VOI LUT Function is unknown")


# ------------------------------------------------------------------------------------------------
# Polarity and stored values


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_negative_slope_inverts_before_the_photometric_interpretation(tmp_path, photometric):
    stored = STORED if photometric == "MONOCHROME1" else 4095 - STORED
    path = write_dicom(tmp_path / "x.dcm", stored, photometric, RescaleSlope="-1", RescaleIntercept="4095")
    assert read_xray(path).pixels == pytest.approx(STORED / 4095, abs=1e-6)


@pytest.mark.parametrize("slope", ["0", "inf", "nan"])
def test_a_slope_that_maps_nothing_is_refused(tmp_path, slope):
    path = write_dicom(tmp_path / "x.dcm", STORED, RescaleSlope="7", RescaleIntercept="0")
    number = b"(\x00S\x10DS\x04\x00" + slope.ljust(4).encode()
    path.write_bytes(path.read_bytes().replace(b"(\x00S\x10DS\x02\x007 ", number))
    refused(path, f"RescaleSlope is {slope}, RescaleIntercept 0; expected")


def test_signed_values_are_inverted_about_their_own_range(tmp_path):
    """The mean of a signed range is -0.5."""
    path = write_dicom(tmp_path / "x.dcm", 2047 - STORED.astype(int), "MONOCHROME1")  # -1953 to 2047
    shifted = {"RescaleSlope": "1", "RescaleIntercept": "2048"}
    shifted = write_dicom(tmp_path / "y.dcm", 2047 - STORED.astype(int), "MONOCHROME1", **shifted)
    assert read_xray(shifted).pixels == pytest.approx(STORED / 4095, abs=1e-6)
    expected = read_xray(write_dicom(tmp_path / "z.dcm", STORED), "percentile").pixels
    assert read_xray(path, "percentile").pixels == pytest.approx(expected, abs=1e-6)
    refused(path, "values -2048 to .*percentile")


def test_presentation_lut_shape_inverts_once(tmp_path):
    for photometric, reason in (("MONOCHROME1", "MONOCHROME1"), ("MONOCHROME2", "Presentation LUT Shape INVERSE")):
        xray = read_xray(write_dicom(tmp_path / "x.dcm", 4095 - STORED, photometric, PresentationLUTShape="INVERSE"))
        assert xray.pixels == pytest.approx(STORED / 4095, abs=1e-6)
        assert xray.notes == [f"{reason}: inverted, so that bone is bright"]


def test_doubts_by_the_intensity_relationship_are_noted(tmp_path):
    for photometric, sign, slope, doubted in (
        ("MONOCHROME2", 1, 1, True),
        ("MONOCHROME2", -1, 1, False),
        ("MONOCHROME2", 1, -1, False),
        ("MONOCHROME1", 1, 1, False),
        ("MONOCHROME1", -1, 1, True),
    ):
        tags = {"PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": sign, "RescaleSlope": str(slope)}
        path = write_dicom(tmp_path / "x.dcm", STORED, photometric, RescaleIntercept="0", **tags)
        dark = (photometric == "MONOCHROME1") != (slope < 0)
        notes = " ".join(read_xray(path, "percentile", invert=dark).notes)
        assert ("Sign says that bone is dark" in notes) == doubted
    path = write_dicom(tmp_path / "x.dcm", STORED, PixelIntensityRelationship="DISP")
    assert "went through a display's curve (DISP)" in read_xray(path).notes[0]


def test_overlays_above_the_stored_bits_are_left_out(tmp_path):
    marked = STORED | np.where(np.eye(48), 1 << 12, 0).astype(np.uint16)
    path = write_dicom(tmp_path / "x.dcm", marked)
    refused(path, "pixels from 0 to [0-9]+; expected 12 bits as BitsStored says")
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(path)
    data.add_new(0x60000102, "US", 12)
    data.save_as(path)
    assert np.array_equal(read_xray(path).pixels, (STORED / 4095).astype(np.float32))
    refused(
        write_dicom(tmp_path / "y.dcm", STORED << 4, HighBit=15),
        "BitsStored 12 and HighBit 15 do not fit; expected HighBit 11",
    )


# ------------------------------------------------------------------------------------------------
# Padding

PADDED = {
    "dark": ("MONOCHROME2", 0, {}),
    "bright": ("MONOCHROME2", 4095, {}),
    "white in MONOCHROME1": ("MONOCHROME1", 0, {}),
    "black in MONOCHROME1": ("MONOCHROME1", 4095, {}),
    "range": ("MONOCHROME2", 4050, {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4040}),
    "above the stored bits": ("MONOCHROME2", 65535, {}),
    "signed": ("MONOCHROME2", -2048, {}),
    "signed, beyond the stored bits": ("MONOCHROME1", -32768, {}),
}


@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize("normalization", ["manifest", "percentile", "histogram"])
def test_padding_is_air_and_decides_nothing(tmp_path, kind, normalization):
    photometric, value, tags = PADDED[kind]
    stored, turn = 20 + STORED.astype(int), photometric == "MONOCHROME1"
    stored = 4095 - stored if turn else stored
    if value < 0:
        stored -= 2048
        tags = {"RescaleSlope": "1", "RescaleIntercept": "2048", **tags}
    padded = np.concatenate([np.full((24, 48), value), stored])
    tags = {"PixelPaddingValue": value, **tags}
    body = read_xray(write_dicom(tmp_path / "body.dcm", stored, photometric, **tags), normalization)
    xray = read_xray(write_dicom(tmp_path / "x.dcm", padded, photometric, **tags), normalization)
    assert np.array_equal(xray.pixels[24:], body.pixels)
    assert (xray.pixels[:24] == 0).all()
    assert np.array_equal(xray.seen, np.repeat([0, 1], [24, 48])[:, None] * np.ones((1, 48)))
    assert "33.3% of the pixels are padding or transparent: taken for air" in xray.notes


def test_padding_alone_is_no_picture_and_is_turned_with_it(tmp_path):
    refused(write_dicom(tmp_path / "x.dcm", np.full((40, 40), 7), PixelPaddingValue=7), ": 0 x 0 without padding")
    padded = np.concatenate([np.full((24, 48), 4095), 20 + STORED])
    tags = {"PixelPaddingValue": 4095, "PatientOrientation": ["L", "H"]}
    turned = read_xray(write_dicom(tmp_path / "x.dcm", padded, **tags)).pixels
    assert turned[-24:].max() == turned.min()


def test_padding_does_not_pass_for_the_air_beside_a_body(tmp_path):
    padded = np.pad(4095 - STORED, 16, constant_values=0)
    inverted = write_dicom(tmp_path / "x.dcm", padded, PixelPaddingValue=0)
    refused(inverted, "bone looks dark and air bright", normalization="percentile")


# ------------------------------------------------------------------------------------------------
# Kinds of files


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"Modality": "CT"}, "Modality is CT; expected an X-ray (CR, DX, "),
        ({"Modality": "Miller^Ada"}, "Modality is another; expected"),
        ({"photometric": "RGB"}, "Photometric Interpretation is RGB; expected MONOCHROME1 or MONOCHROME2"),
        ({"photometric": "PALETTE COLOR"}, "Photometric Interpretation is PALETTE COLOR"),
        ({"photometric": "Miller"}, "Photometric Interpretation is missing or unknown"),
        ({"NumberOfFrames": 3}, "shape (3, 48, 48); expected one picture"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_what_is_no_grey_xray_is_refused_by_its_header(tmp_path, tags, words):
    refused(write_dicom(tmp_path / "x.dcm", STORED, **tags), re.escape(words))


@pytest.mark.parametrize("modality", ["CR", "DX", "RF", "OT", "", None])
def test_xrays_of_all_kinds_are_read(tmp_path, modality):
    assert read_xray(write_dicom(tmp_path / "x.dcm", STORED, Modality=modality)).notes == []


def compressed(path, compressor):
    """Losslessly compressed by SimpleITK, with a header whose numbers may be applied once only."""
    sitk, pydicom = pytest.importorskip("SimpleITK"), pytest.importorskip("pydicom")
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(path))
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.Execute(sitk.GetImageFromArray(60000 - 8 * STORED[None]))
    data = pydicom.dcmread(path)
    data.PhotometricInterpretation, data.Modality = "MONOCHROME1", "DX"
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = "0.5", "100", "US"
    data.save_as(path)
    return path, data.file_meta.TransferSyntaxUID


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_compressed_xrays_are_decoded_by_pydicom_or_simpleitk(tmp_path, compressor, monkeypatch):
    path, syntax = compressed(tmp_path / "x.dcm", compressor)
    assert syntax.is_compressed
    shown = 0.5 * (60000.0 - 8 * STORED) + 100  # of 100 to 32867.5, the range of 16 bits after the rescale
    expected = (100 + 32867.5 - shown) / 65535
    for decoders in ("as installed", "SimpleITK alone", "none"):
        if decoders == "SimpleITK alone":
            monkeypatch.setattr("pydicom.pixels.get_decoder", lambda uid: SimpleNamespace(is_available=False))
        if decoders == "none":
            monkeypatch.setitem(sys.modules, "SimpleITK", None)
            refused(path, rf"its transfer syntax, JPEG.* \({re.escape(syntax)}\); run: pip install SimpleITK pylibjpeg")
        else:
            assert read_xray(path).pixels == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_an_unknown_transfer_syntax_is_not_quoted(tmp_path):
    path, syntax = compressed(tmp_path / "x.dcm", "JPEG")
    path.write_bytes(path.read_bytes().replace(syntax.encode(), b"1.2.3.4.5.6.7.8.9.10.11"[: len(syntax)]))
    refused(path, "no decoder for its transfer syntax, unknown, or its pixels are damaged; run: pip install")


def test_a_damaged_compressed_xray_is_refused(tmp_path):
    path, _ = compressed(tmp_path / "x.dcm", "JPEG")
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start + 2 : start + 60] = bytes(58)
    path.write_bytes(content)
    refused(path, "no decoder for its transfer syntax.*or its pixels are damaged")


# ------------------------------------------------------------------------------------------------
# Views and orientation


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("turn", ["none", "mirrored", "upside down", "turned", "transposed"])
def test_patient_orientation_turns_the_picture(tmp_path, view, turn):
    upright = np.rint(picture(full=4000)).astype(np.uint16)
    columns = "LP"[view]
    opposite = {"L": "R", "P": "A"}[columns]
    stored, letters = {
        "none": (upright, [columns, "F"]),
        "mirrored": (upright[:, ::-1], [opposite, "F"]),
        "upside down": (upright[::-1], [columns, "H"]),
        "turned": (np.rot90(upright), ["F", opposite]),  # anticlockwise: columns run down the patient
        "transposed": (upright.T, ["F", columns]),
    }[turn]
    xray = read_xray(write_dicom(tmp_path / "x.dcm", stored, PatientOrientation=letters), view=view)
    assert np.array_equal(xray.pixels, (upright / 4095).astype(np.float32))
    assert ["turned by Patient Orientation" in note for note in xray.notes] == ([] if turn == "none" else [True])


def test_another_view_is_refused_by_its_header(tmp_path):
    stored = np.rint(picture(full=4000)).astype(np.uint16)
    path = write_dicom(tmp_path / "x.dcm", stored, PatientOrientation=["P", "F"])
    refused(path, "runs to posterior and feet; that is no PA view")
    assert read_xray(path, view=1).notes == []
    path = write_dicom(tmp_path / "y.dcm", stored, ViewPosition="LL")
    refused(path, "View Position is LL; expected the PA view .*swapped")
    path = write_dicom(tmp_path / "z.dcm", stored, ViewPosition="AP")
    assert "AP view" in read_xray(path).notes[0]
    with pytest.raises(InputError, match="View Position is AP; expected the lateral view"):
        read_xray(path, view=1)


# ------------------------------------------------------------------------------------------------
# Logarithms and intensities


@pytest.mark.parametrize(
    "tags", [{"RescaleType": "LOG_E REL"}, {"PixelIntensityRelationship": "LOG"}], ids=["LOG_E REL", "LOG"]
)
@pytest.mark.parametrize("curve", ["table", "sigmoid"])
def test_a_display_curve_is_not_applied_to_logarithms(tmp_path, tags, curve):
    """A Kodak-like file: MONOCHROME1, logarithm of the exposure, a table for the display."""
    tables = {"VOILUTSequence": [lut(CURVE, depth=10)]}
    windows = {"VOILUTFunction": "SIGMOID", "WindowCenter": "2000", "WindowWidth": "1000"}
    curves = tables if curve == "table" else windows
    xray = read_xray(write_dicom(tmp_path / "x.dcm", 4095 - STORED, "MONOCHROME1", **tags, **curves))
    assert xray.pixels == pytest.approx(STORED / 4095, abs=1e-6)
    assert "its display curve (VOI LUT) is left out" in xray.notes[0]
    falling = {"VOILUTSequence": [lut(CURVE[::-1], depth=10)]}  # shown dark by MONOCHROME2 and a falling table
    xray = read_xray(write_dicom(tmp_path / "y.dcm", 4095 - STORED, **tags, **falling))
    assert xray.pixels == pytest.approx(STORED / 4095, abs=1e-6)


def test_values_made_for_a_display_keep_their_curve(tmp_path):
    tags = {"RescaleType": "P-VALUES", "PixelIntensityRelationship": "LOG", "VOILUTSequence": [lut(CURVE, depth=10)]}
    xray = read_xray(write_dicom(tmp_path / "x.dcm", STORED, **tags))
    assert xray.pixels == pytest.approx(CURVE[STORED] / 1023, abs=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_logarithm_of_intensities_is_taken(tmp_path, photometric):
    """Beer-Lambert: intensity 4000 exp(-attenuation); the attenuation comes back, up to rounding of the intensities."""
    attenuation = 3 * picture()
    intensity = np.rint(4000 * np.exp(-attenuation)).astype(np.uint16)
    stored = intensity if photometric == "MONOCHROME1" else 4095 - intensity
    tags = {"PixelIntensityRelationship": "LIN", "VOILUTSequence": [lut(CURVE, depth=10)]}
    xray = read_xray(write_dicom(tmp_path / "x.dcm", stored, photometric, **tags))
    expected = (attenuation + np.log(4095 / 4000)) / np.log(4095)
    assert xray.pixels == pytest.approx(expected, abs=0.001)
    assert any("their logarithm was taken" in note for note in xray.notes)


def test_auto_reads_logarithms_by_percentiles_and_displays_by_the_body(tmp_path):
    wanted = read_xray(write_dicom(tmp_path / "plain.dcm", STORED), "percentile").pixels
    log = write_dicom(tmp_path / "log.dcm", STORED, RescaleType="LOG_E REL")
    assert np.array_equal(read_xray(log, "auto").pixels, wanted)
    shown = write_dicom(tmp_path / "shown.dcm", STORED, RescaleType="P-VALUES")
    assert not np.allclose(read_xray(shown, "auto").pixels, wanted, atol=0.02)


# ------------------------------------------------------------------------------------------------
# What is not to be shown

SHUTTERS = {
    "rectangle": {
        "Shape": "RECTANGULAR",
        "LeftVerticalEdge": 9,
        "RightVerticalEdge": 40,
        "UpperHorizontalEdge": 5,
        "LowerHorizontalEdge": 44,
    },
    "circle": {"Shape": "CIRCULAR", "CenterOfCircular": [24, 20], "RadiusOfCircular": 17},
    "polygon": {"Shape": "POLYGONAL", "VerticesOfThePolygonal": [5, 9, 5, 40, 44, 40, 44, 9]},
}


def shutter_tags(kind, name):
    """Keywords of a shutter or collimator: the name leads, but follows "OfCircular" and the like."""
    tags = {}
    for key, value in SHUTTERS[kind].items():
        tags[f"{key}{name}" if "OfThe" in key or "OfCircular" in key else f"{name}{key}"] = value
    return tags


@pytest.mark.parametrize("name", ["Shutter", "Collimator"])
@pytest.mark.parametrize("kind", SHUTTERS)
def test_what_lies_behind_a_shutter_is_air(tmp_path, kind, name):
    """Rows and columns count from 1 (PS3.3, C.7.6.11)."""
    stored = 20 + STORED
    stored[0], stored[:, 0] = 4095, 4095  # a bright frame that would spoil the scale
    row, column = np.mgrid[1:49, 1:49]
    shown = (row >= 5) & (row <= 44) & (column >= 9) & (column <= 40)
    if kind == "circle":
        shown = (row - 24) ** 2 + (column - 20) ** 2 <= 17**2
    xray = read_xray(write_dicom(tmp_path / "x.dcm", stored, **shutter_tags(kind, name)))
    assert np.array_equal(xray.pixels, np.where(shown, stored / 4095, 0).astype(np.float32))
    assert np.array_equal(xray.seen, shown.astype(np.float32))
    assert f"{1 - shown.mean():.0%} of the picture are outside the {name.lower()}: not used" in xray.notes


def test_a_bitmap_shutter_hides_where_its_overlay_is_1(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.dcmread(write_dicom(tmp_path / "x.dcm", STORED, ShutterShape="BITMAP", ShutterOverlayGroup=0x6000))
    hidden = np.zeros((48, 48), np.uint8)
    hidden[:, :10] = 1
    for element, vr, value in ((0x10, "US", 48), (0x11, "US", 48), (0x100, "US", 1), (0x102, "US", 0)):
        data.add_new((0x6000, element), vr, value)
    data.add_new((0x6000, 0x3000), "OW", np.packbits(hidden.ravel(), bitorder="little").tobytes())
    data.save_as(tmp_path / "x.dcm")
    pixels = read_xray(tmp_path / "x.dcm").pixels
    assert np.array_equal(pixels, np.where(hidden, 0, STORED / 4095).astype(np.float32))


@pytest.mark.parametrize("edges", [(0, 0, 0, 0), (1, 5, 1, 5), (900, 1900, 900, 1900)])
def test_a_shutter_left_over_from_another_picture_is_not_used(tmp_path, edges):
    keys = [f"Shutter{key}" for key in SHUTTERS["rectangle"] if key != "Shape"]
    path = write_dicom(tmp_path / "x.dcm", STORED, ShutterShape="RECTANGULAR", **dict(zip(keys, edges)))
    xray = read_xray(path)
    assert np.array_equal(xray.pixels, (STORED / 4095).astype(np.float32))
    assert xray.notes == ["the shutter of its header leaves next to nothing of the picture: not used"]


# ------------------------------------------------------------------------------------------------
# Colours, body parts


def colour_dicom(path, pixels, **tags):
    """An 8-bit RGB secondary capture of (H, W, 3) pixels."""
    return write_dicom(
        path,
        np.zeros(pixels.shape[:2]),
        "RGB",
        SamplesPerPixel=3,
        PlanarConfiguration=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelData=pixels.astype(np.uint8).tobytes(),
        SOPClassUID="1.2.840.10008.5.1.4.1.1.7",
        **tags,
    )


def test_a_grey_picture_stored_as_rgb_is_read(tmp_path):
    grey = np.rint(picture(full=250)).astype(np.uint8)
    xray = read_xray(colour_dicom(tmp_path / "x.dcm", np.repeat(grey[..., None], 3, axis=2)))
    assert np.array_equal(xray.pixels, (grey / 255).astype(np.float32))
    assert xray.notes == ["converted from colour (RGB) to grey"]
    coloured = np.stack([grey, grey // 2, 255 - grey], axis=2)
    refused(colour_dicom(tmp_path / "y.dcm", coloured), r"\d+% of its pixels are coloured; expected an X-ray in grey")


@pytest.mark.parametrize("part", ["SKULL", "HAND", "HIP", "JAW", "Head", "C-SPINE"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_another_part_of_the_body_is_refused(tmp_path, part):
    shown = "CSPINE" if part == "C-SPINE" else part.upper()
    refused(
        write_dicom(tmp_path / "x.dcm", STORED, BodyPartExamined=part), f"Body Part Examined is {shown}; expected a"
    )


@pytest.mark.parametrize("part", [None, "", "CHEST", "THORAX", "LUNG", "Miller^Ada"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_a_chest_and_an_unknown_part_are_read(tmp_path, part):
    assert read_xray(write_dicom(tmp_path / "x.dcm", STORED, BodyPartExamined=part)).notes == []


def test_a_neighbouring_part_is_noted(tmp_path):
    xray = read_xray(write_dicom(tmp_path / "x.dcm", STORED, BodyPartExamined="TSPINE"))
    assert xray.notes == ["Body Part Examined is TSPINE; expected a chest"]


@pytest.mark.parametrize(
    ("sop", "modality", "words"),
    [
        ("1.2.840.10008.5.1.4.1.1.2", "", "its SOP Class says CT; expected a chest X-ray"),
        ("1.2.840.10008.5.1.4.1.1.4.1", "OT", "its SOP Class says MR"),
        ("1.2.840.10008.5.1.4.1.1.1.2", "DX", "its SOP Class says mammogram"),
        ("1.2.840.10008.5.1.4.1.1.1.3", "DX", "its SOP Class says dental X-ray"),
        ("1.2.840.10008.5.1.4.1.1.1.1", "PX", "Modality is PX"),
        ("1.2.840.10008.5.1.4.1.1.1.1", "IO", "Modality is IO"),
    ],
)
def test_images_of_other_kinds_are_refused(tmp_path, sop, modality, words):
    refused(write_dicom(tmp_path / "x.dcm", STORED, SOPClassUID=sop, Modality=modality), words)
