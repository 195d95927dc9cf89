"""Read one CT from a folder of DICOM files: single slices and multi-frame files take the same path.

Needs pydicom (compressed pixels may need SimpleITK, too). Every frame is placed by its own position, orientation and
spacing and scaled by its own slope and intercept; frames that do not stack into one evenly spaced volume of one scan
are refused. Header texts never get into a message.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xray2ct.files import InputError, shown_name
from xray2ct.imaging.ct_checks import check_voxels
from xray2ct.imaging.dicom_files import is_dicom, reading
from xray2ct.imaging.dicom_pixels import stored_frames
from xray2ct.imaging.optional import import_pydicom

MIN_SERIES_SLICES = 8  # where a folder holds several series, a shorter one is a localiser
MAX_DRIFT_MM = 0.5  # a slice's distance from its place on the regular grid; at most a quarter of a step, too
PADDING_HU = -2000  # what pixels become that the header says are padding: far below air, hence outside the scan
CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
DEFLATED = b"1.2.840.10008.1.2.1.99"
RESCALE_TYPES = ("HU", "HU_MOD", "US", "")  # US: unspecified
# What all frames of one scan share, and the functional group that holds it in multi-frame files.
SAME = {
    "PatientID": None,
    "FrameOfReferenceUID": None,
    "PatientPosition": None,
    "ImageType": None,
    "FrameType": "CTImageFrameTypeSequence",
    "ConvolutionKernel": "CTReconstructionSequence",
    "KVP": "CTXRayDetailsSequence",
    "AcquisitionNumber": None,
    "FrameAcquisitionNumber": "FrameContentSequence",
    "TemporalPositionIdentifier": None,
    "TemporalPositionIndex": "FrameContentSequence",
    "EchoNumbers": None,
    "StackID": "FrameContentSequence",
    "NominalPercentageOfCardiacPhase": "CardiacSynchronizationSequence",
}
ONE_EACH = ("AcquisitionNumber", "FrameAcquisitionNumber")  # step and shoot: every slice may have its own
# Files that may lie in a folder of slices: notes, tables, pictures, viewers, and volumes, which are CTs of their own.
_NO_SLICES = (
    ".txt .csv .tsv .json .xml .html .htm .css .js .pdf .md .rtf .doc .docx .xls .xlsx .ppt .pptx .log .yaml .yml "
    ".jpg .jpeg .png .gif .bmp .tif .tiff .svg .ico .mp4 .avi .db .ini .inf .url .lnk .exe .dll .jar .bat .cmd .sh "
    ".py .md5 .sha1 .sha256 .sha512 .nii .gz .mhd .mha .raw .zraw .nrrd .nhdr .hdr .img .npy .npz .zip .mnc .gipl"
)
NO_SLICES = frozenset(_NO_SLICES.split())
NO_SLICE_NAMES = ("DICOMDIR", "LICENSE", "README", "VERSION", "LOCKFILE")


@dataclass(frozen=True)
class Frame:
    """One slice; lengths in mm, LPS. ``spacing``: between rows, between columns; ``number`` counts from 0."""

    path: Path
    number: int
    of: int
    position: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    size: tuple[int, int]
    slope: float
    intercept: float
    same: dict[str, str]

    def __str__(self):
        return self.path.name if self.of == 1 else f"frame {self.number + 1} of {self.path.name}"


def may_lie_with_slices(path) -> bool:
    """True for a file that is no slice by its name, so that it may lie in a folder of DICOM files."""
    name = Path(path).name
    return name.startswith(".") or name.upper() in NO_SLICE_NAMES or Path(name).suffix.lower() in NO_SLICES


def read_header(path, tags=None):
    """pydicom's dataset of a file without its pixels (``tags``: only these); InputError when it cannot be read."""
    pydicom = import_pydicom(path)
    with reading(path):
        with open(path, "rb") as stream:
            if DEFLATED in stream.read(2048):
                raise InputError(f"{path}: a deflated DICOM file; expected one that is not (dcmconv +te)")
        return pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)


