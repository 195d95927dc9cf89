"""State of a run: network, moving average, optimiser and place in the run; saved, and resumed bit for bit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

from xray2ct.checkpoints import LAST, PREVIOUS, find_state, save_checkpoint
from xray2ct.files import InputError
from xray2ct.training.clock import RunClock
from xray2ct.training.config import config_dict, config_hash
from xray2ct.training.distributed import Processes
from xray2ct.training.ema import MovingAverage
from xray2ct.training.precision import Precision, keep_freed_memory, set_memory_format
from xray2ct.training.run_identity import check_same_run
from xray2ct.training.task import Task


class RunState:
    """What a run needs to go on, in its output folder; :class:`epochs.RunEpochs` adds what happens between epochs."""

    def __init__(
        self, model: nn.Module, task: Task, config, output: Path, processes: Processes, clock: RunClock | None = None
    ):
        self.clock = clock or RunClock()
        self.task, self.config, self.output, self.processes = task, config, Path(output), processes
        training = config.training
        self.precision = Precision(training.precision, processes.device)
        if processes.device.type == "cpu":
            keep_freed_memory()
        self.model = model.to(processes.device)
        set_memory_format(self.model, training.channels_last)
        self.average = MovingAverage(self.model, training.ema_decay) if training.ema_decay > 0 else None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, training.weight_decay),
            lr=training.learning_rate,
            fused=True,  # skips a step on the device (found_inf), on GPUs and CPUs; on a CPU a third of the time
        )
        self.epoch, self.step_in_epoch, self.updates = 1, 0, 0
        self.best_psnr: float | None = None
        self.sums: dict[str, float] = {}  # of the epoch's losses so far
        self.fell_back = False
        self.last_save = time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the run's limit has ended it."""
        return self.epoch > self.config.training.num_epochs or self.clock.stopped

    @property
    def best_weights(self) -> nn.Module:
        """The network that is validated and used: the moving average where there is one."""
        return self.average.model if self.average else self.model

    def use_float32(self) -> None:
        """Fall back to float32 for the rest of the run, frozen networks included."""
        self.fell_back = True
        for precision in (self.precision, *self.task.precisions()):
            precision.use_float32()

    def resume(self) -> bool:
        """Load the newest readable state of the output folder when there is one; True when it did.

        A damaged ``last.pt`` is renamed to ``last.pt.damaged`` and reported; see :func:`checkpoints.find_state`.
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
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = True  # earlier versions: on GPUs only
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("fell_back"):
            self.use_float32()
            notes = [*notes, "training in float32, as before: reduced precision was wrong"]
        self.precision.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.updates, self.best_psnr, self.sums = state["updates"], state["best_psnr"], state["sums"]
        if note := self.clock.load(state.get("clock")):
            notes = [*notes, note]
        self._agree_on(path)
        if self.processes.is_main:
            for note in notes:
                print(f"note: {note}", flush=True)
            print(f"Resumed {path} at epoch {self.epoch}, step {self.step_in_epoch}", flush=True)
            if path.name != LAST and (self.output / LAST).exists():
                # Or the next save would replace the readable one by it.
                os.replace(self.output / LAST, self.output / f"{LAST}.damaged")
        return True

    def _agree_on(self, path: Path) -> None:
        """Refuse to go on when the processes do not read the same state: a folder that is not shared between nodes."""
        states = self.processes.gather_objects((path.name, self.updates))
        if len(set(states)) > 1:
            found = ", ".join(f"rank {rank}: {name} at step {step}" for rank, (name, step) in enumerate(states))
            raise InputError(f"{self.output}: the processes read different states ({found}); is the folder shared?")

    def where(self, what: str, ids=(), advice: str = "The same command goes on", step: int | None = None) -> str:
        """An error's message: place in the run, patients, what happened, what is kept, what to do.

        step: in the epoch, from 1; default: the current one.
        """
        kept = self.output / LAST
        patients = f", patients {', '.join(ids)}" if ids else ""
        place = f"epoch {self.epoch}, step {step or self.step_in_epoch + 1}{patients}"
        state = f"{kept} is the last good state" if kept.exists() else "nothing had been saved yet"
        return f"{place}: {what}. Stopped; {state}. {advice}"

    def checkpoint(self, metrics: dict | None = None) -> dict:
        """Weights for inference (:attr:`best_weights`) with what describes them."""
        return {
            **self.task.header(),
            self.task.weights_key: self.best_weights.state_dict(),
            "config": config_dict(self.config),
            "config_hash": config_hash(config_dict(self.config)),
            "epoch": self.epoch,
            "step": self.updates,
            "metrics": metrics or {},
        }

    def save_best(self, metrics: dict[str, float]) -> Path:
        """Keep the weights of a validation that scored ``metrics``. Rank 0 writes; returns the path."""
        self.best_psnr, path = metrics["psnr"], self.output / self.task.best_name
        if self.processes.is_main:
            save_checkpoint(path, self.checkpoint(metrics))
        return path

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
            if (clock := self.clock.state()) is not None:
                state["clock"] = clock
            keep = self.output / PREVIOUS if name == LAST else None
            save_checkpoint(self.output / name, {**self.checkpoint(), "training_state": state}, keep)
        self.last_save = time.monotonic()
        self.processes.barrier()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: matrices and kernels decay, biases, norms and embeddings (1D and priors) do not."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or "embedding" in name or "prior" in name
            (rest if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
