"""Cached arrays on disk: ``.npy`` files with a CRC-32, memory-mapped, made again when damaged."""

from __future__ import annotations

import math
import warnings
import zlib
from pathlib import Path

import numpy as np

from xray2ct.files import InputError, atomic_path

CHECKSUM_BYTES = 4
CHUNK = 1 << 20  # bytes read at a time for a checksum
# What readers of images and arrays raise on damaged files, besides InputError.
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, zlib.error)
_verified: set[tuple] = set()  # cached files whose checksum this process has compared


def open_cached(path: Path, shape: tuple[int, ...], dtype) -> np.ndarray | None:
    """Memory-map a cached array; None when it has to be made: absent, or its checksum is wrong (with a warning).

    The file is a ``.npy`` followed by the CRC-32 of all before it, compared once per process: that does little more
    than bring the file into memory, where it is needed next.
    """
    try:
        status = path.stat()
        stamp = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        if stamp in _verified or _checksum_holds(path, status.st_size - CHECKSUM_BYTES):
            array = np.load(path, mmap_mode="r")
            if array.shape == shape and array.dtype == dtype:
                _verified.add(stamp)
                return array
    except FileNotFoundError:
        return None
    except UNREADABLE:
        pass
    warnings.warn(f"{path}: damaged, or of an earlier version without checksum: made again", stacklevel=4)
    return None


def complete(path: Path, shape: tuple[int, ...], dtype) -> bool:
    """True when a cached array is there in its full length: what it holds is verified when it is used."""
    try:
        return path.stat().st_size > np.dtype(dtype).itemsize * math.prod(shape) + CHECKSUM_BYTES
    except OSError:
        return False


def _checksum(stream, end: int) -> bytes:
    """CRC-32 of the first ``end`` bytes of a stream, which is left there."""
    code = 0
    for start in range(0, end, CHUNK):
        code = zlib.crc32(stream.read(min(CHUNK, end - start)), code)
    return code.to_bytes(CHECKSUM_BYTES, "little")


def _checksum_holds(path: Path, end: int) -> bool:
    with open(path, "rb") as stream:
        return end > 0 and _checksum(stream, end) == stream.read()


def write_cached(path: Path, array: np.ndarray) -> None:
    """Write an array as :func:`open_cached` reads it."""
    try:
        with atomic_path(path) as temporary, open(temporary, "w+b") as stream:
            np.save(stream, array)
            end = stream.tell()
            stream.seek(0)
            code = _checksum(stream, end)
            stream.seek(end)  # between reading and writing
            stream.write(code)
    except OSError as error:
        raise InputError(
            f"{path}: the cache could not be written ({error}); free space, or give another folder (data.cache_dir)"
        ) from error
