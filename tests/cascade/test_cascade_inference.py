"""The chain of stages against closed forms, its checkpoint folder, the command line, coverage."""

import re
import subprocess
import sys
from functools import partial
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from dataset import PatientDataset
from hybrid_vit_cascade import inference
from hybrid_vit_cascade.cascade import Cascade, Stage, to_signed, to_unit
from hybrid_vit_cascade.diffusion import Schedule, draw_noise, resolution_shift, sample
from hybrid_vit_cascade.inference import load_cascade_pipeline
from hybrid_vit_cascade.system import CascadeSystem, load_cascade_system
from tests.helpers.paths import ROOT
from tests.helpers.runs import run
from tests.helpers.tiny_cascade import make_cascade
from tests.helpers.tiny_data import make_checkpoint
from xray2ct.checkpoints import load_checkpoint, save_checkpoint, weights_fingerprint
from xray2ct.evaluation.spectrum import compare_spectra
from xray2ct.evaluation.statistics import coverage, expected_coverage
from xray2ct.files import InputError, read_json, write_json
from xray2ct.geometry.acquisition import Acquisition
from xray2ct.geometry.projector import Geometry
from xray2ct.inference.consistency import consistent
from xray2ct.inference.sample_calibration import SampleCalibration
from xray2ct.metrics import psnr


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    return make_cascade(tmp_path_factory.mktemp("cascade") / "cascade", root)


@pytest.fixture(scope="module")
def single_view(root, tmp_path_factory):
    return make_cascade(tmp_path_factory.mktemp("single") / "cascade", root, num_views=1, stages=1)


@pytest.fixture
def xrays(root):
    return PatientDataset(root, "test", 32, 32)[0]["xrays"][None]


def files(root, patient="p4"):
    return root / patient / f"{patient}_pa_drr.png", root / patient / f"{patient}_lat_drr.png"


# ------------------------------------------------------------------------------------------------
# The chain, where the answer is known


class GaussianStage(torch.nn.Module):
    """A perfect stage for x | X-rays, previous ~ N(slope * upsampled previous + offset + mean X-ray, sd^2)."""

    def __init__(self, size, schedule, slope, offset, sd):
        super().__init__()
        self.volume_size, self.num_views, self.geometry = size, 2, Geometry()
        self.schedule, self.slope, self.offset, self.sd = schedule, slope, offset, sd

    def encode(self, xrays, previous=None):
        mean = self.offset + xrays.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1, 1).expand(-1, 1, *(self.volume_size,) * 3)
        if previous is None:
            return mean
        return mean + self.slope * torch.nn.functional.interpolate(previous, scale_factor=2)

    def denoise(self, x, position, mean):
        t = (position * (self.schedule.num_timesteps - 1)).round().long()
        alpha, sigma = self.schedule.alpha_sigma(t)
        x0 = mean + alpha * self.sd**2 / (alpha**2 * self.sd**2 + sigma**2) * (x - alpha * mean)
        return (alpha * x - x0) / sigma  # v


def gaussian_cascade():
    """x1 ~ N(-0.2 + m, 0.1^2), x2 | x1 ~ N(0.8 x1 + 0.1 + m, 0.05^2), m the mean X-ray; values far inside [-1, 1]."""
    schedules = Schedule(1000), Schedule(1000, 0.5)
    models = GaussianStage(4, schedules[0], 0.0, -0.2, 0.1), GaussianStage(8, schedules[1], 0.8, 0.1, 0.05)
    stages = [Stage(f"s{i}", model, schedule, "v") for i, (model, schedule) in enumerate(zip(models, schedules))]
    return Cascade(stages, {"hu_window": [-1024, 1476], "xray_scale": 6.0, "xray_size": 8})


def test_one_step_of_each_stage_is_the_chained_posterior_mean():
    cascade, level = gaussian_cascade(), 0.15
    volume = cascade.posterior_mean(torch.full((2, 2, 8, 8), level))
    expected = 0.8 * (-0.2 + level) + 0.1 + level
    assert volume.shape == (2, 1, 8, 8, 8)
    assert torch.allclose(to_signed(volume), torch.full_like(volume, expected), atol=1e-5)
    first = cascade.posterior_mean(torch.full((2, 2, 8, 8), level), stages=1)
    assert first.shape == (2, 1, 4, 4, 4)
    assert torch.allclose(to_signed(first), torch.full_like(first, -0.2 + level), atol=1e-5)


