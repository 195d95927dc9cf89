"""The trainer: steps, accumulation, epochs, validation and when to save.

A script gives a :class:`task.Task`; :func:`fit` does the rest. Every random number follows from (seed,
epoch, position in the epoch), so a resumed run, and a run on another number of processes with the same global batch,
sees the same samples with the same augmentation.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from xray2ct.checkpoints import LAST, WriteError, remove_leftovers
from xray2ct.files import InputError
from xray2ct.training.compiling import compiled
from xray2ct.training.convolution_check import reduced_precision_defects
from xray2ct.training.distributed import Processes, lost_peer
from xray2ct.training.monitors import Monitors
from xray2ct.training.plan import EpochPlan, Positions, accumulation_steps, learning_rate_at, sample_seed
from xray2ct.training.precision import peak_gpu_memory
from xray2ct.training.reporting import (
    LOG,
    append_event,
    epoch_summary,
    mend_log,
    numbers,
    step_line,
    validation_summary,
)
from xray2ct.training.signals import Interrupted, SignalCatcher
from xray2ct.training.state import RunState
from xray2ct.training.task import Task

CHECKED_DEVICES = ("cuda", "cpu")  # where reduced precision is compared with float32 before training
NUMERIC_ADVICE = "Try a lower training.learning_rate, or training.precision=float32"
MAX_SKIPPED_STEPS = 20  # fp16 steps in a row that the scaler may skip while it finds its scale


class TrainingError(InputError):
    """Training cannot go on; the last good checkpoint is kept."""


class Trainer(RunState):
    """Epochs and steps of one run; see :func:`fit`."""

    def __init__(self, model: nn.Module, task: Task, config, output: Path, processes: Processes, monitors=None):
        super().__init__(model, task, config, output, processes)
        self.monitors = monitors or Monitors()
        training = config.training
        accumulation = accumulation_steps(config, processes.world_size)
        samples, repeats = len(task.train_data), config.data.repeats
        self.plan = EpochPlan(samples, repeats, training.batch_size, accumulation, processes, training.seed)
        self.skipped = 0  # float16 steps in a row
        say = print if processes.is_main else lambda _: None
        self.runner: Any = compiled(self.model, training.compile, processes.device, say)
        if processes.world_size > 1:
            device_ids = [processes.device.index] if processes.device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, device_ids=device_ids)

    # -- training --------------------------------------------------------------------------------

    def train_epoch(self, catcher: SignalCatcher) -> dict[str, float]:
        """The rest of the current epoch; returns its mean losses and samples/s."""
        plan = self.plan
        loader = self.loader(plan.order(self.epoch), plan.batches(self.step_in_epoch))
        self.runner.train()
        started, first = time.monotonic(), self.step_in_epoch
        bar = tqdm(
            total=plan.steps,
            initial=first,
            desc=f"Epoch {self.epoch}",
            disable=not self.processes.is_main,
            leave=False,
        )
        iterator = iter(loader)
        with bar:  # closed by an error, too: its message gets a line of its own
            while self.step_in_epoch < plan.steps:
                losses = self.step(iterator)
                self.step_in_epoch += 1
                for name, value in losses.items():
                    self.sums[name] = self.sums.get(name, 0.0) + value
                bar.update()
                if self.step_in_epoch % self.config.logging.log_interval == 0:
                    done = (self.step_in_epoch - first) * plan.global_batch
                    if self.processes.is_main:
                        place = f"Epoch {self.epoch} [{self.step_in_epoch}/{plan.steps}]"
                        tqdm.write(step_line(place, losses, done / (time.monotonic() - started)))
                    self.log("step", step=self.updates, step_in_epoch=self.step_in_epoch, **losses)
                self._maybe_stop(catcher)
        samples = (plan.steps - first) * plan.global_batch
        means = {name: value / plan.steps for name, value in self.sums.items()}
        return {
            **means,
            "samples_per_second": samples / max(1e-9, time.monotonic() - started),
            "learning_rate": self._learning_rate(),
        }

    def loader(self, order, batches, workers: int | None = None) -> DataLoader:
        """Micro-batches of ``batches``, lists of positions in ``order``; read by ``workers`` processes."""
        if workers is None:
            workers = self.config.data.num_workers if self.processes.device.type == "cuda" else 0
        return DataLoader(
            Positions(self.task.train_data, order),
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=self.config.data.prefetch_factor if workers else None,
            pin_memory=self.processes.device.type == "cuda",
        )

    def _learning_rate(self) -> float:
        training, steps = self.config.training, self.plan.steps
        schedule = (training.num_epochs * steps, round(training.warmup_epochs * steps))
        return learning_rate_at(self.updates, *schedule, training.learning_rate, training.min_learning_rate_ratio)

    def step(self, iterator) -> dict[str, float]:
        """One optimiser step over all micro-batches; returns losses averaged over them and the ranks."""
        training, task = self.config.training, self.task
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for micro in range(self.plan.accumulation):
            raw = self._read(iterator)
            seeds = [sample_seed(training.seed, self.epoch, int(p)) for p in raw["position"]]
            # What draws from torch's own generator (perceptual slices, dropout) draws the same for a micro-batch
            # whichever process takes it, and after a resume.
            torch.manual_seed(sample_seed(training.seed, self.epoch, -1 - int(raw["position"][0])))
            batch = task.make_batch(raw, seeds, self.processes.device)
            last = micro == self.plan.accumulation - 1
            hold = self.processes.world_size > 1 and not last
            with self.runner.no_sync() if hold else contextlib.nullcontext():
                with self.precision.autocast():
                    total, parts = task.loss(self.runner, batch)
                self._check_finite(total, parts, raw["id"])
                self.precision.scaler.scale(total / self.plan.accumulation).backward()
            for name, value in {"loss": total, **parts}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float() / self.plan.accumulation
        self._optimise(raw["id"])
        names = sorted(sums)
        values = self.processes.mean(torch.stack([sums[name] for name in names]))
        return dict(zip(names, values.tolist()))

    def _read(self, iterator) -> dict:
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

    def _optimise(self, ids) -> None:
        scaler, training = self.precision.scaler, self.config.training
        scaler.unscale_(self.optimizer)
        limit = training.grad_clip_max_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not torch.isfinite(norm):
            if not scaler.is_enabled():
                raise TrainingError(self.where(f"the gradient norm is {norm.item()}", ids, NUMERIC_ADVICE))
            self.skipped += 1
            if self.skipped > MAX_SKIPPED_STEPS:
                what = f"{self.skipped} float16 steps in a row overflowed"
                raise TrainingError(self.where(what, ids, NUMERIC_ADVICE))
        else:
            self.skipped = 0
        scaler.step(self.optimizer)
        scaler.update()
        self.updates += 1
        if self.average:
            self.average.update(self.model, self.updates)

    def _check_finite(self, total, parts, ids) -> None:
        if torch.isfinite(total):
            return
        raise TrainingError(self.where(f"the loss is {total.item()} ({numbers(parts)})", ids, NUMERIC_ADVICE))

    def where(self, what: str, ids=(), advice: str = "The same command goes on") -> str:
        """An error's message: place in the run, patients, what happened, what is kept, what to do."""
        kept = self.output / LAST
        patients = f", patients {', '.join(ids)}" if ids else ""
        place = f"epoch {self.epoch}, step {self.step_in_epoch + 1}{patients}"
        state = f"{kept} is the last good state" if kept.exists() else "nothing had been saved yet"
        return f"{place}: {what}. Stopped; {state}. {advice}"

    def _maybe_stop(self, catcher: SignalCatcher) -> None:
        number = int(self.processes.largest(catcher.received or 0))
        if number:
            catcher.receive(number)
        minutes = (time.monotonic() - self.last_save) / 60
        due = self.processes.any(minutes >= self.config.logging.checkpoint_minutes)
        if number or (due and self.step_in_epoch < self.plan.steps):
            self.save_last()
        if number:
            raise Interrupted(number)

    def check_precision(self) -> None:
        """Fall back to float32 where this machine computes the model's 3D convolutions wrongly in less.

        The first micro-batch is run once, forward only, to see which convolutions there are; every process falls
        back when one has to, and the run stays in float32 when it goes on. Found on the actual shapes, because the
        known defects depend on them: cuDNN's of large inputs, oneDNN's of volumes smaller than the kernel.
        """
        device, done = self.processes.device, self.epoch > self.config.training.num_epochs
        if done or device.type not in CHECKED_DEVICES or self.precision.name == "float32":
            return
        positions = self.plan.batches(0)[0]
        raw = next(iter(self.loader(self.plan.order(1), [positions], workers=0)))

        def one_step():
            seeds = [sample_seed(self.config.training.seed, 1, p) for p in positions]
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

    # -- reporting -------------------------------------------------------------------------------

    def log(self, event: str, **values) -> None:
        """Append one line to ``log.jsonl`` and to the monitors' curves (rank 0)."""
        if self.processes.is_main:
            path, values = self.output / LOG, {"epoch": self.epoch, **values}
            try:
                append_event(path, event, values)
            except OSError as error:
                raise WriteError(self.where(f"{path}: could not be written ({error})")) from error
            self.monitors.log(event, self.updates, values)

    def validate(self) -> dict[str, float]:
        """Validation of the weights that would be saved, over all ranks; means over patients."""
        model = self.best_weights
        was_training = model.training
        model.eval()
        rows = self.task.validate(model, self.processes, self.precision)
        model.train(was_training)
        rows = [row for part in self.processes.gather_objects(rows) for row in part]
        names = [name for name in rows[0] if name != "id"]
        return {name: sum(row[name] for row in rows) / len(rows) for name in names} | {"patients": len(rows)}

    def finish_epoch(self, summary: dict[str, float]) -> None:
        """Summary, validation, best and periodic checkpoints, then the next epoch's start is saved."""
        config, main = self.config, self.processes.is_main
        if main:
            print(epoch_summary(self.epoch, summary), flush=True)
        self.log("epoch", **summary, **peak_gpu_memory(self.processes.device))
        if self.epoch % config.logging.val_interval == 0 or self.epoch == config.training.num_epochs:
            metrics = self.validate()
            self.log("validation", **metrics)
            self.monitors.pictures(self.task.samples, self.updates)
            if main:
                print(validation_summary(metrics, self.task.comment(metrics)), flush=True)
            if self.best_psnr is None or metrics["psnr"] > self.best_psnr:
                self.save_best(metrics)
                if main:
                    print(f"New best model saved! PSNR: {metrics['psnr']:.2f} dB", flush=True)
        interval = config.logging.save_checkpoint_interval
        finished = self.epoch
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, {}
        if interval and finished % interval == 0:
            self.save_last(f"epoch_{finished}.pt")
        self.save_last()


