"""What headers of MetaImage and NRRD files say, as they are stored: data files, and geometry that must be stated.

SimpleITK reads the voxels, but invents what a header does
not state (axes along LPS, 1 mm) and passes over what it does not know (units, intensities): refused here first.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from xray2ct.files import InputError, shown, stays_inside

NRRD = (".nrrd", ".nhdr")
DATA_FILE = re.compile(rb"^[ \t]*(?:ElementDataFile[ \t]*[=:]|data ?file[ \t]*:)[ \t]*([^\r\n]*)", re.I | re.M)
HEADER_BYTES = 1 << 20  # of a MetaImage or NRRD file, at most
# Numbers that MetaImage keys take: the power of the number of dimensions.
META_NUMBERS = {"ElementSpacing": 1, "ElementSize": 1, "Offset": 1, "Position": 1, "Origin": 1, "CenterOfRotation": 1}
META_NUMBERS |= {"TransformMatrix": 2, "Rotation": 2, "Orientation": 2}
META_GEOMETRY = (("ElementSpacing",), ("TransformMatrix", "Rotation", "Orientation"), ("Offset", "Position", "Origin"))
NRRD_SPACES = {"leftposteriorsuperior", "lps", "rightanteriorsuperior", "ras", "leftanteriorsuperior", "las"}
NRRD_KINDS = {"domain", "space", "???", "none"}


def data_files(path) -> list[Path]:
    """The other files that hold the data of a MetaImage or NRRD header, sorted; empty where it holds them itself.

    Of numbered and listed series all files of the folder. Raises InputError when the data lie in another folder.
    """
    path = Path(path)
    block = _header_block(path)
    names = [match[1].strip().decode("utf-8", "replace") for match in DATA_FILE.finditer(block)]
    listed = any(name.startswith("LIST") for name in names)
    if listed:  # one file name a line follows
        names += block.decode("utf-8", "replace").splitlines() if len(block) < HEADER_BYTES else ["/"]
    found = set()
    for name in names:
        leaves = ".." in PureWindowsPath(name).parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive
        if leaves or "\0" in name or not stays_inside(path.parent / name, path.parent):
            raise InputError(f"{path}: its data lie in {shown(name)}, in another folder; expected them beside it")
        if listed or "%" in name:  # a numbered or listed series
            found |= {other for other in path.parent.iterdir() if other.is_file()}
        elif os.path.isfile(path.parent / name):  # unlike Path.is_file, False also for names that cannot be
            found.add(path.parent / name)
    return sorted(found - {path})


def _header_block(path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(HEADER_BYTES)


def check_header(path) -> None:
    """Raise InputError naming the file and the field for a MetaImage or NRRD header that is damaged, that leaves
    spacing, directions or origin open or contradicts itself in them, whose lengths are not in mm, or that maps its
    values to other ones (which SimpleITK would not do)."""
    path = Path(path)
    block = _header_block(path)
    if path.suffix.lower() in NRRD:
        head = re.split(rb"\n\r?\n", block, maxsplit=1)[0]
        if len(head) == HEADER_BYTES:
            raise InputError(f"{path}: SimpleITK cannot read it (a header of more than {HEADER_BYTES} bytes)")
        _check_nrrd(path, head.decode("utf-8", "replace"))
        return
    found = DATA_FILE.search(block)
    _check_metaimage(path, block[: found.start()].decode("utf-8", "replace") if found else "")


# ------------------------------------------------------------------------------------------------
# MetaImage


def _check_metaimage(path, header):
    """Check the lines before ElementDataFile: ITK's reader ends the process on some that make no sense."""
    pairs = [re.split("[=:]", line, maxsplit=1) for line in header.splitlines() if re.search("[=:]", line)]
    fields = {key.strip(): value.split() for key, value in pairs}
    count = int(fields.get("NDims") in (["2"], ["3"], ["4"]) and fields["NDims"][0])
    size, kind = fields.get("DimSize", []), fields.get("ElementType", [""])
    problems = {
        "a key is given twice": len(fields) < len(pairs),
        "NDims": count == 0,
        "DimSize": len(size) != count or not all(re.fullmatch("[1-9][0-9]{0,8}", n) for n in size),
        "ElementType": not (len(kind) == 1 and kind[0].startswith("MET_")),
        "HeaderSize": re.fullmatch("-1|[0-9]{1,9}", " ".join(fields.get("HeaderSize", ["0"]))) is None,
    }
    for key, power in META_NUMBERS.items():
        numbers = fields.get(key, ["0"] * count**power)
        problems[key] = len(numbers) != count**power or not all(_is_number(number) for number in numbers)
    wrong = [key for key, bad in problems.items() if bad]
    if wrong:
        raise InputError(f"{path}: SimpleITK cannot read it (not a MetaImage header, or damaged: {', '.join(wrong)})")
    for keys in META_GEOMETRY:
        stated = [[float(number) for number in fields[key]] for key in keys if key in fields]
        if not stated:
            raise InputError(f"{path}: states no {keys[0]}; it is not guessed, write it into the header")
        if any(value != stated[0] for value in stated):
            raise InputError(f"{path}: {' and '.join(key for key in keys if key in fields)} contradict each other")
    for key, neutral in (("ElementToIntensityFunctionSlope", ["1"]), ("ElementToIntensityFunctionOffset", ["0"])):
        value = fields.get(key, neutral)
        if not (len(value) == 1 and _is_number(value[0]) and float(value[0]) == float(neutral[0])):
            raise InputError(f"{path}: {key} is not {neutral[0]}; expected the stored values to be HU")
    units = fields.get("DistanceUnits", ["mm"])
    if units not in (["mm"], ["?"], ["???"]):
        raise InputError(f"{path}: DistanceUnits is {shown(' '.join(units))}; expected mm")
    if count == 3:
        _check_anatomical(path, fields)


