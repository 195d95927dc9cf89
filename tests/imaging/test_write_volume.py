"""Every output format puts every voxel at the same place of the patient; DICOM says that it is synthetic."""

import sys

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from xray2ct.files import InputError
from xray2ct.imaging.cube import cube_affine
from xray2ct.imaging.read_ct import read_ct
from xray2ct.imaging.write_volume import check_output, format_of, write_volume

FOV_MM, SIZE = 180.0, 12
MARKERS = ((2, 3, 9), (10, 6, 1), (0, 0, 0), (11, 11, 11))  # (d, h, w)


@pytest.fixture
def volume():
    hu = np.random.default_rng(0).integers(-1024, 1476, (SIZE,) * 3).astype(np.int16)
    for index, marker in enumerate(MARKERS):
        hu[marker] = 2000 + index
    return hu, cube_affine((10.0, -25.0, 300.0), FOV_MM, SIZE)


def place(affine, marker):
    """LPS millimetres, as ITK has them, of voxel (d, h, w)."""
    d, h, w = marker
    return (np.diag([-1, -1, 1, 1]) @ affine @ [w, h, d, 1])[:3]


def read_back(path):
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        return reader.Execute()
    return sitk.ReadImage(str(path))


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.NII.GZ", "ct.nii", "ct.nrrd", "ct.mha", "series"])
def test_positions_and_values_agree_in_every_format(volume, tmp_path, name):
    hu, affine = volume
    write_volume(tmp_path / name, hu, affine)
    image = read_back(tmp_path / name)
    array = sitk.GetArrayFromImage(image)
    assert sorted(array.ravel()) == sorted(hu.ravel())
    for index, marker in enumerate(MARKERS):
        (z, y, x) = np.argwhere(array == 2000 + index)[0]
        found = image.TransformIndexToPhysicalPoint((int(x), int(y), int(z)))
        assert np.abs(np.subtract(found, place(affine, marker))).max() < 0.01  # half a voxel is 7.5 mm
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["ct.nrrd", "series"])
def test_the_projects_own_reader_takes_them_back(volume, tmp_path, name):
    hu, affine = volume
    write_volume(tmp_path / name, hu, affine)
    again = read_ct(tmp_path / name)
    for index, marker in enumerate(MARKERS):
        voxel = np.argwhere(again.data == 2000 + index)[0]
        assert np.allclose((again.affine @ [*voxel, 1])[:3] * [-1, -1, 1], place(affine, marker), atol=0.01)


def test_floats_are_kept_where_the_format_can(volume, tmp_path):
    std = np.random.default_rng(1).random((SIZE,) * 3).astype(np.float32)
    for name in ("std.nii.gz", "std.nrrd"):
        write_volume(tmp_path / name, std, volume[1])
        assert np.allclose(np.sort(sitk.GetArrayFromImage(read_back(tmp_path / name)).ravel()), np.sort(std.ravel()))


