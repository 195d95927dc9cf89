"""Weights by name: the same checkpoint again, rounded as stated; unknown, damaged and incomplete ones are refused."""

import json
import re
import shutil

import pytest
import torch

import evaluate
import export_onnx
import reconstruct
import train_refinement_4gpu
from tests.helpers.paths import ROOT
from tests.helpers.runs import build
from tests.helpers.tiny_data import make_checkpoint, make_dataset, make_refinement_checkpoint
from tools import export_weights
from xray2ct.checkpoints import load_checkpoint, weights_fingerprint
from xray2ct.files import InputError, read_csv, sha256
from xray2ct.inference import example
from xray2ct.inference.reconstruction import load_pipeline
from xray2ct.inference.weights_arguments import choose_weights
from xray2ct.training.initial_weights import start_from
from xray2ct.weights import available, both_stages, find, resolve
from xray2ct.weights_file import read_description, read_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data set, checkpoints of both stages, and a folder with both as named weights."""
    folder = tmp_path_factory.mktemp("weights")
    root = make_dataset(folder / "data")
    base = make_checkpoint(folder / "base.pt", root)
    refinement = make_refinement_checkpoint(folder / "refinement.pt", root, base)
    licences = folder / "licences.csv"
    rows = "".join(f"p{i},lidc_idri,LIDC-IDRI-000{i},CC BY 3.0,10.7937/x\n" for i in range(3))
    licences.write_text(f"id,collection,patient,licence,doi\n{rows}")
    for path, name in ((base, "chest64"), (refinement, "chest256")):
        words = [str(path), name, "--licences", str(licences), "--output", str(folder / "named")]
        assert export_weights.main(words) == 0
    return root, base, refinement, folder / "named"


@pytest.fixture
def named(made, monkeypatch):
    """The folder of named weights, found by the commands."""
    monkeypatch.setenv("XRAY2CT_WEIGHTS", str(made[3]))
    return made[3]


def test_a_name_gives_the_checkpoint_with_weights_of_half_precision(made, named):
    stored, found = load_checkpoint(made[1]), resolve("chest64")
    assert found.pop("source") == {"fingerprint": weights_fingerprint(stored["model_state_dict"])}
    weights, rounded = stored.pop("model_state_dict"), found.pop("model_state_dict")
    assert found == {**stored, "hu_window": list(stored["hu_window"])}
    assert rounded.keys() == weights.keys()
    for name, value in weights.items():
        if torch.is_tensor(value):
            assert rounded[name].dtype == torch.float32
            assert torch.equal(rounded[name], value.half().float())
        else:
            assert rounded[name] == value
    assert resolve("chest256", "refinement")["base_fingerprint"] == weights_fingerprint(weights)
    with pytest.raises(InputError, match=r"chest64.safetensors: is a checkpoint of 'enhanced_direct'; expected 'refin"):
        resolve("chest64", "refinement")


def test_a_path_stays_a_path(made, named, tmp_path, monkeypatch):
    assert find(made[1]) == made[1]
    assert find("runs/chest64").as_posix() == "runs/chest64"
    assert find("chest64.pt").as_posix() == "chest64.pt"
    assert find("chest64") == named / "chest64.safetensors"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chest64").write_bytes(b"")
    assert find("chest64").as_posix() == "chest64"
    assert both_stages(["chest64+chest256"]) == both_stages(["chest64", "chest256"]) == ("chest64", "chest256")
    assert both_stages(["a+b/c.pt"]) == ("a+b/c.pt", None)
    with pytest.raises(InputError, match="--weights a b c: expected those of stage 1, or of stage 1 and of stage 2"):
        both_stages(["a+b", "c"])


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(named, tmp_path):
    assert available() == ["chest256", "chest64"]
    with pytest.raises(InputError, match=r"chest46: no such file.*did you mean chest64.*it has chest256, chest64"):
        resolve("chest46")
    with pytest.raises(InputError, match=r"chest64: no such file, and no weights of this name in .* \(it has none\)"):
        resolve("chest64", folder=tmp_path)


def without(path, key):
    data = json.loads(path.read_text())
    del data[key]
    path.write_text(json.dumps(data))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: flip(f / "chest64.safetensors"), "chest64.safetensors: damaged or altered, its SHA-256 is"),
        (lambda f: (f / "chest64.json").unlink(), "chest64.safetensors: chest64.json is not beside it"),
        (lambda f: (f / "chest64.json").write_text("{"), "chest64.json: not valid JSON"),
        (lambda f: without(f / "chest64.json", "sha256"), "chest64.json: sha256 is missing"),
        (lambda f: (f / "LICENSE-CC-BY-4.0").unlink(), "its licence, LICENSE-CC-BY-4.0, is not beside it"),
    ],
)
def test_damaged_or_incomplete_weights_are_refused_in_a_sentence(made, tmp_path, harm, words):
    folder = shutil.copytree(made[3], tmp_path / "named")
    harm(folder)
    with pytest.raises(InputError, match=re.escape(words)):
        read_weights(folder / "chest64.safetensors")


def test_a_file_with_the_right_checksum_that_is_no_safetensors_is_refused(made, tmp_path):
    folder = shutil.copytree(made[3], tmp_path / "named")
    (folder / "chest64.safetensors").write_bytes(b"\xff" * 64)
    data = json.loads((folder / "chest64.json").read_text())
    data["sha256"] = sha256(folder / "chest64.safetensors")
    (folder / "chest64.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"not a readable \.safetensors file"):
        read_weights(folder / "chest64.safetensors")


def test_both_stages_by_name_reconstruct_as_their_checkpoints_do(made, named):
    root, base, refinement, _ = made
    xrays = [root / "p4" / f"p4_{view}_drr.png" for view in ("pa", "lat")]
    by_name, by_path = load_pipeline("chest64+chest256", device="cpu"), load_pipeline(base, refinement, device="cpu")
    assert by_name.system.notes == []  # stage 2 knows the stage 1 that it was trained on, rounded or not
    assert abs(by_name(*xrays)[0].astype(float) - by_path(*xrays)[0]).max() <= 10  # HU of 2,500: half precision
    assert by_name.origin.count("+") == 1


def test_the_example_needs_no_option_and_says_what_it_used(named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reconstruct.main(["--example", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "note: weights chest64, trained on renderings; --weights or --base choose others" in said.err
    assert said.out.splitlines()[-1] == "example_ct.png: the X-rays and the volume"
    assert {path.name for path in tmp_path.iterdir()} == {"example_ct.nii.gz", "example_ct.png"}
    assert sum(path.stat().st_size for path in example.FOLDER.glob("*.png")) <= 600_000
    assert reconstruct.main(["--example", "film", "--device", "cpu"]) == 0
    assert "lidc_0001_film_pa.png: scale estimated from the size of the lungs" in capsys.readouterr().err
    assert {path.name for path in tmp_path.glob("example_film*")} == {"example_film_ct.nii.gz", "example_film_ct.png"}
    with pytest.raises(InputError, match="--example brings its own X-rays; expected it without --folder"):
        reconstruct.main(["--example", "--folder", "here"])


def test_the_example_is_named_from_the_folder_of_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = reconstruct.parse_args(["--example"])
    example.use_example(args)
    assert [path.as_posix() for path in (args.pa, args.lateral)] == [
        "examples/lidc_0001_pa.png",
        "examples/lidc_0001_lat.png",
    ]


def arguments(**given):
    return reconstruct.argparse.Namespace(**{"weights": None, "base": None, "refinement": None, **given})


def test_films_get_the_weights_for_films_where_there_are_some(made, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(made[3], tmp_path / "named")
    monkeypatch.setenv("XRAY2CT_WEIGHTS", str(folder))
    args = arguments()
    choose_weights(args, film=True)
    assert args.base == "chest64"
    assert "trained on renderings and not on films" in capsys.readouterr().err
    for suffix in ("json", "safetensors"):
        shutil.copyfile(folder / f"chest64.{suffix}", folder / f"chest64-film.{suffix}")
    for film, expected in ((True, "chest64-film"), (False, "chest64")):
        args = arguments()
        choose_weights(args, film)
        assert args.base == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weights": ["chest64"], "base": "base.pt"}, "--weights stands for --base and --refinement"),
        ({"refinement": "r.pt"}, "--refinement r.pt: needs the stage 1 that it was trained on"),
        ({}, "--base is missing; expected a checkpoint, or --weights"),
    ],
)
def test_contradicting_or_missing_weights_are_refused(tmp_path, monkeypatch, given, words):
    monkeypatch.setenv("XRAY2CT_WEIGHTS", str(tmp_path))
    with pytest.raises(InputError, match=re.escape(words)):
        choose_weights(arguments(**given))


def test_every_command_takes_names(made, named, tmp_path):
    root = made[0]
    assert evaluate.load_predictor(parsed(evaluate, ["--data", str(root), "--output", "x"])).base == "chest64"
    words = ["--output", str(tmp_path / "x.onnx"), "--weights", "chest64+chest256"]
    args = parsed(export_onnx, words)
    assert (args.base, args.refinement) == ("chest64", "chest256")
    words = ["--data", str(root), "--output", str(tmp_path / "run"), "--dry-run", "--set", "world_size=1"]
    words += ["--set", "patch.size=0", "--set", "loss.perceptual_weight=0"]
    assert train_refinement_4gpu.main([*words, "--base", "chest64"]) == 0


def parsed(command, words):
    args = command.parse_args(words)
    choose_weights(args)
    return args


def test_a_training_begins_with_named_weights(made, named):
    _, task, model = build(made[0])
    assert "Initial weights: chest64 (epoch 3, " in start_from("chest64", model, task)
    expected = resolve("chest64")["model_state_dict"]
    assert all(
        torch.equal(value, expected[name]) for name, value in model.state_dict().items() if torch.is_tensor(value)
    )


def test_weights_of_another_geometry_or_window_are_refused(made, named, tmp_path):
    root = made[0]
    for key, value in (
        ("hu_window", [-1024.0, 1024.0]),
        ("geometry", {**resolve("chest64")["geometry"], "sid_mm": 1500.0}),
    ):
        checkpoint = make_checkpoint(tmp_path / f"{key}.pt", root, **{key: value})
        export_weights.main([str(checkpoint), key.replace("_", "-"), "--output", str(tmp_path)])
        _, task, model = build(root)
        with pytest.raises(InputError, match=f"{key} is not the data's"):
            start_from(tmp_path / f"{key.replace('_', '-')}.safetensors", model, task)


SHIPPED = available(ROOT / "weights")


@pytest.mark.skipif(not SHIPPED, reason="no weights are committed")
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_whole_small_and_never_saw_a_test_patient(name):
    folder = ROOT / "weights"
    found, checkpoint = read_description(folder / f"{name}.safetensors"), resolve(name, folder=folder)
    assert found["name"] == name
    assert found["bytes"] <= 12e6
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 40e6
    assert found["licence"] == "CC-BY-4.0"
    table = {row["id"] for _, row in read_csv(folder / "patients.csv", export_weights.COLUMNS)}
    assert set(checkpoint["train_patients"]) == {row["id"] for row in found["patients"]} <= table
    unseen = {"lidc_0001", *found["split"].get("test", []), *found["split"].get("val", [])}
    assert not unseen & set(checkpoint["train_patients"])
    assert found["fingerprint"] in (folder / f"{name}.md").read_text(encoding="utf-8")
    assert not re.search(r"\"/[a-z]+/", (folder / f"{name}.json").read_text(encoding="utf-8"))  # a machine's folders
