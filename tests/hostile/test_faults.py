"""Kills, full disks and interruptions while something is written: the old file, the new one or none, and nothing beside it."""

import os
import random
import resource
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from mechunlearn import MechunlearnError
from mechunlearn.core import files
from mechunlearn.core.files import whole_file, whole_folder
from mechunlearn.core.grid import Grid
from mechunlearn.features.dictionaries import load_dictionary
from mechunlearn.model.hooked import export, load_model
from tests.models import random_hf
from tests.test_corruption import codebook, nouns, sae, weights_said

KILLS = 4


class Writer(NamedTuple):
    """Something that is written.

    Attributes:
        name: The name of its file or folder.
        write: Writes it to a path.
        said: What is at a path, as text.
    """

    name: str
    write: Callable[[Path], Any]
    said: Callable[[Path], str]


def writers() -> dict[str, Callable[[], Writer]]:
    def noun(kind: str, suffix: str) -> Writer:
        made, load = nouns()[kind]

        def said(path: Path) -> str:
            load(path).save(path.with_name("said.json"))
            text = path.with_name("said.json").read_text()
            path.with_name("said.json").unlink()
            return text

        return Writer(f"it{suffix}", made.save, said)

    def dictionary(made: Any) -> Writer:
        return Writer("it", made.save, lambda path: weights_said(load_dictionary(path)))

    def model() -> Writer:
        model = load_model((random_hf("llama"), None))

        def said(path: Path) -> str:
            return load_model((AutoModelForCausalLM.from_pretrained(path), None)).fingerprint

        return Writer("it", lambda path: export(model, path), said)

    def cell() -> Writer:
        def write(path: Path) -> None:
            Grid.open(path, {"a": 1}).cell({"b": 2}, lambda: {"c": list(range(300))})

        return Writer("it", write, lambda path: Grid.open(path, {"a": 1}).frame().to_json())

    found = {f"{kind}{suffix}": lambda kind=kind, suffix=suffix: noun(kind, suffix) for kind in nouns() for suffix in (".json", ".safetensors")}  # fmt: skip
    more = {"codebook": lambda: dictionary(codebook()), "sae": lambda: dictionary(sae()), "model": model, "cell": cell}
    return found | more


WRITERS = writers()


def child(work: Callable[[], Any], started: Callable[[int], None] = lambda pid: None) -> int:
    """Do something in a process of its own: 0 if it ends well, 2 if it is refused, 3 for another error."""
    pid = os.fork()
    if not pid:
        code = 3
        try:
            torch.set_num_threads(1)
            files._cleared.clear()
            work()
            code = 0
        except MechunlearnError as error:
            code = 2 if str(error) and "\n" not in str(error) else 4
        finally:
            os._exit(code)
    started(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("kind", WRITERS)
class TestEveryWriter:
    def test_a_kill_leaves_whole_files_and_a_rerun_leaves_nothing_else(self, kind, tmp_path):
        writer, draw = WRITERS[kind](), random.Random(kind)
        writer.write(tmp_path / writer.name)
        truth = writer.said(tmp_path / writer.name)

        def kill(pid: int) -> None:
            time.sleep(draw.uniform(0.002, 0.06))
            os.kill(pid, signal.SIGKILL)

        for kill_number in range(KILLS):
            work = tmp_path / f"work{kill_number}"

            def again(work: Path = work) -> None:
                for number in range(10**9):
                    writer.write(work / f"{number}" / writer.name)

            assert child(again, kill) == -signal.SIGKILL
            for folder in sorted(work.iterdir()) if work.exists() else ():
                target = folder / writer.name
                if target.exists() and kind != "cell":
                    assert writer.said(target) == truth
                assert child(lambda folder=folder: writer.write(folder / f"new-{writer.name}")) == 0
                if kind == "cell":
                    assert child(lambda target=target: writer.write(target)) == 0
                    assert writer.said(target) == truth
                assert {path.name for path in folder.iterdir()} <= {writer.name, f"new-{writer.name}"}
                assert not [path for path in folder.rglob("*") if path.name.endswith(files.PART)]

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, kind, tmp_path):
        """The disk is full after so many bytes of a file, by a limit that the system keeps."""
        writer = WRITERS[kind]()
        writer.write(tmp_path / writer.name)
        path = tmp_path / writer.name
        sizes = (
            [each.stat().st_size for each in path.rglob("*") if each.is_file()]
            if path.is_dir()
            else [path.stat().st_size]
        )
        for number, limit in enumerate(sorted({0, 1, min(sizes) - 1, max(sizes) // 2, max(sizes) - 1})):
            (folder := tmp_path / f"full{number}").mkdir()

            def full(folder: Path = folder, limit: int = limit) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                writer.write(folder / writer.name)

            assert child(full) == 2, f"limit {limit}"
            there = [each for each in folder.rglob("*") if each.is_file()]
            assert not there or (kind == "cell" and [each.name for each in there] == ["about.json"]), there

    def test_signals_in_between_change_nothing(self, kind, tmp_path):
        writer = WRITERS[kind]()
        writer.write(tmp_path / writer.name)
        (tmp_path / "again").mkdir()
        again = tmp_path / "again" / writer.name

        def interrupted() -> None:
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            writer.write(again)
            signal.setitimer(signal.ITIMER_REAL, 0)

        assert child(interrupted) == 0
        assert writer.said(again) == writer.said(tmp_path / writer.name)


def test_a_full_disk_keeps_the_old_file(tmp_path):
    made, load = nouns()["mask"]
    path = tmp_path / "it.mask.json"
    made.save(path)
    before = path.read_bytes()

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        made.save(path)

    assert child(full) == 2
    assert path.read_bytes() == before and load(path) == made
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    """Of another process that is alive, of another machine, and of a user: only the dead one's goes."""
    dead = os.fork() or os._exit(0)
    os.waitpid(dead, 0)
    mine = f".it.{files.OWNER}-{os.getppid()}.abc.part"
    kept = {mine, f".it.00000000-{dead}.abc.part", ".notes.part", "it.part"}
    for name in {*kept, f".it.{files.OWNER}-{dead}.abc.part"}:
        (tmp_path / name).write_text("x")
    (tmp_path / f".folder.{files.OWNER}-{dead}.abc.part").mkdir()
    with whole_file(tmp_path / "new") as beside:
        beside.write_text("y")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "new"}


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_files_have_the_permissions_that_the_user_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        with whole_file(tmp_path / "file") as beside:
            beside.write_text("x")
        with whole_folder(tmp_path / "folder") as beside:
            (beside / "file").write_text("x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o666 & ~mask
