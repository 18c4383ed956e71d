"""The LoKU reproduction: one rule for every method, runs that stop where they should, and a page that follows from it."""

import json
import math
import shutil

import pytest

from mechunlearn import MechunlearnError
from mechunlearn.core.grid import Grid
from mechunlearn.reproduce import loku, loku_bench
from mechunlearn.reproduce.engine import Plan, stored
from mechunlearn.reproduce.loku import METHODS, PAPER
from mechunlearn.reproduce.loku_bench import BOUNDS, VALIDATION, Bench, Cell
from mechunlearn.world.small import build_small
from tests.pages import flat


def result(hit: int | None, retain: float, text_loss: float = 1.0, end: float | None = None) -> dict:
    numbers = {"forget": 0.3, "retain": retain, "text loss": text_loss, "repetition": 0.2, "other facts": 0.9}
    numbers["forget quality"] = 0.5
    return {
        "hit": hit,
        "at hit": None if hit is None else numbers,
        "at end": {**numbers, "text loss": text_loss if end is None else end},
        "curve": [{"step": step, "forget": 1 / step, "retain": retain} for step in (1, 2, 4)[: 2 if hit == 2 else 3]],
    }


@pytest.fixture
def plan(tmp_path, monkeypatch) -> Plan:
    """Two worlds and three rates; a quick one has passages only."""
    monkeypatch.setattr(loku, "RATES", (1e-3, 2e-3, 4e-3))
    return Plan(tmp_path, (0, 1), (0, 1), quick=True)


class TestRule:
    @pytest.fixture
    def choosing(self, plan):
        grid = Grid.open(plan.folder, PAPER.about(plan))

        def given(by_rate: dict[float, tuple[dict, dict]]) -> float:
            for rate, cells in by_rate.items():
                for world, cell in enumerate(cells):
                    grid.cell(Cell("passages", "IHL", world, VALIDATION, rate).description(), lambda cell=cell: cell)
            return loku._choose(grid, plan, "passages", "IHL")

        return given

    def test_the_fewest_steps_among_those_that_keep(self, choosing):
        found = {
            1e-3: (result(20, 1.0), result(20, 1.0)),
            2e-3: (result(8, 0.95), result(9, 0.9)),
            4e-3: (result(3, 0.8), result(3, 0.9)),  # faster, but .85 on average
        }
        assert choosing(found) == 2e-3

    def test_reaching_the_target_in_more_worlds_comes_first(self, choosing):
        found = {1e-3: (result(20, 0.5), result(20, 0.6)), 2e-3: (result(3, 1.0), result(None, 1.0))}
        assert choosing({**found, 4e-3: (result(None, 1.0), result(None, 1.0))}) == 1e-3

    def test_if_none_keeps_the_one_that_keeps_most(self, choosing):
        found = {1e-3: (result(20, 0.5), result(20, 0.5)), 2e-3: (result(9, 0.7), result(9, 0.7))}
        assert choosing({**found, 4e-3: (result(2, 0.6), result(2, 0.6))}) == 2e-3

    def test_ties_go_to_the_smaller_rate(self, choosing):
        assert choosing(dict.fromkeys((1e-3, 2e-3, 4e-3), (result(5, 1.0), result(5, 1.0)))) == 1e-3

    def test_a_run_that_is_missing_is_named(self, plan):
        grid = Grid.open(plan.folder, PAPER.about(plan))
        with pytest.raises(MechunlearnError, match="method='IHL'.*is not finished"):
            stored(grid, Cell("passages", "IHL", 0, 0, 1e-3))


