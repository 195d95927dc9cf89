"""Names and numbers that every part agrees on: files of a data set, suffixes, views, HU of air."""

from __future__ import annotations

from pathlib import Path

AIR_HU = -1024  # also everything outside the scan
MAX_HU = 3071  # end of the 12-bit scale; metal above it carries no information
SUFFIXES = {".nii.gz": "nifti", ".nii": "nifti", ".mhd": "image", ".mha": "image", ".nrrd": "image", ".nhdr": "image"}
# Files that may well hold a CT, in formats that are not read: reported by name.
_OTHER_VOLUMES = (
    ".hdr .img .hdr.gz .img.gz .raw .zraw .raw.gz .mha.gz .nrrd.gz .dcm.gz .gipl .gipl.gz .mnc .mgh .mgz .mif .mih "
    ".vtk .vti .par .rec .ima .dcm .dicom .dic .h5 .hdf5 .npy .npz .mat .vol .mrc .zip .tar .tgz .tar.gz .7z .rar "
    ".bz2 .xz .zst"
)
OTHER_VOLUMES = frozenset(_OTHER_VOLUMES.split())


def suffix_of(path) -> str:
    """The suffix in lower case, ``.nii.gz`` and its like whole."""
    name = (path if isinstance(path, Path) else Path(path)).name.lower()
    stem, last = _split(name)
    both = _split(stem)[1] + last
    return both if both in SUFFIXES or both in OTHER_VOLUMES else last


def _split(name: str) -> tuple[str, str]:
    """As ``Path(name).stem`` and ``.suffix``, which cost five times as much: a large data set asks this often."""
    dot = name.rfind(".")
    return (name[:dot], name[dot:]) if 0 < dot < len(name) - 1 else (name, "")


PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
DICOM_SUFFIXES = (".dcm", ".dicom")  # DICOM files without any suffix are known by their content
XRAY_SUFFIXES = (*PICTURES, ".npy", *DICOM_SUFFIXES)
VOLUME_SUFFIXES = (*SUFFIXES, ".npy")
VIEW_NAMES = (("_pa_drr", "_pa", "_frontal"), ("_lat_drr", "_lat", "_lateral"))
# Real X-rays of a patient next to the rendered ones, by kind: scouts of the CT's session, films.
REAL_XRAYS = {"scout": ("_pa_scout", "_lat_scout"), "film": ("_pa_film", "_lat_film")}
VIEW_LABELS = ("PA", "lateral")
OTHER_PICTURES = (".gif", ".webp", ".jp2", ".j2k", ".heic", ".avif", ".tga", ".pgm", ".ppm")  # no reader for these
MANIFEST = "dataset.json"
MANIFEST_VERSION = 1
CUBE_SIZE = 256  # resolution at which a CT without a manifest is sampled
RECORD = "prepared.json"
