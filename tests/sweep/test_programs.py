"""Points that were made elsewhere meet the same files here, or are refused."""

from pathlib import Path

import pytest

from cdl.config import load
from cdl.errors import UserError
from cdl.sweep.grid import points_in
from cdl.sweep.programs import check_files, points_of
from cdl.sweep.store import Store
from tests.conftest import TINY


def test_other_text_under_the_path_of_a_sweep_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 100)
    config, _ = load(TINY)
    store = Store(tmp_path / "s")
    store.open_for(points_of(config, [{"data.path": str(text), "T": T} for T in (20, 30)]))
    (grid,) = store.grids()
    check_files(points_in(grid))
    grid["common"]["data.fingerprint"] = "another"
    with pytest.raises(UserError, match="made by another version"):
        points_in(grid)
    moved = points_in(store.grids()[0])
    for point in moved:
        point.fingerprints["data.fingerprint"] = "another"
    with pytest.raises(UserError, match=r"data.path='.*text.txt' is not what it was where the sweep was begun"):
        check_files(moved)
