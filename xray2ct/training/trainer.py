"""The trainer: epoch loop, accumulation, EMA, validation, checkpoints, resume.

A script gives a :class:`task.Task`; :func:`fit` does the rest. Every random number follows from (seed,
epoch, position in the epoch), so a resumed run, and a run on another number of processes with the same global batch,
sees the same samples with the same augmentation.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from xray2ct.checkpoints import LAST, PREVIOUS, WriteError, find_state, remove_leftovers, save_checkpoint
from xray2ct.files import InputError
from xray2ct.training.config import config_dict, config_hash
from xray2ct.training.convolution_check import reduced_precision_defects
from xray2ct.training.distributed import Processes, lost_peer
from xray2ct.training.ema import MovingAverage
from xray2ct.training.monitors import Monitors
from xray2ct.training.plan import EpochPlan, Positions, accumulation_steps, learning_rate_at, sample_seed
from xray2ct.training.precision import Precision, free_memory, keep_freed_memory, to_channels_last
from xray2ct.training.run_identity import check_same_run
from xray2ct.training.signals import SignalCatcher
from xray2ct.training.task import Task

LABELS = {
    "l1": "L1",
    "ssim": "SSIM",
    "perceptual": "Perc",
    "edge": "Edge",
    "multiscale": "Multi",
    "mse": "MSE",
    "projection": "Proj",
    "diffusion": "Diffusion",
    "physics": "Physics",
}
LOG = "log.jsonl"
CHECKED_DEVICES = ("cuda", "cpu")  # where reduced precision is compared with float32 before training
NUMERIC_ADVICE = "Try a lower training.learning_rate, or training.precision=float32"
MAX_SKIPPED_STEPS = 20  # fp16 steps in a row that the scaler may skip while it finds its scale


class TrainingError(InputError):
    """Training cannot go on; the last good checkpoint is kept."""


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the state has been saved."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Trainer:
    """State and epoch loop of one run; see :func:`fit`."""

    def __init__(self, model: nn.Module, task: Task, config, output: Path, processes: Processes, monitors=None):
        self.task, self.config, self.output, self.processes = task, config, Path(output), processes
        self.monitors = monitors or Monitors()
        training = config.training
        self.precision = Precision(training.precision, processes.device)
        if processes.device.type == "cpu":
            keep_freed_memory()
        self.model = model.to(processes.device)
        if training.channels_last:
            to_channels_last(self.model)
        self.average = MovingAverage(self.model, training.ema_decay) if training.ema_decay > 0 else None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, training.weight_decay),
            lr=training.learning_rate,
            fused=processes.device.type == "cuda",
        )
        accumulation = accumulation_steps(config, processes.world_size)
        self.plan = EpochPlan(
            len(task.train_data),
            config.data.repeats,
            training.batch_size,
            accumulation,
            processes,
            training.seed,
        )
        self.epoch, self.step_in_epoch, self.updates, self.best_psnr = 1, 0, 0, None
        self.sums: dict[str, float] = {}
        self.skipped, self.fell_back = 0, False
        self.last_save = time.monotonic()
        self.runner = torch.compile(self.model) if training.compile else self.model
        if processes.world_size > 1:
            device_ids = [processes.device.index] if processes.device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, device_ids=device_ids)

    # -- checkpoints -----------------------------------------------------------------------------

    def resume(self) -> bool:
        """Load the newest readable state of the output folder when there is one; True when it did.

        A damaged ``last.pt`` is set aside as ``last.pt.damaged`` and said; see :func:`checkpoints.find_state`.
        """
        header = self.task.header()
        found = find_state(self.output, kind=header["kind"])
        if found is None:
            return False
        path, data, notes = found
        check_same_run(path, data, header, self.config)
        state = data["training_state"]
        self.model.load_state_dict(state["model"] if state["model"] else data[self.task.weights_key])
        if self.average:
            self.average.model.load_state_dict(data[self.task.weights_key])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("fell_back"):
            self._use_float32()
            notes = [*notes, "training in float32, as before: reduced precision was wrong"]
        self.precision.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.updates, self.best_psnr, self.sums = state["updates"], state["best_psnr"], state["sums"]
        self._agree_on(path)
        if self.processes.is_main:
            for note in notes:
                print(f"note: {note}", flush=True)
            print(f"Resumed {path} at epoch {self.epoch}, step {self.step_in_epoch}", flush=True)
            if path.name != LAST and (self.output / LAST).exists():
                # Or the next save would put it in the place of the one that can be read.
                os.replace(self.output / LAST, self.output / f"{LAST}.damaged")
        return True

    def _agree_on(self, path: Path) -> None:
        """Refuse to go on when the processes do not read the same state: a folder that is not shared between nodes."""
        states = self.processes.gather_objects((path.name, self.updates))
        if len(set(states)) > 1:
            found = ", ".join(f"rank {rank}: {name} at step {step}" for rank, (name, step) in enumerate(states))
            raise InputError(f"{self.output}: the processes read different states ({found}); is the folder shared?")

    def checkpoint(self, metrics: dict | None = None) -> dict:
        """Weights for inference (the moving average when there is one) with what describes them."""
        weights = self.average.model if self.average else self.model
        return {
            **self.task.header(),
            self.task.weights_key: weights.state_dict(),
            "config": config_dict(self.config),
            "config_hash": config_hash(config_dict(self.config)),
            "epoch": self.epoch,
            "step": self.updates,
            "metrics": metrics or {},
        }

    def save_last(self, name: str = LAST) -> None:
        """Everything needed to go on bit for bit. Rank 0 writes; all ranks wait. The last but one stays, too."""
        if self.processes.is_main:
            state = {
                "model": self.model.state_dict() if self.average else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.precision.scaler.state_dict(),
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "updates": self.updates,
                "best_psnr": self.best_psnr,
                "sums": self.sums,
                "fell_back": self.fell_back,
            }
            keep = self.output / PREVIOUS if name == LAST else None
            save_checkpoint(self.output / name, {**self.checkpoint(), "training_state": state}, keep)
        self.last_save = time.monotonic()
        self.processes.barrier()

    # -- training --------------------------------------------------------------------------------

    def train_epoch(self, catcher: SignalCatcher) -> dict[str, float]:
        """The rest of the current epoch; returns its mean losses and samples/s."""
        plan, training = self.plan, self.config.training
        batches = plan.batches(self.step_in_epoch)
        loader = self._loader(plan.order(self.epoch), batches)
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
                losses = self._step(iterator)
                self.step_in_epoch += 1
                for name, value in losses.items():
                    self.sums[name] = self.sums.get(name, 0.0) + value
                bar.update()
                if self.step_in_epoch % self.config.logging.log_interval == 0:
                    done = (self.step_in_epoch - first) * plan.global_batch
                    self._log_step(losses, done / (time.monotonic() - started))
                self._maybe_stop(catcher)
        samples = (plan.steps - first) * plan.global_batch
        means = {name: value / plan.steps for name, value in self.sums.items()}
        rate = learning_rate_at(
            self.updates, *self._schedule(), training.learning_rate, training.min_learning_rate_ratio
        )
        return {
            **means,
            "samples_per_second": samples / max(1e-9, time.monotonic() - started),
            "learning_rate": rate,
        }

    def _loader(self, order, batches, workers: int | None = None):
        if workers is None:
            workers = self.config.data.num_workers if self.processes.device.type == "cuda" else 0
        return DataLoader(
            Positions(self.task.train_data, order),
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=self.config.data.prefetch_factor if workers else None,
            pin_memory=self.processes.device.type == "cuda",
        )

    def _schedule(self) -> tuple[int, int]:
        training = self.config.training
        return training.num_epochs * self.plan.steps, round(training.warmup_epochs * self.plan.steps)

    def _step(self, iterator) -> dict[str, float]:
        """One optimiser step over all micro-batches; returns losses averaged over them and the ranks."""
        training, task = self.config.training, self.task
        rate = learning_rate_at(
            self.updates, *self._schedule(), training.learning_rate, training.min_learning_rate_ratio
        )
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
        raise TrainingError(self._where(reason))

    def _optimise(self, ids) -> None:
        scaler, training = self.precision.scaler, self.config.training
        scaler.unscale_(self.optimizer)
        limit = training.grad_clip_max_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not torch.isfinite(norm):
            if not scaler.is_enabled():
                raise TrainingError(self._where(f"the gradient norm is {norm.item()}", ids, NUMERIC_ADVICE))
            self.skipped += 1
            if self.skipped > MAX_SKIPPED_STEPS:
                what = f"{self.skipped} float16 steps in a row overflowed"
                raise TrainingError(self._where(what, ids, NUMERIC_ADVICE))
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
        values = ", ".join(f"{LABELS.get(k, k)} {v.item():.4g}" for k, v in parts.items())
        raise TrainingError(self._where(f"the loss is {total.item()} ({values})", ids, NUMERIC_ADVICE))

    def _where(self, what: str, ids=(), advice: str = "The same command goes on") -> str:
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
        raw = next(iter(self._loader(self.plan.order(1), [positions], workers=0)))

        def one_step():
            seeds = [sample_seed(self.config.training.seed, 1, p) for p in positions]
            with torch.no_grad(), self.precision.autocast():
                self.task.loss(self.model, self.task.make_batch(raw, seeds, device))

        defects = reduced_precision_defects(one_step, self.precision.dtype, device)
        if not self.processes.any(bool(defects)):
            return
        name = self.precision.name
        self._use_float32()
        if self.processes.is_main:
            found = defects[0] if defects else "on another process"
            print(f"warning: {name} convolutions are wrong here ({found}); training in float32", flush=True)
        self.log("precision", fallback="float32", wanted=name, defects=defects)

    def _use_float32(self) -> None:
        self.fell_back = True
        for precision in (self.precision, *getattr(self.task, "precisions", list)()):
            precision.use_float32()

    def mend_log(self) -> None:
        """Drop a last line of the log that was cut off by a full disk or a power cut: all others stay readable."""
        path = self.output / LOG
        if self.processes.is_main and path.exists():
            whole = path.read_bytes()
            if whole and not whole.endswith(b"\n"):
                os.truncate(path, whole.rfind(b"\n") + 1)

    def _gpu_memory(self) -> dict[str, float]:
        """Most memory that this rank's tensors took since the last call, in GiB; nothing on a CPU."""
        device = self.processes.device
        if device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        return {"gpu_memory_gib": round(peak, 3)}

    def release(self) -> None:
        """Give the GPU's memory back: nothing of this trainer is used afterwards."""
        self.runner = self.model = self.average = self.optimizer = None
        free_memory(self.processes.device)

    # -- reporting -------------------------------------------------------------------------------

    def _log_step(self, losses, samples_per_second) -> None:
        if not self.processes.is_main:
            return
        parts = [f"Loss: {losses['loss']:.4f}"]
        parts += [f"{LABELS.get(k, k)}: {losses[k]:.4f}" for k in LABELS if k in losses]
        progress = f"Epoch {self.epoch} [{self.step_in_epoch}/{self.plan.steps}]"
        tqdm.write(f"{progress} {' | '.join(parts)} | {samples_per_second:.2f} samples/s")
        self.log("step", step=self.updates, step_in_epoch=self.step_in_epoch, **losses)

    def log(self, event: str, **values) -> None:
        """Append one line to ``log.jsonl`` and to the monitors' curves (rank 0)."""
        if self.processes.is_main:
            line = json.dumps({"event": event, "time": round(time.time(), 3), "epoch": self.epoch, **values})
            path = self.output / LOG
            try:
                with open(path, "a", encoding="utf-8") as stream:
                    stream.write(line + "\n")
            except OSError as error:
                raise WriteError(self._where(f"{path}: could not be written ({error})")) from error
            self.monitors.log(event, self.updates, {"epoch": self.epoch, **values})

    def validate(self) -> dict[str, float]:
        """Validation of the weights that would be saved, over all ranks; means over patients."""
        model = self.average.model if self.average else self.model
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
            print(f"Epoch {self.epoch} Training Summary:")
            for name, value in summary.items():
                if name == "loss" or name in LABELS:
                    print(f"  {LABELS.get(name, 'Total Loss')}: {value:.4f}")
            print(
                f"  {summary['samples_per_second']:.2f} samples/s, learning rate {summary['learning_rate']:.2e}",
                flush=True,
            )
        self.log("epoch", **summary, **self._gpu_memory())
        if self.epoch % config.logging.val_interval == 0 or self.epoch == config.training.num_epochs:
            metrics = self.validate()
            self.log("validation", **metrics)
            self.monitors.pictures(getattr(self.task, "samples", ()), self.updates)
            if main:
                print(f"Validation Results ({metrics['patients']} patients):")
                print(f"  Total Loss: {metrics['loss']:.4f}")
                print(f"  PSNR: {metrics['psnr']:.2f} dB", flush=True)
                for name, value in metrics.items():
                    if name not in ("loss", "psnr", "patients") and name not in LABELS:
                        print(f"  {name}: {value:.4f}", flush=True)
                if hasattr(self.task, "comment"):
                    print(f"  {self.task.comment(metrics)}", flush=True)
            if self.best_psnr is None or metrics["psnr"] > self.best_psnr:
                self.best_psnr = metrics["psnr"]
                if main:
                    save_checkpoint(self.output / self.task.best_name, self.checkpoint(metrics))
                    print(f"New best model saved! PSNR: {self.best_psnr:.2f} dB", flush=True)
        interval = config.logging.save_checkpoint_interval
        finished = self.epoch
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, {}
        if interval and finished % interval == 0:
            self.save_last(f"epoch_{finished}.pt")
        self.save_last()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: matrices and kernels decay, biases, norms and embeddings (1D and priors) do not."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or "embedding" in name or "prior" in name
            (rest if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def fit(model: nn.Module, task: Task, config, output, processes: Processes, monitors=None, accepted=None) -> None:
    """Train ``model`` as ``config`` says; running the same command again resumes.

    Nobody else may write into ``output`` (see :func:`run_lock.locked_folder`). accepted: called by rank 0 once it is
    clear that ``output`` is empty or holds the same run.

    monitors: :class:`monitors.Monitors` that draw the curves of ``log.jsonl``, and pictures of ``task.samples`` (a
    list of validation cases that the task's ``validate`` leaves; optional).

    Writes ``best`` (by validation PSNR), ``epoch_X.pt``, ``last.pt``, ``last_previous.pt`` (the one before) and
    ``log.jsonl`` into ``output``. Raises :class:`TrainingError` on a non-finite loss, on unreadable data and when
    another process is gone, :class:`checkpoints.WriteError` on a full disk and :class:`Interrupted` after a signal.
    """
    output = Path(output)
    if processes.is_main:
        output.mkdir(parents=True, exist_ok=True)
    processes.barrier()
    trainer = Trainer(model, task, config, output, processes, monitors)
    if processes.is_main and remove_leftovers(output):
        print(f"Removed unfinished checkpoint files of an interrupted run from {output}", flush=True)
    trainer.mend_log()
    trainer.resume()
    if processes.is_main and accepted is not None:
        accepted()
    if processes.is_main and trainer.epoch > config.training.num_epochs:
        print(f"Nothing to do: {output / 'last.pt'} has all {config.training.num_epochs} epochs")
    trainer.monitors.start(trainer.updates)
    out_of_memory = None
    with SignalCatcher() as catcher:
        try:
            trainer.check_precision()
            while trainer.epoch <= config.training.num_epochs:
                trainer.finish_epoch(trainer.train_epoch(catcher))
                trainer._maybe_stop(catcher)
        except torch.OutOfMemoryError as error:
            out_of_memory = str(error).splitlines()[0]
        except RuntimeError as error:
            if not lost_peer(error, processes):
                raise
            what = f"another process does not answer any more ({str(error).splitlines()[0]})"
            raise TrainingError(trainer._where(what)) from error
    if out_of_memory:  # outside the handler: the failed step's tensors are free now
        _raise_out_of_memory(trainer, out_of_memory)


def _raise_out_of_memory(trainer: Trainer, reason: str) -> None:
    """Raise :class:`TrainingError` with what would fit: asked of the task, else the usual settings."""
    where = f"epoch {trainer.epoch}, step {trainer.step_in_epoch + 1}: out of GPU memory ({reason})."
    trainer.release()
    advice = getattr(trainer.task, "memory_advice", None)
    batch = max(1, trainer.config.training.batch_size // 2)
    usual = f"Try --set training.batch_size={batch} or --set model.activation_checkpointing=true"
    raise TrainingError(f"{where} {advice() if advice else usual} (and another --output: they change the run)")
