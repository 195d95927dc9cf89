"""Fuzzing with hypothesis: whatever a file holds, a reader gives a right result or the project's own error.

    pytest tests/test_fuzz.py      25 cases of each target, the same ones each time (in the default tests, too)
    pytest -m fuzz                 250 random cases of each target

``conftest.py`` chooses between the two profiles by the marker expression. A case fails when a reader raises
anything but :class:`files.InputError`, an error does not name its input on one line, there is a warning or a
line in a log, it takes a minute, or the result is not what an independent decoder makes of the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import logging
import math
import signal
import struct
import typing
import warnings
from dataclasses import fields, is_dataclass

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_data import make_dataset

pytest.importorskip("hypothesis")
from hypothesis import assume, event, given
from hypothesis import strategies as st

from dataset import PatientDataset
from hybrid_vit_cascade.models import CascadeStage
from hybrid_vit_cascade.settings import CascadeConfig, load_cascade_config
from model_enhanced import EnhancedDirectModel, RefinementNetwork
from xray2ct.conventions import RECORD
from xray2ct.data.manifest import Manifest, find_patients
from xray2ct.data.prepare import finished_entry, patient_files
from xray2ct.data.prepare_folder import check_output
from xray2ct.data.splits import SPLITS, check_split
from xray2ct.files import InputError, is_plain_name, read_json, safe_name
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.cube import resample_cube
from xray2ct.imaging.cube_files import read_array_cube
from xray2ct.imaging.read_ct import read_ct
from xray2ct.imaging.read_xray import NORMALIZATIONS, read_xray
from xray2ct.models.baselines import LiftingUNet
from xray2ct.training.config import EnhancedConfig, RefinementConfig, config_dict, load_config

pytestmark = pytest.mark.fuzz
SECONDS = 60  # a case that takes longer hangs; usual ones take milliseconds


class Hang(BaseException):
    """Not an ``Exception``: no reader may catch it."""


@contextlib.contextmanager
def watched(allowed=None):
    """Fails on a hang, on a line in any log, and on a warning that ``allowed`` does not match."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    timed = hasattr(signal, "SIGALRM")
    if timed:
        before = signal.signal(signal.SIGALRM, _hang)
        signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # of whatever was collected meanwhile
            yield
    finally:
        if timed:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        logging.getLogger().removeHandler(handler)
    lines += [str(warning.message) for warning in caught if not (allowed and allowed in str(warning.message))]
    assert not lines


def _hang(*_):
    raise Hang


def outcome(read, *arguments, names=None, allowed=None, **options):
    """What ``read`` returns, or None after an InputError, which names the input (``names``) on one line."""
    with watched(allowed):
        try:
            result = read(*arguments, **options)
            event("taken")  # for --hypothesis-show-statistics
            return result
        except InputError as error:
            message = str(error)
    event("refused")
    assert str(arguments[0] if names is None else names) in message
    assert "\n" not in message
    assert len(message) < 1500
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ------------------------------------------------------------------------------------------------
# NIfTI

TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
# name: (offset, struct code) of NIfTI-1
FIELDS = {
    "sizeof_hdr": (0, "i"),
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "quatern": (256, "3f"),
    "qoffset": (268, "3f"),
    "srow": (280, "12f"),
    "magic": (344, "4s"),
}


def encode(order, data, **values) -> bytes:
    """A NIfTI-1 file from its fields, by the standard's table; ``order`` is ``<`` or ``>``."""
    raw = bytearray(352)
    for name, value in values.items():
        offset, code = FIELDS[name]
        value = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
        struct.pack_into(order + code, raw, offset, *value)
    padding = bytes(16 if values["vox_offset"] == 368 else 0)
    return bytes(raw) + padding + data.astype(data.dtype.newbyteorder(order)).tobytes(order="F")


