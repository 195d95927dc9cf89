"""Training of the cascade: stages in turn, what is frozen, the loss, resuming, several processes, bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch

from dataset import PatientDataset
from hybrid_vit_cascade.cascade import Cascade
from hybrid_vit_cascade.diffusion import Schedule
from hybrid_vit_cascade.models import CascadeStage
from hybrid_vit_cascade.settings import load_cascade_config, stage_run
from hybrid_vit_cascade.training import train_progressive
from hybrid_vit_cascade.training.chain import Chain, stage_minutes
from hybrid_vit_cascade.training.task import EARLIER, StageTask
from hybrid_vit_cascade.training.train_progressive import main
from tests.helpers.hooks import at_forward, raising
from tests.helpers.paths import ROOT
from tests.helpers.runs import run_ranks
from tests.helpers.tiny_cascade import TINY
from tests.helpers.tiny_data import make_checkpoint, make_dataset
from xray2ct.checkpoints import load_checkpoint, save_checkpoint
from xray2ct.data.sample_random import SampleRandom
from xray2ct.files import InputError, read_json, write_json
from xray2ct.metrics import psnr
from xray2ct.training.config import config_dict
from xray2ct.training.distributed import Processes
from xray2ct.training.precision import Precision
from xray2ct.training.trainer import TrainingError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("cascade_training") / "data")


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("cascade_config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def words(root, config_path, tmp_path):
    """Command line of a tiny run into ``tmp_path / "run"``, with overrides."""

    def make(*overrides, folder=tmp_path / "run", options=()):
        settings = [word for text in overrides for word in ("--set", text)]
        common = ["--config", str(config_path), "--data", str(root), "--checkpoint-dir", str(folder)]
        return [*common, "--no-tensorboard", *options, *settings]

    return make


@pytest.fixture(scope="module")
def trained(root, config_path, tmp_path_factory):
    """Both stages, trained without interruption."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["--config", str(config_path), "--data", str(root), "--checkpoint-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def stage_1_done(trained, tmp_path):
    """``tmp_path / "run"`` with the first stage as in ``trained``: only the second has to be trained."""
    shutil.copytree(trained / "low", tmp_path / "run" / "low")
    shutil.copy(trained / "config.json", tmp_path / "run")


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def state_of(path):
    """Tensors of the trained weights, the optimiser's included."""
    data = load_checkpoint(path)
    tensors = {f"ema.{k}": v for k, v in data["model_state_dict"].items() if torch.is_tensor(v)}
    tensors |= {f"model.{k}": v for k, v in data["training_state"]["model"].items() if torch.is_tensor(v)}
    for number, entry in data["training_state"]["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in entry.items()}
    return tensors


def assert_same_state(one, other):
    a, b = state_of(one), state_of(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def make_task(root, config_path, *overrides, index=0, folder=None):
    config = load_cascade_config(config_path, [f"data.dataset_path={root}", *overrides])
    run = stage_run(config, index, world_size=1)
    earlier = Chain(config, folder, Processes()).earlier(index)
    return StageTask(config, run, earlier, Processes())


def raw_batch(task, count=2):
    items = [task.train_data[i] for i in range(count)]
    return {key: torch.stack([item[key] for item in items]) for key in ("ct_volume", "body") if key in items[0]}


# -- a whole run -----------------------------------------------------------------------------------


def test_stages_leave_what_they_promise(trained, root):
    assert {p.name for p in trained.iterdir()} == {"config.json", "run.json", "run.lock", "low", "high"}
    for index, name in enumerate(("low", "high")):
        assert {"best.pt", "last.pt", "log.jsonl"} <= {p.name for p in (trained / name).iterdir()}
        data = load_checkpoint(trained / name / "best.pt", kind="hybrid_vit_cascade")
        assert (data["stage_index"], data["stage_name"], data["stage_names"]) == (index, name, ["low", "high"])
        assert data["stage_settings"]["volume_size"] == 16 * 2**index
        assert (data["prediction"], data["num_timesteps"], data["num_views"]) == ("v", 1000, 2)
        assert data["train_patients"] == ["p0", "p1", "p2"]
        assert data["cascade_config"] == read_json(trained / "config.json")
        assert len(events(trained / name, "epoch")) == 2
    assert read_json(trained / "config.json")["data"]["dataset_path"] == str(root)


def test_validation_scores_the_very_posterior_mean_of_inference(trained, root):
    for stages, name, size in ((1, "low", 16), (2, "high", 32)):
        item = PatientDataset(root, "val", size, 32)[0]
        volume = Cascade.load(trained, max_stages=stages).posterior_mean(item["xrays"][None])
        metrics = load_checkpoint(trained / name / "best.pt")["metrics"]
        assert metrics["psnr"] == pytest.approx(psnr(volume[0, 0], item["ct_volume"][0]), abs=1e-4)  # in float32
    assert "psnr_before" in metrics
    coarse = Cascade.load(trained, max_stages=1).posterior_mean(item["xrays"][None])
    coarse = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="trilinear")
    assert metrics["psnr_before"] == pytest.approx(psnr(coarse[0, 0], item["ct_volume"][0]), abs=1e-4)


def test_a_stage_learns(words, tmp_path):
    overrides = ["training.num_epochs=8", "training.terminal_fraction=0.5", "logging.val_interval=8"]
    assert main(words(*overrides, options=["--max-stages", "1"])) == 0
    losses = [event["diffusion"] for event in events(tmp_path / "run" / "low", "epoch")]
    assert losses[-1] < 0.6 * losses[0]
    assert not (tmp_path / "run" / "high").exists()


def test_event_files_are_written_by_default(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for name in ("low", "high"):
        found = accumulator.EventAccumulator(str(trained / name / "tensorboard"))
        found.Reload()
        wanted = {"Diffusion Loss", "Physics Loss", "Val Loss", "PSNR", "Learning Rate", "Samples per Second"}
        assert wanted <= set(found.Tags()["scalars"])
        assert found.Tags()["images"] == ["Sample p3"]


def test_dry_run_prints_sizes_and_writes_nothing(words, tmp_path, capsys):
    assert main(words(options=["--dry-run"])) == 0
    printed = capsys.readouterr().out
    for expected in ("Stage 1 low: 16^3, 0.2", "Stage 2 high: 32^3", "M parameters", "3 training and 1 validation"):
        assert expected in printed
    assert not (tmp_path / "run").exists()


# -- frozen stages ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("stage_1_done")
def test_a_run_that_is_refused_leaves_the_folder_s_settings_as_they_were(words, trained, tmp_path):
    """Stage 1 is done; stage 2 has begun with other settings."""
    folder = shutil.copytree(trained / "high", tmp_path / "run" / "high").parent
    state = load_checkpoint(folder / "high" / "last.pt")
    state["training_state"]["epoch"] = 2  # not at its end
    save_checkpoint(folder / "high" / "last.pt", state)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"training\.learning_rate 0\.002 -> 0\.1"):
        main(words("training.learning_rate=0.1"))
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.usefixtures("stage_1_done")
def test_earlier_stages_and_their_averages_do_not_move(words, tmp_path, monkeypatch):
    folder, kept = tmp_path / "run", {}
    files = {path: path.read_bytes() for path in (folder / "low").rglob("*") if path.is_file()}
    original = train_progressive.fit

    def spy(model, task, *rest):
        cascade = task.earlier
        before = {k: v.clone() for k, v in cascade.stages[0].model.state_dict().items() if torch.is_tensor(v)}
        original(model, task, *rest)
        kept.update(before=before, after=cascade.stages[0].model.state_dict(), cascade=cascade, model=model)

    monkeypatch.setattr(train_progressive, "fit", spy)
    assert main(words()) == 0
    assert all(torch.equal(kept["after"][name], value) for name, value in kept["before"].items())
    frozen = list(kept["cascade"].parameters())
    assert all(not p.requires_grad and p.grad is None for p in frozen)
    assert {id(p) for p in frozen}.isdisjoint(id(p) for p in kept["model"].parameters())
    assert not kept["cascade"].stages[0].model.training
    # What is frozen are the moving averages of best.pt, and the files of stage 1 stay as they were, byte by byte.
    best = load_checkpoint(folder / "low" / "best.pt")["model_state_dict"]
    assert all(torch.equal(best[name], value) for name, value in kept["before"].items())
    assert {path: path.read_bytes() for path in (folder / "low").rglob("*") if path.is_file()} == files


class Recorded:
    """Earlier stages that keep what they were asked: (steps, seed, volume) of each sample."""

    def __init__(self, cascade: Cascade):
        self.cascade, self.calls = cascade, []

    def sample(self, xrays, steps, generators):
        volumes = self.cascade.sample(xrays, steps, generators)
        self.calls += [(steps, generator.initial_seed(), volume) for generator, volume in zip(generators, volumes)]
        return volumes


def test_a_stage_is_conditioned_on_the_noisy_output_of_the_earlier_ones(trained, root, config_path):
    task = make_task(root, config_path, "conditioning.noise=0.2", index=1, folder=trained)
    task.earlier = Recorded(task.earlier)
    calls = task.earlier.calls
    levels, errors, kinds = [], [], []
    for seed in range(40):
        calls.clear()
        batch = task.make_batch(raw_batch(task), [seed, seed + 1000], torch.device("cpu"))
        calls.sort(key=lambda call: call[1] ^ EARLIER)  # the first sample has the smaller seed
        kinds.append([steps for steps, _, _ in calls])
        error = batch["previous"] - (2 * torch.stack([volume for _, _, volume in calls]) - 1)
        levels += batch["level"].tolist()
        errors += (error.flatten(1).std(dim=1) / batch["level"]).tolist()
    # The posterior mean (one step) or a sample, each sample of a micro-batch for itself.
    assert {tuple(kind) for kind in kinds} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert 25 <= sum(steps == 1 for kind in kinds for steps in kind) <= 55
    assert all(0 < level < 0.2 for level in levels)
    assert max(levels) > 0.18
    assert min(levels) < 0.02
    assert all(0.9 < error < 1.1 for error in errors)  # the level that the network is told is the noise there is


@pytest.mark.parametrize(("fraction", "steps"), [("0", 2), ("1", 1)])
def test_the_share_of_posterior_means_is_a_setting(trained, root, config_path, fraction, steps):
    task = make_task(root, config_path, f"conditioning.mean_fraction={fraction}", index=1, folder=trained)
    task.earlier = Recorded(task.earlier)
    for seed in range(4):
        task.make_batch(raw_batch(task), [seed, seed + 1], torch.device("cpu"))
    assert {call[0] for call in task.earlier.calls} == {steps}


# -- batches and loss ------------------------------------------------------------------------------


def test_everything_drawn_follows_from_the_samples_seeds(trained, root, config_path):
    task = make_task(root, config_path, index=1, folder=trained)
    raw, device = raw_batch(task), torch.device("cpu")
    one, same, other = (task.make_batch(raw, seeds, device) for seeds in ([3, 4], [3, 4], [5, 4]))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["noise"][0], other["noise"][0])
    assert torch.equal(one["noise"][1], other["noise"][1])
    assert torch.equal(one["x0"][1], other["x0"][1])
    assert -1 <= one["x0"].min() < one["x0"].max() <= 1


