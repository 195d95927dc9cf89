"""Baselines: the axes of plain lifting, size, training and resume by the trainer, and the commands that take them."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evaluate
from dataset import PatientDataset, mean_volume
from model_enhanced import EnhancedDirectModel
from tests.helpers.hooks import at_forward, raising
from tests.helpers.runs import TINY
from tests.helpers.tiny_data import make_checkpoint, make_dataset, make_refinement_checkpoint
from tools import baselines
from tools.baselines import UNetTask
from xray2ct.checkpoints import load_checkpoint, save_checkpoint
from xray2ct.files import InputError
from xray2ct.geometry.projector import Geometry, render_xrays
from xray2ct.inference.reconstruction import load_pipeline
from xray2ct.inference.system import DirectSystem
from xray2ct.models import registry
from xray2ct.models.baselines import LiftingUNet, MeanVolume, replicate, to_grid
from xray2ct.models.loading import load_base_model
from xray2ct.training.config import EnhancedConfig, RefinementConfig, config_dict, load_config
from xray2ct.training.distributed import Processes
from xray2ct.training.refinement_task import RefinementTask

SMALL = {"base_channels": 16, "stem_stride": 1, "encoder_blocks": (1, 1, 1, 1), "decoder_blocks": (1, 1, 1)}
SETTINGS = [text for text in TINY if not text.startswith(("loss.", "model.transformer_blocks", "world_size"))]
EPOCHS = 12


def arguments(name, root, output, *overrides):
    settings = (*SETTINGS, "world_size=1", f"training.num_epochs={EPOCHS}", *overrides)
    options = [word for text in settings for word in ("--set", text)]
    return [name, "--data", str(root), "--output", str(output), *options]


@pytest.fixture(scope="module")
def unet(root, tmp_path_factory):
    """Output folder of a short training of the U-Net."""
    output = tmp_path_factory.mktemp("unet")
    assert baselines.main(arguments("unet", root, output)) == 0
    return output


@pytest.fixture(scope="module")
def x2ct(root, tmp_path_factory):
    """Output folder of an even shorter training of X2CT-GAN's generator."""
    output = tmp_path_factory.mktemp("x2ct")
    settings = ("model.base_channels=16", "model.xray_size=64", "training.num_epochs=2")
    assert baselines.main(arguments("x2ct", root, output, *settings)) == 0
    return output


@pytest.fixture(scope="module")
def mean(root, tmp_path_factory):
    """Output folder of the mean volume."""
    output = tmp_path_factory.mktemp("mean")
    assert baselines.main(arguments("mean", root, output)) == 0
    return output


