"""Names of files: everything in a patient's folder or a folder of X-rays is used, a problem, or named as unused."""

import re

import pytest

from xray2ct.data.patient_files import PatientFolder, find_pairs, xray_name
from xray2ct.files import InputError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        plain = re.fullmatch(r".*\.[a-zA-Z]+", name) and not name.endswith(".dcm")
        (folder / name).write_bytes(b"" if plain else bytes(128) + b"DICM")


def read(folder, *names):
    touch(folder, *names)
    found = PatientFolder(folder)
    chosen = (found.volume, found.mask, *found.xrays)
    return [path and str(path.relative_to(folder)) for path in chosen], found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("P_pa.png", ("P", 0, ".png")),
        ("a_b_PA_DRR.TIF", ("a_b", 0, ".tif")),
        ("1.2.840_Lat", ("1.2.840", 1, "")),
        ("1.2.840_lateral.dicom", ("1.2.840", 1, ".dicom")),
        ("frontal.png", (None, 0, ".png")),
        ("P_pa.nii.gz", ("P", 0, ".nii.gz")),
        ("grandpa.png", None),
        ("P.png", None),
        ("P_pa_mask.png", None),
    ],
)
def test_views_are_known_by_name(name, expected):
    assert xray_name(name) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("P.nii.gz", "P_mask.nii.gz", "P_pa_drr.png", "P_lat_drr.png"), None),
        (("P.NII.GZ", "p_PA.PNG", "P_Lat.Bmp"), ["P.NII.GZ", None, "p_PA.PNG", "P_Lat.Bmp"]),
        (("p.mha", "P_pa", "P_lateral.dicom"), ["p.mha", None, "P_pa", "P_lateral.dicom"]),
        (("ct.nii.gz", "ct_mask.nii.gz", "pa.jpg"), ["ct.nii.gz", "ct_mask.nii.gz", "pa.jpg", None]),
        (("P.mhd", "P.zraw", "notes.txt", ".hidden", "Thumbs.db"), ["P.mhd", None, None, None]),
        (("series/IM1", "series/IM2", "P_pa.png"), ["series", None, "P_pa.png", None]),
        (("IM1", "IM2.dcm"), [".", None, None, None]),
    ],
)
def test_the_files_of_a_patient_are_found_whatever_their_case(tmp_path, names, expected):
    shown, found = read(tmp_path / "P", *names)
    assert shown == (expected or list(names))
    assert (found.problems, found.unused) == ([], [])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("P.nii.gz", "P.npy"), r"P: more than one volume: P\.nii\.gz, P\.npy"),
        (("a.nii.gz", "b.nii.gz"), r"more than one volume: a\.nii\.gz, b\.nii\.gz; expected one \(P\.nii\.gz\)"),
        (("P.nii", "P_pa.png", "P_PA.PNG"), "more than one PA X-ray"),
        (("P.nii", "P_lat.png", "P_lateral.dcm"), "more than one lateral X-ray"),
        (("P.nii", "P_pa.gif"), r"P_pa\.gif: no format of X-rays; expected \.png"),
        (("P.nii", "Q_pa.png"), r"Q_pa\.png: is called the PA X-ray of 'Q'; expected P"),
        (("P.nii.gz", "P_MASK.nii.gz"), r"P_MASK\.nii\.gz: would not be read.*expected P_mask\.nii\.gz"),
        (("P.npy", "P_mask.nii.gz"), r"P_mask\.nii\.gz: would not be read"),
        (("P_pa.png", "P_lat.png"), r"P: holds no volume, only P_lat\.png, P_pa\.png; expected P\.nii\.gz"),
        (("P.mnc",), r"holds no volume, only P\.mnc"),
    ],
)
def test_what_cannot_be_used_is_a_problem_that_names_it(tmp_path, names, words):
    _, found = read(tmp_path / "P", *names)
    (problem,) = found.problems
    assert re.search(words, problem)


def test_what_lies_beside_the_expected_files_is_named_as_unused(tmp_path):
    shown, found = read(tmp_path / "P", "P.nii.gz", "seg.nii.gz", "P_pa.png", "old_pa.png", "x.gif", "lung_mask.nii.gz")
    assert shown == ["P.nii.gz", None, "P_pa.png", None]
    assert sorted(p.name for p in found.unused) == ["lung_mask.nii.gz", "old_pa.png", "seg.nii.gz", "x.gif"]
    assert found.problems == []
    assert not PatientFolder(tmp_path / "nowhere").holds_data


def test_pairs_are_found_by_every_name_and_suffix_that_can_be_read(tmp_path):
    names = ("A_pa.PNG", "a_lat.bmp", "1.2.3_pa", "1.2.3_lat.dicom", "deep/er/B/pa.png", "deep/er/B/lateral.tif")
    touch(tmp_path, *names, "C_PA.npy", "A.nii.gz", "notes_pa.txt", "out/A_pa.png")
    others = ("scan.png", "C_lat.gif", "IM0001.dcm", "IM2")
    touch(tmp_path, *others)
    pairs, unused = find_pairs(tmp_path, (tmp_path / "out", None))
    found = {p: tuple(x and str(x.relative_to(tmp_path)) for x in pair) for p, pair in pairs.items()}
    pa_first = {"1.2.3": names[2:4], "A": names[:2], "B": names[4:], "C": ("C_PA.npy", None)}
    assert found == pa_first
    assert sorted(p.name for p in unused) == sorted(others)


def test_a_view_given_twice_is_refused_also_in_another_case(tmp_path):
    touch(tmp_path, "A_pa.png", "sub/a_PA.tif")
    with pytest.raises(InputError, match=r"A_pa\.png and .*a_PA\.tif are the same view of one patient"):
        find_pairs(tmp_path)


def test_only_dicom_content_makes_a_name_without_suffix_an_xray(tmp_path):
    touch(tmp_path, "A_pa")
    (tmp_path / "A_lat").write_text("no picture")
    pairs, unused = find_pairs(tmp_path)
    assert pairs == {"A": (tmp_path / "A_pa", None)}
    assert unused == [tmp_path / "A_lat"]
