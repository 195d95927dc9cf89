"""What ``launch_4gpu.sh`` and ``launch_4gpu.bat`` do: prepare the environment, then start the job.

    launch_4gpu.sh [demo | test | smoke | stage1 | stage2] [options of the job ...]

Without a word it trains both stages in sequence, the second on the first one's best checkpoint. The running
Python is used as it is when it satisfies requirements.txt; otherwise ``.venv`` is made in the repository, once.
Paths among the options are relative to the current folder (``test``: to the repository). Standard library only:
it runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from xray2ct.training.signals import PASSED_ON, exit_status, passed_on

ROOT = Path(__file__).resolve().parent.parent
TRAINING = {"stage1": "train_enhanced_4gpu.py", "stage2": "train_refinement_4gpu.py"}
JOBS = {"demo": "tools/demo.py", "smoke": "test_enhanced.py", **TRAINING}
BOTH = "train"
# --preset laptop: small networks that two CPU cores train in hours, in folders that no other training uses.
PRESETS = {
    "laptop": {
        "stage1": ["--config", str(ROOT / "configs/cpu.json"), "--output", "runs/laptop/stage1"],
        "stage2": [
            *("--config", str(ROOT / "configs/refinement_cpu.json"), "--output", "runs/laptop/stage2"),
            *("--base", "runs/laptop/stage1/best_model.pt"),
        ],
    }
}
MAX_GPUS = 4
WINDOWS = os.name == "nt"
USAGE = """usage: launch_4gpu.sh [demo | test | smoke | stage1 | stage2] [options]   (Windows: launch_4gpu.bat)
  (no word)  train both stages on up to 4 GPUs, or the CPU: --data ROOT and options that both scripts have
             --preset laptop trains the networks of configs/cpu.json and configs/refinement_cpu.json, made for a CPU,
             into runs/laptop; --max-minutes N ends each stage after N minutes
  stage1     train the first stage only: options of train_enhanced_4gpu.py, such as --data ROOT
  stage2     train the second stage only: options of train_refinement_4gpu.py
  demo       phantoms -> data -> training -> scores and pictures: options of tools/demo.py
  test       the tests: options of pytest
  smoke      checks before a long training: options of test_enhanced.py"""


# ------------------------------------------------------------------------------------------------
# Environment


def requirement_files(path: Path) -> list[Path]:
    """The files that the lines ``-r FILE`` of ``path`` name, and those that they name; ``path`` itself last."""
    lines = path.read_text(encoding="utf-8").splitlines()
    named = [path.parent / line[2:].strip() for line in lines if line.startswith("-r")]
    return [*(file for name in named for file in requirement_files(name)), path]


def read_requirements(path: Path) -> list[tuple[str, str]]:
    """``(name, least version)`` of every line ``name>=version``, extras aside, of :func:`requirement_files`.

    Lines for another platform (``; sys_platform == 'linux'``) are left out.
    """
    found = []
    for file in requirement_files(path):
        for line in file.read_text(encoding="utf-8").splitlines():
            line = line.partition("#")[0].strip()
            line, _, condition = map(str.strip, line.partition(";"))
            elsewhere = re.fullmatch(r"sys_platform == '(\w+)'", condition)
            if not line or line.startswith("-r") or (elsewhere and elsewhere[1] != sys.platform):
                continue
            match = re.fullmatch(r"([\w.-]+)(?:\[[\w,.-]+\])?\s*>=\s*([\d.]+)", line)
            if match is None or (condition and not elsewhere):
                raise ValueError(f"{file}: {line!r}; expected name>=version")
            found.append((match[1], match[2]))
    return found


def release(version: str) -> tuple[int, ...]:
    """Comparable numbers of a version: ``2.13.0+cu130`` -> (2, 13), without trailing zeros."""
    numbers = [int(n) for n in re.split(r"[^\d.]", version)[0].strip(".").split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def missing_requirements(path: Path) -> list[str]:
    """Requirements that the running Python does not satisfy, as ``name>=version (found ...)``."""
    missing = []
    for name, least in read_requirements(path):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name}>={least} (not installed)")
            continue
        if release(version) < release(least):
            missing.append(f"{name}>={least} (found {version})")
    return missing


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if WINDOWS else "bin/python")


def works(python: Path, call=subprocess.call) -> bool:
    """True when ``python`` runs and has pip: not so where making the environment was interrupted."""
    if not python.exists():
        return False
    return call([str(python), "-m", "pip", "--version"], stdout=subprocess.DEVNULL) == 0


def download_estimate(platform: str = sys.platform) -> str:
    """Size and time of what ``requirements.txt`` downloads: the wheels of the versions in constraints.txt, added up."""
    if platform == "linux":
        size, note = 2.8, " with torch's CUDA libraries (0.3 GB without: docs/training.md)"
    else:
        size, note = 0.3, ""
    minutes = math.ceil(size * 8e3 / 100 / 60)
    return f"about {size:g} GB to download{note}, {minutes} minute{'s' * (minutes > 1)} at 100 Mbit/s"


def make_environment(venv: Path, requirements: Path, constraints: Path, call=subprocess.call) -> Path:
    """Make or complete ``venv`` and return its interpreter; instant when it is up to date.

    A copy of the requirements is left inside when everything is installed: an interrupted or outdated
    installation lacks it or has another one, and is done again. Exits on failure.
    """
    python = venv_python(venv)
    sources = [*requirement_files(requirements), constraints]
    wanted = "".join(path.read_text(encoding="utf-8") for path in sources)
    stamp = venv / f"installed-{requirements.name}"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted and python.exists():
        return python
    print(f"Installing {requirements.name} into {venv}, once: {download_estimate()}", flush=True)
    if not works(python, call) and call([sys.executable, "-m", "venv", "--clear", str(venv)]):
        sys.exit(f"error: {venv} could not be made (on Debian and Ubuntu: apt install python3-venv)")
    install = [str(python), "-m", "pip", "install", "-r", str(requirements), "-c", str(constraints)]
    if call(install):
        sys.exit(f"error: installing {requirements} failed; the same command tries again")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def find_python(requirements: Path, make=make_environment) -> Path:
    """The running Python where it satisfies ``requirements``, otherwise that of ``.venv``."""
    missing = missing_requirements(requirements)
    if not missing:
        return Path(sys.executable)
    print(f"{sys.executable} lacks {', '.join(missing)}: using .venv", flush=True)
    return make(ROOT / ".venv", requirements, ROOT / "constraints.txt")


# ------------------------------------------------------------------------------------------------
# Jobs


def gpu_count(python: Path) -> int:
    """GPUs that torch can use; warns when there is a driver but torch was built without CUDA."""
    code = "import torch; print(torch.cuda.device_count(), torch.version.cuda or torch.version.hip or '-')"
    count, cuda = subprocess.check_output([str(python), "-c", code], encoding="utf-8").split()
    if cuda == "-" and shutil.which("nvidia-smi"):
        print(
            f"warning: this machine has an NVIDIA driver, but torch of {python} is a build without CUDA."
            " To use the GPU, install the build that https://pytorch.org/get-started names, with that Python",
            file=sys.stderr,
        )
    return int(count)


def job_command(python: Path, word: str, options: list[str], count_gpus=gpu_count, windows=WINDOWS) -> list[str]:
    """Command line of a job. Training uses torchrun for several GPUs, except on Windows.

    Windows builds of torch lack libuv, which torchrun needs; the script starts the processes itself there.
    """
    if word == "test":
        return [str(python), "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal", *options]
    command = [str(python)]
    if word in TRAINING:
        gpus = min(MAX_GPUS, count_gpus(python))
        processes = 2 if gpus == 3 else gpus  # the default global batch is a multiple of 1, 2 and 4 processes
        if gpus == 3:
            print("note: 2 of 3 GPUs are used; for all: torchrun --nproc_per_node 3 ... --set world_size=3", flush=True)
        if processes >= 2 and not windows:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*command, str(ROOT / JOBS[word]), *options]


def split_preset(options: list[str]) -> tuple[str | None, list[str]]:
    """The name given to ``--preset`` and the other options; exits with a message for a name that is not known."""
    names, others, words = [], [], iter(options)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--preset":
            names.append(value if equals else next(words, ""))
        else:
            others.append(word)
    for name in names:
        if name not in PRESETS:
            sys.exit(f"error: --preset {name or '(nothing)'}: expected {', '.join(PRESETS)}")
    return (names[-1] if names else None), others


def stage_command(python: Path, word: str, options: list[str], preset: str | None, command=job_command) -> list[str]:
    """Command line of a stage, with a preset's options before those that were given, which hold then."""
    if preset is None:
        return command(python, word, options)
    return command(python, word, [*PRESETS[preset][word], *options], count_gpus=lambda _: 1)  # its batch is of one


