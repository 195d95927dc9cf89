"""Headers of real films: 55 combinations of DICOM fields of 7,469 films and 25 of 3,209 two-film studies, with counts.

From the public metadata of the Indiana University chest X-ray collection (Demner-Fushman et al., JAMIA 2016), as
torchxrayvision carries it. Each combination is written with the picture that it describes - turned, mirrored, inverted,
through a display table as it says - and must come back upright.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.xray_cases import lut, write_dicom
from xray2ct.files import InputError
from xray2ct.imaging.read_films import read_pair

FILMS = Path(__file__).with_name("films")
FRONTALS, LATERALS = ("PA", "AP"), ("LL", "RL", "LATERAL", "LARGE LATERAL")

# View Position, Patient Orientation, Photometric Interpretation, Presentation LUT Shape, Rescale Type, VOI LUT,
# Bits Stored, pixel spacing in mm (-: none), films, Modality.
HEADERS = r"""
PA L\F MONOCHROME1 - LOG_E_REL yes 12 0.150 2704 CR
- - MONOCHROME2 IDENTITY - - 12 0.143 2503 CR
PA L\F MONOCHROME2 IDENTITY US - 15 0.143 440 CR
LL A\F MONOCHROME2 IDENTITY US - 15 0.143 416 CR
AP L\F MONOCHROME1 - LOG_E_REL yes 12 0.150 167 CR
AP L\F MONOCHROME1 INVERSE P-VALUES - 15 0.170 136 CR
PA - MONOCHROME2 IDENTITY - - 12 0.139 131 CR
PA L\F MONOCHROME1 INVERSE P-VALUES - 15 0.150 111 CR
LL P\F MONOCHROME1 INVERSE P-VALUES - 15 0.150 101 CR
LATERAL - MONOCHROME2 IDENTITY - - 12 0.139 101 CR
AP - MONOCHROME2 - - - 12 0.168 59 CR
- - MONOCHROME1 - US - 10 0.150 58 CR
PA L\F MONOCHROME2 IDENTITY US - 12 0.143 48 CR
LL A\F MONOCHROME2 IDENTITY US - 12 0.143 48 CR
LL - MONOCHROME2 IDENTITY - - 12 0.139 45 CR
PA L\F MONOCHROME1 INVERSE P-VALUES - 15 0.170 38 CR
PA L\F MONOCHROME1 INVERSE P-VALUES yes 15 0.150 26 CR
AP L\F MONOCHROME1 INVERSE P-VALUES yes 15 0.150 20 CR
LL P\F MONOCHROME1 INVERSE P-VALUES yes 15 0.100 20 CR
LL P\F MONOCHROME1 INVERSE P-VALUES - 15 0.170 18 CR
PA L\F MONOCHROME1 INVERSE P-VALUES yes 15 0.100 18 CR
- - MONOCHROME2 - - - 15 0.143 18 CR
LL P\F MONOCHROME1 INVERSE P-VALUES yes 15 0.150 18 CR
RL - MONOCHROME1 - - - 12 0.160 16 CR
LL A\F MONOCHROME2 - - - 15 0.143 15 CR
PA L\F MONOCHROME1 INVERSE P_REL yes 15 0.150 15 CR
PA R\F MONOCHROME1 - US - 12 0.139 14 CR
AP L\F MONOCHROME1 INVERSE P-VALUES yes 15 0.100 14 CR
PA - MONOCHROME1 - - - 12 0.160 14 CR
RL A\F MONOCHROME1 INVERSE P-VALUES - 15 0.170 13 CR
PA L\F MONOCHROME2 IDENTITY US yes 14 0.195 13 DX
LL P\F MONOCHROME2 IDENTITY US yes 14 0.195 13 DX
AP L\F MONOCHROME1 INVERSE P-VALUES - 15 0.114 12 CR
LATERAL A\F MONOCHROME1 - US - 12 0.139 11 CR
PA - MONOCHROME1 - - - 12 0.160 8 CR
LATERAL - MONOCHROME2 - - - 12 0.168 7 CR
PA - MONOCHROME2 - - - 12 0.168 7 CR
LL P\F MONOCHROME1 - LOG_E_REL yes 12 0.150 7 CR
LL - MONOCHROME1 - - - 12 0.160 7 CR
AP L\F MONOCHROME1 INVERSE P-VALUES - 15 0.150 5 CR
AP L\F MONOCHROME2 IDENTITY US - 15 0.143 5 CR
LL P\F MONOCHROME1 INVERSE P-VALUES - 15 0.114 4 CR
PA L\F MONOCHROME2 IDENTITY US - 15 0.143 3 CR
- - MONOCHROME1 - US - 10 0.200 3 CR
PA L\F MONOCHROME2 - - - 15 0.143 2 CR
LARGE_LATERAL - MONOCHROME2 IDENTITY - - 12 0.139 2 CR
AP - MONOCHROME2 IDENTITY - - 12 0.139 2 CR
LL A\F MONOCHROME1 INVERSE P-VALUES yes 15 0.100 2 CR
- - MONOCHROME2 - - - 15 0.143 2 CR
LL A\F MONOCHROME2 IDENTITY US - 15 0.143 2 CR
- - MONOCHROME2 - US - 12 - 2 CR
AP - MONOCHROME1 - - - 12 0.160 2 CR
LL A\F MONOCHROME2 - - - 15 0.143 1 CR
AP - MONOCHROME1 - - - 12 0.160 1 CR
PA L\F MONOCHROME1 INVERSE P-VALUES - 15 0.114 1 CR
"""

# View Position and Patient Orientation of the two films, studies.
STUDIES = r"""
PA L\F PA L\F 1090
- - - - 1057
LL A\F PA L\F 435
LL P\F PA L\F 161
AP L\F PA L\F 123
- - AP L\F 111
LATERAL - PA - 81
- - AP - 47
LL - PA - 34
PA - RL - 12
AP L\F LL A\F 10
LATERAL A\F PA R\F 10
PA L\F RL A\F 9
AP L\F LL P\F 8
AP L\F AP L\F 5
AP L\F LATERAL - 4
LL A\F LL A\F 2
AP - AP - 2
AP - RL - 2
AP L\F RL A\F 1
AP L\F LL - 1
AP - PA - 1
LATERAL - LATERAL - 1
- - RL - 1
LL - LL - 1
"""


def upright(view):
    """The rendered PA or lateral of a CT at 128 x 128, 0 to 1, as the networks know it."""
    name = ("lidc_0001_pa.png", "lidc_0001_lat.png")[view]
    with Image.open(FILMS / name) as picture:
        return np.asarray(picture.resize((128, 128)), dtype=np.float64) / 255


def write_film(path, view, position, orientation, header="MONOCHROME2 - - - 12 - CR", right=False):
    """A film of ``view`` with the fields of one row, laid out as the fields say; right: a lateral that faces right."""
    photometric, shape, rescale, table, bits, spacing, modality = header.split()
    picture, bits = upright(view), int(bits)
    letters = None if orientation == "-" else orientation.split("\\")
    if (letters and letters[0] == "RA"[view]) or (right and view == 1):
        picture = picture[:, ::-1]
    stored = np.rint((0.05 + 0.9 * picture) * (2**bits - 1))
    if photometric == "MONOCHROME1":
        stored = 2**bits - 1 - stored
    tags = {"BitsStored": bits, "HighBit": bits - 1, "Modality": modality}
    tags["ViewPosition"] = None if position == "-" else position.replace("_", " ")
    tags["PatientOrientation"] = letters
    if shape != "-":
        tags["PresentationLUTShape"] = shape
    if rescale != "-":
        tags |= {"RescaleType": rescale.replace("_", " "), "RescaleSlope": "1", "RescaleIntercept": "0"}
    if table == "yes":
        curve = 1 / (1 + np.exp(-8 * (np.arange(2**bits) / 2**bits - 0.5)))
        tags["VOILUTSequence"] = [lut(np.rint(curve * (2**bits - 1)), depth=bits, count=2**bits % 65536)]
    if spacing != "-":
        tags["ImagerPixelSpacing"] = [float(spacing) * 2500 / 128] * 2  # the films had some 2,500 pixels
    return write_dicom(path, stored, photometric, **tags)


def is_right(pair) -> bool:
    """Both views upright, at their places: far from the other view, the mirrored and the inverted picture."""
    for view, xray in enumerate(pair.views):
        wanted = upright(view)
        found = np.corrcoef(xray.pixels.ravel(), wanted.ravel())[0, 1]
        mirrored = np.corrcoef(xray.pixels.ravel(), wanted[:, ::-1].ravel())[0, 1]
        if found < 0.8 or found < mirrored + 0.01:
            return False
    return True


def outcome(folder, films, swapped=False):
    """ "right", "wrong" or "refused" for two films, each (view, position, orientation, header, right), PA first."""
    paths = [write_film(folder / f"{film[0]}.dcm", *film) for film in films]
    try:
        pair = read_pair(*(paths[::-1] if swapped else paths), size=128)
    except InputError:
        return "refused"
    return "right" if is_right(pair) else "wrong"


def test_every_combination_of_headers_is_read_right(tmp_path):
    counts = {"right": 0, "wrong": 0, "refused": 0}
    for number, row in enumerate(HEADERS.split("\n")[1:-1]):
        position, orientation, *fields, films, modality = row.split()
        header = " ".join([*fields, modality])
        views = [0] if position in FRONTALS else [1] if position in LATERALS else [0, 1]
        for view in views:
            other = (1 - view, "-", "-", header, False)
            film = (view, position, orientation, header, orientation == "-" and bool(number % 2))
            result = outcome(tmp_path, sorted([film, other]))
            counts[result] += int(films) / len(views)
            assert result != "wrong", row
    assert sum(counts.values()) == 7469
    assert counts["right"] >= 0.95 * sum(counts.values()), counts


def test_every_combination_of_two_headers_is_read_right(tmp_path):
    """Where both claim to be frontal, or lateral, one of them is the other in truth; in either order of the files."""
    counts = {"right": 0, "wrong": 0, "refused": 0}
    for number, row in enumerate(STUDIES.split("\n")[1:-1]):
        one, one_lies, two, two_lies, studies = row.split()
        first = 1 if one in LATERALS or (two in FRONTALS and one == "-") else 0
        films = [(first, one, one_lies), (1 - first, two, two_lies)]
        films = [
            (*film, "MONOCHROME2 - - - 12 - CR", film[0] == 1 and number % 2 == 1 and film[2] in "-") for film in films
        ]
        for swapped in (False, True):
            result = outcome(tmp_path, sorted(films), swapped)
            counts[result] += int(studies) / 2
            assert result != "wrong", (row, swapped)
    assert counts["right"] >= 0.95 * sum(counts.values()), counts
