"""Triton's interpreter, which must be chosen before triton is imported: kernels run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


def check_in_interpreter(script: str) -> None:
    """Run ``script``, which ends by printing "equal", where Triton kernels run on CPU tensors."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=600,
    )
    assert (result.returncode, result.stdout) == (0, "equal\n"), result.stderr
