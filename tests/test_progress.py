"""A bar is seen where somebody looks, and nowhere else."""

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rich
from rich.console import Console

import mechunlearn
from mechunlearn.core import progress
from mechunlearn.core.progress import track

WAIT = 20  # seconds, at most


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch) -> Screen:
    """A terminal, where bars come after a hundredth of a second."""
    made = Screen()
    console = Console(file=made, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    monkeypatch.setattr(rich, "get_console", lambda: console)
    monkeypatch.setattr(progress, "DELAY", 0.01)
    return made


def shown(screen: Screen) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def until(screen: Screen, text: str) -> None:
    """Wait for the bar's own thread."""
    end = time.monotonic() + WAIT
    while text not in shown(screen):
        assert time.monotonic() < end, f"never saw '{text}' in {shown(screen)!r}"
        time.sleep(0.01)


def piped(code: str, environment: dict[str, str] | None = None) -> str:
    folder = Path(mechunlearn.__file__).parents[1]
    code = f"import time; from mechunlearn.core import progress; progress.DELAY = 0.01; {code}"
    command = [sys.executable, "-c", code]
    made = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
    return made.stdout + made.stderr


class TestTerminal:
    def test_long_work_has_a_bar_before_its_first_item_is_done(self, screen):
        for item in track(range(3), "counting"):
            if item == 0:
                until(screen, "counting")
                until(screen, "0/3")
            if item == 2:
                until(screen, "2/3")
        assert "\x1b[2K" in screen.getvalue()[-20:], "the bar is wiped"
        assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1, "the cursor is back"

    def test_short_work_has_none(self, screen, monkeypatch):
        monkeypatch.setattr(progress, "DELAY", WAIT)
        assert list(track(range(1000), "counting")) == list(range(1000)) and not screen.getvalue()
        assert list(track(range(3), "counting", progress=True)) == [0, 1, 2] and "counting" in shown(screen)

    def test_none_on_demand(self, screen):
        for _ in track(range(2), "counting", progress=False):
            time.sleep(0.05)
        assert not screen.getvalue()

    def test_items_without_a_length(self, screen):
        for item in track(iter("abc"), "spelling", total=3, progress=True):
            until(screen, f"{'abc'.index(item)}/3")
        for _ in track(iter("a"), "open end", progress=True):
            until(screen, "0/?")

    @pytest.mark.parametrize("way", ["break", "raise"])
    def test_work_that_ends_early_leaves_no_bar(self, screen, way):
        def work() -> None:
            for _ in track(range(3), "counting", progress=True):
                until(screen, "counting")
                if way == "raise":
                    raise KeyboardInterrupt
                break

        if way == "raise":
            with pytest.raises(KeyboardInterrupt):
                work()
        else:
            work()
        assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1

    def test_a_bar_within_a_bar(self, screen):
        seen = []
        for outer in track(range(2), "outer"):
            until(screen, f"{outer}/2")
            for inner in track(range(3), f"inner {outer}"):
                until(screen, f"inner {outer}")
                seen.append((outer, inner))
        assert seen == [(i, j) for i in range(2) for j in range(3)]
        assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1

    def test_what_is_printed_meanwhile_is_there(self, screen):
        for item in track(range(2), "counting", progress=True):
            rich.get_console().print(f"item {item}")
        assert "item 0" in shown(screen) and "item 1" in shown(screen)


class TestPipe:
    WORK = "[time.sleep(0.05) for _ in progress.track(range(3), 'counting'{})]"

    @pytest.mark.parametrize("forced", [False, True])
    def test_it_is_silent(self, forced):
        """Also where colours are forced, as in many a log."""
        environment = {"FORCE_COLOR": "1", "PYTHONPATH": str(Path(mechunlearn.__file__).parents[1])}
        assert piped(self.WORK.format(""), environment if forced else None) == ""
        assert piped(self.WORK.format(", progress=False"), environment if forced else None) == ""

    def test_on_demand_its_last_state_is_printed_once(self):
        found = piped(self.WORK.format(", progress=True"))
        assert found.count("counting") == 1 and "3/3" in found
