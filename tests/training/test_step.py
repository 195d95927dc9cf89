"""One training step: nothing waits for the device, bad steps change nothing, micro-batches of any size are one."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import signal
import traceback

import pytest
import torch
from torch import nn

from hybrid_vit_cascade.cascade import Cascade
from hybrid_vit_cascade.settings import load_cascade_config, stage_run
from hybrid_vit_cascade.training.task import StageTask
from tests.helpers import tiny_cascade
from tests.helpers.dispatch import OperatorCounter
from tests.helpers.faults import Run, child, toy
from tests.helpers.hooks import at_forward
from tests.helpers.runs import TINY, assert_same_tensors
from tests.helpers.tiny_data import TINY_REFINEMENT, make_checkpoint
from xray2ct.checkpoints import load_checkpoint
from xray2ct.files import InputError, write_json
from xray2ct.metrics import psnr, ssim_3d
from xray2ct.training import distributed
from xray2ct.training.config import EnhancedConfig, RefinementConfig, load_config
from xray2ct.training.direct_task import EnhancedTask
from xray2ct.training.distributed import Processes, data_parallel, spawn
from xray2ct.training.micro_batch import divisors, largest_fitting, wanted_micro_batch
from xray2ct.training.refinement_task import RefinementTask
from xray2ct.training.run_identity import changed_settings
from xray2ct.training.signals import Interrupted, SignalCatcher
from xray2ct.training.trainer import Trainer, TrainingError, fit

CPU = torch.device("cpu")
LOSSES = ("loss.perceptual_weight=0.1", "loss.perceptual_weights=random", "loss.edge_weight=0.1")
# The bottleneck of 32^3 has 4^3 cells: bfloat16 weight gradients of a 3^3 kernel on 2^3 are wrong on some CPUs.
SIZE = "model.volume_size=[32, 32, 32]"
DIRECT = (*TINY, *LOSSES, SIZE, "loss.ssim_weight=0.5", "loss.projection_weight=0.1", "loss.use_scan_mask=true")
REFINEMENT = (*LOSSES, *(f"model.{key}={json.dumps(value)}" for key, value in TINY_REFINEMENT.items()))
REFINEMENT += ("patch.size=8", "patch.context=4", "patch.per_volume=2", "guidance_dropout=0.4")
REFINEMENT += ("training.precision=float32", "augment.elastic_points=3", "loss.ssim_weight=0.5")


@pytest.fixture(scope="module")
def files(root, tmp_path_factory):
    """Checkpoints that stage 2 and the cascade's second stage build on."""
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "base.pt", root)
    tiny_cascade.make_cascade(folder / "cascade", root)
    write_json(folder / "tiny.json", tiny_cascade.TINY)
    return folder


def direct(root, files, *overrides):
    config = load_config(EnhancedConfig, None, [*DIRECT, f"data.dataset_path={root}", *overrides])
    return EnhancedTask(config, Processes())


def second_pass(root, files, *overrides):
    return direct(root, files, "model.passes=2", *overrides)


def refinement(root, files, *overrides):
    data = (f"data.dataset_path={root}", f"base_checkpoint={files / 'base.pt'}")
    return RefinementTask(load_config(RefinementConfig, None, [*REFINEMENT, *data, *overrides]), Processes())


def stage(root, files, *overrides):
    settings = (f"data.dataset_path={root}", "training.mixed_precision=true", "training.precision=float32", *overrides)
    config = load_cascade_config(files / "tiny.json", settings)
    earlier = Cascade.load(files / "cascade", max_stages=1)
    return StageTask(config, stage_run(config, 1, world_size=1), earlier, Processes())


def make_trainer(task, output):
    return Trainer(task.build_model(), task, task.config, output, Processes())


def batches(trainer):
    trainer.model.train()
    return iter(trainer.loader(trainer.plan.order(1), trainer.plan.batches(0)))


