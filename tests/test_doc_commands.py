"""Every command line and Python block of README and docs runs, made small; where one cannot, the reason is written."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers.archive_cases import row, write_index
from tests.helpers.doc_commands import (
    Command,
    assert_parses,
    blocks,
    commands_of,
    main_of,
    programs,
    python_blocks,
    run_script,
)
from tests.helpers.doc_files import Files
from tests.helpers.paths import ROOT
from tests.helpers.tiny_cascade import TINY as TINY_CASCADE
from tests.helpers.tiny_data import TINY_MODEL, TINY_REFINEMENT


def settings(values: dict) -> list[str]:
    """``--set KEY=VALUE`` of each."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]


MODEL = {f"model.{key}": value for key, value in TINY_MODEL.items()}
ONE_STEP = {"training.num_epochs": 1, "training.batch_size": 1, "training.precision": "float32", "world_size": 1}
ONE_STEP |= {"training.warmup_epochs": 0.5, "data.repeats": 1, "data.max_patients": 1, "loss.perceptual_weight": 0}
ONE_STEP |= {"augment.source_size": 32, "augment.elastic_points": 3}
REFINEMENT = {f"model.{key}": value for key, value in TINY_REFINEMENT.items() if key != "guided"}
REFINEMENT |= {"patch.size": 8, "patch.per_volume": 1}
CASCADE = TINY_CASCADE | {"training.num_epochs": 1, "data.repeats": 1, "data.max_patients": 1}

# Options that make a command small: those of every row whose pattern is in the command line are appended to it.
SMALLER = {
    r"^prepare_data\.py .*--input ": ["--size", "64", "--xray-size", "64", "--workers", "1"],
    r"^train_enhanced_4gpu\.py ": settings(MODEL | ONE_STEP),
    r"^tools/baselines\.py unet ": settings(MODEL | ONE_STEP | {"model.transformer_blocks": 0}),
    r"^train_refinement_4gpu\.py ": settings(REFINEMENT | ONE_STEP),
    r"/train_progressive\.py ": [*settings(CASCADE), "--no-tensorboard"],
    r"^hybrid_vit_cascade/inference\.py .*--steps ": ["--steps", "2"],
    r"--samples 8": ["--samples", "2", "--steps", "2"],
    r"/train_progressive\.py .*(quick_2stage|progressive_3stage)": ["--data", "../data"],
    r"^get_data\.py .*--output ": ["--dry-run"],
    r"^tools/make_phantoms\.py ": ["--count", "3", "--spacing-mm", "12"],
    r"^tools/calibrate\.py .*--splits val": ["--splits", "val", "train"],
    r"^tools/film_benchmark\.py ": ["--max-patients", "1", "--case", "clean", "--case", "display"],
    r"^tools/register_patients\.py ": ["--size", "16", "--points", "4"],
    r"^tools/example_xrays\.py ": ["--patient", "p4"],
    r"^evaluate\.py ": ["--pictures", "1"],
    r" --precision bfloat16": ["--precision", "float32"],  # which is faster at this size
}
# What is parsed by the program's own parser and not run, and why.
PARSED = {
    r"^tools/demo\.py": "trains for minutes; tests/tools/test_demo.py runs it",
    r"^test_enhanced\.py ": "trains, saves and loads; tests/test_smoke.py runs it",
    r"^export_onnx\.py --weights ": "takes ten seconds, as the one of docs/onnx.md, which runs",
    r"protocols\.py --example": "tests/evaluation/test_protocols.py runs it",
    r"^tools/ablations\.py ": "trains every lever for each seed; tests/tools/test_ablations.py runs two",
    r"^tools/import_x2ct\.py ": "needs files of X2CT-GAN; tests/tools/test_import_x2ct.py runs it on such files",
    r"^benchmarks/": "measures speed for minutes; tests/test_benchmarks.py runs all parts of the GPU's at tiny sizes",
    r" --with-(scouts|films) .*--workers": "needs DICOM scouts or films; tests/data/test_scouts.py and test_films.py",
    r" --xrays (scout|film) ": "needs a data set with scouts or films; tests/evaluation/test_real_xrays.py",
    r" --wandb ": "needs an account at Weights & Biases; tests/training/test_monitors.py",
}
# Programs that are not this project's, and why they are not started.
OTHERS = {
    r"^python -m venv |^source ": "makes and activates an environment",
    r"^pip install ": "downloads packages",
    r"^(python -m )?pytest( |$)|^bash launch_4gpu\.sh test$": "the tests themselves",
    r"^(ruff|ty) ": "linter and type checker, which continuous integration runs",
    r"^tensorboard |^python -m http\.server ": "a server",
    r"^hf download ": "downloads gigabytes",
    r"^export ": "a variable of torchrun, which is not started",
}
# What makes a Python block small, and the pages whose block does not run here, with the reason.
PYTHON_SMALLER = {"samples=8, steps=25": "samples=2, steps=2"}
PYTHON_ELSEWHERE = {"docs/onnx.md": "is docs/onnx_inference.py (test_readme.py), which the commands above it run"}
COLLECTIONS = ("lidc_idri", "nlst", "covid_19_ny_sbu", "mediastinal_lymph_node_seg", "acrin_nsclc_fdg_pet")
COLLECTIONS += ("nsclc_radiogenomics", "lung_pet_ct_dx", "ldct_and_projection_data")
BLOCKS = blocks()
PYTHON_BLOCKS = python_blocks()
RUN_PYTHON = [block for block in PYTHON_BLOCKS if block.page not in PYTHON_ELSEWHERE]
COMMANDS = [command for block in BLOCKS for command in block.commands]


