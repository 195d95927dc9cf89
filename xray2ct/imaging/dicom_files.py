"""DICOM files of CTs and X-rays alike: recognised by content, read without a value of theirs in any log."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Generator
from pathlib import Path

from xray2ct.files import InputError


def is_dicom(path) -> bool:
    """True for DICOM by content: the preamble or, in files without, a first element of group 0002 or 0008.

    False for a DICOMDIR, which lists files and holds no image. Raises OSError when the file cannot be opened.
    """
    if Path(path).name.upper() == "DICOMDIR":
        return False
    with open(path, "rb") as stream:
        block = stream.read(132)
    return block[128:] == b"DICM" or bool(re.match(rb"[\x02\x08]\0.\0(?:[A-Z]{2}|..\0\0)", block, re.DOTALL))


def dicom_files(folder: Path) -> list[Path]:
    """DICOM files right in a folder, sorted, hidden names left out; empty where there is no such folder."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.is_file() and not path.name.startswith(".") and is_dicom(path)]


@contextlib.contextmanager
def reading(path) -> Generator[None]:
    """Silence pydicom; whatever it and its decoders stumble on in damaged files becomes an InputError naming ``path``.

    Its warnings and its log quote the values of tags, such as a patient's name. Values of a header are decoded when
    they are asked for, so that asking needs this, too.
    """
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = error if isinstance(error, AttributeError | NotImplementedError) else type(error).__name__
        raise InputError(f"{path}: not a readable DICOM file ({reason})") from error
    finally:
        logger.disabled = before
