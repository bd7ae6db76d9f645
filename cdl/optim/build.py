"""From the `optimizer` section of a config to an `optax.GradientTransformation` whose rate is data."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from cdl.errors import UserError, unknown
from cdl.optim.muon_nsgd import decays, muon_nsgd
from cdl.sharding import ShardingRule

__all__ = ["OPTIMIZERS", "adamw", "build", "optimizer_arguments", "sgd"]


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> optax.GradientTransformation:
    """`optax.adamw` with the paper's defaults; decoupled weight decay on matrices only, as for Muon-NSGD."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)


def sgd(
    learning_rate: optax.ScalarOrSchedule, momentum: float = 0.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """`optax.sgd`, ``m <- momentum m + g``, with decoupled weight decay on matrices only."""
    return optax.chain(
        optax.trace(momentum) if momentum else optax.identity(),
        optax.add_decayed_weights(weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate),
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "muon_nsgd": muon_nsgd,
    "adamw": adamw,
    "sgd": sgd,
}


def optimizer_arguments(name: str) -> dict[str, Any]:
    """The arguments of one optimizer and their defaults, without the learning rate.

    >>> optimizer_arguments("sgd")
    {'momentum': 0.0, 'weight_decay': 0.0, 'clip_norm': 0.0}
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    own = {p.name: p.default for p in parameters.values() if p.name not in ("learning_rate", "sharding")}
    return own | dict(clip_norm=0.0)


def build(section: Mapping[str, Any], sharding: Sequence[ShardingRule] = ()) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config section ``{name, **arguments}``.

    clip_norm: gradients of a larger global norm are scaled down to it; 0, as in the paper, clips nothing.

    sharding: how the model's parameters are split over a mesh.

    The learning rate is injected: it lies in ``state.hyperparams["learning_rate"]`` and is set before each update,
    so runs with different rates share one compiled step.

    Raises:
      UserError: an unknown name or argument, or a value out of range.
    """
    arguments = dict(section)
    name = arguments.pop("name")
    known = optimizer_arguments(name)
    for key, value in arguments.items():
        if key not in known:
            raise unknown(f"argument of optimizer {name!r}", key, known)
        if not 0 <= value < math.inf or (key in ("momentum", "b1", "b2") and value >= 1):
            allowed = "in [0, 1)" if key in ("momentum", "b1", "b2") else "a number, at least 0"
            raise UserError(f"optimizer.{key}={value!r} must be {allowed}")
    clip = arguments.pop("clip_norm", 0.0)
    if name == "muon_nsgd":
        arguments["sharding"] = sharding

    def make(learning_rate: Any) -> optax.GradientTransformation:
        made = OPTIMIZERS[name](learning_rate, **arguments)
        return optax.chain(optax.clip_by_global_norm(clip), made) if clip else made

    return optax.inject_hyperparams(make)(learning_rate=0.0)
