"""Cells on Ray: the same results as in one process, whatever dies on the way, and nothing finished is made again.

A cluster of two nodes is two raylets on this machine, of one core each.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from mechunlearn import MechunlearnError, load_facts, load_model
from mechunlearn.benchmarks.compare import compare_methods, needed_splits
from mechunlearn.core import spread as module
from mechunlearn.core.grid import Grid
from mechunlearn.core.spread import Ray, spreading
from mechunlearn.edit import masked_gradient
from mechunlearn.evaluation.compare import compare
from mechunlearn.reproduce.engine import finished
from tests.plain import bytewise, rows_of
from tests.test_compare import TINY
from tests.test_shared import PAPER, Square

ROOT = Path(__file__).parents[1]
GRID = TINY | {"forget": 4, "steps": 3}
CELLS = 4 + 2 + 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Thirty facts as a file, for this process and for the command."""
    path = tmp_path_factory.mktemp("facts") / "sport.csv"
    chosen = load_facts("factworld/sport").facts[:30]
    lines = [f"{f.subject},{f.queries['statement'].prompt},{f.answer},{f.target}" for f in chosen]
    path.write_text("\n".join(["subject,prompt,answer,target", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def facts(saved):
    return load_facts(saved)


@pytest.fixture(scope="module")
def reference(world, facts, tmp_path_factory):
    """The folder of a comparison made by one process with one thread, as each cell on Ray."""
    folder = tmp_path_factory.mktemp("reference") / "grid"
    with one_thread():
        compare(world, facts, folder=folder, progress=False, **GRID)
    return folder


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def results(folder: Path) -> dict[str, dict]:
    """What each cell holds but for how long it took."""
    kept = {path.name: json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")}
    for cell in kept.values():
        cell.pop("seconds"), cell["result"].pop("seconds", None)
    return kept


def assert_same(folder: Path, reference: Path) -> None:
    for name in ("table.md", "figure.html", "about.json"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert results(folder) == results(reference) and len(results(reference)) == CELLS


def logged(folder: Path, item: int) -> None:
    with Path(folder, "log.txt").open("a") as lines:
        lines.write(f"{item}\n")


def log(folder: Path) -> list[str]:
    return sorted((folder / "log.txt").read_text().split())


def inverse(folder: Path, item: int) -> float:
    logged(folder, item)
    return 1 / item


def dying(folder: Path, victims: dict[int, int], item: int) -> int:
    """Work that is killed in the middle, some times, on some items."""
    logged(folder, item)
    if log(folder).count(str(item)) <= victims.get(item, 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def told(item: int, reason: str) -> str:
    return f"{item}: {reason}"


def place(item: int) -> tuple[str, int]:
    import ray

    time.sleep(1)
    return ray.get_runtime_context().get_node_id(), os.getpid()


class TestHere:
    def test_one_after_another_and_what_fails_has_its_reason(self, tmp_path):
        with spreading(None, tmp_path) as spread:
            made = spread(partial(inverse, tmp_path), [4, 0, 2], told)
            assert next(made) == 0.25 and log(tmp_path) == ["4"], "nothing is done before it is asked for"
            assert list(made) == ["0: ZeroDivisionError: division by zero", 0.5]
        assert log(tmp_path) == ["0", "2", "4"]

    def test_an_interruption_is_no_failure(self, tmp_path):
        def interrupted(item):
            raise KeyboardInterrupt

        with spreading(None, tmp_path) as spread, pytest.raises(KeyboardInterrupt):
            list(spread(interrupted, [1], told))


class TestCluster:
    """What is refused before anything is made."""

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"address": ""}, "No address of Ray is given. Expected local, auto, or host:port."),
            ({"cpus": 0}, "0 is out of range for cpus of a cell. Expected 1 to 4096."),
            ({"gpus": -1}, "-1 is out of range for gpus"),
            ({"memory": float("nan")}, "nan is out of range for memory"),
        ],
    )
    def test_numbers_out_of_range(self, given, message):
        with pytest.raises(MechunlearnError, match=message):
            Ray(**given)

    @pytest.mark.parametrize("address", ["127.0.0.1:1", "zz", "127.0.0.1", "no.such.host.invalid:6379", "zz:99999999"])
    def test_an_address_at_which_nothing_answers_is_one_line_at_once(self, tmp_path, address):
        began = time.monotonic()
        message = f"No Ray cluster at '{address}': .*Start one"
        with pytest.raises(MechunlearnError, match=message) as error, spreading(Ray(address), tmp_path):
            pass
        assert "\n" not in str(error.value) and time.monotonic() - began < 2 * module.SECONDS

    def test_the_cluster_of_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(MechunlearnError, match="No Ray cluster at '127.0.0.1:1'"), spreading(Ray("auto"), tmp_path):
            pass

    def test_without_ray_the_command_that_brings_it_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        message = r"Ray is not installed. Run: pip install 'mechunlearn\[ray\]'"
        with pytest.raises(MechunlearnError, match=message), spreading(Ray(), tmp_path):
            pass

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--ray", "127.0.0.1:1"], "No Ray cluster at '127.0.0.1:1'"),
            (["--ray", ""], "No address of Ray is given"),
            (["--ray", "local", "--cell-cpus", "0"], "0 is out of range for cpus of a cell"),
            (["--cell-cpus", "2"], "--cell-cpus is for cells on Ray. Give --ray too"),
            (["--ray", "local", "--device", "cuda:1"], "Ray chooses the GPU of each cell. Give --device cuda"),
        ],
    )
    def test_the_command_line_says_so_in_one_line_and_leaves_nothing(self, call, tmp_path, options, message):
        code, _, complaint = call("compare", "factworld", "factworld/sport", *options, "-o", tmp_path / "grid")
        assert code == 2 and message in complaint and complaint.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_nothing_imports_ray_before_it_is_wanted(self):
        names = ("core.spread", "cli.main", "evaluation.compare", "benchmarks.compare", "reproduce.summary")
        code = "".join(f"import mechunlearn.{name}; " for name in names) + "import sys; print('ray' in sys.modules)"
        ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert ran.stdout == "False\n", ran.stderr


