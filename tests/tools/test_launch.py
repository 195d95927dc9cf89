"""The launcher: requirements, .venv, command lines, words and exit statuses; the wrappers' text."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tools import launch
from xray2ct.training.config import EnhancedConfig, RefinementConfig, load_config


def write_requirements(folder: Path, text: str, name: str = "requirements.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("version", "least", "enough"),
    [
        ("2.13.0+cu130", "2.6", True),
        ("2.6.0", "2.6", True),
        ("2.6", "2.6.0", True),
        ("2.5.9", "2.6", False),
        ("10.3", "9.9", True),
        ("1.26.0rc1", "1.26", True),
    ],
)
def test_versions_compare_as_numbers(version, least, enough):
    assert (launch.release(version) >= launch.release(least)) == enough


def test_missing_requirements_are_named_with_what_was_found(tmp_path):
    write_requirements(tmp_path, "numpy>=1.0  # arrays\npytest>=999\n")
    path = write_requirements(tmp_path, "-r requirements.txt\n\nno-such-package-42>=1\n", "requirements-dev.txt")
    found = launch.missing_requirements(path)
    assert len(found) == 2
    assert re.fullmatch(r"pytest>=999 \(found \d.*\)", found[0])
    assert found[1] == "no-such-package-42>=1 (not installed)"


@pytest.mark.parametrize("line", ["numpy @ file:///x", "numpy>=1; python_version > '3'"])
def test_a_line_that_cannot_be_checked_is_an_error(tmp_path, line):
    path = write_requirements(tmp_path, f"{line}\n")
    with pytest.raises(ValueError, match=rf"requirements\.txt.*{line[:5]}"):
        launch.missing_requirements(path)


def test_a_line_for_another_platform_does_not_count(tmp_path):
    lines = "moto[s3,server]>=5\nabsent-1>=1; sys_platform == 'other'\n" + f"pip>=1; sys_platform == '{sys.platform}'\n"
    assert launch.read_requirements(write_requirements(tmp_path, lines)) == [("moto", "5"), ("pip", "1")]


def test_every_file_that_requirements_name_counts(tmp_path):
    for name, text in (("a.txt", "numpy>=1\n"), ("b.txt", "-r a.txt\n"), ("c.txt", "-r b.txt\npytest>=1\n")):
        write_requirements(tmp_path, text, name)
    assert [path.name for path in launch.requirement_files(tmp_path / "c.txt")] == ["a.txt", "b.txt", "c.txt"]
    assert launch.read_requirements(tmp_path / "c.txt") == [("numpy", "1"), ("pytest", "1")]


def test_the_project_s_own_requirements_are_read():
    names = [name for name, _ in launch.read_requirements(ROOT / "requirements-dev.txt")]
    assert {"torch", "torchvision", "numpy", "nibabel", "pytest", "ruff"} <= set(names)


@pytest.fixture
def installer():
    """Stands in for subprocess.call: records the commands, and an environment that is made has an interpreter."""
    calls = []

    def call(command, **_):
        calls.append([str(part) for part in command])
        if "venv" in command:
            python = launch.venv_python(Path(command[-1]))
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return int(call.fails in command)

    call.fails = None
    call.calls = calls
    return call


def test_environment_is_installed_once_and_again_when_the_requirements_change(tmp_path, installer):
    requirements = write_requirements(tmp_path, "numpy>=1\n")
    constraints = write_requirements(tmp_path, "numpy==2\n", "constraints.txt")
    python = launch.make_environment(tmp_path / ".venv", requirements, constraints, installer)
    assert python == launch.venv_python(tmp_path / ".venv")
    assert installer.calls[0][1:] == ["-m", "venv", "--clear", str(tmp_path / ".venv")]
    assert installer.calls[1][1:] == ["-m", "pip", "install", "-r", str(requirements), "-c", str(constraints)]

    installer.calls.clear()
    launch.make_environment(tmp_path / ".venv", requirements, constraints, installer)
    assert installer.calls == []

    constraints.write_text("numpy==3\n")
    launch.make_environment(tmp_path / ".venv", requirements, constraints, installer)
    assert [call[3] for call in installer.calls] == ["--version", "install"]


def test_an_installation_that_failed_is_done_again(tmp_path, installer):
    requirements = write_requirements(tmp_path, "numpy>=1\n")
    constraints = write_requirements(tmp_path, "", "constraints.txt")
    installer.fails = "install"
    with pytest.raises(SystemExit, match="installing"):
        launch.make_environment(tmp_path / ".venv", requirements, constraints, installer)
    installer.fails = None
    installer.calls.clear()
    launch.make_environment(tmp_path / ".venv", requirements, constraints, installer)
    assert [call[3] for call in installer.calls] == ["--version", "install"]


def test_a_half_made_environment_does_not_work(tmp_path):
    assert not launch.works(launch.venv_python(tmp_path))
    assert launch.works(Path(sys.executable))


@pytest.mark.parametrize(("text", "found"), [("pytest>=1\n", sys.executable), ("pytest>=999\n", "other")])
def test_the_running_python_is_used_where_it_satisfies_the_requirements(tmp_path, text, found):
    requirements = write_requirements(tmp_path, text)
    assert launch.find_python(requirements, make=lambda *_: Path("other")) == Path(found)


@pytest.mark.parametrize(("gpus", "processes"), [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (8, 4)])
def test_training_uses_up_to_four_gpus(gpus, processes):
    command = launch.job_command(Path("py"), "stage1", ["--set", "a=1"], lambda python: gpus, windows=False)
    assert command[0] == "py"
    assert command[-3:] == [str(ROOT / "train_enhanced_4gpu.py"), "--set", "a=1"]
    started_by_torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    assert command[1:-3] == (started_by_torchrun if processes else [])


@pytest.mark.parametrize("word", launch.TRAINING)
def test_windows_starts_the_processes_without_torchrun(word):
    command = launch.job_command(Path("py"), word, [], lambda python: 4, windows=True)
    assert command == ["py", str(ROOT / launch.TRAINING[word])]


def test_the_laptop_preset_trains_small_networks_in_one_process():
    commands = [launch.stage_command(Path("py"), word, ["--data", "ROOT"], "laptop") for word in launch.TRAINING]
    assert [command[1] for command in commands] == [str(ROOT / launch.TRAINING[word]) for word in launch.TRAINING]
    first, second = (dict(zip(command[2::2], command[3::2])) for command in commands)
    assert second["--base"] == f"{first['--output']}/best_model.pt"
    assert first["--output"] != second["--output"]
    for options, kind in ((first, EnhancedConfig), (second, RefinementConfig)):
        config = load_config(kind, options["--config"])
        assert options["--data"] == "ROOT"
        assert config.world_size == 1
        assert config.model.xray_size <= 256
        assert config.loss.perceptual_weight == 0  # nothing to download


def test_a_preset_is_taken_from_anywhere_among_the_options_and_an_unknown_one_refused(jobs):
    assert launch.split_preset(["--data", "R", "--preset", "laptop"]) == ("laptop", ["--data", "R"])
    assert launch.split_preset(["--preset=laptop", "--dry-run"]) == ("laptop", ["--dry-run"])
    assert launch.split_preset(["--data", "R"]) == (None, ["--data", "R"])
    for words in (["--preset", "phone"], ["--preset"]):
        with pytest.raises(SystemExit, match=r"--preset .*: expected laptop"):
            launch.split_preset(words)
    command = lambda python, word, o, count_gpus: [python, jobs / f"{word}.py", *o]  # noqa: E731
    assert launch.train_both(Path(sys.executable), ["--data", "ROOT"], command, "laptop") == 0
    lines = (jobs / "calls").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["stage1", "stage2"]
    assert "configs/cpu.json" in lines[0]
    assert "configs/refinement_cpu.json" in lines[1]


def test_the_download_is_announced_with_size_and_time(tmp_path, installer, capsys):
    requirements = write_requirements(tmp_path, "numpy>=1\n")
    launch.make_environment(tmp_path / ".venv", requirements, write_requirements(tmp_path, "", "c.txt"), installer)
    assert re.search(r"once: about [\d.]+ GB to download.*, \d minutes? at 100 Mbit/s", capsys.readouterr().out)
    # 2.8e9 bytes are 2.24e10 bits: 224 seconds
    assert "2.8 GB" in launch.download_estimate("linux")
    assert "4 minutes" in launch.download_estimate("linux")
    assert "1 minute at" in launch.download_estimate("win32")


@pytest.fixture
def jobs(tmp_path):
    """Stand-ins for the two training scripts: each notes its name and options, and ends as its file says."""
    for word in launch.TRAINING:
        script = tmp_path / f"{word}.py"
        script.write_text(
            "import pathlib, sys, time\n"
            f"open({str(tmp_path / 'calls')!r}, 'a').write('{word} ' + ' '.join(sys.argv[1:]) + '\\n')\n"
            f"wait = pathlib.Path({str(tmp_path / (word + '.wait'))!r})\n"
            "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            "while wait.exists(): time.sleep(0.01)\n"
            f"status = pathlib.Path({str(tmp_path / (word + '.status'))!r})\n"
            "sys.exit(int(status.read_text()) if status.exists() else 0)\n"
        )
    return tmp_path


def train_both(jobs, *options):
    return launch.train_both(
        Path(sys.executable), list(options), lambda python, word, o: [python, jobs / f"{word}.py", *o]
    )


def test_both_stages_are_trained_in_sequence_with_the_same_options(jobs):
    assert train_both(jobs, "--data", "ROOT") == 0
    assert (jobs / "calls").read_text() == "stage1 --data ROOT\nstage2 --data ROOT\n"


def test_the_second_stage_waits_for_a_first_one_that_ended_well(jobs):
    (jobs / "stage1.status").write_text("7")
    assert train_both(jobs) == 7
    assert (jobs / "calls").read_text() == "stage1 \n"


@pytest.mark.skipif(launch.WINDOWS, reason="signals are POSIX")
def test_sigterm_is_passed_on_and_ends_the_sequence(jobs):
    (jobs / "stage1.wait").touch()

    def send():
        deadline = time.monotonic() + 30
        while not (jobs / "calls").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # until the job has its handler
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert train_both(jobs) == 143
    sender.join()
    assert (jobs / "calls").read_text() == "stage1 \n"


@pytest.mark.parametrize("option", ["--output", "--config=a.json"])
def test_options_of_one_stage_are_refused_for_both(jobs, option, capsys):
    assert train_both(jobs, option, "x") == 2
    assert option in capsys.readouterr().err
    assert not (jobs / "calls").exists()


@pytest.mark.parametrize(
    ("answer", "driver", "warned"), [("0 -", True, True), ("0 -", False, False), ("2 13.0", True, False)]
)
@pytest.mark.skipif(launch.WINDOWS, reason="scripts of sh")
def test_a_torch_without_cuda_next_to_a_driver_is_reported(tmp_path, monkeypatch, capsys, answer, driver, warned):
    for name, wanted in (("py", True), ("nvidia-smi", driver)):
        if wanted:
            (tmp_path / name).write_text(f"#!/bin/sh\necho {answer}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.gpu_count(tmp_path / "py") == int(answer[0])
    assert ("without CUDA" in capsys.readouterr().err) == warned


def test_every_word_starts_a_file_that_exists():
    for word, script in launch.JOBS.items():
        assert (ROOT / script).is_file(), word
    command = launch.job_command(Path("py"), "demo", ["--seed", "1"])
    assert command == ["py", str(ROOT / "tools" / "demo.py"), "--seed", "1"]
    command = launch.job_command(Path("py"), "test", ["-x"])
    assert command[:3] == ["py", "-m", "pytest"]
    assert command[-1] == "-x"


def start(*arguments, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "launch_4gpu.sh"), *arguments],
        cwd=cwd,
        env={**os.environ, "VIRTUAL_ENV": "active", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


@pytest.mark.skipif(launch.WINDOWS, reason="bash")
class TestShell:
    @pytest.mark.parametrize("script", ["launch_4gpu.sh", ".ci/run"])
    def test_syntax(self, script):
        assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0

    def test_unknown_word_names_the_known_ones(self, tmp_path):
        result = start("demonstrate", cwd=tmp_path)
        assert result.returncode == 2
        assert "'demonstrate'" in result.stderr
        for word in ("demo", "test", "smoke"):
            assert word in result.stderr

    def test_job_runs_from_another_folder_and_its_exit_status_is_the_launcher_s(self, tmp_path):
        (tmp_path / "config.json").write_text('{"modle": {}}')
        result = start("smoke", "--config", "config.json", cwd=tmp_path)
        assert result.returncode == 2
        assert "config.json: unknown key modle" in result.stderr

    def test_a_module_of_the_same_name_in_the_current_folder_is_not_taken(self, tmp_path):
        (tmp_path / "tools.py").write_text("raise SystemExit('another project')")
        result = start("demo", "--patients", "2", cwd=tmp_path)
        assert result.returncode == 2
        assert "--patients is 2" in result.stderr

    def test_an_old_python_is_refused(self, tmp_path):
        (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "python3").chmod(0o755)
        env = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        result = subprocess.run(
            ["bash", str(ROOT / "launch_4gpu.sh"), "demo"],
            env=env,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        assert result.returncode == 2
        assert "3.10" in result.stderr


def test_batch_file_is_the_shell_script_for_windows():
    raw = (ROOT / "launch_4gpu.bat").read_bytes()
    assert raw.count(b"\n") == raw.count(b"\r\n") > 0
    text = raw.decode("ascii")  # a batch file is read in the console's own code page
    assert re.search(r'^%PYTHON% "%~dp0tools\\launch\.py" %\*\r\nexit /b %ERRORLEVEL%\r$', text, re.MULTILINE)
    labels = set(re.findall(r"^:(\w+)", text, re.MULTILINE))
    assert set(re.findall(r"goto (\w+)", text)) == labels
    shell = (ROOT / "launch_4gpu.sh").read_text()
    for name in re.findall(r"[\w/]+\.(?:py|sh)\b", text.replace("%~dp0", "").replace("\\", "/")):
        assert (ROOT / name).is_file(), name
    usage = re.compile(r"^(?:rem|#)   (?:bash )?launch_4gpu\.(?:bat|sh) (\w+) ", re.MULTILINE)
    assert usage.findall(text) == usage.findall(shell) == ["demo", "test", "smoke", "stage1", "stage2"]
