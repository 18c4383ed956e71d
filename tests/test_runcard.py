"""What a card says of time and memory, on every system."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mechunlearn.core.runcard import RunCard, Stopwatch, digest, peak_mib

STATUS = Path("/proc/self/status")


@pytest.fixture
def resource(monkeypatch):
    """A `resource` that has seen 3 * 2**20 of whatever the system counts in."""
    used = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: used))


class TestPeak:
    @pytest.mark.skipif(not STATUS.exists(), reason="Linux says what the peak is")
    def test_it_is_what_linux_says(self):
        before = peak_mib()
        held = bytearray(64 * 2**20)
        grown = peak_mib()
        del held
        said = int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) / 2**10
        assert peak_mib() == pytest.approx(said, rel=0.02) and peak_mib() >= grown >= before
        assert peak_mib() >= 0.98 * psutil.Process().memory_info().rss / 2**20

    @pytest.mark.parametrize("system, unit", [("linux", 2**10), ("darwin", 2**20)])
    def test_in_the_unit_of_the_system(self, monkeypatch, resource, system, unit):
        monkeypatch.setattr(sys, "platform", system)
        assert peak_mib() == 3 * 2**20 / unit

    def test_on_windows(self, monkeypatch):
        """Bytes, and no `resource`."""
        memory = SimpleNamespace(rss=2**20, peak_wset=7 * 2**20)
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: memory))
        monkeypatch.setitem(sys.modules, "resource", None)
        assert peak_mib() == 7

    def test_where_no_peak_is_known_it_is_what_is_held_now(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "resource", None)
        assert peak_mib() == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.05)


class TestCard:
    def test_a_stamped_card_has_time_and_memory_and_is_json(self, monkeypatch, resource):
        monkeypatch.setattr(sys, "platform", "linux")
        card = Stopwatch().stamp(RunCard("by hand", seed=3, settings={"lr": 0.1}))
        assert card.peak_mib == 3072 and card.seconds >= 0
        kept = json.loads(card.to_json())
        assert kept == json.loads(RunCard(**kept).to_json())
        assert kept["method"] == "by hand" and kept["settings"] == {"lr": 0.1} and kept["peak_mib"] == 3072
        assert kept["versions"]["mechunlearn"] != "not installed" and kept["versions"]["torch"].startswith("2.")

    def test_a_digest_depends_on_parts_and_order(self):
        assert digest("a", b"b") == digest("a", memoryview(b"b")) == digest("a", "b")
        assert len({digest("a", "b"), digest("b", "a"), digest("ab"), digest("ab", ""), digest()}) == 5
