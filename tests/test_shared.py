"""What reproductions share: an item that fails is told with its reason and does not stop the others; kills lose nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mechunlearn.core.grid import Grid
from mechunlearn.errors import MechunlearnError
from mechunlearn.reproduce.shared import attempt, failures, finished, settled, tried, workers

SCRIPT = """
import sys, time
from mechunlearn.core.grid import Grid
from mechunlearn.reproduce.shared import attempt

def slowly(i):
    time.sleep(0.3)
    return {"value": i * i}

for i in range(int(sys.argv[2])):
    attempt(Grid.open(sys.argv[1], {"of": "squares"}), {"cell": i}, lambda: slowly(i))
"""


def test_what_fails_says_why():
    def refuse(item):
        raise MechunlearnError(f"no {item}")

    assert tried(refuse, 3) == "no 3"
    assert (
        tried(lambda item: 1 / item, 0) == "ZeroDivisionError: division by zero"
        and tried(lambda item: 1 / item, 1) == ""
    )
    with pytest.raises(KeyboardInterrupt):
        tried(lambda item: (_ for _ in ()).throw(KeyboardInterrupt), 1)


def test_the_rest_goes_on_after_a_failure(tmp_path, capfd):
    """`os.mkdir` in workers: the middle folder is there already."""
    (tmp_path / "b").mkdir()
    with workers(1, progress=False) as each:
        each(os.mkdir, [str(tmp_path / name) for name in "abc"], "folders")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    told = capfd.readouterr().err
    assert "failed: " in told and "FileExistsError" in told and told.count("failed: ") == 1


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    ran = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "50"])
    grid = Grid.open(tmp_path, {"of": "squares"})
    while grid.done() < 2:
        time.sleep(0.05)
    ran.send_signal(signal.SIGKILL)
    ran.wait()
    before = grid.done()
    assert 2 <= before < 50
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), str(before + 1)], check=True)
    assert grid.done() == before + 1 and finished(grid, {"cell": before}) == {"value": before**2}


def test_a_failed_cell_is_settled_until_it_is_made(tmp_path):
    grid, cell = Grid.open(tmp_path, {}), {"cell": 1}
    assert not settled(grid, cell) and finished(grid, cell) is None
    assert attempt(grid, cell, lambda: {"value": 1 / 0}) is None
    assert settled(grid, cell) and failures(tmp_path) == [
        {"cell": cell, "reason": "ZeroDivisionError: division by zero"}
    ]
    assert attempt(grid, cell, lambda: {"value": 1}) == {"value": 1} and failures(tmp_path) == []