def small(**changes):
    """A small U-Net whose zero-initialised layers are drawn too, so that every path is alive."""
    torch.manual_seed(0)
    model = LiftingUNet(**{"volume_size": (16, 16, 16), **SMALL, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


class TestLifting:
    def test_each_view_is_constant_along_its_own_rays(self):
        pa, lateral = torch.rand(2, 3, 4, 6), torch.rand(2, 3, 4, 5)  # D = 4, W = 6 and H = 5
        volume = replicate(pa, lateral)
        assert volume.shape == (2, 3, 4, 5, 6)
        for d, h, w in ((0, 0, 0), (1, 4, 2), (3, 2, 5)):
            expected = (pa[:, :, d, w] + lateral[:, :, d, h]) / 2
            assert torch.allclose(volume[:, :, d, h, w], expected)

    @pytest.mark.parametrize("geometry", [Geometry("parallel"), Geometry()], ids=["parallel", "cone"])
    def test_the_views_of_a_point_meet_where_it_lies(self, geometry):
        """Low and to the back on the patient's right: any axis swapped or reversed puts it elsewhere."""
        point = (22, 25, 7)
        volume = torch.zeros(1, 1, 32, 32, 32)
        volume[0, 0, point[0], point[1], point[2]] = 1.0
        xrays = render_xrays(volume, geometry, (128, 128))
        pa, lateral = (to_grid(xrays[:, v : v + 1], (32, 32)) for v in range(2))
        found = np.unravel_index(replicate(pa, lateral).argmax().item(), (32, 32, 32))
        assert np.abs(np.subtract(found, point)).max() <= (1 if geometry.kind == "cone" else 0)

    def test_finer_pixels_are_averaged_and_coarser_ones_interpolated(self):
        features = torch.rand(1, 2, 8, 12)
        assert torch.allclose(to_grid(features, (4, 3)), F.avg_pool2d(features, (2, 4)))
        assert to_grid(features, (16, 10)).shape == (1, 2, 16, 10)
        assert torch.equal(to_grid(features, (8, 12)), features)

    def test_the_network_sees_each_view_along_its_axis_alone(self):
        """With nothing but the lifting at work, a PA picture makes a volume that is constant from front to back."""
        model = small(encoder_blocks=(0, 0, 0, 0), decoder_blocks=(0, 0, 0), volume_size=(16, 24, 32)).eval()
        for scale in model.decoder:
            scale.blocks = nn.Identity()
        xrays = torch.rand(1, 2, 64, 64)
        for parameter in (*model.encoders.parameters(), *(p for s in model.decoder for p in s.skips.parameters())):
            parameter.data.abs_()
        with torch.no_grad():
            for silent, axis in ((1, 3), (0, 4)):
                for scale in model.decoder:
                    nn.init.zeros_(scale.skips[silent].weight)
                volume = model.norm(self._features(model, xrays))
                along = volume.diff(dim=axis).abs().max()
                others = [volume.diff(dim=other).abs().max() for other in (2, 3, 4) if other != axis]
                assert along < 1e-4 < 1e-2 < min(others)
                for scale in model.decoder:
                    nn.init.constant_(scale.skips[silent].weight, 0.1)

    @staticmethod
    def _features(model, xrays):
        kept = []
        handle = model.decoder[-1].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        model(xrays)
        handle.remove()
        return kept[0]


class TestNetwork:
    @pytest.mark.parametrize("config", ["configs/cpu.json", "config_enhanced.json"])
    def test_as_many_parameters_as_the_direct_model_of_the_same_configuration(self, config):
        settings = config_dict(load_config(EnhancedConfig, config))["model"]
        with torch.device("meta"):
            direct = EnhancedDirectModel(**settings)
            own = LiftingUNet(**{name: settings[name] for name in UNetTask.settings})
        counts = [sum(p.numel() for p in model.parameters()) for model in (own, direct)]
        assert 0.95 < counts[0] / counts[1] < 1.05

    @pytest.mark.parametrize("size", [(16, 16, 16), (16, 24, 32)])
    def test_shapes_and_range(self, size):
        model = small(volume_size=size)
        xrays = torch.rand(2, 2, 64, 96)
        volume, aux = model(xrays)
        assert volume.shape == (2, 1, *size)
        assert aux == {}
        model.head.weight.data.mul_(50)
        trained, (clamped, _) = model(xrays)[0], model.eval()(xrays.unsqueeze(2))
        assert trained.min() < 0
        assert trained.max() > 1
        assert torch.equal(clamped, trained.clamp(0, 1))

    def test_every_parameter_takes_part(self):
        model = small()
        model(torch.rand(1, 2, 64, 64))[0].square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_recomputed_activations_give_the_same_gradients(self):
        xrays, gradients = torch.rand(1, 2, 64, 64), []
        for recompute in (False, True):
            model = small(activation_checkpointing=recompute)
            model(xrays)[0].square().mean().backward()
            gradients.append(model.encoders[0].stem.weight.grad)
        assert torch.allclose(*gradients)

    def test_the_geometry_travels_with_the_weights_and_changes_nothing(self):
        geometry, xrays = Geometry(sdd_mm=1000.0, sid_mm=700.0), torch.rand(1, 2, 64, 64)
        model, other = small(geometry=geometry, xray_size=64).eval(), small().eval()
        other.load_state_dict(model.state_dict())
        assert (other.geometry, other.xray_size) == (geometry, 64)
        assert torch.equal(model(xrays)[0], small(xray_size=64).eval()(xrays)[0])

    def test_other_shapes_are_named(self):
        with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\).*PA, then lateral"):
            small()(torch.rand(1, 3, 64, 64))
        for changes, key in (
            ({"volume_size": (16, 16, 20)}, "volume_size"),
            ({"base_channels": 20}, "base_channels"),
            ({"stem_stride": 3}, "stem_stride"),
            ({"xray_size": 48}, "xray_size"),
            ({"encoder_blocks": (1, 1, 1)}, "encoder_blocks"),
            ({"decoder_blocks": (1, 1)}, "decoder_blocks"),
        ):
            with pytest.raises(InputError, match=f"model.{key}"):
                small(**changes)
        with pytest.raises(InputError, match=r"model\.volume_size is \[16, 16\]; expected 3 multiples of 8"):
            MeanVolume((16, 16))

    def test_the_volume_is_made_in_float32_whatever_the_convolutions_run_in(self):
        model, xrays = small(), torch.rand(1, 2, 64, 64)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            fine = model(xrays)[0]
            torch.nn.init.zeros_(model.head.weight)
            model.head.bias.fill_(0.4334)
            flat = model(xrays)[0]
        assert fine.unique().numel() > 0.9 * fine.numel()  # bfloat16 has a few hundred numbers there, 5 HU apart
        assert 2500 * (flat - 0.4334).abs().max() < 0.01


def events(output, kind):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


class TestTraining:
    def test_it_learns_by_squared_error_alone_whatever_the_configuration_says(self, unet):
        epochs = events(unet, "epoch")
        assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
        assert epochs[-1]["loss"] == epochs[-1]["mse"]
        assert not {"l1", "ssim", "perceptual", "edge", "multiscale"} & epochs[-1].keys()
        psnr = [line["psnr"] for line in events(unet, "validation")]
        assert max(psnr) > psnr[0] + 1
        data = load_checkpoint(unet / "best_model.pt", kind="lifting_unet")
        assert data["metrics"]["psnr"] == pytest.approx(max(psnr))
        assert data["train_patients"] == ["p0", "p1", "p2"]
        assert {name for name, weight in data["config"]["loss"].items() if name.endswith("weight") and weight} == {
            "mse_weight"
        }

    def test_x2ct_learns_by_squared_error_and_projections(self, x2ct):
        epochs = events(x2ct, "epoch")
        assert epochs[-1]["loss"] < epochs[0]["loss"]
        assert epochs[-1]["loss"] == pytest.approx(10 * epochs[-1]["mse"] + 10 * epochs[-1]["projection"], rel=1e-4)
        data = load_checkpoint(x2ct / "best_model.pt", kind="x2ct_generator")
        assert data["model_config"]["base_channels"] == 16

    def test_x2ct_has_its_published_widths_whatever_the_configuration_says(self, tmp_path):
        args = baselines.parse_args(["x2ct", "--config", "configs/cpu.json", "--output", str(tmp_path)])
        model = baselines.read_config(args).model
        assert (model.base_channels, model.xray_size, model.volume_size) == (64, 128, [64, 64, 64])

    def test_another_loss_can_be_asked_for(self, root, tmp_path):
        args = baselines.parse_args(arguments("unet", root, tmp_path, "loss.l1_weight=0.5"))
        loss = baselines.read_config(args).loss
        assert (loss.l1_weight, loss.mse_weight, loss.multiscale_weight) == (0.5, 1.0, 0.0)

    def test_a_run_that_broke_off_ends_with_the_same_weights(self, root, tmp_path):
        settings = ("training.num_epochs=2", "logging.checkpoint_minutes=0.0")
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        assert baselines.main(arguments("unet", root, whole, *settings)) == 0
        power_cut = at_forward(LiftingUNet, 5, raising(OSError("power cut")))
        with power_cut, pytest.raises(OSError, match="power cut"):
            baselines.main(arguments("unet", root, broken, *settings))
        assert load_checkpoint(broken / "last.pt")["training_state"]["updates"] == 4
        assert baselines.main(arguments("unet", root, broken, *settings)) == 0
        states = [load_checkpoint(o / "last.pt")["training_state"]["model"] for o in (whole, broken)]
        names = [name for name in states[0] if torch.is_tensor(states[0][name])]
        assert len(names) > 20
        assert [name for name in names if not torch.equal(states[0][name], states[1][name])] == []

    def test_the_mean_volume_is_the_mean_of_the_training_patients(self, root, mean):
        data = load_checkpoint(mean / "best_model.pt", kind="mean_volume")
        expected = mean_volume(PatientDataset(root, "train", 16, None))
        assert expected.std() > 0.1
        assert torch.equal(data["model_state_dict"]["volume"][0], expected)
        assert data["metrics"]["psnr"] == pytest.approx(events(mean, "validation")[0]["psnr"])
        assert (data["epoch"], data["step"], data["metrics"]["patients"]) == (0, 0, 1)

    def test_the_mean_volume_is_made_again_by_the_same_command(self, root, mean, tmp_path):
        for _ in range(2):
            assert baselines.main(arguments("mean", root, tmp_path)) == 0
        one, other = (load_checkpoint(o / "best_model.pt")["model_state_dict"]["volume"] for o in (mean, tmp_path))
        assert torch.equal(one, other)

    def test_the_mean_volume_of_other_data_is_not_overwritten(self, mean, tmp_path):
        before, other = (mean / "best_model.pt").read_bytes(), make_dataset(tmp_path / "other", patients=7)
        with pytest.raises(InputError, match=r"best_model\.pt was trained on another split"):
            baselines.main(arguments("mean", other, mean))
        assert (mean / "best_model.pt").read_bytes() == before

    @pytest.mark.parametrize("name", ["unet", "mean"])
    def test_a_dry_run_writes_nothing(self, root, tmp_path, capsys, name):
        assert baselines.main([*arguments(name, root, tmp_path / "out"), "--dry-run"]) == 0
        assert ("M parameters" if name == "unet" else "Mean of 3 training patients") in capsys.readouterr().out
        assert not (tmp_path / "out").exists()

    def test_each_baseline_has_its_own_default_folder(self):
        assert [baselines.parse_args([name]).output for name in baselines.TASKS] == [
            "checkpoints_unet",
            "checkpoints_x2ct",
            "checkpoints_mean",
        ]


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "changes", "words"),
        [
            ("unet", ["--data", "nowhere"], ["nowhere", "prepare_data.py"]),
            ("mean", ["--data", "nowhere"], ["nowhere", "prepare_data.py"]),
            ("unet", ["--set", "model.transformer_blocks=2"], ["model.transformer_blocks is 2", "expected 0"]),
            ("unet", ["--set", "model.seen_channel=true"], ["model.seen_channel is true", "expected false"]),
            ("unet", ["--set", "model.passes=2"], ["model.passes is 2", "expected 1"]),
            ("x2ct", ["--set", "model.xray_size=32"], ["with model.xray_size 32", "X-rays of at least 64"]),
            ("unet", ["--set", "model.base_channels=20"], ["model.base_channels", "multiple of 16"]),
            ("mean", ["--set", "model.volume_size=[16,16,32]"], ["model.volume_size", "equal"]),
            ("unet", ["--set", "training.num_epoch=1"], ["did you mean training.num_epochs"]),
            ("unet", ["--set", "loss.mse_weight=0"], ["every weight is 0"]),
            ("unet", ["--set", "loss.multiscale_weight=1"], ["loss.multiscale_weight is 1", "a baseline predicts no"]),
            ("mean", ["--set", "loss.multiscale_weight=1"], ["loss.multiscale_weight is 1", "a baseline predicts no"]),
        ],
    )
    def test_it_is_named_and_nothing_is_written(self, root, tmp_path, name, changes, words):
        with pytest.raises(InputError) as error:
            baselines.main([*arguments(name, root, tmp_path / "out"), *changes])
        for word in words:
            assert word in str(error.value)
        assert not (tmp_path / "out").exists()

    def test_an_unknown_baseline(self, capsys):
        with pytest.raises(SystemExit):
            baselines.parse_args(["median"])
        assert "unet" in capsys.readouterr().err

    def test_a_trained_network_is_not_overwritten_by_another_kind(self, root, unet, tmp_path):
        before = (unet / "best_model.pt").read_bytes()
        with pytest.raises(InputError, match=r"best_model\.pt: is a checkpoint of 'lifting_unet'; expected 'mean_vol"):
            baselines.main(arguments("mean", root, unet))
        assert (unet / "best_model.pt").read_bytes() == before
        save_checkpoint(tmp_path / "last.pt", {"kind": "enhanced_direct"})
        with pytest.raises(InputError, match="'enhanced_direct'; expected 'lifting_unet'"):
            baselines.main(arguments("unet", root, tmp_path))


