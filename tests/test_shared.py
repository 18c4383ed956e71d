"""The engine of reproductions: what fails is reported with its reason and does not stop the rest; kills lose nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import pytest

from mechunlearn.core.grid import Grid
from mechunlearn.errors import MechunlearnError
from mechunlearn.reproduce.engine import Paper, attempt, finished, settled, stored
from mechunlearn.reproduce.tables import table

SCRIPT = """
import sys, time
from mechunlearn.core.grid import Grid
from mechunlearn.reproduce.engine import attempt
from tests.test_shared import Square

def slowly(i):
    time.sleep(0.3)
    return {"value": i * i}

for i in range(int(sys.argv[2])):
    attempt(Grid.open(sys.argv[1], {"of": "squares"}), Square(i), lambda: slowly(i))
"""


@dataclass(frozen=True)
class Square:
    cell: int

    def description(self):
        return dict(vars(self))


def squared(folder, grid, cell):
    """Work in which the cell of 2 fails."""
    if cell.cell == 2:
        raise MechunlearnError("no 2")
    return {"value": math.prod((cell.cell, cell.cell))}


def run(at):
    """Make three folders, of which the middle one cannot be made, and then four cells in two batches."""
    wanted = [at.plan.folder / name for name in ("a", "no/such", "c")]
    at.build("folders", {path: partial(os.mkdir, path) for path in wanted})
    at.cells("squares", squared, [[Square(1), Square(2), Square(3)], [Square(4)]])


def results(plan, grid, chosen):
    return {
        "squares": [found["value"] for n in range(1, 5) if (found := finished(grid, Square(n)))],
        "quick": plan.quick,
    }


PAPER = Paper(
    "squares", "Squares", ((1,), (0, 1)), ((1,), (0,)), lambda plan: {"of": "squares"}, run, results, lambda _: [], str
)


def test_the_rest_goes_on_after_a_failure(tmp_path, capfd):
    found = PAPER.reproduce(tmp_path, progress=False)
    assert found == {"squares": [1, 9, 16], "quick": False}
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and "no/such: FileNotFoundError" in told[0] and told[1] == "failed: Square(cell=2): no 2"
    grid = Grid.open(tmp_path, {"of": "squares"})
    assert grid.failures() == [{"cell": {"cell": 2}, "reason": "no 2"}]
    with pytest.raises(MechunlearnError, match=r"Square\(cell=2\) is not finished"):
        stored(grid, Square(2))
    PAPER.write(found, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == str(found) and json.loads(
        (tmp_path / "page.json").read_text()
    ) == found


def test_an_interruption_is_no_failure(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    grid = Grid.open(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        attempt(grid, Square(1), interrupted)
    assert grid.failures() == [] and finished(grid, Square(1)) is None


def test_a_table_keeps_its_text_as_it_is():
    """Numbers that look alike are not written anew, columns may share a name, and empty lines are left out."""
    shown = table("a | b | b\n\n0.10 | 1e3 | –\n | +0.00 | 2\n")
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()[::2]] == [
        ["a", "b", "b"],
        ["0.10", "1e3", "–"],
    ]
    assert shown.splitlines()[-1].split("|")[1].strip() == "" and "+0.00" in shown.splitlines()[-1]


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
    assert grid.done() == before + 1 and finished(grid, Square(before)) == {"value": before**2}


def test_a_failed_cell_is_settled_until_it_is_made(tmp_path):
    grid, cell = Grid.open(tmp_path, {}), Square(1)
    assert not settled(grid, cell) and finished(grid, cell) is None
    why = "ZeroDivisionError: division by zero"
    assert attempt(grid, cell, lambda: {"value": 1 / 0}) == why
    assert settled(grid, cell) and grid.failures() == [{"cell": {"cell": 1}, "reason": why}]
    assert attempt(grid, cell, lambda: {"value": 1}) == "" and grid.failures() == []
    assert finished(grid, cell) == {"value": 1} == stored(grid, cell)
