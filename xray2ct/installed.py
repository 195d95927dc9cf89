"""Say in one line that a command's Python lacks the packages it needs: commands import this before anything else."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {  # of requirements.txt, by the names that Python imports; torchvision only for the perceptual loss
    "torch": "torch",
    "numpy": "numpy",
    "nibabel": "nibabel",
    "tqdm": "tqdm",
    "PIL": "pillow",
    "scipy": "scipy",
    "safetensors": "safetensors",
}


def missing_packages(find=find_spec) -> list[str]:
    """Packages that this Python does not have, found without importing any. find: as ``importlib.util.find_spec``."""
    return [package for module, package in PACKAGES.items() if find(module) is None]


def advice(root: Path = ROOT) -> str:
    """How to come to a Python that has the packages."""
    folder, script = (".venv/Scripts", "activate") if sys.platform == "win32" else (".venv/bin", "activate")
    if (root / folder / script).exists():
        activate = root / folder / script
        return f"activate the environment that the launcher made: {'' if sys.platform == 'win32' else '. '}{activate}"
    return f"activate the environment that has them, or: {sys.executable} -m pip install -r {root / 'requirements.txt'}"


def runs_our_command() -> bool:
    """Whether the process is one of this repository's commands, not somebody's program or notebook that imports it."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return sys.argv[:1] == ["-m"] or (main is not None and Path(main).resolve().is_relative_to(ROOT))


def require_packages(missing: list[str], is_command: bool) -> None:
    """End a command with one line, exit status 2, where packages are missing; elsewhere raise ``ImportError``."""
    if not missing:
        return
    text = f"this Python lacks {', '.join(missing)}; {advice()}"
    if not is_command:
        raise ImportError(text)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


require_packages(missing_packages(), runs_our_command())