class TestFailures:
    def test_a_reason_is_kept_until_the_cell_is_made(self, tmp_path):
        grid = Grid.open(tmp_path, {})
        grid.fail({"seed": 1}, "no 1")
        assert grid.failed({"seed": 1}) and not grid.failed({"seed": 2}) and grid.done() == 0
        assert Grid.open(tmp_path, {}).failures() == [{"cell": {"seed": 1}, "reason": "no 1"}]
        grid.cell({"seed": 1}, lambda: {"accuracy": 0.5})
        assert not grid.failed({"seed": 1}) and grid.failures() == []

    def test_a_setting_that_fails_stops_the_choice_and_a_test_is_a_row(self, world, facts, tmp_path, monkeypatch):
        compared, broken = importlib.import_module("mechunlearn.evaluation.compare"), {101}

        def fragile(*given, seed, **settings):
            if seed in broken:
                raise RuntimeError(f"no {seed}")
            return masked_gradient(*given, seed=seed, **settings)

        monkeypatch.setattr(compared, "masked_gradient", fragile)
        one = {**GRID, "localizers": ["random_units"], "objectives": ["injection"], "folder": tmp_path}
        with pytest.raises(
            MechunlearnError, match="1 of 1 settings could not be tried, so none is chosen: Runtime.*101"
        ):
            compare(world, facts, **one)
        [kept] = Grid.open(tmp_path, json.loads((tmp_path / "about.json").read_text())).failures()
        assert kept["reason"] == "RuntimeError: no 101" and kept["cell"]["stage"] == "validation"
        broken = {1}
        frame = compare(world, facts, **one).frame
        assert frame[frame.stage == "test"].note.tolist() == ["", "RuntimeError: no 1"]
        assert "RuntimeError: no 1" in (tmp_path / "table.md").read_text()
        broken = set()
        assert compare(world, facts, **one).frame.note.tolist() == [""] * 5
        assert not list((tmp_path / "failed").iterdir())


