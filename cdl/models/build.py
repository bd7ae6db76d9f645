"""From the `model` section of a config to two pure functions: initial parameters, and the loss of a batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import optax
from flax import nnx

from cdl.errors import unknown
from cdl.models import gpt2

__all__ = ["MODELS", "Model", "build", "model_arguments"]

# name: the module's class, called with the section's arguments and `rngs`, and its default arguments.
MODELS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {"gpt2": (gpt2.GPT2, gpt2.arguments)}


class _Init(Protocol):
    def __call__(self, seed: jax.Array | int) -> Any: ...


class _Loss(Protocol):
    def __call__(self, params: Any, tokens_BxS1: jax.Array) -> jax.Array: ...


class Model(NamedTuple):
    """A model as pure functions, fit for jit, vmap and grad.

    init: seed (whole number, may be traced) -> parameters, a tree of float32 arrays.
    loss: (parameters, tokens_BxS1 of S+1 tokens each) -> mean next-token cross-entropy in nats, float32 scalar.
    n_params: N, the number of parameters.
    """

    init: _Init
    loss: _Loss
    n_params: int


def model_arguments(name: str) -> dict[str, Any]:
    """The arguments of one model with the values of its default size."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name][1]()


def build(section: Mapping[str, Any]) -> Model:
    """The model of a config section ``{name, **arguments}``.

    Raises:
      UserError: an unknown name or argument, or sizes that do not fit together.
    """
    arguments = dict(section)
    name = arguments.pop("name")
    known = model_arguments(name)
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of model {name!r}", key, known)
    make = partial(MODELS[name][0], **arguments)
    abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(abstract)

    def init(seed: jax.Array | int) -> Any:
        return nnx.to_pure_dict(nnx.split(make(rngs=nnx.Rngs(params=jax.random.key(seed))))[1])

    def loss(params: Any, tokens_BxS1: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        logits_BxSxV = model(tokens_BxS1[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxSxV, tokens_BxS1[:, 1:]).mean()

    n_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return Model(init, loss, n_params)
