"""CTs as DICOM: where every slice and frame lies, what it is worth, and every refusal."""

import sys

import numpy as np
import pytest

pytest.importorskip("pydicom")
import pydicom

from tests.helpers.dicom_cases import item, lps_ct, set_pixels, texts, write_frames, write_slices
from xray2ct.files import InputError
from xray2ct.imaging.cube import resample_cube
from xray2ct.imaging.read_ct import read_ct

SHUFFLED = [3, 9, 0, 5, 7, 1, 8, 2, 6, 4]


def same(found, ct):
    assert np.array_equal(found.data, ct.data)
    assert found.affine == pytest.approx(ct.affine, abs=1e-4)
    assert found.notes == []


@pytest.mark.parametrize("shear", [0.0, 0.3])
def test_frames_lie_where_they_say_in_any_order_with_their_own_slopes(tmp_path, shear):
    ct = lps_ct(shear=shear)
    ct.data -= ct.data % 2  # so that a slope of 2 keeps them
    slopes = [1.0, 2.0] * 5
    same(read_ct(write_frames(tmp_path / "frames/e.dcm", ct, SHUFFLED, slopes)), ct)
    whole = read_ct(write_frames(tmp_path / "half/e.dcm", ct, SHUFFLED, [0.5, 1.0] * 5))
    assert whole.data.dtype == np.float32
    assert np.array_equal(whole.data, ct.data)


def test_one_scan_in_several_multi_frame_files_is_put_together(tmp_path):
    ct = lps_ct()
    write_frames(tmp_path / "in/a.dcm", ct, SHUFFLED[:4])
    same(read_ct(write_frames(tmp_path / "in/b.dcm", ct, SHUFFLED[4:])), ct)


@pytest.mark.parametrize("shear", [0.0, 0.3])
def test_slices_have_their_own_slope_sign_and_acquisition(tmp_path, shear):
    ct = lps_ct(shear=shear)

    def change(data, k):
        data.AcquisitionNumber = k  # step and shoot
        if k % 3 == 1:
            data.RescaleSlope, data.RescaleIntercept = "-1", "3000"
            set_pixels(data, ct.data[:, :, k].T, -1, 3000)
        elif k % 3 == 2:
            data.RescaleIntercept = "0"
            set_pixels(data, ct.data[:, :, k].T, 1, 0, signed=True)

    same(read_ct(write_slices(tmp_path, ct, change)), ct)


def put(**values):
    """A change of all slices from the sixth on (``half``) or of all."""

    def change(data, k):
        for key, value in values.items():
            if value is None:
                delattr(data, key)
            elif k >= 5:
                setattr(data, key, value)

    return change


def moved(x=0.0, y=0.0, z=lambda k: 0.0):
    def change(data, k):
        position = [float(value) for value in data.ImagePositionPatient]
        shift = (x, y, z(k)) if k >= 5 else (0, 0, z(k))
        data.ImagePositionPatient = texts(np.add(position, shift))

    return change


def larger(data, k):
    if k == 4:
        set_pixels(data, np.zeros((18, 22)))


def bare(data, k):
    del data.PixelData
    data.Rows = data.Columns = 1


