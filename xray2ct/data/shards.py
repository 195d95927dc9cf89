"""Preparation in shards: which share of the CTs one job takes, what it leaves for the merge, and the merge.

A shard writes its patients' folders as an unsharded run would, and ``.prepare/shard-I-of-N.json`` with their manifest
entries once all are done; the merge reads those of all N shards.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from xray2ct.data.work_list import WORK_FOLDER
from xray2ct.files import InputError, read_json, shown, write_json

KEYS = {"shard", "settings", "list", "entries", "failures", "found", "left_out"}


class Shard(NamedTuple):
    """Job ``index`` (from 1) of ``count``."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"3/8"``; :class:`InputError` for anything but whole numbers with 1 <= 3 <= 8."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        shard = cls(*map(int, match.groups())) if match else None
        if shard is None or not 1 <= shard.index <= shard.count:
            raise InputError(f"--shard is {shown(text)}; expected I/N, job I of N counted from 1, such as 3/8")
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def share(self, items: list) -> list:
        """Every ``count``-th item: neighbours in the sorted list, often of one size, go to different jobs."""
        return items[self.index - 1 :: self.count]

    def file(self, output: Path, suffix: str) -> Path:
        """Its file in the output's work folder."""
        return output / WORK_FOLDER / f"shard-{self.index}-of-{self.count}.{suffix}"


def write_shard(output: Path, shard: Shard, result: dict[str, Any]) -> None:
    """Leave for the merge what one shard did: the keys :data:`KEYS` but ``shard``."""
    write_json(shard.file(output, "json"), {"shard": list(shard), **result})


def read_shards(output: Path) -> list[dict[str, Any]]:
    """The results of all shards, in order.

    Raises :class:`InputError` naming the file or the shards: none there, some missing, of another number, damaged, made
    with other settings or from another list of CTs, a patient in two of them.
    """
    paths = sorted((output / WORK_FOLDER).glob("shard-*-of-*.json"))
    if not paths:
        raise InputError(f"{output}: holds no finished shard; run prepare_data.py with --shard 1/N to N/N first")
    found = {Shard(*result["shard"]): result for result in map(_read, paths)}
    counts = sorted({shard.count for shard in found})
    if len(counts) > 1:
        names = " and of ".join(map(str, counts))
        raise InputError(f"{output / WORK_FOLDER}: holds shards of {names}; remove the files of the number not meant")
    missing = [str(i) for i in range(1, counts[0] + 1) if Shard(i, counts[0]) not in found]
    if missing:
        raise InputError(f"{output}: shard {', '.join(missing)} of {counts[0]} is missing: not started, or unfinished")
    results = [found[shard] for shard in sorted(found)]
    for key, what in (("settings", "with other settings"), ("list", "from another list of CTs")):
        others = [Shard(*result["shard"]) for result in results if result[key] != results[0][key]]
        if others:
            names = ", ".join(map(str, others))
            raise InputError(f"{output}: shard {names} was prepared {what} than shard 1; run them again")
    owners: dict[str, Shard] = {}
    for shard in sorted(found):
        for patient in found[shard]["entries"]:
            if owners.setdefault(patient, shard) != shard:
                raise InputError(f"{output}: patient {patient} is in the shards {owners[patient]} and {shard}")
    return results


def _read(path: Path) -> dict[str, Any]:
    result = read_json(path)
    if not isinstance(result, dict) or set(result) != KEYS:
        raise InputError(f"{path}: not what prepare_data.py --shard writes; run this shard again")
    wanted = f"shard-{'-of-'.join(map(str, result['shard']))}.json"
    if path.name != wanted:
        raise InputError(f"{path}: holds what belongs into {wanted}; run these shards again")
    return result
