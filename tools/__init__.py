"""Commands that are started as ``python -m tools.NAME``."""

import xray2ct.installed  # noqa: F401  (first: says what is missing)
