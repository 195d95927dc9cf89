"""One CT per person, whatever the order of the index; licences, names, scouts, films; the real index, if it is here."""

import random

import pytest

from tests.helpers.archive_cases import row, write_index
from tests.helpers.paths import ROOT
from xray2ct.data.archive.catalogue import as_markdown, catalogue
from xray2ct.data.archive.collections import CHEST, folder_name, is_free, is_non_commercial, person, resolve
from xray2ct.data.archive.index import ArchiveIndex
from xray2ct.data.archive.selection import Taken, select
from xray2ct.files import InputError


@pytest.fixture
def index_of(tmp_path):
    def make(*rows):
        write_index(tmp_path, rows)
        return ArchiveIndex(tmp_path, "25.0.5")

    return make


def nlst(patient, **values):
    texts = {"SeriesDescription": "0,OPA,GE,LSQX,STANDARD,340,2.5,120,40,26.7,1.5", "license_short_name": "CC BY 4.0"}
    return row(collection_id="nlst", PatientID=str(patient), StudyInstanceUID=f"1.9.{patient}", **(texts | values))


def test_one_series_per_patient_by_preference_whatever_the_order(index_of):
    sharp = row(SeriesDescription="Thorax  2.0  B70f")
    soft = row(SeriesDescription="Thorax  2.0  B31f", StudyDate="2001-01-01")
    thick = row(SeriesDescription="Thorax  5.0  B31f")
    for rows in ((sharp, soft, thick), (thick, soft, sharp)):
        (found,) = select(index_of(*rows), ["lidc_idri"])
        assert (found.series_uid, found.id, found.kind) == (soft["SeriesInstanceUID"], "LIDC-IDRI-0001", "ct")
        assert (found.files, found.megabytes, found.licence) == (150, 80.0, "CC BY 3.0")


def test_fewer_patients_are_the_first_of_more_and_the_index_order_does_not_matter(index_of):
    rows = [nlst(number) for number in range(100, 140)] + [row(PatientID=f"LIDC-IDRI-00{n}") for n in range(10, 30)]
    few = select(index_of(*rows), ["nlst", "lidc_idri"], patients=15)
    random.Random(1).shuffle(rows)
    more = select(index_of(*rows), ["lidc_idri", "nlst"], patients=30)
    assert [one.id for one in few] == [one.id for one in more[:15]]
    assert {one.collection for one in few} == {"nlst", "lidc_idri"}


def test_a_patient_of_two_collections_comes_once(index_of):
    qin = row(collection_id="qin_lung_ct", PatientID="R0004", instanceCount=90, SeriesDescription=None)
    same = row(collection_id="lungct_diagnosis", PatientID="R_004", instanceCount=91, SeriesDescription=None)
    other = row(collection_id="lungct_diagnosis", PatientID="R_013", SeriesDescription=None)
    index = index_of(qin, same, other)
    found = select(index, ["qin_lung_ct", "lungct_diagnosis"])
    assert {one.id for one in found} == {"lungct_diagnosis_R_004", "lungct_diagnosis_R_013"}
    taken = {person("qin_lung_ct", "R0004"): Taken("qin_lung_ct_R0004", "1.2")}  # an earlier download
    assert [one.id for one in select(index, ["lungct_diagnosis"], taken=taken)] == ["lungct_diagnosis_R_013"]
    assert person("qin_lung_ct", "QIN-LSC-0003") != person("lungct_diagnosis", "R_003")


def test_licences(index_of):
    free, closed = row(), row(collection_id="nsclc_radiomics", license_short_name="CC BY-NC 3.0")
    index = index_of(free, closed)
    with pytest.raises(
        InputError, match=r"nsclc_radiomics: its licence is CC BY-NC 3\.0, which --licence cc-by does not"
    ):
        select(index, ["lidc_idri", "nsclc_radiomics"])
    assert len(select(index, ["lidc_idri", "nsclc_radiomics"], "any")) == 2
    assert [is_free(text) for text in ("CC BY 4.0", "CC0 1.0", "CC BY-NC 4.0", "CC BY-SA 4.0", "")] == [1, 1, 0, 0, 0]
    assert is_non_commercial("CC BY-NC 3.0")
    assert not is_non_commercial("CC BY 3.0")


