"""Configuration: every key checked, errors name file and key."""

import json

import pytest

from tests.helpers.paths import ROOT
from xray2ct.files import InputError
from xray2ct.training.config import EnhancedConfig, RefinementConfig, config_dict, load_config


def write(path, data):
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("path", sorted(ROOT.glob("config_*.json")), ids=lambda p: p.name)
def test_every_committed_config_loads_and_survives_a_round_trip(path, tmp_path):
    kind = RefinementConfig if "refinement" in path.name else EnhancedConfig
    config = load_config(kind, path)
    again = load_config(kind, write(tmp_path / "again.json", config_dict(config)))
    assert config_dict(again) == config_dict(config)


def test_file_then_set_options_override_defaults(tmp_path):
    path = write(tmp_path / "c.json", {"training": {"num_epochs": 7, "learning_rate": 1}})
    config = load_config(EnhancedConfig, path, ["training.num_epochs=9", "data.dataset_path=some/where"])
    assert config.training.num_epochs == 9
    assert config.training.learning_rate == 1.0
    assert isinstance(config.training.learning_rate, float)
    assert config.data.dataset_path == "some/where"
    assert config.model.base_channels == EnhancedConfig().model.base_channels


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"training": {"num_epoch": 3}}, ["training.num_epoch", "training.num_epochs"]),
        ({"modle": {}}, ["modle", "model"]),
        ({"training": {"batch_size": "4"}}, ["training.batch_size", "'4'", "int"]),
        ({"training": {"batch_size": True}}, ["training.batch_size", "int"]),
        ({"training": {"num_epochs": 2.5}}, ["training.num_epochs", "int"]),
        ({"model": {"volume_size": 64}}, ["model.volume_size", "list"]),
        ({"model": {"volume_size": [64, 64, "x"]}}, ["model.volume_size[2]"]),
        ({"training": 5}, ["training", "object"]),
        ({"training": {"batch_size": 0}}, ["training.batch_size", "at least 1"]),
        ({"training": {"learning_rate": -1.0}}, ["training.learning_rate"]),
        ({"training": {"precision": "half"}}, ["training.precision", "bfloat16"]),
        ({"world_size": 0}, ["world_size"]),
        ({"model": {"transformer_blocks": -1}}, ["model.transformer_blocks", "at least 0"]),
        ({"augment": {"elastic_points": 1}}, ["augment.elastic_points", "at least 2"]),
        ({"augment": {"source_size": 0}}, ["augment.source_size", "at least 16"]),
        ({"augment": {"translation_mm": -15.0}}, ["augment.translation_mm", "at least 0"]),
        ({"augment": {"scale": 1.0}}, ["augment.scale", "at most 0.9"]),
    ],
)
def test_bad_settings_name_file_and_key(tmp_path, data, words):
    path = write(tmp_path / "bad.json", data)
    with pytest.raises(InputError) as error:
        load_config(EnhancedConfig, path)
    for word in ["bad.json", *words]:
        assert word in str(error.value)


def test_bad_files_and_set_options(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_config(EnhancedConfig, tmp_path / "missing.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"training": {')
    with pytest.raises(InputError, match=r"broken\.json.*not valid JSON"):
        load_config(EnhancedConfig, broken)
    with pytest.raises(InputError, match=r"expected a JSON object"):
        load_config(EnhancedConfig, write(tmp_path / "list.json", [1]))
    with pytest.raises(InputError, match="expected key=value"):
        load_config(EnhancedConfig, None, ["training.num_epochs"])
    with pytest.raises(InputError, match=r"--set trainin\.x=1.*trainin"):
        load_config(EnhancedConfig, None, ["trainin.x=1"])


def test_null_is_allowed_only_where_the_setting_is_optional():
    assert load_config(EnhancedConfig, None, ["data.max_patients=null"]).data.max_patients is None
    assert load_config(EnhancedConfig, None, ["data.max_patients=3"]).data.max_patients == 3
    with pytest.raises(InputError, match=r"data\.num_workers"):
        load_config(EnhancedConfig, None, ["data.num_workers=null"])
