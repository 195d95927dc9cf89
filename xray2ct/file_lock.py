"""A lock file that the process holding it cannot leave behind, however it ends.

The lock is the operating system's on a byte of the file: it is gone with its process, even after SIGKILL, and file
systems that are shared between machines (NFS, Lustre with flock) know it, too. The file itself stays and names who held
the lock last. POSIX record locks are used because processes forked from a run (data workers) do not inherit them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Generator
from datetime import datetime, timezone
from pathlib import Path

from xray2ct.checkpoints import WriteError
from xray2ct.files import InputError, shown_name

if os.name == "nt":
    import msvcrt
else:
    import fcntl

PLACE = 1 << 30  # of the locked byte, far behind the text: Windows lets nobody read a locked one
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # a file system that has none
_held: set[str] = set()  # files that this process has locked: record locks do not exclude their own process


@contextlib.contextmanager
def locked(path: str | os.PathLike, what: str, wait: bool = False) -> Generator[None]:
    """Hold a lock on the file ``path`` (made, with its folder, when missing) until the block ends.

    what: says in a message what the lock protects ("another run is using this folder"). wait: for another process to
    give it back, instead of an error. Raises :class:`InputError`
    naming the file's folder and who holds the lock while another process does, and :class:`checkpoints.WriteError` when
    it cannot be written to. On a file system without locks a note is printed.
    """
    path = Path(path)
    key = os.path.realpath(path)
    if key in _held:
        raise _in_use(path, what, "this very process")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise WriteError(f"{path}: could not be written ({error})") from error
    with open(path, "r+b", buffering=0) as stream:  # closing it gives the lock back
        while not _try_lock(stream, path):
            if not wait:
                raise _in_use(path, what, _holder(stream))
            time.sleep(0.5)
        _sign(stream)
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


def _try_lock(stream, path: Path) -> bool:
    """False while another process has the lock; True with it, and (noted) on a file system without locks."""
    try:
        _lock(stream)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise WriteError(f"{path}: could not be locked ({error})") from error
        print(f"note: {path}: this file system has no locks; start no second run in {path.parent}", flush=True)
    return True


def _lock(stream) -> None:
    """Lock the byte at PLACE without waiting; OSError (one of HELD) when another process has it."""
    if os.name == "nt":
        stream.seek(PLACE)
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, PLACE)


def _sign(stream) -> None:
    """Write down who holds the lock, for the message of the next one; a full disk is reported by others."""
    with contextlib.suppress(OSError):
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        stream.seek(0)
        stream.truncate()
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())


def _holder(stream) -> str:
    with contextlib.suppress(OSError):
        stream.seek(0)
        text = stream.read(300).decode(errors="replace").strip()
        if text:
            return shown_name(text)
    return "another process"


def _in_use(path: Path, what: str, holder: str) -> InputError:
    return InputError(f"{path.parent}: {what} ({holder}); wait until it has ended, or choose another one")
