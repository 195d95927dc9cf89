"""One parser for all commands: options in hyphens, underscores accepted, every default in --help, --version."""

import ast
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from xray2ct import __version__
from xray2ct.command_line import Parser, with_hyphens

FOLDERS = ("xray2ct", "hybrid_vit_cascade", "tools", "benchmarks")
FILES = sorted([*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))])
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
# launch.py passes its options on to the commands.
COMMANDS = [name for name, text in SOURCES.items() if '__name__ == "__main__"' in text and name != "tools/launch.py"]


def output_of(command: str, option: str, capsys) -> str:
    module = importlib.import_module(command.removesuffix(".py").replace("/", "."))
    with pytest.raises(SystemExit) as stop:
        module.main([option])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_all_commands_are_found():
    assert len(COMMANDS) >= 28
    assert {"reconstruct.py", "tools/demo.py", "hybrid_vit_cascade/inference.py", "benchmarks/gpu.py"} < {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_version_and_its_options(command, capsys):
    assert output_of(command, "--version", capsys) == f"xray2ct {__version__}\n"
    text = output_of(command, "--help", capsys)
    assert "--version" in text
    assert not re.findall(r"--\w+_\w+", text.partition("options:")[2])
    assert not re.findall(r"\w {8,}--\w", text)  # a continued line of an example that became one with the next
    assert str(ROOT) not in text  # defaults are shown from the repository on


def options():
    """``(file, option strings, keywords)`` of every ``add_argument`` in the project."""
    for name, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "add_argument":
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
                yield name, names, {keyword.arg for keyword in node.keywords}


def test_every_option_is_spelled_with_hyphens_and_explained():
    found = list(options())
    assert len(found) > 200
    for name, names, keywords in found:
        assert not [n for n in names if n.startswith("-") and "_" in n], (name, names)
        assert "help" in keywords or "version" in keywords, (name, names)


def test_all_commands_share_the_parser():
    plain = [
        name for name, text in SOURCES.items() if "ArgumentParser(" in text.replace("(argparse.ArgumentParser)", "")
    ]
    assert plain == []


def parser() -> Parser:
    made = Parser("Example.")
    made.add_argument("--max-stages", type=int, default=3, help="how many")
    made.add_argument("--xray-normalization", default="auto", help="of films")
    made.add_argument("--rate", type=float, default=0.5, help="100 %% is all")
    made.add_argument("--rotate", nargs="+", default=[0, 90], help="turns")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting")
    made.add_argument("--cache-dir", help="folder")
    made.add_argument("--config", default=ROOT / "configs" / "cpu.json", help="settings")
    made.add_argument("--size", default=8, help="edge (default: by memory)")
    made.add_argument("--dry-run", action="store_true", help="stop")
    made.add_argument("words", nargs="*", help="anything")
    return made


@pytest.mark.parametrize(
    "words",
    [["--max-stages", "5", "--dry-run"], ["--max_stages", "5", "--dry_run"], ["--max_stages=5", "--dry_run"]],
)
def test_hyphens_and_underscores_are_the_same_option(words):
    args = parser().parse_args(words)
    assert (args.max_stages, args.dry_run) == (5, True)


def test_values_keep_their_underscores():
    words = ["--set", "loss.l1_weight=1", "--xray_normalization=a_b", "my_file", "--", "--not_an_option"]
    assert with_hyphens(words) == [
        "--set",
        "loss.l1_weight=1",
        "--xray-normalization=a_b",
        "my_file",
        "--",
        "--not_an_option",
    ]
    assert parser().parse_args(words).words == ["my_file", "--not_an_option"]


def test_help_shows_every_default_once(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for line in (
        "how many (default 3)",
        "of films (default auto)",
        "100 % is all (default 0.5)",
        "turns (default 0 90)",
        f"settings (default {Path('configs', 'cpu.json')})",
        "edge (default: by memory)",
    ):
        assert line in text
    assert text.count("(default") == 6  # none for a folder, a switch, a list that is empty


def test_what_commands_write_where_the_pages_say_is_not_committed():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    made = ["checkpoints_enhanced/best_model.pt", "checkpoints_refinement/last.pt", "demo_output/reconstruction.png"]
    made += ["hybrid_vit_cascade/checkpoints/quick_2stage/config.json", "evaluation_256/report.html", "curves.png"]
    made += ["film_benchmark/report.json", "phantom_run/curves.png", "ct.nii.gz", "cascade.onnx", "data/dataset.json"]
    made += ["example_ct.png", "example_film_ct.png", "CTS/sources.csv"]
    found = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.splitlines() == made
