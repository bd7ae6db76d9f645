"""Runs that start from given weights: like a plain optax loop from there, on any mesh, known by the weights alone."""

import itertools
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cdl.cli import main
from cdl.config import base, change, load
from cdl.data import build as data
from cdl.errors import UserError
from cdl.models import build as models
from cdl.models import pretrained
from cdl.models.build import Model, Sums
from cdl.models.gpt2 import arguments
from cdl.optim import build as optimizers
from cdl.schedules import schedule
from cdl.sharding import AXES, ShardingRule, make_mesh
from cdl.sweep import initial
from cdl.sweep.programs import points_of
from cdl.sweep.store import Store, sweep_table
from cdl.train.checkpoint import read_weights
from cdl.train.loop import Run, train
from cdl.train.step import Program

from ..conftest import TINY

B, F, V = 8, 4, 6


def _init(seed: Any) -> tuple[Any, Any]:
    return {"kernel": jax.random.normal(jax.random.key(seed), (F, V))}, {"mean": jnp.zeros(F)}


def _loss(params: Any, stats: Any, batch: Any, train: bool = True) -> tuple[Sums, Any]:
    x_BxF, label_B = batch
    mean_F = x_BxF.mean(axis=0)
    logits_BxV = (x_BxF - stats["mean"]) @ params["kernel"]
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxV, label_B)
    sums = Sums(loss_B.sum(), (logits_BxV.argmax(axis=1) == label_B).sum() * 1.0, jnp.asarray(1.0 * len(label_B)))
    return sums, {"mean": 0.9 * stats["mean"] + 0.1 * mean_F}


# Logistic regression on features less their running mean: it has statistics, and compiles in no time.
LOGISTIC = Model(_init, _loss, F * V, (ShardingRule("kernel$", ("fsdp", "tensor")),), "images")
SECTION = dict(name="gpt2") | arguments("3k", context=16)  # of tests/tiny.py


def batches(seed: int, first: int) -> Iterator[Any]:
    for k in itertools.count(first):
        rng = np.random.default_rng((seed, k))
        yield rng.normal(1, 1, (B, F)).astype(np.float32), rng.integers(0, V, B).astype(np.int32)


def weights(model: Model, seed: int = 7) -> tuple[Any, Any]:
    """As a file would give them: NumPy arrays, unlike what the model draws from any seed."""
    return jax.tree.map(lambda x: np.asarray(x) * 1.5 + 0.125, model.init(seed))


def plain_losses(
    model: Model, optimizer: str, eta_T: np.ndarray, batches: Iterator[Any], params: Any, stats: Any
) -> list[float]:
    """The reference: optax with a schedule, in a Python loop; the loss before each update."""

    def mean_loss(params: Any, stats: Any, batch: Any) -> tuple[jax.Array, Any]:
        sums, stats = model.loss(params, stats, batch)
        return sums.loss / sums.count, stats

    tx = optimizers.OPTIMIZERS[optimizer](lambda count: jnp.asarray(eta_T)[count])
    state = tx.init(params)
    step = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    losses = []
    for batch in itertools.islice(batches, len(eta_T)):
        (loss, stats), grads = step(params, stats, batch)
        losses.append(float(loss))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return losses


@pytest.mark.parametrize(("sizes", "lanes"), [((1, 1, 1, 1), 2), ((2, 1, 1, 1), 2), ((1, 2, 2, 2), 1)])
@pytest.mark.parametrize("optimizer", list(optimizers.OPTIMIZERS))
def test_a_run_goes_as_a_plain_optax_loop_from_there(optimizer: str, sizes: tuple[int, ...], lanes: int) -> None:
    """Two runs of given weights and one of drawn ones, in turns or side by side, none of which touches another."""
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices())
    made = optimizers.build({"name": optimizer}, LOGISTIC.rules)
    heldout = jax.tree.map(lambda x: x[None], next(batches(0, 0)))
    program = Program(LOGISTIC, made, heldout, lanes=lanes, mesh=mesh, block=4, prepare=lambda batch: batch)
    eta_T = schedule("cosine", 9, peak=0.05)
    runs = [
        Run(str(seed), seed, eta_T, (9,), partial(batches, seed), initial)
        for seed, initial in ((1, None), (2, partial(weights, LOGISTIC)), (3, partial(weights, LOGISTIC, 8)))
    ]
    done = {o.run.id: o.curve["train_loss"][:-1] for o in train(program, runs)}
    for r in runs:
        start = r.initial() if r.initial else LOGISTIC.init(r.seed)
        expected = plain_losses(LOGISTIC, optimizer, eta_T, r.batches(0), *start)
        np.testing.assert_allclose(done[r.id], expected, rtol=2e-5)


