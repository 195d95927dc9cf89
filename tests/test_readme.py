"""The README and the benchmarks' page name only files, options and settings that exist."""

import re
import shlex

import pytest

from tests.helpers.paths import ROOT
from xray2ct.files import InputError
from xray2ct.training.config import EnhancedConfig, RefinementConfig, load_config

NAMES = ("README.md", "benchmarks/README.md", "docs/results.md", "docs/architecture.md", "docs/clusters.md")
PAGES = [ROOT / name for name in NAMES]


# Modules that add options to several commands.
SHARED_OPTIONS = ("training/cli.py", "training/monitors.py", "inference/system.py", "inference/batch.py")


def accepts(kind, setting: str) -> bool:
    """True when ``key=value`` is a setting of this configuration."""
    try:
        load_config(kind, None, [setting])
    except InputError:
        return False
    return True


def commands():
    """``(script, words)`` of every python, torchrun and bash line in the pages' shell blocks."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "-m"] and words[2] not in ("venv", "pip", "pytest"):
                    found.append((f"{words[2].replace('.', '/')}.py", words[3:]))
                scripts = [word for word in words if word.endswith((".py", ".sh"))]
                if scripts:
                    found.append((scripts[0], words[words.index(scripts[0]) + 1 :]))
    return found


@pytest.mark.parametrize(("script", "words"), commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_commands_name_existing_scripts_options_and_settings(script, words):
    path = ROOT / script
    assert path.exists()
    files = [path, *(ROOT / "xray2ct" / name for name in SHARED_OPTIONS)]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, option
    for index, word in enumerate(words):
        if word == "--set":
            kind = RefinementConfig if "refinement" in script else EnhancedConfig
            load_config(kind, None, [words[index + 1]])
        if word == "--config":
            assert (ROOT / words[index + 1]).exists()


def test_pages_have_commands():
    assert len(commands()) > 12


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`([\w/]+\.(?:py|sh|bat))`", text):
        assert (ROOT / name).exists(), name


def test_settings_named_in_the_troubleshooting_exist():
    text = PAGES[0].read_text(encoding="utf-8")
    for setting in re.findall(r"--set ([\w.]+=[\w.\-]+)", text):
        if not setting.endswith("=PATH") and setting != "key=value":
            assert any(accepts(kind, setting) for kind in (EnhancedConfig, RefinementConfig)), setting


def test_the_onnx_script_shown_is_the_one_that_is_tested():
    script = (ROOT / "docs" / "onnx_inference.py").read_text(encoding="utf-8")
    shown = next(
        b for b in re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL) if "onnx" in b
    )
    assert script.endswith(shown)
    assert len([line for line in shown.splitlines() if line.strip()]) <= 25
