"""Films of a data set's patients: the first frontal and lateral of a study, prepared and used as X-rays."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom")

from dataset import PatientDataset
from prepare_data import main
from tests.helpers.ct_cases import save_nifti, thorax
from tests.helpers.xray_cases import write_dicom
from xray2ct.data.films import choose_films
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.find_cts import CtSource, find_cts, xray_folder
from xray2ct.imaging.read_films import read_pair

FILMS = Path(__file__).parents[1] / "imaging" / "films"
NAME = "Mustermann^Erika"


def film(path, view, study="1.2.3", date="20200102", time="120000", **tags):
    """A chest radiograph as a DICOM file of 12 bits; View Position is missing, as it often is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(Image.open(FILMS / f"lidc_0001_{view}.png").convert("L")).astype(np.float64) * 16
    tags = {"StudyInstanceUID": study, "StudyDate": date, "StudyTime": time, "PatientName": NAME, **tags}
    return write_dicom(path, pixels, Modality="DX", **tags)


def choose(*paths):
    return choose_films(sorted(paths), Geometry(), 64)


def test_the_earliest_study_with_both_views_is_read(tmp_path):
    early = film(tmp_path / "e.dcm", "pa", "1.1", "20190101")  # no lateral
    later = [film(tmp_path / f"{view}9.dcm", view, "1.3", "20210101") for view in ("pa", "lat")]
    frontal = film(tmp_path / "z.dcm", "pa", "1.2", AcquisitionDate="20200102", AcquisitionTime="115900")
    again = film(tmp_path / "b.dcm", "pa", "1.2", AcquisitionDate="20200102", AcquisitionTime="121500")
    lateral = film(tmp_path / "a.dcm", "lat", "1.2", AcquisitionDate="20200102", AcquisitionTime="120500")
    damaged = film(tmp_path / "d.dcm", "lat", "1.1", "20190101")
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    pair, records, notes = choose(early, *later, frontal, again, lateral, damaged)
    assert [records[view]["source"] for view in (0, 1)] == ["z.dcm", "a.dcm"]
    expected = read_pair(frontal, lateral, size=64, geometry=Geometry())
    for view in range(2):
        assert np.array_equal(pair.views[view].pixels, expected.views[view].pixels)
    assert any(str(damaged) in note and note.endswith("left out") for note in notes)
    assert "20200102" not in json.dumps(records)
    assert NAME not in json.dumps(records)


def test_without_a_pair_in_one_study_nothing_is_taken(tmp_path):
    """A frontal and a lateral film of different days show different lungs."""
    paths = film(tmp_path / "a.dcm", "pa", "1.1"), film(tmp_path / "b.dcm", "lat", "1.2", "20210101")
    pair, records, notes = choose(*paths)
    assert (pair, records) == (None, {})
    assert notes[-1] == "2 films, but no study with a frontal and a lateral one that can be read"


def test_films_and_scouts_lie_next_to_their_ct(tmp_path):
    assert xray_folder(CtSource("P1", tmp_path / "P1" / "ct", "dicom"), "films") == tmp_path / "P1" / "films"
    save_nifti(tmp_path / "P2.nii.gz", thorax((8, 8, 8)))
    assert xray_folder(CtSource("P2", tmp_path / "P2.nii.gz", "nifti"), "scouts") == tmp_path / "P2_scouts"
    for kind in ("films", "scouts"):
        film(tmp_path / f"P2_{kind}" / "a.dcm", "pa")
    assert [source.patient_id for source in find_cts(tmp_path)] == ["P2"]  # no CT is looked for in them


def prepare(folder, *more):
    small = ("--size", "32", "--xray-size", "64", "--workers", "1", "--with-films")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["--input", str(folder / "cts"), "--output", str(folder / "data"), *small, *more]) == 0
    return text.getvalue()


def test_prepared_films_are_the_xrays_of_an_evaluation(tmp_path):
    for patient in ("P1", "P2"):
        save_nifti(tmp_path / "cts" / f"{patient}.nii.gz", thorax())
    films = tmp_path / "cts" / "P1_films"
    paths = film(films / "b.dcm", "pa"), film(films / "a.dcm", "lat")
    prepare(tmp_path)
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    first, second = manifest["patients"]["P1"], manifest["patients"]["P2"]
    assert {name: record["source"] for name, record in first["films"].items()} == {
        "P1_pa_film.png": "b.dcm",
        "P1_lat_film.png": "a.dcm",
    }
    assert set(first["films"]) < set(first["files"])
    assert (manifest["films"], second["films"]) == (True, {})
    for path in (tmp_path / "data").rglob("*.*"):
        assert path.is_dir() or NAME.encode() not in path.read_bytes(), path
    data = PatientDataset(tmp_path / "data", "all", 32, 64, xrays="film")
    assert (data.ids, data.without_xrays) == (["P1"], ["P2"])
    read = read_pair(*paths, size=64, geometry=Geometry())
    for view in range(2):  # read once: what is prepared has the networks' scale
        assert np.abs(data[0]["xrays"][view].numpy() - read.views[view].pixels).max() < 1e-4
    assert "2 of 2 CTs are done already" in prepare(tmp_path)
    film(films / "a.dcm", "lat", SeriesDescription="another")
    assert "1 of 2 CTs are done already" in prepare(tmp_path)


def test_films_want_a_cone(tmp_path):
    (tmp_path / "cts").mkdir()
    with pytest.raises(InputError, match="--with-films goes with --geometry cone"):
        prepare(tmp_path, "--geometry", "parallel")
