"""Which files of a folder become CTs, and that nothing which may be one is passed over in silence."""

import os

import pytest

from tests.helpers.ct_cases import save_nifti, thorax
from xray2ct.files import InputError
from xray2ct.imaging.find_cts import CtSource, find_cts, search_cts, source_files

PREAMBLE = b"\0" * 128 + b"DICM"


def touch(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def ids(folder):
    return [source.patient_id for source in search_cts(folder)[0]]


def test_linked_folders_are_searched_once(tmp_path):
    touch(tmp_path / "in" / "a.nii")
    touch(tmp_path / "in" / "sub" / "b.nii")
    touch(tmp_path / "elsewhere" / "deep" / "c.nii")
    touch(tmp_path / "in" / ".git" / "objects" / "d.nii")
    for name, target in (("x", "elsewhere"), ("y", "elsewhere"), ("z", "in/sub"), ("w", "in/.git/objects")):
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    assert search_cts(tmp_path / "in")[1] == []
    assert ids(tmp_path / "in") == ["a", "b", "c", "d"]
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    (text,) = search_cts(tmp_path / "in")[1]
    assert text.startswith(f"{tmp_path}/in/up: a link to a folder around")
    assert ids(tmp_path / "in") == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("D.img", "half of a pair"),
        ("D.hdr", "half of a pair"),
        ("x.mnc", "a format that is not read"),
        ("x.gipl", "a format that is not read"),
        ("x.gipl.gz", "a format that is not read"),
        ("x.mgz", "a format that is not read"),
        ("x.npy", "a format that is not read"),
        ("scans.zip", "a format that is not read"),
        ("scans.tar.gz", "a format that is not read"),
        ("x.raw", "no MetaImage or NRRD header"),
        ("x.dcm", "not a DICOM file"),
        ("x.IMA", "not a DICOM file"),
        ("IM0001", "not a DICOM file"),
        ("1.2.840.55", "not a DICOM file"),
        ("x.h5", "a format that is not read"),
    ],
)
def test_what_may_hold_a_ct_but_is_not_read_is_named(tmp_path, name, words):
    touch(tmp_path / "a.nii")
    for harmless in ("notes.txt", "LICENSE", "scores.2.json", "Makefile"):
        touch(tmp_path / harmless)
    path = touch(tmp_path / "sub" / name)
    sources, (text,) = search_cts(tmp_path)
    assert [source.patient_id for source in sources] == ["a"]
    assert text.startswith(f"{path}: ")
    assert words in text
    (tmp_path / "a.nii").unlink()
    with pytest.raises(InputError, match="no CT found that can be used; 1 left out"):
        find_cts(tmp_path)


def test_dangling_links_and_unreadable_folders_are_named(tmp_path, monkeypatch):
    touch(tmp_path / "a.nii")
    (tmp_path / "IM0001").symlink_to(tmp_path / "gone")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def denied(path):  # root may read everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    texts = search_cts(tmp_path)[1]
    assert sorted(text.split(": ")[0] for text in texts) == [f"{tmp_path}/IM0001", f"{tmp_path}/locked"]


def test_data_files_beside_their_header_belong_to_it(tmp_path):
    mhd = touch(tmp_path / "a.mhd", b"NDims = 3\nElementDataFile = a.zraw\n")
    nhdr = touch(tmp_path / "b.nhdr", b"NRRD0004\ndata file: b.raw\n\n")
    touch(tmp_path / "a.zraw")
    touch(tmp_path / "b.raw")
    sources, left_out = search_cts(tmp_path)
    assert left_out == []
    assert sources == [CtSource("a", mhd, "image"), CtSource("b", nhdr, "image")]
    assert [[path.name for path in source_files(source)] for source in sources] == [
        ["a.mhd", "a.zraw"],
        ["b.nhdr", "b.raw"],
    ]


def test_a_series_in_two_folders_is_named_with_both(tmp_path):
    pytest.importorskip("pydicom")
    from tests.helpers.dicom_cases import lps_ct, write_slices

    ct = lps_ct()
    write_slices(tmp_path / "DIR01", ct, only=range(5))
    write_slices(tmp_path / "DIR02", ct, only=range(5, 10))
    write_slices(tmp_path / "whole", ct, series=2)
    sources, texts = search_cts(tmp_path)
    assert [source.patient_id for source in sources] == ["whole"]
    assert len(texts) == 2
    assert all("DIR01" in text and "DIR02" in text and "same DICOM series" in text for text in texts)


