"""Fuzzing of X-ray files and arrays: pictures, DICOM and NumPy files are read rightly or refused in one line."""

from __future__ import annotations

import functools
import io
import math
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("hypothesis")
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers.fuzzing import DAMAGE, damaged, outcome
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.cube_files import read_array_cube
from xray2ct.imaging.read_xray import NORMALIZATIONS, read_xray

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def xray(rows, columns, seed):
    """A bright ellipse on a dark ground with some noise, in [0, 1]."""
    v, u = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    body = np.clip(1.2 - (v / 1.1) ** 2 - (u / 0.7) ** 2, 0, 1)
    return body * np.random.default_rng(seed).uniform(0.7, 1, (rows, columns))


def trusted(result, size=None):
    """What every X-ray that was read is."""
    assert result.pixels.dtype == np.float32
    assert result.pixels.ndim == 2
    assert size is None or result.pixels.shape == (size, size)
    assert np.isfinite(result.pixels).all()
    assert result.pixels.min() >= 0
    assert result.pixels.max() <= 1


READING = st.fixed_dictionaries(
    {
        "normalization": st.sampled_from(NORMALIZATIONS),
        "size": st.sampled_from([None, 32, 50]),
        "view": st.sampled_from([0, 1]),
        "invert": st.booleans(),
    }
)
EDGE = st.integers(1, 70)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B")


@given(EDGE, EDGE, st.sampled_from(MODES), st.sampled_from(["png", "jpg", "tif", "bmp"]), READING, st.integers(0, 99))
def test_pictures_of_any_size_and_mode(folder, rows, columns, mode, kind, reading, seed):
    pixels = np.rint(255 * xray(rows, columns, seed)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    if mode.startswith("I;16"):
        picture = Image.fromarray((pixels.astype(np.uint16) * 257).astype(">u2" if mode[-1] == "B" else "<u2"))
    elif mode == "LAB":
        picture = Image.fromarray(np.stack([pixels] * 3, axis=-1), "LAB") if seed % 2 else picture
    else:
        picture = picture.convert(mode)
    path = folder / f"picture.{kind}"
    try:
        picture.save(path)
    except (OSError, KeyError, ValueError):  # a format without this mode
        assume(False)
    result = outcome(read_xray, path, **reading)
    if result is not None:
        trusted(result, reading["size"])
        plain = reading["normalization"] == "manifest" and reading["size"] is None and kind != "jpg"
        if plain and mode in ("L", "I;16", "I;16B"):
            expected = 255 - pixels if reading["invert"] else pixels
            assert np.allclose(result.pixels, expected / 255, atol=1e-6)
    elif min(rows, columns) >= 32 and mode == "L" and not reading["invert"] and kind != "jpg":
        raise AssertionError("a good picture was refused")


def npy_bytes(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def dicom_bytes(**tags) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data = pydicom.dataset.FileDataset("x", {}, b"\0" * 128, meta, is_implicit_VR=False)
    data.Rows, data.Columns, data.SamplesPerPixel = 40, 36, 1
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelData = np.rint(4000 * xray(40, 36, 0)).astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream)
    return stream.getvalue()


NUMBER = st.sampled_from(["0", "1", "-1", "2", "1e30", "1e400", "nan", "-0.5", "", "x"])
WORD = st.integers(0, 65535)
TABLE = st.builds(
    lambda count, first, depth, words, as_bytes: (count, first, depth, words.tobytes() if as_bytes else words.tolist()),
    st.sampled_from([0, 1, 2, 4096, 65535]),
    st.sampled_from([0, 1, 100, 65000]),
    st.sampled_from([0, 8, 10, 12, 16, 32, 65535]),
    st.sampled_from([np.arange(n, dtype="<u2") * step for n, step in ((1, 9), (2, 1), (2048, 16), (4096, 1))]),
    st.booleans(),
)


def lut_sequence(tables):
    from pydicom import Dataset

    items = []
    for count, first, depth, entries in tables:
        items.append(Dataset())
        items[-1].add_new("LUTDescriptor", "US", [count, first, depth])
        items[-1].add_new("LUTData", "OW" if isinstance(entries, bytes) else "US", entries)
    return items


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "MONOCHROME2"] * 3 + ["RGB", "X"]),
            "PresentationLUTShape": st.sampled_from(["INVERSE", "IDENTITY", "", "X"]),
            "Modality": st.sampled_from(["DX", "CR", ""] * 3 + ["CT", "X"]),
            "BitsStored": st.sampled_from([12] * 9 + [0, 1, 8, 10, 16, 17, 40]),
            "HighBit": st.sampled_from([11] * 9 + [0, 15]),
            "BitsAllocated": st.sampled_from([16] * 9 + [1, 8, 32]),
            "PixelRepresentation": st.sampled_from([0, 1] * 4 + [7]),
            "PixelPaddingValue": WORD,
            "PixelPaddingRangeLimit": WORD,
            "PixelIntensityRelationship": st.sampled_from(["LIN", "LOG", "DISP", ""]),
            "PixelIntensityRelationshipSign": st.sampled_from([1, -1, 0, 5]),
            "NumberOfFrames": st.sampled_from(["0", "1"] * 4 + ["2"]),
            "SamplesPerPixel": st.sampled_from([1] * 9 + [0, 3]),
            "VOILUTFunction": st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"] * 3 + ["X"]),
            "VOILUTSequence": st.lists(TABLE, max_size=2),
            "ModalityLUTSequence": st.lists(TABLE, max_size=2),
            "numbers": st.dictionaries(
                st.sampled_from(["RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"]), NUMBER
            ),
            "spacing": st.dictionaries(
                st.sampled_from(["ImagerPixelSpacing", "PixelSpacing", "EstimatedRadiographicMagnificationFactor"]),
                NUMBER,
            ),
        },
    ),
    READING,
    st.booleans(),
)
def test_dicom_headers_of_any_kind(folder, tags, reading, scaled):
    pytest.importorskip("pydicom")
    tags = tags | tags.pop("numbers", {}) | {name: [text, text] for name, text in tags.pop("spacing", {}).items()}
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        if name in tags:
            tags[name] = lut_sequence(tags[name])
    path = folder / "header.dcm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            path.write_bytes(dicom_bytes(**tags))
        except (ValueError, OverflowError, struct.error, AttributeError, OSError):  # what pydicom does not write
            assume(False)
    result = outcome(read_xray, path, geometry=Geometry() if scaled else None, **reading)
    if result is not None:
        trusted(result, reading["size"])


