"""Processes forked from a server in which the training scripts are imported: starting one costs next to nothing."""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver

import pytest

from tests.helpers.paths import ROOT

# torch._dynamo is imported by any optimizer.
PRELOADED = ("tests.helpers.faults", "torch._dynamo", "train_enhanced_4gpu", "train_refinement_4gpu")
PRELOADED += ("hybrid_vit_cascade.training.chain",)


@functools.cache
def server():
    """``multiprocessing``'s context of the server; its processes have one thread and no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", str(ROOT))  # until Python 3.13 the server has no other way to find these modules
        forkserver.ensure_running()
    return context


def start(words, stdout, stderr, **variables):
    """Start ``[python, script, ...]`` or ``[python, "-m", module, ...]`` from the repository's root.

    stdout, stderr: files that its output goes to. variables: of its environment. Returns the process, which runs as
    ``__main__`` and ends as a command does.
    """
    arguments = ([str(word) for word in words[1:]], str(stdout), str(stderr), variables)
    process = server().Process(target=_command, args=arguments)
    process.start()
    return process


def _command(words, stdout, stderr, variables):
    os.environ.update(variables)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    os.chdir(ROOT)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
