"""A grid that is killed at any moment and started again ends as one that ran in peace, and makes no cell twice."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mechunlearn import MechunlearnError
from mechunlearn.core.grid import Grid

ABOUT = {"model": "factworld", "seeds": [0, 1, 2]}
CELLS = [{"editor": editor, "seed": seed} for editor in ("rome", "memit") for seed in range(3)]

SCRIPT = """
import os, pathlib, signal, sys, time
from mechunlearn.core.grid import Grid

folder, moment, victim, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
log = pathlib.Path(folder) / "log.txt"
grid = Grid.open(folder, {"model": "factworld", "seeds": [0, 1, 2]})
made = 0

def die(when):
    if moment == when and made == victim:
        os.kill(os.getpid(), signal.SIGKILL)

rename = pathlib.Path.replace
def replace(beside, path):
    die("before the file has its name")
    rename(beside, path)
    die("after the file has its name")
pathlib.Path.replace = replace

def work(editor, seed):
    def run():
        global made
        made += 1
        with open(log, "a") as lines:
            lines.write(f"{editor} {seed}\\n")
        time.sleep(pause)
        die("in the work")
        return {"accuracy": len(editor) / (seed + 3), "loss": float("nan") if seed == 1 else seed * 0.1, "by_fact": [seed]}
    return run

for editor in ("rome", "memit"):
    for seed in range(3):
        grid.cell({"editor": editor, "seed": seed}, work(editor, seed))
