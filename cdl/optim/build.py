"""From the `optimizer` section of a config to an `optax.GradientTransformation` whose rate is data."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
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
    {'momentum': 0.0, 'weight_decay': 0.0, 'clip_norm': 0.0, 'rates': ''}
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    parameters = inspect.signature(OPTIMIZERS[name]).parameters
    own = {p.name: p.default for p in parameters.values() if p.name not in ("learning_rate", "sharding")}
    return own | dict(clip_norm=0.0, rates="")


def build(section: Mapping[str, Any], sharding: Sequence[ShardingRule] = ()) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a config section ``{name, **arguments}``.

    clip_norm: gradients of a larger global norm are scaled down to it; 0, as in the paper, clips nothing.
    rates: parts of a model whose rate is another, such as "projector:100, vision:0.5" for a hundred times the rate, and
      half of it, in parameters whose path begins so; "": one rate for all.

    sharding: how the model's parameters are split over a mesh.

    The learning rate is injected: it lies in ``state.hyperparams["learning_rate"]`` and is set before each update,
    so runs with different rates share one compiled step.

    Raises:
      UserError: an unknown name or argument, or a value out of range.
    """
    arguments = dict(section)
    name = arguments.pop("name")
    known = optimizer_arguments(name)
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of optimizer {name!r}", key, known)
    factors = _factors(arguments.pop("rates", ""))
    for key, value in arguments.items():
        if not 0 <= value < math.inf or (key in ("momentum", "b1", "b2") and value >= 1):
            allowed = "in [0, 1)" if key in ("momentum", "b1", "b2") else "a number, at least 0"
            raise UserError(f"optimizer.{key}={value!r} must be {allowed}")
    clip = arguments.pop("clip_norm", 0.0)
    if name == "muon_nsgd":
        arguments["sharding"] = sharding

    def make(learning_rate: Any) -> optax.GradientTransformation:
        parts = [optax.clip_by_global_norm(clip)] if clip else []
        parts.append(OPTIMIZERS[name](learning_rate, **arguments))
        if factors:
            parts.append(_scale_by_path(factors))
        return optax.chain(*parts) if len(parts) > 1 else parts[0]

    return optax.inject_hyperparams(make)(learning_rate=0.0)


def _factors(rates: str) -> dict[str, float]:
    """Beginning of a path -> factor, of ``"projector:100, vision:0.5"``."""
    factors: dict[str, float] = {}
    for text in filter(None, (part.strip() for part in rates.split(","))):
        path, sign, number = text.rpartition(":")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not sign or not path or path in factors or not 0 <= factor < math.inf:
            raise UserError(f"optimizer.rates={rates!r}: {text!r} must be a path and its factor once, as projector:100")
        factors[path] = factor
    return factors


def _scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates times the factor of their parameter, by the longest beginning of its path."""

    def init(params: Any) -> optax.EmptyState:
        names = [name for name, _ in _named(params)]
        for path in factors:
            if not any(_within(name, path) for name in names):
                parts = ", ".join(sorted({name.split("/")[0] for name in names}))
                raise UserError(f"optimizer.rates: no parameter's path begins with {path!r}; the model has {parts}")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = [x * factors[max(fit, key=len)] if (fit := [p for p in factors if _within(name, p)]) else x
                  for name, x in _named(updates)]  # fmt: skip
        return jax.tree.unflatten(jax.tree.structure(updates), scaled), state

    return optax.GradientTransformation(init, update)


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree.leaves_with_path(tree)]


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")