@pytest.mark.parametrize("index", [0, 1])
def test_a_sample_is_the_same_alone_and_as_one_of_two(trained, root, config_path, index):
    """So that two processes are one: nothing depends on who shares the micro-batch (float32 summation apart)."""
    task = make_task(root, config_path, "conditioning.noise=0.2", index=index, folder=trained)
    raw, device = raw_batch(task), torch.device("cpu")
    for seeds in ((3, 4), (4, 3), (5, 9), (1, 6)):
        both = task.make_batch(raw, list(seeds), device)
        for place in range(2):
            one = {name: values[place : place + 1] for name, values in raw.items()}
            alone = task.make_batch(one, [seeds[place]], device)
            for name, value in alone.items():
                assert torch.allclose(value[0], both[name][place], atol=1e-5), (seeds, place, name)


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 2), (0.5, 75, 125), (1.0, 200, 200)])
def test_a_share_of_the_samples_is_pure_noise(root, config_path, fraction, low, high):
    task = make_task(root, config_path, f"training.terminal_fraction={fraction}")
    times = task.draw_times(SampleRandom(range(200))).tolist()
    assert low <= sum(t == 999 for t in times) <= high
    rest = [t for t in times if t != 999]
    assert all(0 <= t < 999 for t in rest)
    if fraction == 0.0:
        assert 420 < sum(rest) / len(rest) < 580


