"""Read the LIDC-IDRI volumes that X2CT-GAN released as HDF5: NIfTI CTs and a split file for prepare_data.py.

    python -m tools.import_x2ct --input LIDC-HDF5-256 --output CTS --train train.txt --test test.txt
    python prepare_data.py --input CTS --output data --split CTS/split.json

Needs h5py (``pip install h5py``). The folder holds ``SCAN/ct_xray_data.h5`` or ``SCAN_ct_xray_data.h5``, where SCAN is
like ``LIDC-IDRI-0001.20000101.3000566.1`` (patient, then scan). Only the CT is taken: the X-rays in the files are
8-bit and normalised each by its own maximum, so that prepare_data.py renders new ones from the CT.

What the files mean, and from where that is known (docs/datasets.md has the details): values are HU + 1024
(``--offset``), the cube is 320 mm wide whatever its number of voxels (``--edge-mm``; the files' own ``spacing`` is that
of an earlier grid), axes are (z, y, x) towards the patient's feet, back and left (``--axes IPL``). The axes are checked
on the lungs, spine, heart and liver of each CT while it is read: the command stops when they contradict.

With ``--train`` and ``--test`` (X2CT-GAN's lists) a patient of both lists keeps the test scans only, validation
patients are taken from the training list, and all scans of a patient stay on one side. The same command run again goes
on where it was stopped and reads again what has changed. A file that cannot be used, or lies elsewhere in the folder,
is named at the end, and the exit status is 1.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np

from xray2ct.command_line import Parser
from xray2ct.conventions import AIR_HU, MAX_HU
from xray2ct.data.checks.anatomy import orientation
from xray2ct.data.checks.findings import FAILED, OK, SIDES, UNKNOWN
from xray2ct.data.splits import SPLITS, split_by_hash
from xray2ct.files import InputError, check_patient_id, read_json, run_cli, shown, write_json
from xray2ct.imaging.cube import area_average, cube_affine
from xray2ct.imaging.cube_files import write_cube
from xray2ct.progress import progress_bar

H5_NAME = "ct_xray_data.h5"
SETTINGS, SPLIT, SOURCES = "import_settings.json", "split.json", "import_sources.json"
PROJECT_AXES = "IPL"  # where the axes (D, H, W) of this project point: inferior, posterior, left
OPPOSITE = dict(zip("RLAPSI", "LRPAIS"))
LETTERS = {"head-feet": "SI", "front-back": "AP", "left-right": "RL"}
EDGE_RANGE = (16, 512)  # voxels
EARLY = 5  # CTs whose anatomy tests the axes before anything is written


# ------------------------------------------------------------------------------------------------
# One file


def read_ct_cube(path, axes: str = PROJECT_AXES, offset: float = 1024.0, edge_mm: float = 320.0) -> np.ndarray:
    """The CT of one HDF5 file: int16 HU ``(N, N, N)`` in the project's axes (D, H, W), in [-1024, 3071].

    axes: where the stored axes point, three of R L A P S I. offset: stored value of 0 HU. edge_mm: expected edge of the
    cube. Raises InputError naming the file: not HDF5, no usable ``ct``, not a cube, another edge by its ``ori_size`` x
    ``spacing``, NaN, values that are no HU + offset, or h5py is missing.
    """
    path = Path(path)
    h5py = _import_h5py()
    try:
        with h5py.File(path, "r") as file:
            data = _ct_dataset(path, h5py, file)[()]
            _check_edge(path, file, edge_mm)
    except OSError as error:
        raise InputError(f"{path}: not a readable HDF5 file ({error})") from None
    if not np.isfinite(data).all():
        raise InputError(f"{path}: ct holds NaN or infinity")
    hu = data.astype(np.float32) - np.float32(offset)
    if np.mean(data < -500) > 0.01:  # HU + offset has no value far below 0 (interpolation rings a little)
        raise InputError(f"{path}: ct goes down to {data.min():g}; expected HU + {offset:g} (HU already? --offset 0)")
    if not (hu < -500).any() or not ((hu > -300) & (hu < 300)).any():
        raise InputError(
            f"{path}: ct runs from {data.min():g} to {data.max():g}; expected HU + {offset:g} with air and soft tissue"
        )
    turn = nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(code) for code in (axes, PROJECT_AXES)))
    return nib.orientations.apply_orientation(np.rint(hu).clip(AIR_HU, MAX_HU).astype(np.int16), turn)


def _import_h5py():
    try:
        import h5py  # optional
    except ImportError:
        raise InputError("reading X2CT-GAN's HDF5 files needs h5py: pip install h5py") from None
    return h5py


def _ct_dataset(path, h5py, file):
    """The dataset ``ct``, checked before memory is taken and before another file is opened for it."""
    link = file.get("ct", getlink=True)
    if link is None:
        raise InputError(f"{path}: no dataset 'ct'; found {shown(sorted(file))}")
    data = file["ct"] if isinstance(link, h5py.HardLink) else None
    if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
        raise InputError(f"{path}: 'ct' is not a dataset of its own; expected a cube of HU + 1024")
    edge = data.shape[0] if data.ndim else 0
    if data.shape != (edge,) * 3 or not EDGE_RANGE[0] <= edge <= EDGE_RANGE[1] or data.dtype.kind not in "iuf":
        raise InputError(f"{path}: ct is {data.dtype} {data.shape}; expected numbers (N, N, N), N of 16 to 512")
    return data


def _check_edge(path, file, edge_mm):
    """``ori_size`` x ``spacing`` (of the grid before the last resampling) must be the edge, where a file has both."""
    fields = [file.get(name) for name in ("ori_size", "spacing")]
    if any(field is None or field.size not in (1, 3) or field.dtype.kind not in "iuf" for field in fields):
        return
    edges = np.atleast_1d(fields[0][()]) * np.atleast_1d(fields[1][()])
    if np.abs(edges / edge_mm - 1).max() > 0.01:
        text = " x ".join(f"{edge:g}" for edge in edges)
        raise InputError(f"{path}: ori_size x spacing is {text} mm; expected {edge_mm:g} mm (or --edge-mm)")


def axes_by_anatomy(hu: np.ndarray, edge_mm: float) -> dict[str, str]:
    """Does each axis fit the anatomy, by :func:`anatomy.orientation` at about 5 mm? ``{"head-feet": "ok", ...}``."""
    size = hu.shape[0]
    factor = max(f for f in range(1, size + 1) if size % f == 0 and (f == 1 or f * edge_mm / size <= 5.01))
    answers = orientation(area_average(hu, factor), factor * edge_mm / size)
    return {side: answers[side][0] for side in SIDES}


def check_axes(tally: dict[str, Counter], axes: str) -> None:
    """Raise InputError, with the axes to try, where more CTs contradict ``axes`` than agree with them."""
    wrong = [side for side in SIDES if tally[side][FAILED] > tally[side][OK]]
    if wrong:
        letters = "".join(LETTERS[side] for side in wrong)
        other = "".join(OPPOSITE[letter] if letter in letters else letter for letter in axes)
        raise InputError(
            f"--axes {axes}: {', '.join(wrong)} is wrong by the anatomy of most CTs ({_counts(tally)});"
            f" try --axes {other} (or another order, where a CT is turned by 90 degrees)"
        )


def _counts(tally):
    states = ((OK, "right"), (FAILED, "wrong"), (UNKNOWN, "cannot tell"))
    return "; ".join(f"{side}: " + ", ".join(f"{tally[side][s]} {word}" for s, word in states) for side in SIDES)


# ------------------------------------------------------------------------------------------------
# All files


def find_h5(folder) -> dict[str, Path]:
    """``{scan: file}`` of a folder of ``SCAN/ct_xray_data.h5`` or ``SCAN_ct_xray_data.h5``, sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with SCAN/{H5_NAME}")
    found = {path.parent.name: path for path in folder.glob(f"*/{H5_NAME}")}
    found |= {path.name[: -len(H5_NAME) - 1]: path for path in folder.glob(f"*_{H5_NAME}")}
    if not found:
        raise InputError(f"{folder}: no SCAN/{H5_NAME} and no SCAN_{H5_NAME} in it")
    return {check_patient_id(scan, found[scan]): found[scan] for scan in sorted(found)}


