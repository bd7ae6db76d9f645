"""Weights under the names of Hugging Face's `transformers`, in safetensors files: read and written, without torch.

`gpt2` is `GPT2LMHeadModel`, `llama` `LlamaForCausalLM`, `vit` `ViTForImageClassification`, `resnet`
`ResNetForImageClassification`. What these lack (mean pooling, the CIFAR stem) goes under the same names, and
`transformers` refuses it by its shapes.

    section = read_section("gpt2-folder")
    params, stats = load(section, "gpt2-folder")  # in the place of build(section).init(seed)
    save(section, params, stats, "other-folder")

`vlm` is two of them, a `SiglipVisionModel` (or the vision model of a `SiglipModel`) and a `LlamaForCausalLM`:

    params, stats = load(section, "siglip-folder,smollm-folder")  # the projector is drawn
    save(section, params, stats, "folder")  # folder/vision, folder/text and folder/projector.safetensors
    params, stats = load(section, "folder")
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
from cdl.models import hugging_face, vlm
from cdl.models.build import build
from cdl.models.hugging_face import BARE, IGNORED, PREFIXES, tied_to, with_defaults

__all__ = ["MOST_NAMED", "load", "paths_of", "read_section", "save", "to_hugging_face"]

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PROJECTOR, PROJECTION = "projector.safetensors", "MP.proj.weight"  # nanoVLM's name of it
MOST_NAMED = 20  # tensors that an error lists
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


def paths_of(name: str, path: str | os.PathLike[str]) -> list[Path]:
    """The files or folders that a path stands for, for the model of this name: two, joined by a comma, for `vlm`."""
    both = os.fspath(path).split(",") if name == "vlm" else [path]
    return [Path(one).expanduser() for one in both]


def load(section: Mapping[str, Any], path: str | os.PathLike[str], seed: int | None = 0) -> tuple[Any, Any]:
    """Parameters and statistics of the model of a config section, as `Model.init` gives them, from a file.

    Args:
      section: ``{name, **arguments}``. If a config.json lies beside the file, the two have to agree; that is the only
        check of what no shape tells (the number of heads).
      path: a folder with ``model.safetensors`` or ``model.safetensors.index.json`` and its parts, or one of these. For
        `vlm`, two such paths joined by a comma, of the vision and the language model, or a folder that `save` made.
      seed: what files may lack is drawn from it, as in `Model.init`: the head of a ViT or ResNet, the projector.
        None: nothing may be lacking, for who trains adapters alone.

    Returns:
      Trees of NumPy arrays, float32 whatever the file has. In memory there are these, and one tensor of the file.

    Raises:
      UserError: tensors that are missing, left over, or of another shape or type; an output layer that is not tied to
        the embedding as the model's is; a config.json that says otherwise; a file that cannot be read.
    """
    section = with_defaults(section)
    model = build(section)
    params, stats = jax.eval_shape(model.init, 0)
    leaves = {name: np.empty(leaf.shape, np.float32) for name, leaf in (_named(params) | _named(stats)).items()}
    paths = paths_of(section["name"], path)
    absent = _fill_vlm(section, leaves, paths) if section["name"] == "vlm" else _fill(section, leaves, paths[0])
    if absent and seed is None:
        raise UserError(
            f"{os.fspath(path)} lacks the {absent[0]}, which adapters would leave as it is drawn; train it first, with "
            f"lora.rank=0"
        )
    for name in absent:
        drawn = jax.jit(lambda seed, name=name: model.init(seed)[0][name])(seed)
        leaves |= {f"{name}/{leaf}": np.asarray(value) for leaf, value in _named(drawn).items()}
    return _filled(params, leaves), _filled(stats, leaves)


def _fill(
    section: Mapping[str, Any], leaves: Mapping[str, np.ndarray], path: Path, fields: Mapping[str, str] | None = None
) -> list[str]:
    """Writes the tensors of a file into the leaves, and says what of the model it may lack, and does. `fields`: what
    arguments are called in the config."""
    name = section["name"]
    table = {tensor.theirs: tensor for tensor in hugging_face.tensors_of(section)}
    found = _locate(path, name)
    tied, table_name = None, tied_to(section)
    if table_name is not None:
        tied = found.pop("lm_head.weight", None)
        if tied is not None and table_name not in found:  # of two tied tensors, files keep either
            found[table_name], tied = tied, None
    head = {name for name, tensor in table.items() if tensor.ours.startswith("head/")}
    headless = bool(head) and not head & found.keys()
    config = (path if path.is_dir() else path.parent) / CONFIG
    if config.is_file():
        theirs = read_section(config)
        if theirs["name"] != name:
            raise UserError(f"{config}: this is model {theirs['name']!r}, and {name!r} is needed; give another folder")
        for key, value in theirs.items():
            if value != section[key] and key != "dtype" and not (headless and key == "classes"):
                field = (fields or {}).get(key, key)
                raise UserError(
                    f"{config}: model.{field} is {value!r} there and {section[key]!r} here; set it to {value!r}"
                )
    _exactly(path, found, table, head if headless else ())
    for name, place in found.items():
        view, shape = table[name].of(leaves)
        view[...] = place.read(shape).reshape(view.shape)
    if tied is not None:
        embedding = leaves["token/embedding"]
        if not np.array_equal(tied.read(embedding.shape).astype(np.float32, copy=False), embedding):
            raise UserError(
                f"{tied.file}: {tied.name} is not the token embedding; {section['name']} has its output tied to that"
            )
    return ["head"] if headless else []


def _fill_vlm(section: Mapping[str, Any], leaves: Mapping[str, np.ndarray], paths: list[Path]) -> list[str]:
    parts, projector = vlm.parts(section), paths[0] / PROJECTOR
    whole = len(paths) == 1
    if len(paths) > 2 or (whole and not projector.is_file()):
        given = ",".join(map(str, paths))
        raise UserError(f"{given} is not VISION,TEXT, two paths of weights, nor a folder with {PROJECTOR}; give either")
    for part, path in zip(parts, [paths[0] / part for part in parts] if whole else paths, strict=True):
        own = {name.removeprefix(f"{part}/"): x for name, x in leaves.items() if name.startswith(f"{part}/")}
        _fill(parts[part], own, path, vlm.FIELDS[part])
    if not whole:
        return ["projector"]
    with _opened(projector) as tensors:
        _exactly(projector, tensors.keys(), [PROJECTION], ())
    kernel = leaves["projector/kernel"]
    kernel[...] = _Place(projector, PROJECTION).read(kernel.T.shape).T
    return []


def to_hugging_face(section: Mapping[str, Any], params: Any, stats: Any) -> dict[str, np.ndarray]:
    """Name -> tensor, contiguous, as `load` reads them; of `siglip` too, which is a part of a model, and not of `vlm`,
    which is two. Arrays have to lie whole in this process."""
    section = with_defaults(section)
    leaves = {name: np.asarray(leaf) for name, leaf in (_named(params) | _named(stats)).items()}
    prefix = PREFIXES[section["name"]]
    tensors = {}
    for tensor in hugging_face.tensors_of(section):
        view, shape = tensor.of(leaves)
        name = tensor.theirs if tensor.ours.startswith(BARE) else f"{prefix}{tensor.theirs}"
        tensors[name] = np.ascontiguousarray(view).reshape(shape)
        if name.endswith(".running_var"):  # torch counts batches beside it, to no effect, and misses it
            tensors[f"{name.removesuffix('running_var')}num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


def save(section: Mapping[str, Any], params: Any, stats: Any, folder: str | os.PathLike[str]) -> None:
    """Writes ``model.safetensors`` and ``config.json``, for `from_pretrained` and for `load`; of `vlm`, a folder with
    these for each of its models, ``vision`` and ``text``, and ``projector.safetensors``.

    Raises:
      UserError: the folder has one of these already.
    """
    folder, section = Path(folder), with_defaults(section)
    for name in (CONFIG, INDEX, WEIGHTS, PROJECTOR):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists and is not overwritten; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if section["name"] == "vlm":
        for part, own in vlm.parts(section).items():
            save(own, params[part], {}, folder / part)
        written, tensors = [PROJECTOR], {PROJECTION: np.ascontiguousarray(np.asarray(params["projector"]["kernel"]).T)}
    else:
        config = hugging_face.config_of(section)
        (folder / f"{CONFIG}.partial").write_text(json.dumps(config, indent=2) + "\n")
        written, tensors = [CONFIG, WEIGHTS], to_hugging_face(section, params, stats)
    save_file(tensors, folder / f"{written[-1]}.partial", metadata={"format": "pt"})
    for name in written:
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
    faults = [
        f"{_listed(names)} {one if len(names) == 1 else many}"
        for names, one, many in (
            (missing, "is not there", "are not there"),
            (left_over, "has no place in the model", "have no place in the model"),
        )
        if names
    ]
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}; give a file of this kind and size of model")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:MOST_NAMED])}{more}"


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