def decode(raw: bytes):
    """``(values, affine)`` of a NIfTI-1 file, by the standard and without nibabel; anything may be raised."""
    order = "<" if struct.unpack_from("<h", raw, 40)[0] in range(1, 8) else ">"
    get = {name: struct.unpack_from(order + code, raw, offset) for name, (offset, code) in FIELDS.items()}
    shape = get["dim"][1 : 1 + get["dim"][0]]
    kind = np.dtype(TYPES[get["datatype"][0]]).newbyteorder(order)
    start = int(get["vox_offset"][0])
    data = np.frombuffer(raw, kind, math.prod(shape), start).reshape(shape, order="F")
    slope, inter = get["scl_slope"][0], get["scl_inter"][0]
    with np.errstate(all="ignore"):
        values = data.astype(np.float64) if slope == 0 or math.isnan(slope) else data * np.float64(slope) + inter
    affine = np.eye(4)
    if get["sform_code"][0] > 0:
        affine[:3] = np.reshape(get["srow"], (3, 4))
        return values, affine
    assert get["qform_code"][0] > 0
    b, c, d = get["quatern"]
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    rotation = np.array(  # nifti1.h, method 2
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    handedness = -1 if get["pixdim"][0] < 0 else 1
    affine[:3, :3] = rotation * np.array(get["pixdim"][1:4]) * [1, 1, handedness]
    affine[:3, 3] = get["qoffset"]
    return values, affine


def same_as_decoded(ct, raw):
    """``ct`` is what :func:`decode` makes of the bytes, and can be trusted as a CT."""
    values, affine = decode(raw)
    values = values[..., 0] if values.ndim == 4 else values
    assert ct.data.shape == values.shape
    assert len(values.shape) == 3
    assert np.isfinite(ct.data).all()
    assert np.allclose(ct.data.astype(np.float64), values, rtol=1e-6, atol=1e-3)
    assert np.isfinite(ct.affine).all()
    assert np.allclose(ct.affine, affine, rtol=1e-4, atol=2e-3)
    assert np.linalg.matrix_rank(ct.affine) == 4


@st.composite
def nifti_fields(draw):
    """Fields of a good CT: ``(order, stored array, field values)``."""
    shape = draw(st.tuples(*[st.integers(3, 6)] * 3))
    code = draw(st.sampled_from([2, 4, 4, 4, 8, 16, 64, 1024]))
    slope, inter = (8.0, -1024.0) if code == 2 else draw(st.sampled_from([(1.0, 0.0), (0.0, 5.0), (0.5, 10.0)]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    hu = np.where(random.random(shape) < 0.5, -1000, 40)
    hu.flat[:2] = -1000, 40
    stored = np.rint((hu - inter) / slope if slope else hu).clip(0 if code == 2 else None).astype(TYPES[code])
    quaternion = random.normal(size=4)
    quaternion /= np.linalg.norm(quaternion) * (1 if quaternion[0] > 0 else -1)
    spacing, origin = random.uniform(1, 12, 3), random.uniform(-800, 800, 3)
    turn, stretch = np.linalg.qr(random.normal(size=(3, 3)))[0], np.diag(spacing)
    rows = np.concatenate([turn @ stretch, origin[:, None]], axis=1)
    codes = draw(st.sampled_from([(1, 0), (2, 0), (0, 1), (0, 2)]))  # of qform and sform: here they differ
    values = {
        "sizeof_hdr": 348,
        "dim": [3, *shape, 1, 1, 1, 1],
        "datatype": code,
        "bitpix": 8 * stored.itemsize,
        "pixdim": [draw(st.sampled_from([1, -1, 0])), *spacing, 0, 0, 0, 0],
        "vox_offset": draw(st.sampled_from([352, 368])),
        "scl_slope": slope,
        "scl_inter": inter,
        "xyzt_units": draw(st.sampled_from([0, 2, 10])),
        "qform_code": codes[0],
        "sform_code": codes[1],
        "quatern": quaternion[1:],
        "qoffset": origin,
        "srow": rows.ravel(),
        "magic": b"n+1\0",
    }
    if draw(st.booleans()):
        values["dim"][0] = 4
    return draw(st.sampled_from("<>")), stored, values


def write_nifti(path, raw, packed=False):
    path.write_bytes(gzip.compress(raw, 1, mtime=0) if packed else raw)
    return path


@given(nifti_fields(), st.booleans(), st.tuples(*[st.integers(0, 5)] * 3))
def test_a_good_nifti_is_read_and_a_marker_lies_at_its_physical_place(folder, made, packed, marker):
    order, stored, values = made
    marker = tuple(i % n for i, n in zip(marker, stored.shape))
    slope, inter = values["scl_slope"], values["scl_inter"]
    stored[marker] = round((700 - inter) / slope) if slope else 700
    raw = encode(order, stored, **values)
    ct = read_ct(write_nifti(folder / f"good.nii{'.gz' if packed else ''}", raw, packed))
    same_as_decoded(ct, raw)
    decoded, affine = decode(raw)
    place = (affine @ [*marker, 1])[:3]
    hu, mask = resample_cube(ct, place, fov_mm=6.0, size=15)  # 0.4 mm: finer than any voxel, the marker in the middle
    assert mask[7, 7, 7] == 1
    assert abs(int(hu[7, 7, 7]) - decoded.reshape(stored.shape)[marker]) <= 9  # float32 affine: a few micrometres


def test_nifti_2_is_read_like_nifti_1(folder):
    hu = np.where(np.arange(60) % 2, -1000, 40).astype(np.int16).reshape(5, 4, 3)
    affine = np.array([[-2.0, 0, 0.5, 7], [0, 3, 0, -8], [0.5, 0, 4, 9], [0, 0, 0, 1]])
    for kind, name in ((nib.Nifti1Image, "one.nii"), (nib.Nifti2Image, "two.nii.gz")):
        nib.save(kind(hu, affine), folder / name)
        ct = read_ct(folder / name)
        assert np.array_equal(ct.data, hu)
        assert np.allclose(ct.affine, affine)


NASTY_FLOATS = st.one_of(
    st.sampled_from([0.0, -1.0, 1e-30, 1e30, math.nan, math.inf, -math.inf, 1.0, 2.0]), st.floats(width=32)
)
NASTY_SHORTS = st.one_of(st.sampled_from([-1, 0, 1, 2, 3, 7, 8, 128, 32767, -32768]), st.integers(-(2**15), 2**15 - 1))
DATATYPES = st.one_of(st.sampled_from([0, 1, *TYPES, 32, 128, 1536, 1792, 2048, 2304]), NASTY_SHORTS)


@st.composite
def header_changes(draw):
    """``{field: value}`` of a few fields that are set to anything."""
    changes = {}
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3, unique=True)):
        code = FIELDS[name][1]
        count = int(code[:-1] or 1) if code[-1] != "s" else 1
        one = {
            "f": NASTY_FLOATS,
            "h": DATATYPES if name == "datatype" else NASTY_SHORTS,
            "i": st.integers(-(2**31), 2**31 - 1),
            "B": st.integers(0, 255),
            "s": st.sampled_from([b"ni1\0", b"n+2\0", b"\0" * 4, b"n+1\n"]),
        }[code[-1]]
        changes[name] = draw(st.dictionaries(st.integers(0, count - 1), one, min_size=1, max_size=3))
    return changes


@given(nifti_fields(), header_changes(), st.booleans())
def test_any_nifti_header(folder, made, changes, packed):
    order, stored, values = made
    for name, entries in changes.items():
        if name == "magic" or np.ndim(values[name]) == 0:
            values[name] = next(iter(entries.values()))
        else:
            values[name] = list(values[name])
            for place, value in entries.items():
                values[name][place] = value
    raw = encode(order, stored, **values)
    path = write_nifti(folder / f"header.nii{'.gz' if packed else ''}", raw, packed)
    ct = outcome(read_ct, path)
    if ct is not None:
        same_as_decoded(ct, raw)


# What happens to bytes: (share of the length, new byte) flips, or a cut, or a piece put in.
DAMAGE = st.one_of(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("insert"), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=20)),
)