# -- nothing waits -----------------------------------------------------------------------------------
def test_what_makes_the_host_wait_is_counted():
    x = torch.arange(4.0, requires_grad=True)
    with OperatorCounter() as counter:
        (x * x).sum().backward()
        x.to(torch.bfloat16)
    assert counter.waiting == []
    assert counter.copies == {"aten::_to_copy": 1, "aten::clone": 0, "aten::copy_": 0}
    with OperatorCounter() as counter:
        x.sum().item(), x[x > 1], bool(x.sum() > 0), x.nonzero()
    assert counter.waiting == ["aten::_local_scalar_dense", "aten::index", "aten::_local_scalar_dense", "aten::nonzero"]


@pytest.mark.parametrize("make", [direct, second_pass, refinement, stage])
def test_a_step_waits_for_nothing(root, files, tmp_path, make):
    """Two micro-batches: augmentation, rendering, earlier stages, loss, clipping, optimiser and moving average."""
    task = make(root, files, "training.precision=bfloat16", "training.batch_size=2", "training.micro_batch=1")
    task.config.world_size = 1
    trainer = make_trainer(task, tmp_path)
    trainer.check_precision()
    raw = list(batches(trainer))[:2]
    trainer.step(iter(raw))  # fills tables that stay
    with OperatorCounter() as counter:
        trainer.step(iter(raw))
    assert counter.counts["aten::_fused_adamw_"] == 2  # with and without weight decay
    assert counter.waiting == []
    collected = trainer.collect(SignalCatcher())
    assert math.isfinite(collected.losses["loss"])


@pytest.mark.parametrize("make", [direct, refinement, stage])
def test_a_validation_waits_for_nothing_but_its_scores(root, files, tmp_path, make):
    task = make(root, files)
    trainer = make_trainer(task, tmp_path)
    items, task.criterion = [task.val_data[0]], task.criterion.to(CPU)
    task.val_data.__class__ = type("Read", (task.val_data.__class__,), {"__getitem__": lambda self, i: items[i]})
    trainer.validate()
    with OperatorCounter() as counter:
        trainer.validate()
    # Outside training stage 2 looks at the range of the coarse volume.
    assert set(counter.waiting) <= ({"aten::_local_scalar_dense"} if make is refinement else set())
    metrics, target = trainer.validate(), items[0]["ct_volume"][0]
    predicted = task.samples[0]["prediction"]
    assert metrics["psnr"] == pytest.approx(psnr(predicted, target), abs=1e-4)
    if "ssim_3d" in metrics:
        assert metrics["ssim_3d"] == pytest.approx(ssim_3d(predicted, target), abs=1e-5)


def test_a_volume_that_is_not_finite_stops_at_validation_and_names_the_patient(root, files, tmp_path):
    trainer = make_trainer(direct(root, files), tmp_path)
    with torch.no_grad():
        trainer.best_weights.prior.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"patients p3: validation: .*NaN or infinite"):
        trainer.validate()


# -- bad steps ---------------------------------------------------------------------------------------
SELDOM = ("logging.log_interval=100", "logging.checkpoint_minutes=60")


def toy_trainer(output, *overrides, processes=None):
    config, task, model = toy(output, *SELDOM, *overrides)
    output.mkdir(parents=True, exist_ok=True)
    return Trainer(model, task, config, output, processes or Processes())


def state_of(trainer):
    moments = {f"{i}.{k}": v for i, entry in enumerate(trainer.optimizer.state.values()) for k, v in entry.items()}
    return {name: value.clone() for name, value in {**trainer.model.state_dict(), **moments}.items()}


def first_epoch(trainer):
    trainer.finish_epoch(trainer.train_epoch(SignalCatcher()))
    return trainer


def spoil_loss(trainer, call):
    return at_forward(nn.Sequential, call, lambda output: output * math.nan)


