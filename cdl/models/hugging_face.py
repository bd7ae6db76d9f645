"""What Hugging Face's `transformers` calls the tensors of our models, how it lays them out, and its config.json.

Each table is written once and serves both directions; `cdl.models.pretrained` reads and writes the files.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cdl.errors import UserError, unknown
from cdl.models import siglip
from cdl.models.build import model_arguments
from cdl.models.llama import EPSILON
from cdl.models.resnet import DEPTHS, expanded

__all__ = [
    "BARE",
    "IGNORED",
    "PREFIXES",
    "Laid",
    "Tensor",
    "config_of",
    "section_of",
    "tensors_of",
    "tied_to",
    "with_defaults",
]

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
    "llama": dict(
        vocab_size="vocab_size",
        context="max_position_embeddings",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        n_kv_head="num_key_value_heads",
        d_model="hidden_size",
        d_ff="intermediate_size",
        theta="rope_theta",
        tied="tie_word_embeddings",
    ),
    "vit": dict(
        image_size="image_size",
        patch="patch_size",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        d_model="hidden_size",
        pool="pool",
    ),
    "siglip": dict(
        image_size="image_size",
        patch="patch_size",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        d_model="hidden_size",
    ),
    "resnet": dict(width="embedding_size", stem="stem"),
}
_TYPES = {"siglip": "siglip_vision_model"}  # their names of models where they differ from ours
PREFIXES = {"gpt2": "transformer.", "llama": "model.", "vit": "vit.", "siglip": "vision_model.", "resnet": "resnet."}
BARE = ("head/", "output/")  # beside the base model, and so without the prefix
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "vit": "ViTForImageClassification",
    "siglip": "SiglipVisionModel",
    "resnet": "ResNetForImageClassification",
}
_OURS = dict(pool="cls", stem="imagenet")
# Fields that say nothing of what we compute.
_FREE = ("model_type", "architectures", "id2label", "label2id", "vision_use_head")

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
    "llama": dict(
        vocab_size=32000,
        max_position_embeddings=2048,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        hidden_size=4096,
        intermediate_size=11008,
        head_dim=None,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    ),
    "siglip": dict(
        image_size=224,
        patch_size=16,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_size=768,
        intermediate_size=3072,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        num_channels=3,
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
    config = dict(model_type=_TYPES.get(name, name), architectures=[_ARCHITECTURES[name]])
    config |= {their_key: section[key] for key, their_key in _ARGUMENTS[name].items()}
    for key, value in _OURS.items():  # said only where it is not what `transformers` has anyway
        if config.get(key) == value:
            del config[key]
    if name == "gpt2":
        config |= {key: value for key, value in _DEFAULTS[name].items() if key not in config}
        return config | dict(n_inner=4 * section["d_model"])
    if name == "llama":
        config |= dict(head_dim=section["d_model"] // section["n_head"], hidden_act="silu", rms_norm_eps=EPSILON)
        return config | dict(rope_scaling=None, attention_bias=False, mlp_bias=False)
    if name == "siglip":
        config |= dict(intermediate_size=4 * section["d_model"], hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
        return config | dict(num_channels=3, vision_use_head=False)
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
    if written.get("model_type") == "siglip":  # both towers
        written = {"model_type": _TYPES["siglip"]} | dict(written.get("vision_config") or {})
    names = {_TYPES.get(name, name): name for name in _ARGUMENTS}
    if (their_name := written.get("model_type")) not in names:
        raise unknown(f"model for the model_type of {path},", their_name, [*names, "siglip"])
    name = names[their_name]
    theirs: dict[str, Any] = _DEFAULTS[name] | _OURS | dict(written)
    if name == "llama":
        theirs |= _of_llama(theirs)
    section = with_defaults(dict(name=name))
    for key, their_key in _ARGUMENTS[name].items():
        value = theirs[their_key]
        if isinstance(value, list):  # a height and a width
            if len(set(value)) > 1:
                raise UserError(f"{path}: {their_key}={value}, but model {name!r} is square; take another checkpoint")
            value = value[0]
        section[key] = value
    if name == "gpt2":
        theirs["n_inner"] = theirs["n_inner"] or 4 * theirs["n_embd"]
    if "classes" in section:
        section["classes"] = len(theirs["id2label"])
    if name == "vit" and theirs["layer_norm_eps"] < 1e-6:
        theirs["layer_norm_eps"] = 1e-6  # less than rounding, see `ViT`
    if name == "resnet":
        section["depth"] = 50 if theirs["layer_type"] == "bottleneck" else 18
    for key, value in config_of(section).items():
        if key not in (*_ARGUMENTS[name].values(), *_FREE) and theirs[key] != value:
            raise UserError(f"{path}: {key}={theirs[key]!r}, but model {name!r} has {value!r}; take another checkpoint")
    return section


def _of_llama(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Llama that may be left to others, or be written in the ways of several versions."""
    heads = theirs["num_attention_heads"]
    rope = {"rope_theta": theirs["rope_theta"]}
    rope |= dict(theirs["rope_scaling"] or {}) | dict(theirs.get("rope_parameters") or {})
    theta = float(rope.pop("rope_theta"))
    return dict(
        num_key_value_heads=theirs["num_key_value_heads"] or heads,
        head_dim=theirs["head_dim"] or theirs["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=None if rope in ({}, {"rope_type": "default"}, {"type": "default"}) else rope,
    )


def with_defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a model, or of a part of one, with all its arguments."""
    name = section["name"]
    return (siglip.arguments() if name == "siglip" else model_arguments(name)) | dict(section)


def tied_to(section: Mapping[str, Any]) -> str | None:
    """Their name of the table that the output is read from, where it has none of its own."""
    if section["name"] == "llama":
        return "embed_tokens.weight" if section["tied"] else None
    return "wte.weight" if section["name"] == "gpt2" else None


IGNORED = {
    "gpt2": r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask
    "llama": r".*\.rotary_emb\.inv_freq",
    "siglip": r"(text_model|head)\..*|logit_(scale|bias)|embeddings\.position_ids",  # the other tower; the pooling
    "vit": r"pooler\.dense\.(weight|bias)",  # of ViTModel alone; the classifier reads the token itself
    "resnet": r".*\.num_batches_tracked",
}


def tensors_of(section: Mapping[str, Any]) -> list[Tensor]:
    """The table of names, for both directions."""
    tables = {"gpt2": _gpt2, "llama": _llama, "vit": _vit, "siglip": _siglip, "resnet": _resnet}
    return tables[section["name"]](section)


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


def _llama(section: Mapping[str, Any]) -> list[Tensor]:
    table = [
        Tensor("embed_tokens.weight", "token/embedding", _same),
        Tensor("norm.weight", "norm/scale", _same),
    ]
    if not section["tied"]:
        table.append(Tensor("lm_head.weight", "output/embedding", _same))
    for i in range(section["n_layer"]):
        layer, ours = f"layers.{i}", "blocks/layers"
        table += [
            Tensor(f"{layer}.input_layernorm.weight", f"{ours}/norm_1/scale", _same, i),
            Tensor(f"{layer}.post_attention_layernorm.weight", f"{ours}/norm_2/scale", _same, i),
        ]
        for theirs, name in (*((f"self_attn.{x}", f"attention/{x}") for x in "qkv"), ("self_attn.o", "attention/out")):
            table += _dense(f"{layer}.{theirs}_proj", f"{ours}/{name}", i, bias=False)
        for name in ("gate", "up", "down"):
            table += _dense(f"{layer}.mlp.{name}_proj", f"{ours}/mlp/{name}", i, bias=False)
    return table


def _siglip(section: Mapping[str, Any]) -> list[Tensor]:
    table = [
        Tensor("embeddings.position_embedding.weight", "position/embedding", _same),
        *_patches("embeddings.patch_embedding", section["patch"]),
        *_norm("post_layernorm", "norm"),
    ]
    for i in range(section["n_layer"]):
        layer, ours = f"encoder.layers.{i}", "blocks/layers"
        table += _norm(f"{layer}.layer_norm1", f"{ours}/norm_1", i) + _norm(f"{layer}.layer_norm2", f"{ours}/norm_2", i)
        table += _qkv([f"{layer}.self_attn.{x}_proj" for x in "qkv"], f"{ours}/attention/qkv", section["n_head"], i)
        table += _dense(f"{layer}.self_attn.out_proj", f"{ours}/attention/out", i)
        table += _dense(f"{layer}.mlp.fc1", f"{ours}/mlp/up", i)
        table += _dense(f"{layer}.mlp.fc2", f"{ours}/mlp/down", i)
    return table


def _vit(section: Mapping[str, Any]) -> list[Tensor]:
    table = [
        Tensor("embeddings.position_embeddings", "position/embedding", lambda x: (x[None], (1, *x.shape))),
        *_patches("embeddings.patch_embeddings.projection", section["patch"]),
        *_norm("layernorm", "norm"),
        *_dense("classifier", "head"),
    ]
    if section["pool"] == "cls":
        table.append(Tensor("embeddings.cls_token", "cls", lambda x: (x[None, None], (1, 1, *x.shape))))
    for i in range(section["n_layer"]):
        layer, ours = f"encoder.layer.{i}", "blocks/layers"
        table += _norm(f"{layer}.layernorm_before", f"{ours}/norm_1", i)
        table += _norm(f"{layer}.layernorm_after", f"{ours}/norm_2", i)
        names = [f"{layer}.attention.attention.{name}" for name in ("query", "key", "value")]
        table += _qkv(names, f"{ours}/attention/qkv", section["n_head"], i)
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


def _dense(theirs: str, ours: str, layer: int | None = None, bias: bool = True) -> list[Tensor]:
    kernel = Tensor(f"{theirs}.weight", f"{ours}/kernel", lambda x: (x.T, x.T.shape), layer)
    return [kernel, Tensor(f"{theirs}.bias", f"{ours}/bias", _same, layer)] if bias else [kernel]


def _qkv(theirs: list[str], ours: str, heads: int, layer: int) -> list[Tensor]:
    """Three dense layers of theirs in one of ours."""

    def part(which: int) -> Callable[[np.ndarray], Laid]:  # [D, (head, q k v, K)] -> [(head, K), D], for one of q k v
        def lay(x: np.ndarray) -> Laid:
            view = x.reshape(*x.shape[:-1], heads, 3, -1)[..., which, :]
            return np.moveaxis(view, (-2, -1), (0, 1)), (x.shape[-1] // 3, *x.shape[:-1])

        return lay

    return [
        Tensor(f"{name}.{end}", f"{ours}/{leaf}", part(j), layer)
        for j, name in enumerate(theirs)
        for end, leaf in (("weight", "kernel"), ("bias", "bias"))
    ]


def _patches(theirs: str, size: int) -> list[Tensor]:
    """A convolution of theirs, whose stride is its size, in a dense layer of ours."""
    return [
        Tensor(f"{theirs}.bias", "patch/bias", _same),
        Tensor(
            f"{theirs}.weight",
            "patch/kernel",
            lambda x: _convolution(x.reshape(size, size, -1, x.shape[-1])),
        ),
    ]


def _same(x: np.ndarray) -> Laid:
    return x, x.shape


def _convolution(x: np.ndarray) -> Laid:
    view = x.transpose(3, 2, 0, 1)  # [H, W, in, out] -> [out, in, H, W]
    return view, view.shape
