"""Fuzzing with hypothesis: whatever a file holds, a reader gives a right result or the project's own error.

    pytest -k fuzz      25 cases of each target, the same ones each time (in the default tests, too)
    pytest -m fuzz      250 random cases of each target

``conftest.py`` chooses between the two profiles by the marker expression. A case fails when a reader raises
anything but :class:`xray2ct.files.InputError`, an error does not name its input on one line, there is a warning or a
line in a log, it takes a minute, or the result is not what an independent decoder makes of the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import warnings

from hypothesis import event
from hypothesis import strategies as st

from xray2ct.files import InputError

SECONDS = 60  # a case that takes longer hangs; usual ones take milliseconds


class Hang(BaseException):
    """Not an ``Exception``: no reader may catch it."""


@contextlib.contextmanager
def watched(allowed=None):
    """Fails on a hang, on a line in any log, and on a warning that ``allowed`` does not match."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    timed = hasattr(signal, "SIGALRM")
    if timed:
        before = signal.signal(signal.SIGALRM, _hang)
        signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # of whatever was collected meanwhile
            yield
    finally:
        if timed:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        logging.getLogger().removeHandler(handler)
    lines += [str(warning.message) for warning in caught if not (allowed and allowed in str(warning.message))]
    assert not lines


def _hang(*_):
    raise Hang


def outcome(read, *arguments, names=None, allowed=None, **options):
    """What ``read`` returns, or None after an InputError, which names the input (``names``) on one line."""
    with watched(allowed):
        try:
            result = read(*arguments, **options)
            event("taken")  # for --hypothesis-show-statistics
            return result
        except InputError as error:
            message = str(error)
    event("refused")
    assert str(arguments[0] if names is None else names) in message
    assert "\n" not in message
    assert len(message) < 1500
    return None


# ------------------------------------------------------------------------------------------------
# Damage

# What happens to bytes: (share of the length, new byte) flips, or a cut, or a piece put in.
DAMAGE = st.one_of(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("insert"), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=20)),
)


def damaged(raw: bytes, damage, end=None) -> bytes:
    """``raw`` after ``damage``, which lies in its first ``end`` bytes."""
    end, raw = min(end or len(raw), len(raw)), bytearray(raw)
    if isinstance(damage, list):
        for share, value in damage:
            raw[int(share * end)] = value
    elif damage[0] == "cut":
        del raw[int(damage[1] * end) :]
    else:
        place = int(damage[1] * end)
        raw[place:place] = damage[2]
    return bytes(raw)


# ------------------------------------------------------------------------------------------------
# JSON

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from(
        [10**30, -(10**400), 2**63, 1e999, math.nan, -math.inf, 1e308, 0.5, "", "..", "a/b", "\0", "\ud800"]
    ),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TEXT_DAMAGE = st.sampled_from(["none"] * 20 + ["cut", "byte", "twice", "deep", "bom", "digits", "list", "utf16"])


def json_bytes(data, damage) -> bytes:
    text = json.dumps(data)
    raw = text.encode()
    middle = len(raw) // 2
    return {
        "none": raw,
        "cut": raw[:middle],
        "byte": raw[:middle] + b"\xff" + raw[middle:],
        "twice": b'{"data": {}, "data": {}, ' + raw[1:],
        "deep": b"[" * 100_000,
        "bom": b"\xef\xbb\xbf" + raw,
        "digits": b'{"world_size": ' + b"9" * 5000 + b"}",
        "list": b"[" + raw + b"]",
        "utf16": text.encode("utf-16"),
    }[damage]


def paths_of(data, before=()):
    """The path of every value in nested dicts and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from paths_of(value, (*before, key))


def changed(data, changes):
    """A copy of ``data`` with ``{path: value}`` put in, where the path still exists."""
    data = json.loads(json.dumps(data))
    for path, value in changes.items():
        place = data
        for key in path[:-1]:
            place = place[key] if isinstance(place, dict) and key in place else place
            if isinstance(place, list) and isinstance(path[-1], int):
                break
        if isinstance(place, dict) or (isinstance(place, list) and path[-1] in range(len(place))):
            before = place.get(path[-1]) if isinstance(place, dict) else place[path[-1]]
            place[path[-1]] = value(before) if callable(value) else value
    return data


def doubled(value):
    """A value that is as likely to be fine as the one before."""
    if isinstance(value, bool):
        return not value
    return value * 2 if isinstance(value, int | float) else value
