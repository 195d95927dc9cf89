"""Two X-ray files to a NIfTI: right place, right values, no silent guess; the notebook snippet."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image

import reconstruct
from dataset import PatientDataset
from model_enhanced import EnhancedDirectModel
from tests.helpers.tiny_data import make_checkpoint
from tests.helpers.xray_cases import write_dicom
from xray2ct.checkpoints import save_checkpoint
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry
from xray2ct.imaging.film import body_width
from xray2ct.imaging.read_films import FilmWarning
from xray2ct.imaging.stored_xray import Exposure
from xray2ct.inference import batch, reconstruction
from xray2ct.models.loading import load_base_model
from xray2ct.models.registry import KIND


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base.pt", root)


def files(root, patient="p4"):
    return root / patient / f"{patient}_pa_drr.png", root / patient / f"{patient}_lat_drr.png"


def command(pa, lateral, base, output, *more):
    return ["--pa", str(pa), "--lateral", str(lateral), "--base", str(base), "--output", str(output), *more]


def test_the_nifti_has_the_models_values_in_the_right_place(root, base, tmp_path, capsys):
    output, picture = tmp_path / "out.nii.gz", tmp_path / "out.png"
    assert reconstruct.main(command(*files(root), base, output, "--picture", str(picture))) == 0
    image = nib.load(output)
    assert image.shape == (16, 16, 16)
    assert image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("L", "P", "I")  # +W left, +H posterior, +D inferior
    assert np.allclose(image.header.get_zooms(), 360 / 16)
    assert np.allclose(image.affine @ [7.5, 7.5, 7.5, 1], [0, 0, 0, 1])
    model, _ = load_base_model(base)
    with torch.no_grad():
        expected = model(PatientDataset(root, "test", 16, 64)[0]["xrays"][None])[0][0, 0]
    hu = np.asarray(image.dataobj).transpose(2, 1, 0)
    assert np.abs(hu - (expected.numpy() * 2500 - 1024)).max() <= 1
    assert Image.open(picture).size[0] > 500
    assert "16 x 16 x 16 voxels of 22.5 mm" in capsys.readouterr().out


def test_pictures_of_other_sizes_and_kinds_are_converted_with_a_note(root, base, tmp_path, capsys):
    pa, lateral = files(root)
    reconstruct.main(command(pa, lateral, base, tmp_path / "plain.nii.gz"))
    arrays = [np.asarray(Image.open(p)) / 65535.0 for p in (pa, lateral)]
    grey = Image.fromarray((arrays[0] * 255).round().astype(np.uint8)).resize((256, 256), Image.Resampling.BILINEAR)
    grey.convert("RGB").save(tmp_path / "colour.png")
    np.save(tmp_path / "lateral.npy", arrays[1].astype(np.float32))
    reconstruct.main(command(tmp_path / "colour.png", tmp_path / "lateral.npy", base, tmp_path / "other.nii.gz"))
    notes = capsys.readouterr().err
    assert "colour.png: converted from colour" in notes
    assert "resized from 256 x 256 to 64 x 64" in notes
    one, other = (np.asarray(nib.load(tmp_path / f"{n}.nii.gz").dataobj, dtype=float) for n in ("plain", "other"))
    assert np.abs(one - other).mean() < 0.15 * one.std()


def test_the_pipeline_takes_files_and_arrays(root, base):
    pipeline = reconstruction.load_pipeline(base, device="cpu")
    pa, lateral = files(root)
    hu, affine = pipeline(pa, lateral)
    arrays = [np.asarray(Image.open(p)) / 65535.0 for p in (pa, lateral)]
    again, _ = pipeline(*arrays)
    assert hu.shape == (16, 16, 16)
    assert affine.shape == (4, 4)
    assert np.abs(hu.astype(int) - again).max() <= 1
    with pytest.raises(InputError, match=r"lateral: array of shape \(64, 48\); expected a square"):
        pipeline(arrays[0], arrays[1][:, 8:-8])
    with pytest.raises(InputError, match=r"pa: array.*in \[0, 1\]"):
        pipeline(arrays[0] * 255, arrays[1])
    with pytest.raises(InputError, match="lateral: the X-ray is constant"):
        pipeline(arrays[0], np.zeros((64, 64)))
    with pytest.raises(InputError, match="the direct system was trained with two views, but got 1"):
        pipeline(arrays[0])


def test_the_views_are_not_interchangeable_and_the_sides_matter(root, base):
    pipeline = reconstruction.load_pipeline(base, device="cpu")
    pa, lateral = (np.asarray(Image.open(p)) / 65535.0 for p in files(root))
    hu = pipeline(pa, lateral)[0].astype(int)
    assert np.abs(pipeline(pa[:, ::-1].copy(), lateral)[0] - hu).mean() > 5
    with pytest.raises(InputError, match="look swapped"):
        pipeline(lateral, pa)
    assert np.abs(pipeline(lateral, pa, check=False)[0] - hu).mean() > 5


def test_pictures_of_unknown_brightness_are_doubted_and_adjusted(root, base, tmp_path):
    pipeline, pairs = reconstruction.load_pipeline(base, device="cpu"), []
    pipeline(*files(root))
    assert pipeline.notes == []
    for gains in ((0.45, 0.3), (0.2, 0.15)):
        pairs.append([tmp_path / f"{gain}{path.name}" for path, gain in zip(files(root), gains)])
        for path, gain, dark in zip(files(root), gains, pairs[-1]):
            Image.fromarray((np.asarray(Image.open(path)) * gain).astype(np.uint16)).save(dark)
    pipeline(*pairs[0], normalization="manifest")
    assert all("brightness" in note and "percentile" in note for note in pipeline.notes)
    assert len(pipeline.notes) == 2
    for normalization, how in (("percentile", "stretched from its 1st"), ("auto", "distribution inside the body")):
        with pytest.warns(FilmWarning, match="scale estimated from the size of the lungs"):
            one, other = (pipeline(*pair, normalization=normalization)[0].astype(int) for pair in pairs)
        assert sum(how in note for note in pipeline.notes) == 2
        assert np.abs(one - other).max() <= 5  # whatever the gain was, it is gone


def test_the_pixel_spacing_of_one_view_alone_is_not_used(root, base, tmp_path):
    """It would bring that view alone to the model's scale."""
    pipeline = reconstruction.load_pipeline(base, device="cpu")
    spacing = 0.8 * pipeline.system.geometry.detector_mm / 64
    pa, lateral = (np.rint(np.asarray(Image.open(path)) / 16).astype(np.uint16) for path in files(root))
    pa = write_dicom(tmp_path / "pa.dcm", pa, ImagerPixelSpacing=[spacing, spacing])
    lateral = write_dicom(tmp_path / "lateral.dcm", lateral)
    whole = pipeline.read(*files(root)).numpy()

    def shares(**options):
        views = pipeline.read(pa, lateral, "manifest", **options).numpy()
        return [body_width(view) / body_width(other) for view, other in zip(views, whole)]

    with pytest.warns(FilmWarning, match=r"lateral\.dcm: its pixel spacing is missing, that of .*pa\.dcm is known"):
        assert shares() == pytest.approx([1, 1], abs=0.02)
    given = Exposure(pixel_spacing_mm=spacing)
    assert shares(exposure=given) == pytest.approx([0.8**2, 0.8**2], abs=0.05)  # air above and below, too
    each = (given, Exposure(pixel_spacing_mm=0.9 / 0.8 * spacing))
    assert shares(exposure=each) == pytest.approx([0.8**2, 0.9**2], abs=0.05)
    assert np.array_equal(
        pipeline.read(pa, whole[1], "manifest")[0],  # an array has the model's scale
        pipeline.read(pa, lateral, "manifest", exposure=given)[0],
    )


