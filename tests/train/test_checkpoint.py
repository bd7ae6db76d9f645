"""What is saved comes back bit for bit or not at all, whatever happens to process, disk and files."""

import functools
import gc
import multiprocessing
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cdl.errors import UserError
from cdl.train import checkpoint
from cdl.train.checkpoint import Checkpoints, Restored, read_weights

ABOUT = {"id": "a1b2", "model": {"n_layer": 2, "sizes": [8, 16]}, "n_params": 120}


class State(NamedTuple):
    step: jax.Array
    params: Any
    slots: Any


def place(n: int, *axes: str | tuple[str, ...] | None) -> NamedSharding:
    """The first n devices, as a row if there is one axis to share, else as two rows."""
    devices = np.asarray(jax.devices()[:n]).reshape(2 if n > 1 else 1, -1)
    return NamedSharding(Mesh(devices, ("a", "b")), PartitionSpec(*axes))


def make_state(seed: int) -> State:
    """All that states are made of, over 8 devices, with random bits: NaNs of all kinds, -0, subnormals."""
    random_bits = np.random.default_rng(seed)

    def array(dtype: Any, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        size = np.dtype(dtype).itemsize
        values = np.frombuffer(random_bits.bytes(size * int(np.prod(shape))), dtype).reshape(shape)
        return jax.device_put(values, place(8, *axes))

    params = {
        "embed": {"kernel": array(np.float32, (16, 24), "a", "b")},
        "blocks": [array(jnp.bfloat16, (8, 4), "b"), array(np.float16, (4, 12), None, "a")],
        "scale.x": array(np.float32, (3,)),
    }
    slots = (
        {"count": jax.device_put(np.int32(seed), place(8)), "mask": jax.device_put(np.array([True, False]), place(8))},
        None,
        [array(np.uint8, (8, 8), None, "b"), array(np.int8, (5,)), jax.device_put(np.zeros((0, 3)), place(8))],
        jax.device_put(np.array([-0.0, 0.0, np.nan, np.inf], np.float32), place(8)),
    )
    return State(jax.device_put(np.int32(seed), place(8)), params, slots)


def make_losses(step: int) -> dict[str, np.ndarray]:
    losses = np.random.default_rng(step).standard_normal((2, 7))
    losses[0, 3:] = np.nan
    return {"train": losses[0], "eval": losses[1], "none yet": np.zeros(0)}


def like(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(tree: Any) -> list[Any]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_is(restored: Restored | None, step: int, state: Any) -> None:
    assert restored is not None
    assert restored.step == step
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)
    assert bits(restored.losses) == bits(make_losses(step))
    assert restored.losses.keys() == make_losses(step).keys()


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, ABOUT)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), make_losses(step))
    checkpoints.close()
    return folder


@pytest.fixture
def copy(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "copy"))


class Said(list[str]):
    """What was said."""

    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)


# ---------------------------------------------------------------------------------------------------------------------
# What is saved comes back


def two_ways(x: jax.Array) -> NamedSharding:
    return place(2, "a") if x.ndim and x.shape[0] % 2 == 0 else place(2)


def other_way_round(x: jax.Array) -> NamedSharding:
    """Over 8 devices, along the last axis where that can be shared."""
    return place(8, *[None] * (x.ndim - 1), "b") if x.ndim and x.shape[-1] % 4 == 0 else place(8)


@pytest.mark.parametrize("where", [lambda x: place(1), two_ways, other_way_round])
def test_comes_back_bit_for_bit_on_other_devices(two_steps: Path, where: Callable[[jax.Array], NamedSharding]) -> None:
    state = make_state(2)
    asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), state)
    restored = Checkpoints(two_steps, ABOUT).restore(asked)
    assert_is(restored, 2, state)
    assert restored is not None
    assert jax.tree.all(jax.tree.map(lambda x: x.sharding == where(x), restored.state))


