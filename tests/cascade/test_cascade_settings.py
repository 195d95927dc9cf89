"""Settings of the cascade: the committed files, every check, what the trainer gets of them; imports and paths."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest

from hybrid_vit_cascade import PACKAGE
from hybrid_vit_cascade.settings import (
    CascadeConfig,
    CascadeTraining,
    StageConfig,
    find_data,
    former_spellings,
    load_cascade_config,
    prediction_of,
    stage_run,
)
from hybrid_vit_cascade.training.task import outline
from xray2ct.files import InputError
from xray2ct.training.config import config_dict

ROOT = PACKAGE.parent
CONFIGS = sorted((PACKAGE / "config").glob("*.json"))


def write(folder, **changes):
    stages = [
        {"name": "a", "volume_size": 16, "voxel_dim": 32, "vit_depth": 1, "num_heads": 2},
        {"name": "b", "volume_size": [32, 32, 32], "voxel_dim": 32, "vit_depth": 1, "num_heads": 2, "num_epochs": 7},
    ]
    path = folder / "cascade.json"
    path.write_text(json.dumps({"stages": stages, "xray_img_size": 64, **changes}))
    return path


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_committed_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_cascade_config(path)
    again = tmp_path / "again.json"
    again.write_text(json.dumps(config_dict(config)))
    assert config_dict(load_cascade_config(again)) == config_dict(config)


def described(name):
    """(name, size, dim, depth, heads) of each stage, batch, epochs, learning rate."""
    config = load_cascade_config(PACKAGE / "config" / name)
    stages = [(s.name, s.volume_size, s.voxel_dim, s.vit_depth, s.num_heads) for s in config.stages]
    training = config.training
    return stages, (training.batch_size, training.num_epochs, training.learning_rate), config


def test_the_two_systems_users_start_are_what_they_are_called():
    stages, training, config = described("quick_2stage.json")
    assert stages == [("stage1_base", 64, 384, 6, 6), ("stage2_refine", 128, 512, 8, 8)]
    assert training == (8, 100, 2e-4)
    assert (config.xray_img_size, config.num_views, config.num_timesteps) == (512, 2, 1000)
    stages, training, config = described("progressive_3stage.json")
    assert [s[0] for s in stages] == ["stage1_low", "stage2_mid", "stage3_high"]
    assert [s[1:] for s in stages] == [(64, 256, 4, 4), (128, 384, 6, 6), (256, 512, 8, 8)]
    assert training == (4, 50, 1e-4)
    assert prediction_of(config) == "v"


def test_single_settings_of_stages_can_be_overridden(tmp_path):
    path = write(tmp_path)
    config = load_cascade_config(path, ["stage2.physics_weight=0.5", "stage1.num_epochs=3", "num_views=1"])
    assert [s.physics_weight for s in config.stages] == [StageConfig().physics_weight, 0.5]
    assert [s.num_epochs for s in config.stages] == [3, 7]
    assert [s.volume_size for s in config.stages] == [16, 32]  # cubes written either way
    assert config.num_views == 1
    assert load_cascade_config(path).stages[0].num_epochs is None


def test_the_former_spelling_counts_from_0_as_before_and_is_noted(tmp_path):
    """``stages.1`` was the second stage and still is: no old command trains something else now."""
    config = load_cascade_config(write(tmp_path), ["stages.1.num_epochs=20"])
    assert [s.num_epochs for s in config.stages] == [None, 20]
    assert former_spellings(["stages.1.num_epochs=20", "stage1.num_epochs=3", "num_views=1"]) == [
        "note: --set stages.1.num_epochs is read as stage2.num_epochs: options count stages from 1,"
        " write stage2.num_epochs"
    ]


# -- checks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage2.volume_size=64", ["stage2.volume_size is 64, after 16", "expected 32"]),
        ("stage2.volume_size=16", ["stage2.volume_size", "doubles"]),
        ("stage1.volume_size=[16,16,32]", ["stage1.volume_size", "three equal sizes"]),
        ("stage1.volume_size=8", ["stage1.volume_size is 8", "at least 16"]),
        ("stage1.volume_size=big", ["stage1.volume_size", "'big'", "int"]),
        ("stage1.num_heads=3", ["stage1.num_heads is 3", "does not divide voxel_dim 32"]),
        ("stage1.num_heads=0", ["stage1.num_heads", "at least 1"]),
        ("stage1.name=../x", ["stage1.name", "'../x'"]),
        ("stage1.name=", ["stage1.name is ''"]),
        ("stage2.name=a", ["two stages are called 'a'"]),
        ("stage2.nmae=a", ["unknown key stage2.nmae", "did you mean stage2.name"]),
        ("stage3.name=c", ["stage3 does not exist", "stage1 to stage2"]),
        ("stage0.name=c", ["stage0 does not exist", "stage1 to stage2"]),
        ("stage01.name=c", ["stage01 does not exist"]),
        ("stages.2.name=c", ["stages.2 does not exist", "0 to 1"]),
        ("stage1=5", ["stage1 is 5", "object"]),
        ("stages=5", ["stages is 5", "list of objects"]),
        ("stages=[]", ["stages is empty"]),
        ("stage1.noise_shift=0", ["stage1.noise_shift", "above 0"]),
        ("stage1.learning_rate=-1", ["stage1.learning_rate"]),
        ("xray_channels=3", ["xray_channels is 3", "expected 1"]),
        ("num_views=3", ["num_views is 3", "expected 1 to 2"]),
        ("xray_img_size=100", ["xray_img_size is 100", "multiple of 32"]),
        ("num_timesteps=1", ["num_timesteps is 1", "at least 2"]),
        ("prediction=w", ["prediction is 'w'", "v, noise, x0"]),
        ("v_parameterization=1", ["v_parameterization", "bool"]),
        ("training.batch_size=0", ["training.batch_size", "at least 1"]),
        ("training.terminal_fraction=1.5", ["training.terminal_fraction", "0.0 to 1.0"]),
        ("training.precision=half", ["training.precision", "bfloat16"]),
        ("conditioning.steps=2000", ["conditioning.steps", "num_timesteps"]),
        ("conditioning.noise=2", ["conditioning.noise"]),
        ("training.lr=1", ["unknown key training.lr"]),
    ],
)
def test_bad_settings_name_key_and_value(tmp_path, override, words):
    with pytest.raises(InputError) as error:
        load_cascade_config(write(tmp_path), [override])
    for word in words:
        assert word in str(error.value)


def test_float32_and_another_precision_contradict_each_other(tmp_path):
    path = write(tmp_path, training={"mixed_precision": False, "precision": "bfloat16"})
    with pytest.raises(InputError, match=r"cascade\.json: training\.mixed_precision is false.*'bfloat16'"):
        load_cascade_config(path)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: no such file"):
        load_cascade_config(tmp_path / "nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"stages": [')
    with pytest.raises(InputError, match=r"broken\.json: not valid JSON"):
        load_cascade_config(broken)


# -- one stage for the trainer ----------------------------------------------------------------------


def test_a_stage_runs_with_its_own_settings_or_else_the_common_ones(tmp_path):
    training = {"num_epochs": 4, "batch_size": 3, "learning_rate": 1e-3, "gradient_clip": 0.5, "num_workers": 2}
    config = load_cascade_config(write(tmp_path, training=training, v_parameterization=False))
    first, second = (stage_run(config, i, world_size=2) for i in range(2))
    assert (first.training.num_epochs, second.training.num_epochs) == (4, 7)
    assert (first.training.batch_size, first.training.learning_rate) == (3, 1e-3)
    assert (first.training.grad_clip_max_norm, first.data.num_workers) == (0.5, 2)
    assert first.training.precision == "auto"
    assert first.prediction == "noise"
    assert first.world_size == 2
    # log SNR shifts by -3 log(size / 64): 16^3 and 32^3 are less noisy than 64^3.
    assert (first.shift, second.shift) == pytest.approx((8.0, 2 * 2**0.5))


def test_settings_reach_the_trainer(tmp_path):
    """Every key of training that the trainer has too arrives there."""
    values = {"weight_decay": 0.5, "warmup_epochs": 1.0, "min_learning_rate_ratio": 0.5, "ema_decay": 0.5, "seed": 5}
    values |= {"channels_last": False, "compile": True, "terminal_fraction": 0.5, "min_snr_gamma": 3.0}
    values |= {"gradient_accumulation_steps": 3, "mixed_precision": False}
    config = load_cascade_config(write(tmp_path, training=values, prediction="x0", world_size=3))
    run = stage_run(config, 0, world_size=1)
    for key in set(values) - {"mixed_precision"}:
        assert getattr(run.training, key) == values[key]
    assert run.training.precision == "float32"
    assert (run.prediction, run.world_size) == ("x0", 3)
    mapped = {"num_workers", "gradient_clip", "mixed_precision"}
    assert {f.name for f in fields(CascadeTraining)} - mapped <= {f.name for f in fields(type(run.training))}


def test_other_stages_settings_are_not_in_a_stage_s_run(tmp_path):
    path = write(tmp_path)
    one = stage_run(load_cascade_config(path), 0, 1)
    other = stage_run(load_cascade_config(path, ["stage2.vit_depth=9", "stage2.num_epochs=1"]), 0, 1)
    assert config_dict(one) == config_dict(other)


# -- data and imports ------------------------------------------------------------------------------


def test_the_default_data_folder_is_found_from_the_cascade_s_folder_and_from_elsewhere(tmp_path, monkeypatch):
    assert CascadeConfig().data.dataset_path == "../data"
    (tmp_path / "data").mkdir()
    (tmp_path / "cascade").mkdir()
    monkeypatch.chdir(tmp_path / "cascade")
    assert find_data("../data").samefile(tmp_path / "data")
    # Not relative to the current folder, but to the cascade's.
    assert find_data("../benchmarks").samefile(ROOT / "benchmarks")
    with pytest.raises(InputError, match=r"\.\./nothing: no such data set \(looked at .*nothing and .*nothing\)"):
        find_data("../nothing")


SCRIPTS = ("training/train_progressive.py", "inference.py")


def test_the_training_starts_by_path_from_its_folder():
    """As inference.py does in test_cascade_inference; both run as modules from the root where they are tested."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    words = [sys.executable, SCRIPTS[0], "--help"]
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 120}
    done = subprocess.run(words, cwd=PACKAGE, env=environment, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert "--checkpoint" in done.stdout


def test_root_modules_are_made_importable_in_one_place():
    """sys.path is touched in the package's __init__, and in scripts only to find the package itself."""
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if "sys.path" in line]
        name = str(path.relative_to(PACKAGE)).replace(os.sep, "/")
        if name in SCRIPTS:
            assert len(lines) == 1, name
            assert re.search(r"if not __package__:.*\n\s+sys\.path\.insert", path.read_text(encoding="utf-8"))
        elif name != "__init__.py":
            assert lines == [], name