def test_a_series_says_that_it_is_synthetic_and_is_a_valid_one(volume, tmp_path):
    for name in ("one", "two"):
        write_volume(tmp_path / name, *volume)
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "one").iterdir())]
    assert len(slices) == SIZE
    assert len({s.SOPInstanceUID for s in slices}) == SIZE
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert len({s[name].value for s in slices}) == 1
        assert slices[0][name].value != pydicom.dcmread(next((tmp_path / "two").iterdir()))[name].value
    for item in slices:
        assert list(item.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert "SYNTHETIC" in item.SeriesDescription
        assert str(item.PatientName) == item.PatientID == "SYNTHETIC"
        assert item.file_meta.MediaStorageSOPInstanceUID == item.SOPInstanceUID
    heights = [float(s.ImagePositionPatient[2]) for s in sorted(slices, key=lambda s: s.InstanceNumber)]
    assert np.allclose(np.diff(heights), FOV_MM / SIZE)
    assert pydicom.pixels.apply_rescale(slices[0].pixel_array, slices[0]).min() >= -1024


def test_every_format_says_that_it_is_synthetic_and_which_weights_made_it(volume, tmp_path):
    mark, keys = "Synthetic CT from X-rays, weights 084aa54d7d2a", {"ct.nii.gz": "descrip"}
    for name in ("ct.nii.gz", "ct.nrrd", "ct.mha"):
        write_volume(tmp_path / name, *volume, origin="weights 084aa54d7d2a")
        assert sitk.ReadImage(str(tmp_path / name)).GetMetaData(keys.get(name, "description")) == mark
    write_volume(tmp_path / "series", *volume, origin="weights 084aa54d7d2a")
    for path in (tmp_path / "series").iterdir():
        data = pydicom.dcmread(path)
        assert data.DerivationDescription.startswith("Synthetic: ")
        assert data.DerivationDescription.endswith("; weights 084aa54d7d2a")
        assert data.ImageType[3] == "SYNTHETIC"
    write_volume(tmp_path / "plain.nii", *volume)
    assert sitk.ReadImage(str(tmp_path / "plain.nii")).GetMetaData("descrip") == "Synthetic CT from X-rays"


def test_bad_outputs_are_named(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.nii").mkdir()
    for name, words in (
        ("ct.jpg", r"ct\.jpg: unknown format; expected a name ending in \.nii\.gz"),
        ("full", "is there already; a DICOM series needs a new or empty folder"),
        ("file", "is there already"),
        ("folder.nii", "is a folder; expected a file name"),
    ):
        with pytest.raises(InputError, match=f"--output .*{words}"):
            check_output(tmp_path / name, "--output")
    with pytest.raises(InputError, match=r"std: expected a name ending in \.nii\.gz"):
        check_output(tmp_path / "std", series=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    assert [format_of(n) for n in ("a.NII.GZ", "a.nrrd", "b/c")] == ["nifti", "nrrd", "dicom"]


@pytest.mark.parametrize(("package", "name"), [("SimpleITK", "ct.nrrd"), ("pydicom", "series")])
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"{name}: writing .* needs {package}; run: pip install"):
        check_output(tmp_path / name)


def test_a_failing_write_leaves_nothing(volume, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pydicom.Dataset, "save_as", full)
    with pytest.raises(OSError, match=r"No space.*series"):
        write_volume(tmp_path / "series", *volume)
    monkeypatch.setattr(sitk, "WriteImage", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("ITK\nwrite failed")))
    with pytest.raises(OSError, match=r"write failed.*ct\.mha"):
        write_volume(tmp_path / "ct.mha", *volume)
    assert list(tmp_path.iterdir()) == []


def test_names_with_dots_are_no_formats_where_a_series_is_asked_for(volume, tmp_path):
    name = tmp_path / "1.2.840.113619.5"
    with pytest.raises(InputError, match="unknown format"):
        check_output(name)
    write_volume(name, *volume, kind="dicom")
    assert len(list(name.iterdir())) == SIZE
    for wrong, kind in (("ct.nii.gz", "dicom"), ("ct.mha", "nifti"), ("ct", "nrrd")):
        with pytest.raises(InputError, match=rf"{wrong}: expected .* for the format {kind}"):
            check_output(tmp_path / wrong, kind=kind)


@pytest.mark.parametrize("kind", [None, "dicom"])
@pytest.mark.parametrize("where", ["file.txt/ct", "a" * 256, "new/" + "b" * 256 + "/ct", "/proc/locked/ct"])
def test_outputs_that_the_system_would_refuse_are_refused_before_and_leave_nothing(tmp_path, where, kind):
    (tmp_path / "file.txt").touch()
    with pytest.raises(InputError, match=r"--output .*: cannot be written \([A-Z][a-z ]+\)$"):
        check_output(tmp_path / (where if kind else f"{where}.nii.gz"), "--output", kind=kind)
    check_output(tmp_path / "new" / "deep" / "ct.nii.gz")
    assert [path.name for path in tmp_path.rglob("*")] == ["file.txt"]