class TestWorker:
    def test_it_computes_with_as_many_threads_as_it_has_cores(self, tmp_path, monkeypatch):
        class Library:
            get = staticmethod(lambda reference: lambda item: (item, torch.get_num_threads()))

        class Reference:
            hex = staticmethod(lambda: "0")

        (tmp_path / "about.json").write_text("{}")
        monkeypatch.setattr(module, "_ray", Library)
        monkeypatch.setattr(module, "_held", {})
        with one_thread():
            assert module._task([Reference], 5, str(tmp_path), 3) == ("made", (5, 3))

    def test_a_model_whose_bridge_was_booted_goes_to_it_whole(self):
        model = load_model("factworld")
        before = model.bridge("Anna plays")
        there = pickle.loads(pickle.dumps(model))
        assert there.fingerprint == model.fingerprint and torch.equal(there.bridge("Anna plays"), before)
        with torch.no_grad():
            next(there.hf.parameters()).mul_(0)
        assert not torch.equal(there.bridge("Anna plays"), before), "they share their weights"
        assert torch.equal(model.bridge("Anna plays"), before)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    for left in (2, 1, 0):  # on a busy machine a node may take longer than the 30 seconds that Ray gives it
        made = Cluster()
        try:
            made.add_node(include_dashboard=False, **node)
            made.add_node(**node)
            made.wait_for_nodes()
            break
        except Exception:
            made.shutdown()
            if not left:
                raise
    yield made
    made.shutdown()


@pytest.fixture
def ray(cluster) -> Ray:
    return Ray(cluster.address)


@pytest.fixture
def folder(tmp_path) -> Path:
    return Grid.open(tmp_path, {}).folder


