"""Commands that are started as ``python -m benchmarks.NAME``."""

import xray2ct.installed  # noqa: F401  (first: says what is missing)