def _check_anatomical(path, fields):
    """AnatomicalOrientation names where each axis comes from; the axes' directions say it, too."""
    stated = " ".join(fields.get("AnatomicalOrientation", ["?"])).upper()
    if "?" in stated:
        return
    key = next(key for key in META_GEOMETRY[1] if key in fields)
    axes = np.array(fields[key], dtype=float).reshape(3, 3)  # one axis a row, LPS
    main = np.abs(axes).argmax(axis=1)
    letters = "".join(("RAI", "LPS")[int(axes[i, main[i]] < 0)][main[i]] for i in range(3))
    oblique = np.abs(axes).max(axis=1) ** 2 < 0.75 * (axes**2).sum(axis=1)  # more than 30 degrees: others may round so
    if len(stated) != 3 or any(a != b for a, b, far in zip(stated, letters, oblique) if not far):
        raise InputError(
            f"{path}: AnatomicalOrientation is {shown(stated)}, but {key} says {letters}; expected one orientation"
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------
# NRRD


def _check_nrrd(path, header):
    lines = [line for line in header.splitlines()[1:] if not line.startswith("#") and ":=" not in line]
    pairs = [line.split(":", 1) for line in lines if ": " in line or line.rstrip().endswith(":")]
    fields = {re.sub(r"[\s_-]", "", key).lower(): value.strip() for key, value in pairs}
    if not re.match(r"NRRD000\d", header) or len(fields) < len(pairs):
        raise InputError(f"{path}: SimpleITK cannot read it (no NRRD header, or a field is given twice)")
    space = re.sub(r"[\s-]", "", fields.get("space", "")).lower()
    if space not in NRRD_SPACES:
        raise InputError(
            f"{path}: its space is {shown(fields['space']) if space else 'not stated'}; expected"
            " left-posterior-superior, right-anterior-superior or left-anterior-superior, or left and right are unknown"
        )
    directions = re.findall(r"\(([^)]*)\)|(none)", fields.get("spacedirections", ""), re.IGNORECASE)
    vectors = [vector.split(",") for vector, _ in directions if vector]
    if len(vectors) != 3 or not all(len(v) == 3 and all(map(_is_number, v)) for v in vectors):
        raise InputError(f"{path}: space directions are not three vectors of three numbers; expected those of the axes")
    if re.fullmatch(r"\(([^,)]*,){2}[^,)]*\)", fields.get("spaceorigin", "")) is None:
        raise InputError(f"{path}: states no space origin of three numbers; write it into the header")
    if set(fields.get("spacings", "").lower().split()) - {"nan"}:
        raise InputError(f"{path}: both spacings and space directions; expected the directions alone")
    for key in ("space units", "units"):
        units = [unit.strip('" ') for unit in re.findall(r'"[^"]*"|\S+', fields.get(key.replace(" ", ""), ""))]
        if set(units) - {"mm", "", "none", "???", "millimeter", "millimetre", "millimeters", "millimetres"}:
            raise InputError(f"{path}: {key} are {shown(' '.join(units))}; expected mm")
    kinds = [kind.lower() for kind in fields.get("kinds", "").split()]
    if len(directions) == 3 and set(kinds) - NRRD_KINDS:
        raise InputError(f"{path}: kinds are {shown(' '.join(kinds))}; expected three axes in space (domain)")
    for key in ("oldmin", "oldmax"):
        if key in fields:
            raise InputError(f"{path}: {key[:3]} {key[3:]} is given; expected the stored values to be HU")
