"""The trainer: steps, accumulation, epochs, validation and when to save.

A script gives a :class:`task.Task`; :func:`fit` does the rest. Every random number follows from (seed,
epoch, position in the epoch), so a resumed run, and a run on another number of processes with the same global batch,
sees the same samples with the same augmentation.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from xray2ct.checkpoints import remove_leftovers
from xray2ct.files import InputError
from xray2ct.progress import is_quiet, progress_bar
from xray2ct.training.clock import RunClock
from xray2ct.training.compiling import compiled
from xray2ct.training.convolution_check import reduced_precision_defects
from xray2ct.training.distributed import Processes, data_parallel, lost_peer
from xray2ct.training.epochs import NUMERIC_ADVICE, RunEpochs, TrainingError
from xray2ct.training.feed import Feed, sample_loader
from xray2ct.training.ledger import Ledger, StepRecord
from xray2ct.training.micro_batch import divisors, largest_fitting, wanted_micro_batch
from xray2ct.training.plan import EpochPlan, accumulation_steps, learning_rate_at, sample_seed
from xray2ct.training.reporting import (
    LOG,
    conclusion,
    loss_text,
    mend_log,
    slow_warning,
    step_line,
)
from xray2ct.training.signals import STOPPING, Interrupted, SignalCatcher
from xray2ct.training.task import Task

CHECKED_DEVICES = ("cuda", "cpu")  # where reduced precision is compared with float32 before training
MAX_SKIPPED_STEPS = 20  # fp16 steps in a row that the scaler may skip while it finds its scale
COLLECT_SECONDS = 1.0  # several processes tell each other of signals at least this often, in whole steps


class Collected(NamedTuple):
    """What :meth:`Trainer.collect` brought to the host, the same on every process."""

    losses: dict[str, float]  # of the last step, means over all processes
    signal: int  # that one of the processes has received; 0 for none
    save: bool  # whether one of them wants the state saved


class Trainer(RunEpochs):
    """Epochs and steps of one run; see :func:`fit`.

    A step never waits for the device. Losses, gradient norms and whether they are finite stay there until
    :meth:`collect`; a step whose gradient is not finite leaves the weights as they were.
    """

    def __init__(
        self, model: nn.Module, task: Task, config, output: Path, processes: Processes, monitors=None, clock=None
    ):
        super().__init__(model, task, config, output, processes, monitors, clock)
        training = config.training
        accumulation = accumulation_steps(config, processes.world_size)
        samples, repeats = len(task.train_data), config.data.repeats
        self.plan = EpochPlan(samples, repeats, training.batch_size, accumulation, processes, training.seed)
        if micro_batch := wanted_micro_batch(training.micro_batch, self.plan.share):
            self.plan.micro_batch = micro_batch
        self.feed = Feed(task.train_data, config.data, processes)
        self.ledger = Ledger()
        self.pace = 1  # steps from one collection to the next, with several processes
        self.collected_at = time.monotonic()
        self.skipped = 0  # float16 steps in a row
        self.failed = torch.zeros((), dtype=torch.bool, device=processes.device)  # see _skip_unless_finite
        say = print if processes.is_main else lambda _: None
        self.single: Any = compiled(self.model, training.compile, processes.device, say)

    @functools.cached_property
    def runner(self) -> Any:
        """The network that steps run; made at the first one, when the size of the micro-batches is known."""
        if self.processes.world_size == 1:
            return self.single
        static = self.plan.micro_batches == 1 and not self.config.training.compile
        return data_parallel(self.single, self.processes, static)

    # -- training --------------------------------------------------------------------------------

    def train_epoch(self, catcher: SignalCatcher) -> dict[str, float]:
        """The rest of the current epoch; returns its mean losses and samples/s."""
        plan = self.plan
        iterator = self.feed.start(plan, self.epoch, self.step_in_epoch, self.config.training.num_epochs)
        self.runner.train()
        started, first = time.monotonic(), self.step_in_epoch
        name, hidden = f"Epoch {self.epoch}/{self.config.training.num_epochs}", not self.processes.is_main
        bar = progress_bar(total=plan.steps, initial=first, desc=name, unit="steps", disable=hidden, leave=False)
        self.collected_at = time.monotonic()
        with bar:  # closed by an error, too: its message gets a line of its own
            while self.step_in_epoch < plan.steps and not (self.clock.over and self.step_in_epoch > first):
                self.step(iterator)
                self.step_in_epoch += 1
                bar.update()
                self._warn_of_slow_steps()
                logged = self.step_in_epoch % self.config.logging.log_interval == 0
                if not (logged or self.step_in_epoch == plan.steps or self._has_to_collect(catcher)):
                    continue
                collected = self.collect(catcher)
                if logged:
                    self._report(collected.losses, (self.step_in_epoch - first) * plan.global_batch, started)
                self._act_on(collected)
        samples = (self.step_in_epoch - first) * plan.global_batch
        means = {name: value / self.step_in_epoch for name, value in self.sums.items()}
        return {
            **means,
            "samples_per_second": samples / max(1e-9, time.monotonic() - started),
            "learning_rate": self._learning_rate(),
        }

    def loader(self, order, batches, workers: int = 0):
        """Raw micro-batches of ``batches``, lists of positions in ``order``, apart from those of training."""
        samples = [[(position, order[position]) for position in positions] for positions in batches]
        return sample_loader(self.task.train_data, samples, workers, self.config.data.prefetch_factor, pin=False)

    def close(self) -> None:
        """End the processes that read ahead."""
        self.feed.close()

    def _learning_rate(self) -> float:
        training = self.config.training
        schedule = (self.total_steps, round(training.warmup_epochs * self.plan.steps))
        rates = (training.learning_rate, training.min_learning_rate_ratio)
        return learning_rate_at(self.updates, *schedule, *rates, self.clock.share)

    def step(self, iterator) -> None:
        """One optimiser step over all micro-batches; its losses wait in the ledger for :meth:`collect`."""
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        losses, ids = [], []
        for micro in range(self.plan.micro_batches):
            raw = self._next_micro_batch(iterator)
            hold = self.processes.world_size > 1 and micro < self.plan.micro_batches - 1
            with self.runner.no_sync() if hold else contextlib.nullcontext():
                losses.append(self._backward(self.runner, raw))
            ids.append(list(raw["id"]))
        self.ledger.enter(self.step_in_epoch + 1, ids, losses, self._optimise())

    def _backward(self, runner, raw: dict) -> dict[str, torch.Tensor]:
        """Add a micro-batch's gradients; returns its losses, on the device."""
        seed, positions = self.config.training.seed, raw["position"].tolist()
        seeds = [sample_seed(seed, self.epoch, position) for position in positions]
        # What draws from torch's own generator (dropout) draws the same for a micro-batch whichever process takes
        # it, and after a resume.
        torch.manual_seed(sample_seed(seed, self.epoch, -1 - positions[0]))
        batch = self.task.make_batch(raw, seeds, self.processes.device)
        with self.precision.autocast():
            total, parts = self.task.loss(runner, batch)
        # A loss that is not finite makes every gradient NaN, also on the other processes: they add them up.
        guarded = total * (1.0 + 0.0 * total.detach())
        self.precision.scaler.scale(guarded / self.plan.micro_batches).backward()
        return {"loss": total, **parts}

    def _next_micro_batch(self, iterator) -> dict:
        """The next micro-batch; what goes wrong in a data worker becomes one sentence naming patient and file."""
        try:
            return next(iterator)
        except InputError as error:  # from a worker it holds a traceback, with the message at its end
            reason = str(error).rsplit("InputError: ", 1)[-1].strip()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = f"a data worker ended ({str(error).splitlines()[0]}); try data.num_workers=0"
        raise TrainingError(self.where(reason))

    def _optimise(self) -> torch.Tensor:
        """Clip the gradients and take the step, unless they are not finite; returns their norm before clipping."""
        scaler, optimizer = self.precision.scaler, self.optimizer
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.grad_clip_max_norm or math.inf)
        self._skip_unless_finite(norm)
        optimizer.step()
        scaler.update()
        self.updates += 1
        if self.average:
            self.average.update(self.model, self.updates)
        return norm

    def _skip_unless_finite(self, norm: torch.Tensor) -> None:
        """Have the optimiser's next step leave the weights as they are if ``norm`` is not finite.

        Decided on the device: PyTorch's fused optimisers look at their attribute ``found_inf``, 1 for a step to skip.
        With float16's scaler a bad step is skipped by itself, and the scale is lowered. Else it ends the run, though
        only when the host collects it (:meth:`_check`): ``failed`` has the steps until then skipped, too.
        """
        bad = ~torch.isfinite(norm)
        if not self.precision.scaler.is_enabled():
            self.failed |= bad
            bad = self.failed
        vars(self.optimizer)["found_inf"] = bad.float()

    # -- collecting what the steps left ------------------------------------------------------------

    def _has_to_collect(self, catcher: SignalCatcher) -> bool:
        """Whether to collect before ``log_interval``, decided without asking anybody: the same on every process."""
        if self.processes.world_size > 1:
            return len(self.ledger) >= self.pace
        self.clock.agree(self.clock.own_share)
        return catcher.received is not None or self.clock.over or self._save_is_due()

    def _save_is_due(self) -> bool:
        return (time.monotonic() - self.last_save) / 60 >= self.config.logging.checkpoint_minutes

    def collect(self, catcher: SignalCatcher) -> Collected:
        """Wait for the steps since the last call and add up their losses; :class:`TrainingError` for a bad one.

        Losses, signals, due checkpoints, the time of a step and the share of the run's limit that has passed travel in
        one reduction.
        """
        seconds = (time.monotonic() - self.collected_at) / max(1, len(self.ledger))
        received = [float(catcher.received == number) for number in STOPPING]
        own = [*received, self.clock.own_share, float(self._save_is_due()), seconds]
        steps, (*received, share, save, seconds) = self.ledger.read(self.processes, own)
        self.clock.agree(share)
        self.pace, self.collected_at = max(1, int(COLLECT_SECONDS / max(seconds, 1e-3))), time.monotonic()
        for step in steps:
            self._check(step)
            for name, value in step.losses.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
        signals = [number for number, arrived in zip(STOPPING, received) if arrived > 0]
        return Collected(steps[-1].losses if steps else {}, max(signals, default=0), save > 0)

    def _check(self, step: StepRecord) -> None:
        """Raise :class:`TrainingError` for a step whose loss or gradient was not finite: the first one ends the run.

        float16 gradients may overflow some steps in a row while the scaler finds its scale.
        """
        if math.isfinite(step.norm):
            self.skipped = 0
            return
        what, ids = f"the gradient norm is {step.norm}", [name for micro in step.ids for name in micro]
        if math.isfinite(step.losses["loss"]):
            if self.precision.scaler.is_enabled():
                self.skipped += 1
                if self.skipped <= MAX_SKIPPED_STEPS:
                    return
                what = f"{self.skipped} float16 steps in a row overflowed"
        else:
            bad = next((i for i, losses in enumerate(step.own) if not math.isfinite(losses["loss"])), None)
            found = None if bad is None else (loss_text(step.own[bad]), step.ids[bad])
            # Every process comes here, and each of them names the patients of the first that has a bad loss.
            what, ids = next((f for f in self.processes.gather_objects(found) if f is not None), (what, ids))
        raise TrainingError(self.where(what, ids, NUMERIC_ADVICE, step.number))

    def _report(self, losses: dict[str, float], samples: int, started: float) -> None:
        if self.processes.is_main and not is_quiet():
            place = f"Epoch {self.epoch} [{self.step_in_epoch}/{self.plan.steps}]"
            tqdm.write(step_line(place, losses, samples / (time.monotonic() - started)))
        self.log("step", step=self.updates, step_in_epoch=self.step_in_epoch, **losses)

    def _act_on(self, collected: Collected) -> None:
        """Save the state where it is due; after a signal save it and raise :class:`Interrupted`."""
        if collected.signal or (collected.save and self.step_in_epoch < self.plan.steps):
            self.save_last()
        if collected.signal:
            raise Interrupted(collected.signal)

    def check_precision(self) -> None:
        """Fall back to float32 where this machine computes the model's 3D convolutions wrongly in less.

        The first micro-batch is run once, forward only, to see which convolutions there are; every process falls
        back when one has to, and the run stays in float32 when it goes on. Found on the actual shapes, because the
        known defects depend on them: cuDNN's of large inputs, oneDNN's of volumes smaller than the kernel.
        """
        device = self.processes.device
        if self.finished or device.type not in CHECKED_DEVICES or self.precision.name == "float32":
            return
        raw = self._first_samples(self.plan.micro_batch)

        def one_step():
            seeds = [sample_seed(self.config.training.seed, 1, p) for p in raw["position"].tolist()]
            with torch.no_grad(), self.precision.autocast():
                self.task.loss(self.model, self.task.make_batch(raw, seeds, device))

        defects = reduced_precision_defects(one_step, self.precision.dtype, device)
        if not self.processes.any(bool(defects)):
            return
        name = self.precision.name
        self.use_float32()
        if self.processes.is_main:
            found = defects[0] if defects else "on another process"
            print(f"warning: {name} convolutions are wrong here ({found}); training in float32", flush=True)
        self.log("precision", fallback="float32", wanted=name, defects=defects)

    def choose_micro_batch(self) -> None:
        """On a GPU compute as much of a step at once as fits into its memory, unless the settings say how much."""
        share = self.plan.share
        if self.finished or self.config.training.micro_batch or self.processes.device.type != "cuda":
            return
        self.feed.prepare()  # what stays on the GPU takes its place first
        self.plan.micro_batch = largest_fitting(share, self._fits, self.processes)
        if self.processes.is_main and self.plan.micro_batch != self.plan.batch_size:
            print(f"note: {self.plan.micro_batch} of the {share} samples of a step are computed at once", flush=True)
        self.log("micro_batch", samples=self.plan.micro_batch, share=share)

    def _fits(self, samples: int) -> bool:
        """Whether this process has the memory for a step with micro-batches of ``samples``; no trace of it stays."""
        moments: list[torch.Tensor] = []  # the optimiser's, which it makes at its first step
        try:
            if not self.optimizer.state:
                moments += (torch.empty_like(p) for _ in range(2) for p in self.model.parameters())
            self.model.train()
            self._backward(self.single, self._first_samples(samples))
        except torch.OutOfMemoryError:
            return False
        finally:
            moments.clear()
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    def _first_samples(self, count: int) -> dict:
        """The first of this process's samples of a run, as the loader gives them."""
        return next(iter(self.loader(self.plan.order(1), [self.plan.positions(0)[:count]], workers=0)))

    # -- reporting -------------------------------------------------------------------------------

    def _warn_of_slow_steps(self) -> None:
        """On a CPU, once: how long the run takes, where that is longer than anybody meant."""
        seconds = self.clock.second_step(self.updates)
        if seconds is None or self.processes.device.type != "cpu" or self.clock.minutes or not self.processes.is_main:
            return
        left, epochs = seconds * (self.total_steps - self.updates), self.config.training.num_epochs
        if warning := slow_warning(seconds, left, epochs, self.task.cpu_advice()):
            tqdm.write(warning)