def test_what_is_saved_is_what_was_there_before_the_donated_update(tmp_path: Path) -> None:
    def next_numbers(x: Any) -> Any:
        return x * np.uint32(1664525) + np.uint32(1013904223)

    update = jax.jit(functools.partial(jax.tree.map, next_numbers), donate_argnums=0)

    checkpoints = Checkpoints(tmp_path / "run", ABOUT)
    first = np.arange(2**18, dtype=np.uint32)
    state = {"shared": jax.device_put(first, place(8, ("a", "b"))), "whole": jax.device_put(first, place(8))}
    before, state = state, update(state)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))  # it is donated, then
    expected, losses = {"shared": next_numbers(first), "whole": next_numbers(first)}, np.zeros(5)
    for step in range(1, 25):
        checkpoints.save(step, state, {"train": losses})
        state = update(state)
        losses += 1
        if step % 4 == 0:  # the others are overtaken by the next save
            jax.block_until_ready(state)
            restored = checkpoints.restore(like(state))
            assert restored is not None
            assert restored.step == step
            assert bits(restored.state) == bits(expected)
            np.testing.assert_array_equal(restored.losses["train"], np.full(5, step - 1.0))
        expected = jax.tree.map(next_numbers, expected)


def test_runs_save_side_by_side(tmp_path: Path) -> None:
    runs = [Checkpoints(tmp_path / f"run{i}", {"id": i}) for i in range(6)]
    states = [make_state(i) for i in range(6)]
    for step in (1, 2):
        for run, state in zip(runs, states, strict=True):
            run.save(step, state, make_losses(step))
    for run, state in zip(runs, states, strict=True):
        assert_is(run.restore(like(state)), 2, state)


def test_newest_are_kept_and_a_step_is_saved_once(tmp_path: Path) -> None:
    said = Said()
    checkpoints = Checkpoints(tmp_path / "run", ABOUT, keep=3, say=said)
    state = make_state(0)
    for step in (8, 9, 10, 11, 100):
        checkpoints.save(step, state, {})
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["step_10", "step_100", "step_11"]
    before = contents(tmp_path / "run")
    checkpoints.save(100, state, {})
    checkpoints.close()
    again = Checkpoints(tmp_path / "run", ABOUT, keep=3, say=said)
    assert again.restore(like(state)) is not None
    again.save(100, state, {})
    again.close()
    assert contents(tmp_path / "run") == before
    assert said == []


def test_nothing_saved_is_nothing_restored_and_no_folder_is_made(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", ABOUT)
    assert checkpoints.restore(like(make_state(0))) is None
    checkpoints.close()
    assert not (tmp_path / "run").exists()


def test_orbax_is_silent_and_imported_late(two_steps: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert Checkpoints(two_steps, ABOUT).restore(like(make_state(2)))
    assert capfd.readouterr() == ("", "")
    code = "import cdl.train.checkpoint, sys; print('orbax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_weights_alone_are_those_of_the_newest_whole_checkpoint(copy: Path) -> None:
    for step in (2, 1):
        params, stats, read = read_weights(copy)
        assert (stats, read) == ({}, step)
        expected = make_state(step).params
        assert bits(params["embed"]["kernel"]) == bits(np.asarray(expected["embed"]["kernel"])[0])
        assert [bits(params["blocks"][i]) for i in (0, 1)] == [bits(np.asarray(x)[0]) for x in expected["blocks"]]
        before = contents(copy)
        if step == 2:
            (copy / "step_2" / "_METADATA").unlink()
    assert contents(copy) == before  # nothing is set aside
    shutil.rmtree(copy / "step_1")
    with pytest.raises(UserError, match="step_2 is damaged: FileNotFoundError"):
        read_weights(copy)


# ---------------------------------------------------------------------------------------------------------------------
# Another run, another model


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (ABOUT | {"n_params": 121}, "n_params is 120 there and 121 here"),
        (ABOUT | {"model": {"n_layer": 3, "sizes": [8, 16]}}, "model.n_layer is 2 there and 3 here"),
        (ABOUT | {"model": {"n_layer": 2, "sizes": (8, 17)}}, r"model.sizes is \[8, 16\] there and \[8, 17\] here"),
        ({"id": "a1b2"}, "model.n_layer is 2 there and absent here"),
        (ABOUT | {"data": None}, "data is absent there and null here"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(copy: Path, about: dict[str, Any], words: str) -> None:
    (copy / "step_3.orbax-checkpoint-tmp").mkdir()
    before = contents(copy)
    with pytest.raises(UserError, match=words):
        Checkpoints(copy, about)
    assert contents(copy) == before


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("name", "leaf", "words"),
    [
        ("scale.x", jax.ShapeDtypeStruct((4,), np.float32), r"float32\[3\] there and float32\[4\] here"),
        ("scale.x", jax.ShapeDtypeStruct((3,), np.int32), r"float32\[3\] there and int32\[3\] here"),
        ("scale.x", None, r"float32\[3\] there and absent here"),
        ("shift", jax.ShapeDtypeStruct((), np.float32), r"absent there and float32\[\] here"),
    ],
)
def test_another_model_is_refused_and_the_folder_left_alone(
    copy: Path, name: str, leaf: Any, words: str, damaged: bool
) -> None:
    if damaged:  # the newest; the one before tells
        (copy / "step_2" / "record.json").write_bytes(b"")
    before = contents(copy)
    asked = like(make_state(2))
    if leaf is None:
        del asked.params[name]
    else:
        asked.params[name] = leaf.update(sharding=place(8))
    with pytest.raises(UserError, match=rf"params\.{name} is {words}"):
        Checkpoints(copy, ABOUT).restore(asked)
    assert contents(copy) == before


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize(("damage", "times"), [(flip, 4), (truncate, 1), (empty, 1), (delete, 1)])
def test_a_damaged_file_never_gives_wrong_numbers(
    two_steps: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path, random.Random], None],
    times: int,
) -> None:
    rng = random.Random(damage.__name__)
    states = {step: make_state(step) for step in (1, 2)}
    files = sorted(p.relative_to(two_steps) for p in (two_steps / "step_2").rglob("*") if p.is_file())
    fallen_back = set()
    for i, file in enumerate([f for f in files if (two_steps / f).stat().st_size] * times):
        folder = Path(shutil.copytree(two_steps, tmp_path / str(i)))
        damage(folder / file, rng)
        said = Said()
        restored = Checkpoints(folder, ABOUT, say=said).restore(like(states[2]))
        assert restored is not None
        assert_is(restored, restored.step, states[restored.step])
        if restored.step == 1:
            fallen_back.add(file)
            (line,) = said
            assert str(folder / "step_2") in line
            assert "damaged" in line
            assert "goes on from step 1" in line
            assert (folder / "damaged-step_2").is_dir()
            assert not (folder / "step_2").exists()
        else:
            assert said == []  # a file that numbers do not depend on
    assert fallen_back
    assert capfd.readouterr() == ("", "")


