"""pyproject.toml names the packages that the requirement files name, and every module at the root."""

import re

import pytest

from tests.helpers.paths import ROOT
from xray2ct import __version__

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def requirements(name):
    """``name>=version`` of a requirement file, without its comments and the files that it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return {line for line in lines if line and not line.startswith("-r")}


def test_dependencies_and_extras_are_those_of_the_requirement_files():
    assert set(PROJECT["project"]["dependencies"]) == requirements("requirements.txt")
    optional = {r for name in ("xray", "dicom", "onnx", "monitor", "data") for r in EXTRAS[name]}
    assert optional == requirements("requirements-optional.txt")
    assert {r for r in EXTRAS["dev"] if not r.startswith("xray2ct")} == requirements("requirements-dev.txt")


def test_every_module_at_the_root_is_installed():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == modules


def test_weights_and_examples_are_installed_beside_the_package():
    """Where :func:`xray2ct.weights.weights_folder` and ``xray2ct.inference.example`` look for them."""
    setuptools, settings = pytest.importorskip("setuptools"), PROJECT["tool"]["setuptools"]
    found = setuptools.find_namespace_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    for name in ("weights", "examples"):
        assert name in found
        assert settings["package-data"][name] == ["*"]


def test_the_version_is_the_changelogs():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest[1] == __version__
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