@pytest.mark.parametrize(
    ("value", "expected"), [("loss", r"the loss is nan \(MSE nan\)"), ("gradient", r"the gradient norm is (inf|nan)")]
)
def test_the_first_bad_step_is_named_at_the_next_collection_and_changes_nothing(tmp_path, value, expected):
    """Step 4 of 6 in the second epoch, read at the epoch's end."""
    reference = first_epoch(toy_trainer(tmp_path / "reference"))
    loader = iter(reference.loader(reference.plan.order(2), reference.plan.batches(0)))
    reference.model.train()
    for _ in range(3):
        reference.step(loader)
    trainer = first_epoch(toy_trainer(tmp_path / "run"))
    calls = []
    if value == "gradient":
        spoiled = lambda gradient: gradient * (math.inf if calls.append(1) or len(calls) == 4 else 1.0)  # noqa: E731
        trainer.model[0].weight.register_hook(spoiled)
    call = 4 if value == "loss" else 1000
    patient = trainer.plan.order(2)[3]
    place = f"epoch 2, step 4, patients p{patient}: {expected}.*last.pt is the last good state"
    with spoil_loss(trainer, call), pytest.raises(TrainingError, match=place):
        trainer.train_epoch(SignalCatcher())
    assert_same_tensors(state_of(trainer), state_of(reference))
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (saved["training_state"]["epoch"], saved["training_state"]["step_in_epoch"]) == (2, 0)
    assert all(value.isfinite().all() for value in saved["training_state"]["model"].values())


def test_a_bad_micro_batch_among_good_ones_names_its_own_patients(tmp_path):
    trainer = toy_trainer(tmp_path, "world_size=3")
    patient = trainer.plan.order(1)[4]
    with (
        spoil_loss(trainer, 5),
        pytest.raises(TrainingError, match=rf"epoch 1, step 2, patients p{patient}: the loss"),
    ):
        trainer.train_epoch(SignalCatcher())


def test_float16_steps_that_overflow_are_skipped_and_too_many_in_a_row_end_the_run(tmp_path):
    """With the gradient scaler that float16 has on a GPU, here on the CPU."""
    trainer = toy_trainer(tmp_path, "data.repeats=4")
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before, calls = state_of(trainer), []

    def overflow(gradient):
        calls.append(1)
        return gradient * (1.0 if len(calls) == 3 else math.inf)

    trainer.model[0].weight.register_hook(overflow)
    loader = batches(trainer)
    for _ in range(2):
        trainer.step(loader)
    assert_same_tensors(trainer.model.state_dict(), before)
    trainer.step(loader)
    assert not torch.equal(trainer.model[0].weight, before["0.weight"])
    assert trainer.optimizer.state[trainer.model[0].weight]["step"].item() == 1
    trainer.collect(SignalCatcher())
    assert (trainer.skipped, trainer.precision.scaler.get_scale()) == (0, 2.0**14)
    trainer.step_in_epoch = 3
    with pytest.raises(TrainingError, match=r"epoch 1, step 24, .*: 21 float16 steps in a row overflowed"):
        trainer.train_epoch(SignalCatcher())


def two_workers(words, console, fault, pipe):
    """Two processes of one run on the CPU; in the second one the loss of the third micro-batch is NaN."""
    os.setsid()
    distributed.mp.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")

    def worker(words):
        call = 3 if os.environ["RANK"] == "1" else 1000
        with at_forward(nn.Sequential, call, lambda output: output * math.nan):
            child(words, console=console, fault=fault, pipe=pipe)

    distributed.run_cli(lambda: spawn(worker, 2, words))


@pytest.mark.skipif(os.name == "nt", reason="forked processes are POSIX")
def test_every_process_names_the_patients_of_the_one_with_the_bad_loss(tmp_path):
    """Two micro-batches a step of each process: the third one of the second process is position 5."""
    output = tmp_path / "run"
    run = Run(output, ("none",), (*SELDOM, "world_size=4", "training.num_epochs=1"), target=two_workers)
    assert run.end() == 2, run.text()
    patient = toy_trainer(tmp_path / "other", "world_size=4").plan.order(1)[5]
    wanted = f"epoch 1, step 2, patients p{patient}: the loss is nan (MSE nan)"
    assert wanted in run.text()
    assert wanted in json.loads((output / "run.json").read_text())["runs"][0]["outcome"]
    assert "bucket view strides" not in run.text()