def damaged(raw: bytes, damage, end=None) -> bytes:
    """``raw`` after ``damage``, which lies in its first ``end`` bytes."""
    end, raw = min(end or len(raw), len(raw)), bytearray(raw)
    if isinstance(damage, list):
        for share, value in damage:
            raw[int(share * end)] = value
    elif damage[0] == "cut":
        del raw[int(damage[1] * end) :]
    else:
        place = int(damage[1] * end)
        raw[place:place] = damage[2]
    return bytes(raw)


@given(nifti_fields(), DAMAGE, st.booleans())
def test_damaged_bytes_of_a_nifti(folder, made, damage, header_only):
    order, stored, values = made
    raw = damaged(encode(order, stored, **values), damage, 352 if header_only else None)
    ct = outcome(read_ct, write_nifti(folder / "damaged.nii", raw))
    if ct is not None:
        same_as_decoded(ct, raw)


@given(nifti_fields(), DAMAGE)
def test_a_damaged_gzip_file_is_never_taken_for_a_good_one(folder, made, damage):
    order, stored, values = made
    packed = damaged(gzip.compress(encode(order, stored, **values), 6, mtime=0), damage)
    path = folder / "damaged.nii.gz"
    path.write_bytes(packed)
    ct = outcome(read_ct, path)
    if ct is not None:  # such as another time stamp
        same_as_decoded(ct, gzip.decompress(packed))


