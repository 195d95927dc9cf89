"""The rules on descriptions that scanners and trials really wrote (from the index of the Imaging Data Commons)."""

import pytest

from xray2ct.data.archive.series_rules import is_localizer, preference, read_description, refusal

CT = {
    "collection_id": "lidc_idri",
    "analysis_result_id": None,
    "Modality": "CT",
    "sop_class_name": "CT Image Storage",
    "SeriesDescription": "",
    "StudyDescription": "",
    "BodyPartExamined": "CHEST",
    "StudyDate": "2000-01-01",
    "instanceCount": 150,
    "SeriesInstanceUID": "1.2",
}


@pytest.mark.parametrize(
    ("text", "kernel", "thickness_mm"),
    [
        ("2,OPA,GE,LSPLUS,STANDARD,360,2.5,120,80,0.1,1.5", 0, 2.5),
        ("2,OPA,GE,LSPLUS,LUNG,360,2.5,120,80,0.1,1.5", 2, 2.5),
        ("0,OPA,SE,VZOOM,B30f,380,2,120,60,30,na", 0, 2.0),
        ("0,OPA,SE,VZOOM,B50f,380,2,120,60,30,na", 2, 2.0),
        ("1,OPA,PH,MX8000,C,350,3.2,120,60,30,na", 0, 3.2),
        ("1,OPA,PH,MX8000,D,350,3.2,120,60,30,na", 2, 3.2),
        ("1,OPA,TO,AQUL4,FC10,350,2,120,60,30,na", 0, 2.0),
        ("1,OPA,TO,AQUL4,FC51,350,2,120,60,30,na", 2, 2.0),
        ("ThoraxRoutine  3.0  B31s", 0, 3.0),
        ("Thorax  1.0  B70f", 2, 1.0),
        ("THORAX_W 5.0 B41 Soft Tissue", 0, 5.0),
        ("CHEST 1.25 STD", 0, 1.25),
        ("LUNG HR 1.25 MM", 2, 1.25),
        ("5 MM STANDARD", 0, 5.0),
        ("2.5 MM STND", 0, 2.5),
        ("AXIAL WITHOUT Br36 S3", 0, None),
        ("HIGH RES", 2, None),
        ("P4^P100^S102^I0, Gated, 10.0%", 1, None),
        ("Recon 2: ACRIN LARGE", 1, None),
        ("", 1, None),
    ],
)
def test_kernel_and_thickness_of_a_description(text, kernel, thickness_mm):
    assert read_description(text) == (kernel, thickness_mm)


@pytest.mark.parametrize(
    ("reason", "values"),
    [
        (None, {}),
        (None, {"SeriesDescription": "0,OPA,GE,LSQX,STANDARD,340,2.5,120,40,26.7,1.5", "collection_id": "nlst"}),
        (None, {"SeriesDescription": "Thorax  2.0  B31f", "StudyDescription": "PET^01_PThead_lung (Adult)"}),
        (None, {"BodyPartExamined": "", "StudyDescription": "CT CHEST ABD PELVIS WITH CON"}),
        (None, {"BodyPartExamined": None, "StudyDescription": None, "SeriesDescription": None}),
        ("no original CT", {"sop_class_name": "Secondary Capture Image Storage"}),
        ("no original CT", {"analysis_result_id": "bamf"}),
        ("localizer", {"SeriesDescription": "SCOUT AP/LAT", "instanceCount": 2}),
        ("localizer", {"SeriesDescription": "0,OPL,GE,LSPLUS,STANDARD,null,na,120,0,0,na"}),
        ("number of slices", {"instanceCount": 79}),
        ("number of slices", {"instanceCount": 701}),
        ("not axial", {"SeriesDescription": "CHEST SAGITTAL"}),
        ("not axial", {"SeriesDescription": "Body_Cor_5x5"}),
        ("not axial", {"SeriesDescription": "MPR, MIP CORONAL, Coronal"}),
        ("derived", {"SeriesDescription": "Ave-IP(10) 0%_10%_20%_30%"}),
        ("derived", {"SeriesDescription": "CT FUSION"}),
        ("derived", {"SeriesDescription": "Full dose projections"}),
        ("PET attenuation map or whole body", {"SeriesDescription": "CTAC"}),
        ("PET attenuation map or whole body", {"SeriesDescription": "CT Lung", "StudyDescription": "PETCT INITIAL"}),
        ("not the chest", {"SeriesDescription": "Abdomen  2.0  B30f"}),
        ("not the chest", {"StudyDescription": "CT ABDOMEN WO/W CONT"}),
        ("not the chest", {"SeriesDescription": "A/P 1MM", "StudyDescription": "CT CHEST ABD PELVIS"}),
        ("not the chest", {"collection_id": "eay131", "BodyPartExamined": None}),
        ("slice thickness", {"SeriesDescription": "CHEST ROUTINE  5.0  B60f"}),
        (
            "slice thickness",
            {"SeriesDescription": "0,OPA,SE,SEN16,B30f,340,0.75,120,40,26.7,1.5", "instanceCount": 400},
        ),
        ("length", {"SeriesDescription": "Thorax  1.0  B31f", "instanceCount": 219}),
        ("length", {"SeriesDescription": "Thorax  3.0  B31f", "instanceCount": 334}),
    ],
)
def test_why_a_series_is_not_taken(reason, values):
    assert refusal(CT | values) == reason


def test_the_order_of_preference():
    order = [
        {"SeriesDescription": "B31f", "instanceCount": 200},
        {"SeriesDescription": "B31f", "instanceCount": 150, "SeriesInstanceUID": "1.1"},
        {"SeriesDescription": "B31f", "instanceCount": 150, "SeriesInstanceUID": "1.3"},
        {"SeriesDescription": "B31f", "StudyDate": "2000-01-02", "instanceCount": 300},
        {"SeriesDescription": "B31f", "StudyDescription": "CHEST ABD PEL", "StudyDate": "1999-01-01"},
        {"SeriesDescription": "CHEST"},
        {"SeriesDescription": "B70f"},
        {"SeriesDescription": "PRONE B31f"},
    ]
    rows = [CT | values for values in order]
    rows[1], rows[2] = rows[2], rows[1]
    found = sorted(rows, key=preference)
    assert found == [CT | values for values in order]


def test_words_that_only_look_like_a_localizer():
    assert not is_localizer("NLST TLC VOL B30F")
    assert is_localizer("Topogram  1.0  T20s")
