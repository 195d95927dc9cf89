"""Both stages from two checkpoints: pairs that fit, tiles that change nothing, memory that runs out."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import reconstruct
from dataset import PatientDataset
from model_enhanced import RefinementNetwork
from tests.helpers.tiny_data import make_checkpoint, make_model, make_refinement_checkpoint
from xray2ct.files import InputError
from xray2ct.inference import reconstruction
from xray2ct.inference.predictor import CUBIC
from xray2ct.inference.system import DirectSystem, check_finite, pick_device
from xray2ct.models import memory
from xray2ct.models.upsampling import upsample_spline


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base.pt", root)


@pytest.fixture(scope="module")
def refinement(root, base, tmp_path_factory):
    return make_refinement_checkpoint(tmp_path_factory.mktemp("refinement") / "refinement.pt", root, base)


@pytest.fixture(scope="module")
def xrays(root):
    return PatientDataset(root, "test", 16, 64)[0]["xrays"][None]


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "meta", "gpu", ""])
def test_a_device_that_is_not_supported_is_one_sentence(base, name):
    with pytest.raises(InputError, match=f"^--device {name}: expected auto, cpu or cuda"):
        DirectSystem(base, device=name)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="--device cuda:2: there are 2 GPUs"):
        pick_device("cuda:2")


class TestSystem:
    def test_it_is_the_refinement_of_the_coarse_volume(self, base, refinement, xrays):
        system = DirectSystem(base, refinement, "cpu")
        coarse = system.coarse(xrays)
        with torch.no_grad():
            expected = system.refinement(coarse, xrays)
        assert system.volume_size == (64, 64, 64)
        assert torch.allclose(system.predict(xrays), expected, atol=1e-6)
        assert (expected - F.interpolate(coarse, scale_factor=4, mode="trilinear")).abs().max() > 1e-3
        assert system.notes == []

    def test_one_stage_alone(self, base, xrays):
        system = DirectSystem(base, device="cpu")
        assert system.volume_size == (16, 16, 16)
        assert torch.equal(system.predict(xrays), system.coarse(xrays))

    @pytest.mark.parametrize("tile", [0, 3, 16, "auto"])
    def test_the_tile_does_not_change_the_result(self, base, refinement, xrays, tile):
        whole = DirectSystem(base, refinement, "cpu", tile=0).predict(xrays)
        assert torch.allclose(DirectSystem(base, refinement, "cpu", tile=tile).predict(xrays), whole, atol=2e-6)

    @pytest.mark.parametrize("tile", [-1, "big", True, 2.5])
    def test_a_wrong_tile_is_named(self, base, refinement, tile):
        with pytest.raises(InputError, match=f"--tile is {tile!r}"):
            DirectSystem(base, refinement, "cpu", tile=tile)

    def test_x_rays_are_read_at_the_finest_trained_resolution(self, root, base, tmp_path):
        fine = make_refinement_checkpoint(tmp_path / "r.pt", root, base, settings={"xray_size": 128})
        assert DirectSystem(base, fine, "cpu").xray_size == 128
        blind = make_refinement_checkpoint(tmp_path / "u.pt", root, base, settings={"xray_size": 128, "guided": False})
        assert DirectSystem(base, blind, "cpu").xray_size == 64

    def test_another_stage_1_than_trained_with_is_noted(self, root, refinement, tmp_path):
        other = make_checkpoint(tmp_path / "other.pt", root, make_model(seed=1))
        (note,) = DirectSystem(other, refinement, "cpu").notes
        assert "was trained on another stage 1" in note

    def test_another_geometry_is_refused(self, root, base, tmp_path):
        path = make_refinement_checkpoint(tmp_path / "r.pt", root, base, geometry={"kind": "parallel", "fov_mm": 360.0})
        with pytest.raises(InputError, match=r"r\.pt.*geometry"):
            DirectSystem(base, path, "cpu")

    def test_another_coarse_size_is_refused(self, root, base, tmp_path):
        path = make_refinement_checkpoint(tmp_path / "r.pt", root, base, coarse_size=[32, 32, 32])
        with pytest.raises(InputError, match=r"r\.pt refines volumes of \[32, 32, 32\] voxels; .*have \[16, 16, 16\]"):
            DirectSystem(base, path, "cpu")

    @pytest.mark.parametrize(("key", "other"), [("hu_window", [-1000.0, 1000.0]), ("xray_scale", 8.0)])
    def test_other_units_are_refused(self, root, base, tmp_path, key, other):
        """What stage 1 calls 0.5 would be other Hounsfield units, or other X-rays, to stage 2."""
        path = make_refinement_checkpoint(tmp_path / "r.pt", root, base, **{key: other})
        with pytest.raises(InputError, match=rf"r\.pt.*{key}"):
            DirectSystem(base, path, "cpu")

    def test_swapped_checkpoints_are_refused(self, base, refinement):
        with pytest.raises(InputError, match="'refinement'; expected 'enhanced_direct'"):
            DirectSystem(refinement, base, "cpu")
        with pytest.raises(InputError, match="'enhanced_direct'; expected 'refinement'"):
            DirectSystem(base, base, "cpu")

    @pytest.mark.parametrize("largest", [12, 0])
    def test_smaller_tiles_are_tried_when_memory_runs_out(self, base, refinement, xrays, largest):
        system = DirectSystem(base, refinement, "cpu", tile=0)
        whole, tried, real = system.predict(xrays), [], system.refinement.refine

        def refine(coarse, xrays, tile, device):
            tried.append(tile)
            if tile is None or tile > largest:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(coarse, xrays, tile, device)

        system.refinement.refine = refine
        if largest:
            assert torch.allclose(system.predict(xrays), whole, atol=2e-6)
        else:
            with pytest.raises(InputError, match="does not fit this GPU's memory even in tiles of 8; use --device cpu"):
                system.predict(xrays)
        assert tried == [None, 8]


class TestMemory:
    def test_this_machine_tells_its_free_memory(self):
        assert 2**26 < memory.available_memory(torch.device("cpu")) < 2**50

    @pytest.mark.parametrize(("gigabytes", "tile"), [(100, None), (5, 48), (2, 32), (1, 24), (0.5, 16), (0.001, 8)])
    def test_less_memory_smaller_tiles(self, monkeypatch, gigabytes, tile):
        monkeypatch.setattr(memory, "available_memory", lambda device: int(gigabytes * 2**30))
        network = RefinementNetwork(guided=True)
        assert memory.choose_tile(network, (64, 64, 64), torch.device("cpu")) == tile

    def test_bfloat16_needs_half(self, monkeypatch):
        network = RefinementNetwork(guided=True)
        assert memory.head_bytes(network, 32, 2) == memory.head_bytes(network, 32, 4) / 2

    def test_limits_of_containers_and_unknown_systems(self, monkeypatch, tmp_path):
        (tmp_path / "memory.max").write_text("3000\n")
        (tmp_path / "memory.current").write_text("1000\n")
        monkeypatch.setattr(memory, "Path", lambda *parts: tmp_path)
        assert memory._container_available() == 2000
        (tmp_path / "memory.max").write_text("max\n")
        assert memory._container_available() is None
        monkeypatch.setattr(memory, "_system_available", lambda: None)
        assert memory.available_memory(torch.device("cpu")) == memory.UNKNOWN


def evaluation(root, base, refinement, output, *more):
    options = ["--data", root, "--base", base, "--refinement", refinement, "--output", output, "--device", "cpu"]
    return evaluate.main([str(word) for word in (*options, "--pictures", "0", *more)])


@pytest.fixture(scope="module")
def results(root, base, refinement, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    assert evaluation(root, base, refinement, output) == 0
    return output


class TestEvaluate:
    def test_every_method_is_compared_with_its_baselines(self, root, base, refinement, results):
        with open(results / "per_patient.csv", newline="") as stream:
            rows = {(r["method"], r["id"]): r for r in csv.DictReader(stream)}
        methods = ("refined", "trilinear", "cubic_consistent", "perfect_16", "perfect_16_cubic", "mean_volume")
        assert set(rows) == {(m, i) for m in methods for i in ("p4", "p5")}
        system, item = DirectSystem(base, refinement, "cpu"), PatientDataset(root, "test", 64, 64)[0]
        target, coarse = item["ct_volume"], system.coarse(item["xrays"][None])
        perfect = F.avg_pool3d(target[None], 4)
        expected = {
            "refined": system.predict(item["xrays"][None])[0],
            "trilinear": F.interpolate(coarse, scale_factor=4, mode="trilinear", align_corners=False)[0],
            "perfect_16": F.interpolate(perfect, scale_factor=4, mode="trilinear", align_corners=False)[0],
            "cubic_consistent": upsample_spline(coarse)[0].clamp(0, 1),
            "perfect_16_cubic": upsample_spline(perfect)[0].clamp(0, 1),
        }
        for method, volume in expected.items():
            score = -10 * np.log10(((volume.numpy().astype(np.float64) - target.numpy()) ** 2).mean())
            assert float(rows[method, "p4"]["psnr_strict"]) == pytest.approx(score, abs=1e-3), method
        summary = json.loads((results / "summary.json").read_text())
        assert summary["volume_size"] == [64, 64, 64]
        assert summary["guided"] is True
        gain = summary["minus_trilinear"]["refined"]["psnr_strict"]
        differences = [
            float(rows["refined", i]["psnr_strict"]) - float(rows["trilinear", i]["psnr_strict"]) for i in ("p4", "p5")
        ]
        assert gain["mean"] == pytest.approx(np.mean(differences), abs=1e-3)
        assert gain["n"] == 2
        assert set(summary["minus_cubic_consistent"]) == set(methods) - {"cubic_consistent"}

    def test_the_error_is_split_and_the_share_removed_is_that_of_the_cubic_baseline(self, results):
        with open(results / "per_patient.csv", newline="") as stream:
            rows = {(r["method"], r["id"]): r for r in csv.DictReader(stream)}
        summary = json.loads((results / "summary.json").read_text())
        names = ["low_rmse_hu", "high_rmse_hu", "low_removed", "high_removed"]
        assert list(rows["refined", "p4"])[-5:] == [*names, "seconds"]
        assert summary["protocol_columns"]["error_split"] == names
        assert set(names) <= set(summary["protocols"])
        for part in ("low", "high"):
            shares = [
                1 - (float(rows["refined", i][f"{part}_rmse_hu"]) / float(rows[CUBIC, i][f"{part}_rmse_hu"])) ** 2
                for i in ("p4", "p5")
            ]
            statistics = summary["methods"]["refined"][f"{part}_removed"]
            assert statistics["mean"] == pytest.approx(np.mean(shares), abs=1e-4)
            assert statistics["ci95"][0] < statistics["mean"] < statistics["ci95"][1]
            assert summary["methods"][CUBIC][f"{part}_removed"]["mean"] == 0
        # What 16^3 cannot hold is the same whatever stage 1 says, but for the clamping.
        assert float(rows["perfect_16_cubic", "p4"]["low_removed"]) > 0.99
        assert float(rows["perfect_16_cubic", "p4"]["high_removed"]) == pytest.approx(0, abs=0.1)

    def test_compared_with_another_run(self, root, base, results, tmp_path, capsys):
        blind = make_refinement_checkpoint(tmp_path / "u.pt", root, base, settings={"guided": False})
        other = results / "per_patient.csv"
        assert evaluation(root, base, blind, tmp_path / "out", "--compare", other) == 0
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        (key,) = set(summary) & {f"minus_{results.name}"}
        with open(other, newline="") as stream:
            first = [r for r in csv.DictReader(stream) if r["method"] == "refined"]
        with open(tmp_path / "out" / "per_patient.csv", newline="") as stream:
            mine = [r for r in csv.DictReader(stream) if r["method"] == "refined"]
        expected = np.mean([float(a["mae_hu"]) - float(b["mae_hu"]) for a, b in zip(mine, first)])
        assert summary[key]["refined"]["mae_hu"]["mean"] == pytest.approx(expected, rel=1e-3)
        assert f"refined minus {results.name}" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (None, "cannot be read"),
            ("a,b\n1,2\n", "not a per_patient.csv"),
            ("swap", "has no method 'refined'"),
            ("drop", "other patients than scored here"),
            ("word", "not a number"),
        ],
    )
    def test_an_unfit_comparison_is_named(self, root, base, refinement, results, tmp_path, text, words):
        path, good = tmp_path / "other.csv", (results / "per_patient.csv").read_text()
        changed = {
            "swap": good.replace("refined", "coarse"),
            "drop": "\n".join(line for line in good.splitlines() if ",p5," not in line),
            "word": good.replace("refined,p4,", "refined,p4,high"),
        }
        if text is not None:
            path.write_text(changed.get(text, text))
        with pytest.raises(InputError, match=words):
            evaluation(root, base, refinement, tmp_path / "out", "--compare", path)

    def test_patients_stage_2_was_trained_on_are_refused(self, root, base, tmp_path):
        path = make_refinement_checkpoint(tmp_path / "r.pt", root, base, train_patients=["p5"])
        with pytest.raises(InputError, match=r"r\.pt was trained on p5"):
            evaluation(root, base, path, tmp_path / "out")


class TestReconstruct:
    def test_two_files_to_a_fine_nifti(self, root, base, refinement, tmp_path, capsys):
        xrays = [root / "p4" / f"p4_{view}_drr.png" for view in ("pa", "lat")]
        options = ["--pa", xrays[0], "--lateral", xrays[1], "--base", base, "--refinement", refinement, "--tile", 5]
        output = tmp_path / "out.nii.gz"
        assert reconstruct.main([str(word) for word in (*options, "--output", output, "--device", "cpu")]) == 0
        image = nib.load(output)
        assert image.shape == (64, 64, 64)
        assert np.allclose(image.affine @ [31.5, 31.5, 31.5, 1], [0, 0, 0, 1])
        assert "64 x 64 x 64 voxels of 5.625 mm" in capsys.readouterr().out
        hu, affine = reconstruction.load_pipeline(base, refinement, device="cpu")(*xrays)
        assert np.abs(np.asarray(image.dataobj).transpose(2, 1, 0).astype(int) - hu).max() <= 1
        assert np.allclose(affine, image.affine)


def test_nan_of_either_stage_names_its_checkpoint_and_half_precision_is_suspected(root, base, tmp_path):
    refined = make_refinement_checkpoint(tmp_path / "refined.pt", root, base)
    system = DirectSystem(base, refined, device="cpu")
    with torch.no_grad():
        list(system.refinement.parameters())[-1].fill_(torch.nan)
    with pytest.raises(InputError, match=r"refined\.pt: the predicted volume holds NaN"):
        system.predict(torch.rand(1, 2, 64, 64))
    with pytest.raises(InputError, match=r"base\.pt: .*float16 overflows: try --precision float32"):
        check_finite(torch.tensor([1.0, torch.inf]), "base.pt", "float16")
