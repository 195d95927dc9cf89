"""MetaImage and NRRD headers: geometry is stated once and in mm, or the file is refused; never guessed."""

import numpy as np
import pytest

from tests.helpers.ct_cases import NRRD_FIELDS, rotation
from xray2ct.files import InputError
from xray2ct.imaging.read_ct import read_ct

pytest.importorskip("SimpleITK")
DATA = np.where(np.arange(60) % 2, 40, -1000).astype("<i2")  # 5 x 4 x 3, the first axis fastest
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "1 2 3",
    "ElementSpacing": "2 3 4",
    "AnatomicalOrientation": "RAI",
    "DimSize": "5 4 3",
    "ElementType": "MET_SHORT",
}
AFFINE = [[-2, 0, 0, -1], [0, -3, 0, -2], [0, 0, 4, 3], [0, 0, 0, 1]]


def write_meta(path, **changes):
    fields = {**META, **changes}
    text = "".join(f"{key} = {value}\n" for key, value in fields.items() if value is not None)
    path.write_bytes(text.encode() + b"ElementDataFile = LOCAL\n" + DATA.tobytes())
    return path


def write_nrrd(path, changes=()):
    fields = {**NRRD_FIELDS, **dict(changes)}
    text = "".join(f"{key}: {value}\n" for key, value in fields.items() if value is not None)
    path.write_bytes(b"NRRD0004\n# comment: none\n" + text.encode() + b"key:=space: x\n\n" + DATA.tobytes())
    return path


def test_what_is_stated_is_read(tmp_path):
    for path in (write_meta(tmp_path / "a.mha"), write_nrrd(tmp_path / "a.nrrd")):
        ct = read_ct(path)
        assert np.array_equal(ct.data, DATA.reshape(3, 4, 5).T)
        assert ct.affine == pytest.approx(np.array(AFFINE))
    ras = read_ct(write_nrrd(tmp_path / "b.nrrd", {"space": "RAS", "space units": '"mm" "mm" "mm"'}))
    assert ras.affine == pytest.approx(np.diag([1, 1, 1, 1]) @ np.abs(AFFINE))


META_REFUSED = {
    "states no ElementSpacing": {"ElementSpacing": None},
    "states no TransformMatrix": {"TransformMatrix": None},
    "states no Offset": {"Offset": None},
    "Offset and Origin contradict": {"Origin": "0 0 0"},
    "TransformMatrix and Rotation contradict": {"Rotation": "-1 0 0 0 -1 0 0 0 1"},
    "AnatomicalOrientation is 'LPI', but TransformMatrix says RAI": {"AnatomicalOrientation": "LPI"},
    "AnatomicalOrientation is 'RAI', but TransformMatrix says LPI": {"TransformMatrix": "-1 0 0 0 -1 0 0 0 1"},
    "ElementToIntensityFunctionSlope is not 1": {"ElementToIntensityFunctionSlope": "2"},
    "ElementToIntensityFunctionOffset is not 0": {"ElementToIntensityFunctionOffset": "-1024"},
    "DistanceUnits is 'um'": {"DistanceUnits": "um"},
}


@pytest.mark.parametrize("words", META_REFUSED)
def test_a_metaimage_that_leaves_its_place_open_is_refused(tmp_path, words):
    with pytest.raises(InputError, match=rf"ct\.mha: {words}"):
        read_ct(write_meta(tmp_path / "ct.mha", **META_REFUSED[words]))


@pytest.mark.parametrize("turn", [np.eye(3), rotation(z=180), rotation(80, 5, 95), rotation(44, 44, 44)])
def test_simpleitks_own_anatomical_orientation_is_no_contradiction(tmp_path, turn):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(DATA.reshape(3, 4, 5))
    image.SetDirection(turn.ravel())
    sitk.WriteImage(image, str(tmp_path / "ct.mha"))
    assert read_ct(tmp_path / "ct.mha").affine[:3, :3] == pytest.approx(np.diag([-1, -1, 1]) @ turn, abs=1e-6)


NRRD_REFUSED = {
    "its space is not stated": {"space": None},
    "its space is 'scanner-xyz'": {"space": "scanner-xyz"},
    "its space is 'left-posterior-superior-time'": {"space": "left-posterior-superior-time"},
    "space directions are not three": {"space directions": "(2,0,0) (0,3,0) none"},
    "space directions are not three vectors": {"space directions": "(2,0,0) (0,3,0) (0,0,nan)"},
    "space directions are not three vectors of": {"space directions": None},
    "states no space origin": {"space origin": None},
    "both spacings and space directions": {"spacings": "2 3 4"},
    "space units are 'um um um'": {"space units": '"um" "um" "um"'},
    "units are 'cm cm cm'": {"units": '"cm" "cm" "cm"'},
    "kinds are 'domain domain time'": {"kinds": "domain domain time"},
    "old min is given": {"old min": "-1024"},
}


@pytest.mark.parametrize("words", NRRD_REFUSED)
def test_an_nrrd_that_leaves_its_place_open_is_refused(tmp_path, words):
    with pytest.raises(InputError, match=rf"ct\.nrrd: {words}"):
        read_ct(write_nrrd(tmp_path / "ct.nrrd", NRRD_REFUSED[words]))
