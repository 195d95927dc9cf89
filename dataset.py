"""The patient-folder data set: ``ROOT/ID/{ID.nii.gz, ID_pa_drr.png, ID_lat_drr.png}`` (other names: patient_files.py).

    python dataset.py --check data                      # is it what its manifest says, and the right way round?
    python dataset.py --check data --json report.json

Prepared by ``prepare_data.py`` (then ``ROOT/dataset.json`` says how) or made by hand (then stated
defaults hold, with a warning). Disk is read once: volumes and X-rays are cached at the resolution in
use, as memory-mapped arrays under ``ROOT/.cache`` (or ``cache_dir``), so that no gzip is read in training.
"""

from __future__ import annotations

import xray2ct.installed  # noqa: F401  (first: says what is missing)

# isort: split
import hashlib
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from xray2ct.command_line import Parser
from xray2ct.conventions import MANIFEST, REAL_XRAYS
from xray2ct.data.cache import UNREADABLE, complete, open_cached, write_cached
from xray2ct.data.manifest import Manifest, check_patients, find_patients
from xray2ct.data.patient_files import HEADERS, PatientFolder, some, visible
from xray2ct.data.splits import SPLITS, split_hash
from xray2ct.files import InputError, run_cli
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.lifting import averaged_to
from xray2ct.geometry.projector import HU_WINDOW, hu_to_unit
from xray2ct.imaging.body import patient_mask
from xray2ct.imaging.cube import cube_affine
from xray2ct.imaging.cube_files import read_array_cube, read_cube
from xray2ct.imaging.film import check_views
from xray2ct.imaging.read_films import read_films

CACHE_VERSION = 4  # raised when the cached arrays' meaning or values change
RENDER_SIZE = 512  # pixels per edge of a missing X-ray before it is averaged to the size in use


# ------------------------------------------------------------------------------------------------
# Data set


