"""How many lanes, by what fits and what pays; and how long a grid takes."""

import jax
import pytest

from cdl.config import load
from cdl.sweep.layout import layout
from cdl.sweep.probe import Probe, choose_layout, most_lanes, pick_lanes, probe
from cdl.sweep.programs import points_of
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("rates", "most", "lanes"),
    [
        ({1: 10, 2: 19, 4: 30, 8: 31}, 8, 4),  # twice the lanes, 3% more: not worth their memory
        ({1: 10, 2: 19, 4: 30}, 4, 4),  # no more fit
        ({1: 10, 2: 9}, 64, 1),
        ({8: 10, 16: 20, 32: 0}, 64, 16),  # 32 ran out of memory
    ],
)
def test_lanes_are_doubled_while_that_fits_and_pays(rates: dict[int, float], most: int, lanes: int) -> None:
    asked: list[int] = []

    def rate(n: int) -> float:
        asked.append(n)
        return rates[n]

    assert pick_lanes(rate, min(rates), most) == lanes
    assert asked == sorted(rates)  # none is measured in vain


def test_lanes_that_fit_grow_with_memory_and_shrink_with_the_batch() -> None:
    config, _ = load(TINY)

    def most(memory: float, **changes: int) -> int:
        (point,) = points_of(config, [{k.replace("__", "."): v for k, v in changes.items()}])
        return most_lanes(point, memory, 2)

    assert most(1) == 2  # a lane a row has to be tried
    few, many = most(2e7), most(2e8)
    assert many == pytest.approx(10 * few, rel=0.1)
    assert most(2e8, data__batch_size=64) < many / 4
    assert many % 2 == 0


def test_on_a_cpu_each_core_has_a_run_and_nothing_is_tried() -> None:
    config, grid = load(TINY)
    assert grid is not None
    points = points_of(config, grid)
    said: list[str] = []
    assert choose_layout(points, said.append).lanes == layout(config, len(points)).lanes == jax.device_count()
    assert not said


def test_a_probe_measures_a_program_and_foresees_a_sweep() -> None:
    config, grid = load(TINY)
    assert grid is not None
    points = points_of(config, grid)
    measured = probe(points[0], layout(config, len(points), 2))
    assert measured.lanes == 2
    assert min(measured) > 0
    # 2 x (40 + 60 + 90 + 130) updates and 8 x 3 evaluations, by two lanes
    assert Probe(2, step=0.1, evaluation=1.0, compilation=7.0).seconds(points) == pytest.approx(7 + (64 + 24) / 2)
