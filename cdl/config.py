"""Configs: `ml_collections.ConfigDict`s with every field present, made in plain Python files under `configs/`.

A config file has ``get_config(arg)`` -> ConfigDict (of one run) and, for sweeps, ``sweep(arg)`` -> list of dicts of
changes to it, one per point; either may do without the argument. Fields are read as attributes; an unknown name is an
error wherever it is met.
"""

import ast
import contextlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cdl.compute import compute_arguments
from cdl.data.build import data_arguments
from cdl.errors import UserError, unknown
from cdl.models.build import model_arguments
from cdl.models.lora import lora_arguments
from cdl.optim.build import optimizer_arguments
from cdl.schedules import shape_arguments

__all__ = [
    "NAMED",
    "base",
    "change",
    "flatten",
    "from_flat",
    "load",
    "parse_assignments",
    "section",
]

NAMED = ("model", "data", "optimizer", "schedule")  # sections whose other fields depend on their name
# Fields for which an int (updates) and a float (share of T) mean different things: never converted.
_DURATIONS = {"schedule.warmup", "schedule.decay", "schedule.rise"}


def section(kind: str, name: str, **changes: Any) -> ConfigDict:
    """One of the sections that have a name (`NAMED`): its defaults, with changes.

    >>> flatten(section("optimizer", "sgd", momentum=0.9))
    {'clip_norm': 0.0, 'momentum': 0.9, 'name': 'sgd', 'rates': '', 'weight_decay': 0.0}
    """
    defaults = {
        "model": model_arguments,
        "data": data_arguments,
        "optimizer": optimizer_arguments,
        "schedule": lambda name: dict(warmup=0.0, final=0.0) | shape_arguments(name),
    }[kind](name)
    for key in changes:
        if key not in defaults:
            raise unknown(f"argument of {kind} {name!r}", key, defaults)
    return ConfigDict(dict(name=name) | defaults | changes)


def base() -> ConfigDict:
    """One run of the paper's setting (section 5.1) at the smallest scale; config files start from it.

    seed: of weights and data order. eta_ref, T: reference rate and number of updates; the peak rate is
    eta_ref / sqrt(T). eval.times: held-out evaluations, evenly spaced, the last after update T. eval.size: predicted
    tokens, or images, of the held-out set that are used, a fixed sample. init: weights to start from, a file or folder
    for `cdl.models.pretrained.load`, or the checkpoints of a run; "": drawn from the seed. lora
    (`cdl.models.lora.LoRA`): adapters beside them, which then are all that is trained.

    The sections compute (`cdl.compute.Compute`), mesh (sizes of `cdl.sharding.AXES`; -1: what the others leave) and
    checkpoint say how a run is computed and not what (`cdl.sweep.identity.HOW`). checkpoint.seconds: between two saves
    of unfinished runs. checkpoint.steps: updates between two saves of a run, 0: by the clock alone. checkpoint.keep:
    how many of a run stay while it is trained, and with --keep after it.
    """
    return ConfigDict(
        dict(
            seed=0,
            eta_ref=1.0,
            T=400,
            init="",
            lora=lora_arguments(),
            model=section("model", "gpt2"),
            data=section("data", "text"),
            optimizer=section("optimizer", "muon_nsgd"),
            schedule=section("schedule", "cosine", warmup=0.02),
            eval=dict(times=5, size=32768),
            compute=compute_arguments(),
            mesh=dict(run=-1, data=1, fsdp=1, tensor=1),
            checkpoint=dict(seconds=600.0, steps=0, keep=2),
        )
    )


def load(path: str) -> tuple[ConfigDict, list[dict[str, Any]] | None]:
    """The config of ``file.py`` or ``file.py:arg``, and its sweep, None where the file has none.

    Raises:
      UserError: no such file, no get_config in it, or a field that no run has.
    """
    name, _, arg = path.partition(":")
    file = Path(name)
    if not file.is_file():
        raise UserError(f"--config={name!r} does not exist; give a config file such as configs/demo.py")
    module = _import(file)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={name!r} has no get_config(); see configs/demo.py")
    config = _call(file, module.get_config, *([arg] if arg else []))
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {name!r} gave a {type(config).__name__}; return a ConfigDict")
    grid = _call(file, module.sweep, *_accepted(module.sweep, arg)) if hasattr(module, "sweep") else None
    if hasattr(module, "sweep") and not (isinstance(grid, list) and all(isinstance(g, Mapping) for g in grid)):
        raise UserError(f"sweep() of {name!r} must return a list of dicts; see configs/demo.py")
    return _checked(config, name), grid


