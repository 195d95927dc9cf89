"""Stage 2's training script: patches in their place, stage 1 frozen, resume, two processes, bad input, short memory."""

import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import dataset
import train_refinement_4gpu
from dataset import PatientDataset
from model_enhanced import RefinementNetwork
from tests.helpers.hooks import at_forward, raising
from tests.helpers.runs import assert_same_tensors, run, run_ranks, start_and_signal
from tests.helpers.tiny_data import make_checkpoint, make_dataset, make_model
from xray2ct.checkpoints import load_checkpoint
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError, read_json, write_json
from xray2ct.models.loading import load_base_model, load_refinement
from xray2ct.models.upsampling import upsample_spline
from xray2ct.training import refinement_task
from xray2ct.training.config import RefinementConfig, load_config
from xray2ct.training.distributed import Processes
from xray2ct.training.trainer import Trainer, TrainingError, fit

TINY = (
    "model.channels=8",
    "model.growth=4",
    "model.rrdb_blocks=1",
    "model.head_channels=[8,6,2]",
    "model.guide_widths=[8,8,16,16]",
    "model.guide_channels=[2,2,2]",
    "model.xray_size=64",
    "model.stem_stride=1",
    "patch.size=8",
    "patch.context=4",
    "guidance_dropout=0.4",
    "training.num_epochs=2",
    "training.batch_size=1",
    "training.learning_rate=1e-3",
    "training.precision=float32",
    "loss.perceptual_weight=0",
    "augment.elastic_points=3",
    "data.repeats=2",
    "logging.log_interval=1",
    "logging.checkpoint_minutes=0",
    "logging.save_checkpoint_interval=0",
    "world_size=2",
)


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base.pt", root)


def arguments(root, base, output, *overrides):
    options = [word for text in (*TINY, *overrides) for word in ("--set", text)]
    return ["--data", str(root), "--base", str(base), "--output", str(output), *options]


def make_task(root, base, *overrides):
    config = load_config(RefinementConfig, None, [*TINY, *overrides])
    config.data.dataset_path, config.base_checkpoint = str(root), str(base)
    return refinement_task.RefinementTask(config, Processes(0, 1, torch.device("cpu")))


