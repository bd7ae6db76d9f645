"""From the `model` section of a config to two pure functions: initial parameters, and the loss of a batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cdl.compute import Compute
from cdl.errors import UserError, unknown
from cdl.models import gpt2, llama, resnet, vit, vlm
from cdl.models.lora import LoRA, adapt
from cdl.sharding import ShardingRule

__all__ = ["MODELS", "Model", "Sums", "build", "model_arguments"]


class Sums(NamedTuple):
    """Sums over what a batch predicts (tokens, images), float32 scalars: of `loss` in nats, of what is `correct` (the
    largest logit is the target's), and their `count`. A mean loss is ``loss / count``."""

    loss: jax.Array
    correct: jax.Array
    count: jax.Array


class _Init(Protocol):
    def __call__(self, seed: jax.Array | int) -> tuple[Any, Any]: ...


class _Loss(Protocol):
    def __call__(self, params: Any, stats: Any, batch: Any, train: bool = True) -> tuple[Sums, Any]: ...


class Model(NamedTuple):
    """A model as pure functions, fit for jit, vmap and grad.

    init: seed (whole number, may be traced) -> (parameters, statistics): trees of float32 arrays. Parameters are what
      is trained. Statistics are what batch normalisation tracks; {} for models without it.
    loss: (parameters, statistics, batch, train) -> (`Sums`, statistics after it). A batch of text is tokens_BxS1 of S+1
      tokens each, or a dict of these as `tokens` and `weight_BxS` as `weight`, by which predictions count; a batch of
      images is a dict of `image` [B, H, W, C], float32, and `label` [B]. A batch of questions about images is the
      dict of text with `image` [B, M, H, W, C] and `slot` [B, S], which says what stands where: `cdl.models.vlm.VLM`.
    n_params: N, the number of parameters, frozen ones among them.
    rules: how parameters are split over devices, by path.
    data: name of the kind of data that it takes, "text", "images" or "vqa".
    frozen: shapes of the parameters that are not trained, None where all are. `loss` then takes them, too: see `over`.
    """

    init: _Init
    loss: _Loss
    n_params: int
    rules: Sequence[ShardingRule]
    data: str
    frozen: Any = None

    def over(self, frozen: Any) -> "Model":
        """The model on these frozen parameters, a tree of arrays like `frozen`; itself where nothing is frozen."""
        return self if self.frozen is None else self._replace(loss=partial(cast(Any, self.loss), frozen=frozen))


def _tokens_loss(model: Any, batch: Any, train: bool) -> Sums:
    tokens_BxS1 = batch["tokens"] if isinstance(batch, dict) else batch
    target_BxS = tokens_BxS1[:, 1:]
    logits_BxSxV = model(tokens_BxS1[:, :-1], train)
    weight_BxS = batch["weight"] if isinstance(batch, dict) else jnp.ones(target_BxS.shape)
    return _sums(logits_BxSxV, target_BxS, weight_BxS)


def _image_loss(model: Any, batch: Any, train: bool) -> Sums:
    logits_BxV = model(batch["image"], train)
    return _sums(logits_BxV, batch["label"], jnp.ones(batch["label"].shape))


def _vqa_loss(model: Any, batch: Any, train: bool) -> Sums:
    tokens_BxS1 = batch["tokens"]
    logits_BxSxV = model(batch["image"], tokens_BxS1[:, :-1], batch["slot"], train)
    return _sums(logits_BxSxV, tokens_BxS1[:, 1:], batch["weight"])


def _sums(logits: jax.Array, target: jax.Array, weight: jax.Array) -> Sums:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    correct = jnp.argmax(logits, axis=-1) == target
    return Sums((weight * loss).sum(), (weight * correct).sum(), weight.sum())


class _Kind(NamedTuple):
    """make: the module's class, called with the section's arguments, `compute` and `rngs`. arguments: the defaults.
    data: the kind of data that `loss` is of."""

    make: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    loss: Callable[[Any, Any, bool], Sums]
    data: str
    rules: Sequence[ShardingRule]


MODELS: dict[str, _Kind] = {
    "gpt2": _Kind(gpt2.GPT2, gpt2.arguments, _tokens_loss, "text", gpt2.SHARDING),
    "llama": _Kind(llama.Llama, llama.arguments, _tokens_loss, "text", llama.SHARDING),
    "vit": _Kind(vit.ViT, vit.arguments, _image_loss, "images", vit.SHARDING),
    "resnet": _Kind(resnet.ResNet, resnet.arguments, _image_loss, "images", resnet.SHARDING),
    "vlm": _Kind(vlm.VLM, vlm.arguments, _vqa_loss, "vqa", vlm.SHARDING),
}


def model_arguments(name: str) -> dict[str, Any]:
    """The arguments of one model with the values of its default size."""
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name].arguments()


def build(section: Mapping[str, Any], compute: Compute = Compute(), lora: LoRA = LoRA()) -> Model:  # noqa: B008
    """The model of a config section ``{name, **arguments}``; with a rank of `lora`, adapters are all that is trained.

    Raises:
      UserError: an unknown name or argument, sizes that do not fit together, or adapters that fit no layer.
    """
    arguments = dict(section)
    name = arguments.pop("name")
    known = model_arguments(name)
    for key in arguments:
        if key not in known:
            raise unknown(f"argument of model {name!r}", key, known)
    kind = MODELS[name]

    def make(seed: jax.Array | int) -> Any:
        rngs = nnx.Rngs(params=jax.random.key(seed))
        model = kind.make(**known | arguments, compute=compute, rngs=rngs)
        if lora.rank:
            adapt(model, lora, rngs)
        return model

    trained = nnx.LoRAParam if lora.rank else nnx.Param
    graphdef, shapes, frozen, batch_stats = nnx.split(
        nnx.eval_shape(lambda: make(0)), trained, nnx.Param, nnx.BatchStat
    )
    if lora.rank and jax.tree.leaves(batch_stats):
        raise UserError(
            f"lora.rank={lora.rank}: model.name={name!r} has batch statistics, which no adapter keeps; use 0"
        )

    def init(seed: jax.Array | int) -> tuple[Any, Any]:
        _, params, _, stats = nnx.split(make(seed), trained, nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def loss(params: Any, stats: Any, batch: Any, train: bool = True, frozen: Any = None) -> tuple[Sums, Any]:
        # Arrays of NumPy, as files give, would be written into where they are.
        model = nnx.merge(graphdef, params, frozen or {}, jax.tree.map(jnp.asarray, stats))
        sums = kind.loss(model, batch, train)
        return sums, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    n_params = sum(leaf.size for leaf in jax.tree.leaves((shapes, frozen)))
    still = nnx.to_pure_dict(frozen) if lora.rank else None
    return Model(init, loss, n_params, kind.rules, kind.data, still)
