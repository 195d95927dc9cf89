"""The end of an epoch: its summary, the log, validation, the best weights."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from xray2ct.checkpoints import WriteError
from xray2ct.files import InputError
from xray2ct.progress import is_quiet
from xray2ct.training.clock import RunClock
from xray2ct.training.distributed import Processes
from xray2ct.training.monitors import Monitors
from xray2ct.training.plan import EpochPlan
from xray2ct.training.precision import peak_gpu_memory
from xray2ct.training.reporting import LOG, append_event, epoch_line, epoch_summary, validation_summary
from xray2ct.training.state import RunState
from xray2ct.training.task import Task

NUMERIC_ADVICE = "Try a lower training.learning_rate, or training.precision=float32"


class TrainingError(InputError):
    """Training cannot go on; the last good checkpoint is kept."""


class RunEpochs(RunState):
    """What happens to a run's state between epochs; :class:`trainer.Trainer` adds the steps."""

    plan: EpochPlan

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config,
        output: Path,
        processes: Processes,
        monitors: Monitors | None = None,
        clock: RunClock | None = None,
    ):
        super().__init__(model, task, config, output, processes, clock)
        self.monitors = monitors or Monitors()

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all epochs."""
        return self.config.training.num_epochs * self.plan.steps

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
        """Validation of the weights that would be saved, over all ranks; means over patients.

        Raises :class:`TrainingError` naming the patients whose predicted volumes are not finite.
        """
        model = self.best_weights
        was_training = model.training
        model.eval()
        rows = self.task.validate(model, self.processes, self.precision)
        model.train(was_training)
        rows = [row for part in self.processes.gather_objects(rows) for row in part]
        bad = [row["id"] for row in rows if not math.isfinite(row["psnr"])]
        if bad:
            what = "validation: the predicted volumes hold NaN or infinite values"
            raise TrainingError(self.where(what, bad, NUMERIC_ADVICE, self.step_in_epoch))
        names = [name for name in rows[0] if name != "id"]
        return {name: sum(row[name] for row in rows) / len(rows) for name in names} | {"patients": len(rows)}

    def finish_epoch(self, summary: dict[str, float]) -> None:
        """Summary, validation, best and periodic checkpoints, then the next epoch's start is saved."""
        config, epochs, metrics = self.config, self.config.training.num_epochs, None
        self._say(epoch_summary(self.epoch, summary))
        self.log("epoch", **summary, **peak_gpu_memory(self.processes.device))
        due = self.epoch % config.logging.val_interval == 0 and not self.clock.last_validation_comes
        if due or self.epoch == epochs or self.clock.over:
            metrics = self._validate_and_keep_best()
        interval = config.logging.save_checkpoint_interval
        finished = self.epoch
        self.clock.stopped = metrics is not None and self.clock.over and finished < epochs
        if self.processes.is_main:
            left = 0.0 if self.clock.stopped else self.clock.left(self.updates, self.total_steps)
            print(epoch_line(finished, epochs, metrics, self.best_psnr, left), flush=True)
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, {}
        if interval and finished % interval == 0:
            self.save_last(f"epoch_{finished}.pt")
        self.save_last()

    def _validate_and_keep_best(self) -> dict[str, float]:
        """Validate, save the weights where they are the best so far; returns the scores."""
        began = self.clock.seconds
        metrics = self.validate()
        self.log("validation", **metrics)
        self.monitors.pictures(self.task.samples, self.updates)
        self._say(validation_summary(metrics, self.task.comment(metrics)))
        if self.best_psnr is None or metrics["psnr"] > self.best_psnr:
            self.save_best(metrics)
            self._say(f"New best model saved! PSNR: {metrics['psnr']:.2f} dB")
        if self.clock.minutes:
            self.clock.validation = self.processes.largest(self.clock.seconds - began)
            self.clock.agree(self.processes.largest(self.clock.own_share))
        return metrics

    def _say(self, text: str) -> None:
        """Print what ``--quiet`` leaves out (rank 0)."""
        if self.processes.is_main and not is_quiet():
            print(text, flush=True)