def test_samples_are_draws_from_the_joint_model():
    cascade, level, count = gaussian_cascade(), 0.15, 400
    generator = torch.Generator().manual_seed(0)
    draws = to_signed(cascade.sample(torch.full((count, 2, 8, 8), level), 60, generator))
    assert draws.mean().item() == pytest.approx(0.8 * (-0.2 + level) + 0.1 + level, abs=2e-3)
    assert draws.var(dim=0).mean().item() == pytest.approx(0.8**2 * 0.1**2 + 0.05**2, rel=0.03)
    # Voxels of one coarse cell share its sample: covariance 0.8^2 0.1^2, and none between cells.
    centred = draws - draws.mean(dim=0)
    assert (centred[..., 0] * centred[..., 1]).mean().item() == pytest.approx(0.8**2 * 0.1**2, rel=0.1)
    assert (centred[..., 1] * centred[..., 2]).mean().item() == pytest.approx(0.0, abs=4e-4)


def test_statistics_are_those_of_the_stacked_samples():
    cascade, xrays = gaussian_cascade(), torch.full((2, 2, 8, 8), 0.15)
    mean, std = cascade.statistics(xrays, 5, 4, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([cascade.sample(xrays, 4, generator) for _ in range(5)])
    assert torch.allclose(mean, draws.mean(dim=0), atol=1e-6)
    assert torch.allclose(std, draws.std(dim=0), atol=1e-6)
    again = cascade.posterior_mean(xrays, samples=5, steps=4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again, mean)
    one = cascade.posterior_mean(xrays, samples=1, steps=4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one, draws[0])


def test_the_spread_is_right_and_covers_the_truth():
    cascade, xrays = gaussian_cascade(), torch.full((20, 2, 8, 8), 0.15)
    mean, std = cascade.statistics(xrays, 8, 40, torch.Generator().manual_seed(0))
    # In units of [0, 1] a standard deviation is half of that in [-1, 1].
    assert std.square().mean().sqrt().item() == pytest.approx((0.8**2 * 0.1**2 + 0.05**2) ** 0.5 / 2, rel=0.05)
    truth = cascade.sample(xrays, 40, torch.Generator().manual_seed(1))
    found = coverage(mean.flatten(0, 2), std.flatten(0, 2), truth.flatten(0, 2))
    expected = expected_coverage(8)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=0.03)


@pytest.mark.parametrize("views", [2, 1])
def test_data_consistency_moves_every_estimate_towards_the_x_rays(views):
    torch.manual_seed(0)
    cascade = gaussian_cascade()
    acquisition = Acquisition(cascade.geometry, cascade.hu_window, cascade.xray_scale)
    truth = 0.3 + 0.3 * torch.rand(1, 1, 8, 8, 8)
    xrays = acquisition.render(truth, (8, 8))[:, :views]
    for stage in cascade.stages:
        stage.model.num_views = views

    def error(volume):
        return (acquisition.render(volume, (8, 8))[:, :views] - xrays).norm() / xrays.norm()

    def draw(steps):
        return cascade.sample(xrays, steps, torch.Generator().manual_seed(0))

    plain, mean = draw(20), cascade.posterior_mean(xrays, stages=1)
    cascade.data_consistency = 4
    guided = draw(20)
    assert error(guided) < 0.2 * error(plain)
    # A single step from pure noise has one estimate: its correction is that of the finished volume.
    expected = consistent(mean, xrays, acquisition, 4)
    assert torch.allclose(cascade.posterior_mean(xrays, stages=1), expected, atol=1e-6)
    assert not torch.allclose(guided, consistent(plain, xrays, acquisition, 4), atol=1e-3)


def test_films_are_no_x_rays_to_enforce_on_the_way(root, folder, tmp_path):
    pipeline = load_cascade_pipeline(folder, data_consistency=2)
    xrays = pipeline.read(*files(root))
    assert pipeline.predict(xrays).isfinite().all()
    with pytest.raises(InputError, match="--data-consistency is 2, but the X-rays are scouts or films"):
        pipeline.predict(xrays, measured=True)
    with pytest.raises(InputError, match="--data-consistency is -1; expected 0"):
        load_cascade_pipeline(folder, data_consistency=-1)