def read_series(folder):
    """The one CT in a folder of DICOM files: ``(data, affine, notes)``.

    data: HU by (column, row, slice), int16 (clipped to its range) or, where slopes are no whole numbers, float32.
    affine: 4 x 4 from indices to LPS mm. notes: images of short other series (localisers), which are left out.
    Raises InputError naming the folder or file: no or several series, a file that is no DICOM or cannot be read, not
    CT, more voxels than a CT has, geometry that is missing, contradicts itself or differs between slices, gaps, slices
    more than MAX_DRIFT_MM off the regular grid, frames of several acquisitions, phases or kernels.
    """
    folder = Path(folder)
    names, notes = _choose(folder, _headers(folder))
    frames = [frame for path, header in names.items() for frame in guarded(path, _frames, header)]
    frames, affine = _stack(folder, frames)
    check_voxels(folder, len(frames) * frames[0].size[0] * frames[0].size[1])
    whole = all(frame.slope == int(frame.slope) and frame.intercept == int(frame.intercept) for frame in frames)
    volume = np.empty((len(frames), *frames[0].size), dtype=np.int16 if whole else np.float32)
    by_path = defaultdict(list)
    for k, frame in enumerate(frames):
        by_path[frame.path].append((k, frame))
    for path, members in by_path.items():
        guarded(path, _fill, volume, members)
    return volume.T, affine, notes


def guarded(path, work, *arguments):
    """``work(path, ...)``; what pydicom raises in it becomes an InputError, see :func:`dicom_files.reading`."""
    with reading(path):
        return work(path, *arguments)


# ------------------------------------------------------------------------------------------------
# Files of a folder


def _headers(folder):
    """``{path: header}`` of all DICOM files in ``folder``; refuses what is neither DICOM nor anything known."""
    headers, strange = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.name.upper() in NO_SLICE_NAMES:
            continue
        try:
            if is_dicom(path):
                headers[path] = read_header(path)
            elif not may_lie_with_slices(path):
                strange.append(path.name)
        except OSError as error:
            if not may_lie_with_slices(path):
                raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not headers:
        raise InputError(f"{folder}: no DICOM files in it; expected a folder with one CT series")
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise InputError(
            f"{folder}: {', '.join(strange[:3])}{more}: no DICOM (empty, damaged or something else), though beside"
            " DICOM files; copy again or take away"
        )
    return headers


def _choose(folder, headers):
    """``({path: header} of the one series, notes)``."""
    series = defaultdict(dict)
    for path, header in headers.items():
        if guarded(path, _get, header, "Rows") is not None:  # else a report, a plan, ...
            series[str(guarded(path, _get, header, "SeriesInstanceUID"))][path] = header
    counts = {uid: sum(guarded(path, _count, members[path]) for path in members) for uid, members in series.items()}
    large = [uid for uid in series if counts[uid] >= MIN_SERIES_SLICES] if len(series) > 1 else list(series)
    if len(large) != 1:
        examples = ", ".join(f"{next(iter(series[uid])).name} ({counts[uid]} slices)" for uid in large[:3])
        raise InputError(
            f"{folder}: {len(large)} DICOM series of {MIN_SERIES_SLICES} or more slices"
            f"{f', of files such as {examples}' if examples else ''};"
            " expected one per folder: put each CT into its own folder"
        )
    rest = [path.name for uid in series if uid != large[0] for path in series[uid]]
    notes = [f"left out {len(rest)} images of short series beside the CT (localisers?): {rest[0]}"] if rest else []
    return series[large[0]], notes


def _get(path, header, key):
    return header.get(key)


class SeriesInfo(NamedTuple):
    """Which series a file belongs to, how many frames it holds (0: no image), and whether they are slices of a CT."""

    uid: str
    frames: int
    is_ct: bool


def series_of(path) -> SeriesInfo:
    """What a DICOM file belongs to; CT images that say LOCALIZER are no slices. InputError when it cannot be read."""
    tags = ["SeriesInstanceUID", "SOPClassUID", "ImageType", "Rows", "NumberOfFrames"]

    def info(path, header):
        frames = 0 if header.get("Rows") is None else _count(path, header)
        slices = header.get("SOPClassUID") in CT_CLASSES and "LOCALIZER" not in (header.get("ImageType") or [])
        return SeriesInfo(str(header.get("SeriesInstanceUID") or ""), frames, bool(frames and slices))

    return guarded(path, info, read_header(path, tags))


def files_of_dicomdir(path) -> list[str]:
    """Relative paths (``DISK1/IM0001``) of the files that a DICOMDIR lists; InputError when it cannot be read."""

    def listed(path, header):
        names = [record.get("ReferencedFileID") for record in header.get("DirectoryRecordSequence") or []]
        return ["/".join([name] if isinstance(name, str) else name) for name in names if name]

    return guarded(path, listed, read_header(path))


