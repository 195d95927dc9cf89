"""Checkpoints and a data set that revision 6c5bd58 wrote, before the package, still load and give the same volumes.

``expected.pt`` holds what that revision computed from them: stage 1's volume, and every fourth voxel of stage 2's.
"""

import shutil

import pytest
import torch

from dataset import PatientDataset
from reconstruct import load_pipeline
from tests.helpers.paths import ROOT
from xray2ct.data.checks.dataset_check import check_dataset
from xray2ct.data.checks.findings import FAILED

OLD = ROOT / "tests" / "data" / "revision_6c5bd58"


def test_both_stages_give_the_volumes_that_they_gave():
    system = load_pipeline(OLD / "base.pt", OLD / "refinement.pt", device="cpu").system
    expected = torch.load(OLD / "expected.pt", weights_only=True)
    xrays = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(3))
    assert (system.coarse(xrays) - expected["coarse"]).abs().max() < 1e-5
    assert (system.predict(xrays)[:, :, ::4, ::4, ::4] - expected["fine"]).abs().max() < 1e-5
    assert expected["coarse"].std() > 0.01


@pytest.fixture
def root(tmp_path):
    return shutil.copytree(OLD / "data", tmp_path / "data")


def test_the_data_set_is_read_and_sound(root):
    data = PatientDataset(root, "all", 16, 64)
    assert data.ids == ["p0", "p1", "p2"]
    assert all(item["xrays"].std() > 0.05 < item["ct_volume"].std() for item in (data[i] for i in range(3)))
    failed = [
        f for f in check_dataset(root) if f.status == FAILED and f.check in ("files", "checksums", "grid", "manifest")
    ]
    assert not failed