def fixed_output(value):
    """A network whose output is ``value`` and that keeps what it was called with."""

    def model(*inputs):
        model.inputs = inputs
        return value

    return model


@pytest.mark.parametrize("prediction", ["v", "noise", "x0"])
def test_the_loss_is_the_weighted_error_plus_the_weighted_physics_loss(root, config_path, prediction):
    task = make_task(root, config_path, f"prediction={prediction}", "stage1.physics_weight=0.7")
    batch = task.make_batch(raw_batch(task), [1, 2], torch.device("cpu"))
    batch["t"] = torch.tensor([300, 700])
    model = fixed_output(torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)))
    total, parts = task.loss(model, batch)

    schedule = Schedule.for_prediction(prediction, 1000, 8.0)
    x_t, position, xrays, previous, level = model.inputs
    assert torch.equal(position, torch.tensor([300, 700]) / 999)
    assert previous is None
    assert level is None
    assert torch.equal(xrays, batch["xrays"])
    errors, physics = [], []
    for i, t in enumerate((300, 700)):
        alpha, sigma = schedule.level(t)
        x0, noise, output = batch["x0"][i].double(), batch["noise"][i].double(), model(*model.inputs)[i].double()
        noisy = alpha * x0 + sigma * noise
        assert torch.allclose(x_t[i].double(), noisy, atol=1e-5)
        snr = (alpha / sigma) ** 2
        truth = {"v": alpha * noise - sigma * x0, "noise": noise, "x0": x0}[prediction]
        weight = {"v": min(1, 5 / (snr + 1)), "noise": min(1, 5 / snr), "x0": min(5, snr + 1)}[prediction]
        errors.append(weight * (output - truth).square().mean().item())
        estimate = {
            "v": alpha * noisy - sigma * output,
            "noise": (noisy - sigma * output) / alpha,
            "x0": output,
        }[prediction]
        alone = task.physics(estimate[None].float(), batch["xrays"][i : i + 1]).item()
        physics.append(snr / (1 + snr) * alone)
    assert parts["diffusion"].item() == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert parts["physics"].item() == pytest.approx(sum(physics) / 2, rel=1e-3)
    assert total.item() == pytest.approx(sum(errors) / 2 + 0.7 * sum(physics) / 2, rel=1e-3)