def test_a_record_that_was_changed_is_damage_and_not_another_run(copy: Path) -> None:
    record = copy / "step_2" / "record.json"
    record.write_text(record.read_text().replace('"n_params": 120', '"n_params": 121'))
    said = Said()
    assert_is(Checkpoints(copy, ABOUT, say=said).restore(like(make_state(1))), 1, make_state(1))
    assert "record.json" in said[0]


def swap_bytes(folder: Path, these: bytes, those: bytes) -> None:
    """These for those and those for these, wherever they are."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        parts = [part.replace(those, these) for part in path.read_bytes().split(these)]
        path.write_bytes(those.join(parts))


@pytest.mark.parametrize("what", ["a flipped bit", "two leaves", "a loss"])
def test_wrong_numbers_in_files_that_look_right_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Large files are only looked at through the numbers in them; here, all files are."""
    monkeypatch.setattr(checkpoint, "_SMALL", -1)
    a, b = np.random.default_rng(0).standard_normal((2, 2000)).astype(np.float32)
    losses = np.arange(1000.0)
    state = {"a": jax.device_put(a, place(1)), "b": jax.device_put(b, place(1))}
    checkpoints = Checkpoints(tmp_path, ABOUT)
    checkpoints.save(1, state, {"train": losses})
    checkpoints.close()
    shutil.copytree(tmp_path, tmp_path / "other run")
    assert Checkpoints(tmp_path / "other run", ABOUT).restore(like(state)) is not None
    if what == "two leaves":
        swap_bytes(tmp_path / "step_1", a.tobytes(), b.tobytes())
    else:
        wrong = (losses if what == "a loss" else b).copy()
        right = wrong.tobytes()
        wrong.view(np.uint32)[777] ^= 4
        swap_bytes(tmp_path / "step_1", right, wrong.tobytes())
    said = Said()
    assert Checkpoints(tmp_path, ABOUT, say=said).restore(like(state)) is None
    name = {"a flipped bit": "b", "two leaves": "a", "a loss": "losses.train"}[what]
    assert f"the numbers of {name} are not those that were saved" in said[0]


