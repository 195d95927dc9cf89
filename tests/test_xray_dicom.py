"""DICOM X-rays: every statement of the header about the pixels is used, or the file is refused."""

import sys

import numpy as np
import pytest
from xray_cases import picture, refused, write_dicom

from files import InputError
from xray_io import read_xray


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
    refused(path, "pip install pydicom")


def test_voi_lut_is_applied_and_said(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    stored = np.rint(picture(full=4000)).astype(np.uint16)
    table = pydicom.Dataset()
    curve = np.rint(1023 * (np.arange(4096) / 4095.0) ** 2).astype(np.uint16)
    table.LUTDescriptor, table.LUTData = [4096, 0, 10], curve.tolist()
    table["LUTDescriptor"].VR = "US"
    table["LUTData"].VR = "US"
    xray = read_xray(write_dicom(tmp_path / "x.dcm", stored, VOILUTSequence=[table]))
    assert xray.pixels == pytest.approx(curve[stored] / 1023.0, abs=1e-6)
    assert xray.notes == ["VOI LUT applied"]
    window = {"WindowCenter": "1000", "WindowWidth": "500"}
    linear = read_xray(write_dicom(tmp_path / "y.dcm", stored, **window))  # it would only clip
    assert np.array_equal(linear.pixels, (stored / 4095).astype(np.float32))
    curved = read_xray(write_dicom(tmp_path / "z.dcm", stored, VOILUTFunction="SIGMOID", **window)).pixels
    assert curved == pytest.approx(1 / (1 + np.exp(-4 * (stored - 1000.0) / 500)), abs=1e-3)


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
