"""Weights that a run starts from: those of another run's checkpoint, for fine-tuning."""

from __future__ import annotations

import os

from torch import nn

from xray2ct.checkpoints import check_compatible, weights_fingerprint
from xray2ct.files import InputError
from xray2ct.training.task import PatientTask
from xray2ct.weights import resolve

SETTINGS = ("model_config", "refinement_config")  # header keys of a network's arguments
NO_WEIGHTS = ("activation_checkpointing", "freeze_first_pass")  # arguments that change no weight
SECOND_PASS = "second_pass."  # how the names of its weights begin
SAME_MEANING = ("geometry", "hu_window", "xray_scale")


def start_from(path: str | os.PathLike, model: nn.Module, task: PatientTask) -> str:
    """Load the weights of a checkpoint (``--init``: path, or name of shipped weights) into ``model``; returns a line
    that describes them.

    Weights only: optimiser, schedule and epoch begin anew. The checkpoints of this run then hold where it began
    (``init``: fingerprint and epoch) and count the patients of that training among ``train_patients``.
    A network of several passes also begins with the weights of a single one: its second pass is new then.
    Raises :class:`InputError` naming file and key where the network, the geometry or the scales are not this run's, or
    where a patient of that training is a validation patient here.
    """
    header = task.header()
    checkpoint = resolve(path, header["kind"])
    key = next(name for name in SETTINGS if name in header)
    passes, theirs = (settings[key].get("passes", 1) for settings in (header, checkpoint))
    for name, wanted in header[key].items():
        found = theirs if name == "passes" else checkpoint[key].get(name, wanted)
        if name not in NO_WEIGHTS and found != wanted and not (name == "passes" and passes > 1):
            raise InputError(f"--init {path}: its model.{name} is {found}, this run's is {wanted}; expected the same")
    check_compatible(f"--init {path}", checkpoint, **{name: header[name] for name in SAME_MEANING})
    trained_on = checkpoint.get("train_patients", [])
    scored = sorted(set(trained_on) & set(task.val_data.ids))
    if scored:
        raise InputError(f"--init {path}: was trained on {', '.join(scored[:5])}, validation patients of this data set")
    weights, note = checkpoint[task.weights_key], ""
    given = weights
    if passes > 1 and theirs == 1:
        drawn = {name: value for name, value in model.state_dict().items() if name.startswith(SECOND_PASS)}
        given, note = {**weights, **drawn}, "; they are the first pass, the second one is new"
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        raise InputError(f"--init {path}: its weights do not fit this network ({str(error).splitlines()[0]})") from None
    begun = {"fingerprint": weights_fingerprint(weights), "epoch": checkpoint.get("epoch")}
    task.initial = {"init": begun, "patients": list(trained_on)}
    return f"Initial weights: {path} (epoch {begun['epoch']}, {begun['fingerprint']}){note}"
