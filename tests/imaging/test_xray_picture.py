"""X-rays as picture files: pages, orientation, transparency, polarity and bits are used, or the file is refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers.xray_cases import eight, picture, refused, sixteen
from xray2ct.imaging.read_xray import read_xray

SIDES = {  # where the stored picture's first row and first column lie, by TIFF's and EXIF's definition
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
AIR_ROWS = 12


def stored_as(upright, orientation):
    row, column = SIDES[orientation]
    stored = upright if row in ("top", "bottom") else upright.T
    stored = stored[::-1] if row in ("bottom", "right") else stored
    return np.ascontiguousarray(stored[:, ::-1] if column in ("bottom", "right") else stored)


def write_png(path, bits, colour, rows, transparent=b""):
    """A PNG of any bit depth and colour type; ``rows`` are bytes."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", len(rows[0]) * 8 // bits // channels, len(rows), bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    if transparent:
        chunks.insert(1, (b"tRNS", transparent))
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)
    return path


def write_tiff(path, array, bits, photometric=1, sample_format=1, order="<", size=None):
    """An uncompressed TIFF of one channel, such as Pillow does not write; ``size`` where the array is packed bytes."""
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    columns, rows = size or array.shape[::-1]
    tags = {256: columns, 257: rows, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: rows, 279: len(data)}
    tags[339] = sample_format
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    header = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(data))
    path.write_bytes(header + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))
    return path


# ------------------------------------------------------------------------------------------------
# Orientation and pages


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "packed.tif"])
def test_a_picture_is_turned_once_by_its_orientation(tmp_path, kind, orientation):
    upright = sixteen(rows=48, columns=40) if "tif" in kind else eight(rows=48, columns=40)
    image, path = Image.fromarray(stored_as(upright, orientation)), tmp_path / f"x.{kind}"
    if "tif" in kind:
        image.save(path, tiffinfo={274: orientation}, compression="tiff_lzw" if "packed" in kind else None)
    else:
        exif = Image.Exif()
        exif[274] = orientation
        image.save(path, exif=exif, **({"quality": 98} if kind == "jpg" else {}))
    xray = read_xray(path)
    assert xray.pixels == pytest.approx(upright / np.iinfo(upright.dtype).max, abs=0.02 if kind == "jpg" else 1e-6)
    assert xray.notes == ([f"turned by its EXIF orientation ({orientation})"] if orientation > 1 else [])


@pytest.mark.parametrize(("name", "kind"), [("x.tif", "TIFF"), ("x.png", "PNG"), ("x.jpg", "MPO"), ("gif.png", "GIF")])
def test_pictures_of_several_pages_are_refused_with_their_number(tmp_path, name, kind):
    pages = [Image.fromarray(np.roll(eight(), shift, 1)) for shift in range(3)]
    pages[0].save(tmp_path / name, format=kind, save_all=True, append_images=pages[1:])
    refused(tmp_path / name, "holds 3 pages or frames; expected one picture")


# ------------------------------------------------------------------------------------------------
# Transparency


def transparent_files(folder):
    """The same picture with rows of bright, wholly transparent pixels above it, stored in every way there is."""
    grey = np.minimum(eight(), 254)
    grey[:AIR_ROWS] = 255
    alpha = np.full_like(grey, 255)
    alpha[:AIR_ROWS] = 0
    bands = Image.fromarray(grey), Image.fromarray(alpha)
    Image.merge("LA", bands).save(folder / "la.png")
    Image.merge("RGBA", (bands[0],) * 3 + bands[1:]).save(folder / "rgba.png")
    Image.merge("RGBA", (bands[0],) * 3 + bands[1:]).save(folder / "rgba.tif")
    palette = Image.fromarray(grey, "P")
    palette.putpalette([value for value in range(256) for _ in range(3)])
    palette.save(folder / "one_of_palette.png", transparency=255)
    palette.save(folder / "palette.png", transparency=bytes([255] * 255 + [0]))
    bands[0].save(folder / "key.png", transparency=255)
    Image.merge("RGB", bands[:1] * 3).save(folder / "rgb_key.png", transparency=(255, 255, 255))
    deep = (grey.astype(np.uint16) * 257).astype(">u2")
    write_png(folder / "deep_key.png", 16, 0, [row.tobytes() for row in deep], b"\xff\xff")
    both = np.stack([deep] * 3 + [alpha.astype(np.uint16) * 257], axis=-1).astype(">u2")
    write_png(folder / "deep_rgba.png", 16, 6, [row.tobytes() for row in both])
    return grey, sorted(folder.iterdir())


def test_transparent_pixels_are_air_and_decide_nothing(tmp_path):
    grey, paths = transparent_files(tmp_path)
    body = grey[AIR_ROWS:]
    Image.fromarray(body).save(tmp_path / "body.png")
    assert len(paths) == 9
    for path in paths:
        for options in ({}, {"normalization": "percentile"}, {"normalization": "histogram"}):
            xray, expected = read_xray(path, **options), read_xray(tmp_path / "body.png", **options).pixels
            assert xray.pixels[AIR_ROWS:] == pytest.approx(expected, abs=1.01 / 255), path
            assert (xray.pixels[:AIR_ROWS] == 0).all(), path
            assert "25.0% of the pixels are padding or transparent: taken for air" in xray.notes
    assert "only the upper 8 of the 16 bits of its colours are read" in read_xray(tmp_path / "deep_rgba.png").notes


def test_transparent_pixels_of_an_inverted_picture_are_air_too(tmp_path):
    grey, alpha = 255 - eight(), np.full((48, 48), 255, np.uint8)
    grey[:AIR_ROWS], alpha[:AIR_ROWS] = 0, 0
    Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))).save(tmp_path / "x.png")
    assert read_xray(tmp_path / "x.png", invert=True).pixels[:AIR_ROWS].max() == 0


