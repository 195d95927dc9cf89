"""Runs of the toy network in processes of their own that meet a fault at a chosen place: a kill, a signal, no space."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import time

import torch

from tests.helpers import toy_task
from tests.helpers.forked import server
from xray2ct import checkpoints as checkpoints_module
from xray2ct.checkpoints import weights_fingerprint
from xray2ct.files import run_cli
from xray2ct.training import cli, state, trainer
from xray2ct.training.distributed import Processes, process_group

SECONDS = 600  # for anything that is waited for, on a machine with much else to do
REPORT = ("report", 2)


# -- runs in processes of their own ----------------------------------------------------------------
def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def child(words, console, fault, pipe):
    """A training command in this process, with a fault laid in; output goes to the file ``console``."""
    stream = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    torch.set_num_threads(1)
    install(fault, pipe)
    run_cli(lambda: toy_task.main(words))


def install(fault, pipe):
    """Change this process so that it meets ``fault``: what it does, how often it is passed before, where."""
    name, *values = fault
    if name == "report":
        around(trainer.Trainer, "step", functools.partial(report, pipe, Countdown(values[0])))
    elif name == "record":
        around(state, "save_checkpoint", functools.partial(record, values[0]))
    elif name == "write":
        torch.save = functools.partial(half_a_file, torch.save, Countdown(values[0]), *values[1:])
    elif name in ("link", "replace", "validation"):
        where = {
            "link": (checkpoints_module, "_keep"),
            "replace": (state, "save_checkpoint"),
            "validation": (toy_task.ToyTask, "validate"),
        }[name]
        around(*where, functools.partial(then_die, Countdown(values[0]), values[1]))
    if "stop_answering" in fault:
        limited = functools.partial(process_group, timeout_minutes=0.1)
        cli.process_group = limited


class Countdown:
    def __init__(self, count):
        self.start = self.count = count

    def __call__(self):
        self.count -= 1
        return self.count == 0


def around(owner, name, change):
    """Replace a function or method by ``change(original, *args)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args: change(original, *args))


def report(pipe, countdown, call, *args):
    """Tell how long a step took; from the end of the countdown on, steps take long enough to be killed in."""
    began = time.monotonic()
    result = call(*args)
    pipe.send(time.monotonic() - began)
    if countdown() or countdown.count < 0 < countdown.start:
        time.sleep(2)
    return result


def record(file, call, path, checkpoint, *args):
    """The weights after every step, by their fingerprint."""
    call(path, checkpoint, *args)
    if "training_state" in checkpoint:
        with open(file, "a") as stream:
            stream.write(json.dumps([checkpoint["step"], fingerprint(checkpoint)]) + "\n")


def half_a_file(save, countdown, share, number, data, path):
    """``torch.save`` that dies, or gets a signal, when ``share`` of the bytes are written."""
    if not countdown():
        return save(data, path)
    buffer = io.BytesIO()
    save(data, buffer)
    content = buffer.getvalue()
    with open(path, "wb") as stream:
        stream.write(content[: int(share * len(content))])
        stream.flush()
        die(number)
        stream.write(content[int(share * len(content)) :])


def then_die(countdown, number, call, *args):
    result = call(*args)
    if countdown():
        die(number)
    return result


def fingerprint(checkpoint):
    averaged, trained = checkpoint["model_state_dict"], checkpoint["training_state"]["model"]
    return weights_fingerprint(averaged) + weights_fingerprint(trained)


class Run:
    """A training command under way."""

    def __init__(self, output, fault=("none",), overrides=(), target=child, extra=()):
        self.console = output.parent / f"console{''.join(f'-{value}' for value in extra)}"
        self.pipe, other = server().Pipe(duplex=False)
        words = toy_task.words(output, *overrides)
        self.process = server().Process(target=target, args=(*extra, words, str(self.console), fault, other))
        self.process.start()
        other.close()

    def wait_for_step(self):
        assert self.pipe.poll(SECONDS), self.text()
        return self.pipe.recv()

    def end(self):
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode

    def text(self):
        return self.console.read_text(encoding="utf-8", errors="replace") if self.console.exists() else ""


def toy(output, *overrides):
    _, config = toy_task.parse(toy_task.words(output, *overrides))
    task = toy_task.ToyTask(config, Processes())
    return config, task, task.build_model()