def events(output, kind):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.fixture(scope="module")
def trained(root, base, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    done = run([sys.executable, train_refinement_4gpu.__file__, *arguments(root, base, output)])
    assert done.returncode == 0, done.stderr
    return output, done.stdout


class TestTask:
    def test_patches_are_the_targets_of_their_places(self, root, base):
        task = make_task(root, base, "patch.per_volume=3", "augment.enabled=false")
        raw = torch.utils.data.default_collate([task.train_data[0], task.train_data[1]])
        batch = task.make_batch(raw, [11, 12], torch.device("cpu"))
        assert batch["ct_volume"].shape == (6, 1, 32, 32, 32)
        whole = raw["ct_volume"].float() / 65535
        for index, corner in enumerate([c for corners in batch["origins"] for c in corners]):
            z, y, x = (4 * n for n in corner)
            expected = whole[index // 3, 0, z : z + 32, y : y + 32, x : x + 32]
            assert torch.allclose(batch["ct_volume"][index, 0], expected)

    def test_an_untrained_network_predicts_the_upsampled_coarse_patches(self, root, base):
        """The patches of prediction and target lie at the same place: the loss is that of plain upsampling."""
        task = make_task(root, base, "patch.per_volume=2", "loss.edge_weight=0")
        raw = torch.utils.data.default_collate([task.train_data[0]])
        batch = task.make_batch(raw, [5], torch.device("cpu"))
        total, _ = task.loss(task.build_model().train(), batch)
        smooth = upsample_spline(batch["coarse"])
        pieces = [
            (smooth[0, 0, 4 * z : 4 * z + 32, 4 * y : 4 * y + 32, 4 * x : 4 * x + 32] - target[0]).abs().mean()
            for (z, y, x), target in zip(batch["origins"][0], batch["ct_volume"])
        ]
        assert total.item() == pytest.approx(torch.stack(pieces).mean().item(), rel=1e-4)

    def test_coarse_volume_and_x_rays_belong_to_the_augmented_volume(self, root, base):
        task = make_task(root, base)
        raw = torch.utils.data.default_collate([task.train_data[0]])
        one, same, other = (task.make_batch(raw, [seed], torch.device("cpu")) for seed in (1, 1, 2))
        for name in ("xrays", "coarse", "ct_volume"):
            assert torch.equal(one[name], same[name])
            assert not torch.equal(one[name], other[name])
        model, _ = load_base_model(base)
        with torch.no_grad():
            assert torch.allclose(one["coarse"], model(one["xrays"])[0], atol=1e-6)

    def test_the_configured_share_of_samples_goes_without_x_rays(self, root, base):
        task = make_task(root, base)
        gate = task.gate(SampleRandom(range(500)))
        assert set(gate.tolist()) == {0.0, 1.0}
        assert 1 - gate.mean().item() == pytest.approx(0.4, abs=0.07)

    def test_corners_reach_all_of_the_volume(self, root, base):
        task = make_task(root, base, "patch.per_volume=4")
        origins = task.patch_origins(SampleRandom(range(60)))
        assert origins[7] == task.patch_origins(SampleRandom([7]))[0]  # a sample's own, whatever the batch
        corners = torch.tensor(origins).reshape(-1, 3)  # (z, y, x)
        assert len(corners) == 60 * 4
        for axis in corners.T:
            assert sorted(set(axis.tolist())) == [0, 2, 4, 6, 8]  # the trunk's cells, up to the last corner, 16 - 8

    def test_the_data_set_s_folders_are_looked_at_once(self, root, base, monkeypatch):
        looks, real = [], dataset.find_patients
        monkeypatch.setattr(dataset, "find_patients", lambda folder: looks.append(folder) or real(folder))
        make_task(root, base)
        assert len(looks) == 1

    def test_full_volumes(self, root, base):
        task = make_task(root, base, "patch.size=0")
        raw = torch.utils.data.default_collate([task.train_data[0]])
        batch = task.make_batch(raw, [1], torch.device("cpu"))
        assert batch["ct_volume"].shape == (1, 1, 64, 64, 64)
        total, _ = task.loss(task.build_model().train(), batch)
        total.backward()

    def test_stage_1_gets_no_gradient_and_stays_in_eval_mode(self, root, base):
        task = make_task(root, base)
        raw = torch.utils.data.default_collate([task.train_data[0]])
        model = task.build_model().train()
        total, _ = task.loss(model, task.make_batch(raw, [1], torch.device("cpu")))
        total.backward()
        assert not task.base.training
        assert all(p.grad is None and not p.requires_grad for p in task.base.parameters())

    def test_validation_on_full_volumes_equals_an_independent_computation(self, root, base):
        task, processes = make_task(root, base), Processes(0, 1, torch.device("cpu"))
        (row,) = task.validate(task.build_model().eval(), processes, task.precision)
        item = PatientDataset(root, "val", 64, 64)[0]
        target, model = item["ct_volume"][None], load_base_model(base)[0]
        with torch.no_grad():
            coarse = model(item["xrays"][None])[0]

        def score(volume):
            return -10 * torch.log10(F.mse_loss(volume.double(), target.double())).item()

        smooth = F.interpolate(coarse, scale_factor=4, mode="trilinear", align_corners=False)
        perfect = F.interpolate(F.avg_pool3d(target, 4), scale_factor=4, mode="trilinear", align_corners=False)
        assert row["psnr_trilinear"] == pytest.approx(score(smooth), abs=1e-3)
        cubic = upsample_spline(coarse).clamp(0, 1)
        assert row["psnr"] == pytest.approx(score(cubic), abs=1e-3)
        assert row["psnr_cubic_consistent"] == pytest.approx(score(cubic), abs=1e-3)
        assert abs(score(cubic) - score(smooth)) > 0.01
        assert row["psnr_perfect_coarse"] == pytest.approx(score(perfect), abs=1e-3)

    @pytest.mark.parametrize(("refined", "stage"), [(22.0, "stage 1"), (26.0, "stage 2")])
    def test_the_bottleneck_is_named(self, root, base, refined, stage):
        metrics = {"psnr": refined, "psnr_trilinear": 21.0, "psnr_cubic_consistent": 21.5, "psnr_perfect_coarse": 25.0}
        text = make_task(root, base).comment(metrics)
        assert f"Bottleneck is {stage}" in text
        assert f"{refined - 21.0:+.2f} and {refined - 21.5:+.2f}" in text


class TestRuns:
    def test_the_checkpoint_holds_what_users_load(self, trained, base, root):
        output, printed = trained
        data = torch.load(output / "best_refinement.pt")  # weights_only is torch's default
        network = RefinementNetwork()
        network.load_state_dict(data["refinement_state_dict"])
        volume = network.eval()(torch.full((1, 1, 16, 16, 16), 0.3))
        assert volume.shape == (1, 1, 64, 64, 64)
        same, loaded = load_refinement(output / "best_refinement.pt")
        assert torch.equal(same(torch.full((1, 1, 16, 16, 16), 0.3)), volume)
        assert loaded["train_patients"] == PatientDataset(root, "train", 16, None).ids
        assert loaded["metrics"]["psnr"] == max(e["psnr"] for e in events(output, "validation"))
        assert printed.count("Bottleneck is stage") == 2
        assert re.search(r"trilinear of the predicted 16\^3: .* dB \| refined: .* dB", printed)

    def test_the_weights_have_moved(self, trained):
        network, _ = load_refinement(trained[0] / "best_refinement.pt")
        assert network.out.weight.abs().max() > 0

    def test_killed_and_restarted_it_ends_with_the_same_weights_bit_for_bit(self, root, base, trained, tmp_path):
        words = [sys.executable, train_refinement_4gpu.__file__, *arguments(root, base, tmp_path)]
        assert start_and_signal(words, tmp_path, 4, signal.SIGKILL) == -signal.SIGKILL
        assert not (tmp_path / "best_refinement.pt").exists() or len(events(tmp_path, "validation")) < 2
        again = run(words)
        assert again.returncode == 0, again.stderr
        assert "Resumed" in again.stdout
        one, other = (load_checkpoint(p / "last.pt")["training_state"]["model"] for p in (tmp_path, trained[0]))
        assert_same_tensors(one, other)

    @pytest.mark.skipif(os.name == "nt", reason="forked processes are POSIX")
    def test_two_processes_follow_the_same_loss_curve(self, root, base, tmp_path):
        """Guidance is dropped for some samples: parameters without a gradient would hang."""
        script = [sys.executable, train_refinement_4gpu.__file__]
        done = run_ranks([*script, *arguments(root, base, tmp_path, "training.num_epochs=1")])
        assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
        assert "Processes: 2 on cpu" in done[0].stdout
        one = run([*script, *arguments(root, base, tmp_path / "one", "training.num_epochs=1")])
        assert one.returncode == 0, one.stderr
        a, b = events(tmp_path, "step"), events(tmp_path / "one", "step")
        assert len(a) == len(b) == 3
        for left, right in zip(a, b):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)

    def test_dry_run_prints_what_would_run(self, root, base, tmp_path, capsys):
        assert train_refinement_4gpu.main([*arguments(root, base, tmp_path / "out"), "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert "16^3 -> 64^3, guided by X-rays of 64^2" in printed
        assert "epoch 3, frozen" in printed
        assert "2 patches of 32^3 per volume" in printed
        assert not (tmp_path / "out").exists()


def test_the_configuration_is_written_with_its_defaults_where_it_is_missing(tmp_path, capsys):
    path = train_refinement_4gpu.default_config_path(tmp_path)
    assert path == tmp_path / "config_refinement.json"
    assert "was missing" in capsys.readouterr().out
    assert load_config(RefinementConfig, path) == RefinementConfig()
    path.write_text('{"training": {"num_epochs": 7}}')
    assert load_config(RefinementConfig, train_refinement_4gpu.default_config_path(tmp_path)).training.num_epochs == 7


def test_the_repository_s_configuration_holds_the_defaults():
    path = train_refinement_4gpu.default_config_path()
    assert load_config(RefinementConfig, path) == RefinementConfig()


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (["--base", "nothing.pt"], ["nothing.pt", "no such stage-1 checkpoint", "train_enhanced_4gpu.py"]),
            (["--data", "nowhere"], ["nowhere", "prepare_data.py"]),
            (["--config", "nothing.json"], ["nothing.json", "no such file"]),
            (["--set", "patch.size=17"], ["patch.size is 17", "16 voxels", "0 trains on full volumes"]),
            (["--set", "patch.size=-1"], ["patch.size is -1", "at least 0"]),
            (["--set", "patch.sise=8"], ["patch.sise", "did you mean patch.size"]),
            (["--set", "base_checkpoint=3"], ["base_checkpoint is 3", "str"]),
            (["--set", "model.guide_widths=[8,8]"], ["guide_widths", "expected 4 whole numbers"]),
            (["--set", "loss.multiscale_weight=0.3"], ["loss.multiscale_weight is 0.3", "stage 2 predicts no volumes"]),
            (["--set", "loss.projection_weight=2"], ["loss.projection_weight is 2", "patch.size is 8", "no X-ray"]),
        ],
    )
    def test_is_named_and_nothing_is_written(self, root, base, tmp_path, changes, words):
        with pytest.raises(InputError) as error:
            train_refinement_4gpu.main([*arguments(root, base, tmp_path / "out"), *changes])
        for word in words:
            assert word in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_a_run_does_not_go_on_after_stage_1_has_changed(self, root, base, tmp_path):
        """The same path with other weights: the volumes to refine are others."""
        path = tmp_path / "base.pt"
        path.write_bytes(base.read_bytes())
        task = make_task(root, path, "training.num_epochs=1", "data.repeats=1", "world_size=1")
        fit(task.build_model(), task, task.config, tmp_path / "out", Processes(0, 1, torch.device("cpu")))
        make_checkpoint(path, root, make_model(seed=3))
        task = make_task(root, path, "training.num_epochs=1", "data.repeats=1", "world_size=1")
        with pytest.raises(InputError, match=r"last\.pt was trained on a stage 1 with other weights"):
            fit(task.build_model(), task, task.config, tmp_path / "out", Processes(0, 1, torch.device("cpu")))

    def test_a_run_does_not_go_on_with_other_voxels(self, root, base, tmp_path):
        task, other = make_task(root, base), shutil.copytree(root, tmp_path / "other")
        Trainer(task.build_model(), task, task.config, tmp_path, Processes()).save_last()
        manifest = read_json(other / "dataset.json")
        manifest["patients"]["p0"]["files"]["p0.nii.gz"] = "0" * 64
        write_json(other / "dataset.json", manifest)
        task = make_task(other, base)
        with pytest.raises(InputError, match=r"last\.pt: the checkpoint's data_fingerprint is not the data's"):
            Trainer(task.build_model(), task, task.config, tmp_path, Processes()).resume()

    def test_stage_1_of_another_geometry(self, root, tmp_path):
        path = make_checkpoint(tmp_path / "b.pt", root, geometry={"kind": "parallel", "fov_mm": 360.0})
        with pytest.raises(InputError, match=r"b\.pt.*geometry is not the data's.*kind parallel against cone"):
            make_task(root, path)

    def test_stage_1_of_another_window(self, root, tmp_path):
        path = make_checkpoint(tmp_path / "b.pt", root, hu_window=[-1000.0, 1000.0])
        with pytest.raises(InputError, match="hu_window"):
            make_task(root, path)

    def test_stage_1_of_volumes_with_the_couch(self, root, tmp_path):
        path = make_checkpoint(tmp_path / "b.pt", root, volumes={"cube_size": 128, "couch_removed": True})
        with pytest.raises(InputError, match=r"b\.pt: .*couch_removed is not the data's: True against False"):
            make_task(root, path)
        path = make_checkpoint(tmp_path / "b.pt", root, volumes={"cube_size": 128, "couch_removed": False})
        make_task(root, path)

    def test_stage_1_that_has_seen_patients_of_validation_or_test(self, root, tmp_path):
        path = make_checkpoint(tmp_path / "b.pt", root, train_patients=["p0", "p4"])
        with pytest.raises(InputError, match=r"b\.pt was trained on p4, which validate or test here"):
            make_task(root, path)

    def test_data_too_coarse_for_the_volume(self, tmp_path):
        root = make_dataset(tmp_path / "data", cube_size=32)
        base = make_checkpoint(tmp_path / "b.pt", root)
        with pytest.raises(InputError, match=r"32 voxels per axis; refining 16\^3 needs 64.*prepare_data.py --size 64"):
            make_task(root, base)

    def test_a_stage_2_checkpoint_as_base(self, root, trained):
        with pytest.raises(InputError, match="'refinement'; expected 'enhanced_direct'"):
            make_task(root, trained[0] / "best_refinement.pt")


class TestShortMemory:
    @pytest.mark.parametrize(
        ("overrides", "advice"),
        [
            (
                ["patch.size=0", "training.batch_size=4"],
                "Try, in this order, --set model.activation_checkpointing=true, then --set training.batch_size=2,"
                " then --set patch.size=8 --set patch.per_volume=1, then a smaller model.channels",
            ),
            (
                ["patch.size=16", "model.activation_checkpointing=true"],
                "Try, in this order, --set patch.size=8 --set patch.per_volume=1, then a smaller model.channels",
            ),
            # Patches of fewer than 8 voxels are mostly border, and have no X-ray of their own.
            (["patch.size=8", "model.activation_checkpointing=true"], "Try, in this order, a smaller model.channels"),
            (
                ["patch.size=0", "loss.projection_weight=1"],
                "Try, in this order, --set model.activation_checkpointing=true, then a smaller model.channels",
            ),
        ],
    )
    def test_settings_to_try_the_least_harmful_first(self, root, base, overrides, advice):
        task = make_task(root, base, *overrides)
        assert task.memory_advice() == advice
        for setting in re.findall(r"--set (\S+?),? ", advice):
            load_config(RefinementConfig, None, [setting])

    def test_a_projection_loss_of_full_volumes_is_computed(self, root, base):
        task = make_task(root, base, "patch.size=0", "loss.projection_weight=1")
        batch = task.make_batch(next(iter(torch.utils.data.DataLoader(task.train_data))), [1], torch.device("cpu"))
        assert task.loss(task.build_model(), batch)[1]["projection"] > 0

    def test_the_trainer_stops_with_the_advice(self, root, base, tmp_path):
        task = make_task(root, base, "world_size=1")
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        expected = r"epoch 1, step 1: out of GPU memory.*20\.00 GiB.*--set model.activation_checkpointing=true"
        with at_forward(RefinementNetwork, 1, raising(error)), pytest.raises(TrainingError, match=expected):
            fit(task.build_model(), task, task.config, tmp_path, Processes(0, 1, torch.device("cpu")))