@pytest.mark.slow
class TestTwoNodes:
    def test_both_work(self, ray, folder):
        with spreading(ray, folder) as spread:
            at = list(spread(place, range(6), told))
        assert len({node for node, _ in at}) == 2

    def test_the_table_is_that_of_one_process(self, ray, world, facts, tmp_path, reference):
        compare(world, facts, folder=tmp_path / "grid", ray=ray, progress=False, **GRID)
        assert_same(tmp_path / "grid", reference)

    def test_the_table_is_the_same_when_a_worker_is_killed(self, ray, world, facts, tmp_path, reference):
        killed: list[int] = []

        def kill() -> None:
            while not list((tmp_path / "grid" / "cells").glob("*.json")):
                time.sleep(0.01)
            while not killed:
                for process in psutil.process_iter(["cmdline"]):
                    if any("ray::_task" in part for part in process.info["cmdline"] or []):
                        process.kill()
                        killed.append(process.pid)
                        return
                time.sleep(0.01)

        threading.Thread(target=kill, daemon=True).start()
        compare(world, facts, folder=tmp_path / "grid", ray=ray, progress=False, **GRID)
        assert killed and not (tmp_path / "grid" / "failed").exists()
        assert_same(tmp_path / "grid", reference)

    def test_a_cell_whose_worker_dies_is_made_again_and_one_that_always_dies_fails_with_its_reason(self, ray, folder):
        with spreading(ray, folder) as spread:
            made = list(spread(partial(dying, folder, {1: 99, 2: 2, 3: 1}), range(5), told))
        [lost] = [each for each in made if isinstance(each, str)]
        assert made == [0, lost, 4, 9, 16] and lost.startswith("1: the worker died 3 times: WorkerCrashedError: ")
        assert "\n" not in lost and log(folder) == sorted("0111222334")

    def test_a_failure_of_a_reproduction_is_kept_with_its_reason(self, ray, tmp_path, capfd):
        found = PAPER.reproduce(tmp_path, ray=ray, progress=False)
        assert found == {"squares": [1, 9, 16], "quick": False}
        assert "failed: Square(cell=2): no 2" in capfd.readouterr().err
        grid = Grid.open(tmp_path, {"of": "squares"})
        assert grid.failures() == [{"cell": {"cell": 2}, "reason": "no 2"}] and finished(grid, Square(2)) is None

    def test_a_resumed_benchmark_makes_only_what_is_missing(self, ray, tmp_path):
        rows, splits = rows_of(10), needed_splits("forget01")
        data = {split: rows[i : i + 4] for i, split in enumerate(splits)} | {"forget01_perturbed": rows[:4]}
        settings = {"forget": "forget01", "tokens": 3, "lr": 3e-3, "steps": 2, "seeds": 2, "progress": False}
        count = tmp_path / "calls"
        count.mkdir()

        def mine(model, forget, retain, seed):
            from mechunlearn import ComponentMask
            from mechunlearn.edit import masked_gradient

            (count / f"{seed}-{time.time_ns()}").touch()
            everything = ComponentMask.everything(model)
            return masked_gradient(model, everything, forget, retain, steps=2, lr=1e-3, text_weight=0, seed=seed)

        def table(folder: str, ray: Ray | None) -> bytes:
            with one_thread():
                compare_methods(bytewise(), data, [mine, "full+npo"], folder=tmp_path / folder, ray=ray, **settings)
            return (tmp_path / folder / "table.md").read_bytes()

        alone = table("alone", None)
        assert sorted(path.name[0] for path in count.iterdir()) == ["0", "1"]
        assert table("cluster", ray) == alone
        assert sorted(path.name[0] for path in count.iterdir()) == ["0", "0", "1", "1"]
        [lost] = (tmp_path / "cluster" / "cells").glob("*method-mine-seed-1-*")
        lost.unlink()
        assert table("cluster", ray) == alone and results(tmp_path / "cluster") == results(tmp_path / "alone")
        assert sorted(path.name[0] for path in count.iterdir()) == ["0", "0", "1", "1", "1"]

    def test_a_node_that_does_not_see_the_folder_is_named(self, ray, tmp_path):
        message = f"Node .* does not see the folder '{tmp_path}'. Give one that all"
        with pytest.raises(MechunlearnError, match=message), spreading(ray, tmp_path) as spread:
            list(spread(place, [1], told))

    def test_a_cell_that_fits_on_no_node_is_refused(self, ray, tmp_path):
        message = r"needs 2 CPUs, 0.5 GiB, and no node of the cluster has that.*1 CPUs, "
        want = dataclasses.replace(ray, cpus=2, memory=0.5)
        with pytest.raises(MechunlearnError, match=message), spreading(want, tmp_path):
            pass


@pytest.mark.slow
def test_a_local_run_that_is_interrupted_ends_in_one_line_and_goes_on(reference, saved, tmp_path):
    """The real command on all cores, and Ctrl-C as a terminal sends it: to the whole group of processes."""
    listed = {k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in GRID.items()}
    options = [part for k, v in listed.items() for part in (f"--{k.replace('_', '-')}", v)]
    command = [sys.executable, "-m", "mechunlearn.cli.main", "compare", "factworld", str(saved), *options]
    started = partial(
        subprocess.Popen, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    folder = tmp_path / "grid"
    first = started([*command, "--ray", "local", "-o", str(folder)])
    while not list((folder / "cells").glob("*.json")) and first.poll() is None:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)
    _, complaint = first.communicate(timeout=120)
    assert complaint == f"mechunlearn: stopped. What is finished is kept in '{folder}': the same command goes on.\n"
    assert first.returncode == 130
    kept = results(folder)
    assert 0 < len(kept) < CELLS and not (folder / "failed").exists()
    again = started([*command, "--ray", "local", "-o", str(folder)])
    _, complaint = again.communicate(timeout=300)
    assert again.returncode == 0, complaint
    assert_same(folder, reference)
    assert kept.items() <= results(folder).items()