def fit(model: nn.Module, task: Task, config, output, processes: Processes, monitors=None, accepted=None) -> None:
    """Train ``model`` with the settings ``config``; running the same command again resumes.

    Nobody else may write into ``output`` (see :func:`run_lock.locked_folder`). accepted: called by rank 0 once it is
    clear that ``output`` is empty or holds the same run.

    monitors: :class:`monitors.Monitors` that draw the curves of ``log.jsonl``, and pictures of ``task.samples`` (see
    :class:`task.Task`).

    Writes ``best`` (by validation PSNR), ``epoch_X.pt``, ``last.pt``, ``last_previous.pt`` (the one before) and
    ``log.jsonl`` into ``output``. Raises :class:`TrainingError` on a non-finite loss, on unreadable data and when
    another process is gone, :class:`checkpoints.WriteError` on a full disk and :class:`Interrupted` after a signal.
    """
    output = Path(output)
    if processes.is_main:
        output.mkdir(parents=True, exist_ok=True)
    processes.barrier()
    trainer = Trainer(model, task, config, output, processes, monitors)
    if processes.is_main:
        if remove_leftovers(output):
            print(f"Removed unfinished checkpoint files of an interrupted run from {output}", flush=True)
        mend_log(output / LOG)
    trainer.resume()
    if processes.is_main and accepted is not None:
        accepted()
    if processes.is_main and trainer.epoch > config.training.num_epochs:
        print(f"Nothing to do: {output / 'last.pt'} has all {config.training.num_epochs} epochs")
    trainer.monitors.start(trainer.updates)
    with SignalCatcher() as catcher:
        try:
            trainer.check_precision()
            while trainer.epoch <= config.training.num_epochs:
                trainer.finish_epoch(trainer.train_epoch(catcher))
                trainer._maybe_stop(catcher)
        except torch.OutOfMemoryError as error:
            place = f"epoch {trainer.epoch}, step {trainer.step_in_epoch + 1}"
            reason, advice = str(error).splitlines()[0], task.memory_advice()
            raise TrainingError(
                f"{place}: out of GPU memory ({reason}). {advice} (and another --output: they change the run)"
            ) from error
        except RuntimeError as error:
            if not lost_peer(error, processes):
                raise
            what = f"another process does not answer any more ({str(error).splitlines()[0]})"
            raise TrainingError(trainer.where(what)) from error
