"""The trainer's pieces: sample plan, schedule, averages, settings that may change, failures."""

from __future__ import annotations

import itertools
import json
import math
import os

import pytest
import torch
from torch import nn

from model_enhanced import EnhancedDirectModel
from tests.helpers import toy_task
from tests.helpers.hooks import at_forward
from tests.helpers.runs import build
from tests.helpers.tiny_data import largest_difference, make_dataset
from xray2ct import files
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError
from xray2ct.training import precision as precision_module
from xray2ct.training.config import EnhancedConfig, config_dict, load_config
from xray2ct.training.distributed import Processes
from xray2ct.training.ema import MovingAverage
from xray2ct.training.plan import EpochPlan, accumulation_steps, learning_rate_at, sample_seed
from xray2ct.training.run_identity import changed_settings
from xray2ct.training.signals import SignalCatcher
from xray2ct.training.state import parameter_groups
from xray2ct.training.trainer import Trainer, TrainingError, fit


# -- plan ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_every_number_of_processes_takes_the_same_samples_at_each_step(world, accumulation):
    def step_samples(world_size, accumulated):
        plans = [EpochPlan(7, 3, 2, accumulated, Processes(r, world_size), seed=5) for r in range(world_size)]
        per_rank = [plan.batches(0) for plan in plans]
        steps = []
        for step in range(plans[0].steps):
            chosen = slice(step * accumulated, (step + 1) * accumulated)
            steps.append(sorted(p for batches in per_rank for batch in batches[chosen] for p in batch))
        return steps, plans[0].order(1)

    assert step_samples(world, accumulation) == step_samples(1, 4)