def test_the_switches_switch(root, config_path):
    task = make_task(root, config_path, "stage1.use_physics_loss=false", "stage1.use_depth_lifting=false")
    batch = task.make_batch(raw_batch(task), [1, 2], torch.device("cpu"))
    total, parts = task.loss(fixed_output(torch.zeros(2, 1, 16, 16, 16)), batch)
    assert list(parts) == ["diffusion"]
    assert total is parts["diffusion"]
    model = task.build_model()
    assert model.settings["use_depth_lifting"] is False
    assert make_task(root, config_path).build_model().settings["use_depth_lifting"] is True
    rows = task.validate(model.eval(), Processes(), Precision("float32", torch.device("cpu")))
    assert "physics" not in rows[0]


def test_simulated_films_and_the_physics_loss_exclude_each_other(root, config_path):
    words = r"stage1.use_physics_loss is true, but simulated films .* are no renderings of their volumes"
    with pytest.raises(InputError, match=words):
        make_task(root, config_path, "augment.film.probability=0.5")
    task = make_task(root, config_path, "augment.film.probability=1", "stage1.use_physics_loss=false")
    batch = task.make_batch(raw_batch(task), [1, 2], torch.device("cpu"))
    assert torch.isfinite(batch["xrays"]).all()


def test_one_view_trains_on_the_frontal_image_alone(words, tmp_path):
    overrides = ["num_views=1", "training.num_epochs=1"]
    assert main(words(*overrides, options=["--max-stages", "1"])) == 0
    folder = tmp_path / "run"
    assert load_checkpoint(folder / "low" / "best.pt")["num_views"] == 1
    assert Cascade.load(folder, max_stages=1).posterior_mean(torch.rand(1, 1, 32, 32)).shape == (1, 1, 16, 16, 16)
    # Single-view weights under two views, and the other way round.
    with pytest.raises(InputError, match=r"low.last\.pt: trained with num_views 1; now 2"):
        main(words("training.num_epochs=1"))