REFUSED = {
    "PixelSpacing differs between im": put(PixelSpacing=["12", "12"]),
    "no PixelSpacing; the slice cannot": put(PixelSpacing=None),
    "PixelSpacing is not 2 numbers": put(PixelSpacing="12"),
    r"PixelSpacing \(spacing\) is": put(PixelSpacing=["0", "12"]),
    "ImagePositionPatient of im": moved(x=60),
    "ImagePositionPatient of im.* lies 0.90": moved(z=lambda k: 0.07 * max(0, k - 4) ** 2),
    "slice spacing is not uniform": moved(z=lambda k: 3.0 * (k >= 5)),
    "lie at the same position": moved(z=lambda k: -75.0 * (k >= 5)),
    "no ImagePositionPatient": put(ImagePositionPatient=None),
    "ImagePositionPatient is not 3": put(ImagePositionPatient=["1", "2"]),
    "no ImageOrientationPatient": put(ImageOrientationPatient=None),
    "ImageOrientationPatient differs": put(ImageOrientationPatient=["1", "0", "0", "0", "0.9950042", "0.0998334"]),
    "ImageOrientationPatient is not two perp": put(ImageOrientationPatient=["1", "0", "0", "0.5", "1", "0"]),
    "Rows and Columns differs": larger,
    "modality is PT; expected CT": put(Modality="PT"),
    "AcquisitionNumber differs between": put(AcquisitionNumber=2),
    "TemporalPositionIdentifier differs": put(TemporalPositionIdentifier=2),
    "EchoNumbers differs": put(EchoNumbers=2),
    "ConvolutionKernel differs": put(ConvolutionKernel="B70"),
    "KVP differs": put(KVP="80"),
    "ImageType differs": put(ImageType=["DERIVED", "SECONDARY", "MIP"]),
    "PatientID differs": put(PatientID="2"),
    "FrameOfReferenceUID differs": put(FrameOfReferenceUID="1.2.3"),
    "RescaleSlope is 0": put(RescaleSlope="0"),
    "only one of RescaleSlope and": put(RescaleSlope=None),
    "RescaleType is not HU": put(RescaleType="OD"),
    "ModalityLUTSequence": put(ModalityLUTSequence=item(LUTDescriptor=[1, 0, 16])),
    "PhotometricInterpretation is not MONOCHROME2": put(PhotometricInterpretation="PALETTE COLOR"),
    "3 values per pixel": put(SamplesPerPixel=3),
    "BitsStored 16 and HighBit": put(HighBit=11),
    "expected 8 bits as BitsStored says": put(BitsStored=8, HighBit=7),
    "no PixelData": bare,
    "truncated .its pixels take 720": lambda data, k: k == 3 and setattr(data, "PixelData", data.PixelData[:100]),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_differs_between_slices_or_is_missing_is_refused_by_name(tmp_path, words):
    with pytest.raises(InputError, match=words) as error:
        read_ct(write_slices(tmp_path / "case", lps_ct(), REFUSED[words]))
    assert str(error.value).startswith(str(tmp_path / "case"))


def no_groups(data):
    del data.PerFrameFunctionalGroupsSequence
    data.ImagePositionPatient = ["0", "0", "0"]


def frame_group(n, sequence, **values):
    return lambda data: setattr(data.PerFrameFunctionalGroupsSequence[n], sequence, item(**values))


def fewer(data):
    del data.PerFrameFunctionalGroupsSequence[4]


def phase(data):
    for n, frame in enumerate(data.PerFrameFunctionalGroupsSequence):
        frame.FrameContentSequence[0].TemporalPositionIndex = 1 + n // 5


def no_spacing(data):
    del data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence


REFUSED_FRAMES = {
    "10 frames, but 0 items in PerFrameFunctionalGroupsSequence": (None, no_groups),
    "10 frames, but 9 items in PerFrameFunctionalGroupsSequence": (None, fewer),
    "frame 1 of e.dcm and frame 11 of e.dcm lie at the same position": ([*range(10)] * 2, None),
    "slice spacing is not uniform .mostly 15 mm, but 30 mm": ([0, 1, 2, 3, 5, 6, 7, 8, 9], None),
    "TemporalPositionIndex differs": (None, phase),
    "no PixelSpacing": (None, no_spacing),
    "PixelSpacing stands in the shared and in a frame's own": (
        None,
        frame_group(4, "PixelMeasuresSequence", PixelSpacing=["3", "3"]),
    ),
    "StackID differs": (None, frame_group(4, "FrameContentSequence", StackID="2")),
    "modality is PT": (None, lambda data: setattr(data, "Modality", "PT")),
    "NumberOfFrames is -3": (None, lambda data: setattr(data, "NumberOfFrames", -3)),
    "voxels by its headers": (None, lambda data: setattr(data, "NumberOfFrames", 10**8)),
}


@pytest.mark.parametrize("words", REFUSED_FRAMES)
def test_frames_that_cannot_be_placed_are_refused_by_name(tmp_path, words):
    order, change = REFUSED_FRAMES[words]
    expected = "items in PerFrame" if words.startswith("voxels") else words  # counted before any memory is taken
    with pytest.raises(InputError, match=expected):
        read_ct(write_frames(tmp_path / "e.dcm", lps_ct(), order, change=change))


@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize(
    ("value", "limit", "stored"), [(2500, None, 2500), (63536, None, -2000), (2400, 2600, 2500), (0, None, 0)]
)
def test_padding_counts_as_outside_the_scan(tmp_path, value, limit, stored, rle):
    ct = lps_ct()

    def change(data, k):
        data.RescaleIntercept = "0"
        hu = ct.data[:, :, k].T.copy()
        hu[hu == 0] = 1
        hu[:, :4] = stored
        set_pixels(data, hu, 1, 0, signed=True)
        data.add_new("PixelPaddingValue", "US" if value > 32767 else "SS", value)
        if limit:
            data.add_new("PixelPaddingRangeLimit", "SS", limit)
        if rle:
            data.compress(pydicom.uid.RLELossless)

    found = read_ct(write_slices(tmp_path, ct, change))
    assert (found.data[:4] == -2000).all()
    assert found.data[4:].min() == -1000
    hu, mask = resample_cube(found, (0, 0, 0), 200, 20)
    right = 240 / 2 - 4 * 12  # mm: the four columns at the patient's right are gone
    x = 100 - 10 * (np.arange(20) + 0.5)
    assert not mask[:, 10, x > right + 7].any()
    assert mask[:, 10, x < right - 7].any()
    assert hu.max() < 1000


def test_a_sign_in_the_highest_stored_bit_is_seen(tmp_path):
    ct = lps_ct()

    def change(data, k):
        data.RescaleIntercept = "0"
        set_pixels(data, ct.data[:, :, k].T & 0xFFF, 1, 0, bits=12)  # 12 bits with a sign, nothing above them
        data.PixelRepresentation = 1

    same(read_ct(write_slices(tmp_path, ct, change)), ct)


def test_overlays_above_the_stored_bits_are_left_out(tmp_path):
    ct = lps_ct()

    def change(data, k):
        set_pixels(data, ct.data[:, :, k].T, bits=12)
        marked = np.frombuffer(data.PixelData, "<u2") | np.uint16(1 << 12)
        data.PixelData = marked.tobytes()

    with pytest.raises(InputError, match=r"pixels from .* expected 12 bits as BitsStored says"):
        read_ct(write_slices(tmp_path / "unknown", ct, change))

    def with_overlay(data, k):
        change(data, k)
        data.add_new(0x60000102, "US", 12)

    same(read_ct(write_slices(tmp_path / "overlay", ct, with_overlay)), ct)


def compress(data, compressor, place):
    """Compress the pixels of a dataset: RLE by pydicom, else by SimpleITK."""
    if compressor == "RLE":
        data.compress(pydicom.uid.RLELossless)
        return
    sitk = pytest.importorskip("SimpleITK")
    shape = (int(data.get("NumberOfFrames", 1)), data.Rows, data.Columns)
    writer = sitk.ImageFileWriter()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(str(place / "packed.dcm"))
    writer.Execute(sitk.GetImageFromArray(np.frombuffer(data.PixelData, "<u2").reshape(shape)))
    packed = pydicom.dcmread(place / "packed.dcm")
    assert packed.file_meta.TransferSyntaxUID.is_compressed
    data.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
    data["PixelData"] = packed["PixelData"]


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000", "RLE"])
def test_compressed_slices_and_frames_are_scaled_once(tmp_path, compressor):
    ct = lps_ct()
    ct.data -= ct.data % 2

    def change(data, k):
        data.RescaleSlope = "2"
        set_pixels(data, ct.data[:, :, k].T, 2)
        compress(data, compressor, tmp_path)

    same(read_ct(write_slices(tmp_path / "ct", ct, change)), ct)
    frames = tmp_path / "frames" / "e.dcm"
    same(read_ct(write_frames(frames, ct, SHUFFLED, [2.0] * 10, lambda data: compress(data, compressor, tmp_path))), ct)


def test_files_without_preamble_notes_and_pictures_beside_slices(tmp_path):
    ct = lps_ct()
    for path in write_slices(tmp_path, ct).iterdir():
        data = pydicom.dcmread(path)
        del data.file_meta
        pydicom.Dataset(data).save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
    for name in ("LICENSE", "069.xml", "preview.jpg", "DICOMDIR", ".hidden"):
        (tmp_path / name).write_bytes(b"x" * 200)
    same(read_ct(tmp_path), ct)


@pytest.mark.parametrize("content", [b"", b"\x5a" * 5000])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    write_slices(tmp_path, lps_ct())
    (tmp_path / "im063.dcm").write_bytes(content)
    (tmp_path / "im056.dcm").write_bytes(content)
    with pytest.raises(InputError, match=r"im056\.dcm, im063\.dcm: no DICOM"):
        read_ct(tmp_path)


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path):
    def change(data, k):
        data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian

    with pytest.raises(InputError, match=r"im000\.dcm: a deflated DICOM file"):
        read_ct(write_slices(tmp_path, lps_ct(), change))


def test_localisers_beside_the_ct_are_noted_and_a_second_ct_is_refused(tmp_path):
    ct = lps_ct()
    write_slices(tmp_path / "a", ct)
    scout = next(write_slices(tmp_path / "b", ct, only=[2], series=2).iterdir())
    scout.rename(tmp_path / "a" / "scout.dcm")
    found = read_ct(tmp_path / "a")
    assert np.array_equal(found.data, ct.data)
    assert found.notes == ["left out 1 images of short series beside the CT (localisers?): scout.dcm"]
    write_frames(tmp_path / "a" / "more.dcm", ct, series=3)
    with pytest.raises(InputError, match=r"2 DICOM series of 8 .*im000\.dcm \(10 slices\), more\.dcm \(10 slices\)"):
        read_ct(tmp_path / "a")
    with pytest.raises(InputError, match="a single slice"):
        read_ct(write_slices(tmp_path / "one", ct, only=[2]))


def test_without_pydicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    write_slices(tmp_path, lps_ct())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(InputError, match=r"needs pydicom; run: pip install"):
        read_ct(tmp_path)
