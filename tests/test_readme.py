"""Every page names only files and settings that exist; its commands are run by test_doc_commands.py."""

import os
import re

import pytest

import reconstruct
from hybrid_vit_cascade.settings import load_cascade_config
from tests.helpers.paths import ROOT
from xray2ct.files import InputError
from xray2ct.training.config import EnhancedConfig, RefinementConfig, load_config

CASCADE = ROOT / "hybrid_vit_cascade"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted(CASCADE.glob("*.md"))]
# Files of the projects whose data and scores docs/datasets.md and docs/protocols.md explain.
OTHERS = {"0_dicom2mhd.py", "3DGAN/lib/utils/metrics_np.py", "3DGAN/test.py", "code/evaluate.py", "ctpro.py"}
OTHERS |= {"fix_metadata.py", "main_test.py", "utils/metrics.py", "validate_eval_setup.py"}


def load_settings(script, settings):
    """Raises :class:`InputError` where the script's configuration has no such setting."""
    if "progressive" in script:
        load_cascade_config(CASCADE / "config" / "quick_2stage.json", settings)
    else:
        load_config(RefinementConfig if "refinement" in script else EnhancedConfig, None, settings)


def accepts(script, setting: str) -> bool:
    try:
        load_settings(script, [setting])
    except InputError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`([\w/]+\.(?:py|sh|bat))`", text):
        assert name in OTHERS or any((folder / name).exists() for folder in (ROOT, page.parent)), name


@pytest.mark.parametrize(
    ("page", "scripts"),
    [(ROOT / "docs" / "training.md", ("enhanced", "refinement")), (CASCADE / "README.md", ("progressive",))],
)
def test_settings_named_in_the_troubleshooting_exist(page, scripts):
    named = re.findall(r"--set ([\w.]+=[\w.\-]+)", page.read_text(encoding="utf-8"))
    assert len(named) > 5
    for setting in named:
        if not setting.endswith("=PATH") and setting != "key=value":
            assert any(accepts(script, setting) for script in scripts), setting


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index + "(README.md)"]


def test_what_the_architecture_page_names_in_a_module_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", text)
    assert len(named) > 6
    for module, name in named:
        assert re.search(rf"\b{name.split('.')[-1]}\b", (ROOT / module).read_text(encoding="utf-8")), (module, name)


def test_the_onnx_script_shown_is_the_one_that_is_tested():
    script = (ROOT / "docs" / "onnx_inference.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert script.endswith(shown)
    assert len([line for line in shown.splitlines() if line.strip()]) <= 25


def test_the_first_reconstruction_prints_what_the_first_page_shows(tmp_path, monkeypatch, capsys):
    """With the shipped weights and X-rays; its numbers to 2 %, which other processors' rounding cannot reach."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"It prints\n\n```\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XRAY2CT_WEIGHTS", raising=False)
    assert reconstruct.main(["--example", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    printed = (said.err + said.out).replace(f"{ROOT}{os.sep}", "")
    number = r"\d+(?:\.\d+)?"
    assert re.sub(number, "N", printed) == re.sub(number, "N", shown)
    values = [[float(value) for value in re.findall(number, lines)] for lines in (printed, shown)]
    assert values[0] == pytest.approx(values[1], rel=0.02)


def test_the_first_page_is_short():
    """One sitting: details belong to the pages that it names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    assert len(text.split()) <= 1300
