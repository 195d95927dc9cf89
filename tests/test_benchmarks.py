"""benchmarks/gpu.py on the CPU in tiny sizes: every part measures something, none hides that it did not."""

import json

import pytest
import torch

from benchmarks import gpu, gpu_parts
from xray2ct.files import InputError

SMALL = ["--small", "--device", "cpu"]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_part_has_its_figures(tmp_path, capsys):
    output = tmp_path / "figures.jsonl"
    assert gpu.main([*SMALL, "--deadline", "600", "--output", str(output)]) == 0
    machine, *rows = lines(output)
    assert machine["torch"] == torch.__version__
    assert {row["part"] for row in rows} == set(gpu_parts.PARTS)
    for row in rows:
        assert row["ms"] > 0, row
        assert row["samples_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"], rel=0.02)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)


def test_what_the_deadline_leaves_no_time_for_is_named(tmp_path, capsys):
    output = tmp_path / "figures.jsonl"
    assert gpu.main([*SMALL, "--parts", "augment,loader", "--deadline", "0", "--output", str(output)]) == 0
    assert [row.get("skipped") for row in lines(output)[1:]] == ["deadline"] * 2
    assert capsys.readouterr().out.count("skipped: deadline") == 2


def test_a_part_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    def broken(bench):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(gpu.PARTS, "renderer", broken)
    assert gpu.main([*SMALL, "--parts", "renderer,augment"]) == 1
    printed = capsys.readouterr().out
    assert "| renderer | whole part |  | RuntimeError: no kernel image |" in printed
    assert "| augment | 16^3 source | 2 |" in printed


def test_options_that_cannot_be_met_are_named():
    with pytest.raises(InputError, match="--parts has 'speed'; expected some of renderer,network"):
        gpu.main([*SMALL, "--parts", "speed,step"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device is cuda, but torch sees no GPU"):
            gpu.main([])