def train_both(python: Path, options: list[str], command=job_command, preset: str | None = None) -> int:
    """Both stages, one after the other; a stage that is finished ends at once, one that was stopped resumes.

    Runs as the parent of the two jobs: signals to this process are passed on. The first stage that does not end
    with 0 ends the sequence with its exit status.
    """
    own = [option for option in options if option.split("=")[0] in ("--output", "--config")]
    if own:
        print(f"error: {own[0]} is one stage's own: train them by 'stage1' and 'stage2'\n{USAGE}", file=sys.stderr)
        return 2
    for word in TRAINING:
        print(f"[{word}] {JOBS[word]}", flush=True)
        status = run_child(stage_command(python, word, options, preset, command))
        if status:
            return status
    return 0


def run_child(command: list[str]) -> int:
    """Run a job to its end; SIGTERM and SIGINT are passed on, so that it saves before it ends.

    The job gets a session of its own, so that a signal to this process's group reaches it once: torchrun takes a second
    one for an order to leave its workers before they have saved. Returns its exit status, after a signal as
    :func:`signals.exit_status` has it.
    """
    jobs: list[subprocess.Popen] = []

    def send(number):
        for job in jobs:
            job.send_signal(number)

    with passed_on(send) as received:
        jobs.append(subprocess.Popen(command, start_new_session=not WINDOWS))
        for number in set(received) & set(PASSED_ON):  # while it was being started
            send(number)
        return exit_status(jobs[0].wait(), received)


def run(command: list[str]) -> int:
    """Run the job in place of this process, so that signals reach it and its exit status is ours."""
    sys.stdout.flush()
    if WINDOWS:
        return subprocess.call(command)
    os.execv(command[0], command)


def main(argv: list[str]) -> int:
    word, options = BOTH, argv
    if argv and not argv[0].startswith("-"):
        word, options = argv[0], argv[1:]
    if word not in (*JOBS, BOTH, "test"):
        print(f"error: unknown word {word!r}\n{USAGE}", file=sys.stderr)
        return 2
    if options[:1] in (["-h"], ["--help"]) and word == BOTH:
        print(USAGE)
        return 0
    preset, options = split_preset(options) if word in (BOTH, *TRAINING) else (None, options)
    python = find_python(ROOT / ("requirements-dev.txt" if word == "test" else "requirements.txt"))
    if word == "test":
        os.chdir(ROOT)
    if word == BOTH:
        return train_both(python, options, preset=preset)
    return run(stage_command(python, word, options, preset))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