def test_scouts_of_the_same_session_and_films_of_the_same_patient(index_of):
    def scout(patient, count):
        return nlst(patient, SeriesDescription="0,OPL,GE,LSQX,STANDARD,null,na", instanceCount=count)

    two_visits = [nlst(1), nlst(1) | {"StudyInstanceUID": "1.9.11", "StudyDate": "2001-01-01"}]
    late_scout = scout(1, 2) | {"StudyInstanceUID": "1.9.11"}
    rows = [*two_visits, late_scout, nlst(2), scout(2, 1), nlst(3), scout(3, 1), scout(3, 1)]
    found = select(index_of(*rows), ["nlst"], with_scouts=True)
    assert {one.id for one in found if one.kind == "scout"} == {"nlst_1", "nlst_3"}  # two images or more
    assert found[-1].id == "nlst_2"  # those without come last
    assert {one.study_uid for one in found if one.id == "nlst_1"} == {"1.9.11"}
    assert {one.folder for one in found if one.id == "nlst_3"} == {"nlst_3/ct", "nlst_3/scouts"}
    assert {one.kind for one in select(index_of(*rows), ["nlst"])} == {"ct"}
    first = two_visits[0]["SeriesInstanceUID"]  # without scouts; there already
    found = select(index_of(*rows), ["nlst"], with_scouts=True, taken={person("nlst", "1"): Taken("nlst_1", first)})
    assert [(one.kind, one.series_uid) for one in found if one.id == "nlst_1"] == [("ct", first)]

    def film(**values):
        return row(
            Modality="DX", instanceCount=1, sop_class_name="Digital X-Ray Image Storage - For Presentation", **values
        )

    raw = film() | {"sop_class_name": "Digital X-Ray Image Storage - For Processing"}
    rows = [
        row(),
        row(PatientID="LIDC-IDRI-0002"),
        film(PatientID="LIDC-IDRI-0002"),
        film(BodyPartExamined="KIDNEY"),
        raw,
    ]
    found = select(index_of(*rows), ["lidc_idri"], patients=1, with_films=True)
    assert [(one.id, one.kind) for one in found] == [("LIDC-IDRI-0002", "ct"), ("LIDC-IDRI-0002", "film")]


def test_names_as_people_write_them():
    known = ["lidc_idri", "nlst", "covid_19_ny_sbu"]
    assert resolve(["LIDC-IDRI", "lidc", " NLST "], known) == ["lidc_idri", "nlst"]
    with pytest.raises(InputError, match=r"'ldic' is not in the archive; nearest: lidc"):
        resolve(["ldic"], known)
    assert folder_name("nlst", "100002") == "nlst_100002"
    assert folder_name("acrin_nsclc_fdg_pet", "ACRIN-NSCLC-FDG-PET-005") == "ACRIN-NSCLC-FDG-PET-005"
    assert folder_name("x", "../a") == "x_.._a"


def test_an_address_that_is_no_plain_prefix_is_refused(index_of):
    with pytest.raises(InputError, match="expected s3://"):
        select(index_of(row(series_aws_url="s3://idc-open-data/a' /etc/x\ncp b/*")), ["lidc_idri"])


def test_the_table_counts_patients_and_size(index_of):
    rows = [row(), row(), row(PatientID="LIDC-IDRI-0002", series_size_MB=1020.0)]
    index = index_of(*rows)
    table = as_markdown(catalogue(index))
    assert "| lidc_idri (lidc) | 2 | 1.1 | 0 | 0 | CC BY 3.0 | 10.7937/k9/tcia.2015.lo9ql9sx |" in table
    assert index.citation("10.7937/K9/tcia.2015.lo9ql9sx") == "Armato, S. & others LIDC-IDRI"
    assert index.citation("10.1/unknown") == "https://doi.org/10.1/unknown"


def test_a_damaged_index_is_named(tmp_path):
    (tmp_path / "idc_index.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"idc_index\.parquet: cannot be read"):
        ArchiveIndex(tmp_path)


def test_the_table_in_the_docs_is_that_of_its_index():
    pytest.importorskip("idc_index_data", reason="idc-index is not installed")
    index = ArchiveIndex()
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    if f"`idc-index-data` {index.version}" not in page:
        pytest.skip(f"the table was made from another version than {index.version}")
    rows = as_markdown(catalogue(index, ["lctsc", "covid_19_ar"])).splitlines()
    assert len(rows) == 4
    assert all(row in page for row in rows)
    assert all(f"| {name} " in page for name in CHEST)


def test_the_real_index():
    pytest.importorskip("idc_index_data", reason="idc-index is not installed")
    index = ArchiveIndex()
    lidc = select(index, ["lidc_idri"], patients=200)
    assert len({one.patient for one in lidc}) == len(lidc) == 200
    assert all(80 <= one.files <= 700 and one.licence.startswith("CC BY ") for one in lidc)
    assert sum(one.megabytes for one in lidc) == pytest.approx(200 * 126, rel=0.2)  # 128 GB of 1,018 CTs
    both = select(index, ["qin_lung_ct", "lungct_diagnosis"])
    assert len({one.person for one in both}) == len(both)
