"""A command started by a Python without the packages says so in one line; a library raises ImportError."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from xray2ct import installed

# Every command but launch.py, which runs before anything is installed.
ROOT_COMMANDS = [path.name for path in ROOT.glob("*.py") if "\n    run_cli(" in path.read_text(encoding="utf-8")]
MODULES = [
    f"{folder}.{path.stem}"
    for folder in ("tools", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8") and path.stem != "launch"
]
CASCADE = ["hybrid_vit_cascade/inference.py", "hybrid_vit_cascade/training/train_progressive.py"]


def bare(*words):
    """Run Python without its site-packages."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-S", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", timeout=60)


@pytest.mark.parametrize("words", [[name] for name in (*ROOT_COMMANDS, *CASCADE)] + [["-m", name] for name in MODULES])
def test_a_command_without_packages_says_so_in_one_line(words):
    done = bare(*words, "--help")
    assert done.returncode == 2, done.stderr
    # Whether the launcher has made an environment decides which way is named.
    way = r"(activate the environment that the launcher made: .*|.*pip install -r .*requirements\.txt)"
    assert re.fullmatch(rf"error: this Python lacks torch, numpy, .*{way}\n", done.stderr)


def test_the_commands_are_found():
    assert {"evaluate.py", "reconstruct.py", "train_enhanced_4gpu.py", "get_data.py"} <= set(ROOT_COMMANDS)
    assert {"tools.demo", "benchmarks.gpu"} <= set(MODULES)


def test_a_program_of_somebody_else_gets_an_import_error():
    done = bare("-c", "try:\n import reconstruct\nexcept ImportError as error:\n print(error)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("this Python lacks torch, numpy")


def test_the_packages_are_those_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split(">=")[0] for line in lines} == {*installed.PACKAGES.values(), "torchvision"}
    assert installed.missing_packages() == []
    assert installed.missing_packages(lambda name: None if name == "PIL" else "there") == ["pillow"]


def test_the_launchers_environment_is_named_where_it_is(tmp_path):
    assert "pip install -r" in installed.advice(tmp_path)
    script = tmp_path / (".venv/Scripts" if sys.platform == "win32" else ".venv/bin") / "activate"
    script.parent.mkdir(parents=True)
    Path(script).touch()
    assert str(script) in installed.advice(tmp_path)