def damaged(tmp_path, root, how):
    pa, lateral = files(root)
    path = tmp_path / "bad.png"
    if how == "black":
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    elif how == "truncated":
        path.write_bytes(pa.read_bytes()[:200])
    elif how == "text":
        path.write_text("not a picture")
    elif how == "inverted":
        Image.fromarray(65535 - np.asarray(Image.open(pa))).save(path)
    else:
        return {"swapped": (lateral, pa), "same": (pa, pa), "missing": (tmp_path / "none.png", lateral)}[how]
    return path, lateral


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("black", r"bad\.png: the picture is all black"),
        ("truncated", r"bad\.png: not a readable picture"),
        ("text", r"bad\.png: not a readable picture"),
        ("swapped", "look swapped"),
        ("same", "are the same picture"),
        ("missing", r"none\.png: no such X-ray file"),
    ],
)
def test_unusable_xrays_are_named_and_the_output_is_not_touched(root, base, tmp_path, how, words):
    output, picture = tmp_path / "out.nii.gz", tmp_path / "out.png"
    output.write_bytes(b"precious")
    picture.write_bytes(b"precious too")
    with pytest.raises(InputError, match=words):
        reconstruct.main(command(*damaged(tmp_path, root, how), base, output, "--picture", str(picture)))
    assert output.read_bytes() == b"precious"
    assert picture.read_bytes() == b"precious too"