def test_requirements_of_the_folder_install_the_root_s_too():
    text = (PACKAGE / "requirements.txt").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "-r ../requirements.txt"
    assert {"tensorboard", "wandb"} <= set(re.findall(r"^[a-z]+", text, flags=re.MULTILINE))


# -- README ----------------------------------------------------------------------------------------

PAGE = (PACKAGE / "README.md").read_text(encoding="utf-8")


def shell_lines():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line[:1] != "#"]


def test_the_readme_s_commands_name_files_options_and_settings_that_exist():
    checked = 0
    for words in shell_lines():
        if words[:1] != ["python"]:
            continue
        script = f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1]
        folder = PACKAGE if (PACKAGE / script).exists() else ROOT
        source = (folder / script).read_text(encoding="utf-8")
        source += (ROOT / "xray2ct" / "training" / "monitors.py").read_text(encoding="utf-8")
        for index, word in enumerate(words):
            assert not word.startswith("--") or f'"{word}"' in source, word
            if word == "--config":
                load_cascade_config(folder / words[index + 1])
        checked += 1
    assert checked >= 5


def test_the_readme_s_settings_and_links_exist():
    config = PACKAGE / "config" / "progressive_3stage.json"
    settings = re.findall(r"--set ([\w.]+=[\w.\-]+)", PAGE)
    assert len(settings) > 5
    for setting in settings:
        load_cascade_config(config, [setting])
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE):
        assert (PACKAGE / target).exists(), target
    for name in re.findall(r"`(config/\w+\.json|\w+\.py)`", PAGE):
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_the_readme_s_parameter_counts_are_those_of_the_networks():
    for name, counts in re.findall(r"\| `(config/\w+\.json)` \| ([^|]+) \|", PAGE):
        config = load_cascade_config(PACKAGE / name)
        found = [
            round(sum(p.numel() for p in outline(config, i).parameters()) / 1e6) for i in range(len(config.stages))
        ]
        stated = [int(n) for n in re.findall(r"\((\d+) M", counts)]
        assert stated == (found if "each" not in counts else found[:1]), name


def test_the_readme_is_one_page():
    assert len(PAGE.splitlines()) < 120
