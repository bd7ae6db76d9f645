"""Weights under the names of Hugging Face's `transformers`, in safetensors files: read and written, without torch.

`gpt2` is `GPT2LMHeadModel`, `vit` `ViTForImageClassification`, `resnet` `ResNetForImageClassification`. What these lack
(mean pooling, the CIFAR stem) goes under the same names, and `transformers` refuses it by its shapes.

    section = read_section("gpt2-folder")
    params, stats = load(section, "gpt2-folder")  # in the place of build(section).init(seed)
    save(section, params, stats, "other-folder")
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cdl.errors import UserError
from cdl.models import hugging_face
from cdl.models.build import build, model_arguments
from cdl.models.hugging_face import IGNORED, PREFIXES

__all__ = ["load", "read_section", "save", "to_hugging_face"]

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOATS = ("F64", "F32", "F16", "BF16")


class _Place(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        with _opened(self.file) as tensors:
            piece = tensors.get_slice(self.name)
            if tuple(piece.get_shape()) != shape:
                raise UserError(
                    f"{self.file}: {self.name} is {piece.get_shape()} and the model has {list(shape)} there; "
                    f"set the sizes of the model to the file's"
                )
            if piece.get_dtype() not in FLOATS:
                raise UserError(
                    f"{self.file}: {self.name} is {piece.get_dtype()}; weights are one of {', '.join(FLOATS)}"
                )
            return tensors.get_tensor(self.name)


def load(section: Mapping[str, Any], path: str | os.PathLike[str], seed: int = 0) -> tuple[Any, Any]:
    """Parameters and statistics of the model of a config section, as `Model.init` gives them, from a file.

    Args:
      section: ``{name, **arguments}``. If a config.json lies beside the file, the two have to agree; that is the only
        check of what no shape tells (the number of heads).
      path: a folder with ``model.safetensors`` or ``model.safetensors.index.json`` and its parts, or one of these.
      seed: the head of a ViT or ResNet is drawn from it, as in `Model.init`, if the file has none.

    Returns:
      Trees of NumPy arrays, float32 whatever the file has. In memory there are these, and one tensor of the file.

    Raises:
      UserError: a tensor that is missing, left over, or of another shape or type; an output layer of GPT-2 that is not
        tied to its embedding; a config.json that says otherwise; a file that cannot be read.
    """
    path, section = Path(path), model_arguments(section["name"]) | dict(section)
    model = build(section)
    params, stats = jax.eval_shape(model.init, 0)
    leaves = {name: np.empty(leaf.shape, np.float32) for name, leaf in (_named(params) | _named(stats)).items()}
    table = {tensor.theirs: tensor for tensor in hugging_face.tensors_of(section)}
    found = _locate(path, section["name"])
    tied = None
    if section["name"] == "gpt2":
        tied = found.pop("lm_head.weight", None)
        if tied is not None and "wte.weight" not in found:  # of two tied tensors, files keep either
            found["wte.weight"], tied = tied, None
    head = {name for name, tensor in table.items() if tensor.ours.startswith("head/")}
    headless = bool(head) and not head & found.keys()
    config = (path if path.is_dir() else path.parent) / CONFIG
    if config.is_file():
        for key, value in read_section(config).items():
            if value != section[key] and key != "dtype" and not (headless and key == "classes"):
                raise UserError(
                    f"{config}: model.{key} is {value!r} there and {section[key]!r} here; set it to {value!r}"
                )
    _exactly(path, found, table, head if headless else ())
    for name, place in found.items():
        view, shape = table[name].of(leaves)
        view[...] = place.read(shape).reshape(view.shape)
    if tied is not None:
        embedding = leaves["token/embedding"]
        if not np.array_equal(tied.read(embedding.shape).astype(np.float32, copy=False), embedding):
            raise UserError(f"{tied.file}: {tied.name} is not the token embedding; gpt2 has its output tied to that")
    if headless:
        drawn = jax.jit(lambda seed: model.init(seed)[0]["head"])(seed)
        leaves |= {f"head/{name}": np.asarray(leaf) for name, leaf in drawn.items()}
    return _filled(params, leaves), _filled(stats, leaves)


def to_hugging_face(section: Mapping[str, Any], params: Any, stats: Any) -> dict[str, np.ndarray]:
    """Name -> tensor, contiguous, as `load` reads them. Arrays have to lie whole in this process."""
    section = model_arguments(section["name"]) | dict(section)
    leaves = {name: np.asarray(leaf) for name, leaf in (_named(params) | _named(stats)).items()}
    prefix = PREFIXES[section["name"]]
    tensors = {}
    for tensor in hugging_face.tensors_of(section):
        view, shape = tensor.of(leaves)
        name = tensor.theirs if tensor.ours.startswith("head/") else f"{prefix}{tensor.theirs}"
        tensors[name] = np.ascontiguousarray(view).reshape(shape)
        if name.endswith(".running_var"):  # torch counts batches beside it, to no effect, and misses it
            tensors[f"{name.removesuffix('running_var')}num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


def save(section: Mapping[str, Any], params: Any, stats: Any, folder: str | os.PathLike[str]) -> None:
    """Writes ``model.safetensors`` and ``config.json``, for `from_pretrained` and for `load`.

    Raises:
      UserError: the folder has one of these already.
    """
    folder = Path(folder)
    for name in (CONFIG, INDEX, WEIGHTS):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists and is not overwritten; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = hugging_face.config_of(model_arguments(section["name"]) | dict(section))
    (folder / f"{CONFIG}.partial").write_text(json.dumps(config, indent=2) + "\n")
    save_file(to_hugging_face(section, params, stats), folder / f"{WEIGHTS}.partial", metadata={"format": "pt"})
    for name in (CONFIG, WEIGHTS):
        (folder / f"{name}.partial").rename(folder / name)


def read_section(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `model` section, ``{name, **arguments}``, that a config.json (or the folder it lies in) describes.

    Raises:
      UserError: no such file, or a model that is none of ours: another family, activation, epsilon and so on.
    """
    path = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    return hugging_face.section_of(_json(path), str(path))