def test_options_that_cannot_work_are_named(root, base, tmp_path):
    with pytest.raises(InputError, match=r"--output .*out\.jpg: unknown format.*\.nii"):
        reconstruct.main(command(*files(root), base, tmp_path / "out.jpg"))
    with pytest.raises(InputError, match=r"pic\.jpg.*\.png"):
        reconstruct.main(command(*files(root), base, tmp_path / "out.nii", "--picture", "pic.jpg"))
    with pytest.raises(InputError, match=r"p4_pa_drr\.png is one of the X-rays"):
        reconstruct.main(command(*files(root), base, tmp_path / "out.nii", "--picture", str(files(root)[0])))
    with pytest.raises(InputError, match="--skip-existing belongs to --folder"):
        reconstruct.main(command(*files(root), base, tmp_path / "out.nii", "--skip-existing"))
    with pytest.raises(InputError, match=r"none\.pt: no such checkpoint"):
        reconstruct.main(command(*files(root), tmp_path / "none.pt", tmp_path / "out.nii"))


def test_inverted_pictures_work_with_the_option(root, base, tmp_path):
    path, lateral = damaged(tmp_path, root, "inverted")
    other = tmp_path / "lateral.png"
    Image.fromarray(65535 - np.asarray(Image.open(lateral))).save(other)
    pipeline = reconstruction.load_pipeline(base, device="cpu")
    inverted = pipeline(path, other, normalization="manifest", invert=True)[0].astype(int)
    assert np.abs(inverted - pipeline(*files(root))[0]).max() <= 1


def test_the_notebook_snippet_works_verbatim(tmp_path, monkeypatch):
    torch.manual_seed(0)
    trained = EnhancedDirectModel(volume_size=(64, 64, 64), geometry=Geometry("parallel"), xray_size=128)
    (tmp_path / "checkpoints_enhanced").mkdir()
    path = tmp_path / "checkpoints_enhanced" / "best_model.pt"
    save_checkpoint(path, {"kind": KIND, "model_state_dict": trained.state_dict(), "model_config": {}})
    monkeypatch.chdir(tmp_path)

    model = EnhancedDirectModel(volume_size=(64, 64, 64))
    ckpt = torch.load("checkpoints_enhanced/best_model.pt")
    model.load_state_dict(ckpt["model_state_dict"])
    xrays = torch.rand(1, 2, 512, 512)
    with torch.no_grad():
        volume, aux = model.eval()(xrays)
        expected, _ = trained.eval()(xrays)

    assert volume.shape == (1, 1, 64, 64, 64)
    assert set(aux) == {"volume_16", "volume_32"}
    assert model.geometry == Geometry("parallel")
    assert model.xray_size == 128
    assert torch.equal(volume, expected)


# -- a folder of pairs -------------------------------------------------------------------------


def folder_command(folder, base, output, *more):
    return ["--folder", str(folder), "--base", str(base), "--output", str(output), *more]