# -- signals and saves of several processes ----------------------------------------------------------
class OfTwo(Processes):
    """The first of two processes; ``other`` is what the second one adds to each reduction."""

    def mean(self, tensor):
        values = tensor.clone()
        values[: len(self.other)] += torch.tensor(self.other)
        return values / 2


@pytest.mark.parametrize(
    ("other", "signal_number", "saves"),
    [((0, 0, 0, 0, 0.25), 0, False), ((1, 0, 0, 0, 0.25), signal.SIGTERM, False), ((0, 0, 0, 1, 0.25), 0, True)],
)
def test_what_another_process_wants_arrives_with_the_losses(tmp_path, other, signal_number, saves):
    processes = OfTwo(0, 2)
    object.__setattr__(processes, "other", [float(value) for value in other])
    trainer = toy_trainer(tmp_path, "world_size=2", processes=processes)
    trainer.runner = trainer.single
    trainer.step(batches(trainer))
    collected = trainer.collect(SignalCatcher())
    assert (collected.signal, collected.save) == (signal_number, saves)
    assert 1 <= trainer.pace <= 8  # 0.125 s a step at least: collected again within a second
    assert len(trainer.ledger) == 0


def test_a_single_process_reads_at_once_when_a_signal_has_come(tmp_path):
    trainer, catcher = toy_trainer(tmp_path), SignalCatcher()
    catcher.receive(signal.SIGINT)
    with pytest.raises(Interrupted):
        trainer.train_epoch(catcher)
    assert trainer.step_in_epoch == 1
    assert load_checkpoint(tmp_path / "last.pt")["training_state"]["step_in_epoch"] == 1


# -- micro-batches -----------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [direct, refinement, stage])
def test_a_step_is_the_same_in_micro_batches_of_any_size(root, files, tmp_path, make):
    """Losses and gradients of 4 samples at once and one by one agree to float32 rounding: 1e-5, 1e-4 of their size."""
    found = []
    for size in (1, 4):
        settings = ("training.batch_size=2", "training.gradient_accumulation_steps=2", f"training.micro_batch={size}")
        task = make(root, files, *settings)
        task.config.world_size = 1
        trainer = make_trainer(task, tmp_path / str(size))
        trainer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: found.append(
                torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
            )
        )
        trainer.step(batches(trainer))
        found[-1] = (trainer.collect(SignalCatcher()).losses, found[-1])
    (losses, gradient), (other_losses, other) = found
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert 0 < (other - gradient).norm() < 1e-4 * gradient.norm()


def test_a_run_goes_on_with_micro_batches_of_another_size(tmp_path):
    results = []
    for name, sizes in (("same", (1, 1)), ("other", (1, 4))):
        for epochs, size in zip((1, 2), sizes):
            config, task, model = toy(tmp_path, f"training.micro_batch={size}", "world_size=4")
            config.training.num_epochs = 2
            trainer = Trainer(model, task, config, tmp_path / name, Processes())
            trainer.resume()
            (tmp_path / name).mkdir(exist_ok=True)
            trainer.finish_epoch(trainer.train_epoch(SignalCatcher()))
            assert trainer.epoch == epochs + 1
        results.append(trainer)
    assert [trainer.plan.micro_batches for trainer in results] == [4, 1]
    assert results[0].plan.batches(0) == [[i] for batch in results[1].plan.batches(0) for i in batch]
    assert changed_settings({"training": {}}, {"training": {"micro_batch": 4}}) == []


def test_the_size_of_micro_batches_divides_a_processs_share():
    assert [wanted_micro_batch(wanted, 6) for wanted in (0, 1, 2, 3, 6)] == [0, 1, 2, 3, 6]
    with pytest.raises(InputError, match=r"training\.micro_batch is 4; each process has 6 .* 0, or one of 1, 2, 3, 6"):
        wanted_micro_batch(4, 6)
    config, task, model = toy("unused", "training.micro_batch=3", "world_size=4")
    with pytest.raises(InputError, match=r"training\.micro_batch is 3"):
        Trainer(model, task, config, "unused", Processes())
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


