"""X-rays for the tests of their readers: pictures, and files with the headers under test."""

import numpy as np
import pytest

from xray2ct.files import InputError
from xray2ct.imaging.read_xray import read_xray


def picture(rows=48, columns=48, full=1.0):
    """A bright ellipse with some texture on a dark ground, float64 in [0, full]."""
    v, u = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    body = np.clip(1.2 - (v / 1.1) ** 2 - (u / 0.7) ** 2, 0, 1)
    return full * body * (0.85 + 0.15 * np.sin(9 * u + 5 * v))


def eight(**size):
    return np.rint(picture(**size, full=255)).astype(np.uint8)


def sixteen(**size):
    return np.rint(picture(**size, full=65535)).astype(np.uint16)


def refused(path, match, **options):
    """``path`` is refused with a message that names it and matches ``match``."""
    with pytest.raises(InputError, match=match) as caught:
        read_xray(path, **options)
    assert str(path) in str(caught.value)


def write_dicom(path, pixels, photometric="MONOCHROME2", **tags):
    """A DICOM X-ray of 12 bits in 16, signed where a pixel is negative; ``tags`` go before the usual ones."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.UID("1.2.840.10008.5.1.4.1.1.1.1")
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = pydicom.dataset.FileDataset(str(path), {}, b"\0" * 128, meta, is_implicit_VR=False)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, photometric
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, int(pixels.min() < 0)
    data.PixelData = pixels.astype("<i2" if pixels.min() < 0 else "<u2").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


def lut(entries, first=0, depth=16, vr="OW", count=None, order="<"):
    """An item of a Modality or VOI LUT Sequence; ``vr`` of its data, ``count`` as the descriptor says it."""
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    count = len(entries) if count is None else count
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [count, first, depth])
    entries = np.asarray(entries)
    value = entries.astype(f"{order}u2").tobytes() if vr == "OW" else [int(value) for value in entries]
    item.add_new("LUTData", vr, value)
    item.ModalityLUTType = "US"
    return item
