"""Build a network from its checkpoint.

Import these functions from ``model_enhanced``, whose networks are registered with it.
"""

from __future__ import annotations

from torch import nn

from xray2ct.files import InputError
from xray2ct.models import baselines, x2ct  # they register their networks
from xray2ct.models.registry import KIND, NETWORKS, REFINEMENT_KIND
from xray2ct.weights import resolve

BASELINE_KINDS = (*baselines.KINDS, x2ct.X2CT)
BASE_KINDS = (KIND, *BASELINE_KINDS)


def load_base_model(path, device="cpu") -> tuple[nn.Module, dict]:
    """Build the stage-1 model that a checkpoint describes (also a baseline's), in eval mode, with its weights.

    path: also the name of shipped weights (:mod:`xray2ct.weights`).
    Returns ``(model, checkpoint dict)``. Raises :class:`InputError` naming the file when it is
    missing, damaged, or not a stage-1 checkpoint.
    """
    data = resolve(path)
    kind = data.get("kind")
    if kind not in BASE_KINDS:
        others = " or ".join(map(repr, BASELINE_KINDS))
        raise InputError(f"{path}: is a checkpoint of {kind!r}; expected {KIND!r}, or a baseline's ({others})")
    return _built(path, data, "model_config", "model_state_dict", device), data


def load_refinement(path, device="cpu") -> tuple[nn.Module, dict]:
    """Build the stage-2 network that a checkpoint describes, in eval mode, with its weights; ``path`` as above.

    Returns ``(network, checkpoint dict)``. Raises :class:`InputError` naming the file when it is
    missing, damaged, or not a stage-2 checkpoint.
    """
    data = resolve(path, REFINEMENT_KIND)
    return _built(path, data, "refinement_config", "refinement_state_dict", device), data


def _built(path, data: dict, settings: str, weights: str, device) -> nn.Module:
    model = NETWORKS[data["kind"]](**data[settings])
    try:
        model.load_state_dict(data[weights])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: its weights do not fit its own configuration ({reason})") from None
    return model.to(device).eval()