def line_of(path, arguments) -> str:
    return shlex.join([path, *arguments])


def rows(table: dict, line: str) -> list:
    return [value for pattern, value in table.items() if re.search(pattern, line)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index of the archive in which each collection of the pages has one patient."""
    from xray2ct.data.archive.index import ArchiveIndex

    folder = tmp_path_factory.mktemp("index")
    found = [row(collection_id=name, PatientID=name) for name in COLLECTIONS]
    closed = row(collection_id="nsclc_radiomics", PatientID="LUNG1-001", license_short_name="CC BY-NC 3.0")
    write_index(folder, [*found, closed])
    return ArchiveIndex(folder, "25.0.5")


def run(path: str, arguments: list[str], index, monkeypatch) -> None:
    if path == "docs/onnx_inference.py":
        run_script(path, arguments, monkeypatch)
        return
    given = {"index": index} if path == "get_data.py" else {}
    try:
        status = main_of(path)(arguments, **given)
    except SystemExit as stop:  # --version
        status = stop.code
    assert status in (0, None)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_commands_of_a_block_run_one_after_the_other(block, files, index, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XRAY2CT_WEIGHTS", str(files.copy_weights(tmp_path)))
    for command in block.commands:
        folder = tmp_path / command.folder
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder)
        for path, arguments in programs(command):
            line = line_of(path, arguments)
            if rows(PARSED, line):
                assert_parses(path, arguments, capsys)
                continue
            arguments = [*arguments, *(word for more in rows(SMALLER, line) for word in more)]
            files.provide(arguments, command.folder)
            run(path, arguments, index, monkeypatch)


def check_volume(hu):
    assert hu.ndim == 3
    assert hu.std() > 0


def check_affine(affine):
    assert affine.shape == (4, 4)


def check_film_pair(pair):
    assert pair.pa.pixels.shape == pair.lateral.pixels.shape == pair.pa.seen.shape == (512, 512)
    assert pair.notes


def check_fine(volume):
    """Of the tiny network: four times as many voxels along each axis as its stage 1 has."""
    assert volume.shape == (1, 1, 64, 64, 64)
    assert 0 <= volume.min() < volume.max() <= 1


def check_checkpoint(checkpoint):
    assert checkpoint["model_config"]["volume_size"] == TINY_MODEL["volume_size"]


def check_splits(_):
    """Three patients on three sides, both scans of one of them on the same."""
    for name, scans in (("lidc", "a b"), ("ctrate", "valid_1_a_1 valid_1_b_1")):
        split = json.loads(Path(f"{name}_split.json").read_text())
        assert scans.split() in split.values()
        assert sorted(map(len, split.values())) == [1, 1, 2]


RESULTS = {
    "hu": check_volume,
    "volume_hu": check_volume,
    "std_hu": check_volume,
    "affine": check_affine,
    "fine": check_fine,
    "pair": check_film_pair,
    "checkpoint": check_checkpoint,
    "patient_split": check_splits,
}


@pytest.mark.parametrize("block", RUN_PYTHON, ids=lambda block: f"{block.page}:{block.line}")
def test_python_blocks_run(block, files, tmp_path, monkeypatch):
    monkeypatch.setenv("XRAY2CT_WEIGHTS", str(files.copy_weights(tmp_path)))
    monkeypatch.chdir(tmp_path)
    for word in block.strings:
        files.provide([word], ".")
    names: dict = {}
    exec(compile(block.replaced(PYTHON_SMALLER), f"{block.page}:{block.line}", "exec"), names)
    found = RESULTS.keys() & names
    assert found
    for name in found:
        RESULTS[name](names[name])


def test_every_python_exemption_and_change_is_still_needed():
    assert set(PYTHON_ELSEWHERE) <= {block.page for block in PYTHON_BLOCKS}
    assert [text for text in PYTHON_SMALLER if not any(text in block.code for block in RUN_PYTHON)] == []
    assert [name for name in RESULTS if not any(re.search(rf"\b{name}\b", block.code) for block in RUN_PYTHON)] == []
    assert len(RUN_PYTHON) > 5


def test_every_command_is_this_project_s_or_listed():
    unlisted = [c.text for c in COMMANDS if bool(programs(c)) == bool(rows(OTHERS, c.text))]
    assert unlisted == []
    assert len(COMMANDS) > 100


def test_every_exemption_and_change_is_still_needed():
    lines = [line_of(*program) for command in COMMANDS for program in programs(command)]
    for table, found in ((PARSED, lines), (SMALLER, lines), (OTHERS, [command.text for command in COMMANDS])):
        assert [pattern for pattern in table if not any(re.search(pattern, line) for line in found)] == []


def test_packages_and_folders_that_other_programs_are_given_exist():
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    for command in COMMANDS:
        if command.text.startswith("pip "):
            named = re.findall(r"(?:\.|xray2ct)\[(\w+)\]", command.text)
            assert set(named) <= extras, command.text
            files = [ROOT / command.folder / f for o, f in zip(command.words, command.words[1:]) if o in ("-r", "-c")]
            assert all(file.is_file() for file in files), command.text
        if "pytest" in command.words:
            assert all((ROOT / word).exists() for word in command.words if word.startswith("tests")), command.text


def test_shell_blocks_are_read_as_a_shell_does():
    block = "cd a/b  # there\npython x.py \\\n    --data 'd e'\ncd .. && python -m y && cd ..\nz\n"
    assert commands_of(block) == (
        Command(("python", "x.py", "--data", "d e"), "a/b"),
        Command(("python", "-m", "y"), "a"),
        Command(("z",), "."),
    )


def test_a_wrong_option_or_value_in_a_page_is_found(capsys):
    assert_parses("evaluate.py", ["--data", "data", "--output", "out"], capsys)
    for words in (["--dta", "data"], ["--split", "exam"], ["--pictures", "many"]):
        with pytest.raises(AssertionError):
            assert_parses("evaluate.py", ["--data", "data", "--output", "out", *words], capsys)