def _count(path, header):
    count = int(header.get("NumberOfFrames") or 1)
    if count < 1:
        raise InputError(f"{path}: NumberOfFrames is {count}; expected 1 or more")
    return count


# ------------------------------------------------------------------------------------------------
# Frames of a file


def _frames(path, data) -> list[Frame]:
    """All frames of a file by its header; refuses other modalities and incomplete geometry."""
    modality = data.get("Modality") or ("CT" if data.get("SOPClassUID") in CT_CLASSES else None)
    if modality != "CT":
        raise InputError(f"{path.parent}: DICOM modality is {shown_name(str(modality)[:16])}; expected CT")
    if data.get("SamplesPerPixel", 1) != 1:
        raise InputError(f"{path}: {data.SamplesPerPixel} values per pixel; expected one (HU)")
    if not str(data.get("PhotometricInterpretation") or "MONOCHROME2").startswith(
        "MONOCHROME"
    ):  # 1 only shows inverted
        raise InputError(
            f"{path}: PhotometricInterpretation is not MONOCHROME2; expected one grey value (HU) per pixel"
        )
    if data.get("ModalityLUTSequence"):
        raise InputError(f"{path}: a ModalityLUTSequence; expected RescaleSlope and RescaleIntercept")
    count, groups = _count(path, data), data.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != count and (groups or count > 1):
        raise InputError(
            f"{path}: {count} frames, but {len(groups)} items in PerFrameFunctionalGroupsSequence; expected one each,"
            " or the frames' places are unknown"
        )
    _check_length(path, data, count)
    shared = list(data.get("SharedFunctionalGroupsSequence") or [])[:1]
    return [_frame(path, n, count, [*groups[n : n + 1], *shared], data) for n in range(count)]


def _check_length(path, data, count):
    syntax = getattr(data.file_meta, "TransferSyntaxUID", None) if hasattr(data, "file_meta") else None
    claimed = count * int(data.Rows) * int(data.Columns) * int(data.get("BitsAllocated", 16)) // 8
    if not (syntax and syntax.is_compressed) and path.stat().st_size < claimed:
        raise InputError(f"{path}: truncated (its pixels take {claimed} bytes, the file has less); copy it again")


def _frame(path, number, count, groups, data) -> Frame:
    def numbers(sequence, key, length):
        value = _value(path, groups, data, sequence, key)
        if value is None:
            raise InputError(f"{path}: no {key}; the slice cannot be placed")
        value = np.array(value, dtype=np.float64).ravel()
        if value.shape != (length,) or not np.isfinite(value).all():
            raise InputError(f"{path}: {key} is not {length} numbers")
        return value

    axes = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 2e-3:
        raise InputError(f"{path}: ImageOrientationPatient is not two perpendicular directions of length 1")
    spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    if spacing.min() <= 0:
        raise InputError(f"{path}: PixelSpacing (spacing) is {spacing.tolist()}; expected lengths above 0 mm")
    slope, intercept = _rescale(path, groups, data)
    same = {key: _value(path, groups, data, sequence, key) for key, sequence in SAME.items()}
    if same["ImageType"] is not None:
        same["ImageType"] = list(same["ImageType"])[:3]  # later values differ between slices of some scanners
    return Frame(
        path,
        number,
        count,
        numbers("PlanePositionSequence", "ImagePositionPatient", 3),
        axes,
        spacing,
        (int(data.Rows), int(data.Columns)),
        slope,
        intercept,
        {key: str(value) for key, value in same.items()},
    )


def _rescale(path, groups, data):
    keys = ("RescaleSlope", "RescaleIntercept", "RescaleType")
    slope, intercept, kind = (_value(path, groups, data, "PixelValueTransformationSequence", key) for key in keys)
    if (slope is None) != (intercept is None):
        raise InputError(f"{path}: only one of RescaleSlope and RescaleIntercept; expected both")
    if str(kind or "").strip().upper() not in RESCALE_TYPES:
        raise InputError(f"{path}: RescaleType is not HU; expected Hounsfield units")
    slope, intercept = (1.0, 0.0) if slope is None else (float(slope), float(intercept))
    if not (0 < abs(slope) < 1e6 and abs(intercept) < 1e6):
        raise InputError(f"{path}: RescaleSlope is {slope:g}, RescaleIntercept {intercept:g}; expected a slope, not 0")
    return slope, intercept


