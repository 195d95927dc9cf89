"""Curves of training runs: what is read from the log is what is drawn."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools import plot_run
from xray2ct.files import InputError


def write_log(folder, psnrs, extra=""):
    folder.mkdir()
    events = []
    for epoch, psnr in enumerate(psnrs, 1):
        events += [
            {"event": "step", "epoch": epoch, "loss": 99.0},
            {"event": "epoch", "epoch": epoch, "loss": 1 / epoch},
            {"event": "validation", "epoch": epoch, "loss": 2 / epoch, "psnr": psnr},
        ]
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + extra, encoding="utf-8")
    return folder


def test_curves_hold_the_logs_values(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [
        plot_run.read_run(write_log(tmp_path / "a", [20.0, 23.5, 22.0])),
        plot_run.read_run(tmp_path / "a/log.jsonl"),
    ]
    assert plot_run.legend_names(runs) == ["a (1)", "a (2)"]
    losses, psnrs = plot_run.draw(runs).axes
    training, validation = losses.lines[:2]
    assert list(training.get_xdata()) == [1, 2, 3]
    assert list(training.get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(validation.get_ydata()) == [2, 1, 2 / 3]
    curve, best = psnrs.lines[:2]
    assert list(curve.get_ydata()) == [20.0, 23.5, 22.0]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([2], [23.5])
    assert [text.get_text() for text in psnrs.get_legend().get_texts()] == ["a (1): 23.50 dB", "a (2): 23.50 dB"]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["a (1)", "a (2)"]
    assert not [text for axes in (losses, psnrs) for text in axes.texts]  # which would lie upon each other


def test_a_cascades_folder_is_its_stages(tmp_path, capsys):
    folder = tmp_path / "quick"
    folder.mkdir()
    stages = [{"name": name} for name in ("low", "high", "later")]
    (folder / "config.json").write_text(json.dumps({"stages": stages}), encoding="utf-8")
    with pytest.raises(InputError, match=r"quick: none of its stages \(low, high, later\) has a log\.jsonl"):
        plot_run.read_runs(folder)
    write_log(folder / "low", [20.0])
    write_log(folder / "high", [21.0, 22.0])
    assert [(run.name, run.psnr) for run in plot_run.read_runs(folder)] == [
        ("quick/low", {1: 20.0}),
        ("quick/high", {1: 21.0, 2: 22.0}),
    ]
    pytest.importorskip("matplotlib")
    assert plot_run.main([str(folder), "--output", str(tmp_path / "curves.png")]) == 0
    assert "quick/high: 2 epochs, best PSNR 22.00 dB at epoch 2" in capsys.readouterr().out


def test_the_picture_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_log(tmp_path / "one", [20.0, 23.5])
    write_log(tmp_path / "two", [])
    (tmp_path / "two/log.jsonl").write_text('{"event": "epoch", "epoch": 1, "loss": 0.5}\n', encoding="utf-8")
    output = tmp_path / "new folder" / "curves.png"
    assert plot_run.main([str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(output)]) == 0
    with Image.open(output) as picture:
        picture.load()
        assert picture.width > 1000
    printed = capsys.readouterr().out
    assert "one: 2 epochs, best PSNR 23.50 dB at epoch 2" in printed
    assert "two: 1 epoch, no validation yet" in printed


def test_epochs_done_again_and_a_cut_last_line(tmp_path):
    again = json.dumps({"event": "epoch", "epoch": 2, "loss": 0.25}) + "\n"
    run = plot_run.read_run(write_log(tmp_path / "a", [20.0, 21.0], again + '{"event": "epo'))
    assert run.loss == {1: 1.0, 2: 0.25}
    assert run.psnr == {1: 20.0, 2: 21.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"event"\n{"event": "epoch"}\n', "line 1 is not valid JSON"),
        ('{"loss": 1}\n', "line 1 has no 'event'"),
        ("[]\n", "line 1 has no 'event'"),
        ('{"event": "step", "epoch": 1, "loss": 2}\n', "no finished epoch"),
        ("", "no finished epoch"),
    ],
)
def test_what_is_not_a_log_is_named(tmp_path, content, message):
    (tmp_path / "log.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        plot_run.read_run(tmp_path)
    assert "log.jsonl" in str(error.value)


def test_bad_arguments_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="nowhere: cannot be read"):
        plot_run.read_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"curves\.pdf: expected a name ending in \.png"):
        plot_run.main([str(tmp_path), "--output", str(tmp_path / "curves.pdf")])
    with pytest.raises(InputError, match=r"--output .*curves\.png: cannot be written \(Not a directory\)"):
        plot_run.main([str(tmp_path / "nowhere"), "--output", str(Path(__file__) / "curves.png")])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot_run.draw([plot_run.Run("a", {1: 1.0})])
