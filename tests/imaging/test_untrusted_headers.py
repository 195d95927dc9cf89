"""What a header claims: no data from another folder, no memory before the claim is checked."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest

from xray2ct.files import InputError
from xray2ct.imaging.read_ct import read_ct
from xray2ct.imaging.read_xray import read_xray

MHD = """ObjectType = Image
NDims = 3
DimSize = 8 8 8
ElementSpacing = 5 5 5
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementType = MET_SHORT
ElementDataFile = {}
"""
NRRD = """NRRD0004
type: short
dimension: 3
space: left-posterior-superior
sizes: 8 8 8
space directions: (5,0,0) (0,5,0) (0,0,5)
space origin: (0,0,0)
encoding: raw
endian: little
data file: {}

"""


@pytest.mark.parametrize(("suffix", "text"), [("mhd", MHD), ("nrrd", NRRD)])
def test_headers_that_name_data_in_another_folder_are_refused(tmp_path, suffix, text):
    pytest.importorskip("SimpleITK")
    folder = tmp_path / "in"
    folder.mkdir()
    data = np.repeat(np.int16([-1000, 40]), 256).tobytes()
    for place in (tmp_path / "secret.raw", folder / "good.raw"):
        place.write_bytes(data)
    (folder / "link.raw").symlink_to(tmp_path / "secret.raw")
    path = folder / f"ct.{suffix}"
    for name in (
        "../secret.raw",
        str(tmp_path / "secret.raw"),
        "link.raw",
        "x/../../secret.raw",
        "LIST\n../secret.raw",
    ):
        path.write_text(text.format(name))
        with pytest.raises(InputError, match="in another folder; expected them beside it"):
            read_ct(path)
    path.write_text(text.format("good.raw"))
    assert read_ct(path).data.shape == (8, 8, 8)


def png_of(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def nifti_of(shape, kind=np.float64):
    header = nib.Nifti1Header()
    header.set_data_dtype(kind)
    header["dim"][:4] = 3, *shape
    header["bitpix"], header["vox_offset"], header["magic"] = 8 * np.dtype(kind).itemsize, 352, b"n+1"
    header["pixdim"][1:4], header["sform_code"] = 1, 1
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        header[name] = np.eye(4)[row]
    return header.binaryblock + bytes(4)


BOMBS = {
    "huge.png": lambda: png_of(60_000, 60_000),
    "wide.png": lambda: png_of(33, 9000),  # padded to a square it would be large
    "huge.npy": lambda: npy_claiming("(1000000, 1000000)"),
    "huge.nii": lambda: nifti_of((30_000,) * 3) + bytes(9999),
    "huge.nii.gz": lambda: gzip.compress(nifti_of((30_000,) * 3) + bytes(9999)),
    "much.nii.gz": lambda: gzip.compress(nifti_of((1000, 1000, 500)) + bytes(9999)),
    "long.nii.gz": lambda: gzip.compress(nifti_of((8, 8, 8), np.int16) + bytes(60_000_000), 1),
    "huge.mha": lambda: MHD.replace("8 8 8", "90000 90000 90000").format("LOCAL").encode() + bytes(999),
    "much.mha": lambda: MHD.replace("8 8 8", "1000 1000 1000").format("LOCAL").encode() + bytes(999),
}


def npy_claiming(shape) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(999)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_memory_is_taken(tmp_path, name):
    if name.endswith("mha"):
        pytest.importorskip("SimpleITK")
    path = tmp_path / name
    path.write_bytes(BOMBS[name]())
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=name):
            (read_xray if name.endswith(("png", "npy")) else read_ct)(path)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_a_scan_of_impossible_volume_is_refused_before_it_is_resampled(tmp_path):
    hu = np.where(np.arange(140**3) % 2, -1000, 40).astype(np.int16).reshape((140,) * 3)
    nib.save(nib.Nifti1Image(hu, np.diag([20.0, 20, 20, 1])), tmp_path / "wide.nii")
    with pytest.raises(InputError, match=r"wide\.nii: .* litres"):
        read_ct(tmp_path / "wide.nii")