def test_the_page_says_what_holds_what_is_inconclusive_and_what_diverged(plan):
    grid = Grid.open(plan.folder, PAPER.about(plan))
    chosen = {"passages": dict.fromkeys(METHODS["passages"], 2e-3)}
    known = {name: {"forget": 0.4, "EL10": 0.0, "retain": 0.9} for name in ("unedited", "gold", "target")}
    for world in plan.worlds:
        for seed in plan.seeds:
            grid.cell(Cell("passages", BOUNDS, world, seed).description(), lambda: {**known, "family": "llama"})
            for method in METHODS["passages"]:
                shift = 0.1 * (world - seed)
                cell = {
                    "IHL": result(5, 0.99, 1.0 + shift),
                    "GA": {**result(2, 0.4), "at end": {"text loss": math.nan, "retain": math.nan}, "note": "nan"},
                    "GD": result(6, 0.9, 1.0 + shift, end=2.0 + shift),
                    "LoRA pissa": result(None, 0.9, 1.0),
                }.get(method, result(5 + (seed + world) % 2, 0.95, 1.0 - 0.1 * (world - seed)))
                grid.cell(Cell("passages", method, world, seed, 2e-3).description(), lambda cell=cell: cell)
    found = json.loads(json.dumps(PAPER.results(plan, grid, chosen)))
    told, verdicts = flat(PAPER.page(found)), {claim.text: claim.verdict for claim in PAPER.claims(found)}
    row = "IHL keeps text loss lower than GD at the end (passages) | -1 [-1, -1] | 4 pairs, 2 worlds | **holds** |"
    assert row in told
    assert verdicts["IHL keeps text loss lower than NPO at the end (passages)"] == "inconclusive"
    assert verdicts["IHL keeps text loss lower than GA at the end (passages)"] == "not measured"
    assert "| GA | 0.002 | 4 of 4, 4 diverged |" in told and "| LoRA pissa | 0.002 | 0 of 4 | 40 [40, 40] |" in told
    assert verdicts["LoRA fila needs fewer steps than LoRA pissa (passages)"] == "holds"
    assert "LoRA random (passages) | +0 [+0, +0] | 4 pairs, 2 worlds | **equivalent** |" in told
    assert "| IHL | 1.00 / 0.99 | 0.50 / 0.99 | 0.25 / 0.99 | – |" in told
    assert "| GA | 1.00 / 0.40 | 0.50 / 0.40 | – |" in told, "ended runs are not averaged"
    assert "2 small worlds" in told and "2 disjoint forget sets" in told


class TestARun:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """A world that has learnt next to nothing: enough for what does not depend on it."""
        folder = tmp_path_factory.mktemp("loku")
        build_small(folder / "worlds" / "0", 0, steps=2, people=100, passages=100)
        shutil.copytree(folder / "worlds" / "0", folder / "worlds" / "0-gold")
        return folder

    def test_sets_are_disjoint(self, folder):
        first, second = (Bench(folder, 0, seed, "passages") for seed in (0, 1))
        assert not set(first.forget_texts) & set(second.forget_texts) and not first.people & second.people
        for bench in (first, second):
            texts = [*bench.forget_texts, *bench.retain_texts, *bench.other_texts, *bench.unseen]
            assert len(set(texts)) == len(texts)
            assert not bench.people & bench.retained and not bench.others & (bench.people | bench.retained)
        forget, retain = first.prompts()
        assert len(forget) == len(first.forget_texts) and len(retain) == len(first.retain_texts)
        assert forget.answers.shape[1] > 100, "the whole passage but its first word is trained on"

    @pytest.mark.slow
    @pytest.mark.parametrize("task, method", [("passages", "IHL"), ("facts", "LoRA fila")])
    def test_it_goes_on_to_five_times_the_hit_and_validation_stops_there(self, folder, task, method, monkeypatch):
        monkeypatch.setattr(Bench, "target", lambda self: {"forget": -1.0})
        monkeypatch.setitem(loku_bench.STEPS, task, 7)
        never = Bench(folder, 0, 0, task).measured(Cell(task, method, 0, 0, 1e-3))
        assert never["hit"] is None and never["at hit"] is None and never["at end"] is not None
        assert never["curve"][-1]["step"] == 7
        monkeypatch.setattr(Bench, "target", lambda self: {"forget": 2.0})
        run = Bench(folder, 0, 0, task).measured(Cell(task, method, 0, 0, 1e-3))
        assert run["hit"] == 1 and run["curve"][-1]["step"] == 5 and run["at end"] is not None
        assert (
            set(run["at hit"])
            == set(run["at end"])
            >= {"forget", "retain", "text loss", "repetition", "forget quality"}
        )
        choice = Bench(folder, 0, VALIDATION, task).measured(Cell(task, method, 0, VALIDATION, 1e-3))
        assert choice["hit"] == 1 and choice["curve"][-1]["step"] == 1

    def test_the_same_cell_gives_the_same_numbers(self, folder, monkeypatch):
        monkeypatch.setattr(Bench, "target", lambda self: {"forget": 2.0})
        one, other = (Bench(folder, 0, 1, "facts").measured(Cell("facts", "NPO", 0, 1, 1e-3)) for _ in range(2))
        assert one == other
