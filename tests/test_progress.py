"""Progress where there is no terminal: whole lines, one a minute; durations in words."""

import io

import pytest

from xray2ct import progress
from xray2ct.progress import ProgressLines, duration, progress_bar


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_line_a_minute_says_how_much_is_done_and_left():
    now, stream = Time(), io.StringIO()
    done = []
    for item in ProgressLines(range(10), desc="Evaluating", unit="patients", clock=now, stream=stream):
        done.append(item)
        now.now += 25
    assert done == list(range(10))
    assert stream.getvalue().splitlines() == [
        "Evaluating: 3 of 10 patients in 1 min, 3 min left",  # 75 s; 175 s
        "Evaluating: 6 of 10 patients in 2 min, 2 min left",  # 150 s; 100 s
        "Evaluating: 9 of 10 patients in 4 min, 25 s left",
    ]


def test_what_was_done_before_does_not_count_for_the_pace():
    now, stream = Time(), io.StringIO()
    with ProgressLines(total=100, initial=90, desc="Epoch 1/2", unit="steps", clock=now, stream=stream) as bar:
        now.now = 120.0
        bar.update(2)
    assert stream.getvalue() == "Epoch 1/2: 92 of 100 steps in 2 min, 8 min left\n"


def test_bytes_are_shortened_and_short_work_prints_nothing():
    now, stream = Time(), io.StringIO()
    with ProgressLines(total=3e9, desc="downloading", unit="B", unit_scale=True, clock=now, stream=stream) as bar:
        bar.update(5e8)
        assert stream.getvalue() == ""
        now.now = 60.0
        bar.update(1e9)
    assert stream.getvalue() == "downloading: 1.50G of 3.00G B in 1 min, 1 min left\n"


def test_off_a_terminal_lines_stand_for_bars_and_quiet_for_nothing(monkeypatch, capsys):
    assert isinstance(progress_bar(range(3), desc="x"), ProgressLines)
    assert progress_bar(range(3), disable=True).disable
    monkeypatch.setattr(progress, "_quiet", False)  # and back to it
    progress.be_quiet()
    bar = progress_bar(range(3), desc="x")
    assert bar.disable
    assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (720, "12 min"),
        (3590, "1 h 0 min"),
        (4320, "1 h 12 min"),
        (47.9 * 3600, "47 h 54 min"),
        (76 * 3600, "3 days 4 h"),
        (12 * 86400, "12 days"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
