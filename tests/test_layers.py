"""A lower layer never imports a higher one, not even in a function; no circles, no long modules or functions."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

LAYERS = (  # lowest first; docs/architecture.md shows them
    (
        "xray2ct.autocast",
        "xray2ct.command_line",
        "xray2ct.conventions",
        "xray2ct.files",
        "xray2ct.triton_kernels",
        "xray2ct.settings",
        "xray2ct.checkpoints",
        "xray2ct.file_lock",
        "xray2ct.progress",
        "xray2ct.installed",
        "xray2ct.weights",
        "xray2ct.weights_file",
    ),
    ("xray2ct.geometry",),
    ("xray2ct.imaging",),
    ("xray2ct.data",),
    ("losses", "dataset", "xray2ct.metrics", "xray2ct.models", "model_enhanced"),
    ("xray2ct.training",),
    ("xray2ct.inference",),
    ("xray2ct.evaluation",),
    ("hybrid_vit_cascade",),
    ("evaluate", "export_onnx", "get_data", "prepare_data", "reconstruct", "test_enhanced", "train_enhanced_4gpu"),
    ("train_refinement_4gpu", "tools", "benchmarks", "xray2ct.__main__"),
)


def layer(module: str) -> int | None:
    found = [i for i, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    return max(found, default=None)


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it: ``from a import b`` as ``a.b`` where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {m if m in MODULES else node.module for m in (f"{node.module}.{name.name}" for name in node.names)}
    return found & MODULES.keys()


FOLDERS = ("xray2ct", "hybrid_vit_cascade", "tools", "benchmarks")
FILES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_leads_upwards(module):
    ours = layer(module)
    assert ours is not None or module == "xray2ct", f"{module} has no layer"
    found = sorted(imports(MODULES[module]))
    upwards = [f"{module} -> {other}" for other in found if (layer(other) or 0) > (ours or 0)]
    assert not upwards


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_can_be_imported(module):
    importlib.import_module(module)


def test_no_modules_import_in_a_circle():
    TopologicalSorter({module: imports(path) - {module} for module, path in MODULES.items()}).prepare()


MODULE_LINES, FUNCTION_LINES = 450, 60


def longer(path: Path) -> list[str]:
    """The module, and each of its functions and methods, that has too many lines."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    found = [name] if len(text.splitlines()) > MODULE_LINES else []
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return found + [f"{name}: {f.name}" for f in functions if f.end_lineno - f.lineno >= FUNCTION_LINES]


def test_modules_and_functions_can_be_read_in_one_sitting():
    assert not [name for path in MODULES.values() for name in longer(path)]