@pytest.mark.parametrize("optimizer", list(optimizers.OPTIMIZERS))
def test_what_an_optimizer_keeps_starts_the_same_whatever_the_weights(optimizer: str) -> None:
    """This is why `Program.put_weights` leaves it as it is."""
    tx = optimizers.build({"name": optimizer, "clip_norm": 1.0})
    jax.tree.map(np.testing.assert_array_equal, tx.init(weights(LOGISTIC)[0]), tx.init(LOGISTIC.init(0)[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in a file, for the model of tests/tiny.py."""
    out = tmp_path_factory.mktemp("weights") / "a"
    pretrained.save(SECTION, *weights(models.build(SECTION)), out)
    return out


@pytest.mark.slow
def test_train_starts_from_a_file(folder: Path, tmp_path: Path) -> None:
    config, _ = load(TINY)
    command = ["train", f"--config={TINY}", "T=12", "eta_ref=0.5", f"--out={tmp_path / 'out'}"]
    assert main([*command, f"init={folder}"]) == 0
    (row,) = sweep_table(tmp_path / "out").itertuples()
    curve = Store(tmp_path / "out").curve(str(row.id))
    eta_T = np.asarray(curve["eta"], np.float64)[1:]
    dataset = data.build(config.data)
    tokens: Iterator[Any] = (dataset.prepare(batch) for batch in dataset.batches(config.seed, 0))
    model = models.build(SECTION)
    losses = plain_losses(model, "muon_nsgd", eta_T, tokens, *weights(model))
    np.testing.assert_allclose(np.asarray(curve["train_loss"], np.float64)[:-1], losses, rtol=2e-5)
    assert main(command) == 2  # drawn weights are another run: the folder is kept as it is


def test_a_point_is_known_by_the_weights_and_not_by_their_path(folder: Path, tmp_path: Path) -> None:
    config, _ = load(TINY)

    def id_of(init: Path | str) -> str:
        return points_of(change(config, {"init": str(init)}), [{}])[0].id

    moved = tmp_path / "moved" / "renamed.safetensors"
    moved.parent.mkdir()
    shutil.copy(folder / pretrained.WEIGHTS, moved)
    pretrained.save(SECTION, *weights(models.build(SECTION), 8), tmp_path / "other")
    assert id_of(folder) == id_of(moved) == id_of(folder / pretrained.WEIGHTS)
    assert len({id_of(""), id_of(folder), id_of(tmp_path / "other")}) == 3
    points = points_of(config, [{"init": str(folder)}, {"init": ""}])
    assert points[0].program == points[1].program  # one program trains from any weights


def test_a_vision_language_model_starts_from_two_folders(tmp_path: Path) -> None:
    """It is known by both, and by no path; a folder with a comma in its name is one for any other model."""
    sizes = {"model.vision_n_layer": 1, "model.text_n_layer": 1}
    config = change(base(), {"model.name": "vlm"} | sizes)
    params = weights(models.build(config.model.to_dict()))[0]
    pretrained.save(config.model.to_dict(), params, {}, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = [change(config, {"init": f"{tmp_path / x / 'vision'},{tmp_path / x / 'text'}"}) for x in "ab"]
    assert initial.fingerprint(moved[0]) == initial.fingerprint(moved[1])
    assert initial.fingerprint(moved[0]) != initial.fingerprint(change(config, {"init": str(tmp_path / "a")}))
    loaded = initial.load(moved[1])[0]
    for part in ("vision", "text"):
        jax.tree.map(np.testing.assert_array_equal, loaded[part], params[part])
    assert pretrained.paths_of("vlm", "~/a,b") == [Path.home() / "a", Path("b")]
    assert pretrained.paths_of("gpt2", "a,b") == [Path("a,b")]


@pytest.mark.parametrize(
    ("init", "changes", "said"),
    [
        ("absent", {}, "cannot read absent"),
        ("ALONE", {"model.d_model": 16}, "set the sizes of the model to the file's"),
        ("FOLDER", {"model.n_layer": 2}, "model.n_layer is 1 there and 2 here"),
        ("CUT", {}, "give a safetensors file, whole"),
    ],
)
def test_bad_weights_are_said_before_anything_is_trained(
    init: str, changes: dict[str, Any], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder / pretrained.WEIGHTS).read_bytes()[:-100])
    alone = Path(shutil.copy(folder / pretrained.WEIGHTS, tmp_path / "alone.safetensors"))  # without its config.json
    init = {"FOLDER": str(folder), "ALONE": str(alone), "CUT": str(cut)}.get(init, init)
    fields = [f"{field}={value}" for field, value in changes.items()]
    command = ["train", f"--config={TINY}", f"--out={tmp_path / 'out'}", f"init={init}", *fields]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError):
        points_of(change(load(TINY)[0], changes | {"init": init}), [{}])


def test_a_run_starts_from_the_weights_that_another_has_kept(tmp_path: Path) -> None:
    assert main(["train", f"--config={TINY}", f"--out={tmp_path / 'a'}", "T=20", "checkpoint.steps=8"]) == 0
    (kept,) = (tmp_path / "a" / "checkpoints").iterdir()
    params, stats, _ = read_weights(kept)
    assert stats == {}
    pretrained.save(SECTION, params, stats, tmp_path / "exported")  # and other tools have them
    shutil.copytree(tmp_path / "exported", tmp_path / "step_1000")  # as other trainers call their checkpoints
    for path in (kept, kept / "step_20", tmp_path / "exported", tmp_path / "step_1000"):
        (point,) = points_of(load(TINY)[0], [dict(init=str(path))])
        jax.tree.map(np.testing.assert_array_equal, initial.load(point.config), (params, stats))
        assert point.fingerprints["init.fingerprint"] == initial.fingerprint(point.config)
    assert main(["train", f"--config={TINY}", f"--out={tmp_path / 'b'}", "T=20", f"init={kept}"]) == 0
    before, after = (sweep_table(tmp_path / name)["loss"][0] for name in "ab")
    assert after < before - 0.1  # it went on from there
    wrong = change(load(TINY)[0], {"init": str(kept), "model.d_model": 16, "model.n_head": 1})
    with pytest.raises(UserError, match=r"has weights of another model: params\.\S+ is \[.*\] there and \[.*\] here"):
        initial.load(wrong)
    with pytest.raises(UserError, match="there is no checkpoint in it"):
        read_weights(tmp_path / "a")
    record = kept / "step_20" / "record.json"
    record.write_text(record.read_text().replace("20", "21", 1))
    with pytest.raises(UserError, match="step_20 is damaged"):
        read_weights(kept)
