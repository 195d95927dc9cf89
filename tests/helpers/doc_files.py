"""Tiny files under the names that the pages' commands give: made once, copied where a command names one."""

from __future__ import annotations

import re
import shutil
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

import evaluate
from tests.helpers.ct_cases import grid_affine, save_nifti
from tests.helpers.paths import ROOT
from tests.helpers.tiny_cascade import make_cascade
from tests.helpers.tiny_data import make_checkpoint, make_dataset, make_hu, make_refinement_checkpoint
from tests.helpers.xray_cases import write_dicom
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import write_json
from xray2ct.imaging.read_ct import CtImage
from xray2ct.weights_file import write_weights

TRAINED_ON = "somebody"  # no patient of the data: any of them may be scored
WRITTEN = ("--output", "--checkpoint-dir", "--std", "--save-std", "--huggingface", "--local-dir")
# CTs as public collections name them, by the name of their folder; two of them are of one patient.
COLLECTIONS = {
    "LIDC": [f"LIDC-IDRI-000{patient}/{series}.nii.gz" for patient, series in ((1, "a"), (1, "b"), (2, "c"), (3, "d"))],
    "dataset": [f"{scan}_1.nii.gz" for scan in ("train_1_a", "valid_1_a", "valid_1_b", "valid_2_a")],  # of CT-RATE
}
LICENCES = f"id,collection,patient,licence,doi\n{TRAINED_ON},lidc_idri,LIDC-IDRI-0001,CC BY 3.0,10.7937/x\n"


class Files:
    """Sources in ``folder``; :meth:`provide` copies what a command reads into the current folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def copy_weights(self, target: Path) -> Path:
        """A folder of weights in ``target``: the shipped ones' names, and stage 2 as mine."""
        if not self.weights.exists():
            stages = {"chest64": self.base, "chest64-film": self.base, "chest256": self.refinement}
            for name, path in (stages | {"mine": self.refinement}).items():
                about = {"name": name}
                write_weights(self.weights / f"{name}.safetensors", load_checkpoint(path), "float32", about)
        return Path(shutil.copytree(self.weights, target / "weights"))

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @cached_property
    def data(self) -> Path:
        return make_dataset(self.folder / "data")

    @cached_property
    def base(self) -> Path:
        return make_checkpoint(self.folder / "base.pt", self.data, train_patients=[TRAINED_ON])

    @cached_property
    def refinement(self) -> Path:
        return make_refinement_checkpoint(
            self.folder / "refinement.pt", self.data, self.base, train_patients=[TRAINED_ON]
        )

    @cached_property
    def cascade(self) -> Path:
        changes = {index: {"train_patients": [TRAINED_ON]} for index in range(2)}
        return make_cascade(self.folder / "cascade", self.data, changes=changes)

    @cached_property
    def cts(self) -> Path:
        """Three CTs of 32^3 voxels, axes right to left, front to back, head to feet."""
        for seed in range(3):
            hu = make_hu(seed, 32).transpose(2, 1, 0)
            affine = grid_affine(hu.shape, 360 / 32) @ np.diag([-1.0, -1.0, -1.0, 1.0])
            affine[:3, 3] *= -1
            save_nifti(self.folder / "cts" / f"p{seed}.nii.gz", CtImage(hu, affine, "thorax"))
        return self.folder / "cts"

    def collection(self, name: str) -> Path:
        """CTs under the names of a public collection."""
        ct = next(self.cts.iterdir())
        for scan in COLLECTIONS[name]:
            (self.folder / name / scan).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ct, self.folder / name / scan)
        return self.folder / name

    @cached_property
    def split(self) -> Path:
        write_json(self.folder / "split.json", {"train": ["p0"], "val": ["p1"], "test": ["p2"]})
        return self.folder / "split.json"

    @cached_property
    def licences(self) -> Path:
        (self.folder / "licences.csv").write_text(LICENCES)
        return self.folder / "licences.csv"

    @cached_property
    def scores(self) -> Path:
        """Scores of stage 1 and of the mean volume, patient by patient."""
        words = ["--data", self.data, "--base", self.base, "--pictures", "0"]
        output = self.folder / "scores"
        assert evaluate.main([*map(str, words), "--output", str(output), "--device", "cpu"]) == 0
        return output / "per_patient.csv"

    @cached_property
    def dicom(self) -> Path:
        pixels = np.asarray(Image.open(self.xray("pa"))).astype(np.uint16) >> 4
        return write_dicom(self.folder / "PA.dcm", pixels)

    def xray(self, view: str) -> Path:
        return self.data / "p4" / f"p4_{view}_drr.png"

    def source_of(self, option: str, word: str) -> Path | None:
        """What stands for ``word``, the value of ``option`` ("" for none); None for what is no file."""
        name = PurePosixPath(word).name
        views = {"PA.png": "pa", "LATERAL.png": "lat", "LAT.png": "lat"}
        if option == "--data":
            return self.data
        if name == "quick_2stage" or (option in ("--cascade", "--checkpoint") and not PurePosixPath(word).suffix):
            return self.cascade
        if option == "--input":
            return self.cts
        if option == "" and name in COLLECTIONS:
            return self.collection(name)
        if name == "PA.dcm":
            return self.dicom
        if name in views:
            return self.xray(views[name])
        if name.endswith(".pt"):
            return self.refinement if "refinement" in name else self.base
        if name == "per_patient.csv":
            return self.scores
        if name == "licences.csv":
            return self.licences
        return self.split if re.fullmatch(r"(\w+_)?split\.json", name) else None

    def provide(self, arguments: list[str], folder: str) -> None:
        """Copy every file that the arguments name, and that is not there yet, into the current folder.

        folder: of the repository, whose own files (configurations) go before.
        """
        for option, word in zip(["", *arguments], arguments):
            own, path = ROOT / folder / word, Path(word)
            if option in WRITTEN or word.startswith("-") or path.exists() or path.is_absolute():
                continue
            source = own if own.is_file() else self.source_of(option, word)
            if source is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, path)