def test_a_transparent_level_of_few_bits_is_found(tmp_path):
    levels = np.rint(picture(full=14)).astype(np.uint8)
    levels[:AIR_ROWS] = 15
    rows = [(row[::2] << 4 | row[1::2]).tobytes() for row in levels]
    xray = read_xray(write_png(tmp_path / "x.png", 4, 0, rows, b"\x00\x0f"))
    assert xray.pixels[:AIR_ROWS].max() == 0
    assert xray.pixels[AIR_ROWS:] == pytest.approx(levels[AIR_ROWS:] / 15, abs=1e-6)


def test_transparency_that_cannot_be_told_is_refused(tmp_path):
    grey = Image.fromarray(eight())
    Image.merge("LA", (grey, Image.new("L", grey.size, 128))).save(tmp_path / "half.png")
    refused(tmp_path / "half.png", "partly transparent pixels; expected opaque or wholly transparent")
    Image.merge("LA", (grey, Image.new("L", grey.size, 0))).save(tmp_path / "none.png")
    refused(tmp_path / "none.png", "0 x 0 without padding and transparent pixels; expected 32 x 32")
    rows = [np.repeat(row, 3).astype(">u2").tobytes() for row in sixteen()]
    refused(write_png(tmp_path / "key.png", 16, 2, rows, b"\xff" * 6), "16-bit colours, one of them transparent")


# ------------------------------------------------------------------------------------------------
# Polarity, bits, kinds of pixels


@pytest.mark.parametrize("bits", [8, 16])
def test_white_is_zero_is_inverted_by_its_header(tmp_path, bits):
    """Also a body that fills the picture, whose polarity its borders do not tell."""
    values = np.rint(picture(rows=96, columns=96)[30:66, 25:71] * (2**bits - 1)).astype(f"u{bits // 8}")
    path = write_tiff(tmp_path / "x.tif", 2**bits - 1 - values, bits, photometric=0)
    for normalization in ("manifest", "percentile"):
        xray = read_xray(path, normalization)
        expected = values / (2**bits - 1)
        assert np.corrcoef(xray.pixels.ravel(), expected.ravel())[0, 1] > 0.999
        assert xray.notes == ["WhiteIsZero: inverted, so that bone is bright"]
    assert read_xray(path).pixels == pytest.approx(expected, abs=1e-6)
    upright = write_tiff(tmp_path / "y.tif", values, bits)
    assert read_xray(upright).pixels == pytest.approx(expected, abs=1e-6)
    assert read_xray(upright).notes == []


def test_white_is_zero_without_a_known_white_is_refused(tmp_path):
    values = (1 - picture()).astype(np.float32)
    refused(write_tiff(tmp_path / "x.tif", values, 32, 0, 3), "a WhiteIsZero TIFF of mode F; expected 8 or 16 bit")
    for name, array, order in (("int.tif", values.astype(np.uint32), "<"), ("big.tif", 65535 - sixteen(), ">")):
        path = write_tiff(tmp_path / name, array, 8 * array.itemsize, 0, order=order)
        refused(path, "not a readable picture")


def test_12_bit_and_32_bit_tiffs_have_their_own_scale(tmp_path):
    twelve = np.rint(picture(full=4095)).astype(np.uint16)
    one, other = twelve[:, ::2], twelve[:, 1::2]  # two values in three bytes
    packed = np.stack([one >> 4, (one & 15) << 4 | other >> 8, other & 255], axis=-1).astype(np.uint8)
    path = write_tiff(tmp_path / "x.tif", packed, 12, size=(48, 48))
    assert read_xray(path).pixels == pytest.approx(twelve / 4095, abs=1e-6)
    large = np.rint(picture(full=2.0**32 - 1)).astype(np.uint32)
    path = write_tiff(tmp_path / "y.tif", large, 32)
    refused(path, "expected 0 to 65535")
    np.save(tmp_path / "y.npy", large)
    expected = read_xray(tmp_path / "y.npy", "percentile").pixels
    assert read_xray(path, "percentile").pixels == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("inverted", [False, True])
def test_12_bits_in_a_picture_of_16_are_no_picture_on_the_projects_scale(tmp_path, inverted):
    values = np.rint(picture(full=4095)).astype(np.uint16)
    Image.fromarray(65535 - values if inverted else values).save(tmp_path / "x.png")
    refused(tmp_path / "x.png", "expected 0 to 65535 .*12 bits in a file of 16.*percentile", invert=inverted)
    expected = read_xray(tmp_path / "x.png", "percentile", invert=inverted).pixels
    assert np.corrcoef(expected.ravel(), values.ravel())[0, 1] > 0.99


def test_print_colours_and_broken_floats_are_refused(tmp_path):
    Image.fromarray(eight()).convert("CMYK").save(tmp_path / "x.jpg")
    refused(tmp_path / "x.jpg", "a picture of mode CMYK; expected 8 or 16 bit grey, or RGB")
    Image.fromarray(np.where(np.eye(48), np.nan, picture()).astype(np.float32)).save(tmp_path / "x.tif")
    refused(tmp_path / "x.tif", "holds NaN or infinite pixels")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif"])
def test_pixels_that_are_not_square_are_refused(tmp_path, name):
    Image.fromarray(eight()).save(tmp_path / name, dpi=(204, 98))
    refused(tmp_path / name, "its resolution is 20[0-9.]+ across and 9[0-9.]+ down; expected square pixels")
    Image.fromarray(eight()).save(tmp_path / name, dpi=(300, 300))
    assert read_xray(tmp_path / name).notes == []
