"""Points: identity, grouping, expansion; and the changes of a config behind them."""

from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from cdl.config import base, change, flatten, from_flat, load, parse_assignments, section
from cdl.errors import UserError
from cdl.models.build import MODELS
from cdl.optim.build import OPTIMIZERS
from cdl.schedules import SHAPES
from cdl.sweep.grid import Point, chain, expand, product, zipped


def point(fingerprint: str = "f", **changes: Any) -> Point:
    return Point(flatten(change(base(), {k.replace("__", "."): v for k, v in changes.items()})), fingerprint)


def test_id_is_of_what_decides_the_result_and_nothing_else() -> None:
    assert point().id == point().id
    assert point().id == point(data__path="/elsewhere").id  # the same tokens in another place
    others = [
        point(fingerprint="g"), point(T=401), point(eta_ref=1.1), point(seed=1), point(model__n_layer=3),
        point(schedule__name="linear"), point(optimizer__weight_decay=0.0), point(eval__times=1),
    ]  # fmt: skip
    assert len({p.id for p in [point(), *others]}) == 1 + len(others)


def test_id_survives_a_round_trip_through_json() -> None:
    p = point(schedule__name="step", schedule__at=(0.2, 0.6))
    import json

    assert Point(json.loads(json.dumps(p.flat)), "f").id == p.id
    assert p.config.schedule.at == (0.2, 0.6)


def test_points_of_one_program_differ_in_lane_data_alone() -> None:
    same = [point(T=50), point(eta_ref=9.0), point(seed=4), point(schedule__name="wsd", schedule__decay=0.3)]
    assert {p.program for p in same} == {point().program}
    assert point(model__d_model=32).program != point().program
    assert point(optimizer__name="adamw").program != point().program


def test_product_is_complete_and_in_order() -> None:
    grid = product(a=[1, 2], b=["x", "y", "z"])
    assert [(g["a"], g["b"]) for g in grid] == [(a, b) for a in (1, 2) for b in "xyz"]
    from_numpy = product(T=np.geomspace(100, 1600, 3).astype(int), eta_ref=np.array([0.5, 1.0]))
    assert from_numpy == product(T=[100, 400, 1600], eta_ref=[0.5, 1.0])
    assert type(from_numpy[0]["T"]) is int
    for axes in (dict(a=[]), dict(a=[1, 1]), dict(a=[0.1, 0.1])):
        with pytest.raises(UserError, match="axis a"):
            product(**axes)


def test_grids_are_made_of_grids() -> None:
    sizes = zipped(**{"model.n_layer": [1, 2], "model.d_model": np.array([16, 32])})
    assert sizes == [{"model.n_layer": 1, "model.d_model": 16}, {"model.n_layer": 2, "model.d_model": 32}]
    assert product(sizes, T=[5, 6])[1:3] == [sizes[0] | {"T": 6}, sizes[1] | {"T": 5}]
    assert chain(product(T=[1, 2]), [{"T": 3}]) == product(T=[1, 2, 3])


def test_what_a_grid_would_drop_or_repeat_is_an_error() -> None:
    with pytest.raises(UserError, match=r"as many values each \(T has 3, seed has 2\)"):
        zipped(T=[1, 2, 3], seed=[0, 1])
    with pytest.raises(UserError, match=r"point \{'T': 1, 'seed': 0\} twice"):
        zipped(T=[1, 1], seed=[0, 0])
    with pytest.raises(UserError, match="T is in two axes"):
        product([{"T": 1}], T=[5])
    with pytest.raises(UserError, match=r"point \{'T': 2\} twice"):
        chain([{"T": 2}], [{"T": 2}])
    for empty in (lambda: chain([]), lambda: product([], T=[1]), lambda: zipped(T=[])):
        with pytest.raises(UserError, match="without points"):
            empty()


