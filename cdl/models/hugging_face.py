"""What Hugging Face's `transformers` calls the tensors of our models, how it lays them out, and its config.json.

Each table is written once and serves both directions; `cdl.models.pretrained` reads and writes the files.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cdl.errors import UserError, unknown
from cdl.models.build import model_arguments
from cdl.models.resnet import DEPTHS, expanded

__all__ = ["IGNORED", "PREFIXES", "Laid", "Tensor", "config_of", "section_of", "tensors_of"]

# How one of our arrays lies in one of theirs: a view of ours, which has the order of theirs once some of its axes are
# joined, and the shape of theirs. The view is written to load a tensor, and read to save one.
Laid = tuple[np.ndarray, tuple[int, ...]]


class Tensor(NamedTuple):
    """theirs: name in a file, without the base model's prefix. ours: path. layer: which of a stack, None if none."""

    theirs: str
    ours: str
    lay: Callable[[np.ndarray], Laid]
    layer: int | None = None

    def of(self, leaves: Mapping[str, np.ndarray]) -> Laid:
        leaf = leaves[self.ours]
        return self.lay(leaf if self.layer is None else leaf[self.layer])


# Arguments of ours -> fields of config.json. The two that `transformers` does not know, "pool" and "stem", go by ours.
_ARGUMENTS: dict[str, dict[str, str]] = {
    "gpt2": dict(vocab_size="vocab_size", context="n_positions", n_layer="n_layer", n_head="n_head", d_model="n_embd"),
    "vit": dict(
        image_size="image_size",
        patch="patch_size",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        d_model="hidden_size",
        pool="pool",
    ),
    "resnet": dict(width="embedding_size", stem="stem"),
}
PREFIXES = {"gpt2": "transformer.", "vit": "vit.", "resnet": "resnet."}
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "vit": "ViTForImageClassification",
    "resnet": "ResNetForImageClassification",
}
_OURS = dict(pool="cls", stem="imagenet")
_LABELS = ("architectures", "id2label", "label2id")

# What fields mean that a config.json leaves out: the defaults of `transformers`.
_TWO_LABELS = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        vocab_size=50257,
        n_positions=1024,
        n_layer=12,
        n_head=12,
        n_embd=768,
        n_inner=None,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    ),
    "vit": _TWO_LABELS
    | dict(
        image_size=224,
        patch_size=16,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_size=768,
        intermediate_size=3072,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        num_channels=3,
        qkv_bias=True,
    ),
    "resnet": _TWO_LABELS
    | dict(
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048],
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        hidden_act="relu",
        downsample_in_first_stage=False,
        downsample_in_bottleneck=False,
        num_channels=3,
    ),
}


def config_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a section: its arguments, and all else that decides what a model computes."""
    name = section["name"]
    config = dict(model_type=name, architectures=[_ARCHITECTURES[name]])
    config |= {their_key: section[key] for key, their_key in _ARGUMENTS[name].items()}
    for key, value in _OURS.items():  # said only where it is not what `transformers` has anyway
        if config.get(key) == value:
            del config[key]
    if name == "gpt2":
        config |= {key: value for key, value in _DEFAULTS[name].items() if key not in config}
        return config | dict(n_inner=4 * section["d_model"])
    labels = [f"LABEL_{i}" for i in range(section["classes"])]
    config |= dict(num_channels=3, id2label={str(i): x for i, x in enumerate(labels)})
    config |= dict(label2id={x: i for i, x in enumerate(labels)})
    if name == "vit":
        config |= dict(intermediate_size=4 * section["d_model"], hidden_act="gelu", layer_norm_eps=1e-6)
        return config | dict(qkv_bias=True)
    stages, bottleneck = DEPTHS[section["depth"]]
    config |= dict(depths=list(stages), layer_type="bottleneck" if bottleneck else "basic")
    config |= dict(hidden_sizes=[expanded(section["width"] * 2**i, bottleneck) for i in range(len(stages))])
    return config | dict(hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)


def section_of(written: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The `model` section, ``{name, **arguments}``, that the config.json `written` describes; `path` is for errors.

    Raises:
      UserError: a model that is none of ours: another family, activation, epsilon and so on.
    """
    name = written.get("model_type")
    if name not in _ARGUMENTS:
        raise unknown(f"model for the model_type of {path},", name, _ARGUMENTS)
    theirs: dict[str, Any] = _DEFAULTS[name] | _OURS | dict(written)
    section = {"name": name} | model_arguments(name)
    for key, their_key in _ARGUMENTS[name].items():
        value = theirs[their_key]
        if isinstance(value, list):  # a height and a width
            if len(set(value)) > 1:
                raise UserError(f"{path}: {their_key}={value}, but model {name!r} is square; take another checkpoint")
            value = value[0]
        section[key] = value
    if name == "gpt2":
        theirs["n_inner"] = theirs["n_inner"] or 4 * theirs["n_embd"]
    else:
        section["classes"] = len(theirs["id2label"])
    if name == "vit" and theirs["layer_norm_eps"] < 1e-6:
        theirs["layer_norm_eps"] = 1e-6  # less than rounding, see `ViT`
    if name == "resnet":
        section["depth"] = 50 if theirs["layer_type"] == "bottleneck" else 18
    for key, value in config_of(section).items():
        if key not in (*_ARGUMENTS[name].values(), *_LABELS) and theirs[key] != value:
            raise UserError(f"{path}: {key}={theirs[key]!r}, but model {name!r} has {value!r}; take another checkpoint")
    return section


IGNORED = {
    "gpt2": r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask
    "vit": r"pooler\.dense\.(weight|bias)",  # of ViTModel alone; the classifier reads the token itself
    "resnet": r".*\.num_batches_tracked",
}