META_KEYS = (
    "NDims",
    "DimSize",
    "ElementType",
    "ElementSpacing",
    "TransformMatrix",
    "Offset",
    "CompressedData",
    "HeaderSize",
)
META_VALUES = (
    "",
    "3",
    "-1",
    "-1 2 3",
    "nan nan nan",
    "0 0 0",
    "99999 99999 99999",
    "MET_UCHAR_ARRAY",
    "MET_DOUBLE",
    "True",
)


@given(
    st.dictionaries(
        st.sampled_from(META_KEYS),
        st.sampled_from(META_VALUES) | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
        max_size=2,
    ),
    DAMAGE,
    st.booleans(),
)
def test_any_metaimage(folder, changes, damage, damages):
    pytest.importorskip("SimpleITK")
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "1 2 3",
        "ElementSpacing": "2 3 4",
        "DimSize": "5 4 3",
        "ElementType": "MET_SHORT",
        **changes,
        "ElementDataFile": "LOCAL",
    }
    data = np.where(np.arange(60) % 2, -1000, 40).astype("<i2").tobytes()
    raw = "".join(f"{key} = {value}\n" for key, value in header.items()).encode() + data
    (folder / "x.mha").write_bytes(damaged(raw, damage) if damages else raw)
    ct = outcome(read_ct, folder / "x.mha")
    if ct is not None:
        assert ct.data.ndim == 3
        assert np.isfinite(ct.data).all()
        assert np.linalg.matrix_rank(ct.affine) == 4
        if not changes and not damages:  # MetaImage positions are LPS
            assert ct.data[1, 0, 0] == -1000
            assert np.allclose(ct.affine, [[-2, 0, 0, -1], [0, -3, 0, -2], [0, 0, 4, 3], [0, 0, 0, 1]])


NRRD_FIELDS = {
    "type": "int16",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "5 4 3",
    "space directions": "(2,0,0) (0,3,0) (0,0,4)",
    "space origin": "(1,2,3)",
    "kinds": "domain domain domain",
    "encoding": "raw",
    "endian": "little",
}


@given(
    st.dictionaries(
        st.sampled_from([*NRRD_FIELDS, "space units", "spacings", "units"]),
        st.sampled_from(("", "3", "-1", "nan nan nan", "none", "(nan,0,0) (0,1,0) (0,0,1)", "gzip", "RAS", '"um"'))
        | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
        max_size=2,
    ),
    DAMAGE,
    st.booleans(),
)
def test_any_nrrd(folder, changes, damage, damages):
    pytest.importorskip("SimpleITK")
    data = np.where(np.arange(60) % 2, -1000, 40).astype("<i2").tobytes()
    fields = {**NRRD_FIELDS, **changes}
    raw = ("NRRD0004\n" + "".join(f"{key}: {value}\n" for key, value in fields.items()) + "\n").encode() + data
    (folder / "x.nrrd").write_bytes(damaged(raw, damage) if damages else raw)
    ct = outcome(read_ct, folder / "x.nrrd")
    if ct is not None:
        assert ct.data.ndim == 3
        assert np.isfinite(ct.data).all()
        assert np.linalg.matrix_rank(ct.affine) == 4
        if not changes and not damages:
            assert np.allclose(ct.affine, [[-2, 0, 0, -1], [0, -3, 0, -2], [0, 0, 4, 3], [0, 0, 0, 1]])