def test_samples_follow_from_the_seed(xrays, folder):
    cascade = Cascade.load(folder, max_stages=1)
    first, second = (cascade.sample(xrays, 3, torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(first, cascade.sample(xrays, 3, torch.Generator().manual_seed(1)))
    assert torch.equal(cascade.posterior_mean(xrays), cascade.posterior_mean(xrays))


def test_impossible_numbers_of_steps_samples_and_stages_are_refused():
    cascade, xrays = gaussian_cascade(), torch.full((1, 2, 8, 8), 0.1)
    with pytest.raises(InputError, match="0 sampling steps"):
        cascade.sample(xrays, 0)
    with pytest.raises(InputError, match="0 samples"):
        cascade.posterior_mean(xrays, samples=0)
    with pytest.raises(InputError, match="standard deviation of 1 samples"):
        cascade.statistics(xrays, 1)
    with pytest.raises(InputError, match="3 stages wanted; this cascade has 2"):
        cascade.sample(xrays, 1, stages=3)


def test_units_convert_at_the_border():
    unit = torch.tensor([0.0, 0.25, 1.0])
    assert to_signed(unit).tolist() == [-1.0, -0.5, 1.0]
    assert torch.equal(to_unit(to_signed(unit)), unit)


# ------------------------------------------------------------------------------------------------
# Networks and checkpoints


def test_a_loaded_cascade_runs_its_stages_in_turn(folder, root, xrays):
    cascade = Cascade.load(folder)
    assert cascade.stage_names == ["low", "high"]
    assert cascade.volume_size == (32, 32, 32)
    assert (cascade.num_views, cascade.xray_size) == (2, 32)
    assert cascade.header["train_patients"] == ["p0", "p1", "p2"]
    low, high = cascade.stages
    generator = torch.Generator().manual_seed(0)
    noise = [draw_noise((1, 1, n, n, n), generator) for n in (16, 32)]
    with torch.no_grad():
        coarse = -low.model(noise[0], torch.ones(1), xrays)  # at pure noise v is -x0
        fine = -high.model(noise[1], torch.ones(1), xrays, coarse.clamp(-1, 1))
    volume = cascade.posterior_mean(xrays)
    assert volume.std() > 0.01
    assert torch.allclose(volume, to_unit(fine.clamp(-1, 1)), atol=1e-5)
    assert torch.allclose(
        Cascade.load(folder, max_stages=1).posterior_mean(xrays), to_unit(coarse.clamp(-1, 1)), atol=1e-5
    )
    assert not any(p.requires_grad for p in cascade.parameters())


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_other_predictions_stay_in_range(root, xrays, tmp_path, prediction):
    cascade = Cascade.load(make_cascade(tmp_path / "cascade", root, prediction=prediction, stages=1))
    assert cascade.stages[0].schedule.terminal_alpha == (0.02 if prediction == "noise" else 0.0)
    for volume in (cascade.posterior_mean(xrays), cascade.sample(xrays, 3, torch.Generator().manual_seed(0))):
        assert volume.isfinite().all()
        assert volume.min() >= 0
        assert volume.max() <= 1


def test_only_noise_prediction_clips_its_estimates_on_the_way():
    # A network that finds no noise at all: x0 = x / alpha, 50 times x where alpha is 0.02.
    largest = {}
    for prediction in ("noise", "x0"):
        schedule = Schedule.for_prediction(prediction)
        model = GaussianStage(4, schedule, 0.0, 0.0, 1.0)

        def denoise(x, position, condition, prediction=prediction):
            largest[prediction] = max(largest.get(prediction, 0.0), x.abs().max().item())
            return torch.zeros_like(x) if prediction == "noise" else 50 * x

        model.denoise = denoise
        noise = draw_noise((1, 1, 4, 4, 4), torch.Generator().manual_seed(0))
        volume = Stage("stage", model, schedule, prediction).generate(None, noise, 4)
        assert volume.abs().max() <= 1  # what leaves the stage is in range in any case
    assert largest["noise"] < 4 < 50 < largest["x0"]


def test_bfloat16_is_close_to_float32(folder, xrays):
    volumes = [
        Cascade.load(folder, max_stages=1, precision=name).sample(xrays, 4, torch.Generator().manual_seed(0))
        for name in ("float32", "bfloat16")
    ]
    assert volumes[1].dtype == torch.float32
    assert 0 < (volumes[0] - volumes[1]).abs().mean() < 0.05 * volumes[0].std()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_names_folder_and_stage(folder, xrays, value):
    cascade = Cascade.load(folder)
    cascade.stages[0].schedule.to_x0 = lambda output, *_: torch.full_like(output, value)
    for use in (cascade.posterior_mean, partial(cascade.statistics, samples=2, steps=2)):
        with pytest.raises(InputError, match=rf"{re.escape(str(folder))}: stage low: the predicted volume holds NaN"):
            use(xrays)


def test_a_wrong_number_of_views_is_refused(folder, single_view, xrays):
    with pytest.raises(InputError, match="trained with one view, but got 2"):
        Cascade.load(single_view).sample(xrays, 1)
    with pytest.raises(InputError, match="trained with two views, but got 1"):
        Cascade.load(folder).sample(xrays[:, :1], 1)
    with pytest.raises(InputError, match=r"shape \(2, 32, 32\)"):
        Cascade.load(folder).sample(xrays[0], 1)
    assert Cascade.load(single_view).sample(xrays[:, :1], 1).shape == (1, 1, 16, 16, 16)
    cascade = Cascade.load(folder, max_stages=1)
    assert torch.equal(cascade.posterior_mean(xrays[:, :, None]), cascade.posterior_mean(xrays))


def copy_of(folder, tmp_path, **headers):
    """A copy of a checkpoint folder with header keys of ``high`` changed; None removes one."""
    target = tmp_path / "copy"
    for name in ("low", "high"):
        data = load_checkpoint(folder / name / "best.pt")
        if name == "high":
            data.update(headers)
            data = {key: value for key, value in data.items() if value is not None}
        save_checkpoint(target / name / "best.pt", data)
    write_json(target / "config.json", read_json(folder / "config.json"))
    return target


def test_folders_that_are_no_cascade_are_named(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        Cascade.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"best.pt: is a file; expected the checkpoint folder"):
        Cascade.load(folder / "low" / "best.pt")
    with pytest.raises(InputError, match=r"low: no config.json.*it looks like one stage's folder: give .*cascade"):
        Cascade.load(folder / "low")
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other" / "config.json", {"model": {}})
    with pytest.raises(InputError, match="no list of stages with plain names"):
        Cascade.load(tmp_path / "other")
    for count in (0, 3):
        with pytest.raises(InputError, match=rf"{count} stages wanted; expected 1 to 2 \(low, high\)"):
            Cascade.load(folder, max_stages=count)


def test_a_stage_that_is_not_trained_yet_is_named(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    (copy / "high" / "best.pt").rename(copy / "high" / "last.pt")
    with pytest.raises(InputError, match=r"stage 2 of 2, high, has no checkpoint.*--max-stages 1.*only last.pt"):
        Cascade.load(copy)
    assert Cascade.load(copy, max_stages=1).volume_size == (16, 16, 16)


def test_foreign_and_damaged_checkpoints_are_named(folder, root, tmp_path):
    copy = copy_of(folder, tmp_path)
    path = copy / "high" / "best.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"high.best.pt: truncated or not a checkpoint"):
        Cascade.load(copy)
    make_checkpoint(path, root)
    with pytest.raises(InputError, match=r"high.best.pt: is a checkpoint of 'enhanced_direct'; expected 'hybrid_vit"):
        Cascade.load(copy)
    path.write_bytes((copy / "low" / "best.pt").read_bytes())
    with pytest.raises(InputError, match=r"high.best.pt: is stage low; expected high"):
        Cascade.load(copy)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"prediction": None}, "key 'prediction' is missing"),
        ({"prediction": "score"}, "prediction is 'score'"),
        (
            {"stage_names": ["low", "mid", "high"]},
            r"cascade of other stages \(low, mid, high; config.json lists low, high",
        ),
        ({"stage_settings": {"volume_size": 32}}, "voxel_dim is None, but 32 in config.json"),
        ({"hu_window": [-1000.0, 1000.0]}, "hu_window is not that of stage low"),
        ({"num_views": 1}, "num_views is not that of stage low"),
        (
            {"geometry": {**Geometry().to_dict(), "fov_mm": 300.0}},
            "geometry is not that of stage low: fov_mm 300.0 against",
        ),
        ({"model_state_dict": {}}, "its weights do not fit its own settings"),
        ({"shift": -1.0}, "shift is -1"),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_named(folder, tmp_path, headers, message):
    with pytest.raises(InputError, match=rf"high.best.pt: .*{message}"):
        Cascade.load(copy_of(folder, tmp_path, **headers))


def test_a_configuration_changed_since_training_is_named(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    config = read_json(copy / "config.json")
    config["stages"][1]["num_heads"] = 4
    write_json(copy / "config.json", config)
    with pytest.raises(InputError, match=r"num_heads is 2, but 4 in config.json; the checkpoint is of another config"):
        Cascade.load(copy)
    config["stages"][0]["name"] = "base"
    write_json(copy / "config.json", config)
    with pytest.raises(InputError, match=r"base.*has no checkpoint; train it"):
        Cascade.load(copy)


def test_a_stage_trained_on_other_weights_of_the_one_before_is_refused(folder, tmp_path):
    weights = load_checkpoint(folder / "low" / "best.pt")["model_state_dict"]
    right = {"config": {"earlier_stages": {"low": weights_fingerprint(weights)}}}
    assert Cascade.load(copy_of(folder, tmp_path, **right)).stage_names == ["low", "high"]
    wrong = {"config": {"earlier_stages": {"low": "0" * 16}}}
    with pytest.raises(InputError, match=r"other weights of stage low.*train high again, or.*--max-stages 1"):
        Cascade.load(copy_of(folder, tmp_path, **wrong))


def test_an_autocast_around_the_call_counts_where_the_cascade_has_none_of_its_own(folder, xrays):
    cascade = Cascade.load(folder, max_stages=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cascade.posterior_mean(xrays)
    assert torch.equal(inside, Cascade.load(folder, max_stages=1, precision="bfloat16").posterior_mean(xrays))
    assert not torch.equal(inside, cascade.posterior_mean(xrays))


# ------------------------------------------------------------------------------------------------
# Command line


def command(root, folder, output, *more):
    pa, lateral = files(root)
    return ["--pa", str(pa), "--lateral", str(lateral), "--checkpoint", str(folder), "--output", str(output), *more]


def hu_of(path):
    """Volume of a NIfTI file as (D, H, W)."""
    return np.asarray(nib.load(path).dataobj).transpose(2, 1, 0).astype(np.float64)


def test_by_default_the_file_holds_the_one_step_posterior_mean(root, folder, xrays, tmp_path, capsys):
    output, picture = tmp_path / "out.nii.gz", tmp_path / "out.png"
    assert inference.main(command(root, folder, output, "--picture", str(picture))) == 0
    image = nib.load(output)
    assert image.shape == (32, 32, 32)
    assert image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("L", "P", "I")
    assert np.allclose(image.header.get_zooms(), 360 / 32)
    expected = Cascade.load(folder).posterior_mean(xrays)[0, 0].numpy() * 2500 - 1024
    assert np.abs(hu_of(output) - expected).max() <= 1
    assert Image.open(picture).size[0] > 500
    assert "32 x 32 x 32 voxels of 11.25 mm" in (out := capsys.readouterr().out)
    assert "posterior mean in one step" in out


def test_the_mean_and_standard_deviation_of_samples_are_written(root, folder, xrays, tmp_path, capsys):
    output, spread = tmp_path / "mean.nii.gz", tmp_path / "std.nii.gz"
    options = ("--steps", "2", "--samples", "3", "--seed", "5", "--save-std", str(spread), "--max-stages", "1")
    assert inference.main(command(root, folder, output, *options)) == 0
    mean, std = Cascade.load(folder, max_stages=1).statistics(xrays, 3, 2, torch.Generator().manual_seed(5))
    assert np.abs(hu_of(output) - (mean[0, 0].numpy() * 2500 - 1024)).max() <= 1
    assert np.allclose(hu_of(spread), std[0, 0].numpy() * 2500, atol=1)
    assert hu_of(spread).max() > 10
    assert nib.load(spread).get_data_dtype() == np.float32
    assert np.array_equal(nib.load(spread).affine, nib.load(output).affine)
    assert "mean of 3 samples of 2 steps, seed 5" in capsys.readouterr().out


def test_a_calibrated_standard_deviation_is_the_samples_times_its_factor(root, tmp_path, capsys):
    folder = make_cascade(tmp_path / "cascade", root, stages=1)
    options = ("--samples", "4", "--steps", "2", "--save-std", str(tmp_path / "std.nii.gz"))
    inference.main(command(root, folder, tmp_path / "out.nii.gz", *options))
    output, notes = capsys.readouterr()
    assert "(as the samples have it)" in output
    assert "note: the standard deviation is not calibrated: there is no" in notes
    plain = nib.load(tmp_path / "std.nii.gz").get_fdata()
    weights = load_cascade_system(folder).checkpoints()[0].weights
    calibration = SampleCalibration(4, 1.5, 2.4, 1.2, {"steps": 2, "data_consistency": 0}, None, weights)
    write_json(folder / "std_calibration.json", calibration.to_dict())
    inference.main(command(root, folder, tmp_path / "out.nii.gz", *options))
    output, notes = capsys.readouterr()
    assert "(1.50 times that of the samples, as calibrated); 95 % of errors lie within 2.40 of them" in output
    assert "not calibrated" not in notes
    assert np.allclose(nib.load(tmp_path / "std.nii.gz").get_fdata(), 1.5 * plain, rtol=1e-5)
    pipeline = inference.load_cascade_pipeline(folder, samples=2, steps=2, device="cpu")
    pipeline(*files(root))
    low, high = pipeline.hu_window
    factor = calibration.for_samples(2).factor
    assert np.allclose(pipeline.std_hu(), pipeline.system.std[0, 0].numpy() * (high - low) * factor, rtol=1e-5)
    write_json(folder / "std_calibration.json", {**calibration.to_dict(), "weights": {"low": "others"}})
    with pytest.raises(InputError, match="is of other weights of stage low"):
        inference.main(command(root, folder, tmp_path / "refused.nii.gz", *options))
    assert not (tmp_path / "refused.nii.gz").exists()
    inference.main(command(root, folder, tmp_path / "mean.nii.gz"))  # which has no standard deviation


def test_a_single_sample_follows_from_its_seed(root, folder, tmp_path):
    volumes = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        output, options = tmp_path / f"{name}.nii", ("--samples", "1", "--steps", "2", "--max-stages", "1")
        inference.main(command(root, folder, output, *options, "--seed", seed))
        volumes.append(hu_of(output))
    assert np.array_equal(volumes[0], volumes[1])
    assert np.abs(volumes[0] - volumes[2]).mean() > 1


def test_fewer_stages_make_a_coarser_volume(root, folder, tmp_path):
    inference.main(command(root, folder, tmp_path / "low.nii.gz", "--max-stages", "1"))
    assert nib.load(tmp_path / "low.nii.gz").shape == (16, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "50"], "--steps 50 without --samples: the posterior mean takes one step"),
        (["--samples", "0"], "--samples 0: expected at least 1"),
        (["--samples", "1", "--save-std", "std.nii.gz"], "--save-std needs at least two samples"),
        (["--save-std", "std.nii.gz"], "--save-std needs at least two samples"),
        (["--samples", "2", "--save-std", "std.png"], "--save-std std.png: unknown format; expected a name"),
        (["--samples", "2", "--save-std", "out.nii.gz"], "--save-std out.nii.gz is --output too"),
        (["--samples", "2", "--steps", "0"], "0 sampling steps; expected 1 to 1000"),
        (["--max-stages", "3"], "3 stages wanted"),
        (["--output", "out.png"], "--output out.png: unknown format; expected a name ending in .nii.gz"),
        (["--device", "toaster"], "--device toaster"),
    ],
)
def test_options_that_cannot_work_are_refused_and_write_nothing(root, folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        inference.main(command(root, folder, "out.nii.gz", *options))
    assert not list(tmp_path.iterdir())


def test_x_rays_are_checked_as_in_the_direct_system(root, folder, tmp_path):
    pa, lateral = files(root)
    swapped = ["--pa", str(lateral), "--lateral", str(pa), "--checkpoint", str(folder)]
    with pytest.raises(InputError, match="look swapped"):
        inference.main([*swapped, "--output", str(tmp_path / "out.nii.gz")])
    with pytest.raises(InputError, match="no such X-ray file"):
        inference.main(command(root, folder, tmp_path / "out.nii.gz", "--pa", "missing.png"))
    assert not list(tmp_path.iterdir())


def test_one_view_for_a_cascade_of_one_view(root, folder, single_view, tmp_path, capsys):
    pa, _ = files(root)
    output, picture = tmp_path / "out.nii.gz", tmp_path / "out.png"
    one_view = ["--pa", str(pa), "--output", str(output), "--picture", str(picture)]
    assert inference.main([*one_view, "--checkpoint", str(single_view)]) == 0
    assert nib.load(output).shape == (16, 16, 16)
    assert picture.exists()
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1  # nothing about the view that is not there
    assert notes[0].endswith("p4_pa_drr.png: resized from 64 x 64 to 32 x 32")
    with pytest.raises(InputError, match="trained with one view, but got 2; give the PA view alone"):
        inference.main(command(root, single_view, output))
    capsys.readouterr()
    all_pairs = ["--folder", str(root), "--checkpoint", str(single_view), "--output", str(tmp_path / "all")]
    assert inference.main(all_pairs) == 0
    assert "note: lateral X-rays are not used: the cascade was trained with the PA view" in capsys.readouterr().err
    assert len(list((tmp_path / "all").iterdir())) == 6
    with pytest.raises(InputError, match="trained with two views, but got 1; give the PA and the lateral view"):
        inference.main([*one_view, "--checkpoint", str(folder)])


def test_the_pipeline_takes_arrays_and_can_be_called_again(root, folder):
    pipeline = inference.load_cascade_pipeline(folder, samples=2, steps=1, max_stages=1, device="cpu")
    arrays = [np.asarray(Image.open(path)) / 65535.0 for path in files(root)]
    hu, affine = pipeline(*arrays)
    again, _ = pipeline(*files(root))
    assert hu.shape == (16, 16, 16)
    assert affine.shape == (4, 4)
    assert np.abs(hu.astype(int) - again).max() <= 1
    assert pipeline.std_hu().shape == (16, 16, 16)


def test_it_runs_from_its_own_folder_and_as_a_module_from_the_root(root, folder, tmp_path):
    output = tmp_path / "out.nii.gz"
    module = [sys.executable, "-m", "hybrid_vit_cascade.inference"]
    done = run([*module, *command(root, folder, output, "--max-stages", "1")])
    assert done.returncode == 0, done.stderr
    assert nib.load(output).shape == (16, 16, 16)
    # From its folder, up to the loading of checkpoints; an error is one line and exit status 2, as everywhere.
    script = [sys.executable, "inference.py", *command(root, tmp_path / "nowhere", output)]
    options = {"capture_output": True, "text": True, "timeout": 120}
    failed = subprocess.run(script, cwd=ROOT / "hybrid_vit_cascade", check=False, **options)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
    assert "nowhere: no such folder" in failed.stderr


# ------------------------------------------------------------------------------------------------
# Evaluation


def test_its_methods_are_the_three_ways_of_the_cascade(folder, root):
    cascade = Cascade.load(folder, max_stages=1)
    data = PatientDataset(root, "test", 16, 32)
    methods = CascadeSystem(cascade, samples=3, steps=2, seed=7).methods()
    assert list(methods) == ["cascade_mean", "cascade_mean_of_3", "cascade_sample"]
    volumes = {name: predict(data[0]) for name, predict in methods.items()}
    for volume in volumes.values():
        assert volume.shape == (16, 16, 16)
        assert volume.min() >= 0
        assert volume.max() <= 1
    assert torch.equal(volumes["cascade_mean"], cascade.posterior_mean(data[0]["xrays"][None])[0, 0])
    # The noise belongs to the patient, not to the order of the calls; two patients have different noise.
    again = CascadeSystem(cascade, samples=3, steps=2, seed=7).methods()
    other = again["cascade_sample"](data[1])
    assert torch.equal(again["cascade_mean_of_3"](data[0]), volumes["cascade_mean_of_3"])
    assert torch.equal(again["cascade_sample"](data[0]), volumes["cascade_sample"])
    same_xrays = again["cascade_sample"]({**data[1], "xrays": data[0]["xrays"]})
    assert not torch.equal(same_xrays, volumes["cascade_sample"])
    assert not torch.equal(other, volumes["cascade_sample"])
    mean_of_samples = methods["cascade_mean_of_3"]
    scores = coverage(volumes["cascade_mean_of_3"], mean_of_samples.std, data[0]["ct_volume"][0], data[0]["mask"][0])
    assert 0 <= scores["coverage_1sd"] <= scores["coverage_2sd"] <= 1
    assert list(CascadeSystem(cascade).methods()) == ["cascade_mean"]
    assert list(CascadeSystem(cascade, samples=1).methods()) == ["cascade_mean", "cascade_sample"]


def test_a_cascade_of_one_view_is_evaluated_on_the_pa_view(single_view, root):
    item = PatientDataset(root, "test", 16, 32)[0]
    predict = CascadeSystem(Cascade.load(single_view)).methods()["cascade_mean"]
    changed = item["xrays"].clone()
    changed[1] = 0
    assert torch.equal(predict(item), predict({**item, "xrays": changed}))
    changed[0] = 0
    assert not torch.equal(predict(item), predict({**item, "xrays": changed}))


def test_coverage_counts_voxels_within_one_and_two_standard_deviations():
    target = torch.zeros(2, 2, 2)
    prediction = torch.tensor([0.0, 0.5, -1.0, 1.5, 2.0, -2.5, 3.0, 9.0]).view(2, 2, 2)
    scores = coverage(prediction, torch.ones(2, 2, 2), target)
    assert scores == {"coverage_1sd": 3 / 8, "coverage_2sd": 5 / 8}
    mask = (prediction.abs() <= 2.5).float()
    assert coverage(prediction, torch.ones(2, 2, 2), target, mask) == {"coverage_1sd": 3 / 6, "coverage_2sd": 5 / 6}
    with pytest.raises(ValueError, match="mask is empty"):
        coverage(prediction, torch.ones(2, 2, 2), target, torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="different shapes"):
        coverage(prediction, torch.ones(2, 2, 1), target)
    with pytest.raises(ValueError, match="NaN"):
        coverage(prediction * float("nan"), torch.ones(2, 2, 2), target)


@pytest.mark.parametrize("samples", [2, 5, 8, 50])
def test_expected_coverage_is_what_a_perfect_model_shows(samples):
    draws = torch.randn(samples, 200, 10, 100, generator=torch.Generator().manual_seed(0))
    truth = torch.randn(200, 10, 100, generator=torch.Generator().manual_seed(1))
    found = coverage(draws.mean(dim=0), draws.std(dim=0), truth)
    for key, value in expected_coverage(samples).items():
        assert found[key] == pytest.approx(value, abs=4e-3)  # 3.6 binomial standard deviations of 200,000 voxels


def test_expected_coverage_needs_two_samples_and_tends_to_the_normal_distribution():
    with pytest.raises(ValueError, match="1 samples have no standard deviation"):
        expected_coverage(1)
    many = expected_coverage(100000)
    assert many["coverage_1sd"] == pytest.approx(0.6827, abs=1e-4)
    assert many["coverage_2sd"] == pytest.approx(0.9545, abs=1e-4)


# ------------------------------------------------------------------------------------------------
# INFERENCE.md


def table_of(page, corner):
    """``{first cell: other cells}`` of the table whose first header cell is ``corner``."""
    lines = page[page.index(f"\n| {corner} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_the_pages_options_exist_and_its_figures_are_right(capsys):
    page = (ROOT / "hybrid_vit_cascade" / "INFERENCE.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        inference.parse_args(["--help"])
    option = re.compile(r"--[a-z][a-z_-]*")
    assert set(option.findall(page)) <= set(option.findall(capsys.readouterr().out))
    coverages = table_of(page, "samples")
    assert len(coverages) == 4
    for samples, cells in coverages.items():
        assert cells == [f"{100 * value:.1f} %" for value in expected_coverage(int(samples)).values()]
    spreads = table_of(page, "steps")
    assert len(spreads) == 4
    for steps, cells in spreads.items():
        for cell, (shift, sd) in zip(cells, product((1.0, resolution_shift(128)), (0.05, 0.25))):
            error = spread_of_samples(int(steps.split()[0]), shift, sd) / sd - 1
            assert float(cell.removesuffix(" %")) == pytest.approx(100 * error, abs=0.6)


def test_the_page_s_price_of_sharpness_is_that_of_a_perfect_model():
    """Detail of which the X-rays say nothing: truth and samples are independent, the posterior mean is empty."""
    noise = torch.randn(17, 48, 48, 48, generator=torch.Generator().manual_seed(0)) / 100
    truth, draws = noise[0], noise[1:]
    rows = table_of((ROOT / "hybrid_vit_cascade" / "INFERENCE.md").read_text(encoding="utf-8"), "mean of")
    assert len(rows) == 4
    for name, cells in rows.items():
        mean = draws[: int(name.split()[0])].mean(dim=0)
        price = psnr(mean, truth) - psnr(torch.zeros_like(truth), truth)
        assert float(cells[0]) == pytest.approx(price, abs=0.05)
        assert float(cells[1]) == pytest.approx(compare_spectra(mean, truth)["fine_power_db"], abs=0.15)


def spread_of_samples(steps, shift, sd):
    """Standard deviation of samples of a perfect network for data N(0, sd^2): the image of noise 1."""
    schedule = Schedule(1000, shift)

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        x0 = alpha * sd**2 / (alpha**2 * sd**2 + sigma**2) * x
        return (alpha * x - x0) / sigma

    return sample(denoise, schedule, torch.ones(1, 1, 1, 1, 1), steps).item()