def change(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with changes, dotted field -> value.

    A new ``model.name``, ``data.name``, ``optimizer.name`` or ``schedule.name`` brings that section's defaults with it
    (a schedule keeps its warmup and final value); other changes come on top.

    Raises:
      UserError: an unknown field, or a value of another kind than the field's.

    >>> flatten(change(base(), {"schedule.name": "wsd", "schedule.decay": 0.2}).schedule)
    {'decay': 0.2, 'final': 0.0, 'form': 'linear', 'name': 'wsd', 'warmup': 0.02}
    """
    config = config.copy_and_resolve_references()
    for field, value in changes.items():
        kind, _, leaf = field.partition(".")
        if leaf == "name" and kind in NAMED and value != config[kind].name:
            kept = {k: config[kind][k] for k in ("warmup", "final") if kind == "schedule"}
            config[kind] = section(kind, value, **kept)
    flat = flatten(config)
    for field, value in changes.items():
        if field not in flat:
            raise unknown("config field", field, flat)
        flat[field] = _fit(field, value, flat[field])
    return from_flat(flat)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["T=100", "optimizer.name=adamw"]`` -> dict of texts, which `change` reads as their fields' kinds."""
    changes: dict[str, Any] = {}
    for text in assignments:
        field, sign, value = text.partition("=")
        if not sign or not field:
            raise UserError(f"{text!r} is no change of a config field; write field=value, such as T=800")
        if field in changes:
            raise UserError(f"{field!r} is given twice; give it once")
        changes[field] = value
    return changes


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted field -> value, fields in alphabetical order."""
    return dict(sorted(flatten_dict(config.to_dict(), sep=".").items()))


def from_flat(flat: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `flatten`; lists become tuples."""
    return ConfigDict(unflatten_dict({k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}, sep="."))


def _fit(field: str, value: Any, old: Any) -> Any:
    """The value, as the field's kind. Text is read as a Python literal where the field is no text."""

    def kind(x: Any) -> str:
        number = isinstance(x, int | float) and not isinstance(x, bool)
        return "number" if number else "list" if isinstance(x, list | tuple) else type(x).__name__

    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and not isinstance(old, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if kind(value) != kind(old):
        raise UserError(f"{field}={value!r} must be a {kind(old)}, such as {old!r}")
    whole = isinstance(old, int) and field not in _DURATIONS
    if whole and isinstance(value, float):
        if not value.is_integer():
            raise UserError(f"{field}={value!r} must be a whole number, such as {old!r}")
        return int(value)
    return float(value) if isinstance(old, float) and field not in _DURATIONS else value


def _checked(config: ConfigDict, file: str) -> ConfigDict:
    """The config, if it has every field of a run, each of its kind, and no other."""
    template = base()
    for kind in NAMED:
        if kind in config and isinstance(config[kind], ConfigDict) and "name" in config[kind]:
            template[kind] = section(kind, config[kind].name)
    flat, expected = flatten(config), flatten(template)
    for field in flat:
        if field not in expected:
            raise unknown(f"config field ({file})", field, expected)
    for field in expected:
        if field not in flat:
            raise UserError(f"{file} lacks the config field {field!r}; start from cdl.config.base()")
    return from_flat({field: _fit(field, value, expected[field]) for field, value in flat.items()})


def _call(file: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call into a config file; what goes wrong in there is said in one line."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(file)]
        where = f"{file}:{e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else 1}"
        raise UserError(f"{where}: {type(e).__name__}: {e}; mend the config file") from e


def _accepted(sweep: Callable[..., Any], arg: str) -> list[str]:
    """The argument of the config, where there is one and a sweep depends on it."""
    return [arg] if arg and inspect.signature(sweep).parameters else []


def _import(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cdl_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={str(file)!r} is no Python file; give one such as configs/demo.py")
    module = importlib.util.module_from_spec(spec)
    _call(file, spec.loader.exec_module, module)
    return module