def test_a_folder_gives_what_its_pairs_give(root, base, tmp_path, capsys):
    """Patient folders (the data set itself) and flat files, in another notation."""
    assert reconstruct.main(folder_command(root, base, tmp_path / "all", "--picture", str(tmp_path / "pictures"))) == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [f"p{i}.nii.gz" for i in range(6)]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6
    assert "6 of 6 volumes written" in capsys.readouterr().out
    reconstruct.main(command(*files(root), base, tmp_path / "alone.nii.gz"))
    flat = tmp_path / "flat"
    flat.mkdir()
    for path, name in zip(files(root), ("case 1_Frontal.PNG", "case 1_Lateral.PNG")):
        (flat / name).write_bytes(path.read_bytes())
    assert reconstruct.main(folder_command(flat, base, tmp_path / "flat_out", "--format", "mha")) == 0
    image = SimpleITK.ReadImage(str(tmp_path / "flat_out" / "case 1.mha"))
    alone = np.asarray(nib.load(tmp_path / "alone.nii.gz").dataobj).transpose(2, 1, 0)
    assert np.array_equal(SimpleITK.GetArrayFromImage(image)[::-1], alone)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "all" / "p4.nii.gz").dataobj).transpose(2, 1, 0), alone)


def test_what_cannot_be_used_in_a_folder_is_named_and_the_rest_done(root, base, tmp_path, capsys):
    folder, output = tmp_path / "xrays", tmp_path / "out"
    folder.mkdir()
    for patient in ("good", "bad", "half"):
        for path, ending in zip(files(root), ("_pa.png", "_lat.png")):
            (folder / f"{patient}{ending}").write_bytes(path.read_bytes())
    (folder / "half_lat.png").unlink()
    (folder / "bad_pa.png").write_text("no picture")
    assert reconstruct.main(folder_command(folder, base, output)) == 1
    printed = capsys.readouterr()
    assert [p.name for p in output.iterdir()] == ["good.nii.gz"]
    assert "1 of 3 volumes written" in printed.out
    assert "half: the lateral X-ray is missing" in printed.err
    assert "bad_pa.png: not a readable picture" in printed.err
    (output / "good.nii.gz").write_bytes(b"precious")
    assert reconstruct.main(folder_command(folder, base, output, "--skip-existing")) == 1
    assert (output / "good.nii.gz").read_bytes() == b"precious"
    assert "1 already there" in capsys.readouterr().out


def copies(folder, root, *patients):
    folder.mkdir()
    for patient in patients:
        for path, ending in zip(files(root), ("_pa.png", "_lat.png")):
            (folder / f"{patient}{ending}").write_bytes(path.read_bytes())
    return folder