@functools.cache
def ct_frames():
    """``(volume, a multi-frame CT file of it)``."""
    pytest.importorskip("pydicom")
    import tempfile
    from pathlib import Path

    from tests.helpers.dicom_cases import lps_ct, write_frames

    ct = lps_ct((12, 10, 6), (24.0, 24.0, 24.0 / 1.3))
    with tempfile.TemporaryDirectory() as place:
        write_frames(Path(place) / "e.dcm", ct, [3, 1, 0, 5, 4, 2], [1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
        return ct, (Path(place) / "e.dcm").read_bytes()


@given(DAMAGE, st.booleans(), st.booleans())
def test_damaged_bytes_of_a_multi_frame_ct(folder, damage, header_only, preamble):
    ct, raw = ct_frames()
    end = len(raw) - 2 * ct.data.size if header_only else None
    (folder / "frames").mkdir(exist_ok=True)
    (folder / "frames" / "e.dcm").write_bytes(damaged(raw, damage, end)[0 if preamble else 132 :])
    found = outcome(read_ct, folder / "frames")
    if found is not None:
        assert found.data.ndim == 3
        assert np.isfinite(found.data).all()
        assert np.linalg.matrix_rank(found.affine) == 4


# ------------------------------------------------------------------------------------------------
# X-rays


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
def test_pictures_with_anything_beside_their_pixels(folder, kind, mode, orientation, clear, dpi, pages, reading):
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


# ------------------------------------------------------------------------------------------------
# JSON: configurations, --set, manifests, splits

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from(
        [10**30, -(10**400), 2**63, 1e999, math.nan, -math.inf, 1e308, 0.5, "", "..", "a/b", "\0", "\ud800"]
    ),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TEXT_DAMAGE = st.sampled_from(["none"] * 20 + ["cut", "byte", "twice", "deep", "bom", "digits", "list", "utf16"])


def json_bytes(data, damage) -> bytes:
    text = json.dumps(data)
    raw = text.encode()
    middle = len(raw) // 2
    return {
        "none": raw,
        "cut": raw[:middle],
        "byte": raw[:middle] + b"\xff" + raw[middle:],
        "twice": b'{"data": {}, "data": {}, ' + raw[1:],
        "deep": b"[" * 100_000,
        "bom": b"\xef\xbb\xbf" + raw,
        "digits": b'{"world_size": ' + b"9" * 5000 + b"}",
        "list": b"[" + raw + b"]",
        "utf16": text.encode("utf-16"),
    }[damage]


def paths_of(data, before=()):
    """The path of every value in nested dicts and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from paths_of(value, (*before, key))


def changed(data, changes):
    """A copy of ``data`` with ``{path: value}`` put in, where the path still exists."""
    data = json.loads(json.dumps(data))
    for path, value in changes.items():
        place = data
        for key in path[:-1]:
            place = place[key] if isinstance(place, dict) and key in place else place
            if isinstance(place, list) and isinstance(path[-1], int):
                break
        if isinstance(place, dict) or (isinstance(place, list) and path[-1] in range(len(place))):
            before = place.get(path[-1]) if isinstance(place, dict) else place[path[-1]]
            place[path[-1]] = value(before) if callable(value) else value
    return data


def doubled(value):
    """A value that is as likely to be fine as the one before."""
    if isinstance(value, bool):
        return not value
    return value * 2 if isinstance(value, int | float) else value


CASCADE = CascadeConfig()
STAGE = {"name": "a", "volume_size": 16, "voxel_dim": 32, "vit_depth": 1, "num_heads": 2}
BASES = {
    "direct": (EnhancedConfig, lambda path, more=(): load_config(EnhancedConfig, path, more), {}),
    "refinement": (RefinementConfig, lambda path, more=(): load_config(RefinementConfig, path, more), {}),
    "cascade": (
        CascadeConfig,
        load_cascade_config,
        {"stages": [STAGE, {**STAGE, "name": "b", "volume_size": [32, 32, 32]}], "xray_img_size": 64},
    ),
}


def full(kind):
    cls, _, given_keys = BASES[kind]
    return {**config_dict(cls()), **given_keys}


def well_typed(value, hint):
    """``value`` is what its annotation says; numbers are finite and texts can be written."""
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return all(well_typed(getattr(value, f.name), hints[f.name]) for f in fields(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(well_typed(v, typing.get_args(hint)[0]) for v in value)
    if typing.get_args(hint):
        return any(well_typed(value, one) for one in typing.get_args(hint))
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str) and bool(value.encode() or True)
    return type(value) is hint


def config_changes(kind):
    known = st.sampled_from(sorted(paths_of(full(kind)), key=str))
    unknown = st.tuples(st.text(max_size=8))
    fine = st.dictionaries(known, st.just(doubled), max_size=3)
    return fine | st.dictionaries(st.one_of(known, known, known, unknown), VALUES | st.just(doubled), max_size=3)


def check_config_file(folder, kind, changes, damage):
    cls, load, _ = BASES[kind]
    path = folder / f"{kind}.json"
    data = changed(full(kind), changes)
    path.write_bytes(json_bytes(data, damage))
    config = outcome(load, path)
    if config is None:
        assert changes or damage not in ("none", "bom")
        return
    assert damage in ("none", "bom")
    assert well_typed(config, cls)
    result = config_dict(config)
    for place in paths_of(data):
        found, wanted = result, data
        for key in place:
            found, wanted = found[key] if np.ndim(found) or isinstance(found, dict) else found, wanted[key]
        if not isinstance(wanted, (dict, list)) and place[-2:-1] != ("volume_size",):
            assert found == wanted
    (folder / "again.json").write_text(json.dumps(result))
    assert config_dict(load(folder / "again.json")) == result


@given(config_changes("direct"), TEXT_DAMAGE)
def test_direct_configurations(folder, changes, damage):
    check_config_file(folder, "direct", changes, damage)


@given(config_changes("refinement"), TEXT_DAMAGE)
def test_refinement_configurations(folder, changes, damage):
    check_config_file(folder, "refinement", changes, damage)


@given(config_changes("cascade"), TEXT_DAMAGE)
def test_cascade_configurations(folder, changes, damage):
    check_config_file(folder, "cascade", changes, damage)


SET_KEYS = st.one_of(
    st.sampled_from([".".join(map(str, p)) for kind in BASES for p in sorted(paths_of(full(kind)), key=str)]),
    st.sampled_from(
        ["stages.\u00b2.name", "stages.-1.name", "stages." + "9" * 5000, ".", "a" * 5000, "x" + ".x" * 3000]
    ),
    st.text(max_size=12),
)
SET_VALUES = st.one_of(
    VALUES.map(json.dumps),
    st.sampled_from(["[" * 100_000, "9" * 5000, "NaN", "1e999", '{"a": 1, "a": 2}', "=", "\0", "\ud800", "a\nb"]),
    st.text(max_size=12),
)


@given(
    st.sampled_from(sorted(BASES)),
    st.lists(st.tuples(SET_KEYS, SET_VALUES, st.sampled_from(["=", "=", ""])), max_size=2),
)
def test_set_options(folder, kind, options):
    cls, load, _ = BASES[kind]
    path = folder / "base.json"
    path.write_text(json.dumps(full(kind)))
    texts = [f"{key}{equals}{value}" for key, value, equals in options]
    config = outcome(load, path, texts, names="")
    if config is not None:
        assert well_typed(config, cls)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "root", patients=3, cube_size=16, xray_size=32)


MANIFEST_PATHS = [(k,) for k in ("format_version", "geometry", "hu_window", "mu_water", "xray_scale", "cube_size")]
MANIFEST_PATHS += [("geometry", k) for k in ("kind", "fov_mm", "sdd_mm", "sid_mm", "detector_mm", "x")]
MANIFEST_PATHS += [("split",), ("patients",), ("hu_window", 0), ("hu_window", 1), *[("split", name) for name in SPLITS]]
MANIFEST_PATHS += [("patients", name) for name in ("p0", "p9", "../p0", "p0/", "\u0440" + "0")] + [
    ("patients", "p1", "files")
]
IDS = st.sampled_from(["p0", "p1", "p2", "p9", "../p0", "/etc", "p0\0", "p0\n", "con", "a" * 300, "\u04400", ""])
LISTS = st.lists(IDS, max_size=4)


@given(
    st.dictionaries(st.sampled_from(MANIFEST_PATHS), VALUES | LISTS, max_size=2),
    st.lists(st.sampled_from(MANIFEST_PATHS), max_size=1),
    TEXT_DAMAGE,
)
def test_manifests(root, changes, dropped, damage):
    path = root / "dataset.json"
    good = path.read_bytes()
    data = changed(json.loads(good), changes)
    for place in dropped:
        if len(place) == 1:
            data.pop(place[0], None)
    try:
        path.write_bytes(json_bytes(data, damage))
        patients = find_patients(root)
        manifest = outcome(Manifest, root, patients, names=root, allowed="left out")
        made = outcome(PatientDataset, root, "all", 16, None, names=root, allowed="left out")
    finally:
        path.write_bytes(good)
    if manifest is None:
        assert made is None
        return
    assert damage in ("none", "bom")
    assert sorted(p for name in SPLITS for p in manifest.split[name]) == sorted(patients)
    assert set(patients) <= {"p0", "p1", "p2"}
    assert all(math.isfinite(v) for v in (*manifest.hu_window, manifest.xray_scale, manifest.geometry.fov_mm))
    assert manifest.hu_window[0] < manifest.hu_window[1]
    assert manifest.xray_scale > 0
    assert 1 <= manifest.cube_size <= 1024


@given(st.fixed_dictionaries(dict.fromkeys(SPLITS, LISTS | VALUES)) | VALUES | st.just(None), TEXT_DAMAGE)
def test_split_files(folder, data, damage):
    data = {"train": ["p0"], "val": ["p1"], "test": ["p2"]} if data is None else data
    path = folder / "split.json"
    path.write_bytes(json_bytes(data, damage))
    split = outcome(lambda: check_split(read_json(path), ["p0", "p1", "p2"], path), names=path)
    if split is not None:
        assert sorted(p for name in SPLITS for p in split[name]) == ["p0", "p1", "p2"]


RECORD_PATHS = [
    ("complete",),
    ("signature",),
    ("settings",),
    ("patient",),
    ("patient", "files"),
    ("patient", "files", "../x"),
]


@given(st.dictionaries(st.sampled_from(RECORD_PATHS), VALUES, max_size=2), TEXT_DAMAGE)
def test_records_of_prepared_patients(folder, changes, damage):
    from xray2ct.imaging.find_cts import CtSource

    source = CtSource("p0", folder / "p0.nii", "nifti")
    source.path.write_bytes(b"x")
    record = {"complete": True, "settings": {"size": 16}, "signature": [1, 1, 0], "patient": {"files": {}}}
    path = folder / "out" / "p0" / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_bytes(changed(record, changes), damage))
    outcome(check_output, folder / "out", [source], {"size": 16}, False, names=path)
    entry = outcome(finished_entry, source, path.parent, names=path)
    assert entry is None or set(entry["files"]) == set(patient_files("p0"))


@given(st.one_of(st.text(max_size=40), st.text(st.characters(), min_size=190, max_size=260), IDS))
def test_any_text_becomes_a_name_that_every_system_takes(text):
    name = safe_name(text)
    assert is_plain_name(name)
    assert safe_name(name) == name


# ------------------------------------------------------------------------------------------------
# Settings of networks

ODD_NUMBERS = [None, True, -1, 0, 1, 2, 3, 7, 12, 16, 20, 24, 28, 32, 48, 64, 136, 0.5, 2.0, math.nan, math.inf, "16"]
ODD_SETTINGS = st.one_of(st.sampled_from(ODD_NUMBERS), st.lists(st.sampled_from(ODD_NUMBERS), max_size=5))
BLOCKS = {"encoder_blocks": [1, 1, 1, 1], "decoder_blocks": [1, 1, 1]}
COARSE = {"volume_size": [16, 16, 16], "base_channels": 16, "xray_size": 32, "stem_stride": 1, **BLOCKS}
REFINEMENT = {
    **{"channels": 8, "growth": 4, "rrdb_blocks": 1, "head_channels": [8, 6, 2], "guide_widths": [8, 8, 16, 16]},
    **{"guide_channels": [2, 2, 2], "xray_size": 32, "stem_stride": 1},
}
CASCADE = {
    **{"volume_size": 16, "voxel_dim": 32, "vit_depth": 1, "num_heads": 2, "xray_size": 32, "num_views": 2},
    **{"token_grid": 4, "base_channels": 8, "xray_channels": 1},
}


def denoised(stage):
    noisy = torch.zeros(1, 1, *[stage.volume_size] * 3)
    return stage(noisy, torch.zeros(1), torch.zeros(1, stage.num_views, 64, 64))


NETWORKS = {
    "direct": (EnhancedDirectModel, {**COARSE, "transformer_blocks": 1}, lambda net: net(torch.zeros(1, 2, 64, 64))),
    "unet": (LiftingUNet, COARSE, lambda net: net(torch.zeros(1, 2, 64, 64))),
    "refinement": (
        functools.partial(RefinementNetwork, guided=True),
        REFINEMENT,
        lambda net: net(torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 2, 64, 64)),
    ),
    "cascade": (CascadeStage, CASCADE, denoised),
}


@given(st.sampled_from(sorted(NETWORKS)), st.data())
def test_a_network_of_any_settings_works_or_is_refused_by_name(kind, data):
    build, settings, run = NETWORKS[kind]
    key = data.draw(st.sampled_from(sorted(settings)))
    value = data.draw(ODD_SETTINGS)
    network = outcome(functools.partial(build, **{**settings, key: value}), names=key)
    if network is not None and sum(p.numel() for p in network.parameters()) < 3_000_000:
        with torch.no_grad():
            run(network)