def _value(path, groups, data, sequence, key):
    """``key`` of a frame: in its own or the shared functional group ``sequence``, else of the file; None if nowhere."""
    items = [group.get(sequence) for group in groups] if sequence else []
    found = [item[0].get(key) for item in items if item]
    found = [value for value in found if value is not None and value != ""]
    if len(found) == 2 and str(found[0]) != str(found[1]):
        raise InputError(f"{path}: {key} stands in the shared and in a frame's own {sequence}; expected it once")
    value = found[0] if found else data.get(key)
    return None if value is None or value == "" else value


# ------------------------------------------------------------------------------------------------
# From frames to a volume


def _stack(folder, frames):
    """``(frames from the first slice to the last, affine in LPS mm)``; the step may be oblique (a tilted gantry)."""
    if len(frames) < 2:
        raise InputError(f"{folder}: a single slice; expected a 3D volume (one CT)")
    first = frames[0]
    for frame in frames:
        _check_alike(folder, first, frame)
    for key in SAME:
        values = [frame.same[key] for frame in frames]
        other = next((k for k, value in enumerate(values) if value != values[0]), None)
        if other is not None and not (key in ONE_EACH and len(set(values)) == len(values)):
            raise InputError(f"{folder}: {key} differs between {first} and {frames[other]}; expected one scan")
    normal = np.cross(*first.axes)
    frames = sorted(frames, key=lambda frame: float(normal @ frame.position))
    origins = np.array([frame.position for frame in frames])
    steps = np.diff(origins @ normal)
    if steps.min() < 1e-3:
        k = int(steps.argmin())
        raise InputError(
            f"{folder}: {frames[k]} and {frames[k + 1]} lie at the same position; expected one scan (are these two"
            " phases, or copies?)"
        )
    step = (origins[-1] - origins[0]) / (len(frames) - 1)
    off = np.linalg.norm(origins - origins[0] - np.outer(np.arange(len(frames)), step), axis=1)
    if off.max() > min(MAX_DRIFT_MM, np.median(steps) / 4):
        raise InputError(f"{folder}: {_uneven(frames, steps, off)}")
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([first.axes[0] * first.spacing[1], first.axes[1] * first.spacing[0], step])
    affine[:3, 3] = origins[0]
    return frames, affine


def _check_alike(folder, first, frame):
    edge = max(first.size)
    for text, differ in (
        ("Rows and Columns", frame.size != first.size),
        ("ImageOrientationPatient", np.abs(frame.axes - first.axes).max() > 1e-3),
        ("PixelSpacing", np.abs(frame.spacing - first.spacing).max() * edge > MAX_DRIFT_MM),
    ):
        if differ:
            raise InputError(f"{folder}: {text} differs between {first} and {frame}; expected one scan")


def _uneven(frames, steps, off):
    """Why slices are not on a regular grid: a gap, or else the slice that lies off furthest."""
    typical = float(np.median(steps))
    worst = int(np.abs(steps - typical).argmax())
    if abs(steps[worst] - typical) > 0.05 * typical:
        return (
            f"slice spacing is not uniform (mostly {typical:g} mm, but {steps[worst]:g} mm between slices {worst + 1}"
            f" and {worst + 2} of {len(frames)}); slices are missing or doubled"
        )
    worst = int(off.argmax())
    return (
        f"ImagePositionPatient of {frames[worst]} lies {off[worst]:.2f} mm from where equal steps from the first to"
        f" the last slice put it; expected at most {min(MAX_DRIFT_MM, typical / 4):g} mm"
    )


# ------------------------------------------------------------------------------------------------
# Pixels


def _fill(path, volume, members):
    """Put the frames of one file into ``volume`` (slice, row, column) in HU; members: ``[(slice, frame)]``."""
    data = import_pydicom(path).dcmread(path, force=True)
    stored, padding = stored_frames(path, data, (members[0][1].of, *volume.shape[1:]))
    kind = np.int64 if volume.dtype == np.int16 else np.float64
    for k, frame in members:
        hu = stored[frame.number] * kind(frame.slope) + kind(frame.intercept)
        hu = hu.clip(-32768, 32767) if kind is np.int64 else hu
        volume[k] = hu if padding is None else np.where(padding[frame.number], PADDING_HU, hu)