def test_pairs_of_every_format_that_is_read_are_used_and_other_pictures_named(root, base, tmp_path, capsys):
    folder, pictures = copies(tmp_path / "xrays", root, "A"), [Image.open(path) for path in files(root)]
    for picture, view in zip(pictures, ("PA", "Lateral")):
        Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).save(folder / f"B_{view}.BMP")
        np.save(folder / f"C_{view}.npy", (np.asarray(picture) / 65535).astype(np.float32))
    pictures[0].convert("L").save(folder / "D_pa.gif")
    pictures[0].save(folder / "scan.png")
    options = ("--output", str(tmp_path / "out"), "--picture", str(folder / "panels"))
    for _ in range(2):  # the second time the panels are there, below the folder
        assert reconstruct.main(["--folder", str(folder), "--base", str(base), *options]) == 1
        printed = capsys.readouterr()
        assert "3 of 3 volumes written" in printed.out
        assert [line.split(":")[1].split("/")[-1] for line in printed.err.splitlines() if "not used" in line] == [
            "D_pa.gif",
            "scan.png",
        ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{p}.nii.gz" for p in "ABC"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("out of memory"),
        ZeroDivisionError(),
        InputError("bad picture"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_goes_wrong_with_one_pair_the_others_are_done(root, base, tmp_path, capsys, monkeypatch, error):
    write = batch.write_volume

    def failing(path, *rest):
        if path.name.startswith("bad"):
            raise error
        write(path, *rest)

    monkeypatch.setattr(batch, "write_volume", failing)
    folder = copies(tmp_path / "xrays", root, "bad", "good")
    assert reconstruct.main(folder_command(folder, base, tmp_path / "out")) == 1
    printed = capsys.readouterr()
    assert "1 of 2 volumes written" in printed.out
    (line,) = (line for line in printed.err.splitlines() if line.startswith("failed: "))
    assert line.startswith("failed: bad: ")
    assert (str(error) or type(error).__name__).rpartition("] ")[2] in line
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.nii.gz"]


def test_ids_with_dots_become_series(root, base, tmp_path):
    folder = copies(tmp_path / "xrays", root, "1.2.840.5")
    assert reconstruct.main(folder_command(folder, base, tmp_path / "out", "--format", "dicom")) == 0
    assert len(list((tmp_path / "out" / "1.2.840.5").iterdir())) == 16


def test_outputs_are_tried_before_anything_is_loaded(root, tmp_path):
    """The checkpoint does not exist: its message would come first."""
    (tmp_path / "file").touch()
    for option, value, words in (
        ("--output", "file/ct.nii.gz", "Not a directory"),
        ("--output", "x" * 250 + ".nii.gz", "File name too long"),
        ("--picture", "file/ct.png", "Not a directory"),
    ):
        arguments = command(*files(root), "none.pt", tmp_path / "ct.nii.gz", option, str(tmp_path / value))
        with pytest.raises(InputError, match=f"{option} .*: cannot be written \\({words}"):
            reconstruct.main(arguments)
    with pytest.raises(InputError, match=r"--output .*volume: cannot be written"):
        reconstruct.main(folder_command(root, "none.pt", tmp_path / "file" / "out"))
    with pytest.raises(InputError, match=r"ct\.nii\.gz: expected a name ending in \.mha for the format mha"):
        reconstruct.main(command(*files(root), "none.pt", tmp_path / "ct.nii.gz", "--format", "mha"))


def test_nan_is_an_error_that_names_the_checkpoint_and_nothing_is_written(root, base, tmp_path, capsys):
    model, _ = load_base_model(base)
    with torch.no_grad():
        list(model.parameters())[-1].fill_(torch.nan)
    damaged = make_checkpoint(tmp_path / "nan.pt", root, model)
    with pytest.raises(InputError, match=r"nan\.pt: the predicted volume holds NaN or infinite.*weights damaged"):
        reconstruct.main(command(*files(root), damaged, tmp_path / "ct.nii.gz", "--picture", str(tmp_path / "ct.png")))
    folder = copies(tmp_path / "xrays", root, "A")
    assert reconstruct.main(folder_command(folder, damaged, tmp_path / "out")) == 1
    assert "failed: A: " in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.pt", "xrays"]


def test_folders_that_cannot_work_are_named(root, base, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--folder .*empty: no X-rays in it; expected files called ID_pa_drr"):
        reconstruct.main(folder_command(tmp_path / "empty", base, tmp_path / "out"))
    with pytest.raises(InputError, match=r"--folder .*nowhere: no such folder"):
        reconstruct.main(folder_command(tmp_path / "nowhere", base, tmp_path / "out"))
    with pytest.raises(InputError, match=r"--output .*file: is a file; expected a folder"):
        reconstruct.main(folder_command(root, base, tmp_path / "file"))
    with pytest.raises(InputError, match="--folder stands for --pa and --lateral"):
        reconstruct.main(folder_command(root, base, tmp_path / "out", "--pa", "pa.png"))
    with pytest.raises(InputError, match="--lateral is missing"):
        reconstruct.main(["--pa", "pa.png", "--base", str(base), "--output", str(tmp_path / "out.nii")])
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a_pa.png", "a_frontal.png"):
        (twice / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"a_frontal\.png and .*a_pa\.png are the same view"):
        reconstruct.main(folder_command(twice, base, tmp_path / "out"))