def test_a_short_series_beside_a_ct_is_named_but_a_localiser_is_none(tmp_path):
    pytest.importorskip("pydicom")
    from tests.helpers.dicom_cases import lps_ct, write_slices

    ct = lps_ct()

    def localiser(data, k):
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_slices(tmp_path / "ct", ct)
    for series, change in ((2, localiser), (3, None)):
        folder = write_slices(tmp_path / f".{series}", ct, change, only=[4, 5], series=series)
        for path in sorted(folder.iterdir()):
            path.rename(tmp_path / "ct" / f"{series}_{path.name}")
    sources, (text,) = search_cts(tmp_path)
    assert [source.patient_id for source in sources] == ["ct"]
    assert text.startswith(f"{tmp_path}/ct/3_im028.dcm: CT slice of a short DICOM series (2 slices)")


def test_files_that_a_dicomdir_lists_must_be_there(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from tests.helpers.dicom_cases import base, lps_ct, write_slices

    write_slices(tmp_path / "ct", lps_ct())
    data = base("1.2.840.10008.1.3.10", 0, 1)
    records = [pydicom.Dataset() for _ in range(11)]
    for record, path in zip(records[1:], sorted((tmp_path / "ct").iterdir())):
        path = path.rename(path.with_suffix(""))
        record.ReferencedFileID = ["CT", path.name.upper()]  # as on a CD; the first one is the patient's
    data.DirectoryRecordSequence = pydicom.Sequence(records)
    data.save_as(tmp_path / "DICOMDIR", enforce_file_format=True)
    assert search_cts(tmp_path)[1] == []
    path.unlink()
    (text,) = search_cts(tmp_path)[1]
    assert text.startswith(f"{tmp_path}/DICOMDIR: lists 10 files, of which 1 are not there")


def test_a_folder_of_damaged_slices_and_a_ct_beside_slices(tmp_path):
    pytest.importorskip("pydicom")
    touch(tmp_path / "series" / "IM1", PREAMBLE)
    touch(tmp_path / "series" / "IM2")  # named when the series is read
    save_nifti(tmp_path / "series" / "converted.nii", thorax((12, 12, 12)))
    sources, left_out = search_cts(tmp_path)
    assert [(source.patient_id, source.kind) for source in sources] == [("converted", "nifti"), ("series", "dicom")]
    assert left_out == []


def test_a_patients_folder_of_a_download_is_one_ct_named_after_it(tmp_path):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    from tests.helpers.dicom_cases import lps_ct, write_slices

    for series, patient in enumerate(("LIDC-IDRI-0001", "nlst_100002")):
        write_slices(tmp_path / patient / "ct", lps_ct(), series=series + 1)
        write_slices(tmp_path / patient / "scouts", lps_ct(), only=[0, 1], series=series + 8)
    write_slices(tmp_path / "nlst_100002" / "films", lps_ct(), only=[0], series=20)
    write_slices(tmp_path / "nlst_100002" / ".ct.part", lps_ct(), only=[0], series=21)
    (tmp_path / "sources.csv").write_text("id\n")
    sources, left_out = search_cts(tmp_path)
    assert [source.patient_id for source in sources] == ["LIDC-IDRI-0001", "nlst_100002"]
    assert {source.path.name for source in sources} == {"ct"}
    assert not left_out
    write_slices(tmp_path / "other" / "scouts", lps_ct(), series=30)  # without ct beside it, a name like any other
    assert [source.patient_id for source in search_cts(tmp_path)[0]][-1] == "scouts"


def test_without_a_download_a_folder_named_ct_is_a_name_like_any_other(tmp_path):
    for patient in "ab":
        path = tmp_path / patient / "ct" / "slice.dcm"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(128) + b"DICM")
    assert [source.patient_id for source in search_cts(tmp_path)[0]] == ["a_ct", "b_ct"]