# -- resuming --------------------------------------------------------------------------------------


def assert_same_run(one, other, stage):
    assert_same_state(one / stage / "last.pt", other / stage / "last.pt")
    ours, theirs = (load_checkpoint(folder / stage / "best.pt") for folder in (one, other))
    assert ours["metrics"] == theirs["metrics"]


class Crash(Exception):
    pass


def crash_at(call):
    return at_forward(CascadeStage, call, raising(Crash()))


def sigterm_at(call):
    return at_forward(CascadeStage, call, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def test_a_crash_in_the_middle_of_an_epoch_ends_with_the_same_state_bit_for_bit(words, trained, tmp_path):
    command = words("logging.checkpoint_minutes=0.0", options=["--max-stages", "1"])
    with crash_at(5), pytest.raises(Crash):  # the second step of epoch 2
        main(command)
    state = load_checkpoint(tmp_path / "run" / "low" / "last.pt")["training_state"]
    assert (state["epoch"], state["step_in_epoch"]) == (2, 1)
    assert main(command) == 0
    assert_same_run(tmp_path / "run", trained, "low")


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.usefixtures("stage_1_done")
def test_sigterm_finishes_the_step_and_saves(words, trained, tmp_path, capsys):
    with sigterm_at(2):
        assert main(words()) == 128 + signal.SIGTERM
    assert "SIGTERM: saved" in capsys.readouterr().err
    state = load_checkpoint(tmp_path / "run" / "high" / "last.pt")["training_state"]
    assert (state["epoch"], state["step_in_epoch"]) == (1, 2)
    assert main(words()) == 0
    assert_same_state(tmp_path / "run" / "high" / "last.pt", trained / "high" / "last.pt")


def test_a_finished_run_has_nothing_to_do(words, trained, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*.pt")}
    assert main(words(folder=trained)) == 0
    printed = capsys.readouterr().out
    assert "Stage 1, low: done, used as it is" in printed
    assert "Stage 2, high: done, used as it is" in printed
    assert {path: path.read_bytes() for path in trained.rglob("*.pt")} == before


@pytest.mark.usefixtures("stage_1_done")
def test_resume_from_another_folder_goes_on_bit_for_bit(words, trained, tmp_path):
    first, second = tmp_path / "run", tmp_path / "second"
    with crash_at(5), pytest.raises(Crash):
        main(words("logging.checkpoint_minutes=0.0", folder=first))
    source = first / "high" / "last.pt"
    assert main(words(folder=second, options=["--resume-from", str(source)])) == 0
    assert_same_run(second, trained, "high")
    assert (second / "low" / "best.pt").read_bytes() == (first / "low" / "best.pt").read_bytes()
    # The same command again goes on from what it has reached, not from where it came from.
    before = (second / "high" / "last.pt").read_bytes()
    assert main(words(folder=second, options=["--resume-from", str(source)])) == 0
    assert (second / "high" / "last.pt").read_bytes() == before


def test_going_back_never_throws_the_newest_state_away(words, tmp_path):
    short = ("logging.save_checkpoint_interval=1",)
    assert main(words(*short, options=["--max-stages", "1"])) == 0
    folder = tmp_path / "run" / "low"
    back = ["--max-stages", "1", "--resume-from", str(folder / "epoch_1.pt")]
    with pytest.raises(InputError, match=r"last\.pt \(step 6\) would be lost for .*epoch_1\.pt \(step 3\)"):
        main(words(*short, options=back))
    final = state_of(folder / "last.pt")
    (folder / "last.pt").unlink()
    assert main(words(*short, options=back)) == 0
    again = state_of(folder / "last.pt")
    assert all(torch.equal(final[name], again[name]) for name in final)


@pytest.mark.usefixtures("stage_1_done")
def test_finished_stages_may_get_other_training_settings_later(words, tmp_path, capsys):
    before = (tmp_path / "run" / "low" / "best.pt").read_bytes()
    assert main(words("training.num_epochs=1", "training.learning_rate=1e-3")) == 0
    printed = capsys.readouterr().out
    assert "note: low stays as it was trained" in printed
    assert "training.learning_rate 0.002 -> 0.001" in printed
    assert (tmp_path / "run" / "low" / "best.pt").read_bytes() == before
    assert load_checkpoint(tmp_path / "run" / "high" / "last.pt")["config"]["training"]["learning_rate"] == 1e-3


@pytest.mark.usefixtures("stage_1_done")
def test_a_stage_does_not_go_on_after_its_earlier_stage_was_replaced(words, tmp_path):
    with sigterm_at(1):
        main(words())
    path = tmp_path / "run" / "low" / "best.pt"
    data = load_checkpoint(path)
    data["model_state_dict"]["stem.bias"] += 1e-3
    save_checkpoint(path, data)
    with pytest.raises(InputError, match=r"high.last\.pt was trained with other settings.*earlier_stages\.low"):
        main(words())


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stage_1_done")
def test_a_nan_names_stage_epoch_and_step_and_keeps_the_last_good_checkpoint(words, tmp_path):
    nan = at_forward(CascadeStage, 5, lambda output: output * math.nan)
    with nan, pytest.raises(TrainingError) as error:
        main(words("logging.checkpoint_minutes=0.0"))
    for expected in (
        "stage high: epoch 2, step 2, patients p",
        "the loss is nan (Diffusion ",
        "last.pt is the last good",
    ):
        assert expected in str(error.value)
    kept = load_checkpoint(tmp_path / "run" / "high" / "last.pt")
    assert kept["training_state"]["updates"] == 4
    assert all(torch.isfinite(v).all() for v in kept["model_state_dict"].values() if torch.is_tensor(v))
    assert (tmp_path / "run" / "high" / "best.pt").exists()


def test_a_damaged_state_falls_back_to_the_one_before_and_the_run_is_recorded(words, tmp_path, capsys):
    """The first run ends in the middle of stage 1; its last file is cut off; the second goes on all the same."""
    command = words("training.num_epochs=2", "logging.checkpoint_minutes=0", options=["--max-stages", "1"])
    with at_forward(CascadeStage, 5, raising(KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        main(command)
    last = tmp_path / "run" / "low" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    assert main(command) == 0
    assert "last.pt: truncated or not a checkpoint" in capsys.readouterr().out
    runs = read_json(tmp_path / "run" / "run.json")["runs"]
    assert [run["outcome"].split(":")[0] for run in runs] == ["KeyboardInterrupt", "finished"]
    assert runs[0]["config_hash"] == runs[1]["config_hash"]


def test_out_of_gpu_memory_names_the_settings_to_try(words):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    expected = "stage low: epoch 1, step 1: out of GPU memory.*2\\.00 GiB.*stage1\\.activation_checkpointing"
    with at_forward(CascadeStage, 1, raising(error)), pytest.raises(InputError, match=expected):
        main(words())


def test_a_folder_with_another_config_json_is_left_alone(words, tmp_path):
    path = tmp_path / "run" / "config.json"
    write_json(path, {"model": {}})
    with pytest.raises(InputError, match=r"config\.json: not the configuration of a cascade"):
        main(words())
    assert read_json(path) == {"model": {}}


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        (["--data", "nowhere"], ["--data nowhere", "prepare_data.py"]),
        (["--config", "missing.json"], ["missing.json: no such file"]),
        (["--max-stages", "3"], ["--max-stages is 3", "2 stages"]),
        (["--max-stages", "0"], ["--max-stages is 0"]),
        (["--wandb-project", "p"], ["--wandb-project p", "--wandb"]),
        (["--set", "stage2.volume_size=48"], ["stage2.volume_size is 48"]),
        (["--set", "stage1.token_grid=3"], ["tiny.json: stage 1 (low): token_grid is 3"]),
        (["--set", "stage1.num_heads=5"], ["stage1.num_heads is 5", "voxel_dim 32"]),
        (["--set", "stage1.volume_size=64", "--set", "stage2.volume_size=128"], ["128", "cube of 64"]),
        (["--set", "training.precision=float16", "--set", "training.mixed_precision=true"], ["float16", "GPU"]),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(words, tmp_path, options, words_):
    with pytest.raises(InputError) as error:
        main([*words(), *options])
    for word in words_:
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_not_installed_stops_before_anything_is_written(words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        main(words(options=["--wandb"]))
    assert not (tmp_path / "run").exists()


def truncated(path, tmp_path):
    target = tmp_path / "truncated.pt"
    target.write_bytes(path.read_bytes()[:-500])
    return target


def test_files_that_cannot_be_resumed_are_refused_before_anything_is_written(words, trained, root, tmp_path):
    foreign, text = tmp_path / "foreign.pt", tmp_path / "text.pt"
    torch.save({"state_dict": {"x": torch.ones(2)}}, foreign)
    text.write_text("not a checkpoint")
    cases = {
        trained / "low": "is a folder; expected a file such as .*last.pt",
        tmp_path / "nothing.pt": "no such checkpoint",
        foreign: "not a checkpoint of this project",
        text: "text.pt",
        truncated(trained / "low" / "last.pt", tmp_path): "truncated",
        make_checkpoint(tmp_path / "direct.pt", root): "is a checkpoint of 'enhanced_direct'",
        trained / "low" / "best.pt": "weights for inference only; expected last.pt",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message):
            main(words(options=["--resume-from", str(path)]))
    with pytest.raises(InputError, match=r"of stage 2, beyond --max-stages 1"):
        main(words(options=["--resume-from", str(trained / "high" / "last.pt"), "--max-stages", "1"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage1.name=base"], r"its stages are low, high; the configuration's are base, high"),
        (["num_views=1"], r"trained with num_views 2; now 1"),
        (["stage1.vit_depth=2"], r"stage_settings.*vit_depth 1 against 2"),
        (["v_parameterization=false"], r"prediction.*v against noise"),
        (["num_timesteps=500"], r"num_timesteps.*1000 against 500"),
        (["stage1.noise_shift=1"], r"shift.*8\.0 against 1\.0"),
    ],
)
def test_a_checkpoint_of_another_cascade_is_refused(words, trained, tmp_path, overrides, message):
    path = trained / "low" / "last.pt"
    with pytest.raises(InputError, match=rf"last\.pt: .*{message}"):
        main(words(*overrides, options=["--resume-from", str(path)]))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_cascade_is_refused(words, trained):
    with pytest.raises(InputError, match=r"holds a cascade with the stages low, high; .*low, top.*--checkpoint-dir"):
        main(words("stage2.name=top", folder=trained))


def test_stages_of_another_split_or_geometry_are_refused(words, root, trained, tmp_path):
    other = make_dataset(tmp_path / "other", patients=5)
    with pytest.raises(InputError, match=r"low.last\.pt was trained on another split"):
        main([*words(folder=trained), "--data", str(other)])
    manifest = read_json(root / "dataset.json")
    manifest["geometry"]["sdd_mm"] = 1500.0
    manifest["geometry"]["sid_mm"] = 1400.0
    moved = shutil.copytree(root, tmp_path / "moved")
    write_json(moved / "dataset.json", manifest)
    with pytest.raises(InputError, match=r"low.last\.pt: the checkpoint's geometry is not the data's.*1800"):
        main([*words(folder=trained), "--data", str(moved)])
    write_json(moved / "dataset.json", {**read_json(root / "dataset.json"), "couch_removed": True})
    with pytest.raises(InputError, match=r"low.last\.pt: .*couch_removed False against True; .*--checkpoint-dir"):
        main([*words(folder=trained), "--data", str(moved)])


# -- benchmark -------------------------------------------------------------------------------------


def test_the_benchmark_times_a_stage(config_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cascade_speed

    assert cascade_speed.main(["--config", str(config_path), "--stage", "2", "--steps", "7", "--repetitions", "1"]) == 0
    printed = capsys.readouterr().out
    for expected in ("high: 32^3, 0.2", "sampling, batch 1", "7 steps", "training step, batch 1", "samples/s"):
        assert expected in printed
    with pytest.raises(InputError, match="--stage is 3"):
        cascade_speed.main(["--config", str(config_path), "--stage", "3"])


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="forked processes are POSIX")
def test_two_processes_of_the_module_follow_the_same_curve_as_one(words, config_path, tmp_path):
    """Same global batch in float32 on two ranks: only the order of summation differs."""
    one, two = tmp_path / "one", tmp_path / "two"
    short = ("world_size=2", "training.num_epochs=1", "training.batch_size=1", "data.repeats=1")
    assert main(words(*short, folder=one)) == 0
    module = ["-m", "hybrid_vit_cascade.training.train_progressive"]
    done = run_ranks([sys.executable, *module, *words(*short, folder=two)])
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "Processes: 2 on cpu, float32; global batch 2 = 1 x 2 x 1" in done[0].stdout
    for name in ("low", "high"):
        a, b = events(one / name, "step"), events(two / name, "step")
        assert len(a) == len(b) == 2
        for left, right in zip(a, b):
            for key in ("loss", "diffusion", "physics"):
                assert left[key] == pytest.approx(right[key], rel=1e-3), (name, key)
        a, b = events(one / name, "validation"), events(two / name, "validation")
        assert a[0]["psnr"] == pytest.approx(b[0]["psnr"], abs=1e-2)


def test_a_resumed_run_keeps_its_global_batch_on_another_number_of_processes(words, tmp_path, capsys):
    """world_size null is the number of processes of the first start."""
    command = words("world_size=null", options=["--dry-run"])
    assert main(command) == 0
    assert "global batch 2 = 2 x 1 x 1" in capsys.readouterr().out
    write_json(tmp_path / "run" / "config.json", {**config_dict(load_cascade_config(command[1])), "world_size": 3})
    assert main(command) == 0
    assert "global batch 6 = 2 x 1 x 3" in capsys.readouterr().out


def test_the_minutes_of_a_cascade_are_shared_by_its_stages():
    assert stage_minutes(90, 0, 3) == 30
    assert stage_minutes(90, 10, 2) == 40  # the first stage's epochs ended before its minutes
    assert stage_minutes(90, 95, 1) == 0.01


def test_a_cascade_ends_in_time_and_its_stages_stay_as_they_are(words, tmp_path, capsys):
    run = words("training.num_epochs=10000", options=["--max-minutes", "0.04", "--quiet"])
    assert main(run) == 0
    text = capsys.readouterr().out
    assert text.count("Stopped after ") == 2
    assert f"--cascade {tmp_path / 'run'}" in text.splitlines()[-1]
    assert main(run) == 0
    assert capsys.readouterr().out.count("done, used as it is") == 2
    used = load_checkpoint(tmp_path / "run" / "low" / "last.pt")["training_state"]["clock"]
    later = load_checkpoint(tmp_path / "run" / "high" / "last.pt")["training_state"]["clock"]
    assert used["minutes"] == pytest.approx(0.02)
    assert later["stopped"]