def test_expand_refuses_a_point_twice_and_unknown_fields() -> None:
    def fingerprint(config: ConfigDict) -> str:
        return "f"

    assert len(expand(base(), product(T=[10, 20], eta_ref=[1.0]), fingerprint)) == 2
    with pytest.raises(UserError, match="twice"):
        expand(base(), [dict(T=10), dict(T=10)], fingerprint)
    with pytest.raises(UserError, match="'eta_reff'; did you mean 'eta_ref'"):
        expand(base(), [dict(eta_reff=1.0)], fingerprint)


@pytest.mark.parametrize(("kind", "names"), [("model", MODELS), ("optimizer", OPTIMIZERS), ("schedule", SHAPES)])
def test_a_new_name_brings_its_own_section(kind: str, names: Any) -> None:
    for name in names:
        c = change(base(), {f"{kind}.name": name})
        assert set(c[kind]) >= set(section(kind, name))
        assert c[kind].name == name
    assert change(base(), {"schedule.name": "wsd"}).schedule.warmup == 0.02


def test_changes_keep_the_kind_of_their_field() -> None:
    c = change(base(), {"schedule.warmup": 100, "eta_ref": np.int64(2), "T": 800.0})
    assert (c.schedule.warmup, type(c.schedule.warmup)) == (100, int)  # a number of updates
    assert (c.eta_ref, type(c.eta_ref)) == (2.0, float)
    assert (c.T, type(c.T)) == (800, int)
    for bad in ({"T": 1.5}, {"T": "many"}, {"schedule.name": 3}, {"model.n_layer": True}, {"model": 3}):
        with pytest.raises(UserError):
            change(base(), bad)
    assert base().T == change(base(), {}).T  # a copy: the original is as it was
    assert flatten(from_flat(flatten(c))) == flatten(c)


def test_assignments() -> None:
    parsed = parse_assignments(["T=100", "optimizer.name=adamw", "data.path=a=b.txt", "schedule.at=(0.1,0.2)"])
    assert parsed == {"T": "100", "optimizer.name": "adamw", "data.path": "a=b.txt", "schedule.at": "(0.1,0.2)"}
    c = change(base(), parse_assignments(["T=800", "data.path=2024", "schedule.name=step", "schedule.at=(0.1,0.2)"]))
    assert (c.T, c.data.path, c.schedule.at) == (800, "2024", (0.1, 0.2))
    for bad in (["T"], ["=3"], ["T=1", "T=2"]):
        with pytest.raises(UserError):
            parse_assignments(bad)


@pytest.mark.parametrize("file", ["demo.py", "gpt2.py", "gpt2.py:7B", "gpt2.py:3k", "llama.py", "llama.py:360M"])
def test_configs_build(file: str, request: pytest.FixtureRequest) -> None:
    config, grid = load(str(request.config.rootpath / "configs" / file))
    assert grid
    points = expand(config, grid, lambda c: "f")
    assert len(points) == len(grid)
    assert all(p.config.T >= 100 for p in points)


def test_config_files_that_cannot_work_are_named(tmp_path: Any) -> None:
    files = {
        "no.py": ("x = 1", "no get_config"),
        "extra.py": ("import cdl.config\ndef get_config():\n c = cdl.config.base(); c.sed = 1; return c", "'sed'"),
        "syntax.py": ("def get_config(:\n pass", r"syntax.py:1: SyntaxError"),
        "absent_import.py": ("import absent_module", r"absent_import.py:1: ModuleNotFoundError"),
        "broken.py": ("def get_config():\n x = 1\n return 1 / 0", r"broken.py:3: ZeroDivisionError"),
        "dict.py": ("def get_config():\n return {}", "gave a dict"),
        "kind.py": (
            "import cdl.config\ndef get_config():\n c = cdl.config.base()\n with c.ignore_type(): c.T = 'x'\n return c",
            "T='x' must be a number",
        ),
        "none.py": ("import cdl.config\nget_config = cdl.config.base\ndef sweep(): pass", "list of dicts"),
        "less.py": ("import cdl.config\ndef get_config():\n c = cdl.config.base(); del c.seed; return c", "lacks"),
    }
    for name, (text, words) in files.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=words):
            load(str(tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        load(str(tmp_path / "absent.py"))