class PatientDataset(Dataset):
    """Patients of one split as ``{"id", "xrays", "ct_volume", "mask", "affine"}``; ``"body"``, ``"seen"`` on demand.

    xrays ``(2, xray_size, xray_size)`` float32 in [0, 1] (left out with ``xray_size=None``);
    ct_volume ``(1, N, N, N)`` float32, ``hu_window`` mapped to [0, 1]; mask ``(1, N, N, N)``
    float32, 1 inside the scan; body ``(1, N, N, N)`` uint8, 1 in the patient (:func:`body.patient_mask`);
    affine ``(4, 4)`` of ``ct_volume`` as stored in NIfTI (W, H, D); seen: of the X-rays' shape, float32, how much of
    each pixel its file shows, 1 where the X-ray is rendered (:class:`read_xray.XrayImage`).

    split: "train", "val", "test" or "all". max_patients: the first so many (by id), or with ``subset_seed`` in an order
    drawn from it: subsets of one seed are nested.
    hu_window: another window than the data set's own. xray_normalization: for X-rays of a data set
    without manifest (see :func:`read_films.read_films`). raw: leave ct_volume as uint16 (65535 = 1) and
    mask as uint8, to be converted on the device. with_mask: False leaves the mask out. body: whether ``"body"`` is
    wanted; seen: whether ``"seen"`` is, next to the X-rays. xrays: ``"drr"`` for the X-rays that belong to the volume,
    ``"scout"`` or ``"film"`` for real ones of the same patient (``ID_pa_scout.png``): patients without both views are
    left out, and named by ``without_xrays``; scouts have the data set's scale, films are read by
    :func:`read_films.read_films`. scanned: a data set of the same root whose look at all its folders serves this one,
    too.
    Raises :class:`InputError` naming file or folder for anything unusable.
    """

    def __init__(
        self,
        root,
        split: str = "train",
        volume_size: int = 64,
        xray_size: int | None = 512,
        cache_dir=None,
        max_patients: int | None = None,
        hu_window=None,
        xray_normalization: str = "auto",
        raw: bool = False,
        with_mask: bool = True,
        body: bool = False,
        xrays: str = "drr",
        seen: bool = False,
        scanned: PatientDataset | None = None,
        subset_seed: int | None = None,
    ):
        self.root = Path(root)
        patients, manifest = self._folders = scanned._folders if scanned else _scan(self.root)
        if not manifest.present and scanned is None:
            rendered = [p.id for p in patients.values() if None in p.xrays]
            missing = f"missing ones rendered ({some(rendered)})" if rendered else "none missing"
            warnings.warn(
                f"{self.root} has no {MANIFEST}: assuming {manifest.geometry}; HU window {list(HU_WINDOW)}; X-rays"
                f" normalised by {xray_normalization!r}, {missing}; split by hash of the patient's id",
                stacklevel=2,
            )
        self.has_manifest = manifest.present
        self.geometry, self.xray_scale, self.cube_size = (
            manifest.geometry,
            manifest.xray_scale,
            manifest.cube_size,
        )
        self._geometry = manifest.geometry.to_dict()  # made once: part of every cache key
        self.hu_window = tuple(hu_window or manifest.hu_window)
        self.splits = manifest.split
        self.non_commercial = manifest.non_commercial
        self.split_hash = split_hash(manifest.split)
        if split not in (*SPLITS, "all"):
            raise InputError(f"split is {split!r}; expected one of {', '.join(SPLITS)}, all")
        ids = sorted(patients) if split == "all" else manifest.split[split]
        self.xrays = xrays
        self.without_xrays = self._without_xrays(ids, patients)
        ids = [patient for patient in ids if patient not in self.without_xrays]
        self.ids = chosen_patients(ids, max_patients, subset_seed)
        if not self.ids:
            raise InputError(f"{self.root}: the {split} split is empty ({len(patients)} patients in all)")
        made_here = (manifest.present and xrays == "drr") or xrays == "scout"
        # Prepared films have the data set's scale, and a mark that says so, which "auto" knows.
        self._normalization = "manifest" if made_here else "auto" if xrays == "film" else xray_normalization
        self.volume_size, self.xray_size = int(volume_size), xray_size
        self.raw, self.with_mask, self.body, self.seen = raw, with_mask, body, seen
        if self.cube_size % self.volume_size:
            raise InputError(f"volume size {volume_size} does not divide the data set's cube of {self.cube_size}")
        self.cache = Path(cache_dir) if cache_dir else self.root / ".cache"

    def _without_xrays(self, ids, patients) -> list[str]:
        if self.xrays == "drr":
            return []
        if self.xrays not in REAL_XRAYS:
            raise InputError(f"X-rays are {self.xrays!r}; expected drr, {', '.join(REAL_XRAYS)}")
        missing = [patient for patient in ids if None in patients[patient].real[self.xrays]]
        if ids and len(missing) == len(ids):
            names = " and ".join(f"ID{name}.png" for name in REAL_XRAYS[self.xrays])
            raise InputError(f"{self.root}: none of {len(ids)} patients has {names}; see docs/real_xrays.md")
        return missing

    @property
    def _patients(self) -> dict[str, PatientFolder]:
        return self._folders[0]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def acquisition(self) -> Acquisition:
        """What X-rays of these volumes are rendered with."""
        return Acquisition(self.geometry, self.hu_window, self.xray_scale)

    def split_of(self, patient: str) -> str:
        """Name of the split a patient belongs to."""
        return next(name for name, ids in self.splits.items() if patient in ids)

    def xray_files(self, index: int) -> tuple[Path | None, Path | None]:
        """Where a patient's PA and lateral X-ray are; None for one that is rendered."""
        return self._patients[self.ids[index]].xrays

    def __getitem__(self, index: int) -> dict:
        patient = self._patients[self.ids[index]]
        volume, mask, affine = self._volume(patient)
        volume = torch.from_numpy(np.array(volume))[None]
        item = {
            "id": patient.id,
            "ct_volume": volume if self.raw else volume.float().div_(65535.0),
            "affine": torch.from_numpy(np.array(affine)),
        }
        if self.with_mask:
            mask = torch.from_numpy(np.array(mask))[None]
            item["mask"] = mask if self.raw else mask.float()
        if self.body:
            item["body"] = torch.from_numpy(np.array(self._body(patient)))[None]
        if self.xray_size is not None:
            for name, array in self._xrays(patient).items():
                item[name] = torch.from_numpy(array.astype(np.float32)).div_(np.iinfo(array.dtype).max)
        return item

    def build_cache(self, rank: int = 0, world_size: int = 1, progress=None) -> None:
        """Fill the cache for every ``world_size``-th patient; a barrier afterwards makes it whole.

        progress: wraps the iterable of indices (such as ``tqdm``).
        """
        indices = range(rank, len(self), world_size)
        for index in progress(indices) if progress else indices:
            patient = self._patients[self.ids[index]]
            if not all(complete(*entry) for entry in self._entries(patient)):
                self._volume(patient)
                if self.body:
                    self._body(patient)
                if self.xray_size is not None:
                    self._xrays(patient)

    # -- cached arrays ---------------------------------------------------------------------------

    def _entry(self, patient: PatientFolder, name: str, shape, sources) -> Path:
        """Where an array of the cache lies.

        The key covers the source files' size and time, so that a changed source is read anew. Two
        ranks that build the same entry write the same bytes, each under its own temporary name.
        """
        stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _files_of(sources)]
        settings = [CACHE_VERSION, name, list(shape), self._geometry, self.hu_window, self._normalization]
        key = hashlib.sha256(json.dumps([settings, stamps], sort_keys=True).encode()).hexdigest()[:16]
        return self.cache / patient.id / f"{name}-{key}.npy"

    def _entries(self, patient: PatientFolder):
        """``(path, shape, dtype)`` of all arrays of a patient, to see whether they are there without reading them."""
        for name, shape, dtype in self._volume_arrays():
            yield self._entry(patient, name, shape, patient.volume_files), shape, dtype
        if self.body:
            name, shape = f"body{self.volume_size}", (self.volume_size,) * 3
            yield self._entry(patient, name, shape, [patient.volume]), shape, np.uint8
        if self.xray_size is not None:
            for name, shape, dtype, sources in self._xray_arrays(patient).values():
                yield self._entry(patient, name, shape, sources), shape, dtype

    def _volume_arrays(self):
        size = self.volume_size
        cube = (size, size, size)
        return (
            (f"volume{size}", cube, np.uint16),
            (f"mask{size}", cube, np.uint8),
            (f"affine{size}", (4, 4), np.float64),
        )

    def _cached(self, patient: PatientFolder, name: str, shape, dtype, sources, make):
        """Memory-map an array of the cache; make it when it is absent, stale or damaged (with a warning)."""
        path = self._entry(patient, name, shape, sources)
        array = open_cached(path, tuple(shape), dtype)
        if array is None:
            array = np.ascontiguousarray(self._made(patient, sources, make), dtype=dtype)
            write_cached(path, array)
        return array

    def _made(self, patient: PatientFolder, sources, make):
        """What ``make`` reads; whatever goes wrong in it names the patient and the files."""
        try:
            return make()
        except InputError as error:
            raise InputError(f"patient {patient.id}: {error}") from None
        except UNREADABLE as error:
            files = ", ".join(str(path) for path in sources)
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            raise InputError(f"patient {patient.id}: {files}: could not be read ({what})") from error

    def _volume(self, patient):
        sources, made = patient.volume_files, {}

        def make(part):
            if not made:
                made.update(self._read_volume(patient))
            return made[part]

        return tuple(
            self._cached(patient, name, shape, dtype, sources, partial(make, name.removesuffix(str(self.volume_size))))
            for name, shape, dtype in self._volume_arrays()
        )

    def _read_volume(self, patient) -> dict[str, np.ndarray]:
        """Window first, then average: the mean of clipped values, as the multi-scale target has it."""
        hu, mask, affine = self._read_cube(patient)
        unit = torch.from_numpy(hu_to_unit(hu, self.hu_window))
        factor = self.cube_size // self.volume_size
        pooled = torch.nn.functional.avg_pool3d(unit[None, None], factor)[0, 0].numpy()
        share = torch.nn.functional.avg_pool3d(torch.from_numpy(mask).float()[None, None], factor)[0, 0].numpy()
        centre = affine @ np.array([*[(self.cube_size - 1) / 2] * 3, 1.0])
        return {
            "volume": np.round(pooled * 65535.0).astype(np.uint16),
            "mask": (share >= 0.5).astype(np.uint8),
            "affine": cube_affine(centre[:3], self.geometry.fov_mm, self.volume_size),
        }

    def _body(self, patient):
        size = self.volume_size

        def make():
            body = patient_mask(self._read_cube(patient)[0], self.geometry.fov_mm / self.cube_size)
            share = torch.from_numpy(body).float()[None, None]
            return (torch.nn.functional.avg_pool3d(share, self.cube_size // size)[0, 0].numpy() >= 0.5).astype(np.uint8)

        return self._cached(patient, f"body{size}", (size, size, size), np.uint8, [patient.volume], make)

    def _read_cube(self, patient):
        """HU ``(D, H, W)`` float32, scan mask uint8 and affine at the data set's full resolution."""
        if patient.volume.suffix.lower() == ".npy":
            return read_array_cube(patient.volume, self.geometry.fov_mm, self.cube_size)
        return read_cube(patient.volume, self.geometry.fov_mm, self.cube_size)

    def _xray_arrays(self, patient) -> dict[str, tuple]:
        """Name, shape, dtype and sources of the X-rays in use, and of what they show where that is wanted."""
        kind, size = "xrays" if self.xrays == "drr" else self.xrays, self.xray_size
        shape, sources = (2, size, size), self._xray_files(patient, patient.xray_sources)
        arrays = {"xrays": (f"{kind}{size}", shape, np.uint16, sources)}
        return arrays | {"seen": (f"{kind}_seen{size}", shape, np.uint8, sources)} if self.seen else arrays

    def _xray_files(self, patient, own):
        return own if self.xrays == "drr" else patient.real[self.xrays]

    def _xrays(self, patient) -> dict[str, np.ndarray]:
        made = {}

        def make(part):
            if not made:
                made.update(self._read_xrays(patient, self.xray_size))
            return made[part]

        arrays = self._xray_arrays(patient)
        return {part: self._cached(patient, *about, partial(make, part)) for part, about in arrays.items()}

    def _read_xrays(self, patient, size: int) -> dict[str, np.ndarray]:
        paths = self._xray_files(patient, patient.xrays)
        pair = read_films(tuple(paths), self._normalization, size, self.geometry)
        if not self.has_manifest:
            for note in pair.notes:
                warnings.warn(note, stacklevel=2)
        images = [None if xray is None else xray.pixels for xray in pair.views]
        seen = [np.ones((size, size)) if xray is None else xray.seen for xray in pair.views]
        if None in paths:
            hu = self._read_cube(patient)[0]
            volume = torch.from_numpy(hu_to_unit(hu, self.hu_window))[None, None]
            rendered = self.acquisition.render(volume, (max(RENDER_SIZE, size),) * 2)
            rendered = averaged_to(rendered, (size, size))[0].clip(0, 1).numpy()
            images = [rendered[view] if image is None else image for view, image in enumerate(images)]
            if not pair.films:
                names = [str(path or f"{patient.id} (rendered)") for path in paths]
                check_views(images[0], images[1], names)
        return {
            "xrays": np.round(np.stack(images) * 65535.0).astype(np.uint16),
            "seen": np.round(np.stack(seen) * 255.0).astype(np.uint8),
        }


def _scan(root: Path) -> tuple[dict[str, PatientFolder], Manifest]:
    """All patients' folders, checked, and the manifest; of 25,000 patients this takes seconds."""
    patients = find_patients(root)
    manifest = Manifest(root, patients)
    check_patients(patients, root)
    return patients, manifest


def chosen_patients(ids, count: int | None, seed: int | None) -> list[str]:
    """The first ``count`` ids (None: all), with a seed by the hash of seed and id, whatever other ids there are."""

    def place(patient: str) -> bytes:
        return hashlib.sha256(f"{seed}:{patient}".encode()).digest()

    chosen = set((ids if seed is None else sorted(ids, key=place))[:count])
    return [patient for patient in ids if patient in chosen]


def _files_of(sources) -> list[Path]:
    """The files themselves: those of a DICOM folder, and with a header (``.mhd``) all files next to it."""
    files = []
    for path in sources:
        folder = path if path.is_dir() else path.parent if path.suffix.lower() in HEADERS else None
        files += [path] if folder is None else [p for p in visible(folder) if p.is_file()]
    return files


def mean_volume(dataset: PatientDataset) -> torch.Tensor:
    """Voxel-wise mean over a data set's volumes ``(1, N, N, N)``: the predictor every model must beat."""
    total = torch.zeros(1, *[dataset.volume_size] * 3, dtype=torch.float64)
    for index in range(len(dataset)):
        total += dataset[index]["ct_volume"].double()
    return (total / len(dataset)).float()


# ------------------------------------------------------------------------------------------------
# Command line


def main(argv=None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--check", type=Path, required=True, metavar="ROOT", help="data set to check")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")
    args = parser.parse_args(argv)
    from xray2ct.data.checks.dataset_check import check_command

    return check_command(args.check, args.json)


if __name__ == "__main__":
    run_cli(main)