"""


def worker(folder: Path, moment: str = "never", victim: int = 0, pause: float = 0.0) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), moment, str(victim), str(pause)])


def log(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def in_peace(tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("grid")
    assert worker(folder).wait() == 0
    assert len(log(folder)) == 6
    return Grid.open(folder, ABOUT).frame()


@pytest.fixture
def grid(tmp_path) -> Grid:
    return Grid.open(tmp_path / "grid", ABOUT)


def files(grid: Grid) -> list[Path]:
    return sorted((grid.folder / "cells").glob("*.json"))


def never() -> dict:
    raise AssertionError("this cell is finished")


class TestKilled:
    @pytest.mark.parametrize(
        "moment, victim, finished",
        [
            ("in the work", 3, 2),
            ("before the file has its name", 4, 3),
            ("after the file has its name", 2, 2),
        ],
    )
    def test_it_ends_as_if_nothing_had_happened(self, tmp_path, in_peace, moment, victim, finished):
        assert worker(tmp_path, moment, victim).wait() == -signal.SIGKILL
        grid = Grid.open(tmp_path, ABOUT)
        assert grid.done() == finished and len(log(tmp_path)) == victim
        assert worker(tmp_path).wait() == 0
        pd.testing.assert_frame_equal(grid.frame(), in_peace)
        assert grid.done() == 6
        lost = victim - finished
        assert len(log(tmp_path)) == 6 + lost, "only the cell that was being made is made again"
        assert len(set(log(tmp_path))) == 6

    def test_two_workers_that_make_the_same_cells_leave_whole_ones(self, tmp_path, in_peace):
        """Nothing is locked: a cell may be made twice, and the file written last stays."""
        Grid.open(tmp_path, ABOUT)
        workers = [worker(tmp_path, pause=0.05) for _ in range(3)]
        assert [each.wait() for each in workers] == [0, 0, 0]
        assert 6 <= len(log(tmp_path)) <= 18 and len(set(log(tmp_path))) == 6
        grid = Grid.open(tmp_path, ABOUT)
        assert grid.done() == 6 and len(list(grid.folder.rglob("*"))) == 6 + len(["cells", "about.json", "log.txt"])
        pd.testing.assert_frame_equal(grid.frame(), in_peace)

    def test_a_cell_that_another_worker_finished_meanwhile_is_written_over(self, grid):
        again = Grid.open(grid.folder, ABOUT)

        def work():
            again.cell(CELLS[0], lambda: {"accuracy": 0.5})
            return {"accuracy": 0.5}

        assert grid.cell(CELLS[0], work) == again.cell(CELLS[0], never) == {"accuracy": 0.5}
        assert len(files(grid)) == 1


class TestCell:
    def test_a_finished_cell_is_not_made_again(self, grid):
        first = grid.cell(CELLS[0], lambda: {"accuracy": 0.5})
        assert first == grid.cell(CELLS[0], never) == {"accuracy": 0.5}
        assert grid.cell(dict(reversed(CELLS[0].items())), never) == first, "order does not matter"
        assert grid.cell(CELLS[1], lambda: {"accuracy": 0.6}) == {"accuracy": 0.6}
        assert Grid.open(grid.folder, ABOUT).done() == 2

    def test_numbers_of_another_type_or_value_are_another_cell(self, grid):
        for rate in (1, 1.5, "1", True, None, math.nan, [1], [1, 2]):
            grid.cell({"lr": rate}, lambda: {})
        assert grid.done() == 8

    def test_the_first_call_gives_what_later_ones_give(self, grid):
        given = {"loss": math.nan, "worst": -math.inf, "pair": (1, 2), "by": {3: 0.1}, "single": np.float32(0.5)}
        given |= {"tensor": torch.tensor(7), "count": np.int64(3), "right": np.bool_(True)}
        first = grid.cell(CELLS[0], lambda: given)
        later = grid.cell(CELLS[0], never)
        assert math.isnan(first.pop("loss")) and math.isnan(later.pop("loss"))
        assert first == later == {
            "worst": -math.inf, "pair": [1, 2], "by": {"3": 0.1}, "single": 0.5, "tensor": 7, "count": 3, "right": True
        }  # fmt: skip

    def test_a_file_holds_what_it_is(self, grid):
        grid.cell({"editor": "ROME, MLP", "lr": 1e-4}, lambda: {"accuracy": 0.5})
        [path] = files(grid)
        assert path.name.startswith("editor-ROME-MLP-lr-0.0001-")
        kept = json.loads(path.read_text())
        assert kept["description"] == {"editor": "ROME, MLP", "lr": 1e-4} and kept["result"] == {"accuracy": 0.5}
        assert kept["seconds"] >= 0

    @pytest.mark.parametrize(
        "damage", ["", "{", "[]", "null", '"text"', "{}", '{"description": 1, "result": {}}', "\x00"]
    )
    def test_a_damaged_file_is_made_again(self, grid, damage):
        grid.cell(CELLS[0], lambda: {"accuracy": 0.5})
        [path] = files(grid)
        path.write_text(damage)
        assert grid.done() == 0 and grid.frame().empty
        assert grid.cell(CELLS[0], lambda: {"accuracy": 0.6}) == grid.cell(CELLS[0], never) == {"accuracy": 0.6}
        assert files(grid) == [path] and grid.done() == 1

    def test_a_truncated_file_is_made_again(self, grid):
        grid.cell(CELLS[0], lambda: {"accuracy": 0.5})
        [path] = files(grid)
        path.write_bytes(path.read_bytes()[:-4])
        assert grid.cell(CELLS[0], lambda: {"accuracy": 0.6}) == {"accuracy": 0.6}

    @pytest.mark.parametrize("missing", ["grid", "description", "result"])
    def test_a_file_without_a_part_is_made_again(self, grid, missing):
        grid.cell(CELLS[0], lambda: {"accuracy": 0.5})
        [path] = files(grid)
        kept = json.loads(path.read_text())
        del kept[missing]
        path.write_text(json.dumps(kept))
        assert grid.done() == 0 and grid.cell(CELLS[0], lambda: {"accuracy": 0.6}) == {"accuracy": 0.6}

    def test_a_file_of_another_cell_or_grid_is_not_trusted(self, grid, tmp_path):
        other = Grid.open(tmp_path / "other", {"model": "gpt2"})
        other.cell(CELLS[0], lambda: {"accuracy": 0.1})
        grid.cell(CELLS[0], lambda: {"accuracy": 0.5})
        grid.cell(CELLS[1], lambda: {"accuracy": 0.6})
        [first, second] = files(grid)
        first.write_text(files(other)[0].read_text())
        second.with_name("copy.json").write_text(second.read_text())
        assert grid.done() == 1 and len(grid.frame()) == 1
        assert grid.cell(CELLS[0], lambda: {"accuracy": 0.5}) == {"accuracy": 0.5}
        first.write_text(second.read_text())
        assert grid.cell(CELLS[0], lambda: {"accuracy": 0.7}) == {"accuracy": 0.7}

    def test_an_error_stores_nothing(self, grid):
        with pytest.raises(ZeroDivisionError):
            grid.cell(CELLS[0], lambda: {"accuracy": 1 / 0})
        assert grid.done() == 0
        assert not (grid.folder / "cells").exists() or not list((grid.folder / "cells").iterdir())

    def test_mistakes_are_named(self, grid, tmp_path):
        with pytest.raises(MechunlearnError, match="seed in both the description and the result"):
            grid.cell(CELLS[0], lambda: {"seed": 3})
        with pytest.raises(MechunlearnError, match="In the result of .*rome.* Expected a dict of numbers"):
            grid.cell(CELLS[0], lambda: {"scores": torch.ones(3)})
        with pytest.raises(MechunlearnError, match="In a description: .*Expected a dict of numbers"):
            grid.cell({"path": tmp_path}, dict)
        assert grid.done() == 0


class TestFrame:
    def test_rows_are_sorted_by_the_description_and_columns_as_listed(self, grid):
        for editor, seed in [("rome", 10), ("memit", 2), ("rome", 2), ("rome", 9)]:
            grid.cell({"seed": seed, "editor": editor}, lambda s=seed: {"z": s / 2, "a": "x", "list": [1], "dict": {}})
        frame = grid.frame()
        assert list(frame.columns) == ["seed", "editor", "z", "a"]
        assert frame["seed"].tolist() == [2, 2, 9, 10] and frame["editor"].tolist() == ["memit", "rome", "rome", "rome"]
        assert frame["z"].tolist() == [1, 1, 4.5, 5]

    def test_what_is_not_a_number_comes_after_numbers(self, grid):
        for i, rate in enumerate((3, math.nan, 1, None, 2.5, "x", 0)):
            grid.cell({"lr": rate, "also": i}, lambda: {})
        assert [str(rate) for rate in grid.frame()["lr"]] == ["0", "1", "2.5", "3", "nan", "x", "None"]

    def test_cells_need_not_have_the_same_columns(self, grid):
        grid.cell({"editor": "rome", "layers": [1, 2]}, lambda: {"accuracy": math.nan})
        grid.cell({"editor": "rome"}, lambda: {"note": None, "loss": 1.0})
        grid.cell({"editor": 3}, lambda: {})
        frame = grid.frame()
        assert frame["editor"].tolist() == [3, "rome", "rome"] and frame["layers"].tolist()[1] == "[1, 2]"
        assert set(frame.columns) == {"editor", "layers", "accuracy", "note", "loss"}
        assert frame["accuracy"].isna().all() and frame["loss"].tolist()[2] == 1.0

    def test_it_does_not_depend_on_the_order_of_work(self, tmp_path):
        frames = []
        for name, cells in (("there", CELLS), ("back", CELLS[::-1])):
            grid = Grid.open(tmp_path / name, ABOUT)
            for cell in cells:
                grid.cell(cell, lambda cell=cell: {"accuracy": cell["seed"] / 7})
            frames.append(grid.frame())
        pd.testing.assert_frame_equal(*frames)

    def test_an_empty_grid_has_an_empty_frame(self, grid):
        assert grid.frame().empty and grid.done() == 0


class TestOpen:
    def test_the_same_grid_is_resumed(self, grid):
        grid.cell(CELLS[0], lambda: {"accuracy": 0.5})
        same = Grid.open(str(grid.folder), {"seeds": (0, 1, 2), "model": "factworld"})
        assert same.key == grid.key and same.cell(CELLS[0], never) == {"accuracy": 0.5}
        assert json.loads((grid.folder / "about.json").read_text()) == ABOUT

    @pytest.mark.parametrize(
        "about, named",
        [
            ({"model": "gpt2", "seeds": [0, 1, 2]}, 'model \\("factworld" there, "gpt2" given\\)'),
            ({"model": "factworld"}, r"seeds \(\[0, 1, 2\] there, nothing given\)"),
            ({**ABOUT, "data": None}, r"data \(nothing there, null given\)"),
            ({**ABOUT, "seeds": [0, 1, 2.0]}, r"seeds \(.*2\.0\] given\)"),
        ],
    )
    def test_another_grid_is_refused(self, grid, about, named):
        before = (grid.folder / "about.json").read_text()
        with pytest.raises(MechunlearnError, match=f"about something else: {named}. Take another folder"):
            Grid.open(grid.folder, about)
        assert (grid.folder / "about.json").read_text() == before

    def test_not_a_number_equals_itself(self, tmp_path):
        about = {"lr": math.nan}
        assert Grid.open(tmp_path, about).key == Grid.open(tmp_path, about).key

    def test_an_unreadable_about_is_refused(self, grid):
        (grid.folder / "about.json").write_text("{")
        with pytest.raises(MechunlearnError, match="cannot be read.* Take another folder"):
            Grid.open(grid.folder, ABOUT)