def tensors_of(section: Mapping[str, Any]) -> list[Tensor]:
    """The table of names, for both directions."""
    return {"gpt2": _gpt2, "vit": _vit, "resnet": _resnet}[section["name"]](section)


def _gpt2(section: Mapping[str, Any]) -> list[Tensor]:
    heads = section["n_head"]

    def qkv(x: np.ndarray) -> Laid:  # [..., (head, q k v, K)] -> [..., (q k v, head, K)]
        return x.reshape(*x.shape[:-1], heads, 3, -1).swapaxes(-3, -2), x.shape

    table = [
        Tensor("wte.weight", "token/embedding", _same),
        Tensor("wpe.weight", "position/embedding", _same),
        *_norm("ln_f", "norm"),
    ]
    for i in range(section["n_layer"]):
        h, ours = f"h.{i}", "blocks/layers"
        table += _norm(f"{h}.ln_1", f"{ours}/norm_1", i) + _norm(f"{h}.ln_2", f"{ours}/norm_2", i)
        table += [
            Tensor(f"{h}.{theirs}.{end}", f"{ours}/{name}/{leaf}", qkv if name == "attention/qkv" else _same, i)
            for theirs, name in (
                ("attn.c_attn", "attention/qkv"),
                ("attn.c_proj", "attention/out"),
                ("mlp.c_fc", "mlp/up"),
                ("mlp.c_proj", "mlp/down"),
            )
            for end, leaf in (("weight", "kernel"), ("bias", "bias"))
        ]
    return table


def _vit(section: Mapping[str, Any]) -> list[Tensor]:
    heads, patch = section["n_head"], section["patch"]

    def part(which: int) -> Callable[[np.ndarray], Laid]:  # [D, (head, q k v, K)] -> [(head, K), D], for one of q k v
        def lay(x: np.ndarray) -> Laid:
            view = x.reshape(*x.shape[:-1], heads, 3, -1)[..., which, :]
            return np.moveaxis(view, (-2, -1), (0, 1)), (x.shape[-1] // 3, *x.shape[:-1])

        return lay

    table = [
        Tensor("embeddings.position_embeddings", "position/embedding", lambda x: (x[None], (1, *x.shape))),
        Tensor("embeddings.patch_embeddings.projection.bias", "patch/bias", _same),
        Tensor(
            "embeddings.patch_embeddings.projection.weight",
            "patch/kernel",
            lambda x: _convolution(x.reshape(patch, patch, -1, x.shape[-1])),
        ),
        *_norm("layernorm", "norm"),
        *_dense("classifier", "head"),
    ]
    if section["pool"] == "cls":
        table.append(Tensor("embeddings.cls_token", "cls", lambda x: (x[None, None], (1, 1, *x.shape))))
    for i in range(section["n_layer"]):
        layer, ours = f"encoder.layer.{i}", "blocks/layers"
        table += _norm(f"{layer}.layernorm_before", f"{ours}/norm_1", i)
        table += _norm(f"{layer}.layernorm_after", f"{ours}/norm_2", i)
        table += [
            Tensor(f"{layer}.attention.attention.{name}.{end}", f"{ours}/attention/qkv/{leaf}", part(j), i)
            for j, name in enumerate(("query", "key", "value"))
            for end, leaf in (("weight", "kernel"), ("bias", "bias"))
        ]
        table += _dense(f"{layer}.attention.output.dense", f"{ours}/attention/out", i)
        table += _dense(f"{layer}.intermediate.dense", f"{ours}/mlp/up", i)
        table += _dense(f"{layer}.output.dense", f"{ours}/mlp/down", i)
    return table


def _resnet(section: Mapping[str, Any]) -> list[Tensor]:
    stages, bottleneck = DEPTHS[section["depth"]]
    names = [("embedder.embedder", "stem")]
    ours = 0
    for i, n_block in enumerate(stages):
        for j in range(n_block):
            block = f"encoder.stages.{i}.layers.{j}"
            if j == 0 and (i > 0 or bottleneck):
                names.append((f"{block}.shortcut", f"blocks/{ours}/shortcut"))
            names += [(f"{block}.layer.{k}", f"blocks/{ours}/branch/{k}") for k in range(3 if bottleneck else 2)]
            ours += 1
    table = _dense("classifier.1", "head")
    for theirs, name in names:
        table.append(Tensor(f"{theirs}.convolution.weight", f"{name}/conv/kernel", _convolution))
        table += _norm(f"{theirs}.normalization", f"{name}/norm")
        table.append(Tensor(f"{theirs}.normalization.running_mean", f"{name}/norm/mean", _same))
        table.append(Tensor(f"{theirs}.normalization.running_var", f"{name}/norm/var", _same))
    return table


def _norm(theirs: str, ours: str, layer: int | None = None) -> list[Tensor]:
    return [
        Tensor(f"{theirs}.weight", f"{ours}/scale", _same, layer),
        Tensor(f"{theirs}.bias", f"{ours}/bias", _same, layer),
    ]


def _dense(theirs: str, ours: str, layer: int | None = None) -> list[Tensor]:
    return [
        Tensor(f"{theirs}.weight", f"{ours}/kernel", lambda x: (x.T, x.T.shape), layer),
        Tensor(f"{theirs}.bias", f"{ours}/bias", _same, layer),
    ]


def _same(x: np.ndarray) -> Laid:
    return x, x.shape


def _convolution(x: np.ndarray) -> Laid:
    view = x.transpose(3, 2, 0, 1)  # [H, W, in, out] -> [out, in, H, W]
    return view, view.shape
