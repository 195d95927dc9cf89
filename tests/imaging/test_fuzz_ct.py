"""Fuzzing of CT files: NIfTI, MetaImage, NRRD and multi-frame DICOM are read rightly or refused in one line."""

from __future__ import annotations

import functools
import gzip
import math
import struct

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.ct_cases import NRRD_FIELDS
from tests.helpers.fuzzing import DAMAGE, damaged, outcome
from xray2ct.imaging.cube import resample_cube
from xray2ct.imaging.read_ct import read_ct

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


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


def check_usable(ct):
    """Whatever its header said: a finite volume in a place of its own."""
    assert ct.data.ndim == 3
    assert np.isfinite(ct.data).all()
    assert np.linalg.matrix_rank(ct.affine) == 4


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
        check_usable(ct)
        if not changes and not damages:  # MetaImage positions are LPS
            assert ct.data[1, 0, 0] == -1000
            assert np.allclose(ct.affine, [[-2, 0, 0, -1], [0, -3, 0, -2], [0, 0, 4, 3], [0, 0, 0, 1]])


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
        check_usable(ct)
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
        check_usable(found)