def rows_of(output):
    with open(output / "per_patient.csv", newline="") as stream:
        return {(row["method"], row["id"]): row for row in csv.DictReader(stream)}


class TestCommands:
    def test_every_kind_of_the_registry_is_built_and_others_are_refused(self, root, unet, x2ct, mean, tmp_path):
        direct = make_checkpoint(tmp_path / "direct.pt", root)
        paths = {
            "enhanced_direct": direct,
            "lifting_unet": unet / "best_model.pt",
            "x2ct_generator": x2ct / "best_model.pt",
            "mean_volume": mean / "best_model.pt",
        }
        assert set(paths) == {*registry.NETWORKS} - {registry.REFINEMENT_KIND}
        for kind, path in paths.items():
            model, data = load_base_model(path)
            assert type(model) is registry.NETWORKS[kind]
            assert not model.training
            assert model.geometry.to_dict() == data["geometry"]
        for kind in ("hybrid_vit_cascade", None, ["lifting_unet"]):
            save_checkpoint(tmp_path / "other.pt", {"kind": kind})
            with pytest.raises(InputError, match=r"other\.pt.*expected 'enhanced_direct', or a baseline's"):
                load_base_model(tmp_path / "other.pt")

    def test_evaluation_of_x2ct(self, root, x2ct, tmp_path):
        words = ["--data", root, "--base", x2ct / "best_model.pt", "--output", tmp_path, "--device", "cpu"]
        assert evaluate.main([str(word) for word in (*words, "--pictures", "0")]) == 0
        rows = rows_of(tmp_path)
        assert np.isfinite([float(rows["model", p]["psnr_strict"]) for p in ("p4", "p5")]).all()

    def test_evaluation_and_comparison(self, root, unet, mean, tmp_path):
        results = {}
        for name, folder, more in (
            ("mean", mean, ()),
            ("unet", unet, ("--compare", tmp_path / "mean/per_patient.csv")),
        ):
            output = tmp_path / name
            words = ["--data", root, "--base", folder / "best_model.pt", "--output", output, "--device", "cpu"]
            assert evaluate.main([str(word) for word in (*words, *more, "--pictures", "0")]) == 0
            results[name] = json.loads((output / "summary.json").read_text()), rows_of(output)
        summary, rows = results["mean"]
        for patient in ("p4", "p5"):  # the checkpoint is the predictor that every evaluation computes itself
            assert rows["model", patient]["psnr_strict"] == rows["mean_volume", patient]["psnr_strict"]
        assert summary["minus_mean_volume"]["model"]["psnr_strict"]["mean"] == 0
        summary, rows = results["unet"]
        gain = summary["minus_mean"]["model"]["psnr_strict"]
        expected = [
            float(rows["model", p]["psnr_strict"]) - float(rows["mean_volume", p]["psnr_strict"]) for p in ("p4", "p5")
        ]
        assert gain["n"] == 2
        assert gain["mean"] == pytest.approx(np.mean(expected), abs=1e-3)
        assert summary["parameters"] == sum(p.numel() for p in load_base_model(unet / "best_model.pt")[0].parameters())

    @pytest.mark.parametrize("name", ["unet", "x2ct", "mean"])
    def test_reconstruction(self, root, name, request):
        folder = request.getfixturevalue(name)
        volume, affine = load_pipeline(folder / "best_model.pt", device="cpu")(
            root / "p4" / "p4_pa_drr.png", root / "p4" / "p4_lat_drr.png"
        )
        assert volume.shape == (16, 16, 16)
        assert np.abs(np.diag(affine)[:3]) == pytest.approx(360 / 16)
        assert volume.std() > 100

    @pytest.mark.parametrize("name", ["unet", "mean"])
    def test_stage_2_takes_a_baseline_for_its_stage_1(self, root, name, request, tmp_path):
        base = request.getfixturevalue(name) / "best_model.pt"
        refinement = make_refinement_checkpoint(tmp_path / "refinement.pt", root, base)
        system = DirectSystem(base, refinement, "cpu")
        item = PatientDataset(root, "test", 16, 64)[0]
        volume = system.predict(item["xrays"][None])
        assert volume.shape == (1, 1, 64, 64, 64)
        assert system.notes == []
        config = load_config(
            RefinementConfig,
            None,
            [
                *(
                    f"model.{key}={json.dumps(value)}"
                    for key, value in load_checkpoint(refinement)["refinement_config"].items()
                ),
                f"base_checkpoint={base}",
                f"data.dataset_path={root}",
                "patch.size=8",
                "loss.perceptual_weight=0",
                "training.precision=float32",
            ],
        )
        task = RefinementTask(config, Processes())
        raw = {k: v[None] for k, v in task.train_data[0].items() if torch.is_tensor(v)}
        batch = task.make_batch(raw, [1], torch.device("cpu"))
        total, _ = task.loss(task.build_model(), batch)
        total.backward()
        assert torch.isfinite(total)
        assert not any(p.requires_grad for p in task.base.parameters())