def test_when_all_are_damaged_the_run_starts_over_and_they_stay_aside(copy: Path) -> None:
    state = make_state(2)
    for again in range(2):
        for step in (1, 2):
            (copy / f"step_{step}" / "manifest.ocdbt").unlink()
        kept = {name: data for name, data in contents(copy).items() if name.startswith("damaged")}
        said = Said()
        checkpoints = Checkpoints(copy, ABOUT, say=said)
        assert checkpoints.restore(like(state)) is None
        assert len(said) == 2
        assert all("the run starts over" in line for line in said)
        aside = {f"damaged-step_{step}{suffix}" for step in (1, 2) for suffix in ("", ".1")[: again + 1]}
        assert {p.name for p in copy.iterdir()} == aside
        assert kept.items() <= contents(copy).items()
        for step in (1, 2):
            checkpoints.save(step, make_state(step), make_losses(step))
        assert_is(checkpoints.restore(like(state)), 2, state)
        assert len(said) == 2


def test_leftovers_of_writing_are_removed_and_nothing_else(copy: Path) -> None:
    shutil.copytree(copy / "step_2", copy / "step_3.orbax-checkpoint-tmp")
    shutil.copytree(copy / "step_2", copy / "deleted-step_0")
    for name in ("notes", "step_4x", "damaged-step_1"):
        (copy / name).mkdir()
    said = Said()
    restored = Checkpoints(copy, ABOUT, say=said).restore(like(make_state(2)))
    assert_is(restored, 2, make_state(2))
    assert {p.name for p in copy.iterdir()} == {"step_1", "step_2", "notes", "step_4x", "damaged-step_1"}
    assert said == []


# ---------------------------------------------------------------------------------------------------------------------
# Processes that are killed, disks that are full. Children are forked from a process that has imported all of it.


def use_cpus() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(scope="module")
def child() -> Iterator[Callable[..., tuple[Any, Connection]]]:
    """Starts a function in a process of its own, with a pipe to hear from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "orbax.checkpoint"])
    started = []

    def start(function: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
        hear, tell = context.Pipe(duplex=False)
        process = context.Process(target=function, args=(tell, *arguments))
        process.start()
        started.append(process)
        tell.close()  # so that the end of the child is the end of the pipe
        return process, hear

    yield start
    for process in started:
        process.kill()
        process.join()


def all_of(step: int) -> dict[str, Any]:
    """A state that says by every number which step it is of."""
    return {f"w{i}": jax.device_put(np.full((64, 32), step, np.float32), place(2, "a")) for i in range(8)}


def save_without_end(tell: Connection, folder: Path, step: int) -> None:
    use_cpus()
    checkpoints = Checkpoints(folder, ABOUT)
    while True:
        step += 1
        checkpoints.save(step, all_of(step), {"train": np.full(step, float(step))})
        if step % 2:
            checkpoints.wait()
            tell.send(step)


@pytest.mark.slow
def test_killed_at_any_moment_the_last_checkpoint_is_whole(
    child: Callable[..., tuple[Any, Connection]], tmp_path: Path
) -> None:
    rng, last = random.Random(0), 0
    for _ in range(20):
        process, hear = child(save_without_end, tmp_path / "run", last)
        assert hear.poll(60)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.join()
        try:
            while True:
                last = hear.recv()
        except EOFError:
            pass
        said = Said()
        checkpoints = Checkpoints(tmp_path / "run", ABOUT, say=said)
        restored = checkpoints.restore(like(all_of(0)))
        assert restored is not None
        assert last <= restored.step <= last + 2
        last = restored.step
        assert bits(restored.state) == bits(all_of(last))
        np.testing.assert_array_equal(restored.losses["train"], np.full(last, float(last)))
        assert said == []
        assert all(p.name.startswith("step_") and "tmp" not in p.name for p in (tmp_path / "run").iterdir())


def save_with_files_limited(tell: Connection, folder: Path) -> None:
    use_cpus()
    said = Said()
    checkpoints = Checkpoints(folder, ABOUT, say=said)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for step in (1, 2, 3, 4):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000 if step in (2, 3) else most, most))
        checkpoints.save(step, all_of(step), {"train": np.full(step, float(step))})
        checkpoints.wait()
        tell.send((step, list(said), sorted(p.name for p in folder.iterdir())))
        said.clear()


def test_a_save_that_fails_is_said_and_the_next_one_tries_again(
    child: Callable[..., tuple[Any, Connection]], tmp_path: Path
) -> None:
    _, hear = child(save_with_files_limited, tmp_path)
    for step in (1, 2, 3, 4):
        assert hear.poll(60)
        of, said, there = hear.recv()
        assert of == step
        if step in (2, 3):
            (line,) = said
            assert f"CHECKPOINT FAILED at step {step}" in line
            assert "the run goes on; the last good one is of step 1" in line
            assert "step_1" in there
            assert f"step_{step}" not in there
        else:
            assert said == []
            assert f"step_{step}" in there
    restored = Checkpoints(tmp_path, ABOUT).restore(like(all_of(0)))
    assert restored is not None
    assert bits(restored.state) == bits(all_of(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_4"]


def test_a_file_in_the_place_of_the_folder_does_not_end_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = Said()
    (tmp_path / "run").write_text("mine")
    checkpoints = Checkpoints(tmp_path / "run", ABOUT, say=said)
    checkpoints.save(1, all_of(1), {})
    checkpoints.close()
    (line,) = said
    assert "CHECKPOINT FAILED at step 1" in line
    assert "there is none before it" in line
    assert (tmp_path / "run").read_text() == "mine"
    gc.collect()
    assert capfd.readouterr() == ("", "")
    (tmp_path / "run").unlink()
    checkpoints.save(2, all_of(2), {})
    checkpoints.close()
    restored = checkpoints.restore(like(all_of(0)))
    assert restored is not None
    assert bits(restored.state) == bits(all_of(2))
    assert len(said) == 1


def test_a_step_that_is_there_already_is_not_written_over(copy: Path) -> None:
    before, said = contents(copy), Said()
    checkpoints = Checkpoints(copy, ABOUT, say=said)
    checkpoints.save(2, make_state(1), {})
    checkpoints.close()
    assert "CHECKPOINT FAILED at step 2" in said[0]
    assert contents(copy) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_good(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = Said()
    checkpoints = Checkpoints(small_disk / "run", ABOUT, say=said)
    checkpoints.save(1, all_of(1), {})
    checkpoints.wait()
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 30_000))
    for step in (2, 3):
        checkpoints.save(step, all_of(step), {})
        checkpoints.wait()
    assert len(said) == 2
    assert all("CHECKPOINT FAILED" in line and "last good one is of step 1" in line for line in said)
    good = checkpoints.restore(like(all_of(0)))
    assert good is not None
    assert bits(good.state) == bits(all_of(1))
    (small_disk / "other").unlink()
    checkpoints.save(5, all_of(5), {})
    restored = checkpoints.restore(like(all_of(0)))
    assert restored is not None
    assert restored.step == 5
    gc.collect()
    assert capfd.readouterr() == ("", "")
    assert bits(restored.state) == bits(all_of(5))


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

TWO_PROCESSES = """
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cdl.train.checkpoint import Checkpoints

rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


def place(x, *axes):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*axes)), lambda i: x[i])


def numbers(step):
    return np.random.default_rng(step).standard_normal((64, 8)).astype(np.float32)


def make_state(step):
    return {"rows": place(numbers(step), "d"), "all": place(numbers(step)), "step": place(np.int32(step))}


update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
said = []
runs = [Checkpoints(folder / f"run{i}", {"id": i}, say=said.append) for i in range(2)]
for step in (1, 2, 3):
    for run in runs:  # both are being written at once
        state = make_state(step)
        run.save(step, state, {"train": np.arange(float(step))})
        state = update(state)


def check(run, step):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    other = like["rows"].update(sharding=NamedSharding(mesh, PartitionSpec(None, "d")))
    restored = run.restore(like | {"rows": other, "all": like["rows"]})
    assert restored.step == step == int(restored.state["step"])
    assert restored.losses["train"].tolist() == list(range(step))
    for name in ("rows", "all"):
        for piece in restored.state[name].addressable_shards:
            np.testing.assert_array_equal(piece.data, numbers(step)[piece.index])


for run in runs:
    check(run, 3)
assert said == []
if rank == 0:  # damage what the other process has written
    next((folder / "run0" / "step_3").glob("ocdbt.process_1/**/manifest.ocdbt")).write_bytes(b"")
sync_global_devices("damaged")
check(runs[0], 2)
assert len(said) == (1 if rank == 0 else 0)
runs[0].save(3, make_state(3), {"train": np.arange(3.0)})
check(runs[0], 3)
for run in runs:
    run.finish()
sync_global_devices("finished")
assert all([*run.glob("step_*")] == [run / "step_3"] for run in folder.iterdir())
print("all is well")
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_what_both_hold(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", TWO_PROCESSES]
    both = [
        subprocess.Popen(
            [*command, str(rank), port, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        for process in both:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            assert "all is well" in out
    finally:
        for process in both:
            process.kill()
            process.wait()
