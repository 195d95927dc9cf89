"""No name of a person in a DICOM or NIfTI header reaches any output."""

from __future__ import annotations

import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import prepare_data
from dataset import PatientDataset
from tests.helpers.ct_cases import grid_affine, thorax
from tests.helpers.tiny_data import make_hu
from xray2ct.data.manifest import DEFAULTS
from xray2ct.files import InputError
from xray2ct.imaging.read_xray import read_xray, write_png16
from xray2ct.imaging.xray_picture import OWN_MARK

MARKER, BIRTH = "QzMarkerXj", "19020304"
PERSONAL = {
    "PatientName": f"{MARKER}^Name",
    "PatientID": MARKER,
    "OtherPatientNames": MARKER,
    "PatientBirthDate": BIRTH,
    "PatientAddress": MARKER,
    "PatientMotherBirthName": MARKER,
    "PatientTelephoneNumbers": MARKER,
    "PatientComments": MARKER,
    "Occupation": MARKER,
    "EthnicGroup": MARKER,
    "AccessionNumber": MARKER,
    "InstitutionName": MARKER,
    "InstitutionAddress": MARKER,
    "InstitutionalDepartmentName": MARKER,
    "StationName": MARKER,
    "ReferringPhysicianName": MARKER,
    "PhysiciansOfRecord": MARKER,
    "PerformingPhysicianName": MARKER,
    "OperatorsName": MARKER,
    "RequestingPhysician": MARKER,
    "StudyID": MARKER,
    "StudyDescription": MARKER,
    "SeriesDescription": MARKER,
    "ProtocolName": MARKER,
    "ImageComments": MARKER,
    "DeviceSerialNumber": MARKER,
}


def dicom(path, pixels, sop_class, **tags):
    """One DICOM file whose every personal tag holds the marker."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.UID(sop_class)
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = pydicom.dataset.FileDataset(str(path), {}, b"\0" * 128, meta, is_implicit_VR=False)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = 16
    data.PixelData = pixels.astype("<i2" if pixels.min() < 0 else "<u2").tobytes()
    for name, value in {**PERSONAL, **tags}.items():
        setattr(data, name, value)
    data.private_block(0x0019, MARKER, create=True).add_new(1, "LO", MARKER)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path)
    assert MARKER.encode() in path.read_bytes()


def write_series(folder, ct, **tags):
    """A CT series of the volume's axial slices, in DICOM's axes (LPS)."""
    for k in range(ct.data.shape[2]):
        pixels = ct.data[::-1, ::-1, k].T  # columns to the left, rows to the back
        corner = ct.affine @ [ct.data.shape[0] - 1, ct.data.shape[1] - 1, k, 1]
        dicom(
            folder / f"im{k:02d}.dcm",
            pixels,
            "1.2.840.10008.5.1.4.1.1.2",
            **{
                "Modality": "CT",
                "SeriesInstanceUID": "1.2.3.4",
                "StudyInstanceUID": "1.2.3",
                "InstanceNumber": k,
                "BitsStored": 16,
                "HighBit": 15,
                "PixelRepresentation": 1,
                "RescaleSlope": "1",
                "RescaleIntercept": "0",
                "PixelSpacing": ["8", "8"],
                "ImagePositionPatient": [str(-corner[0]), str(-corner[1]), str(corner[2])],
                "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
                **tags,
            },
        )


def everything_below(folder) -> dict[str, bytes]:
    """Content of each file, unpacked; names too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            raw = path.read_bytes()
            found[str(path.relative_to(folder))] = gzip.decompress(raw) if path.name.endswith(".gz") else raw
    return found


def test_no_name_of_a_dicom_or_nifti_header_reaches_any_output(tmp_path, capfd):
    pytest.importorskip("SimpleITK")
    ct = thorax((40, 40, 20), grid_affine((40, 40, 20), 8.0))
    write_series(tmp_path / "in" / "case7", ct)
    write_series(tmp_path / "in" / "broken", ct, PixelSpacing=["0", "0"], SeriesInstanceUID="1.2.3.5")
    write_series(tmp_path / "in" / "other", ct, Modality="MR", SeriesInstanceUID="1.2.3.6")
    image = nib.Nifti1Image(ct.data, ct.affine)
    for key in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[key] = MARKER
    nib.save(image, tmp_path / "in" / "case8.nii.gz")
    words = ["--size", "32", "--xray-size", "32", "--workers", "1"]
    code = prepare_data.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *words])
    printed = capfd.readouterr()
    assert code == 1
    assert "broken" in printed.out
    files = everything_below(tmp_path / "out")
    assert {"case7/case7.nii.gz", "case8/case8_pa_drr.png", "dataset.json"} <= set(files)
    for name, content in {**files, "printed": (printed.out + printed.err).encode()}.items():
        assert MARKER.encode() not in content, name
        assert BIRTH.encode() not in content, name
    volumes = [nib.load(tmp_path / "out" / p / f"{p}.nii.gz") for p in ("case7", "case8")]
    assert np.abs(volumes[0].get_fdata() - volumes[1].get_fdata()).max() <= 1  # the names are gone, the CT is not
    for volume in volumes:
        assert all(not volume.header[key].item() for key in ("db_name", "aux_file", "intent_name", "descrip"))
    with Image.open(tmp_path / "out" / "case7" / "case7_pa_drr.png") as picture:
        picture.load()
        assert picture.text == dict([OWN_MARK])  # nothing but the scale


def test_no_name_of_a_dicom_xray_reaches_any_output(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setitem(DEFAULTS, "cube_size", 32)  # quick
    folder = tmp_path / "data" / "p7"
    hu = make_hu(0, 32)
    folder.mkdir(parents=True)
    np.save(folder / "p7.npy", hu)
    for view, axis in (("pa", 1), ("lat", 2)):
        pixels = np.clip(hu + 1000.0, 0, None).mean(axis=axis) * 2
        dicom(
            folder / f"p7_{view}.dcm",
            np.rint(pixels),
            "1.2.840.10008.5.1.4.1.1.1",
            BitsStored=12,
            HighBit=11,
            PixelRepresentation=0,
        )
    raw = (folder / "p7_pa.dcm").read_bytes()  # a wrong UID, which pydicom quotes in a warning and in its log
    (folder / "p7_pa.dcm").write_bytes(raw.replace(b"1.2.840.10", MARKER.encode(), 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = PatientDataset(tmp_path / "data", "all", 16, 32, cache_dir=tmp_path / "cache")
        item = data[0]
        notes = read_xray(folder / "p7_pa.dcm", "percentile", size=64).notes
    write_png16(tmp_path / "cache" / "again.png", item["xrays"][0].numpy())
    said = [str(warning.message) for warning in caught] + notes
    broken = folder / "p7_pa.dcm"
    broken.write_bytes(broken.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"p7_pa\.dcm") as error:
        read_xray(broken)
    printed = capfd.readouterr()
    texts = {
        **everything_below(tmp_path / "cache"),
        "said": " ".join([*said, str(error.value), *printed, caplog.text]).encode(),
    }
    assert len(texts) >= 5
    for name, content in texts.items():
        assert MARKER.encode() not in content, name
        assert BIRTH.encode() not in content, name