@given(
    st.sampled_from(["png", "tif", "jpg"]),
    st.sampled_from(["L", "LA", "RGB", "RGBA", "P", "I;16"]),
    st.integers(0, 9),
    st.sampled_from([None, 0, 255, 700, (1, 2, 3), b"\0\xff"]),
    st.sampled_from([None, (72, 72), (72, 144), (0, 0), (9999, 1)]),
    st.integers(1, 3),
    READING,
)
def test_pictures_with_more_than_their_pixels(folder, kind, mode, orientation, clear, dpi, pages, reading):
    pixels = np.rint(255 * xray(40, 36, 0)).astype(np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if mode == "I;16" else pixels)
    image = image if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"exif": exif, "transparency": clear, "dpi": dpi}
    options = {name: value for name, value in options.items() if value is not None}
    if pages > 1:
        options |= {"save_all": True, "append_images": [image.rotate(90 * page) for page in range(1, pages)]}
    path = folder / f"beside.{kind}"
    try:
        image.save(path, format="MPO" if kind == "jpg" and pages > 1 else None, **options)
    except (OSError, KeyError, ValueError, TypeError, struct.error, AttributeError):
        assume(False)
    result = outcome(read_xray, path, **reading)
    if result is not None:
        trusted(result, reading["size"])
        assert pages == 1
        if not reading["size"]:
            assert result.pixels.shape == ((36, 40) if orientation in (5, 6, 7, 8) else (40, 36))


@functools.cache
def xray_files() -> dict[str, bytes]:
    """A good file of each kind; no fixture, because hypothesis would print it with each failure."""
    eight = np.rint(255 * xray(40, 36, 0)).astype(np.uint8)
    files = {"npy": npy_bytes(eight), "dcm": dicom_bytes(RescaleSlope="1", RescaleIntercept="0")}
    for kind, name in (("png", "PNG"), ("jpg", "JPEG"), ("tif", "TIFF"), ("bmp", "BMP")):
        stream = io.BytesIO()
        Image.fromarray(eight).save(stream, format=name)
        files[kind] = stream.getvalue()
    return files


KINDS = st.sampled_from(["png", "jpg", "tif", "bmp", "npy", "dcm"])


@given(KINDS, KINDS, DAMAGE, st.sampled_from([None, 64, 300]), st.binary(max_size=60), st.booleans(), READING)
def test_damaged_and_foreign_xray_files(folder, kind, suffix, damage, end, noise, renamed, reading):
    raw = damaged(xray_files()[kind], damage, end) if len(noise) % 8 else noise
    path = folder / f"damaged.{suffix if renamed else kind}"
    path.write_bytes(raw)
    result = outcome(read_xray, path, **reading)
    if result is not None:
        trusted(result, reading["size"])


@given(
    st.sampled_from(
        ["?", "i1", "u1", "i2", "u2", "f2", "f4", "f8", "u8", "c8", "U3", "O", "M8[s]", "V4", "u1,f4", ">u2", "g"]
    ),
    st.lists(st.integers(0, 40), max_size=4),
    st.one_of(
        st.none(), st.text(max_size=30), st.sampled_from(["(9999999, 9999999)", "(-3, 40)", "([],)", "(10**9,)"])
    ),
    st.sampled_from([1.0, 1e-3, 1e300, math.nan]),
    READING,
)
def test_arrays_of_any_type_and_shape(folder, kind, shape, claim, scale, reading):
    values = xray(*(np.array(shape[:2]) + 20), 0) if len(shape) == 2 else np.ones(shape)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        dtype = np.dtype(kind)
        whole = dtype.kind in "iu"
        values = values * (min(np.iinfo(dtype).max, 65535) if whole else scale)
        values = np.asarray(values, dtype=np.float64)  # 0-d arrays became scalars
        array = values.astype(dtype) if dtype.kind != "V" else np.zeros(values.shape, dtype)
    raw = npy_bytes(array)
    if claim is not None:
        raw = raw.replace(repr(array.shape).encode(), claim.encode("utf-8", "replace"), 1)
    path = folder / "array.npy"
    path.write_bytes(raw)
    result = outcome(read_xray, path, **reading)
    if result is not None:
        trusted(result, reading["size"])
    cube = outcome(read_array_cube, path, size=16)
    if cube is not None:
        assert cube[0].shape == (16, 16, 16)
        assert np.isfinite(cube[0]).all()
