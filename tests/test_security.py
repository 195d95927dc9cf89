"""No code runs from a file: what would allow it is in no module, and pickles are refused."""

from __future__ import annotations

import ast
import pickle

import numpy as np
import pytest

from tests.helpers.paths import ROOT
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError
from xray2ct.imaging.cube_files import read_array_cube
from xray2ct.imaging.read_xray import read_xray

MODULES = sorted(p for p in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(p.relative_to(ROOT).parts))


def called(node) -> str:
    """Dotted name of what a call calls, as far as it is written out."""
    parts, target = [], node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    return ".".join([target.id if isinstance(target, ast.Name) else "", *reversed(parts)])


def calls_that_trust_a_file(source: str) -> list[str]:
    """What in a module could run code, or write anywhere, at the word of a file."""
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle", "numpy"):
            found += [
                f"from {node.module} import {a.name}" for a in node.names if a.name in ("load", "loads", "Unpickler")
            ]
        if not isinstance(node, ast.Call):
            continue
        name, options = called(node), {k.arg: k.value for k in node.keywords}
        constants = {k: v.value for k, v in options.items() if isinstance(v, ast.Constant)}
        if name == "torch.load" and constants.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and (
            "allow_pickle" in options and constants.get("allow_pickle") is not False
        ):
            found.append("np.load with allow_pickle")
        if name in (
            "eval",
            "exec",
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "os.system",
            "shutil.unpack_archive",
        ):
            found.append(name)
        if name.split(".")[-1] in ("extract", "extractall") or name in ("tarfile.open", "yaml.load", "joblib.load"):
            found.append(name)
        if constants.get("shell") is True or constants.get("weights_only") is False:
            found.append(f"{name} with shell=True or weights_only=False")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "pickle.load(stream)",
        "archive.extractall(folder)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert calls_that_trust_a_file(source)


def test_no_module_trusts_a_file_and_none_unpacks_archives():
    assert len(MODULES) > 30
    found = {str(p.relative_to(ROOT)): calls_that_trust_a_file(p.read_text(encoding="utf-8")) for p in MODULES}
    # It reads named members of a package whose SHA-512 it knows, and extracts nothing to where the archive says.
    reads_in_memory = {"tools/build_demo.py": ["tarfile.open"]}
    assert {name: calls for name, calls in found.items() if calls} == reads_in_memory


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def crafted(tmp_path, how):
    path, payload = tmp_path / "crafted.npy", np.array([Payload(tmp_path / "ran")], dtype=object)
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload[0], 2))
    elif how == "array":
        np.save(path, payload, allow_pickle=True)
    else:
        with open(path, "wb") as stream:
            np.savez(stream, payload)
    return path


@pytest.mark.parametrize("how", ["pickle", "array", "archive"])
@pytest.mark.parametrize("read", [read_xray, read_array_cube])
def test_a_pickle_in_an_array_is_refused_in_a_sentence(tmp_path, how, read):
    path = crafted(tmp_path, how)
    with pytest.raises(InputError, match=r"crafted\.npy: not a readable \.npy array \(.+\)"):
        read(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["pickle", "array", "archive"])
def test_a_crafted_checkpoint_is_refused_in_a_sentence(tmp_path, how):
    with pytest.raises(InputError, match=r"crafted\.npy: .{20,}"):
        load_checkpoint(crafted(tmp_path, how))
    assert not (tmp_path / "ran").exists()
