"""Fuzzing of configurations and --set: every setting has its type and value afterwards, or is refused in one line."""

from __future__ import annotations

import json
import math
import typing
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from hybrid_vit_cascade.settings import CascadeConfig, load_cascade_config
from tests.helpers.fuzzing import TEXT_DAMAGE, VALUES, changed, doubled, json_bytes, outcome, paths_of
from xray2ct.training.config import EnhancedConfig, RefinementConfig, config_dict, load_config

pytestmark = pytest.mark.fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


STAGE = {"name": "a", "volume_size": 16, "voxel_dim": 32, "vit_depth": 1, "num_heads": 2}
BASES = {
    "direct": (EnhancedConfig, lambda path, more=(): load_config(EnhancedConfig, path, more), {}),
    "refinement": (RefinementConfig, lambda path, more=(): load_config(RefinementConfig, path, more), {}),
    "cascade": (
        CascadeConfig,
        load_cascade_config,
        {"stages": [STAGE, {**STAGE, "name": "b", "volume_size": [32, 32, 32]}], "xray_img_size": 64},
    ),
}


def full(kind):
    cls, _, given_keys = BASES[kind]
    return {**config_dict(cls()), **given_keys}


def well_typed(value, hint):
    """``value`` is what its annotation says; numbers are finite and texts can be written."""
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return all(well_typed(getattr(value, f.name), hints[f.name]) for f in fields(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(well_typed(v, typing.get_args(hint)[0]) for v in value)
    if typing.get_args(hint):
        return any(well_typed(value, one) for one in typing.get_args(hint))
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str) and bool(value.encode() or True)
    return type(value) is hint


def config_changes(kind):
    known = st.sampled_from(sorted(paths_of(full(kind)), key=str))
    unknown = st.tuples(st.text(max_size=8))
    fine = st.dictionaries(known, st.just(doubled), max_size=3)
    return fine | st.dictionaries(st.one_of(known, known, known, unknown), VALUES | st.just(doubled), max_size=3)


def check_config_file(folder, kind, changes, damage):
    cls, load, _ = BASES[kind]
    path = folder / f"{kind}.json"
    data = changed(full(kind), changes)
    path.write_bytes(json_bytes(data, damage))
    config = outcome(load, path)
    if config is None:
        assert changes or damage not in ("none", "bom")
        return
    assert damage in ("none", "bom")
    assert well_typed(config, cls)
    result = config_dict(config)
    for place in paths_of(data):
        found, wanted = result, data
        for key in place:
            found, wanted = found[key] if np.ndim(found) or isinstance(found, dict) else found, wanted[key]
        if not isinstance(wanted, (dict, list)) and place[-2:-1] != ("volume_size",):
            assert found == wanted
    (folder / "again.json").write_text(json.dumps(result))
    assert config_dict(load(folder / "again.json")) == result


@given(config_changes("direct"), TEXT_DAMAGE)
def test_direct_configurations(folder, changes, damage):
    check_config_file(folder, "direct", changes, damage)


@given(config_changes("refinement"), TEXT_DAMAGE)
def test_refinement_configurations(folder, changes, damage):
    check_config_file(folder, "refinement", changes, damage)


@given(config_changes("cascade"), TEXT_DAMAGE)
def test_cascade_configurations(folder, changes, damage):
    check_config_file(folder, "cascade", changes, damage)


SET_KEYS = st.one_of(
    st.sampled_from([".".join(map(str, p)) for kind in BASES for p in sorted(paths_of(full(kind)), key=str)]),
    st.sampled_from(
        ["stages.\u00b2.name", "stages.-1.name", "stages." + "9" * 5000, ".", "a" * 5000, "x" + ".x" * 3000]
    ),
    st.text(max_size=12),
)
SET_VALUES = st.one_of(
    VALUES.map(json.dumps),
    st.sampled_from(["[" * 100_000, "9" * 5000, "NaN", "1e999", '{"a": 1, "a": 2}', "=", "\0", "\ud800", "a\nb"]),
    st.text(max_size=12),
)


@given(
    st.sampled_from(sorted(BASES)),
    st.lists(st.tuples(SET_KEYS, SET_VALUES, st.sampled_from(["=", "=", ""])), max_size=2),
)
def test_set_options(folder, kind, options):
    cls, load, _ = BASES[kind]
    path = folder / "base.json"
    path.write_text(json.dumps(full(kind)))
    texts = [f"{key}{equals}{value}" for key, value, equals in options]
    config = outcome(load, path, texts, names="")
    if config is not None:
        assert well_typed(config, cls)
