"""One run in one folder: rank 0 holds a lock on ``run.lock`` for all ranks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator
from pathlib import Path

from xray2ct.file_lock import locked
from xray2ct.files import InputError
from xray2ct.training.distributed import Processes

LOCK = "run.lock"


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike, processes: Processes) -> Generator[None]:
    """Hold ``folder`` (made when missing) for this run until the block ends; rank 0 does it for all ranks.

    Raises :class:`InputError` naming the folder and who uses it while another run does, and
    :class:`checkpoints.WriteError` when it cannot be written to; the other ranks then end with status 2. On a file
    system without locks a note is printed.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if processes.is_main:
            try:
                stack.enter_context(locked(Path(folder) / LOCK, "another run is using this folder"))
            except InputError as refusal:
                error = refusal
        refused = processes.any(error is not None)
        if error is not None:
            raise error
        if refused:
            sys.exit(2)  # rank 0 prints the reason
        yield