@pytest.mark.parametrize(("patients", "repeats", "batch", "accumulation", "world"), [(7, 3, 2, 2, 2), (2, 1, 3, 2, 4)])
@pytest.mark.parametrize("first_step", [0, 1])
def test_every_position_is_taken_exactly_once(patients, repeats, batch, accumulation, world, first_step):
    """Over ranks, micro-batches and steps, with padding, also of an epoch that is resumed."""
    taken = []
    for rank in range(world):
        plan = EpochPlan(patients, repeats, batch, accumulation, Processes(rank, world), seed=1)
        batches = plan.batches(first_step)
        assert all(len(positions) == batch for positions in batches)
        for number, positions in enumerate(batches):
            step = first_step + number // accumulation
            assert {position // plan.global_batch for position in positions} == {step}
            taken += positions
    assert sorted(taken) == list(range(first_step * plan.global_batch, plan.steps * plan.global_batch))
    assert len(plan.order(1)) == plan.steps * plan.global_batch


def test_an_epoch_draws_every_patient_equally_often_in_an_order_of_its_own():
    plan = EpochPlan(6, 2, 2, 1, Processes(), seed=0)
    assert sorted(plan.order(1)) == sorted([*range(6)] * 2)
    assert plan.order(1) == plan.order(1)
    assert plan.order(1) != plan.order(2)
    assert plan.batches(2) == plan.batches(0)[2:]


def test_few_patients_are_repeated_to_fill_a_global_batch():
    plan = EpochPlan(2, 1, 8, 1, Processes(), seed=0)
    assert plan.steps == 1
    assert len(plan.order(1)) == 8
    assert set(plan.order(1)) == {0, 1}


def test_accumulation_keeps_the_global_batch_or_is_refused():
    config = load_config(EnhancedConfig, None, ["training.batch_size=4", "world_size=4"])
    assert [accumulation_steps(config, n) for n in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(InputError, match=r"global batch of 16.*3 processes"):
        accumulation_steps(config, 3)


def test_sample_seeds_differ():
    seeds = {sample_seed(s, e, p) for s in range(3) for e in range(5) for p in range(100)}
    assert len(seeds) == 3 * 5 * 100


class Recording(toy_task.ToyTask):
    """Notes positions and patients as they are read, and whether the network validates in training mode."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read, self.modes = [], []

    def make_batch(self, raw, seeds, device):
        self.read += zip(raw["position"].tolist(), raw["id"])
        return super().make_batch(raw, seeds, device)

    def validate(self, model, processes, precision):
        self.modes += [module.training for module in model.modules()]
        return super().validate(model, processes, precision)


def recording_trainer(output, *overrides):
    _, config = toy_task.parse(toy_task.words(output, *overrides))
    task = Recording(config, Processes())
    return Trainer(task.build_model(), task, config, output, Processes())


def test_an_epoch_reads_every_patient_at_its_positions(tmp_path):
    trainer = recording_trainer(tmp_path, "training.batch_size=2", "data.repeats=2", "world_size=2")
    trainer.train_epoch(SignalCatcher())
    order = trainer.plan.order(1)
    assert trainer.task.read == [(position, f"p{patient}") for position, patient in enumerate(order)]
    patients = [patient for _, patient in trainer.task.read]
    assert {patient: patients.count(patient) for patient in patients} == {f"p{i}": 2 for i in range(6)}


@pytest.mark.parametrize(("limit", "clipped"), [(1e-3, True), (0.0, False)])
def test_gradients_are_clipped_to_the_limit_before_the_step(tmp_path, limit, clipped):
    trainer, norms = recording_trainer(tmp_path, f"training.grad_clip_max_norm={limit}"), []

    def note(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    trainer.optimizer.register_step_pre_hook(note)
    trainer.train_epoch(SignalCatcher())
    assert len(norms) == 6
    assert all((norm <= 1e-3 * 1.001) == clipped for norm in norms)
    assert min(norms) > 0.5e-3  # scaled down to the limit, not to nothing


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_validation_is_in_evaluation_mode_and_training_goes_on_in_its_own(tmp_path, decay):
    trainer = recording_trainer(tmp_path, f"training.ema_decay={decay}")
    trainer.model.train()
    torch.manual_seed(0)
    one = trainer.validate()
    torch.manual_seed(1)  # other drop-out, if there was any
    assert trainer.validate() == one
    assert not any(trainer.task.modes)
    assert all(module.training for module in trainer.model.modules())


def test_what_draws_from_the_global_generator_draws_the_same_on_any_number_of_processes(tmp_path):
    """Two micro-batches of one process, and one of each of two: the same drop-out, so the same losses."""

    def drawn(rank, world):
        trainer = recording_trainer(tmp_path, "training.batch_size=1", "world_size=2")
        trainer.plan = EpochPlan(6, 1, 1, 2 // world, Processes(rank, world), 0)
        draws, make_batch = {}, trainer.task.make_batch

        def spy(raw, seeds, device):
            draws[int(raw["position"][0])] = torch.rand(()).item()
            return make_batch(raw, seeds, device)

        trainer.task.make_batch = spy
        trainer.train_epoch(SignalCatcher())
        return draws

    alone = drawn(0, 1)
    assert len(set(alone.values())) == 6
    assert drawn(0, 2) | drawn(1, 2) == alone


# -- schedule, averages, groups ------------------------------------------------------------------
def test_learning_rate_warms_up_then_follows_a_cosine():
    rates = [learning_rate_at(s, 100, 10, 1e-3, 0.1) for s in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))
    assert rates[100] == pytest.approx(1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_moving_average_matches_the_recurrence():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average, expected = MovingAverage(model, 0.9), model.weight.detach().clone()
    for n in range(1, 30):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        average.update(model, n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(average.model.weight, expected, atol=1e-6)


def test_biases_norms_and_priors_do_not_decay(root):
    _, _, model = build(root)
    decay, rest = parameter_groups(model, 0.01)
    assert decay["weight_decay"] == 0.01
    assert rest["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decay["params"])
    assert any(p is model.prior for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_only_settings_that_matter_count_as_changed():
    old = config_dict(EnhancedConfig())
    new = config_dict(load_config(EnhancedConfig, None, ["logging.log_interval=99", "data.num_workers=0"]))
    assert changed_settings(old, new) == []
    new = config_dict(load_config(EnhancedConfig, None, ["loss.ssim_weight=0.25"]))
    assert changed_settings(old, new) == ["loss.ssim_weight 0.5 -> 0.25"]


# -- runs ----------------------------------------------------------------------------------------
def test_a_run_learns_and_leaves_what_it_promises(root, tmp_path, capsys):
    config, task, model = build(root, "training.num_epochs=10", "data.repeats=2", "logging.save_checkpoint_interval=5")
    fit(model, task, config, tmp_path, Processes())
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [e["l1"] for e in events if e["event"] == "epoch"]
    psnr = [e["psnr"] for e in events if e["event"] == "validation"]
    assert len(losses) == 10
    assert losses[-1] < 0.6 * losses[0]
    assert psnr[-1] > psnr[0] + 3
    assert {p.name for p in tmp_path.iterdir()} == {
        "best_model.pt",
        "last.pt",
        "last_previous.pt",
        "epoch_5.pt",
        "epoch_10.pt",
        "log.jsonl",
    }
    best = load_checkpoint(tmp_path / "best_model.pt", kind="enhanced_direct")
    assert best["metrics"]["psnr"] == pytest.approx(max(psnr))
    assert best["train_patients"] == ["p0", "p1", "p2"]
    text = capsys.readouterr().out
    for words in (
        "Epoch 1 [1/3] Loss: ",
        " | L1: ",
        " | SSIM: ",
        " | Edge: ",
        " samples/s",
        "Epoch 1 Training Summary:",
        "Validation Results (1 patient):",
        "New best model saved! PSNR: ",
    ):
        assert words in text


def test_a_finished_run_has_nothing_to_do_and_other_settings_are_refused(root, tmp_path, capsys):
    config, task, model = build(root)
    fit(model, task, config, tmp_path, Processes())
    before = (tmp_path / "last.pt").read_bytes()
    fit(build(root)[2], task, config, tmp_path, Processes())
    assert "Nothing to do" in capsys.readouterr().out
    config, task, model = build(root, "training.num_epochs=4")
    with pytest.raises(InputError, match=r"last\.pt.*training\.num_epochs 2 -> 4"):
        fit(model, task, config, tmp_path, Processes())
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_on_another_split_is_refused(root, tmp_path):
    config, task, model = build(root)
    fit(model, task, config, tmp_path / "run", Processes())
    other = make_dataset(tmp_path / "other", patients=5)
    config, task, model = build(other)
    with pytest.raises(InputError, match="another split"):
        fit(model, task, config, tmp_path / "run", Processes())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(root, tmp_path):
    config, task, model = build(root)
    config.logging.checkpoint_minutes = 0.0
    # The third forward pass is the first one of step 2.
    nan = at_forward(EnhancedDirectModel, 3, lambda output: (output[0] * math.nan, output[1]))
    with nan, pytest.raises(TrainingError, match=r"epoch 1, step 2, patients p\d: the loss is nan \(L1"):
        fit(model, task, config, tmp_path, Processes())
    kept = load_checkpoint(tmp_path / "last.pt")
    assert kept["training_state"]["step_in_epoch"] == 1
    assert all(torch.isfinite(v).all() for v in kept["model_state_dict"].values() if torch.is_tensor(v))


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(root, tmp_path):
    config, task, model = build(root)
    before = model.prior.detach().clone()
    model.prior.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="gradient norm"):
        fit(model, task, config, tmp_path, Processes())
    assert torch.equal(model.prior, before)


def test_a_disk_full_while_saving_keeps_the_last_checkpoint(root, tmp_path, monkeypatch):
    config, task, model = build(root)
    config.logging.checkpoint_minutes = 0.0
    save, calls = torch.save, []

    def full(data, path):
        calls.append(1)
        if len(calls) > 1:
            path.write_bytes(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        save(data, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(model, task, config, tmp_path, Processes())
    assert load_checkpoint(tmp_path / "last.pt")["training_state"]["updates"] == 1
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]


def test_float16_needs_a_gpu():
    with pytest.raises(InputError, match="float16"):
        precision_module.Precision("float16", torch.device("cpu"))


def test_the_source_of_augmentation_is_never_finer_than_the_data(root):
    _, task, _ = build(root, "augment.source_size=256")
    assert task.train_data[0]["ct_volume"].shape == (1, 64, 64, 64)


def test_training_on_the_xrays_of_the_files_works_without_augmentation(root, tmp_path):
    config, task, model = build(root, "data.xray_source=files", "training.num_epochs=3", "data.repeats=2")
    assert not task.renders
    batch = task.make_batch(next(iter(torch.utils.data.DataLoader(task.train_data))), [1], torch.device("cpu"))
    assert torch.equal(batch["xrays"][0], task.train_data[0]["xrays"])
    fit(model, task, config, tmp_path, Processes())
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [e["l1"] for e in events if e["event"] == "epoch"]
    assert losses[-1] < losses[0]


def test_the_gpu_memory_is_that_since_the_last_call(monkeypatch):
    peak, resets = precision_module.peak_gpu_memory, []
    assert peak(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    device = torch.device("cuda", 0)
    assert peak(device) == {"gpu_memory_gib": 1.5}
    assert resets == [device]


@pytest.fixture
def mallopt(monkeypatch):
    """Calls of the C library's ``mallopt``, which is not called really."""
    calls = []

    class Library:
        mallopt = staticmethod(lambda *values: calls.append(values))

    monkeypatch.setattr(precision_module.ctypes, "CDLL", lambda _: Library)
    monkeypatch.setattr(files, "_as_command", False)
    return calls


@pytest.mark.skipif(os.name != "posix", reason="mallopt is glibc's")
def test_the_allocator_is_set_in_our_own_commands_only(tmp_path, mallopt):
    recording_trainer(tmp_path)  # as a notebook does
    assert mallopt == []
    with pytest.raises(SystemExit):
        files.run_cli(lambda: recording_trainer(tmp_path) and 0)
    assert mallopt == [(-4, 0), (-1, 2**31 - 1), (-2, 2**28)]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda state: None, 0.0),
        (lambda state: state["weight"].add_(0.25), 0.25),
        (lambda state: state["extra"].update(scale=3.5), 1.5),
        (lambda state: state["extra"].update(kind="other"), math.inf),
        (lambda state: state.pop("extra"), math.inf),
        (lambda state: state.update(weight=torch.zeros(3)), math.inf),
        (lambda state: state["weight"].fill_(math.nan), math.inf),
    ],
)
def test_states_are_compared_whatever_they_hold(change, difference):
    """The helper of the GPU's tests: a state may hold dictionaries (``_extra_state``)."""

    def state():
        return {"weight": torch.ones(2), "extra": {"scale": 2, "kind": "a", "list": [1, True]}}

    other = state()
    change(other)
    assert largest_difference(state(), other) == difference