def out_of_memory(trainer: Trainer, error: torch.OutOfMemoryError) -> TrainingError:
    """What to say when the GPU's memory ran out."""
    place = f"epoch {trainer.epoch}, step {trainer.step_in_epoch + 1}"
    reason, advice = str(error).splitlines()[0], trainer.task.memory_advice()
    if trainer.plan.micro_batch > 1:
        smaller = divisors(trainer.plan.micro_batch)[-2]
        advice = f"Try --set training.micro_batch={smaller}: the run goes on as it was. Else: {advice}"
    return TrainingError(f"{place}: out of GPU memory ({reason}). {advice} (and another --output: they change the run)")


def fit(
    model: nn.Module,
    task: Task,
    config,
    output,
    processes: Processes,
    monitors=None,
    accepted=None,
    max_minutes: float | None = None,
) -> None:
    """Train ``model`` with the settings ``config``; running the same command again resumes.

    Nobody else may write into ``output`` (see :func:`run_lock.locked_folder`). accepted: called by rank 0 once it is
    clear that ``output`` is empty or holds the same run.

    monitors: :class:`monitors.Monitors` that draw the curves of ``log.jsonl``, and pictures of ``task.samples`` (see
    :class:`task.Task`). max_minutes: of training, validation and saving, of all starts together, after which the run
    ends with its cosine finished and its last epoch validated; 0: no limit, None: the limit that the run had.

    Writes ``best`` (by validation PSNR), ``epoch_X.pt``, ``last.pt``, ``last_previous.pt`` (the one before) and
    ``log.jsonl`` into ``output``. Raises :class:`TrainingError` on a non-finite loss, on unreadable data and when
    another process is gone, :class:`checkpoints.WriteError` on a full disk and :class:`Interrupted` after a signal.
    """
    output = Path(output)
    if processes.is_main:
        output.mkdir(parents=True, exist_ok=True)
    processes.barrier()
    trainer = Trainer(model, task, config, output, processes, monitors, RunClock(max_minutes))
    if processes.is_main:
        if remove_leftovers(output):
            print(f"Removed unfinished checkpoint files of an interrupted run from {output}", flush=True)
        mend_log(output / LOG)
    trainer.resume()
    if processes.is_main and accepted is not None:
        accepted()
    done = trainer.finished
    trainer.monitors.start(trainer.updates)
    with SignalCatcher() as catcher, contextlib.closing(trainer):
        try:
            trainer.check_precision()
            trainer.choose_micro_batch()
            trainer.clock.start(trainer.updates)
            while not trainer.finished:
                trainer.finish_epoch(trainer.train_epoch(catcher))
                trainer._act_on(trainer.collect(catcher))
            if processes.is_main:
                print(conclusion(trainer, done), flush=True)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(trainer, error) from error
        except RuntimeError as error:
            if not lost_peer(error, processes):
                raise
            what = f"another process does not answer any more ({str(error).splitlines()[0]})"
            raise TrainingError(trainer.where(what)) from error