def _named(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _filled(tree: Any, leaves: Mapping[str, np.ndarray]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in _named(tree)])


def _locate(path: Path, name: str) -> dict[str, _Place]:
    """Where each tensor is, by its name without prefix; those that are no weights of ours left out."""
    if path.is_dir():
        known = [path / file for file in (INDEX, WEIGHTS) if (path / file).is_file()]
        if not known:
            raise UserError(f"{path} has neither {WEIGHTS} nor {INDEX}; give a folder or file of safetensors")
        path = known[0]
    files = [path]
    if path.suffix == ".json":
        index = _json(path).get("weight_map", {})
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise UserError(f"{path} maps no tensors to files; give a folder as save_pretrained writes it")
        files = [path.parent / file for file in sorted(set(index.values()))]
    found = {}
    for file in files:
        with _opened(file) as tensors:
            for written in tensors.keys():  # noqa: SIM118  # no mapping
                short = written.removeprefix(PREFIXES[name])
                if not re.fullmatch(IGNORED[name], short):
                    found[short] = _Place(file, written)
    return found


def _exactly(path: Path, found: Iterable[str], wanted: Iterable[str], optional: Iterable[str]) -> None:
    missing = sorted(set(wanted) - set(found) - set(optional))
    left_over = sorted(set(found) - set(wanted))
    for names, fault in ((missing, "is not there"), (left_over, "has no place in the model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{path}: tensor {names[0]}{more} {fault}; give a file of this kind and size of model")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The safetensors file, opened; what is wrong with it as a UserError."""
    try:
        with safe_open(file, framework="np") as tensors:
            yield tensors
    except (SafetensorError, OSError) as e:
        raise UserError(f"cannot read {file}: {e}; give a safetensors file, whole") from e


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}; give a folder as save_pretrained writes it") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; give a folder as save_pretrained writes it")
    return content