def other_h5(folder, found: dict[str, Path]) -> list[Path]:
    """HDF5 files below ``folder`` that :func:`find_h5` did not take: other names, deeper folders, a scan's second."""
    files = {path for path in Path(folder).rglob("*") if path.suffix.lower() in (".h5", ".hdf5") and path.is_file()}
    return sorted(files - set(found.values()))


def patient_of(scan: str) -> str:
    """``LIDC-IDRI-0001.20000101.3000566.1`` -> ``LIDC-IDRI-0001``."""
    return scan.split(".")[0]


def read_list(path) -> list[str]:
    """The scans of a list, one a line; blank lines and repetitions are dropped."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable list of scans ({error})") from None
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def make_split(scans, train=None, test=None, val_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0):
    """Split ``scans`` by patient: ``({"train": [...], "val": [...], "test": [...]}, notes)``, lists sorted.

    train, test: lists of scans as published, or None for a split by hash. Patients of both lists lose their training
    scans, so that the test list stays what it is; validation patients are drawn from the training list by their hash.
    Scans in neither list are left out.
    """
    by_patient = defaultdict(list)
    lists = None if train is None or test is None else (list(train), list(test))
    for scan in set(lists[0]) - set(lists[1]) if lists else scans:
        by_patient[patient_of(scan)].append(scan)
    notes, split = [], {name: [] for name in SPLITS}
    if lists:
        split["test"] = lists[1]
        shared = sorted(set.intersection(*({patient_of(scan) for scan in part} for part in lists)))
        for patient in shared:
            gone = by_patient.pop(patient, None) or ["the same scan"]
            notes.append(f"{patient} stands in both lists: left out of training ({', '.join(sorted(gone))})")
        test_fraction = 0.0
    for name, patients in split_by_hash(by_patient, val_fraction, test_fraction, seed).items():
        split[name] += [scan for patient in patients for scan in by_patient[patient]]
        several = sum(len(by_patient[patient]) > 1 for patient in patients)
        if several:
            notes.append(f"{name}: {several} patients with several scans, all of them kept there")
    missing = sorted({scan for name in SPLITS for scan in split[name]} - set(scans))
    if missing:
        notes.append(f"listed but not there: {len(missing)} scans ({_some(missing)})")
    extra = sorted(set(scans) - {scan for name in SPLITS for scan in split[name]})
    if extra:
        notes.append(f"not taken: {len(extra)} scans ({_some(extra)})")
    return {name: sorted(set(split[name]) & set(scans)) for name in SPLITS}, notes


def _some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def try_axes(paths, axes: str, offset: float, edge_mm: float) -> None:
    """Test the axes on the first few files before anything is written (:func:`check_axes`); skip unusable ones."""
    tally = {side: Counter() for side in SIDES}
    for path in list(paths)[:EARLY]:
        with contextlib.suppress(InputError):
            _count(tally, read_ct_cube(path, axes, offset, edge_mm), edge_mm)
    check_axes(tally, axes)


def _count(tally, hu, edge_mm):
    for side, status in axes_by_anatomy(hu, edge_mm).items():
        tally[side][status] += 1


def convert(files: dict[str, Path], output, axes: str, offset: float, edge_mm: float):
    """Write ``SCAN.nii.gz`` for each file whose CT is not there yet, or was made before the file last changed.

    Returns ``(failures, tally)``: ``{scan: message}`` and, per direction, how many of the CTs just written agree with
    ``axes`` by their anatomy. Raises InputError at the end when most do not.
    """
    output, failures, tally = Path(output), {}, {side: Counter() for side in SIDES}
    sources = read_json(output / SOURCES) if (output / SOURCES).exists() else {}
    sources = sources if isinstance(sources, dict) else {}
    for scan, path in progress_bar(files.items(), desc="reading", unit="CTs"):
        target, stat = output / f"{scan}.nii.gz", path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if target.exists() and sources.get(scan) == state:
            continue
        target.unlink(missing_ok=True)  # if the file cannot be read any more, its old CT must not stay
        try:
            hu = read_ct_cube(path, axes, offset, edge_mm)
        except InputError as error:
            failures[scan] = str(error)
            continue
        _count(tally, hu, edge_mm)
        write_cube(target, hu, cube_affine((0, 0, 0), edge_mm, hu.shape[0]))
        sources[scan] = state
        write_json(output / SOURCES, sources)
    check_axes(tally, axes)
    return failures, tally


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="folder with SCAN/ct_xray_data.h5")
    parser.add_argument("--output", type=Path, required=True, help="folder for the NIfTI files and split.json")
    parser.add_argument("--train", type=Path, help="list of training scans, one a line (with --test)")
    parser.add_argument("--test", type=Path, help="list of test scans, one a line (with --train)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="for validation (default %(default)s)")
    parser.add_argument("--test-fraction", type=float, default=0.1, help="without lists (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what no list says (default %(default)s)")
    parser.add_argument("--axes", default=PROJECT_AXES, help="where the stored axes point (default %(default)s)")
    parser.add_argument("--offset", type=float, default=1024.0, help="stored value of 0 HU (default %(default)g)")
    parser.add_argument("--edge-mm", type=float, default=320.0, help="edge of the cube (default %(default)g)")
    return parser.parse_args(argv)


def _check_args(args):
    if sorted("".join(sorted((letter, OPPOSITE.get(letter, "")))) for letter in args.axes) != ["AP", "IS", "LR"]:
        raise InputError(f"--axes is {shown(args.axes)}; expected one letter each of RL, AP and SI, like IPL")
    if (args.train is None) != (args.test is None):
        raise InputError("--train and --test belong together: give both lists or none")
    if not (0 <= args.val_fraction < 1 and 0 <= args.test_fraction < 1 and args.val_fraction + args.test_fraction < 1):
        raise InputError("--val-fraction and --test-fraction: expected 0 up to below 1, and a sum below 1")
    if not 100 <= args.edge_mm <= 1000:
        raise InputError(f"--edge-mm is {args.edge_mm:g}; expected 100 to 1000")


def _check_output(output, settings, wanted):
    """What is there is kept only where it was read in the same way and is part of this split."""
    path, there = Path(output) / SETTINGS, {file.name for file in Path(output).glob("*.nii.gz")}
    if path.exists() and read_json(path) != settings:
        before = shown(read_json(path))
        raise InputError(f"{path}: CTs there were read with {before}, now {settings}; choose another --output")
    others = sorted(there - {f"{scan}.nii.gz" for scan in wanted} if path.exists() else there)
    if others:
        raise InputError(f"{output}: holds CTs that are not of this command ({_some(others)}); choose another --output")
    write_json(path, settings)


def main(argv=None) -> int:
    args = parse_args(argv)
    _check_args(args)
    _import_h5py()  # before anything is written
    found = find_h5(args.input)
    others = other_h5(args.input, found)
    lists = (read_list(args.train), read_list(args.test)) if args.train else (None, None)
    split, notes = make_split(found, *lists, args.val_fraction, args.test_fraction, args.seed)
    wanted = sorted(scan for name in SPLITS for scan in split[name])
    if not wanted:
        raise InputError(f"{args.input}: none of its {len(found)} scans stands in {args.train} or {args.test}")
    for note in notes:
        print(f"note: {note}")
    settings = {"axes": args.axes, "offset": args.offset, "edge_mm": args.edge_mm}
    files = {scan: found[scan] for scan in wanted}
    try_axes(files.values(), **settings)
    _check_output(args.output, settings, wanted)
    failures, tally = convert(files, args.output, **settings)
    split = {name: [scan for scan in split[name] if scan not in failures] for name in SPLITS}
    write_json(args.output / SPLIT, split)
    print(f"orientation by anatomy: {_counts(tally)}")
    counts = ", ".join(f"{len(split[name])} {name}" for name in SPLITS)
    print(f"{len(wanted) - len(failures)} CTs ({counts}) in {args.output}, the split in {args.output / SPLIT}")
    for scan, problem in failures.items():
        print(f"failed: {scan}: {problem}")
    for path in others:
        print(f"left out: {path}: expected SCAN/{H5_NAME} or SCAN_{H5_NAME}, once for each scan")
    return 1 if failures or others else 0


if __name__ == "__main__":
    run_cli(main)