class OtherHasLessMemory(Processes):
    """Of two processes the second has no memory for the first size that is tried."""

    def any(self, flag):
        self.asked.append(flag)
        return flag or len(self.asked) == 1


def test_the_largest_micro_batch_is_one_that_every_process_has_the_memory_for(tmp_path):
    trainer = toy_trainer(tmp_path, "world_size=4")
    before, loss, tried = state_of(trainer), trainer.task.loss, []

    def hungry(limit, model, batch):
        tried.append(len(batch["volume"]))
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, batch)

    for limit, expected, sizes in ((4, 4, [4]), (3, 2, [4, 2]), (1, 1, [4, 2])):
        tried.clear()
        trainer.task.loss = functools.partial(hungry, limit)
        assert largest_fitting(trainer.plan.share, trainer._fits, Processes()) == expected
        assert tried == sizes
    processes = OtherHasLessMemory()
    object.__setattr__(processes, "asked", [])
    trainer.task.loss = functools.partial(hungry, 4)
    assert largest_fitting(trainer.plan.share, trainer._fits, processes) == 2
    assert processes.asked == [False, False]
    assert_same_tensors(state_of(trainer), before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_out_of_memory_advises_smaller_micro_batches(tmp_path):
    config, task, model = toy(tmp_path, "training.micro_batch=4", "world_size=4")

    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    task.loss = hungry
    with pytest.raises(TrainingError, match=r"20\.00 GiB\)\. Try --set training\.micro_batch=2: the run goes on"):
        fit(model, task, config, tmp_path, Processes())


# -- optimiser and DDP -------------------------------------------------------------------------------
def test_a_checkpoint_of_the_unfused_optimizer_goes_on_in_the_fused_one(tmp_path):
    trainer = first_epoch(toy_trainer(tmp_path))
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    for group in saved["training_state"]["optimizer"]["param_groups"]:
        group["fused"] = False  # as on CPUs in earlier versions
    torch.save(saved, tmp_path / "last.pt")
    other = toy_trainer(tmp_path)
    assert other.resume()
    assert {group["fused"] for group in other.optimizer.param_groups} == {True}
    for one in (trainer, other):
        one.train_epoch(SignalCatcher())
    assert_same_tensors(state_of(trainer), state_of(other))


def check_strides_of_one_rank(store):
    """In a process of its own, which ends without destructors: Gloo's may wait for the interpreter for ever."""
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv3d(4, 8, 1), nn.Conv3d(8, 1, 3)).to(memory_format=torch.channels_last_3d)
        torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 1), rank=0, world_size=1)
        runner = data_parallel(model, Processes(0, 2), static=True)
        expected = nn.Sequential(nn.Conv3d(4, 8, 1), nn.Conv3d(8, 1, 3))
        expected.load_state_dict(model.state_dict())
        x = torch.randn(2, 4, 6, 6, 6)
        for _ in range(2):
            for net in (runner, expected):
                net.zero_grad(set_to_none=True)
                net(x).square().mean().backward()
            for ours, theirs in zip(model.parameters(), expected.parameters()):
                assert ours.grad.stride() == ours.stride()
                assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    except Exception:  # noqa: BLE001 - whatever it is, the process says so and ends
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def test_one_voxel_kernels_give_gradients_in_the_layout_of_their_weights(tmp_path):
    """Or DDP warns that gradient and bucket strides differ, and copies."""
    process = multiprocessing.get_context("spawn").Process(
        target=check_strides_of_one_rank, args=(str(tmp_path / "store"),)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_the_moving_average_waits_for_nothing(tmp_path):
    trainer = toy_trainer(tmp_path, f"training.ema_decay={0.5}")
    trainer.step(batches(trainer))
    with OperatorCounter() as counter:
        trainer.average.update(trainer.model, 3)
    assert counter.waiting == []
    assert counter.counts["aten::_foreach_lerp_"] == 1
